"""From facts, machine and time to settings: no image is read and nothing is trained."""

import pytest

from sslvit.errors import UserError
from sslvit.settings.choose import Choice, Facts, Machine, choose

LAPTOP = Machine("2 CPU cores", rate=4e11, memory=8 << 30)
GPU = Machine("a GPU", rate=5e14, memory=80 << 30, gpu=True)
SCANS = Facts(303, 300, 310, sizes=290, channels=1, deep=True, value_range=(0.0, 4095.0), mean=(0.3,), std=(0.2,),
              broken=0.01)  # fmt: skip
DRAWINGS = Facts(8000, 28, 28, channels=1, mean=(0.29,), std=(0.35,), sided=True, alike=True)
PHOTOS = Facts(256, 375, 500, sizes=120)
CHANNELS = Facts(400, 48, 48, channels=5, mean=(0.5,) * 5, std=(0.28,) * 5)
FRACTALS = Facts(10_000, 64, 64)
CIFAR = Facts(50_000, 32, 32)


def keys(choices: list[Choice]) -> dict:
    return {key: value for choice in choices for key, value in choice.keys.items()}


@pytest.mark.parametrize(
    ("facts", "machine", "expected"),
    [
        (SCANS, LAPTOP, {"data.image_size": 64, "model.args.patch_size": 8, "data.in_chans": 1, "global_batch_size": 64,
                         "objective.preset": "xray", "data.value_range": [0.0, 4095.0], "data.bad_ratio": 0.03}),
        (DRAWINGS, LAPTOP, {"data.image_size": 28, "model.args.patch_size": 7, "data.in_chans": 1,
                            "objective.preset": "gray", "objective.flip_prob": 0.0, "global_batch_size": 256,
                            "objective.mask_ratio": 0.75, "objective.koleo_weight": 0.1, "model.args.depth": 4,
                            "data.mean": [0.29]}),
        (PHOTOS, LAPTOP, {"data.image_size": 64, "model.args.patch_size": 8, "objective.preset": "photo",
                          "global_batch_size": 64}),
        (CHANNELS, LAPTOP, {"data.image_size": 48, "model.args.patch_size": 4, "data.in_chans": 5,
                            "objective.preset": "channels"}),
        (FRACTALS, LAPTOP, {"data.image_size": 64, "model.args.patch_size": 8, "method": "mae"}),
        (CIFAR, LAPTOP, {"data.image_size": 32, "model.args.patch_size": 4, "method": "mae", "global_batch_size": 128,
                         "objective.flip_prob": None, "model.args.embed_dim": 192, "model.args.depth": 4,
                         "optim.base_lr": 0.001, "optim.lr_schedule": "hold"}),
        (PHOTOS, GPU, {"data.image_size": 224, "model.args.patch_size": 16, "method": "dino", "batch_size": "auto",
                       "objective.local_crop_size": 96}),
    ],
)  # fmt: skip
def test_what_strangers_folders_get_in_ten_minutes(facts, machine, expected):
    chosen = keys(choose(facts, machine, 10, {}))
    assert {key: chosen.get(key) for key in expected} == expected
    assert ("data.in_chans" in chosen) == (facts.channels != 3)


def test_each_choice_has_a_reason_and_says_how_sure_it_is():
    for choice in [*choose(SCANS, LAPTOP, 10, {}), *choose(PHOTOS, GPU, 10, {})]:
        assert choice.reason
        assert any(word in choice.sure for word in ("measured", "published", "guess", "sure", "estim"))
        assert len(choice.line()) < 180
        assert "{" not in choice.line()


def test_given_keys_win_and_what_follows_adapts():
    chosen = keys(choose(CIFAR, LAPTOP, 10, {"data.image_size": 64}))
    assert "data.image_size" not in chosen
    assert chosen["model.args.patch_size"] == 8
    chosen = keys(choose(CIFAR, LAPTOP, 10, {"method": "dino"}))
    assert (chosen["objective.prototypes"], chosen["objective.pool"]) == (1024, "mean")
    assert chosen["objective.momentum"] == chosen["objective.momentum_end"]
    assert "objective.mask_ratio" not in chosen
    assert keys(choose(CIFAR, LAPTOP, 10, {"global_batch_size": 512}))["optim.base_lr"] == pytest.approx(5e-4)
    assert "steps" not in keys(choose(CIFAR, LAPTOP, 10, {"epochs": 3.0}))
    assert keys(choose(CIFAR, LAPTOP, 10, {"model.args.patch_size": 5, "data.image_size": 30})) is not None
    assert not any(key.startswith("model.args") for key in keys(choose(CIFAR, LAPTOP, 10, {"model.name": "swin_tiny"})))


