"""`python -m lohan_fx.view`."""

import sys

from lohan_fx.cli.view import main

if __name__ == "__main__":
    sys.exit(main())
