"""Self-supervised pretraining of vision transformers on unlabeled images. Start reading at `sslvit/pretraining.py`."""

from .api import Embeddings, Run, embed, evaluate, load, pretrain
from .errors import UserError

__all__ = ["Embeddings", "Run", "UserError", "embed", "evaluate", "load", "pretrain"]
__version__ = "0.1.0"
