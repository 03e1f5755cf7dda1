"""Linear probe of frozen features: a sweep of learning rates, chosen on a held-out part of the training images.

    accelerate launch eval/linear.py run=<run> data.train=<labelled images> data.test=<labelled images>

Protocol: each image passes the frozen encoder once, without augmentation. Features are standardised by the training
set's mean and deviation (as the BatchNorm without affine parameters of MAE's protocol does). One linear classifier
for each learning rate is trained by SGD for 100 epochs; the best on a held-out tenth of the training images is
trained again on all of them and sees the test images once. The same as `sslvit linear`; `--help` lists the keys.
"""

import sys

from sslvit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["linear", *sys.argv[1:]]))
