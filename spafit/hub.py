"""From the name of a model to a folder on this machine, over the network at most once.

The first call for a hub name asks the hub which commit the name stands for, downloads the few files
that spafit reads, holds each against the hash that the hub lists for it, and writes the commit and
the list into ``pins.json``. Every later call takes the same commit from the local cache without any
request, whatever has been pushed to the hub since.

The files themselves lie in huggingface_hub's own cache, shared with other tools. That library
checks the number of bytes it received, not their values, and names a file after whatever the server
says (its ETag), wherever that leads; so a file is put into the cache here, under the hash that the
hub lists, and only once it has that hash. What nobody can know is whether the hub itself lists the
hash of what its authors meant, and whether a file was altered on this disk afterwards.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spafit.errors import WeightsError
from spafit.folders import cache_folder, replacing
from spafit.transfers import PartFile, alone_in, part_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""What a tokenizer is read from; those that the repository has are fetched."""

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILES = ("config.json", "model.safetensors", INDEX_FILE)
"""What a model is read from, and with the index its parts. Never a ``.bin``, never a pickle."""

MODEL_FILES = WEIGHT_FILES + TOKENIZER_FILES
"""What :func:`local_folder` fetches unless told otherwise."""

TIMEOUT_S = 30.0
"""How long the hub may take to answer the question which commit a name stands for."""

_HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_REVISION = re.compile(r"\w[\w./-]*")
_PART = re.compile(r"model-[\w.-]+\.safetensors")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class PinnedFile:
    """One file of a pinned commit, as the hub lists it.

    Attributes
    ----------
    size : int
        Bytes.
    hash : str
        64 hexadecimal digits: the SHA-256 of a large file. 40: the SHA-1 that git gives a small
        one.
    """

    size: int
    hash: str


@dataclass(frozen=True)
class Pin:
    """What a hub name stands for on this machine.

    Attributes
    ----------
    commit : str
        The 40 hexadecimal digits of the commit.
    files : dict of str to PinnedFile
        The files of that commit that spafit may read.
    """

    commit: str
    files: dict[str, PinnedFile]


def local_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    files: Iterable[str] = MODEL_FILES,
    refresh: bool = False,
    endpoint: str | None = None,
) -> Path:
    """Give the local folder of a model, downloading it the first time.

    Parameters
    ----------
    name_or_path : str or Path
        An existing folder, which is given back as it is, or the name of a model on the hub,
        ``owner/name`` or ``owner/name@revision``.
    revision : str, optional
        A branch, tag or commit of the hub name; None takes the one after ``@``, else ``main``. Each
        revision is pinned for itself.
    files : iterable of str
        The names of the files that are needed (:data:`MODEL_FILES`, :data:`TOKENIZER_FILES`); those
        that the repository does not have are left out.
    refresh : bool
        Ask the hub again which commit the revision stands for, and pin that one.
    endpoint : str, optional
        The address of the hub; None takes huggingface_hub's, which ``HF_ENDPOINT`` sets.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    WeightsError
        If the name is neither a folder nor a hub name, the hub cannot be reached, does not know the
        name or revision, does not give access or stops sending, the repository has no safetensors,
        a file does not have the hash that the hub lists, or ``pins.json`` cannot be used.
    """
    folder = _expanded(name_or_path)
    if folder.is_dir():
        if revision is not None:
            raise WeightsError(
                f"{folder} is a folder, which has no revision {revision!r}; leave the revision out"
            )
        return folder
    repository, revision = _parse(name_or_path, revision)
    key = f"{repository}@{revision}"
    wanted = frozenset(files)
    pin = None if refresh else _read_pins().get(key)
    if pin is not None:
        cached = _cached_folder(repository, pin, wanted)
        if cached is not None:
            return cached
    # The pinned commit again, where a file has gone or was not wanted before.
    asked = revision if pin is None else pin.commit
    try:
        listed = _ask_hub(repository, asked, endpoint)
    except Exception as error:  # the HTTP library behind it differs from version to version
        cached = (
            None if refresh or _is_refusal(error) else _found_in_cache(repository, asked, wanted)
        )
        if cached is not None:
            return cached
        raise WeightsError(
            f"cannot get {repository} (revision {asked}): {_explained(error)}"
        ) from error
    chosen = _choose(listed, wanted)
    if not chosen:
        raise WeightsError(_nothing_to_read(repository, listed, wanted))
    folder = _fetch(repository, listed, chosen, endpoint)
    known = {name: file for name, file in listed.files.items() if _may_be_read(name)}
    _write_pin(key, Pin(listed.commit, known))
    return folder


