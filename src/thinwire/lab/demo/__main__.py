"""``python -m thinwire.lab.demo``: run the demo."""

from __future__ import annotations

import sys

from thinwire.lab.demo.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
