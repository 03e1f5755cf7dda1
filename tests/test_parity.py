"""The published implementations' numbers, at the tolerances that tests/golden/official/README.md names."""

import tempfile
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from sslvit import data, optim, start
from sslvit.evaluation import knn
from sslvit.model import encoder, factory
from sslvit.model import weights as tables
from sslvit.objectives import dino, mae

CPU = torch.device("cpu")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def vit(settings: dict) -> factory.Config:
    """A timm ViT of the given shape."""
    args = {"patch_size": settings["patch_size"], "embed_dim": settings["embed_dim"], "depth": settings["depth"]}
    return factory.Config("vit_tiny_patch16_224", args | {"num_heads": settings["num_heads"]})


def named(tensors: dict, prefix: str, part: str = "") -> dict:
    """The published tensors with this prefix, by our names. part: student. or teacher."""
    theirs = {part + name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return tables.translate(theirs, prefix).tensors


def begin_from(module: torch.nn.Module, checkpoint: dict) -> None:
    """model.init=<a checkpoint as the published code saves it>: every tensor of both sides has its place."""
    more = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 7, "args": Namespace(lr=1e-3)}
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(checkpoint | more, file.name)
        said = start.load(module, file.name)
    assert len(said) == 1, said


def largest(values: list) -> float:
    """The largest number; nan if one of them is."""
    return torch.tensor([float(torch.as_tensor(value).detach()) for value in values]).max().item()


def build_mae(official) -> tuple[dict, dict, mae.MAE]:
    """Settings, tensors and our module with the weights that the published run began with."""
    settings, tensors = official("mae")
    c = settings["config"]
    config = mae.Config(c["mask_ratio"], c["norm_pix_loss"], c["decoder_embed_dim"], c["decoder_depth"], 2)
    module = mae.build(config, vit(c), data.Config(image_size=c["img_size"]), steps_per_epoch=2, steps=4)
    init = {name[5:]: value for name, value in tensors.items() if name.startswith("init.")}
    begin_from(module, {"model": init, "scaler": {"scale": 1.0}})
    return settings, tensors, module


@pytest.fixture
def published_mae(official):
    return build_mae(official)


def test_mae_forward_equals_the_published_one(published_mae):
    _, t, module = published_mae
    images, order = t["batch0.images"], t["batch0.noise"].argsort(dim=1)
    keep, hide = order[:, :4], order[:, 4:]
    latent = module.encode(images, keep)
    assert torch.allclose(latent, t["forward.latent"], atol=1e-5)
    patches = module.predict(module.decode(latent, keep, hide))[:, 1:]
    in_order = patches.gather(1, order.argsort(dim=1).unsqueeze(-1).expand_as(patches))
    assert torch.allclose(in_order, t["forward.pred"], atol=1e-5)
    assert torch.equal(order.argsort(dim=1), t["forward.ids_restore"])
    assert torch.equal(torch.ones(4, 16).scatter(1, keep, 0.0), t["forward.mask"])
    module.config.norm_pix = False
    assert torch.allclose(module.target(images), t["forward.patchify"])
    assert module.loss(images, order)["loss"].item() == pytest.approx(t["forward.loss_norm_pix_false"].item(), abs=1e-5)
    module.config.norm_pix = True
    assert module.loss(images, order)["loss"].item() == pytest.approx(t["forward.loss_norm_pix_true"].item(), abs=1e-5)


def mae_differences(official, device: torch.device = CPU, bf16: bool = False) -> dict[str, float]:
    """Train as the published run did. The largest differences from it, for gradients relative to their size."""
    settings, t, module = build_mae(official)
    t, module = {name: value.to(device) for name, value in t.items()}, module.to(device)
    config = optim.Config(base_lr=settings["optimizer"]["base_lr"], betas=(0.9, 0.95), weight_decay=0.05)
    schedule = optim.Schedule(config, global_batch_size=256, warmup_steps=2, total_steps=4)
    optimizer = optim.make_optimizer(config, module)
    losses, gradients = [], []
    for i in range(settings["steps"]):
        assert schedule.lr(i) == pytest.approx(t["train.lr"][i].item(), rel=1e-12)
        optim.set_schedule(optimizer, schedule, i)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = module.loss(t[f"batch{i}.images"], t[f"batch{i}.noise"].argsort(dim=1))["loss"]
        losses.append((loss - t["train.loss"][i]).abs())
        optimizer.zero_grad()
        loss.backward()
        if i == 0:
            theirs = named(t, "grad0.")
            gradients = [relative(p.grad, theirs[name]) for name, p in module.named_parameters() if p.requires_grad]
        optimizer.step()
    theirs = named(t, "final.")
    weights = [(value - theirs[name]).abs().max() for name, value in module.state_dict().items()]
    return {"loss": largest(losses), "gradients": largest(gradients), "weights": largest(weights)}


