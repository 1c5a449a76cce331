"""`python -m lohan_fx.probe`: see lohan_fx.cli.probe."""

import sys

from lohan_fx.cli.probe import main

if __name__ == "__main__":
    sys.exit(main())
