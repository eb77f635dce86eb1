"""What the build of the documentation imports is found by its tests, too."""

import sys

import pytest
from support import REPOSITORY

pytest.importorskip("sphinx", reason="Sphinx comes with the extra docs")
sys.path.insert(0, str(REPOSITORY / "docs" / "_ext"))