def test_mae_training_equals_the_published_one(official):
    assert {what: found for what, found in mae_differences(official).items() if not found < 1e-4} == {}


def build_dino(official, name: str, **changes) -> tuple[dict, dict, dino.DINO]:
    """Settings, tensors and our module with the weights that the published run began with."""
    settings, tensors = official(name)
    head, loss, size = settings["head"], settings["loss"], settings["backbone"]["img_size"]
    config = dino.Config(
        prototypes=head["out_dim"],
        hidden_dim=head["hidden_dim"],
        bottleneck_dim=head["bottleneck_dim"],
        norm_last_layer=head["norm_last_layer"],
        teacher_temp=loss["teacher_temp"],
        teacher_temp_start=loss["warmup_teacher_temp"],
        teacher_temp_warmup_epochs=loss["warmup_teacher_temp_epochs"],
        center_momentum=loss["center_momentum"],
        momentum=settings["optimizer"]["momentum_teacher"][0],
        momentum_end=settings["optimizer"]["momentum_teacher"][1],
        freeze_last_layer_epochs=settings["optimizer"]["freeze_last_layer_epochs"],
        drop_path=0.0,
        local_crops=settings["ncrops"] - 2,
        local_crop_size=settings.get("local_size", size),
        **changes,
    )
    module = dino.build(config, vit(settings["backbone"]), data.Config(image_size=size), steps_per_epoch=2, steps=6)
    init = {key[5:]: value for key, value in tensors.items() if key.startswith("init.")}
    both = {"student": {f"module.{key}": value for key, value in init.items()}, "teacher": init}
    begin_from(module, both | {"dino_loss": {"center": torch.zeros(1, head["out_dim"])}})
    return settings, tensors, module


