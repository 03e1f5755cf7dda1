"""Measuring a frozen encoder: features once, then k-NN and linear probes; and training it further with labels. See
eval/README.md for the protocols."""
