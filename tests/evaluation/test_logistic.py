import json

import pytest
import torch
import torch.nn.functional as F

from sslvit.evaluation import logistic
from tests.evaluation.test_linear import clouds


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_the_solution_is_the_minimum(l2):
    """The gradient of the penalised loss vanishes there, in float64; a strictly convex loss has no other such point."""
    x, labels = clouds(300, 0.7, seed=0)
    found = logistic.solve(x, labels, 4, l2, 500).double().requires_grad_()
    loss = F.cross_entropy(x.double() @ found[:-1] + found[-1], labels) + l2 / 2 * found[:-1].square().sum()
    loss.backward()
    assert found.grad.abs().max() < 3e-4
    nudged = found.detach() + 0.05 * torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    worse = F.cross_entropy(x.double() @ nudged[:-1] + nudged[-1], labels) + l2 / 2 * nudged[:-1].square().sum()
    assert worse > loss


def test_where_it_begins_does_not_matter():
    x, labels = clouds(300, 0.7, seed=0)
    strong = logistic.solve(x, labels, 4, 1.0, 200)
    assert torch.allclose(
        logistic.solve(x, labels, 4, 0.01, 500, strong), logistic.solve(x, labels, 4, 0.01, 500), atol=2e-3
    )


def test_parts_of_the_sum_add_up(monkeypatch):
    x, labels = clouds(300, 0.7, seed=0)
    whole = logistic.solve(x, labels, 4, 0.01, 100)
    monkeypatch.setattr(logistic, "ROWS", 77)
    assert torch.allclose(logistic.solve(x, labels, 4, 0.01, 100), whole, atol=2e-3)


def test_colours_are_told_apart(cli, fails, labelled, colour_run, tmp_path):
    words = [f"run={colour_run}", f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", "cache=false"]
    out = tmp_path / "r.json"
    status, printed, _ = cli("logistic", *words, "holdout=0.3", f"out={out}")
    assert status == 0
    results = json.loads(out.read_text())["results"]
    assert results["top1"] > 90
    assert {row["pool"] for row in results["sweep"]} == {"cls", "mean", "cls+mean", "last4", "mean4"}
    assert "25 heads" in printed
    assert "l2=[0.0]" in fails("logistic", *words, "l2=[0]")
    assert "pools: pooled" in fails("logistic", *words, "pools=[pooled]")
    assert "give one of them" in fails("logistic", *words, "pool=cls", "pools=[mean]")
