"""`python -m metaembed_pl`."""

import sys

from metaembed_pl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
