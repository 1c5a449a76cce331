"""`python -m lohan_fx.plan`."""

import sys

from lohan_fx.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