def pinned_revision(name: str | Path, revision: str | None = None) -> str | None:
    """Give the commit that a hub name is pinned to on this machine, without asking the hub.

    Parameters
    ----------
    name : str or Path
        As for :func:`local_folder`.
    revision : str, optional
        As for :func:`local_folder`.

    Returns
    -------
    str or None
        40 hexadecimal digits; None for a folder, and for a name that was not fetched yet.

    Raises
    ------
    WeightsError
        If the name is neither a folder nor a hub name, or ``pins.json`` cannot be used.
    """
    if _expanded(name).is_dir():
        return None
    repository, revision = _parse(name, revision)
    pin = _read_pins().get(f"{repository}@{revision}")
    return None if pin is None else pin.commit


def commit_of(folder: Path) -> str | None:
    """Give the commit that a folder of huggingface_hub's cache holds; None for other folders."""
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None


def _expanded(name_or_path: str | Path) -> Path:
    try:
        return Path(name_or_path).expanduser()
    except RuntimeError:
        raise WeightsError(
            f"{name_or_path!s:.200} begins with ~ and no user's name; write the folder out"
        ) from None


def _parse(name_or_path: str | Path, revision: str | None) -> tuple[str, str]:
    """Split a hub name into repository and revision."""
    match = _HUB_NAME.fullmatch(str(name_or_path))
    if match is None or Path(name_or_path).exists():
        raise WeightsError(
            f"{name_or_path} is neither an existing folder nor a hub name; give the folder that "
            "holds config.json and model.safetensors, or owner/name, as in "
            "google-bert/bert-large-cased"
        )
    named = match["revision"]
    asked = revision or named or "main"
    if not _REVISION.fullmatch(asked) or ".." in asked:
        raise WeightsError(
            f"{asked!r:.200} is no revision; give a branch, a tag or a commit, such as main"
        )
    if revision is not None and named is not None and revision != named:
        raise WeightsError(
            f"{name_or_path} asks for revision {named!r} and the caller for {revision!r}; give one"
        )
    return match["repository"], asked


def _ask_hub(repository: str, revision: str, endpoint: str | None) -> Pin:
    """Ask which commit a revision stands for, and which files it has: one request."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=endpoint).model_info(
        repository, revision=revision, files_metadata=True, timeout=TIMEOUT_S
    )
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise ValueError(f"the hub gave {info.sha!r:.80} for a commit")
    files = {}
    for file in info.siblings or []:
        content_hash = str(file.blob_id if file.lfs is None else file.lfs.sha256)
        # The hash becomes the name of a file.
        if type(file.size) is not int or not _HASH.fullmatch(content_hash):
            raise ValueError(
                f"the hub lists {file.rfilename!r:.80} with the size {file.size!r:.40} and the "
                f"hash {content_hash!r:.80}"
            )
        files[file.rfilename] = PinnedFile(file.size, content_hash)
    return Pin(info.sha, files)


def _is_refusal(error: Exception) -> bool:
    """Whether the hub did answer, and said no."""
    from huggingface_hub import errors

    # GatedRepoError is a RepositoryNotFoundError.
    refusals = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    )
    return isinstance(error, refusals)


def _explained(error: Exception) -> str:
    """Say in one line what went wrong, and the mend."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access is restricted; accept its terms on the hub, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the model has no such revision; check the branch, tag or commit"
    if _is_refusal(error):
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


