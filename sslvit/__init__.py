"""Self-supervised pretraining of vision transformers on unlabeled images. Start reading at `sslvit/pretrain.py`."""

__version__ = "0.1.0"
