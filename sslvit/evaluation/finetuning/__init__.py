"""Training with labels: the classifier (encoder and head), its targets, strong augmentation, the training loop.

Called by evaluation/finetune.py. Imports what evaluation may import.
"""
