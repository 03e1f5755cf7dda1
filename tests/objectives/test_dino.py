import pytest
import torch
import torch.nn.functional as F

from sslvit import data, optim
from sslvit.errors import UserError
from sslvit.model import encoder, factory
from sslvit.model.anchor import Anchor
from sslvit.objectives import dino
from tests.benchmarks import steps
from tests.conftest import TINY, TINY_MODEL, words
from tests.oracles import dino as oracle

MODEL = factory.Config("vit_tiny_patch16_224", TINY_MODEL)
SMALL = {"prototypes": 16, "hidden_dim": 24, "bottleneck_dim": 8, "local_crops": 2, "local_crop_size": 16}


def build(model: factory.Config = MODEL, size: int = 32, in_chans: int = 3, steps: int = 10, **settings) -> dino.DINO:
    torch.manual_seed(0)
    config = dino.Config(**SMALL | settings)
    return dino.build(config, model, data.Config(image_size=size, in_chans=in_chans), 5, steps)


def batch(module: dino.DINO, size: int = 32, b: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    views = {"key": torch.arange(b), "global": torch.randn(2, b, 3, size, size, generator=generator)}
    if module.config.local_crops:
        local = dino.views(module.config, data.Config(image_size=size))["local"]
        views["local"] = torch.randn(len(local), b, 3, *local[0].size, generator=generator)
    return views


@pytest.mark.parametrize("views", [2, 3, 10])
@pytest.mark.parametrize(("student_temp", "teacher_temp"), [(0.1, 0.04), (0.2, 0.07), (0.1, 0.01)])
def test_the_loss_equals_a_slow_oracle(views, student_temp, teacher_temp):
    module = build(student_temp=student_temp)
    student, teacher = torch.randn(views, 4, 16).clamp(-1, 1), torch.randn(2, 4, 16).clamp(-1, 1)
    module.center.copy_(torch.randn(1, 16) * 0.1)
    ours = module.loss(student.flatten(0, 1), teacher.flatten(0, 1), teacher_temp)["loss"].item()
    expected = oracle.loss(student, teacher, module.center[0], student_temp, teacher_temp)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_the_center_moves_after_its_use_and_by_all_micro_batches():
    module = build(center_momentum=0.9)
    first, second = batch(module, seed=1), batch(module, seed=2)
    module.center.copy_(torch.linspace(-0.1, 0.1, 16))
    before = module.center.clone()
    logits = []
    for views in (first, second):
        module(views, 0)
        logits.append(module.teacher([(views["global"].flatten(0, 1), torch.arange(6))]).detach().view(2, 3, 16))
    assert torch.equal(module.center, before)
    module.after_step(0)
    expected = oracle.center(before[0], torch.cat(logits, dim=1), 0.9)
    assert torch.allclose(module.center[0].double(), expected, atol=1e-6)
    assert module.logit_count == 0
    assert "center" in module.state_dict()
    assert not {"logit_sum", "logit_count"} & set(module.state_dict())


def test_the_teacher_is_the_moving_average_of_the_students_parameters():
    module = build(momentum=0.9)
    old = [p.clone() for p in module.teacher.parameters()]
    with torch.no_grad():
        for p in module.student.parameters():
            p.add_(torch.randn_like(p))
    module(batch(module), 0)
    module.after_step(0)
    for before, student, teacher in zip(old, module.student.parameters(), module.teacher.parameters(), strict=True):
        assert torch.allclose(teacher, 0.9 * before + 0.1 * student, atol=1e-6)
    assert module.ema.momentum(0) == 0.9
    assert module.ema.momentum(5) == pytest.approx(0.95)
    assert 0.99 < module.ema.momentum(9) < 1


def test_student_and_teacher_begin_equal_and_only_the_student_learns():
    module = build()
    for a, b in zip(module.student.state_dict().values(), module.teacher.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    module(batch(module), 0)["loss"].backward()
    assert all(p.grad is None for p in module.teacher.parameters())
    gain = "head.last_layer.weight_g"
    assert [name for name, p in module.student.named_parameters() if p.grad is None] == [gain]
    assert build(norm_last_layer=False).student.head.last_layer.weight_g.requires_grad


def test_drop_path_is_on_the_student_only():
    module = build(drop_path=0.3)
    rates = [
        [m.rate for m in net.modules() if isinstance(m, encoder.DropPath)] for net in (module.student, module.teacher)
    ]
    assert rates == [pytest.approx([0.3, 0.3]), []]  # rising linearly from 0 in the first of two blocks


@pytest.mark.parametrize("fused", [False, True])
def test_frozen_prototypes_do_not_move_or_decay_and_their_optimizer_does_not_count(fused):
    module = build(freeze_last_layer_epochs=1)
    optimizer = torch.optim.AdamW(optim.parameter_groups(module), 0.1, weight_decay=0.4, fused=fused)
    prototypes = module.student.head.last_layer.weight_v
    start = prototypes.detach().clone()
    for step in range(6):
        module(batch(module, seed=step), step)["loss"].backward()
        module.before_step(step)
        optimizer.step()
        optimizer.zero_grad()
        module.after_step(step)
        assert torch.equal(prototypes, start) == (step < 5)
        assert (prototypes in optimizer.state and len(optimizer.state[prototypes]) > 0) == (step >= 5)


def test_prototypes_are_weight_normalised_and_logits_are_cosines():
    head = build().student.head
    x = torch.randn(7, 48)
    logits = head(x)
    assert logits.abs().max() <= 1 + 1e-5
    z = F.normalize(head.mlp(x), dim=1)
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 16, bias=False))
    layer.parametrizations.weight.original0.data.fill_(1.0)
    layer.parametrizations.weight.original1.data.copy_(head.last_layer.weight_v)
    assert torch.allclose(logits, layer(z), atol=1e-6)


