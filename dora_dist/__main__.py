"""`python -m dora_dist` is `dora-dist`."""

import sys

from dora_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
