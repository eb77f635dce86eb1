"""Download the files of one commit into huggingface_hub's cache, and check their hashes.

:func:`huggingface_hub.hf_hub_download` checks the number of bytes, not their values, and in that
cache it names a file after whatever the server says (its ETag), wherever that leads. So it
downloads into a temporary folder, and a file is moved into the cache from there, under the hash
that the hub lists, once it has that hash.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from spafit.errors import WeightsError
from spafit.files.transfers import alone_in
from spafit.weights.pins import COMMIT, INDEX_FILE, Pin, PinnedFile

# How the temporary folders begin, beside the snapshots.
_DOWNLOADING = ".spafit-"

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}


def commit_of(folder: Path) -> str | None:
    """Give the commit that a folder of huggingface_hub's cache holds; None for other folders."""
    is_snapshot = folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None


def cached_folder(repository: str, pin: Pin, names: list[str]) -> Path | None:
    """Give the pinned commit's folder if all of these files are there in full; no requests."""
    from huggingface_hub import try_to_load_from_cache

    folder = None
    for name in names:
        path = try_to_load_from_cache(repository, name, revision=pin.commit)
        if not isinstance(path, str) or Path(path).stat().st_size != pin.files[name].size:
            return None
        folder = Path(path).parent
    return folder


def found_in_cache(repository: str, revision: str, wanted: frozenset[str]) -> Path | None:
    """Give what another tool has already fetched, when the hub cannot be asked; not pinned."""
    from huggingface_hub import try_to_load_from_cache

    weights = {"model.safetensors", INDEX_FILE}
    for name in sorted(wanted & weights or wanted):
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def fetch(repository: str, pin: Pin, names: list[str], endpoint: str | None) -> Path:
    """Download files of one commit, each with the hash that is listed, into the shared cache.

    Parameters
    ----------
    repository : str
        As in ``google-bert/bert-large-cased``.
    pin : Pin
        The commit, and what is listed of it.
    names : list of str
        The files to fetch; those that are there already, with their hash, are not.
    endpoint : str or None
        The address of the hub; None takes huggingface_hub's.

    Returns
    -------
    Path
        The commit's folder in the cache.

    Raises
    ------
    WeightsError
        If a file cannot be fetched or stored, or does not have its hash.
    """
    from huggingface_hub import constants

    base = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    folder = base / "snapshots" / pin.commit
    name = ""
    try:
        missing = [name for name in names if not _is_sound(folder / name, pin.files[name])]
        if missing:
            for each in (folder, base / "blobs"):
                each.mkdir(parents=True, exist_ok=True)
            with alone_in(base):
                for left in base.glob(f"{_DOWNLOADING}*"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                for name in missing:
                    blob = base / "blobs" / pin.files[name].hash
                    # Another process may have fetched it while we waited.
                    if not _is_sound(blob, pin.files[name]):
                        _download(repository, name, pin, endpoint, blob)
                    _link(blob, folder / name)
    except OSError as error:
        raise WeightsError(
            f"cannot store {name or 'files'} of {repository}: {error}; make room, or name another "
            "place (HF_HOME)"
        ) from error
    return folder


def _download(repository: str, name: str, pin: Pin, endpoint: str | None, blob: Path) -> None:
    """Download a file, and move it into the cache if it has its hash; try twice."""
    from huggingface_hub import hf_hub_download

    listed = pin.files[name]
    with tempfile.TemporaryDirectory(prefix=_DOWNLOADING, dir=blob.parents[1]) as temporary:
        for _ in range(2):
            try:
                path = hf_hub_download(
                    repository,
                    name,
                    revision=pin.commit,
                    endpoint=endpoint,
                    local_dir=temporary,
                    force_download=True,  # else one in the cache is taken that is not sound
                )
            except Exception as error:  # as in local_folder
                if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                    raise
                raise WeightsError(
                    f"cannot get {name} of {repository} (revision {pin.commit}): {explained(error)}"
                ) from error
            found = _found(Path(path), listed)
            if found == listed:
                Path(path).replace(blob)
                return
    raise WeightsError(
        f"{name} of {repository} arrived twice with {found.size} bytes and hash {found.hash}, the "
        f"hub lists {listed.size} and {listed.hash}; it has been removed, try again later or over "
        "another network"
    )


def _link(blob: Path, place: Path) -> None:
    """Let a name in a snapshot stand for a blob, as huggingface_hub does."""
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        try:
            temporary.symlink_to(os.path.relpath(blob, place.parent))
        except OSError:  # Windows may have no links
            shutil.copyfile(blob, temporary)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _is_sound(path: Path, listed: PinnedFile) -> bool:
    return path.is_file() and _found(path, listed) == listed


def _found(path: Path, listed: PinnedFile) -> PinnedFile:
    """Measure a file in the way in which it is listed."""
    size = path.stat().st_size
    if len(listed.hash) == 64:
        digest = hashlib.sha256()
    else:  # git's name for a blob
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return PinnedFile(size, digest.hexdigest())


def is_refusal(error: Exception) -> bool:
    """Whether the hub did answer, and said no."""
    from huggingface_hub import errors

    # GatedRepoError is a RepositoryNotFoundError.
    refusals = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    )
    return isinstance(error, refusals)


def explained(error: Exception) -> str:
    """Say in one line what went wrong, and the mend."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access is restricted; accept its terms on the hub, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the model has no such revision; check the branch, tag or commit"
    if is_refusal(error):
        return (
            "there is no such folder here and no such public model on the hub; check the "
            "spelling, or run `hf auth login` if it is private"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it for the first download"
    reason = " ".join(str(error).split())[:200] or "no further words"
    return (
        f"the hub gave no good answer ({type(error).__name__}: {reason}); check the network and "
        "HF_ENDPOINT and try again, or give a folder that holds the files"
    )