def test_crops_of_one_resolution_pass_together_and_keep_their_order():
    module = build(local_crops=2)
    views = batch(module)
    sizes = []
    module.student.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    resolutions = [(views[n].flatten(0, 1), torch.arange(6)) for n in ("global", "local")]
    module.eval()
    together = module.student(resolutions)
    assert sizes == [(6, 3, 32, 32), (6, 3, 16, 16)]
    alone = [module.student([(crop, torch.arange(3))]) for name in ("global", "local") for crop in views[name]]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_crops_of_equal_width_and_other_height_are_not_mixed():
    module = build(local_crop_size=(16, 32))
    spec = dino.views(module.config, data.Config(image_size=32))
    assert {name: crops[0].size for name, crops in spec.items()} == {"global": (32, 32), "local": (16, 32)}
    assert torch.isfinite(module(batch(module), 0)["loss"])


def test_without_local_crops_it_trains_on_two_views():
    module = build(local_crops=0)
    assert torch.isfinite(module(batch(module), 0)["loss"])
    assert set(dino.views(module.config, data.Config(image_size=32))) == {"global"}


def test_the_teachers_temperature_warms_up_by_epochs_or_smoothly():
    whole = build(teacher_temp=0.07, teacher_temp_warmup_epochs=2)
    assert [whole.teacher_temp(step) for step in range(10)] == pytest.approx([0.04] * 5 + [0.07] * 5)
    smooth = build(teacher_temp=0.07, teacher_temp_warmup_epochs=1.5)
    temperatures = [smooth.teacher_temp(step) for step in range(10)]
    assert temperatures == sorted(temperatures)
    assert len(set(temperatures)) > 3
    assert temperatures[-1] == 0.07


SWIN = {"window_size": 4, "depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)}
CONVIT = {"depth": 2, "local_up_to_layer": 1, "embed_dim": 24}


@pytest.mark.parametrize(
    ("name", "args", "size", "local"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, 64, 32),
        ("mobilevitv2_050", {}, 64, 32),
        ("convit_tiny", CONVIT, 32, 32),
        ("vit_tiny_patch16_224", TINY_MODEL | {"class_token": False, "global_pool": "avg"}, 32, 16),
        ("resnet18", {}, 64, 32),
    ],
)
def test_other_backbones_learn(name, args, size, local):
    """The student comes closer to a teacher that stands still, which then moves towards the student."""
    model = factory.Config(name, args)
    module = build(model, size=size, local_crop_size=local, drop_path=0.0 if name == "resnet18" else 0.1).train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-3)
    views = batch(module, size=size, b=4)
    losses = []
    for step in range(8):
        loss = module(views, step)["loss"]
        loss.backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    exported = module.exported_encoder().eval()
    before = exported.features(views["global"][0])
    module.after_step(0)
    after = exported.features(views["global"][0])
    assert after.shape == (4, exported.feature_dim())
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


