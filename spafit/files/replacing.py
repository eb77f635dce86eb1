"""Replace a file atomically, and find spafit's cache folder."""

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
    """Return spafit's cache folder: ``$SPAFIT_CACHE``, else ``~/.cache/spafit``.

    Raises
    ------
    ConfigError
        If ``$SPAFIT_CACHE`` begins with ``~`` and a name that is not a user of this machine.
    """
    configured = os.environ.get("SPAFIT_CACHE") or "~/.cache/spafit"
    try:
        return Path(configured).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"SPAFIT_CACHE is {configured!r:.200}, and there is no such user; give the full path"
        ) from None


_MOST_PARTS = 256


@contextlib.contextmanager
def replacing(path: str | Path, error: type[SpafitError] | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block raises nothing.

    The file gets the mode that the umask gives. (The safetensors library gives 0600.)

    Parameters
    ----------
    path : str or Path
        The file to write; its folder must exist.
    error : type of SpafitError, optional
        Raised from an OSError in its place, with the path and the reason.

    Raises
    ------
    OSError
        If the folder or the file cannot be written to, or the path is not a regular file's.
    """
    if "\0" in str(path):
        raise (error or ConfigError)(
            f"{str(path)!r:.200} cannot be written: no file has such a name"
        )
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
                temporary.chmod(mode)  # after opening it, because the mode may be read-only
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
    """Raise an error if a file or folder could not be written at a path; create nothing.

    Parameters
    ----------
    path : Path
        A file in an existing folder, or a folder.
    is_folder : bool
        Whether it is a folder; it would be created with its missing parents.

    Raises
    ------
    ConfigError
        If nothing can be written there.
    """
    # A file is written to the target of a link; a dangling link cannot become a folder.
    place = path.absolute() if is_folder else Path(os.path.realpath(path))
    there = place if is_folder else place.parent
    try:
        if not is_folder and place.is_symlink():  # one that leads to itself
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if not is_folder and place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not is_folder and place.exists() and not place.is_file():
            # A file would replace it: /dev/null would become a regular file.
            raise OSError(errno.EINVAL, "it is a pipe or a device")
        if not is_folder and len(os.fsencode(place.name)) > 200:  # its temporary name is longer
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if len(place.parts) > _MOST_PARTS:  # Python would make each within the call for the next
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        while is_folder and not _is_there(there):
            there = there.parent
        if not stat.S_ISDIR(there.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=there):  # permission bits alone do not tell
            pass
    except OSError as error:
        kind = "a folder" if is_folder else "a file in a folder that exists"
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name {kind}") from None


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True
