"""Weighted k-NN classification with frozen features, by faiss, all k and temperatures from one search.

    accelerate launch eval/knn.py run=<run> data.train=<labelled images> data.test=<labelled images>

Protocol (Wu et al., CVPR 2018; DINO, section 4.1): each image passes the frozen encoder once, without augmentation,
resized and centred as the encoder was published (images that already have its size are taken as they are). Features
have unit length; the k most similar training images vote with exp(cosine / T). The same as `sslvit knn`; `--help`
lists keys.
"""

import sys

from sslvit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["knn", *sys.argv[1:]]))
