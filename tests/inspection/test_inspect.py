"""The command: what is measured of a whole encoder, and the page."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from sslvit.evaluation.config import Inspect
from sslvit.evaluation.frozen import load_frozen
from sslvit.inspection import _some_of, drawing, measures
from sslvit.inspection.collect import Meter
from tests.conftest import write_images

TINY = "model_args={patch_size: 8, embed_dim: 48, depth: 3, num_heads: 2, reg_tokens: 1}"
RANDOM = ["run=random:vit_tiny_patch16_224", "image_size=32", TINY, "workers=0"]


def meter(**more):
    args = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2, **more}
    config = Inspect(run="random:vit_tiny_patch16_224", image_size=32, model_args=args, precision="float32", out="")
    frozen = load_frozen(config)
    frozen.encoder.eval()
    return frozen.encoder, lambda: Meter(frozen)


def test_even_attention_has_the_known_distance_entropy_and_rollout():
    encoder, make = meter()
    for block in encoder.model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    found = make()
    found.add(torch.arange(5), torch.randn(5, 3, 32, 32))
    found.finish(torch.full((5,), -1), 0)
    heads = found.found.heads
    assert heads.shape == (3, 2, 3)
    assert torch.allclose(heads[..., 1], torch.tensor(measures.even_distance((4, 4)), dtype=torch.float64), atol=1e-4)
    assert torch.allclose(heads[..., 0], torch.tensor(17.0, dtype=torch.float64).log2(), atol=1e-4)
    through = (1 - 0.5**3) / 17  # to each patch, from the class token
    assert [number for number, *_ in found.found.samples] == [0, 1, 2, 3, 4]
    for _, rolled, _ in found.found.samples:
        assert torch.allclose(rolled, torch.full((4, 4), through), atol=1e-6)


def test_attention_is_the_mean_over_its_images_in_batches_of_any_size(monkeypatch):
    encoder, make = meter(reg_tokens=2)
    for block in encoder.model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)
    x = torch.randn(11, 3, 32, 32)
    whole, parts = make(), make()
    whole.add(torch.arange(11), x)
    monkeypatch.setattr("sslvit.inspection.collect.VALUES_AT_ONCE", 2 * 19**2 * 2)  # two images at once
    for numbers in torch.arange(11).split(4):
        parts.add(numbers, x[numbers])
    for one in (whole, parts):
        one.finish(torch.full((11,), -1), 0)
    assert torch.allclose(whole.found.heads, parts.found.heads, atol=1e-5)
    assert whole.found.heads[:, :, 1].std() > 0.05
    for a, b in zip(whole.found.samples, parts.found.samples, strict=True):
        assert a[0] == b[0]
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(a[1:], b[1:], strict=True))
    assert [len(one.found.samples) for one in (whole, parts)] == [8, 8]


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_and_norms_of_the_last_block_are_those_of_the_encoder(pool):
    encoder, make = meter(reg_tokens=2)
    x, found = torch.randn(6, 3, 32, 32), make()
    found.frozen.pool = pool
    features = found.add(torch.arange(6), x)
    assert len(features) == 3
    with torch.inference_mode():
        assert torch.allclose(features[-1], encoder.features(x, pool), atol=1e-5)
        raw = encoder.model.blocks[0](encoder._embed(x))[:, 3:].norm(dim=-1)
    assert found.norms[0].largest == pytest.approx(raw.max().item(), rel=1e-5)
    assert found.norms[0].counts.sum() == 6 * 16, "no class token, no registers"
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in encoder.model.blocks)


def test_a_class_does_not_fill_a_batch(labelled):
    from sslvit.data import open_source

    source = open_source(str(labelled / "train"), load_frozen(Inspect(run="pixels", out="")).subject.data_config)
    chosen = _some_of(source, Inspect(images=20))
    assert len(chosen) == 20
    assert len(set(chosen.labels[:8].tolist())) == 3


def test_the_page_and_the_record_of_a_run(cli, colour_run, labelled, tmp_path):
    run = tmp_path / "<i>run"
    shutil.copytree(colour_run, run)
    out = tmp_path / "inspect.html"
    words = ["inspect", f"run={run}", "workers=0", f"out={out}"]
    status, said, error = cli(*words, f"data=[{labelled / 'train'},{labelled / 'test'}]")
    assert (status, error) == (0, "")
    text = out.read_text()
    for title in ("Which block is best", "Effective rank", "Singular values", "How far the heads look", "Norms of the",
                  "What reaches the output", "Which blocks are similar", "Filters", "position embeddings"):  # fmt: skip
        assert title in text, title
    assert "<i>" not in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text[: text.index("<script")])
    record = json.loads((run / "eval" / "inspect.json").read_text())
    (one,) = record["results"]["encoders"]
    assert [row["block"] for row in one["blocks"]] == ["0", "1"]
    assert one["blocks"][1]["CKA to last"] == "1.00"
    assert one["blocks"][1]["k-NN %"] in said
    assert "They are the sines and cosines of the start" in said
    status, said, _ = cli(*words)
    assert status == 0, "its own page is replaced"
    assert "may be somebody else's" in said, "images that only a copied folder names are not shown"
    with (run / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"folder": run.stat().st_ino}) + "\n")
    _, said, _ = cli(*words)
    assert "each block, 36 images" in said, "those that it was trained on"


def test_names_of_images_are_escaped(cli, tmp_path):
    folder = write_images(tmp_path / "images", 9)
    for path in folder.iterdir():
        path.rename(folder / f"{path.stem}<script>alert(1)<&script>.png")
    assert cli("inspect", *RANDOM, f"data={folder}", f"out={tmp_path / 'a.html'}")[0] == 0
    text = (tmp_path / "a.html").read_text()
    assert text.count("&lt;script&gt;alert(1)") >= 8
    assert "<script>alert" not in text


def test_two_encoders_are_measured_on_the_same_images(cli, colour_run, labelled, tmp_path):
    out, record = tmp_path / "two.html", colour_run / "eval" / "untrained" / "inspect.json"
    status, said, _ = cli("inspect", f"run=untrained:{colour_run}", f"other={colour_run}", f"data={labelled / 'test'}",
                          "workers=0", f"out={out}")  # fmt: skip
    assert status == 0
    found = json.loads(record.read_text())
    assert [one["images"] for one in found["results"]["encoders"]] == [18, 18]
    across = torch.tensor(found["results"]["cka"])
    assert across.shape == (2, 2)
    assert (across > 0.9).all(), "after eight small steps they are nearly the same"
    assert "k-NN by block needs more than 40 labelled images" in said
    assert "CKA between the blocks of two encoders" in out.read_text()


def test_a_picture_of_a_model_without_blocks(cli, labelled, tmp_path):
    out, small = tmp_path / "swin.png", "model_args={embed_dim: 24, depths: [1, 1, 1, 1]}"
    status, said, error = cli("inspect", "run=random:swin_tiny_patch4_window7_224", "image_size=32", small, "workers=0",
                              f"data={labelled / 'test'}", "images=12", f"out={out}")  # fmt: skip
    assert (status, error) == (0, "")
    assert "is a SwinTransformer, not a plain ViT: its stages are shown, without positions, attention" in said
    assert "registers are wanted" not in said
    with Image.open(out) as image:
        assert image.width > 700
        assert image.height > 1000


def test_an_encoder_without_images_shows_its_weights(cli, tmp_path):
    status, said, _ = cli("inspect", *RANDOM, f"out={tmp_path / 'a.html'}")
    assert status == 0
    assert "random filters need" in said
    assert "There is nothing that needs images: give data=" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run=pixels"], "pixels have no blocks"),
        ([*RANDOM, "pool=last4"], "pool=last4 reads several blocks at once: give cls, mean or cls+mean"),
        ([*RANDOM, "images=4"], "images=4"),
        ([*RANDOM, "other=nowhere"], "run=nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_said(fails, tmp_path, words, sentence):
    assert sentence in fails("inspect", *words, f"out={tmp_path / 'a.html'}")


def test_a_file_of_others_is_not_replaced(fails, tmp_path):
    (tmp_path / "mine.html").write_text("mine")
    assert "is no report of sslvit" in fails("inspect", *RANDOM, f"out={tmp_path / 'mine.html'}")
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_charts_show_what_is_finite_with_round_numbers_beside():
    series = [drawing.Series("a<b", [(0.0, 1.0), (1.0, float("nan")), (2.0, 9.0)]), drawing.Series("", [(0.0, 4.0)])]
    chart = drawing.chart("about", series, "block", {"level": 5.0})
    text = chart.svg()
    assert "nan" not in text
    assert "a&lt;b" in text
    assert text.count("<circle") == 3
    assert [drawing._ticks(0, top) for top in (1, 7.3)] == [[0, 0.2, 0.4, 0.6, 0.8, 1], [0, 2, 4, 6]]
    assert drawing._powers(-2.5, 0.2) == [0.01, 0.1, 1]
    image = chart.image()
    assert image.size == (chart.width, chart.height)
    parts = drawing._dashes([(0, 0), (8, 0), (8, 20)])
    assert sum(abs(u - x) + abs(v - y) for (x, y), (u, v) in parts) == pytest.approx(18), "6 of each 10"
