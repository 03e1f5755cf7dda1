"""Clusters of frozen features beside classes that the encoder was never told: k-means, NMI, ARI, matched accuracy.

    accelerate launch eval/cluster.py run=<run> data=<labelled images> [picture=clusters.png]

The same as `sslvit cluster`; sslvit/evaluation/cluster.py says what each number is and where it comes from.
"""

import sys

from sslvit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["cluster", *sys.argv[1:]]))
