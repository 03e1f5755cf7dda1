"""A picture of where an encoder looks: attention of the last block, and its patch features as colours.

    accelerate launch eval/attention.py run=<run> data=<images> picture=attention.png

The same as `sslvit attention`; sslvit/evaluation/attention.py says what each column of the picture is.
"""

import sys

from sslvit.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["attention", *sys.argv[1:]]))
