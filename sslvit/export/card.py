"""The model card of an export: README.md, in Markdown, from the records of the run."""

import json
import math
from pathlib import Path
from typing import Any

from ..arguments import flatten, format_value, read_yaml
from ..checkpoints.journal import STARTS
from ..errors import UserError, printable
from ..pretrained import Pretrained

RECORD_BYTES = 1 << 24  # of one result, or of the list of starts; larger ones are left out
RECORDS = 100  # results that are read
POOLS = {
    "cls": "the class token",
    "mean": "the mean of the patches",
    "cls+mean": "the class token and the mean of the patches, side by side",
    "last4": "the class tokens of the last four blocks, side by side",
    "mean4": "the means of the patches of the last four blocks, side by side",
    "pooled": "what the model pools",
}


def text(subject: Pretrained, library: str, how: str, license: str) -> str:
    """The whole card. library: as the Hub names it. how: lines of Python that load the folder."""
    encoder = subject.encoder
    (h, w), run = encoder.image_size, flatten(_run(subject))
    method = str(run.get("method", ""))
    head = {
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["sslvit", *([_plain(method)] if method else [])],
    }
    of_run = [
        f"- Method: {_code(method)}. Images seen: {_plain(subject.detail.get('images_seen', 0))}.",
        f"- Data: {_code(run.get('data.train'))}, without labels.",
        f"- Command: {_code(_command(subject))}",
        "\n<details><summary>Recipe</summary>\n\n```yaml\n"
        + "\n".join(_code(f"{key}: {format_value(value)}")[1:-1] for key, value in run.items())
        + "\n```\n\n</details>",
    ]
    source = ", ".join(f"{key} {value}" for key, value in subject.detail.items() if key != "notes")
    licence = f"Licence: {_code(license)}" if license else "Licence: not stated. Ask those who made it."
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in head.items()),
        *([f"license: {json.dumps(license)}"] if license else []),
        "---",
        f"# {getattr(encoder, 'architecture', '')}" + f", pretrained with {_plain(method)}" * bool(method),
        "",
        f"An image encoder: {encoder.in_chans} channels of {h}x{w} pixels become {encoder.feature_dim()} features, "
        f"{POOLS[encoder.pool]}.",
        f"Pixels lie in [0, 1]; mean {list(subject.mean)} is subtracted, then they are divided by {list(subject.std)}."
        + f" 0 and 1 stand for the values {list(subject.value_range or ())}." * bool(subject.value_range),
        "",
        "## Load",
        f"```python\n{how}\n```",
        "",
        "## Pretraining",
        *(of_run if run else [f"Made from {_code(source)}."]),
        "",
        "## Measured",
        *_measured(subject),
        "",
        licence,
    ]
    return "\n".join(lines) + "\n"


def equal(difference: float) -> str:
    """What every form says after its check. difference: relative to the largest feature."""
    return f"equal features (largest difference {difference:.1e} of their size)"


def _run(subject: Pretrained) -> dict[str, Any]:
    """The configuration of its run, or {}."""
    where = subject.folder and subject.folder / "config.yaml"
    try:
        return read_yaml(where) if where else {}
    except UserError:  # an exported folder has none
        return {}


def _command(subject: Pretrained) -> str:
    try:
        start = json.loads(_read((subject.folder or Path()) / STARTS).strip().splitlines()[-1])
        return str(start["command"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "not recorded"


def _measured(subject: Pretrained) -> list[str]:
    """A table of the results of this checkpoint, and which pooling a probe chose."""
    rows, chosen, folder = [], [], subject.results
    for path in sorted(folder.glob("*.json"))[:RECORDS] if folder and not folder.is_symlink() else []:
        try:
            record = json.loads(_read(path))
            results, test = record["results"], record.get("test") or record.get("data")
            if record.get("step") != subject.detail.get("step"):
                continue
            images = f"{int(test['images']):,} of {_code(test['data'])}"
            shown = results.get("neighbours", [results])
            for row in [row for row in shown if row.get("k") == 20] or shown[:1]:
                for key, value in row.items():
                    low, high = row.get(f"{key}_interval") or (math.nan, math.nan)
                    if isinstance(value, (int, float)) and low <= value <= high:
                        k = f", k = {row['k']}" if "k" in row else ""
                        name = _plain(f"{path.stem}{k}: {key}")
                        rows.append(f"| {name} | {value:g} | {low:g} to {high:g} | {images} |")
            if "sweep" in results and results["pool"] in POOLS:
                chosen.append(f"{_code(path.stem)} chose {POOLS[results['pool']]} on held-out images.")
        except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            continue  # a damaged record, or one of another program
    if not rows:
        return ["Nothing was measured yet with this checkpoint."]
    header = ["| measurement | value | 95 % interval over test images | test images |", "|---|---|---|---|"]
    best = " ".join(chosen) or f"only {POOLS[subject.encoder.pool]} was measured."
    return [*header, *rows, "", f"Best pooling: {best}"]


def _read(path: Path) -> str:
    """A text file. Raises OSError or ValueError, also for a link, a pipe, or a file above the limit."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > RECORD_BYTES:
        raise ValueError(f"{path} is not read")
    return path.read_text(encoding="utf-8")


def _plain(value: Any) -> str:
    """Text that Markdown shows as it is: on one line, without marks that begin code, a column, a tag or a link."""
    return printable(str(value))[:200].translate(str.maketrans("`|<[", "'/({"))


def _code(value: Any) -> str:
    return f"`{printable(str(value))[:4000].translate(str.maketrans('`|', '~/'))}`"
