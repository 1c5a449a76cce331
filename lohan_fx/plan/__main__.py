"""`python -m lohan_fx.plan`."""

import gc
import sys

from lohan_fx.cli.plan import main

if __name__ == "__main__":
    # A traced graph is millions of objects that stay; looking through them for garbage costs a tenth
    # of the time.
    gc.set_threshold(50_000, 20, 50)
    sys.exit(main())