def test_images_that_look_alike_get_a_grid_where_it_was_measured():
    def patch(facts: Facts, machine: Machine = LAPTOP, minutes: float = 10, **given) -> int:
        words = {key.replace("__", "."): value for key, value in given.items()}
        made = choose(facts, machine, minutes, words)
        chosen = keys(made)
        assert any("look alike" in choice.reason for choice in made) == (chosen["objective.koleo_weight"] == 0.1)
        return chosen["model.args.patch_size"]

    alike = Facts(10_000, 48, 48, alike=True)
    assert patch(alike) == 12
    assert [patch(alike, data__image_size=size) for size in (32, 64, [32, 64], 16)] == [8, 16, 8, 4]
    # Elsewhere the patch is that of other images.
    for size in (3, 12, 46, 96, 224, [32, 44]):
        assert patch(alike, data__image_size=size) == patch(Facts(10_000, 48, 48), data__image_size=size)
    assert patch(alike, GPU, method="mae") == 4
    oblong = Facts(10_000, 28, 40, alike=True)  # 28 x 40 is no grid of patches of 7
    assert patch(oblong) == 4
    depths = [keys(choose(alike, LAPTOP, minutes, {}))["model.args.depth"] for minutes in (10, 30, 60)]
    assert depths == [4, 4, 12]
    assert keys(choose(Facts(10_000, 48, 48), LAPTOP, 30, {}))["model.args.depth"] == 12


@pytest.mark.parametrize(
    ("given", "flips"),
    [({}, 0.0), ({"method": "dino"}, 0.0), ({"method": "distill"}, 0.0), ({"objective.flip_prob": 0.3}, None),
     ({"objective.preset": "satellite"}, None), ({"objective.rotate_prob": 0.75}, None)],
)  # fmt: skip
def test_images_with_a_left_and_a_right_side_are_not_flipped_unless_they_are_turned(given, flips):
    sided = Facts(8000, 28, 28, channels=1, mean=(0.3,), std=(0.3,), sided=True)
    assert keys(choose(sided, LAPTOP, 10, given)).get("objective.flip_prob") == flips


def test_tiny_images_keep_a_patch_that_is_seen():
    tiny = keys(choose(Facts(1000, 5, 32), LAPTOP, 10, {}))
    patches = (tiny["data.image_size"] // tiny["model.args.patch_size"]) ** 2
    assert patches * (1 - tiny["objective.mask_ratio"]) >= 1


def test_a_step_that_does_not_fit_is_cut_or_refused_with_the_arithmetic():
    given = {"data.image_size": 224, "objective.mask_ratio": 0.5, "model.name": "vit_base_patch16_224"}
    chosen = {choice.what: choice for choice in choose(PHOTOS, LAPTOP, 10, {**given, "global_batch_size": 128})}
    cut = next(choice for what, choice in chosen.items() if what.startswith("batch_size"))
    assert 128 % cut.keys["batch_size"] == 0
    assert "MiB a step" in cut.reason
    tiny = Machine("a small machine", rate=1e10, memory=1 << 24)
    with pytest.raises(UserError, match=r"does not fit into memory: .* GiB are free"):
        choose(PHOTOS, tiny, 10, given | {"global_batch_size": 128})


def test_images_of_which_nothing_can_be_learned_are_refused():
    with pytest.raises(UserError, match="3 images are too few"):
        choose(Facts(3, 32, 32), LAPTOP, 10, {})
    with pytest.raises(UserError, match="30% of a sample"):
        choose(Facts(300, 32, 32, broken=0.3), LAPTOP, 10, {})
