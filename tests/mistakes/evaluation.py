"""Mistakes in k-NN, probes, fine-tuning, the other evaluations and export."""

from . import Mistake

EVALUATION: list[Mistake] = []
