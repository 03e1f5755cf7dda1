"""Encoders and their parts: tokens in, tokens out. encoder.py wraps a timm model, factory.py makes it from a
configuration, and blocks.py runs its blocks. heads, masks and ema are for objectives.

Imports the pure helpers (rng, errors, optim, distributed), never data, objectives or evaluation.
"""
