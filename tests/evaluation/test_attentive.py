import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslvit import rng
from sslvit.evaluation import attentive
from sslvit.evaluation.attentive import Config, Head, Heads, Set
from sslvit.evaluation.tokens import Tokens
from tests import processes


def images(count: int, tokens: int = 9, width: int = 12, classes: int = 3, seed: int = 0) -> Set:
    """One token of each image tells its class, at a place of its own, and is marked by the first channel."""
    generator = np.random.default_rng(seed)
    labels, places = generator.integers(0, classes, count), generator.integers(0, tokens, count)
    values = generator.normal(size=(count, tokens, width))
    rows = np.arange(count)
    values[rows, places] = 0
    values[rows, places, 0] = 6
    values[rows, places, 1 + labels] = 6
    stored = Tokens(values.astype(np.float16), torch.arange(count), 0)
    return Set(stored, torch.arange(count), torch.from_numpy(labels))


def test_the_short_way_equals_keys_and_values_of_every_token():
    """Against attention written out, with torch's own scaled_dot_product_attention and standardised tokens."""
    torch.manual_seed(0)
    width, classes = 128, 5
    heads = nn.ModuleList(Head(width, classes, rng.fold_in(seed, "x")) for seed in (1, 2))
    for p in heads.parameters():
        p.data += 0.1 * torch.randn_like(p)
    mean, std = torch.randn(width), torch.rand(width) + 0.5
    x = 2 * torch.randn(3, 7, width) + 1
    ours = Heads(heads, mean, std).logits(x)
    z = (x - mean) / std
    for head, found in zip(heads, ours, strict=True):
        keys = torch.einsum("bne,hde->bhnd", z, head.keys)
        values = torch.einsum("bne,hde->bhnd", z, head.values) + head.value_bias.unsqueeze(1)
        query = head.query.unsqueeze(1).expand(3, -1, -1, -1)
        assert query.shape == (3, 2, 1, 64)
        out = F.scaled_dot_product_attention(query, keys, values).squeeze(2).flatten(1)
        assert torch.allclose(found, F.linear(out, head.weight, head.bias), atol=1e-4)


def test_it_finds_the_token_that_tells_the_class_which_the_mean_hides():
    train, test = images(300, seed=0), images(150, seed=1)
    config = Config(lr=(1e-2,), weight_decay=(1e-4,), epochs=20, probe_batch_size=30)
    results = attentive.choose(config, train, test, list("abc"), torch.device("cpu"))
    assert results["top1"] > 95


def test_heads_trained_together_equal_heads_trained_alone():
    train, config = images(100), Config(epochs=3, probe_batch_size=20)
    settings = [{"lr": 1e-3, "weight_decay": 0.0}, {"lr": 1e-2, "weight_decay": 0.1}]
    together = attentive.train_heads(config, train, 3, settings, torch.device("cpu"))
    for head, setting in zip(together.heads, settings, strict=True):
        alone = attentive.train_heads(config, train, 3, [setting], torch.device("cpu")).heads[0]
        for ours, theirs in zip(head.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_standardisation_is_over_all_tokens():
    train = images(50)
    mean, std = attentive.standardisation(train)
    x = train.tokens[torch.arange(50)].flatten(0, 1)
    assert torch.allclose(mean, x.mean(0), atol=1e-5)
    assert torch.allclose(std, x.std(0, unbiased=False), atol=1e-3)


@pytest.fixture
def run_words(labelled, colour_run, tmp_path) -> list[str]:
    run = tmp_path / "run"
    shutil.copytree(colour_run, run, ignore=shutil.ignore_patterns("eval"))
    return [f"run={run}", f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"]


SMALL = ["lr=[0.01]", "weight_decay=[0]", "epochs=20", "probe_batch_size=8", "holdout=0.3"]


def test_colours_are_told_apart_and_tokens_are_kept(cli, run_words, tmp_path):
    status, printed, _ = cli("attentive", *run_words, *SMALL)
    assert status == 0
    assert "patch tokens of 36 images" in printed
    path = tmp_path / "run" / "eval" / "attentive.json"
    first = json.loads(path.read_text())["results"]
    assert first["top1"] > 90
    status, printed, _ = cli("attentive", *run_words, *SMALL)
    assert printed.count("as computed before") == 2
    assert json.loads(path.read_text())["results"] == first
    files = sorted((tmp_path / "run" / "eval" / "features").glob("*.tokens"))
    files[0].write_bytes(files[0].read_bytes()[:100])  # damaged: made again
    status, printed, _ = cli("attentive", *run_words, *SMALL)
    assert printed.count("as computed before") == 1
    assert json.loads(path.read_text())["results"] == first
    changed = bytearray(files[0].read_bytes())
    changed[1000] ^= 1
    files[0].write_bytes(changed)
    record = files[1].with_suffix(".json")
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "read": [*content["read"][:-1], 999]}))
    status, printed, _ = cli("attentive", *run_words, *SMALL)
    assert "as computed before" not in printed
    assert json.loads(path.read_text())["results"] == first


@pytest.mark.slow  # starts three processes
def test_one_and_two_processes_give_the_same_and_leave_no_temporary_file(run_words, tmp_path, monkeypatch):
    place = tmp_path / "temporary"
    place.mkdir()
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    words = ["attentive", *run_words, *SMALL, "cache=false"]
    environment = {"TMPDIR": str(place)}
    processes.finish(processes.start([*words, f"out={alone}"], tmp_path / "log", environment), tmp_path / "log")
    processes.launch([*words, f"out={together}"], tmp_path / "log2", world_size=2)
    assert json.loads(alone.read_text())["results"] == json.loads(together.read_text())["results"]
    assert list(place.iterdir()) == []
    assert not (tmp_path / "run" / "eval" / "features").exists()


def test_what_cannot_be_gets_a_sentence(fails, run_words, images):
    run, train, test = run_words
    assert "has no patch tokens" in fails("attentive", "run=pixels", "image_size=32", train, test)
    assert "lr=[0.0] must be" in fails("attentive", run, train, test, "lr=[0]")
    assert "data.test is missing" in fails("attentive", run, train)
    assert "has no labels" in fails("attentive", run, train, f"data.test={images}")
    assert "holdout=1" in fails("attentive", run, train, test, "holdout=1")
