"""python -m spafit."""

import sys

from spafit.cli import main

sys.exit(main())
