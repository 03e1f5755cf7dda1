import copy
import dataclasses
import math
import re
import typing
from importlib import import_module

import pytest
from omegaconf import OmegaConf

from sslvit import config, export, objectives
from sslvit.__main__ import TOOLS
from sslvit.arguments import flatten, help_lines, merge
from sslvit.errors import UserError
from sslvit.evaluation import commands, knn, linear


def load(*words: str) -> config.RunConfig:
    return config.load(list(words))


def plan(*words: str, images: int = 1000, world_size: int = 1) -> config.Plan:
    return config.make_plan(load(*words), images, world_size, rank=0)


def test_defaults_are_those_of_the_methods_paper():
    mae, dino = load("method=mae"), load("method=dino")
    assert (mae.optim.base_lr, mae.optim.betas, mae.epochs, mae.global_batch_size) == (1.5e-4, (0.9, 0.95), 800, 4096)
    assert (dino.optim.base_lr, dino.optim.betas, dino.optim.clip) == (5e-4, (0.9, 0.999), 3.0)
    assert (dino.objective.prototypes, dino.objective.local_crops) == (65536, 8)


def test_layers_override_each_other_in_order(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: dino\noptim: {base_lr: 1e-3, clip: null}\nobjective: {prototypes: 128}\nepochs: 7\n")
    loaded = load(str(recipe), "prototypes=256")
    assert (loaded.optim.base_lr, loaded.optim.clip, loaded.optim.betas) == (1e-3, None, (0.9, 0.999))
    assert loaded.objective.prototypes == 256
    assert loaded.epochs == 7
    assert loaded.out == "runs/mine"


def test_a_folder_is_the_training_data(images):
    assert load(str(images), "mask_ratio=0.6").data.train == str(images)


def test_a_new_length_replaces_the_old_one_whatever_its_unit(tmp_path):
    assert load("steps=50").epochs is None
    (tmp_path / "mine.yaml").write_text("images: 100000\n")
    loaded = load(str(tmp_path / "mine.yaml"), "epochs=2.5")
    assert (loaded.images, loaded.epochs) == (None, 2.5)
    with pytest.raises(UserError, match="not epochs=5 and steps=9 at once"):
        load("epochs=5", "steps=9")


def test_text_stays_as_it_was_written():
    for text in ("010", "1e3", "off", "a #b", "x: y", "[1]", ""):
        assert load(f"data.train={text}").data.train == text


def test_what_is_stored_is_what_is_loaded(tmp_path):
    loaded = load("method=dino", "image_size=[64,96]", "model.args.reg_tokens=4", "mean=[0.1,0.2,0.3]")
    config.save(loaded, tmp_path / "config.yaml")
    assert config.differences(tmp_path / "config.yaml", loaded) == {}
    assert load(str(tmp_path / "config.yaml")) == loaded
    other = dataclasses.replace(loaded, seed=5)
    assert config.differences(tmp_path / "config.yaml", other) == {"seed": (0, 5)}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mask_rato=0.7"], ["mask_rato", "Did you mean objective.mask_ratio?"]),
        (["objective.mask_rato=0.7"], ["Did you mean objective.mask_ratio?"]),
        (["optm.base_lr=1"], ["Did you mean optim.base_lr?"]),
        (["method=dinno"], ["Did you mean dino?"]),
        (["method=no.such.module"], ["no.such.module", "cannot be imported"]),
        (["method=json.decoder"], ["defines no Config"]),
        (["epochs=many"], ["epochs must be a number, not many."]),
        (["mask_ratio=[1,2]"], ["mask_ratio"]),
        (["betas=[0.9]"], ["betas"]),
        (["betas=[[],[]]"], ["optim.betas=[[],[]]", "single values"]),
        (["image_size=big"], ["data.image_size must be a whole number or a list of 2 whole numbers, not big."]),
        (["train=x"], ["data.train or eval.train"]),
        (["precision=fp64"], ["fp64", "bf16"]),
        (["nonsense"], ["neither a recipe"]),
        (["batch_size=many"], ["batch_size must be a whole number or auto, not many."]),
        (["jitter=3", "method=dino"], ["objective.jitter must be a list of 4 numbers, not [3]."]),
        (["compile=maybe"], ["compile must be true or false, not maybe."]),
        (["precision=fp8"], ["precision must be auto or float32 or bf16 or fp16, not fp8."]),
        (["data=ok"], ["data is a group of keys: write data.train=ok, or just the folder."]),
        (["model=vit"], ["model is a group of keys: write model.name=vit."]),
        (["lr=1"], ["Did you mean optim.base_lr?"]),
        (["method=dino", "mask_ratio=0.5"], ["mask_ratio belongs to method=mae: leave it out"]),
        (["--epochs", "3"], ["write epochs=3, without dashes or spaces."]),
        (["epochs", "=", "3"], ["write epochs=3, without dashes or spaces."]),
        (["epochs = 3"], ["write epochs=3, without dashes or spaces."]),
        (["/no/such/folder"], ["/no/such/folder does not exist"]),
        (["a.yaml", "b.yaml"], ["one recipe"]),
        (["missing.yaml"], ["There is no file missing.yaml"]),
        (["seed=!!python/object/apply:os.system [true]"], ["seed"]),
        (["epochs=${nothing}"], ["nothing"]),
    ],
)
def test_mistakes_get_a_sentence(words, expected):
    with pytest.raises(UserError) as error:
        load(*words)
    assert all(part in str(error.value) for part in expected), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {base_lrr: 1}", ["Did you mean optim.base_lr?"]),
        ("- a\n- list", ["must hold keys and values"]),
        ("a: [1, 2", ["cannot be read"]),
        ("method: mae\ndata:\n\timage_size: 32\n", ["recipe.yaml line 3: a tab; indent with spaces."]),
        ("method: mae\nmethod: dino\n", ["recipe.yaml line 2: `method` is given twice."]),
        ("epochs: many", ["recipe.yaml: epochs must be a number, not many."]),
        ("x: !!python/object/apply:os.system ['touch sprung']", ["cannot be read"]),
        ("", []),
    ],
)
def test_mistakes_in_a_recipe_get_a_sentence(tmp_path, text, expected):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    if not expected:
        assert load(str(recipe)).method == "mae"
        return
    with pytest.raises(UserError) as error:
        load(str(recipe))
    assert all(part in str(error.value) for part in [*expected, "recipe.yaml"]), error.value
    assert not (tmp_path / "sprung").exists()


