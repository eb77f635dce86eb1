"""Replace a file as a whole or not at all, and find spafit's cache folder."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from spafit.errors import ConfigError, SpafitError
from spafit.files.durable import sync_folder


def cache_folder() -> Path:
    """Give spafit's own cache folder: ``$SPAFIT_CACHE``, else ``~/.cache/spafit``.

    Raises
    ------
    ConfigError
        If ``$SPAFIT_CACHE`` begins with ``~`` and the name of no user of this machine.
    """
    configured = os.environ.get("SPAFIT_CACHE") or "~/.cache/spafit"
    try:
        return Path(configured).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"SPAFIT_CACHE is {configured!r:.200}, and there is no such user; write the folder out"
        ) from None


@contextlib.contextmanager
def replacing(path: str | Path, error: type[SpafitError] | None = None) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to, and move it there once that has gone well.

    The file gets the mode that the user's umask asks for. (The safetensors library gives 0600.)

    Parameters
    ----------
    path : str or Path
        The file to be; its folder must exist.
    error : type of SpafitError, optional
        What to raise instead of an OSError, with the path and the reason; it is raised from it.

    Raises
    ------
    OSError
        If the folder or the file cannot be written to, or something is there that is no file.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        if target.is_symlink() or (target.exists() and not target.is_file()):
            what = "it is a folder, a pipe, a device or a link to itself; name a file"
            raise OSError(errno.EINVAL, what, str(path))
        try:
            with temporary.open("xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield temporary
            with temporary.open("r+b") as file:  # Windows syncs only what could be written to
                temporary.chmod(mode)  # once it is open: the mode may be a read-only one
                os.fsync(file.fileno())
            temporary.replace(target)
            sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as cause:
        if error is None:
            raise
        raise error(f"{path} cannot be written: {cause.strerror or cause}") from cause


def refuse_place(path: Path, *, is_folder: bool = False) -> None:
    """Raise an error if a file or folder could not be written here; create nothing.

    Parameters
    ----------
    path : Path
        A file to be, in a folder that is there; or a folder to be.
    is_folder : bool
        Whether it is a folder, which is made with all that is missing above it.

    Raises
    ------
    ConfigError
        If nothing can be written there.
    """
    # A file is written where a link leads; a link to nothing cannot become a folder.
    place = path.absolute() if is_folder else Path(os.path.realpath(path))
    there = place if is_folder else place.parent
    try:
        if not is_folder and place.is_symlink():  # one that leads to itself
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if not is_folder and place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not is_folder and place.exists() and not place.is_file():
            # It would be replaced by a file: /dev/null would no longer be what it is.
            raise OSError(errno.EINVAL, "it is a pipe or a device")
        if not is_folder and len(os.fsencode(place.name)) > 200:  # it gets a longer name at first
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        while is_folder and not _is_there(there):
            there = there.parent
        if not stat.S_ISDIR(there.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=there):  # permissions alone say too little
            pass
    except OSError as error:
        kind = "a folder" if is_folder else "a file in a folder that is there"
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name {kind}") from None


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True
