"""`python -m smolseek` is the command `smolseek`."""

import sys

from smolseek.cli import main

if __name__ == "__main__":
    sys.exit(main())
