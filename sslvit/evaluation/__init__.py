"""Measuring a frozen encoder: features once, then k-NN and linear probes. See eval/README.md for the protocols."""
