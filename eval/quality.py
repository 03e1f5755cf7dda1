"""How well a representation spreads and holds together, without labels: RankMe, alpha-ReQ, LiDAR, uniformity and more.

    accelerate launch eval/quality.py run=<run> data=<images, labelled or not>

The same as `sslvit quality`; sslvit/evaluation/quality.py says what each number is and where it comes from.
"""

import sys

from sslvit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["quality", *sys.argv[1:]]))