def test_a_backbone_of_fixed_size_is_told_how_to_take_part():
    with pytest.raises(UserError, match=r"does not take crops of 16x16.*local_crop_size"):
        build(factory.Config("convit_tiny", {"depth": 2, "local_up_to_layer": 1}), size=32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher_temp": 0.0}, "teacher_temp=0.0 must be above 0"),
        ({"teacher_temp_warmup_epochs": 30}, "longer than the run of 2 epochs"),
        ({"local_crop_size": 15}, "does not take crops of 15x15"),
    ],
)
def test_settings_that_cannot_be_get_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        build(**settings)


def test_koleo_is_added_for_each_global_crop_by_its_weight():
    plain, weighted = build(drop_path=0.0), build(drop_path=0.0, koleo_weight=0.5)
    views = batch(plain)
    values = weighted(views, 0)
    features = weighted.student.features([(views["global"].flatten(0, 1), torch.arange(6))]).detach()
    expected = sum(oracle.koleo(crop) for crop in features.chunk(2))
    assert values["koleo"].item() == pytest.approx(expected, rel=1e-4)
    assert (values["loss"] - plain(views, 0)["loss"]).item() == pytest.approx(0.5 * expected, rel=1e-4)


def test_the_student_sees_a_share_of_a_global_crops_patches_and_the_teacher_all():
    module = build(student_keep=0.25, drop_path=0.0)
    seen: dict[str, list[int]] = {"student": [], "teacher": []}
    for name, network in (("student", module.student), ("teacher", module.teacher)):
        network.encoder.model.blocks[0].register_forward_hook(
            lambda m, x, y, name=name: seen[name].append(x[0].shape[1])
        )
    views = batch(module)
    module(views, 0)
    assert seen == {"student": [1 + 4, 1 + 4], "teacher": [1 + 16]}  # a local crop of 16 pixels has 4 patches in all
    views["global"][:] = views["global"][:1]  # both crops alike, and each image keeps patches of its own
    features = module.student.features([(views["global"].flatten(0, 1), torch.arange(6))], keep=0.25)
    assert not torch.allclose(features[:3], features[3:])


def test_the_head_sees_what_pool_names():
    views = batch(build())
    crops = views["global"].flatten(0, 1)
    for pool in ("cls", "mean"):
        module = build(pool=pool, drop_path=0.0).eval()
        tokens = module.student.encoder(crops)
        expected = tokens.prefix[:, 0] if pool == "cls" else tokens.patches.mean(dim=1)
        assert torch.equal(module.student.features([(crops, torch.arange(6))]), expected)
        assert module.exported_encoder().pool == pool
    with pytest.raises(UserError, match=r"objective\.pool=cls is not something that"):
        build(
            factory.Config("vit_tiny_patch16_224", TINY_MODEL | {"class_token": False, "global_pool": "avg"}),
            pool="cls",
        )


def test_global_crops_may_be_smaller_than_the_image_size():
    config = dino.Config(global_crop_size=24, local_crops=0)
    assert [crop.size for crop in dino.views(config, data.Config(image_size=32))["global"]] == [(24, 24)] * 2


def test_the_encoder_may_start_as_maes_does_and_its_positions_learn():
    module = build(init="mae")
    for network in (module.student, module.teacher):
        vit = network.encoder.model
        assert torch.equal(vit.pos_embed.data, encoder.sincos(48, (4, 4), num_prefix=1))
        bound = (6 / (48 + 4 * 48)) ** 0.5  # Xavier
        assert vit.blocks[0].mlp.fc1.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert module.student.encoder.model.pos_embed.requires_grad
    with pytest.raises(UserError, match=r"objective\.init=mae needs a ViT"):
        build(factory.Config("resnet18"), init="mae")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_drop_path_is_the_students_only_and_as_asked(name):
    """Swin has 0.1 by default in timm."""
    args = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4} if "swin" in name else TINY_MODEL
    for asked in (0.0, 0.3):
        module = build(factory.Config(name, args), size=32, drop_path=asked, local_crop_size=32)
        rates = {
            which: [m.rate for m in network.modules() if isinstance(m, encoder.DropPath)]
            for which, network in (("student", module.student), ("teacher", module.teacher))
        }
        assert max(rates["student"], default=0) == pytest.approx(asked)
        assert max(rates["teacher"], default=0) == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"local_crops": -1}, "local_crops=-1 must be 0 or above"),
        ({"head_layers": 0}, "head_layers=0 must be 1 or above"),
        ({"prototypes": 0}, "prototypes=0 must be 1 or above"),
        ({"student_keep": 0.0}, "student_keep=0.0 must lie between 0 and 1, 0 excluded"),
        ({"drop_path": 1.0}, "drop_path=1.0 must lie between 0 and 1, 1 excluded"),
        ({"flip_prob": 7.0}, "flip_prob=7.0 must lie between 0 and 1"),
        ({"blur_prob": (0.5, 0.5, 2.0)}, r"blur_prob=\[0.5, 0.5, 2.0\] must lie"),
        ({"momentum": 1.5}, "momentum=1.5 must lie between 0 and 1"),
        ({"global_crop_size": 0}, "global_crop_size=0 must be 1 or above"),
        ({"global_crop_scale": (1.0, 0.4)}, "two shares of the area"),
        ({"blur_sigma": (0.0, 0.0)}, "two widths"),
        ({"teacher_temp": 0.0}, "teacher_temp=0.0 must be above 0"),
    ],
)
def test_numbers_without_a_meaning_are_refused(settings, expected):
    with pytest.raises(UserError, match=expected):
        build(**settings)


