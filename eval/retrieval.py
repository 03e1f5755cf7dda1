"""Image retrieval with frozen features: mean average precision, recall@k and precision@k by cosine similarity, exact.

    accelerate launch eval/retrieval.py run=<run> data.train=<gallery> [data.test=<queries>]

Without data.test, each image of the gallery looks for the others of its class. The same as `sslvit retrieval`;
sslvit/evaluation/retrieval.py says what each number is and where it comes from.
"""

import sys

from sslvit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["retrieval", *sys.argv[1:]]))
