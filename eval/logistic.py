"""Logistic regression on frozen features by L-BFGS; penalty and pooling chosen on held-out training images.

    accelerate launch eval/logistic.py run=<run> data.train=<labelled images> data.test=<labelled images>

The same as `sslvit logistic`; `--help` lists the keys.
"""

import sys

from sslvit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["logistic", *sys.argv[1:]]))
