"""What a run takes for its own: no checkpoints of another step, run or model, and no other directory than its first."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sslvit import config
from sslvit.__main__ import main
from sslvit.checkpoints import journal, state, textfile
from sslvit.checkpoints.lock import Lock
from sslvit.checkpoints.saving import Saver
from sslvit.errors import UserError
from sslvit.run import check_directory

from .. import processes
from ..conftest import words, write_images
from ..processes import assert_same_run
from ..test_nonfinite import SKIPS
from .test_state import saved, trained


def sign(folder: Path) -> None:
    """Write the checksums of what is there, as somebody could who has changed it."""
    names = (state.MODEL, state.OPTIMIZER, state.STATE)
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / state.SUMS).write_text("".join(sums))


def change(folder: Path, **values) -> None:
    """Other values in state.json, with the right checksum."""
    record = json.loads((folder / state.STATE).read_text())
    (folder / state.STATE).write_text(json.dumps(record | values))
    sign(folder)


def resumed_at_2(run_dir: Path) -> str:
    """The one complaint of a run that has to pass over its checkpoint of step 3."""
    run, _, complaints = state.restore(run_dir, *trained(0))
    assert run.step == 2
    assert len(complaints) == 1
    return complaints[0]


def test_a_copy_under_another_name_is_no_checkpoint(tmp_path):
    saved(tmp_path, 1, 2)
    shutil.copytree(state.folder_of(tmp_path, 1), state.folder_of(tmp_path, 3))
    assert "it is the checkpoint of step 1 under another name" in resumed_at_2(tmp_path)
    with pytest.raises(state.Damaged, match="step 1 under another name"):
        state.read(state.folder_of(tmp_path, 3))
    state.folder_of(tmp_path, 3).rename(tmp_path / "checkpoints" / "mine")  # a name that claims no step
    assert state.read(tmp_path / "checkpoints" / "mine")[0]["step"] == 1


def test_a_checkpoint_of_another_run_is_passed_over_and_one_of_an_older_version_is_not(tmp_path):
    saved(tmp_path, 1, 2, 3)
    journal.add_start(tmp_path, {"run": "ours"})
    assert state.restore(tmp_path, *trained(0))[0].step == 3  # it has no identity
    change(state.folder_of(tmp_path, 2), run="ours")
    change(state.folder_of(tmp_path, 3), run="theirs")
    assert "step_000000003 is damaged (it belongs to another run)" in resumed_at_2(tmp_path)
    for step in (1, 2):
        change(state.folder_of(tmp_path, step), run="theirs")
    with pytest.raises(UserError, match="None of the 3 checkpoints"):
        state.restore(tmp_path, *trained(0))


@pytest.mark.parametrize("name", [state.MODEL, state.OPTIMIZER])
@pytest.mark.parametrize("damage", ["shape", "type", "missing", "another name", "nothing in it"])
def test_tensors_that_are_not_of_this_model_are_found_before_any_is_loaded(tmp_path, name, damage):
    saved(tmp_path, 2, 3)
    path = state.folder_of(tmp_path, 3) / name
    tensors = load_file(path)
    key = "0.weight" if name == state.MODEL else "0.weight/exp_avg"
    value = tensors.pop(key)
    if damage == "shape":
        tensors[key] = value.flatten()[:3].clone()
    elif damage == "type":
        tensors[key] = value.double()
    elif damage == "another name":
        tensors[key.replace("0", "7")] = value
    save_file({} if damage == "nothing in it" else tensors, path)
    sign(path.parent)
    module, optimizer = trained(0)
    if damage == "nothing in it" and name == state.OPTIMIZER:  # no parameter has had a gradient
        assert state.restore(tmp_path, module, optimizer)[0].step == 3
        return
    shown = {"shape": "[3] float32", "type": "[4, 3] float64"}.get(damage, "missing")
    assert f"{key} is {shown} and must be [4, 3] float32" in resumed_at_2(tmp_path) or damage == "nothing in it"


def test_a_number_of_steps_that_no_run_has_is_found(tmp_path):
    saved(tmp_path, 2, 3)
    path = state.folder_of(tmp_path, 3) / state.OPTIMIZER
    save_file(load_file(path) | {"0.weight/step": torch.tensor(-1.0)}, path)
    sign(path.parent)
    assert "negative or no number" in resumed_at_2(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"step": "3"}, {"step": -3}, {"seconds": float("inf")}, {"seconds": None}, {"images_seen": 10**400},
        {"window": []}, {"window": {"steps": 1, "sums": {"loss": "x"}}}, {"window": {"steps": 1, "sums": 3}},
        {"window": {"steps": float("nan")}}, {"lengths": 3}, {"lengths": {"metrics.jsonl": 5.5}}, {"images": "x"},
        {"energy": 3}, {"energy": {"cpu_kwh": "x"}}, {"best_knn": "x"}, {"knn_after": "x"}, {"run": 3}, {"format": 2},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_no_run_writes_make_no_checkpoint(tmp_path, values):
    saved(tmp_path, 2, 3)
    change(state.folder_of(tmp_path, 3), **values)
    assert "step_000000003 is damaged" in resumed_at_2(tmp_path)


def test_a_state_that_is_too_deep_or_too_long_makes_no_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, 2, 3)
    folder = state.folder_of(tmp_path, 3)
    for content in ("[" * 100_000, "[" * 100_000 + "]" * 100_000, "[]", "3"):
        (folder / state.STATE).write_text(content)
        sign(folder)
        resumed_at_2(tmp_path)
    monkeypatch.setattr(state, "LARGEST_TEXT", 1000)
    (folder / state.STATE).write_text(" " * 1001)
    sign(folder)
    assert "is larger than 1000 bytes" in resumed_at_2(tmp_path)


def test_other_names_are_no_checkpoints(tmp_path):
    saved(tmp_path, 2)
    for name in ("step_5", "step_²", "step_٣", "step_x", "step_", "step_-00000001"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert state.steps_saved(tmp_path) == [2]


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    saved(tmp_path, 2)
    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\): let this user read"):
        state.steps_saved(tmp_path)


def test_no_half_of_a_directory_is_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        state.save(tmp_path / "gone", *trained(1), state.RunState(1), {})
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_checkpoint_is_not_written_to_another_directory(tmp_path, how):
    """Its run directory was deleted, moved or replaced while it was being written."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Saver(run_dir, state.Config()) as saver:
        saver.lock = Lock(run_dir)
        saver.lock.start = journal.add_start(run_dir, {"run": "ours"})
        saver.save(*trained(2), state.RunState(2), {})
        saver.check(wait=True)
        assert state.read(state.folder_of(run_dir, 2))[0]["run"] == "ours"
        run_dir.rename(tmp_path / "moved")
        if how == "deleted":
            shutil.rmtree(tmp_path / "moved")
        elif how == "replaced":
            run_dir.mkdir()
            journal.add_start(run_dir, {"run": "theirs"})
        saver.save(*trained(3), state.RunState(3), {})
        with pytest.raises(UserError, match="was deleted or moved while its run was training"):
            saver.check(wait=True)
    assert state.steps_saved(run_dir) == []
    assert run_dir.exists() == (how == "replaced")
    assert state.steps_saved(tmp_path / "moved") == ([] if how == "deleted" else [2])


