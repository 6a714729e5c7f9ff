"""``python -m lightning_slt``, which is ``lightning-slt``."""

import sys

from lightning_slt.cli import main

if __name__ == "__main__":
    sys.exit(main())
