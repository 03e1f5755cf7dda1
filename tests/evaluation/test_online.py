"""What is measured while a run trains: the measuring changes nothing, and says when the features have collapsed."""

import math

import pytest
import torch
from accelerate import Accelerator

from sslvit import data
from sslvit.data.augment import Normalize
from sslvit.evaluation.online import RankMonitor, rank_alarm
from sslvit.evaluation.quality import effective_rank

from .. import processes
from ..conftest import METHODS, words
from ..processes import final_weights, moments


@pytest.mark.parametrize("method", METHODS)
def test_the_rank_is_logged_and_measuring_it_changes_nothing(cli, images, tmp_path, method):
    drop = ["drop_path=0.5"] if method == "dino" else []  # which would show a random number out of its place
    for name, every in (("with", "2"), ("without", "null")):
        arguments = words(method, f"out={tmp_path / name}", f"rank_every_steps={every}", *drop)
        status, printed, _ = cli("pretrain", images, *arguments)
        assert status == 0
        assert "Warning" not in printed
    for read in (final_weights, moments):
        ours, theirs = read(tmp_path / "with"), read(tmp_path / "without")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    found = {line["step"]: line["rankme"] for line in processes.lines(tmp_path / "with") if "rankme" in line}
    assert list(found) == [2, 4, 6, 8]
    assert all(1 < value <= 37 for value in found.values())
    assert not any("rankme" in line for line in processes.lines(tmp_path / "without"))


class Linear(torch.nn.Module):
    image_size = (40, 36)

    def __init__(self, collapsed: bool) -> None:
        super().__init__()
        self.collapsed = collapsed

    def features(self, images):
        x = images.mean(dim=1)[:, ::6, ::6].flatten(1)
        return torch.ones_like(x) + 1e-3 * x if self.collapsed else x


@pytest.mark.parametrize("collapsed", [True, False])
def test_the_rank_is_that_of_all_images_and_a_collapse_is_said_in_plain_words(images, collapsed):
    source, encoder = data.open_source(str(images), data.Config()), Linear(collapsed)
    normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    rank = RankMonitor(source, encoder, normalize, 0, Accelerator(cpu=True))
    whole = torch.cat([encoder.features(normalize(source.read(i)[None].float() / 255)) for i in range(len(source))])
    assert rank(encoder) == pytest.approx(effective_rank(torch.linalg.svdvals(whole.double())), rel=1e-5)
    assert (rank_alarm(rank(encoder)) is not None) == collapsed


def test_features_that_are_not_finite_have_no_rank():
    rank = RankMonitor.__new__(RankMonitor)
    rank.images, rank.normalize = torch.ones(3, 3, 8, 8), lambda x: x * torch.nan
    rank.accelerator = Accelerator(cpu=True)
    assert math.isnan(rank(Linear(False)))
