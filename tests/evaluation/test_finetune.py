"""Fine-tuning equals the published rules, loses nothing when it is stopped, and does not depend on the processes."""

import json
import os
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_layer_decay

from sslvit import pretrained, rng, state
from sslvit.errors import UserError
from sslvit.evaluation import classifier as building
from sslvit.evaluation import finetune, mixing, scores, supervised
from sslvit.evaluation.finetune import Targets
from tests import processes
from tests.conftest import TINY_MODEL

TINY = f"model_args={{{', '.join(f'{k}: {v}' for k, v in TINY_MODEL.items())}}}"


def sets(labelled) -> list[str]:
    return [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]


def words(run, labelled, *more: str) -> list[str]:
    """The words of a training that takes a second: 36 images in steps of 12."""
    length = [] if any(word.startswith("epochs=") for word in more) else ["epochs=2"]
    return [
        "finetune", f"run={run}", *sets(labelled), "global_batch_size=12", *length, "warmup_epochs=1", "workers=0",
        "precision=float32", *more,
    ]  # fmt: skip


def subject(size=(32, 32), **args) -> pretrained.Pretrained:
    return pretrained.load("random:vit_tiny_patch16_224", size, TINY_MODEL | args)


def make(pool="mean", size=None, drop_path=0.0, fresh_norm=False, outputs=5, seed=0, of=None) -> building.Classifier:
    return building.build(of or subject(), pool, outputs, size, drop_path, fresh_norm, seed)


