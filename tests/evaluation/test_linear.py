import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sslvit import optim, rng
from sslvit.evaluation import linear, probes, protocol
from sslvit.evaluation.features import Features


def clouds(n: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian clouds around four corners of a square in 6 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    return F.pad(corners[labels], (0, 4)) + spread * torch.randn(n, 6, generator=generator), labels


def accuracy(heads: torch.Tensor, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[H] top-1 in percent."""
    return 100 * (probes.predict(heads, x, labels)[0] == labels).double().mean(dim=1)


def test_separable_clouds_are_separated_and_overlapping_ones_at_the_bayes_rate():
    for spread, low, high in ((0.1, 99.9, 100.0), (1.0, 67.0, 74.5)):  # Bayes: P(|z| < 1)^2 with z normal = 70.8 %
        x, labels = clouds(4000, spread, seed=0)
        test_x, test_labels = clouds(4000, spread, seed=1)
        heads = linear.train_heads(x, labels, 4, [0.1], 20, 0.0, 256, seed=0)
        assert low <= accuracy(heads, test_x, test_labels).item() <= high


def test_heads_trained_together_equal_heads_trained_alone():
    x, labels = clouds(200, 0.5, seed=0)
    rates = [0.01, 0.1, 1.0]
    together = linear.train_heads(x, labels, 4, rates, 5, 1e-4, 32, seed=0)
    for i, rate in enumerate(rates):
        single = linear.train_heads(x, labels, 4, [rate], 5, 1e-4, 32, seed=0)
        assert torch.allclose(together[i], single[0], atol=1e-5)


def test_a_head_equals_torchs_own_sgd():
    x, labels = clouds(64, 0.5, seed=0)
    ours = linear.train_heads(x, labels, 4, [0.3], 3, 1e-3, 16, seed=0)[0]
    layer = torch.nn.Linear(6, 4)
    start = linear.train_heads(x, labels, 4, [0.3], 0, 0.0, 16, seed=0)[0]
    layer.weight.data, layer.bias.data = start[:-1].t().clone(), start[-1].clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-3)
    for step in range(12):
        epoch, place = divmod(step, 4)
        rows = rng.permutation(rng.fold_in(0, "probe", epoch), 64)[place * 16 : place * 16 + 16]
        optimizer.param_groups[0]["lr"] = 0.3 * 16 / 1024 * optim.cosine(1.0, 0.0, step / 12)
        optimizer.zero_grad()
        F.cross_entropy(layer(x[rows]), labels[rows]).backward()
        optimizer.step()
    assert torch.allclose(ours[:-1].t(), layer.weight, atol=1e-5)
    assert torch.allclose(ours[-1], layer.bias, atol=1e-5)


def test_the_rate_is_chosen_on_held_out_images_and_useless_features_stay_at_chance(cli, labelled, colour_run, tmp_path):
    status, printed, _ = cli(
        "linear", f"run={colour_run}", f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}",
        f"out={tmp_path / 'r.json'}", "lr=[1e-6,1.0]", "holdout=0.3", "epochs=30", "probe_batch_size=16",
    )  # fmt: skip
    assert status == 0
    assert "with lr 1, weight_decay 0" in printed
    assert "at the end of the list" in printed
    torch.manual_seed(0)
    noise, labels = torch.randn(2000, 8), torch.randint(0, 4, (2000,))
    heads = linear.train_heads(noise[:1000], labels[:1000], 4, [0.1], 20, 0.0, 256, seed=0)
    assert accuracy(heads, noise[1000:], labels[1000:]).item() == pytest.approx(25, abs=5)


def test_losses_and_hits_equal_torchs():
    x, labels = clouds(64, 0.5, seed=0)
    heads = linear.train_heads(x, labels, 4, [0.1, 1.0], 20, 0.0, 16, seed=0)
    predictions, loss = probes.predict(heads, x, labels)
    for i, head in enumerate(heads):
        logits = x @ head[:-1] + head[-1]
        assert torch.equal(predictions[i], logits.argmax(dim=1))
        assert loss[i].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_what_a_head_reads_and_how_it_is_trained_is_chosen_on_held_out_images_only():
    """The good features are those that hold on held-out images; the test images say the opposite and are not asked."""
    x, labels = clouds(400, 0.1, seed=0)
    noise = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))

    def features(values):
        return Features(values, labels, list("abcd"), torch.arange(400))

    sets = {"mean": (features(noise), features(x)), "cls": (features(x), features(noise))}
    encoder = SimpleNamespace(pool="mean")
    task = protocol.Task(SimpleNamespace(encoder=encoder), "linear", list("abcd"), sets, {})
    config = linear.Config(holdout=0.25)

    def train(x, labels, settings):
        rates = [one["lr"] for one in settings]
        return linear.train_heads(x, labels, 4, rates, 10, [one["weight_decay"] for one in settings], 64, 0)

    settings = [{"lr": lr, "weight_decay": 0.0} for lr in (1e-6, 0.3)]
    results = probes.choose_and_test(config, task, settings, train)
    assert (results["pool"], results["setting"]) == ("cls", settings[1])
    assert results["holdout_top1"] == 100
    assert results["top1"] < 40
    assert len(results["sweep"]) == 4
    assert results["mean_by_class"] == pytest.approx(results["top1"])


def test_each_head_has_its_own_weight_decay():
    x, labels = clouds(200, 0.5, seed=0)
    together = linear.train_heads(x, labels, 4, [0.3, 0.3], 5, [0.0, 3.0], 32, seed=0)
    for head, decay in zip(together, (0.0, 3.0), strict=True):
        assert torch.allclose(head, linear.train_heads(x, labels, 4, [0.3], 5, decay, 32, seed=0)[0], atol=1e-6)
    assert together[1].norm() < 0.9 * together[0].norm()


def test_standardised_features_have_mean_zero_and_deviation_one():
    x = torch.randn(500, 3) * torch.tensor([1.0, 100.0, 0.01]) + 7
    mean, std = probes.mean_and_std(x)
    z = (x - mean) / std
    assert z.mean(0).abs().max() < 1e-4
    assert (z.std(0, unbiased=False) - 1).abs().max() < 0.01


@pytest.mark.parametrize("word", ["holdout=0", "holdout=1", "lr=[]", "epochs=0"])
def test_settings_that_cannot_be_get_a_sentence(fails, labelled, colour_run, word):
    train, test = f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}"
    assert word.split("=")[0] in fails("linear", f"run={colour_run}", train, test, word)


def test_seeds_are_trainings_of_their_own_with_mean_and_deviation(cli, fails, labelled, colour_run, tmp_path):
    sets = [f"run={colour_run}", f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", "holdout=0.3"]
    few = ["lr=[0.003]", "weight_decay=[0]", "pool=cls", "epochs=3", "probe_batch_size=16"]
    out = tmp_path / "r.json"
    status, printed, _ = cli("linear", *sets, *few, f"out={out}", "seeds=[0,1,2]")
    assert status == 0
    results = json.loads(out.read_text())["results"]
    each = [one["top1"] for one in results["seeds"]]
    assert results["top1"] == pytest.approx(sum(each) / 3, abs=1e-3)
    assert results["top1_deviation"] == pytest.approx(torch.tensor(each).std().item(), abs=1e-3)
    assert "over the seeds [0, 1, 2]" in printed
    assert cli("linear", *sets, *few, f"out={out}", "seed=2")[0] == 0
    assert json.loads(out.read_text())["results"]["right"] == results["seeds"][2]["right"]
    assert "two or more that differ" in fails("linear", *sets, "seeds=[1,1]")


def test_of_equal_poolings_the_trained_one_is_chosen():
    rows = [{"pool": pool, "holdout_top1": 90.0, "holdout_loss": loss} for pool, loss in (("cls", 0.1), ("mean", 0.2))]
    assert probes.best_of(rows, "mean")["pool"] == "mean"
    assert probes.best_of(rows, "cls")["pool"] == "cls"
    assert probes.best_of([*rows, {"pool": "cls", "holdout_top1": 91.0, "holdout_loss": 9.0}], "mean")["pool"] == "cls"
    sure, unsure = ({"pool": "cls", "holdout_top1": 91.0, "holdout_loss": loss} for loss in (0.3, 0.4))
    for pair in ([sure, unsure], [unsure, sure]):
        assert probes.best_of(pair, "mean") is sure
