"""python -m spafit."""

import sys

from spafit.cli.parser import main

sys.exit(main())
