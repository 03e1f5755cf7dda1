import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sslvit import optim
from sslvit.checkpoints import state
from sslvit.errors import UserError


def trained(steps: int = 2, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module[2].weight.requires_grad_(False)
    optimizer = optim.make_optimizer(optim.Config(base_lr=0.1), module)
    for _ in range(steps):
        module(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def saved(run_dir, *steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    for step in steps:
        module, optimizer = trained(step)
        run = state.RunState(step, step * 5, 1.5 * step, {"steps": 1, "sums": {"loss": 0.1 + step}})
        state.save(run_dir, module, optimizer, run, {"note": "x"})
    return module, optimizer


def test_everything_comes_back_exactly(tmp_path):
    module, optimizer = saved(tmp_path, 3)
    fresh, fresh_optimizer = trained(0, seed=1)
    run, record, complaints = state.restore(tmp_path, fresh, fresh_optimizer)
    assert (run.step, run.images_seen, run.seconds, run.window["sums"]["loss"]) == (3, 15, 4.5, 3.1)
    assert record["note"] == "x"
    assert complaints == []
    for key, value in module.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key])
    ours, theirs = (state.optimizer_tensors(m, o) for m, o in ((module, optimizer), (fresh, fresh_optimizer)))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 5 * 3  # five trained tensors: step and two moments each
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_nothing_but_safetensors_and_json_is_written(tmp_path):
    saved(tmp_path, 1)
    folder = state.folder_of(tmp_path, 1)
    assert {path.name for path in folder.iterdir()} == {state.MODEL, state.OPTIMIZER, state.STATE, state.SUMS}
    json.loads((folder / state.STATE).read_text())
    load_file(folder / state.OPTIMIZER)


def test_others_may_read_a_checkpoint_as_any_other_file(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in [tmp_path / "other", *(tmp_path / "checkpoints").glob("step_*/*")]}
    assert len(modes) == 1


def test_the_last_ones_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 10)
    state.prune(tmp_path, keep_last=2, step=10)
    assert state.steps_saved(tmp_path) == [3, 10]
    state.prune(tmp_path, keep_last=0, step=10)
    assert state.steps_saved(tmp_path) == [10]


def test_a_damaged_later_checkpoint_does_not_count_among_the_last_ones(tmp_path):
    saved(tmp_path, 100, 150, 200)
    state.prune(tmp_path, keep_last=1, step=150)  # the run began again at 100, because that of 200 could not be read
    assert state.steps_saved(tmp_path) == [150, 200]


@pytest.mark.parametrize("name", [state.MODEL, state.OPTIMIZER, state.STATE, state.SUMS])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, name, damage):
    saved(tmp_path, 2, 3)
    path = state.folder_of(tmp_path, 3) / name
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    module, optimizer = trained(0)
    run, _, complaints = state.restore(tmp_path, module, optimizer)
    assert run.step == 2
    assert len(complaints) == 1
    assert "step_000000003 is damaged" in complaints[0]


def test_when_no_checkpoint_can_be_read_the_run_does_not_start_over(tmp_path):
    saved(tmp_path, 2)
    (state.folder_of(tmp_path, 2) / state.MODEL).write_bytes(b"")
    with pytest.raises(UserError, match="None of the 1 checkpoints"):
        state.restore(tmp_path, *trained(0))
    with pytest.raises(UserError, match="None of the 1 checkpoints"):
        state.latest(tmp_path, state.MODEL)
    with pytest.raises(UserError, match="has no checkpoint"):
        state.latest(tmp_path / "elsewhere")


def test_a_checkpoint_that_was_being_written_does_not_count(tmp_path):
    saved(tmp_path, 2)
    shutil.copytree(state.folder_of(tmp_path, 2), tmp_path / "checkpoints" / ".writing_000000003")
    assert state.steps_saved(tmp_path) == [2]
    saved(tmp_path, 3)
    assert state.steps_saved(tmp_path) == [2, 3]


def test_a_pickle_in_place_of_a_checkpoint_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    saved(tmp_path, 2)
    torch.save({"model": Trap()}, state.folder_of(tmp_path, 2) / state.MODEL)
    with pytest.raises(UserError, match="damaged"):
        state.restore(tmp_path, *trained(0))
    assert not (tmp_path / "sprung").exists()