@pytest.mark.parametrize("moment", ["before the name is given", "before old ones are deleted"])
def test_no_checkpoint_of_another_run_is_deleted(tmp_path, monkeypatch, moment):
    """Another run takes the place while this one writes its checkpoint of step 3 beside those of its steps 1 and 2."""
    run_dir, theirs = tmp_path / "run", {}
    write, sync = state.write, textfile.sync

    def replace():
        monkeypatch.undo()
        run_dir.rename(tmp_path / "moved")
        run_dir.mkdir()
        journal.add_start(run_dir, {"run": "theirs"})
        saved(run_dir, 1, 2, 3)
        theirs.update(contents(run_dir))

    def sync_and_replace(path):
        sync(path)
        if path.name.startswith(".writing_") and not theirs:
            replace()

    run_dir.mkdir()
    with Saver(run_dir, state.Config(keep_last=1)) as saver:
        saver.lock = Lock(run_dir)
        saver.lock.start = journal.add_start(run_dir, {"run": "ours"})
        saved(run_dir, 1, 2)
        if "name" in moment:
            monkeypatch.setattr(textfile, "sync", sync_and_replace)
        else:
            monkeypatch.setattr(state, "write", lambda *rest: (write(*rest), replace()))
        saver.save(*trained(3), state.RunState(3), {})
        with pytest.raises(UserError, match="another run has taken its place"):
            saver.check(wait=True)
    assert theirs
    assert contents(run_dir) == theirs


def test_a_directory_that_goes_while_files_are_written_is_named_as_the_reason(tmp_path, monkeypatch):
    write = state.write

    def late(run_dir, *rest):
        run_dir.rename(tmp_path / "moved")
        return write(run_dir, *rest)

    monkeypatch.setattr(state, "write", late)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Saver(run_dir, state.Config()) as saver:
        saver.lock = Lock(run_dir)
        saver.lock.start = journal.add_start(run_dir, {"run": "ours"})
        saver.save(*trained(2), state.RunState(2), {})
        with pytest.raises(UserError, match="was deleted or moved while its run was training"):
            saver.check(wait=True)
    assert not run_dir.exists()


