"""Self-supervised pretraining of vision transformers on unlabeled images. Start reading at `sslvit/pretraining.py`."""

import os
import sys

from .api import Embeddings, Run, embed, evaluate, load, pretrain
from .errors import UserError

__all__ = ["Embeddings", "Run", "UserError", "embed", "evaluate", "load", "pretrain"]
__version__ = "0.1.0"

# How often a thread of libgomp, torch's library for threads on Linux, looks for work before it sleeps. Its default is
# 300,000 times, and the thread that it waits for has no CPU meanwhile. Images/s of two threads on two cores, alone, and
# beside one and two other busy processes: 207, 11, 25 by default; even 10,000 gave 202, 69, 46. 1,000 costs 1 % alone.
# It is read when torch is imported.
SPIN_COUNT = 1000
if "torch" not in sys.modules and os.environ.keys().isdisjoint({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}):
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
