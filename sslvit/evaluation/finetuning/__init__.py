"""The parts of fine-tuning: recipes, classifier (encoder and head), targets, strong augmentation, the training loop.

evaluation/finetune.py puts them together. They may import what evaluations import. Only evaluations import them.
"""