def published_layer(name: str, num_blocks: int) -> int:
    """The rule of MAE's released fine-tuning (which is BEiT's), from its description: positions, tokens and the patch
    embedding are layer 0, block i is layer i + 1, and everything else is the last, one after the last block."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return num_blocks + 1


@pytest.mark.parametrize("fresh_norm", [True, False])
@pytest.mark.parametrize("decay", [0.65, 0.75])
def test_layers_of_a_vit_learn_at_the_published_rates(decay, fresh_norm):
    model = make(fresh_norm=fresh_norm, of=subject(depth=12)).model
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = {}
    for group in building.parameter_groups(model, decay, 0.05):
        for parameter in group["params"]:
            seen[names[parameter]] = (group["lr_scale"], group["weight_decay"])
    assert seen.keys() == set(names.values())
    for name, parameter in model.named_parameters():
        scale = decay ** (13 - published_layer(name, 12))
        undecayed = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert seen[name] == (pytest.approx(scale), 0.0 if undecayed else 0.05), name
    norm = "fc_norm.weight" if fresh_norm else "norm.weight"
    assert seen["head.weight"][0] == seen[norm][0] == 1
    assert seen["blocks.11.mlp.fc1.weight"][0] == pytest.approx(decay)
    assert seen["pos_embed"][0] == pytest.approx(decay**13)


def test_timms_layer_decay_is_the_same_but_for_the_norm():
    model = make(of=subject(depth=3)).model
    names = {parameter: name for name, parameter in model.named_parameters()}

    def scales(groups: list[dict]) -> dict[str, tuple[float, float]]:
        return {names[p]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}

    ours = scales(building.parameter_groups(model, 0.7, 0.05))
    theirs = scales(param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.7))
    assert {name for name in ours if ours[name] != pytest.approx(theirs[name])} == {"norm.weight", "norm.bias"}


def test_the_heads_rate_is_its_own():
    model = make().model
    groups = building.parameter_groups(model, 0.5, 0.05, head_lr=4.0)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert scale[id(model.head.weight)] == scale[id(model.head.bias)] == 4
    assert scale[id(model.norm.weight)] == 1


def test_blocks_learn_one_after_the_other_from_the_top():
    layers = [building.trained_layers(epoch / 4, 4, head_epochs=1, unfreeze_epochs=0.5) for epoch in range(12)]
    assert layers == [1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert [building.trained_layers(e, 4, 0, 0) for e in (0, 5)] == [4, 4]
    assert [building.trained_layers(e, 4, 1, 0) for e in (0.9, 1)] == [1, 4]
    model = make(of=subject(depth=2))
    for trained, learning in (
        (1, {"head", "norm"}), (2, {"head", "norm", "blocks.1"}), (4, {"head", "norm", "blocks.1", "blocks.0", "stem"}),
    ):  # fmt: skip
        building.freeze(model, trained)
        found = {n for n, p in model.model.named_parameters() if p.requires_grad}
        stem = ("patch_embed", "pos_embed", "cls_token")
        tops = {"stem" if n.startswith(stem) else ".".join(n.split(".")[: 1 + n.startswith("blocks")]) for n in found}
        assert tops == learning
        assert model.model.blocks[0].training == (trained == 4)


def test_a_frozen_layer_does_not_change_and_its_batch_norm_keeps_its_statistics():
    """MobileViT with everything but the head frozen, one step."""
    net = make("pooled", of=pretrained.load("random:mobilevitv2_050", 64))
    building.freeze(net, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(building.parameter_groups(net.model, 0.7, 0.05), lr=0.1)
    net(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"encoder.model.head.fc.weight", "encoder.model.head.fc.bias"}


@pytest.mark.parametrize("size", [(48, 48), (16, 64)])
@pytest.mark.parametrize("args", [{}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}])
def test_positions_for_another_size_are_timms_bicubic_resampling(size, args):
    of = subject(**args)
    net = make(size=size, of=of)
    old = of.encoder.model
    prefix = 0 if old.no_embed_class else old.num_prefix_tokens
    grid = (size[0] // 8, size[1] // 8)
    assert torch.equal(net.model.pos_embed, resample_abs_pos_embed(old.pos_embed, grid, (4, 4), prefix))
    spatial = old.pos_embed[:, prefix:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    by_hand = F.interpolate(spatial, grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.allclose(net.model.pos_embed[:, prefix:], by_hand, atol=1e-6)
    assert net(torch.randn(2, 3, *size)).shape == (2, 5)


def test_a_swin_takes_images_of_another_size():
    args = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    of = pretrained.load("random:swin_tiny_patch4_window7_224", (64, 64), args)
    net = make("pooled", size=(96, 64), of=of)
    weights = of.encoder.model.state_dict()
    assert all(torch.equal(net.model.state_dict()[name], weights[name]) for name in weights)
    assert net(torch.randn(2, 3, 96, 64)).shape == (2, 5)
    with pytest.raises(UserError, match="convit_tiny cannot take images of 48x48"):
        make("pooled", size=(48, 48), of=pretrained.load("random:convit_tiny", 32))


def test_mean_pooled_features_are_normalised_after_the_mean_by_a_fresh_layer():
    of = subject()
    torch.nn.init.normal_(of.encoder.model.norm.weight)
    net = make(fresh_norm=True, of=of)
    torch.nn.init.normal_(net.head.weight)
    x = torch.randn(3, 3, 32, 32)
    model = net.model
    tokens = model.blocks(model._pos_embed(model.patch_embed(x)))  # of random:'s ViT, without its final norm
    pooled = F.layer_norm(tokens[:, 1:].mean(dim=1), (48,), eps=model.fc_norm.eps)
    assert torch.allclose(net(x), F.linear(pooled, net.head.weight, net.head.bias), atol=1e-5)
    assert torch.allclose(net(x), model(x), atol=1e-5)


@pytest.mark.parametrize("fresh_norm", [True, False])
def test_the_head_sees_standardised_features_and_folding_them_in_changes_nothing(fresh_norm):
    net, x = make(fresh_norm=fresh_norm), torch.randn(16, 3, 32, 32)
    torch.nn.init.normal_(net.head.weight)
    torch.nn.init.normal_(net.head.bias)
    seen = []
    net.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net.standardise(net.encoder.features(x))
    before = net(x)
    assert torch.allclose(seen[0].mean(dim=0), torch.zeros(48), atol=1e-4)
    assert (seen[0].std(dim=0, unbiased=False) > 0.9).all()
    net.fold()
    assert torch.allclose(net(x), before, atol=1e-3)
    assert torch.allclose(net.model(x), before, atol=1e-3)


def test_the_head_begins_almost_at_zero_and_hangs_on_the_seed_only():
    assert 1e-5 < make(outputs=50).head.weight.std().item() < 3e-5
    assert not make().head.bias.any()
    assert torch.equal(make(seed=3).head.weight, make(seed=3).head.weight)
    assert not torch.equal(make(seed=3).head.weight, make(seed=4).head.weight)


def test_mixing_and_smoothing_give_the_loss_of_the_formula():
    """Each image by itself, in float64: 1 - e on the two labels by their shares, and e spread over all classes."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 5
    logits, key = torch.randn(8, 5, generator=generator), rng.fold_in(7, torch.arange(8))
    images, targets = mixing.mix(x.clone(), mixing.smoothed(labels, 5, 0.1), key, 0.8, 1.0)
    pasted, kept, boxes = mixing.draw_pairs(key[::2], (16, 16), 0.8, 1.0)
    assert 0 < pasted.sum() < 4  # both kinds
    total = 0.0
    for i in range(8):
        pair, other = i // 2, i ^ 1
        share = kept[pair].double()
        if pasted[pair]:
            top, left, h, w = boxes[pair].tolist()
            expected = x[i].clone()
            expected[:, top : top + h, left : left + w] = x[other][:, top : top + h, left : left + w]
            assert share == pytest.approx(1 - h * w / 256)
        else:
            expected = (share * x[i] + (1 - share) * x[other]).float()
        assert torch.allclose(images[i], expected, atol=1e-6)
        log = logits[i].double().log_softmax(dim=0)
        one = share * log[labels[i]] + (1 - share) * log[labels[other]]
        total -= 0.9 * one + 0.1 * log.mean()
    assert supervised.loss_of("single", logits, targets).item() == pytest.approx(total.item() / 8, rel=1e-6)


