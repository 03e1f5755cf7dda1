"""Upload exported folders to the Hugging Face Hub, with the token that `hf auth login` or HF_TOKEN gives."""

from collections.abc import Mapping
from pathlib import Path

from ..distributed import say
from ..errors import UserError, require


def check(name: str) -> None:
    """Before the work. Raises UserError for a name that the Hub would refuse."""
    hub = require("huggingface_hub", "hf", "push=")
    try:
        hub.utils.validate_repo_id(name)
    except hub.errors.HFValidationError as error:
        raise UserError(f"push={name} is no name of a repository: give <user>/<name>.") from error


def push(folders: Mapping[str, Path], name: str) -> None:
    """Make the repository, private, unless it exists, and upload each folder: one to its root, several as subfolders.
    Raises UserError."""
    hub = require("huggingface_hub", "hf", "push=")
    api = hub.HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        for form, folder in folders.items():
            place = form if len(folders) > 1 else None
            address = api.upload_folder(repo_id=name, folder_path=folder, path_in_repo=place)
            say(f"uploaded {folder} to {address}")
    except Exception as error:  # of the network, of the server, of a missing token: of several packages
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = ", ".join(map(str, folders.values()))
        raise UserError(f"push={name} failed ({reason[:300]}). What was exported is whole, in {where}.") from error
