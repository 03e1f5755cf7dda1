"""Semantic segmentation by a linear classifier of frozen patch features: mean IoU and pixel accuracy.

    accelerate launch eval/segment.py run=<run> data.train=<folder> data.test=<folder>

Each folder holds images/ and masks/. The same as `sslvit segment`; sslvit/evaluation/segment.py has the protocol.
"""

import sys

from sslvit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["segment", *sys.argv[1:]]))
