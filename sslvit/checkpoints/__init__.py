"""Files that are whole or not there: a run's checkpoints, its log files that go back with them, its lock, timm's form
of a model folder, and the text files that runs and evaluations write (textfile). Weights that exist elsewhere (named).

Imports the pure helpers (distributed, errors, metrics) and model, never the loop, methods or evaluations.
"""