def test_shares_of_mixing_follow_their_distributions():
    key = rng.fold_in(1, torch.arange(4000))
    pasted, kept, boxes = mixing.draw_pairs(key, (100, 100), 0.8, 1.0)
    assert pasted.float().mean() == pytest.approx(0.5, abs=0.03)
    assert kept[~pasted].mean() == pytest.approx(0.5, abs=0.03)
    assert kept[~pasted].var() == pytest.approx(0.25 / (2 * 0.8 + 1), rel=0.1)  # of the beta distribution
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 100).all()
    assert mixing.draw_pairs(key, (9, 9), 0.8, 0.0)[0].sum() == 0
    assert mixing.draw_pairs(key, (9, 9), 0.0, 1.0)[0].all()


def test_erasing_puts_normal_noise_into_boxes_of_some_images():
    x, key = torch.full((2000, 1, 32, 32), 9.0), rng.fold_in(3, torch.arange(2000))
    mixing.erase(x, key, 0.25)
    erased = (x != 9).flatten(1)
    assert erased.any(dim=1).float().mean() == pytest.approx(0.25, abs=0.03)
    areas = erased[erased.any(dim=1)].float().mean(dim=1)
    assert 0.01 < areas.min() < areas.max() < 0.36
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    noise = x[x != 9]
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    again = mixing.erase(torch.full((1000, 1, 32, 32), 9.0), key[1000:], 0.25)
    assert torch.equal(again, x[1000:])  # an image's own, whatever the batch


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_is_an_images_own_and_leaves_the_global_generators_alone(channels):
    images = torch.randint(0, 256, (1, 40, channels, 24, 20), dtype=torch.uint8)
    key = rng.fold_in(5, torch.arange(40))
    change = mixing.RandAugment("rand-m9-mstd0.5-inc1", (0.5,) * channels)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    whole = change({"image": images.clone(), "key": key})["image"]
    part = change({"image": images[:, 30:].clone(), "key": key[30:]})["image"]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    assert torch.equal(whole[:, 30:], part)
    assert 10 < sum(not torch.equal(a, b) for a, b in zip(whole[0], images[0], strict=True)) <= 40


def test_the_greatest_magnitude_works_with_this_pillow():
    change = mixing.RandAugment("rand-m10-n15-p1", (0.5,) * 3)
    for op in change.transform.ops:
        for key in range(3):
            with mixing.seeded(key):
                assert op(Image.new("RGB", (8, 8), (200, 100, 50))).size == (8, 8)


