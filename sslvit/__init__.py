"""Self-supervised pretraining of vision transformers on unlabeled images. Start reading at `sslvit/pretraining.py`."""

import os
import sys

from .api import Embeddings, Run, embed, evaluate, load, pretrain
from .errors import UserError

__all__ = ["Embeddings", "Run", "UserError", "embed", "evaluate", "load", "pretrain"]
__version__ = "0.1.0"

# How often a thread of libgomp, torch's library for threads on Linux, looks for work before it sleeps. Its default is
# 300,000 times, and the thread that it waits for has no CPU meanwhile. Two threads on two cores then trained on 207
# images/s alone, 11 beside one busy process and 25 beside two. With 10,000 times it was 202, 69 and 46. 1,000 times is
# better still, and costs 1 % when the machine is quiet.
# It is read when torch is imported.
SPIN_COUNT = 1000
if "torch" not in sys.modules and os.environ.keys().isdisjoint({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}):
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