def test_a_model_that_cannot_drop_patches_is_refused_for_student_keep():
    with pytest.raises(UserError, match=r"student_keep=0\.5 drops patches, and mobilevitv2_050 cannot"):
        build(factory.Config("mobilevitv2_050"), student_keep=0.5)


@pytest.mark.parametrize(("size", "warned"), [(96, True), (16, False)])
def test_local_crops_that_are_larger_than_global_ones_are_noticed(size, warned, cli, images, tmp_path):
    more = ["steps=1", "warmup_epochs=0", f"local_crop_size={size}", "workers=0", f"out={tmp_path / 'run'}"]
    printed = cli("pretrain", images, *words("dino", *more))[1]
    sentence = "Warning: local crops of 96x96 pixels are larger than the global ones of 32x32. The paper's share would"
    assert (f"{sentence} be objective.local_crop_size=16." in printed) == warned


def anchored(module: dino.DINO) -> dino.DINO:
    torch.manual_seed(1)
    module.anchor = Anchor(factory.create(MODEL, (32, 32), 3), 0.5)
    return module


def passed(
    module: dino.DINO, views: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(gradients, values) of a micro-batch, part by part."""
    values: dict[str, torch.Tensor] = {}
    for part in module.split(views):
        found = module(part, 0)
        found["loss"].backward()
        values |= {name: values.get(name, 0.0) + value.detach() for name, value in found.items()}
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, values


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"drop_path": 0.5}, 8),
        ({"koleo_weight": 0.5, "student_keep": 0.5}, 4),  # each global crop whole
        ({"local_crops": 0}, 6),
        ({"local_crops": 3, "norm_last_layer": False, "local_crop_size": (16, 32)}, 9),
    ],
)
def test_crop_wise_backward_gives_the_same_gradients_and_values(settings, parts):
    (ours, mine), (theirs, expected) = (
        passed(anchored(build(crop_wise_backward=chosen, **settings).train()), batch(build(**settings), b=9))
        for chosen in (True, False)
    )
    cut = build(crop_wise_backward=True, **settings)
    assert len(cut.split(batch(cut, b=9))) == parts
    assert mine.keys() == expected.keys()
    assert {"teacher_entropy", "teacher_mean_entropy", "anchor", "feature_spread", "image_difference"} <= mine.keys()
    for name, value in mine.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5), name
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max().item() < 1e-6 * largest, name


def test_steps_with_crop_wise_backward_take_less_than_a_third_of_the_memory_and_end_in_the_same_weights():
    case = steps.Case("dino", [*TINY, "image_size=32"], (32, 8, 48, 2, 4), 16, local=(4, 16), prototypes=16)
    (whole, theirs, most), (parts, ours, least) = (steps.crop_wise(case, chosen, "float32") for chosen in (False, True))
    assert parts == pytest.approx(whole, rel=1e-6)
    assert least < most / 3
    for name, value in theirs.items():
        if "qkv.bias" not in name:  # a key's bias has no gradient but rounding, which Adam blows up
            assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), name


def test_crop_wise_backward_is_by_itself_only_where_it_was_left_open_and_never_with_batch_norm():
    assert build().save_memory().crop_wise_backward
    assert build(crop_wise_backward=False).save_memory() is None
    assert build(crop_wise_backward=True).save_memory() is None
    resnet = factory.Config("resnet18", {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]})
    assert build(resnet, local_crop_size=32).save_memory() is None
    with pytest.raises(UserError, match=r"crop_wise_backward=true cuts a batch into parts, and resnet18 normalises"):
        build(resnet, local_crop_size=32, crop_wise_backward=True)
