"""Check the import contracts of setup.cfg on the package in the current folder, as it is installed.

An editable install adds a finder that would show import-linter the whole repository as the package.
Only Python's own finders are left here.
"""

import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path

from importlinter.cli import lint_imports

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]
sys.exit(lint_imports(str(Path(__file__).parents[1] / "setup.cfg"), no_cache=True))
