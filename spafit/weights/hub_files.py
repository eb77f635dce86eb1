"""Download the files of one commit into huggingface_hub's cache, and check their hashes.

:func:`huggingface_hub.hf_hub_download` checks a file's size but not its hash, and in its cache it
uses the server's ETag as the file name, even one that leads elsewhere. So we let it download into a
temporary folder, and move a file into the cache, under the hash that the hub lists, only once its
content has that hash.
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

# The prefix of the temporary folders beside the snapshots.
_DOWNLOADING = ".spafit-"

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}


def commit_of(folder: Path) -> str | None:
    """Return the commit that a folder of huggingface_hub's cache holds; None for other folders."""
    is_snapshot = folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None


def cached_folder(repository: str, pin: Pin, names: list[str]) -> Path | None:
    """Return the pinned commit's folder if it has all of these files; makes no requests."""
    from huggingface_hub import try_to_load_from_cache

    folder = None
    for name in names:
        path = try_to_load_from_cache(repository, name, revision=pin.commit)
        if not isinstance(path, str) or Path(path).stat().st_size != pin.files[name].size:
            return None
        folder = Path(path).parent
    return folder


def found_in_cache(repository: str, revision: str, wanted: frozenset[str]) -> Path | None:
    """Return a folder that another tool downloaded, for when the hub is unreachable; not pinned."""
    from huggingface_hub import try_to_load_from_cache

    weights = {"model.safetensors", INDEX_FILE}
    for name in sorted(wanted & weights or wanted):
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def fetch(repository: str, pin: Pin, names: list[str], endpoint: str | None) -> Path:
    """Download files of one commit into the shared cache, and check each one's listed hash.

    Parameters
    ----------
    repository : str
        As in ``google-bert/bert-large-cased``.
    pin : Pin
        The commit and its listed files.
    names : list of str
        The files to fetch; those that are in the cache already with the right hash are skipped.
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
                for left in base.glob(f"{_DOWNLOADING}*"):  # from a process that was killed
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
                    force_download=True,  # else a damaged one in the cache is used
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
    """Link a name in a snapshot to a blob, as huggingface_hub does."""
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        try:
            temporary.symlink_to(os.path.relpath(blob, place.parent))
        except OSError:  # Windows may not allow links
            shutil.copyfile(blob, temporary)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _is_sound(path: Path, listed: PinnedFile) -> bool:
    return path.is_file() and _found(path, listed) == listed


def _found(path: Path, listed: PinnedFile) -> PinnedFile:
    """Return a file's size and its hash, of the same kind as the listed one."""
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
    """Return whether the hub answered and refused, so that the cache must not stand in."""
    from huggingface_hub import errors

    # GatedRepoError is a subclass of RepositoryNotFoundError.
    refusals = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    )
    return isinstance(error, refusals)


def explained(error: Exception) -> str:
    """Return one line that says what went wrong and what to do."""
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
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"the hub gives no access (status {status}); run `hf auth login` with a token for it, "
            "or get the files by other means"
        )
    reason = " ".join(str(error).split())[:200] or "no message"
    return (
        f"the hub gave no usable answer ({type(error).__name__}: {reason}); check the network and "
        "HF_ENDPOINT and try again, or give a folder that holds the files"
    )