def _may_be_read(name: str) -> bool:
    """Whether spafit ever reads a file of this name: nothing in folders, nothing but data."""
    return name in MODEL_FILES or _PART.fullmatch(name) is not None


def _choose(pin: Pin, wanted: frozenset[str]) -> list[str]:
    """Name the wanted files that the commit has; with an index, its parts too.

    Empty where weights are wanted and there are none.
    """
    chosen = [name for name in sorted(wanted) if name in pin.files]
    if "model.safetensors" in wanted:
        if "model.safetensors" in pin.files:
            # An index beside the single file is of no use, and would cast doubt on it.
            chosen = [name for name in chosen if name != INDEX_FILE]
        elif INDEX_FILE in chosen:
            chosen += sorted(name for name in pin.files if _PART.fullmatch(name))
        else:
            return []
    return chosen


def _nothing_to_read(repository: str, pin: Pin, wanted: frozenset[str]) -> str:
    if "model.safetensors" not in wanted:
        return f"{repository} has none of {', '.join(sorted(wanted))} at commit {pin.commit}"
    pickles = sorted(name for name in pin.files if name.endswith(".bin"))
    if not pickles:
        return f"{repository} has no model.safetensors at commit {pin.commit}; is it a BERT model?"
    return (
        f"{repository} has no model.safetensors at commit {pin.commit}, only {', '.join(pickles)}, "
        "a pickle, which is never loaded; fetch it yourself and turn it into safetensors with "
        "`python -m weights_tools convert`, if you trust its author"
    )


def _cached_folder(repository: str, pin: Pin, wanted: frozenset[str]) -> Path | None:
    """Give the pinned commit's folder if all chosen files are there in full; no requests."""
    from huggingface_hub import try_to_load_from_cache

    folder = None
    for name in _choose(pin, wanted):
        path = try_to_load_from_cache(repository, name, revision=pin.commit)
        if not isinstance(path, str) or Path(path).stat().st_size != pin.files[name].size:
            return None
        folder = Path(path).parent
    return folder


def _found_in_cache(repository: str, revision: str, wanted: frozenset[str]) -> Path | None:
    """Give what another tool has already fetched, when the hub cannot be asked; not pinned."""
    from huggingface_hub import try_to_load_from_cache

    weights = {"model.safetensors", INDEX_FILE}
    for name in sorted(wanted & weights or wanted):
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _fetch(repository: str, pin: Pin, names: list[str], endpoint: str | None) -> Path:
    """Download files of one commit, each with the hash that is listed, into the shared cache."""
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
                f"cannot get {name} of {repository} (revision {pin.commit}): {_explained(error)}"
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


def _read_pins() -> dict[str, Pin]:
    path = cache_folder() / "pins.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: _pin_from_json(entry) for key, entry in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path}, which says which commits are pinned, cannot be used ({error}); delete it, "
            "and the hub is asked again"
        ) from None


def _pin_from_json(entry: dict[str, Any]) -> Pin:
    files = {
        name: PinnedFile(int(file["size"]), str(file["hash"]))
        for name, file in entry["files"].items()
    }
    if not _COMMIT.fullmatch(entry["commit"]) or not all(map(_may_be_read, files)):
        raise ValueError("an entry is not a commit with plain file names")
    return Pin(entry["commit"], files)


def _write_pin(key: str, pin: Pin) -> None:
    path = cache_folder() / "pins.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{path.parent} cannot be made: {error}; set SPAFIT_CACHE") from None
    with alone_in(path.parent), replacing(path) as temporary:
        pins = {**_read_pins(), key: pin}
        content = {name: asdict(pins[name]) for name in sorted(pins)}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