def test_average_precision_and_auroc_are_their_definitions():
    generator = np.random.default_rng(0)
    score, truth = generator.integers(0, 6, 40).astype(float), generator.integers(0, 2, 40).astype(float)  # with ties
    weights = generator.integers(0, 3, 40).astype(float)
    rows = np.repeat(np.arange(40), weights.astype(int))  # a weight of 2 is the image twice
    s, t = score[rows], truth[rows]
    pairs = [(p > n) + 0.5 * (p == n) for p in s[t == 1] for n in s[t == 0]]
    precision = 0.0
    for level in sorted(set(s)):
        found = s >= level
        precision += ((s == level) & (t == 1)).sum() / t.sum() * t[found].mean()
    ranked = scores.Ranked(score, truth)
    assert ranked.auroc(weights) == pytest.approx(np.mean(pairs))
    assert ranked.average_precision(weights) == pytest.approx(precision)
    perfect = scores.Ranked(truth, truth)
    assert perfect.auroc(np.ones(40)) == perfect.average_precision(np.ones(40)) == 1


def test_a_label_that_all_images_have_is_left_out():
    truth = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    found = scores.measure("multilabel", torch.tensor([[2.0, 0], [-1, 0], [1, 0]]), truth, ["a", "b"], 0)
    assert found["map"] == found["auroc"] == 100
    assert list(found["per_class"]) == ["a"]


def test_errors_of_numbers_are_their_formulas():
    outputs, truth = (
        torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]]),
        torch.tensor([[1.0, 7.0], [2.0, 7.0], [6.0, 7.0]]),
    )
    found = scores.measure("regression", outputs, truth, ["a", "b"], 0)
    assert found["mae"] == pytest.approx((2 / 3 + 2) / 2)
    assert found["per_target"]["a"]["r2"] == pytest.approx(1 - 2 / 14, abs=1e-4)  # mean 3: 4 + 1 + 9
    assert found["per_target"]["b"]["r2"] is None  # all alike: nothing to explain
    low, high = found["mae_interval"]
    assert low < found["mae"] < high


def test_an_image_that_cannot_be_read_is_replaced_with_its_substitutes_own_label(labelled, tmp_path):
    from sslvit.data import Config, open_source
    from sslvit.data.loader import Cropped
    from sslvit.views import Crop

    shutil.copytree(labelled / "train", tmp_path / "train")
    (tmp_path / "train" / "class0" / "0.png").write_bytes(b"no image")
    source = open_source(str(tmp_path / "train"), Config())
    crops = Cropped(source, {"image": [Crop((32, 32), (1.0, 1.0), flip_prob=0)]}, seed=0)
    replaced = 0
    for epoch in range(6):
        batch = crops[epoch, torch.tensor([0, 20])]
        colour = batch["image"][0].float().mean(dim=(2, 3)).argmax(dim=1)  # class i is brightest in channel i
        assert colour.tolist() == source.labels[batch["index"]].tolist()
        replaced += int(colour[0] != 0)
    assert replaced > 0


@pytest.mark.parametrize("recipe", ["mae", "small"])
def test_colours_are_told_apart(cli, labelled, colour_run, tmp_path, recipe):
    out = tmp_path / "result.json"
    more = {"mae": ["base_lr=0.02", "epochs=12", "layer_decay=0.8"], "small": ["epochs=6", "base_lr=0.02"]}[recipe]
    status, printed, _ = cli(
        *words(colour_run, labelled, f"recipe={recipe}", f"out={out}", "image_size=[32,48]", "holdout=0.34", *more)
    )
    assert status == 0
    record = json.loads(out.read_text())
    results = record["results"]
    assert results["top1"] > 90
    assert set(results["per_class"]) == {"class0", "class1", "class2"}
    assert (record["train"]["images"], record["train"]["held_out"]) == (24, 12)
    assert "held-out top1" in printed
    assert results["history"][-1]["held_out_top1"] > 90
    assert len(results["history"]) == len([line for line in printed.splitlines() if line.startswith("epoch ")])


