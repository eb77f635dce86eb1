"""The files of one commit on the hub, in huggingface_hub's own cache, shared with other tools.

That library checks the number of bytes it received, not their values, and names a file after
whatever the server says (its ETag), wherever that leads; so a file is put into the cache here,
under the hash that the hub lists, and only once it has that hash.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from pathlib import Path

from spafit.errors import WeightsError
from spafit.files.transfers import PartFile, part_of
from spafit.weights.pins import COMMIT, INDEX_FILE, Pin, PinnedFile

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
        If a file cannot be had or stored, or does not have its hash.
    """
    from huggingface_hub import constants, file_download

    base = Path(constants.HF_HUB_CACHE) / file_download.repo_folder_name(
        repo_id=repository, repo_type="model"
    )
    folder = base / "snapshots" / pin.commit
    for name in names:
        listed, place = pin.files[name], folder / name
        try:
            if place.is_file() and _found(place, listed) == listed:
                continue
            blob = base / "blobs" / listed.hash
            for each in (blob, place):
                each.parent.mkdir(parents=True, exist_ok=True)
            with part_of(blob, listed.size) as part:
                # Another process may have fetched it while we waited.
                if not (blob.is_file() and _found(blob, listed) == listed):
                    _download(repository, name, pin, endpoint, part)
                    part.move_to(blob)
            _link(blob, place)
        except OSError as error:
            raise WeightsError(
                f"cannot store {name} of {repository}: {error}; make room, or name another place "
                "(HF_HOME)"
            ) from error
    return folder


def _download(repository: str, name: str, pin: Pin, endpoint: str | None, part: PartFile) -> None:
    """Fill a part with the whole file; it is emptied where that fails."""
    from huggingface_hub import file_download, hf_hub_url, utils

    listed = pin.files[name]
    for _ in range(2):
        try:
            file_download.http_get(
                hf_hub_url(repository, name, revision=pin.commit, endpoint=endpoint),
                part,
                resume_size=part.seek(0, os.SEEK_END),
                headers=utils.build_hf_headers(),  # type: ignore[attr-defined]
                expected_size=listed.size,
            )
        except Exception as error:  # as in local_folder
            part.restart()
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise
            raise WeightsError(
                f"cannot get {name} of {repository} (revision {pin.commit}): {explained(error)}"
            ) from error
        found = _found(part.path, listed)
        if found == listed:
            return
        part.restart()
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
