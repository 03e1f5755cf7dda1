"""The linear probe of frozen features on corrupted test images and under attack (FGSM, PGD).

    accelerate launch eval/robustness.py run=<run> data.train=<labelled images> data.test=<labelled images>

The classifier is that of `sslvit linear`, trained on clean images. The same as `sslvit robustness`;
sslvit/evaluation/robustness.py and corruptions.py have the formulas and where they come from.
"""

import sys

from sslvit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["robustness", *sys.argv[1:]]))
