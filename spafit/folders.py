"""Where spafit keeps what it need not fetch or measure twice, and how a file is replaced."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from spafit.errors import WeightsError


def cache_folder() -> Path:
    """Give spafit's own cache folder: ``$SPAFIT_CACHE``, else ``~/.cache/spafit``."""
    configured = os.environ.get("SPAFIT_CACHE")
    return Path(configured or "~/.cache/spafit").expanduser()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to, and move it there once that has gone well.

    The file gets the mode that the user's umask asks for. (The safetensors library gives 0600.)

    Parameters
    ----------
    path : str or Path
        The file to be; its folder must exist.

    Raises
    ------
    WeightsError
        If the folder cannot be written to.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        try:
            with temporary.open("xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield temporary
            temporary.chmod(mode)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"{target} cannot be written: {error.strerror or error}") from error
