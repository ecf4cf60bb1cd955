"""``python -m thinwire.bench``."""

from __future__ import annotations

import sys

from thinwire.bench.cli import app
from thinwire.errors import ThinwireError

if __name__ == "__main__":
    try:
        app()
    except ThinwireError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