def test_a_recipe_with_a_slip_in_its_name_is_found(tmp_path):
    (tmp_path / "mae_cifar10.yaml").write_text("")
    with pytest.raises(UserError, match=r"Did you mean .*mae_cifar10\.yaml"):
        load(str(tmp_path / "mae_cifar.yaml"))


def test_the_plan_follows_from_images_and_processes():
    p = plan("global_batch_size=64", "batch_size=8", "epochs=2", "warmup_epochs=0.5", images=1000, world_size=2)
    assert (p.steps_per_epoch, p.steps, p.warmup_steps) == (15, 30, 8)
    assert (p.layout.batch_size, p.layout.accumulate, p.layout.global_batch_size) == (8, 4, 64)
    assert plan("global_batch_size=64", "steps=5", "warmup_epochs=0").steps == 5
    assert plan("global_batch_size=64", "images=700", "warmup_epochs=0").steps == 10


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["global_batch_size=2000"], "larger than the 1000 images"),
        (["global_batch_size=64", "batch_size=7"], "not a multiple of batch_size=7"),
        (["global_batch_size=64", "epochs=3", "warmup_epochs=3"], "not shorter than the run of 3 epochs"),
        (["global_batch_size=64", "epochs=0"], "epochs=0"),
        (["global_batch_size=64", "epochs=null"], "must be one number above 0"),
        (["global_batch_size=64", "images=10"], "less than one step of 64 images"),
        (["global_batch_size=0"], "multiple of the number of processes"),
    ],
)
def test_plans_that_cannot_be_get_a_sentence(words, expected):
    with pytest.raises(UserError, match=expected):
        plan(*words)
    with pytest.raises(UserError, match="multiple of the number of processes, 3"):
        plan("global_batch_size=64", world_size=3)


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_every_key_is_listed_and_explained_in_the_help(method):
    lines = help_lines(load(f"method={method}"))
    assert [line.split("=")[0].strip() for line in lines] == list(flatten(config._defaults(method)))
    assert [line for line in lines if "  " not in line.strip()] == []


@pytest.mark.parametrize("command", [knn, linear, export])
def test_every_key_of_the_other_commands_is_explained_in_the_help(command):
    assert [line for line in help_lines(command.Config()) if "  " not in line.strip()] == []


def test_a_list_in_place_of_a_dictionary_is_refused(fails):
    assert "model.args=[]" in fails("pretrain", "model.args=[]")