def test_timm_classifies_with_the_model_that_was_written(cli, labelled, colour_run, tmp_path):
    model = tmp_path / "model"
    length = ["base_lr=0.02", "epochs=12", "layer_decay=0.8", "image_size=[32,48]"]
    assert cli(*words(colour_run, labelled, *length, f"out={tmp_path / 'r.json'}", f"out_model={model}"))[0] == 0
    again = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    assert again.pretrained_cfg["label_names"] == ["class0", "class1", "class2"]
    mean, std = (torch.tensor(again.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    for c in range(3):
        with Image.open(labelled / "test" / f"class{c}" / "0.png") as image:
            x = torch.from_numpy(np.array(image.resize((48, 32)))).permute(2, 0, 1) / 255
        with torch.inference_mode():
            assert again(((x - mean) / std).unsqueeze(0)).argmax() == c


SWIN = "model_args={embed_dim: 12, depths: [1,1,1,1], num_heads: [1,1,1,1]}"


@pytest.mark.parametrize(
    "more",
    [
        ["run=random:swin_tiny_patch4_window7_224", SWIN],
        ["run=random:mobilevitv2_050"],
        pytest.param(["run=random:swin_tiny_patch4_window7_224", SWIN, "out_model=model"], marks=pytest.mark.slow),
        pytest.param(["run=random:mobilevitv2_050", "out_model=model"], marks=pytest.mark.slow),
    ],
)
def test_models_that_are_no_plain_vit_learn_too(cli, labelled, tmp_path, more, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = cli(
        *words("", labelled, "recipe=small", "image_size=64", "epochs=2", "head_epochs=0.5", "drop_path=0.1",
               "labels_share=0.7", "out=result.json", *more)
    )  # fmt: skip
    assert status == 0, error
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["train"]["images"] == 24
    assert record["features"] == "the model's pooled features"


def prepared(labelled, **more) -> tuple[finetune.Config, list]:
    config = finetune.Config(
        run="random:vit_tiny_patch16_224", model_args=TINY_MODEL, image_size=32, workers=0, precision="float32",
        recipe="small", epochs=6, base_lr=0.02, global_batch_size=12, **more,
    )  # fmt: skip
    config.data.train, config.data.test = str(labelled / "train"), str(labelled / "test")
    return config, finetune.prepare(config)


def test_several_labels_of_an_image_are_learned(labelled):
    """Which of red, green and blue an image is not: two labels each."""
    config, (frozen, sources, of_class) = prepared(labelled)
    train, test = (1 - F.one_hot(labels, 3).float() for labels in (of_class.train, of_class.test))
    targets = Targets("multilabel", train, test, ["not red", "not green", "not blue"])
    found, record = finetune.train_and_test(config, finetune.resolve(config), 0, frozen, sources, targets, None)
    assert found["map"] > 95
    assert found["auroc"] > 95
    assert record["task"] == "multilabel"


def test_tables_bring_labels_and_numbers(cli, fails, labelled, colour_run, tmp_path):
    """A row an image: which colours it is not, and how much it weighs."""
    names = {"class0": ("green|blue", 1000), "class1": ("red|blue", 1200), "class2": ("red|green", 1400)}
    for split in ("train", "test"):
        rows = [f"{path},{names[path.parent.name][0]},{names[path.parent.name][1]}"
                for path in sorted((labelled / split).glob("*/*.png"))]  # fmt: skip
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,label,weight", *rows]) + "\n")
    out = tmp_path / "r.json"
    more = ["recipe=small", "epochs=12", "global_batch_size=12", "base_lr=0.02", "warmup_epochs=0", f"out={out}"]

    def train(task: str, column: str) -> dict:
        sets = [f"data.train={tmp_path / 'train.csv'}{column}", f"data.test={tmp_path / 'test.csv'}{column}"]
        assert cli("finetune", f"run={colour_run}", *sets, f"task={task}", *more)[0] == 0
        return json.loads(out.read_text())["results"]

    assert train("multilabel", "")["map"] > 90
    assert train("regression", ":weight")["r2"] > 0.5
    folders = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]
    assert "have no label texts" in fails("finetune", f"run={colour_run}", *folders, "task=multilabel")


def test_numbers_are_learned_in_their_own_units_and_written_so(labelled, tmp_path):
    config, (frozen, sources, of_class) = prepared(labelled, out_model=str(tmp_path / "model"))
    train, test = (1000 + 200 * labels.float().unsqueeze(1) for labels in (of_class.train, of_class.test))
    targets = Targets("regression", train, test, ["weight"])
    found, record = finetune.train_and_test(config, finetune.resolve(config), 0, frozen, sources, targets, None)
    assert found["r2"] > 0.8
    assert found["mae"] < 80
    assert record["task"] == "regression"
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    x = (sources[1].read(0).float() / 255 - 0.45) / 0.225
    with torch.inference_mode():
        assert 800 < model(x.unsqueeze(0)).item() < 1600


def test_what_a_task_cannot_have_is_left_out_of_the_recipe_and_refused_as_a_word():
    recipe = finetune.resolve(finetune.Config(recipe="mae"), "regression")
    assert (recipe.mixup, recipe.cutmix, recipe.smoothing, recipe.erasing) == (0, 0, 0, 0.25)
    assert finetune.resolve(finetune.Config(recipe="mae"), "multilabel").mixup == 0.8
    with pytest.raises(UserError, match=r"mixup=0\.8 has no meaning for task=regression"):
        finetune.resolve(finetune.Config(mixup=0.8), "regression")


def test_one_and_two_processes_and_micro_batches_learn_the_same(labelled, colour_run, tmp_path):
    base = words(colour_run, labelled, "recipe=mae", "base_lr=0.01", "head_epochs=1", "unfreeze_epochs=0.34")
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    processes.finish(processes.start([*base, f"out={alone}"], tmp_path / "log"), tmp_path / "log")
    processes.launch([*base, f"out={together}", "batch_size=2"], tmp_path / "log2", world_size=2)
    one, two = (json.loads(path.read_text())["results"] for path in (alone, together))
    assert len(one["history"]) == 2
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert one["per_class"] == two["per_class"]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(state.folder_of(folder, state.steps_saved(folder)[-1]) / state.MODEL)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(labelled, colour_run, tmp_path, sent):
    log = tmp_path / "log"
    base = words(colour_run, labelled, "recipe=mae", "epochs=40", "head_epochs=3", "unfreeze_epochs=2", "image_size=48")
    whole = [*base, f"save={tmp_path / 'whole'}", f"out={tmp_path / 'whole.json'}"]
    processes.finish(processes.start(whole, log), log)
    cut = [*base, f"save={tmp_path / 'cut'}", f"out={tmp_path / 'cut.json'}"]
    process, folder = processes.start(cut, log), tmp_path / "cut" / "seed_0"
    deadline = time.monotonic() + 60
    while not state.steps_saved(folder) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, sent)
    process.join(60)
    assert process.exitcode == (75 if sent == signal.SIGTERM else -9)
    assert not (tmp_path / "cut.json").exists()
    printed = processes.finish(processes.start(cut, tmp_path / "log2"), tmp_path / "log2")
    assert re.search(r"Resuming .* at step \d+ of 120", printed)
    ours, theirs = weights(folder), weights(tmp_path / "whole" / "seed_0")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    results = [json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("cut", "whole")]
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}