def test_lines_of_earlier_steps_are_not_cut_off_whatever_a_checkpoint_says(tmp_path):
    """A checkpoint from a copy of the run that wrote fewer lines says that the file was shorter."""
    metrics = tmp_path / journal.METRICS
    metrics.write_text('{"step": 1}\n{"step": 2}\n# a note\n{"step": 3}\n{"step": 4}\n{"st')
    journal.rewind(tmp_path, {journal.METRICS: 12}, 3)
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n# a note\n{"step": 3}\n'
    for length in (-1, 10**30):
        journal.rewind(tmp_path, {journal.METRICS: length}, 2)
        assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n# a note\n'


def test_the_identity_of_a_run_is_that_of_its_last_readable_start(tmp_path):
    assert journal.run_id(tmp_path) is None
    path = tmp_path / journal.STARTS
    path.write_bytes(b'{"time": "old"}\n\xff\xfe\n[]\n3\n{"ti')
    assert journal.run_id(tmp_path) is None
    line = journal.add_start(tmp_path, {"run": "ours"})
    assert journal.run_id(tmp_path) == "ours"
    assert path.read_bytes().endswith(b'\n{"ti\n' + line)
    textfile.write(path, b"")
    assert journal.run_id(tmp_path) is None


def test_starts_that_are_a_pipe_or_nested_without_end_are_passed_over(tmp_path):
    (tmp_path / journal.STARTS).write_text('{"run": "ours"}\n' + "[" * 100_000 + "\n")
    assert journal.run_id(tmp_path) == "ours"
    (tmp_path / journal.STARTS).unlink()
    os.mkfifo(tmp_path / journal.STARTS)
    assert journal.run_id(tmp_path) is None


def test_starts_without_end_are_not_read(tmp_path):
    with (tmp_path / journal.STARTS).open("wb") as file:
        file.truncate(2**40)
    assert journal.run_id(tmp_path) is None
    with pytest.raises(OSError, match="is larger than 16777216 bytes, move it away"):
        journal.add_start(tmp_path, {"run": "ours"})


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of 8 steps with checkpoints of 4 and 8, and its command without out=."""
    out = tmp_path_factory.mktemp("identity") / "run"
    command = ["pretrain", str(images), *words("mae", "workers=0", "save.every_steps=4")]
    assert main([*command, f"out={out}"]) == 0
    return out, command


@pytest.fixture
def run(finished, tmp_path) -> tuple[Path, list[str]]:
    """A copy of it, and its command."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run", [*finished[1], f"out={tmp_path / 'run'}"]


def contents(place: Path) -> dict[Path, bytes]:
    """{path: bytes} of a file, or of all files of a folder.

    A save that begins at the very moment in which its directory is replaced leaves an unfinished folder there, which
    the next start deletes: it does not count."""
    files = (path for path in (place, *place.rglob("*")) if path.is_file() and ".writing_" not in str(path))
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("emptied", [True, False])
def test_a_run_that_has_lost_its_checkpoints_is_refused_and_nothing_is_touched(run, cli, fails, tmp_path, emptied):
    out, command = run
    shutil.move(out / "checkpoints", tmp_path / "backup")
    if emptied:
        (out / "checkpoints").mkdir()
    before = contents(out)
    message = fails(*command, "epochs=3")
    assert f"Restore {out / 'checkpoints'} from a copy to continue the run" in message
    assert "move metrics.jsonl away to begin again here" in message
    assert contents(out) == before
    shutil.copytree(tmp_path / "backup", out / "checkpoints", dirs_exist_ok=True)
    assert "Resuming" in cli(*command, "epochs=3")[1]
    shutil.rmtree(out / "checkpoints")
    (out / "metrics.jsonl").unlink()
    assert cli(*command)[0] == 0


def test_a_run_killed_before_its_first_checkpoint_begins_again(images, tmp_path):
    command = ["pretrain", str(images), *words("mae", "workers=0", "epochs=3")]
    broken, whole, log = tmp_path / "broken", tmp_path / "whole", tmp_path / "log"
    other = processes.start([*command, f"out={whole}"], log)
    processes.kill_at(processes.start([*command, "epochs=300", f"out={broken}"], log), broken, step=3)
    assert [path.name for path in (broken / "checkpoints").iterdir()] == [state.NONE_YET]
    processes.finish(other, log)
    processes.finish(processes.start([*command, f"out={broken}"], log), log)
    assert_same_run(whole, broken)
    assert {path.name for path in (broken / "checkpoints").iterdir()} == {"step_000000012"}


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_run_whose_directory_goes_ends_and_says_it(run, cli, images, tmp_path, how):
    """And makes no part of it anew. From the place to which it was moved it goes on as if nothing had been."""
    out, command, log = tmp_path / "going", run[1], tmp_path / "log"
    command = [*command[:-1], "epochs=24", f"out={out}", "log.tensorboard=true"]
    process = processes.start(command, log)
    processes.wait_for_step(process, out, 9)
    out.rename(tmp_path / "moved")
    if how == "deleted":
        shutil.rmtree(tmp_path / "moved")
    elif how == "replaced":
        shutil.copytree(run[0], out)
    before = contents(out)
    printed = processes.finish(process, log, status=2)
    assert printed.count(f"{out} was deleted or moved while its run was training, or another run has taken") == 1
    assert "Traceback" not in printed
    assert "Done" not in printed
    assert contents(out) == before
    assert out.exists() == (how == "replaced")
    if how == "moved":
        for place in ("moved", "whole"):
            assert cli(*command, f"out={tmp_path / place}")[0] == 0
        assert_same_run(tmp_path / "moved", tmp_path / "whole")