def test_a_preset_sets_its_keys_and_what_is_written_wins(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: dino\nobjective: {preset: xray, blur_prob: [0.2, 0.2, 0.2]}\n")
    loaded = config.load([str(recipe), "solarize_prob=0.1"]).objective
    assert (loaded.preset, loaded.jitter, loaded.gray_prob) == ("xray", (0.1, 0.2, 0.0, 0.0), 0.0)
    assert loaded.blur_prob == (0.2, 0.2, 0.2)
    assert loaded.solarize_prob == 0.1
    assert config.load([str(recipe), "preset=channels"]).objective.channel_jitter == (0.4, 0.4)
    assert config.load(["method=mae", "objective.preset=satellite"]).objective.rotate_prob == 0.75


@pytest.mark.parametrize("method", objectives.names())
def test_the_preset_by_default_is_the_paper_and_each_can_be_built_and_stored(method, tmp_path):
    module = objectives.find(method)
    assert config.load([f"method={method}"]) == config.load([f"method={method}", "preset=photo"])
    for preset in module.PRESETS:
        loaded = config.load([f"method={method}", f"preset={preset}"])
        crops = [crop for named in module.views(loaded.objective, loaded.data).values() for crop in named]
        if preset in ("gray", "xray", "channels"):
            assert all(crop.vertical_flip_prob == crop.rotate_prob == 0 for crop in crops)
            assert all(crop.jitter[2:] == (0, 0) for crop in crops)
        if preset in ("microscopy", "satellite"):
            assert all((crop.vertical_flip_prob, crop.rotate_prob) == (0.5, 0.75) for crop in crops)
        if preset not in ("photo", "dinov2_released"):
            assert all(crop.jitter[3] == crop.solarize_prob == crop.gray_prob == 0 for crop in crops)
        config.save(loaded, tmp_path / "config.yaml")
        assert f"preset: {preset}" in (tmp_path / "config.yaml").read_text()
        assert config.load([str(tmp_path / "config.yaml")]) == loaded


def test_the_blur_of_dinov2s_released_code_is_that_of_the_paper_turned_around():
    paper, released = (config.load(["method=dino", *words]).objective for words in ([], ["preset=dinov2_released"]))
    assert released.blur_prob == pytest.approx([1 - probability for probability in paper.blur_prob])


def test_the_help_shows_what_a_preset_sets(cli):
    shown = cli("pretrain", "method=dino", "preset=microscopy", "--help")[1]
    assert "objective.rotate_prob=0.75" in shown
    assert "microscopy" in cli("pretrain", "method=mae", "--help")[1]
    assert "Did you mean satellite?" in cli("pretrain", "preset=satelite", "--help")[2]


def test_a_key_that_is_newer_than_a_stored_configuration_had_its_default(tmp_path):
    loaded = config.load(["method=dino"])
    config.save(loaded, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text("".join(line for line in text.splitlines(True) if "rotate_prob" not in line))
    assert config.differences(tmp_path / "config.yaml", loaded) == {}
    loaded.objective.rotate_prob = 0.5
    assert config.differences(tmp_path / "config.yaml", loaded) == {"objective.rotate_prob": (0.0, 0.5)}


def sections(node) -> list:
    """A configuration and all that it holds."""
    inner = [getattr(node, item.name) for item in dataclasses.fields(node)]
    return [node, *(section for one in inner if dataclasses.is_dataclass(one) for section in sections(one))]


def test_no_number_may_be_infinite_or_not_a_number_or_larger_than_torch_can_hold():
    """Of a run, of every evaluation and of every tool. A seed may be of any size."""
    nodes = [section for method in objectives.names() for section in sections(load(f"method={method}"))]
    nodes += [import_module(f"sslvit.evaluation.{name}").Config() for name in commands()]
    nodes += [import_module(f"sslvit.tools.{name}").Config() for name, *_ in TOOLS.values()]
    tried = set()
    for node in {type(node): node for node in nodes}.values():
        schema = OmegaConf.structured(node)
        for key, hint in typing.get_type_hints(type(node)).items():
            kinds = re.findall(r"\b(?:int|float)\b", re.sub(r".*tuple\[(.*)\].*", r"\1", str(hint)))
            for value in [] if key == "seed" or not kinds else [2**63] if kinds[0] == "int" else [math.inf, math.nan]:
                with pytest.raises(UserError, match=f"here: {key}=.* must be finite and below 9.2e"):
                    merge(copy.deepcopy(schema), {key: [value] * len(kinds) if "tuple" in str(hint) else value}, "here")
                tried.add((type(node).__module__, type(node).__name__, key))
    assert len(tried) > 150
    assert load("seed=1000000000000000000000").seed == 10**21
    for text in ("{a: {b: [1, .inf]}}", "{depth: 100000000000000000000}", "{mlp_ratio: .nan}"):
        with pytest.raises(UserError, match="must be finite"):
            load(f"model.args={text}")


def test_a_number_that_cannot_be_is_refused_in_a_recipe_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("eval: {every_epochs: .inf}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: eval\.every_epochs=inf must be finite and below 9\.2e"):
        load(str(tmp_path / "mine.yaml"))