def dino_crops(tensors: dict, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Global [2, B, 3, S, S] and local [V, B, 3, s, s] crops of batch i."""
    if f"batch{i}.crops" in tensors:
        return tensors[f"batch{i}.crops"][:2], tensors[f"batch{i}.crops"][2:]
    return tensors[f"batch{i}.global"], tensors[f"batch{i}.local"]


@pytest.mark.parametrize("name", ["dino", "dino_multicrop"])
def test_dino_forward_equals_the_published_one(official, name):
    _, t, module = build_dino(official, name)
    large, small = dino_crops(t, 0)
    resolutions = [(large.flatten(0, 1), torch.arange(8)), (small.flatten(0, 1), torch.arange(len(small) * 4))]
    assert torch.allclose(module.student(resolutions), t["forward.student_output"], atol=1e-5)
    assert torch.allclose(module.teacher(resolutions[:1]), t["forward.teacher_output"], atol=1e-5)
    features = module.student.features
    for key, crop in {"student_cls": large[0], "global_cls": large[0], "local_cls": small[0]}.items():
        if f"forward.{key}" in t:
            assert torch.allclose(features([(crop, torch.arange(4))]), t[f"forward.{key}"], atol=1e-5)


def test_position_embeddings_of_small_crops_are_resampled_as_published_and_by_timm_otherwise(official):
    _, t, module = build_dino(official, "dino_multicrop")
    vit, small = module.student.encoder.model, dino_crops(t, 0)[1][0]
    patches = encoder.resample_positions(vit.pos_embed[:, 1:], vit.patch_embed.grid_size, (3, 3), "published")
    assert torch.allclose(torch.cat([vit.pos_embed[:, :1], patches], dim=1), t["forward.local_pos"], atol=1e-6)
    exported = module.exported_encoder().eval()
    assert torch.equal(exported.features(small), vit(small))
    assert not torch.allclose(exported.features(small), t["forward.local_cls"], atol=1e-3)


def test_with_timms_resampling_the_losses_are_not_the_published_ones(official):
    _, t, module = build_dino(official, "dino_multicrop", position_resampling="timm")
    large, small = dino_crops(t, 0)
    loss = module({"key": torch.arange(4), "global": large, "local": small}, 0)["loss"]
    assert abs(loss.item() - t["train.loss"][0].item()) > 0.01


def dino_differences(official, run: str, device: torch.device = CPU, bf16: bool = False) -> dict[str, float]:
    """Train as the published run did. The largest differences from it, for gradients relative to their size."""
    settings, t, module = build_dino(official, run)
    t, module = {key: value.to(device) for key, value in t.items()}, module.to(device)
    o = settings["optimizer"]
    config = optim.Config(
        base_lr=o["lr"][0],
        min_lr=o["lr"][1],
        lr_schedule="linspace_cosine",
        weight_decay=o["weight_decay"][0],
        weight_decay_end=o["weight_decay"][1],
        betas=tuple(o["betas"]),
        clip=o["clip_grad_per_parameter"],
        clip_mode="tensor",
    )
    schedule = optim.Schedule(config, global_batch_size=256, warmup_steps=2, total_steps=6)
    optimizer = optim.make_optimizer(config, module)
    trained = [p for p in module.parameters() if p.requires_grad]
    losses, gradients, centers = [], [], []
    for i in range(6):
        assert schedule.lr(i) == pytest.approx(t["train.lr"][i].item(), rel=1e-12)
        assert schedule.weight_decay(i) == pytest.approx(t["train.weight_decay"][i].item(), rel=1e-12)
        assert module.ema.momentum(i) == pytest.approx(t["train.momentum"][i].item(), rel=1e-12)
        assert module.teacher_temp(i) == pytest.approx(t["train.teacher_temp"][i // 2].item(), rel=1e-12)
        optim.set_schedule(optimizer, schedule, i)
        large, small = dino_crops(t, i)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = module({"key": torch.arange(4, device=device), "global": large, "local": small}, i)["loss"]
        losses.append((loss - t["train.loss"][i]).abs())
        optimizer.zero_grad()
        loss.backward()
        if i == 0:
            theirs = named(t, "grad0.", "student.")
            gradients = [relative(p.grad, theirs[name]) for name, p in module.named_parameters() if p.requires_grad]
        optim.clip_gradients(trained, config)
        module.before_step(i)
        optimizer.step()
        module.after_step(i)
        centers.append((module.center[0] - t["train.center"][i]).abs().max())
    theirs = named(t, "final_student.", "student.") | named(t, "final_teacher.", "teacher.")
    weights = [(value - theirs[name]).abs().max() for name, value in module.state_dict().items() if name != "center"]
    found = {"loss": losses, "gradients": gradients, "center": centers, "weights": weights}
    return {key: largest(values) for key, values in found.items()}


@pytest.mark.parametrize("name", ["dino", "dino_multicrop"])
def test_dino_training_equals_the_published_one(official, name):
    found = dino_differences(official, name)
    limits = {"center": 1e-5}
    assert {what: value for what, value in found.items() if not value < limits.get(what, 1e-4)} == {}


def test_knn_votes_equal_the_published_ones(official):
    settings, t = official("knn")
    bank, queries = (
        knn.Labelled(
            F.normalize(t[f"{name}_features"], dim=1), t[f"{name}_labels"], torch.arange(len(t[f"{name}_labels"]))
        )
        for name in ("train", "test")
    )
    ks = (1, 5, 10, 20, 100, 200)
    places = knn.classify(bank, queries, settings["num_classes"], ks, temperatures=(0.04, 0.07, 0.2))
    found = {
        f"k={k},T={temperature}": [knn.top_accuracy(of_one, 1), knn.top_accuracy(of_one, min(5, k))]
        for (k, temperature), (of_one, _) in places.items()
    }
    assert found == settings["top1_top5"]


def test_lars_steps_equal_the_published_ones(official):
    settings, t = official("misc")
    s = settings["lars"]
    weight = torch.nn.Parameter(t["lars.init.weight"].clone())
    bias = torch.nn.Parameter(t["lars.init.bias"].clone())
    optimizer = optim.LARS([weight, bias], s["lr"], s["weight_decay"], s["momentum"], s["trust_coefficient"])
    for i in range(5):
        weight.grad, bias.grad = t[f"lars.grad{i}.weight"], t[f"lars.grad{i}.bias"]
        optimizer.step()
        assert torch.allclose(weight, t[f"lars.step{i}.weight"], atol=1e-6)
        assert torch.allclose(bias, t[f"lars.step{i}.bias"], atol=1e-6)


@pytest.mark.parametrize(("width", "side"), [(64, 4), (96, 7)])
def test_position_embedding_equals_the_published_one(official, width, side):
    _, t = official("misc")
    ours = encoder.sincos(width, (side, side), num_prefix=1)[0]
    assert torch.allclose(ours, t[f"sincos.dim{width}.grid{side}"], atol=1e-6)
