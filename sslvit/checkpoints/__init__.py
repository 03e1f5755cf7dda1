"""Files that hold weights, written so that they are whole or not there: a run's checkpoints, its log files that go back
with them, its lock, and timm's form of a model folder.

Imports the pure helpers (distributed, errors, metrics) and model's types, never the loop, methods or evaluations.
"""