def test_a_finished_training_is_only_tested_again_and_other_settings_are_refused(
    cli, fails, labelled, colour_run, tmp_path
):
    base = words(colour_run, labelled, "recipe=small", f"save={tmp_path / 'save'}", f"out={tmp_path / 'r.json'}")
    assert cli(*base, "head_epochs=1")[0] == 0
    first = json.loads((tmp_path / "r.json").read_text())
    status, printed, _ = cli(*base, "head_epochs=1")
    assert status == 0
    assert "at step 6 of 6" in printed
    assert json.loads((tmp_path / "r.json").read_text()) == first
    assert "head_epochs was 1.0 and is 1.5" in fails(*base, "head_epochs=1.5")
    (tmp_path / "save" / "seed_1").mkdir()
    (tmp_path / "save" / "seed_1" / "mine.txt").write_text("mine")
    assert "holds other things" in fails(*base, "head_epochs=1", "seed=1")


def test_seeds_are_trainings_of_their_own_with_mean_and_deviation(cli, labelled, colour_run, tmp_path):
    out = tmp_path / "r.json"
    base = words(colour_run, labelled, "recipe=small", "head_epochs=1", "labels_share=0.4", f"out={out}")
    assert cli(*base, "seeds=[3,4]")[0] == 0
    both = json.loads(out.read_text())["results"]
    assert cli(*base, "seed=4")[0] == 0
    alone = json.loads(out.read_text())["results"]
    assert {**both["seeds"][1], "seconds": 0} == {**alone, "seconds": 0}
    top1 = [one["top1"] for one in both["seeds"]]
    assert both["top1"] == pytest.approx(np.mean(top1), abs=1e-3)
    assert both["top1_deviation"] == pytest.approx(np.std(top1, ddof=1), abs=1e-3)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["global_batch_size=64"], "global_batch_size=64 is larger than the 36 images"),
        (["labels_share=0.1"], "global_batch_size=12 is larger than the 3 images"),
        (["image_size=30"], "30x30 is not divisible by the patch size 8"),
        (["labels_share=0"], "labels_share=0 must be above 0"),
        (["warmup_epochs=2"], "warmup_epochs=2 is not shorter than the run"),
        (["image_size=0"], "image_size=0 must be 1 or above"),
        (["batch_size=3"], "batch_size=3 is odd"),
        (["batch_size=5"], "not a multiple of batch_size=5"),
        (["randaugment=strong"], "randaugment=strong is not of timm's form"),
        (["recipe=small", "head_epochs=2"], "leaves none of epochs=2"),
        (["seeds=[1,1]"], "must differ"),
        (["seeds=[0,1]", "out_model=x"], "give one seed"),
        (["pool=cls+mean"], "use cls or mean"),
        (["recipe=small", "head_epochs=1", "pool=last4"], "pool=last4 is something that timm's models do not have"),
        (["holdout=0.99"], "global_batch_size=12 is larger than the 3 images"),
        (["drop_path=1"], "below 1"),
        (["base_lr=0"], "must be above 0"),
        (["out=/dev/null/x/r.json"], "out=/dev/null/x/r.json cannot be written"),
        (["data.test="], "data.test is missing"),
        (["run=pixels"], "no encoder that could be trained"),
        (["run=random:mobilevitv2_050", "image_size=64"], "recipe=mae is for plain ViTs"),
        (["run=random:vit_tiny_patch16_224", TINY.replace("}", ", in_chans: 2}"), "image_size=32"], "1 or 3 channels"),
    ],
)
def test_a_mistake_is_one_sentence(fails, labelled, colour_run, tmp_path, more, expected, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(*words(colour_run, labelled, *more))


def test_wrong_labels_get_a_sentence(fails, labelled, images, colour_run, tmp_path):
    run = f"run={colour_run}"
    shutil.copytree(labelled / "test", tmp_path / "other")
    (tmp_path / "other" / "class2").rename(tmp_path / "other" / "unheard_of")
    (tmp_path / "one").mkdir()
    shutil.copytree(labelled / "train" / "class0", tmp_path / "one" / "class0")
    train = f"data.train={labelled / 'train'}"
    assert "classes that" in fails("finetune", run, train, f"data.test={tmp_path / 'other'}")
    assert "has no labels" in fails("finetune", run, train, f"data.test={images}")
    assert "are the training images" in fails("finetune", run, train, train.replace("train=", "test=", 1))
    one = f"{tmp_path / 'one'}"
    assert "one class only" in fails("finetune", run, f"data.train={one}", f"data.test={one}")


def test_other_channels_are_refused(labelled):
    """A source that gives gray images to an encoder of colour."""

    class Gray:
        labels, classes = np.array([0, 1]), ["a", "b"]

        def __len__(self):
            return 2

        def read(self, index):
            return torch.zeros(1, 32, 32, dtype=torch.uint8)

    config, (frozen, *_) = prepared(labelled)
    with pytest.raises(UserError, match="images of 1 channels"):
        finetune._check_sample(config, frozen, Gray(), "gray")


def test_labels_of_both_sets_are_matched_by_name(monkeypatch):
    """What a table says of each image; texts of the test set may miss a label, and may have none of their own."""
    import sys
    from types import ModuleType

    from sslvit import data

    table = ModuleType("labels")
    table.multilabel = table.numbers = lambda source: source
    monkeypatch.setitem(sys.modules, "sslvit.data.labels", table)
    monkeypatch.setattr(data, "labels", table, raising=False)
    train = (np.array([[1, 0, 1], [0, 1, 1]], dtype=np.float32), ["a", "b", "c"])
    test = (np.array([[1, 0]], dtype=np.float32), ["c", "a"])
    found = finetune.read_targets("multilabel", [train, test], ("train", "test"))
    assert found.test.tolist() == [[0, 0, 1]]
    assert found.names == ["a", "b", "c"]
    with pytest.raises(UserError, match="b is only in train"):
        finetune.read_targets("regression", [train, test], ("train", "test"))
    with pytest.raises(UserError, match="b is only in train"):
        finetune.read_targets("multilabel", [test, train], ("test", "train"))
