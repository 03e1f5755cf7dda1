"""Encoders and their parts: tokens in, tokens out. encoder.py wraps a timm model, factory.py makes it from a
configuration; heads, masks, losses and blocks are what objectives are built of.

Imports the pure helpers (rng, errors, distributed), never data, objectives or evaluation.
"""
