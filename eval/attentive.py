"""Attentive probe: a learned query gathers frozen patch tokens, and a linear classifier reads the result.

    accelerate launch eval/attentive.py run=<run> data.train=<labelled images> data.test=<labelled images>

The same as `sslvit attentive`; `--help` lists the keys.
"""

import sys

from sslvit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["attentive", *sys.argv[1:]]))