def test_all_processes_end_when_the_directory_goes(run, images, tmp_path):
    out, log = tmp_path / "going", tmp_path / "log"
    started = processes.start_several([*run[1][:-1], "epochs=300", f"out={out}"], log, world_size=2)
    processes.wait_for_step(started[0], out, 5)
    out.rename(tmp_path / "moved")
    for process in started:
        printed = processes.finish(process, log, status=2)
    assert printed.count("was deleted or moved while its run was training") == 2
    assert "Traceback" not in printed
    assert not out.exists()


def test_a_copy_of_a_run_goes_on(run, cli):
    assert f"Resuming {run[0]} at step 8 of 12." in cli(*run[1], "epochs=3")[1]


def test_a_checkpoint_of_another_seed_is_not_taken(run, cli, tmp_path):
    out, command = run
    assert cli(*command[:-1], "seed=5", f"out={tmp_path / 'other'}")[0] == 0
    shutil.rmtree(state.folder_of(out, 8))
    shutil.copytree(state.folder_of(tmp_path / "other", 8), state.folder_of(out, 8))
    status, printed, _ = cli(*command)
    assert status == 0
    assert "step_000000008 is damaged (it belongs to another run). The one before it is taken." in printed
    assert "at step 4 of 8" in printed


WRITTEN = {
    "config.yaml", "starts.jsonl", "metrics.jsonl", "bad_images.txt", "nonfinite.jsonl", ".lock", "trace.json",
    "checkpoints", "tensorboard",
}  # fmt: skip


def test_no_link_in_a_run_directory_is_followed(run, fails, tmp_path):
    out, command = run
    given = config.load(command[1:])
    check_directory(out, given)
    for name in WRITTEN:
        target = tmp_path / f"precious_{name}"
        if (out / name).exists():
            (out / name).rename(target)
        (out / name).symlink_to(target)
        with pytest.raises(UserError, match=r"is a link\. A run writes only into its directory and follows no links"):
            check_directory(out, given)
        (out / name).unlink()
        if target.exists():
            target.rename(out / name)
    (out / "checkpoints").rename(tmp_path / "precious")
    (out / "checkpoints").symlink_to(tmp_path / "precious")
    before = contents(tmp_path)
    assert "checkpoints is a link" in fails(*command, "epochs=3")
    assert contents(tmp_path) == before


def test_every_name_that_a_run_writes_is_looked_at(cli, images, tmp_path):
    """With broken images, skipped steps, TensorBoard and a profile."""
    folder = write_images(tmp_path / "images", 37)
    (folder / "003.png").write_bytes(b"no image")
    more = ["bad_ratio=1", "log.tensorboard=true", "log.profile=true", f"out={tmp_path / 'run'}"]
    status = cli("pretrain", folder, *SKIPS, "nan_steps=[3]", *more)[0]
    assert status == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == WRITTEN


def test_a_file_that_was_half_written_under_a_links_name_is_not_followed_either(run, cli, tmp_path):
    out, command = run
    (tmp_path / "precious").write_text("mine")
    for name in ("config.yaml.tmp", ".config.yaml.12345"):
        (out / name).symlink_to(tmp_path / "precious")
    assert cli(*command, "epochs=3")[0] == 0
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (out / ".config.yaml.12345").is_symlink()


@pytest.mark.parametrize("how", ["empty", "missing"])
def test_settings_and_starts_that_a_power_cut_has_taken(run, cli, fails, tmp_path, how):
    """Older versions did not wait until they were on the disk."""
    out, command = run
    run_id = journal.run_id(out)
    for name in ("starts.jsonl", "config.yaml"):
        shutil.copy(out / name, tmp_path / name)
        (out / name).unlink() if how == "missing" else (out / name).write_text("")
    message = fails(*command, "epochs=3")
    assert f"config.yaml is {how}, so the settings of the checkpoints beside it are not known" in message
    shutil.copy(tmp_path / "config.yaml", out / "config.yaml")
    assert "Resuming" in cli(*command, "epochs=3")[1]
    assert journal.run_id(out) == run_id == state.latest(out)[1]["run"]
