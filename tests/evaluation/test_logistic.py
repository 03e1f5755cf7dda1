import json

import torch
import torch.nn.functional as F

from sslvit.evaluation import logistic
from tests.evaluation.test_linear import clouds


def test_each_solution_is_the_minimum():
    """The gradient of the penalised loss vanishes there, in float64; a strictly convex loss has no other such point."""
    x, labels = clouds(300, 0.7, seed=0)
    penalties = [1e-3, 0.1]
    for l2, head in zip(penalties, logistic.solve(x, labels, 4, penalties, 500), strict=True):
        found = head.double().requires_grad_()

        def value(w, l2=l2):
            return F.cross_entropy(x.double() @ w[:-1] + w[-1], labels) + l2 / 2 * w[:-1].square().sum()

        loss = value(found)
        loss.backward()
        assert found.grad.abs().max() < 3e-4
        assert (
            value(found.detach() + 0.05 * torch.randn(found.shape, generator=torch.Generator().manual_seed(0))) > loss
        )


def test_together_and_alone_are_the_same_and_parts_of_the_sum_add_up(monkeypatch):
    x, labels = clouds(300, 0.7, seed=0)
    together = logistic.solve(x, labels, 4, [0.01, 1.0], 300)
    assert torch.allclose(together[:1], logistic.solve(x, labels, 4, [0.01], 300), atol=0.02)
    monkeypatch.setattr(logistic, "ROWS", 77)
    assert torch.allclose(together, logistic.solve(x, labels, 4, [0.01, 1.0], 300), atol=0.02)


def test_colours_are_told_apart(cli, fails, labelled, colour_run, tmp_path):
    arguments = [
        f"run={colour_run}",
        f"data.train={labelled / 'train'}",
        f"data.test={labelled / 'test'}",
        "cache=false",
    ]
    out = tmp_path / "r.json"
    status, printed, _ = cli("logistic", *arguments, "holdout=0.3", f"out={out}")
    assert status == 0
    results = json.loads(out.read_text())["results"]
    assert results["top1"] > 90
    assert {row["pool"] for row in results["sweep"]} == {"cls", "mean", "cls+mean", "last4", "mean4"}
    assert "25 heads" in printed
    assert "l2=[0.0]" in fails("logistic", *arguments, "l2=[0]")
    assert "pools=pooled is not" in fails("logistic", *arguments, "pools=[pooled]")
    assert "give one of them" in fails("logistic", *arguments, "pool=cls", "pools=[mean]")
