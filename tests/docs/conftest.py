"""What the build of the documentation imports is found by its tests, too."""

import sys

from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "docs" / "_ext"))
