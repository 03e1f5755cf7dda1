"""What is measured while a run trains: the measuring changes nothing, and says when the features have collapsed."""

import math

import pytest
import torch
from accelerate import Accelerator

from sslvit import data, pretrained
from sslvit.data.augment import Normalize
from sslvit.evaluation.online import RankMonitor, nearly_the_same, rank_alarm, unlabelled_score
from sslvit.evaluation.quality import effective_rank

from .. import processes
from ..conftest import METHODS, words, write_images
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


def smooth(count: int, side: int = 32) -> torch.Tensor:
    """Images with shapes as large as those of photos, [count, 3, side, side] uint8."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return (255 * torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1)).byte()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (smooth(64), ""),
        ("fractals", ""),
        (255 * (torch.arange(64) % 2).view(-1, 1, 1, 1) * torch.ones(64, 3, 32, 32) / 255, "are blank"),
        (torch.randint(0, 256, (64, 3, 1, 1)).expand(64, 3, 32, 32).byte(), "are blank, each of one colour"),
        (smooth(1).int().add(torch.randint(-3, 4, (64, 3, 32, 32))).clamp(0, 255).byte(), "are nearly the same"),
        (smooth(64).float() * 1e-4, ""),  # dark ones have a warning of their own
        (smooth(2), ""),
    ],
    ids=["photos", "fractals", "two grays", "colours", "one scene", "dark", "two"],
)
def test_images_that_teach_nothing_are_told_from_others(images, said):
    if isinstance(images, str):
        source = data.open_source(images, data.Config(image_size=32))
        images = torch.stack([source.read(i) for i in range(64)])
    found = nearly_the_same(images)
    assert said in found
    assert bool(said) == bool(found)


def test_features_that_are_not_finite_have_no_rank():
    rank = RankMonitor.__new__(RankMonitor)
    rank.images, rank.normalize = torch.ones(3, 3, 8, 8), lambda x: x * torch.nan
    rank.accelerator = Accelerator(cpu=True)
    assert math.isnan(rank(Linear(False)))


def test_without_labels_a_run_that_destroys_its_weights_stands_for_its_start(cli, fails, colour_run, images, tmp_path):
    """The guard holds a tenth of the images out, and looks for each by another view of itself."""
    many, out = write_images(tmp_path / "many", 320, (32, 32)), tmp_path / "run"
    wild = ["steps=4", "warmup_epochs=0", "optim.base_lr=300", "optim.clip=null", "eval.every_epochs=0.05"]
    arguments = words("mae", f"out={out}", f"model.init={colour_run}", "save.keep_best=true", *wild)
    assert "holds a tenth of the images out" in fails("pretrain", images, *arguments)
    status, printed, _ = cli("pretrain", many, *arguments)
    assert status == 0
    assert "288 images of" in printed
    assert "Training made these weights worse: no step had a score without labels above" in printed
    found = {line["step"]: line["score/unlabelled"] for line in processes.lines(out) if "score/unlabelled" in line}
    assert list(found) == [0, 2, 4]
    assert found[0] > max(found[2], found[4])
    begun, now = (pretrained.load(str(path)).encoder.model.state_dict() for path in (colour_run, out))
    assert all(torch.equal(now[name], value) for name, value in begun.items())


def test_the_score_without_labels_asks_for_views_that_agree_and_for_rank():
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(200, 16, generator=generator), torch.randn(2, 200, 16, generator=generator)
    score = {share: unlabelled_score(images + share * noise) for share in (0.0, 0.7, 50.0)}
    assert 95 < score[0.0] <= 100
    assert score[0.0] > 1.1 * score[0.7] > 2 * score[50.0]
    flat = torch.cat([images[:, :2], torch.zeros(200, 14)], dim=1).expand(2, -1, -1)
    assert unlabelled_score(flat) == pytest.approx(100 * (2 / 16) ** 0.5, abs=1)
