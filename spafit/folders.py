"""Where spafit keeps on disk what it need not fetch or measure twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Give spafit's own cache folder: ``$SPAFIT_CACHE``, else ``~/.cache/spafit``."""
    configured = os.environ.get("SPAFIT_CACHE")
    return Path(configured or "~/.cache/spafit").expanduser()
