"""GLUE under its public name: ``spafit.glue`` is :mod:`spafit.tasks.glue`."""

import sys

from spafit.tasks import glue

sys.modules[__name__] = glue
