"""What the build of the documentation imports is found by its tests, too."""

import importlib.util
import sys

from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "docs" / "_ext"))

# Sphinx comes with the extra docs.
collect_ignore_glob = [] if importlib.util.find_spec("sphinx") else ["*"]
