"""Download a model from the hub once, and return the local folder with its files.

The first call for a hub name asks the hub for the name's commit, downloads the few files that
spafit reads, compares each with the hash that the hub lists, and records the commit and the list
in ``pins.json``. Every later call takes the same commit from the local cache without a request,
even if the hub has a newer one.

Two things are not checked: whether the files on the hub are those that the authors intended, and
whether a file was changed on this disk afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from spafit.errors import WeightsError
from spafit.weights import minilm
from spafit.weights.hub_files import cached_folder, explained, fetch, found_in_cache, is_refusal
from spafit.weights.pins import (
    COMMIT,
    HASH,
    INDEX_FILE,
    MODEL_FILES,
    PART,
    Pin,
    PinnedFile,
    may_be_read,
    read_pins,
    write_pin,
)

TIMEOUT_S = 30.0
"""How long to wait for the hub's answer when it is asked for a name's commit."""

_HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_REVISION = re.compile(r"\w[\w./-]*")


def local_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    files: Iterable[str] = MODEL_FILES,
    refresh: bool = False,
    endpoint: str | None = None,
) -> Path:
    """Return the local folder of a model, downloading it the first time.

    Parameters
    ----------
    name_or_path : str or Path
        An existing folder, which is returned as it is; ``minilm``, the weights of an installed
        package (:mod:`spafit.weights.minilm`); or the name of a model on the hub, ``owner/name`` or
        ``owner/name@revision``.
    revision : str, optional
        A branch, tag or commit of the hub name; None takes the one after ``@``, else ``main``. Each
        revision is pinned separately.
    files : iterable of str
        The names of the files that are needed (:data:`~spafit.weights.pins.MODEL_FILES`,
        :data:`~spafit.weights.pins.TOKENIZER_FILES`); those that the repository does not have are
        left out.
    refresh : bool
        Ask the hub again for the revision's commit, and pin that one.
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
    folder = _place(name_or_path)
    if _is_folder(folder):
        if revision is not None:
            raise WeightsError(
                f"{folder} is a folder, which has no revision {revision!r}; leave the revision out"
            )
        return folder
    repository, revision = _parse(name_or_path, revision)
    key = f"{repository}@{revision}"
    wanted = frozenset(files)
    pin = None if refresh else read_pins().get(key)
    cached = None if pin is None else cached_folder(repository, pin, _choose(pin, wanted))
    if cached is not None and pin is not None and wanted <= {*pin.asked}:
        return cached
    # With a pin: a file of its commit was deleted, or was not needed or not looked for before.
    asked = revision if pin is None else pin.commit
    try:
        listed = _ask_hub(repository, asked, endpoint)
    except Exception as error:  # the HTTP library behind it differs from version to version
        if cached is None and not refresh and not is_refusal(error):
            cached = found_in_cache(repository, asked, wanted)
        if cached is not None:
            return cached
        raise WeightsError(
            f"cannot get {repository} (revision {asked}): {explained(error)}"
        ) from error
    chosen = _choose(listed, wanted)
    if not chosen:
        raise WeightsError(_nothing_to_read(repository, listed, wanted))
    folder = fetch(repository, listed, chosen, endpoint)
    known = {name: file for name, file in listed.files.items() if may_be_read(name)}
    write_pin(key, Pin(listed.commit, known))
    return folder


def fetch_today(name: str, files: Sequence[str], *, endpoint: str | None = None) -> Path:
    """Download some files of a repository of the hub, as it is today; nothing is pinned.

    Parameters
    ----------
    name : str
        ``owner/name``, or ``owner/name@revision``.
    files : sequence of str
        The names of the files, plain ones, all of which it must have.
    endpoint : str, optional
        As for :func:`local_folder`.

    Returns
    -------
    Path
        The folder with the files, called by their commit.

    Raises
    ------
    WeightsError
        As :func:`local_folder`; also if the repository lacks one of the files.
    """
    repository, revision = _parse(name, None)
    try:
        listed = _ask_hub(repository, revision, endpoint)
    except Exception as error:  # as in local_folder
        raise WeightsError(
            f"cannot get {repository} (revision {revision}): {explained(error)}"
        ) from error
    if missing := [each for each in files if each not in listed.files]:
        raise WeightsError(
            f"{repository} has no {' and no '.join(missing)} at commit {listed.commit}; is it what "
            "you want?"
        )
    return fetch(repository, listed, [*files], endpoint)


def pinned_revision(name: str | Path, revision: str | None = None) -> str | None:
    """Return the commit that a hub name is pinned to on this machine, without asking the hub.

    Parameters
    ----------
    name : str or Path
        As for :func:`local_folder`.
    revision : str, optional
        As for :func:`local_folder`.

    Returns
    -------
    str or None
        40 hexadecimal digits; None for a folder, for ``minilm``, and for a name that was not
        downloaded yet.

    Raises
    ------
    WeightsError
        If the name is neither a folder nor a hub name, or ``pins.json`` cannot be used.
    """
    if _is_folder(_place(name)):
        return None
    repository, revision = _parse(name, revision)
    pin = read_pins().get(f"{repository}@{revision}")
    return None if pin is None else pin.commit


def _place(name_or_path: str | Path) -> Path:
    """Return the folder that is named, which need not exist; ``minilm`` is its package's."""
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError:
        path = Path(name_or_path)
        if not _is_folder(path):
            raise WeightsError(
                f"{name_or_path!s:.200} begins with ~ and an unknown user's name; give the full "
                "path"
            ) from None
    return minilm.minilm_folder() if name_or_path == minilm.NAME and not path.is_dir() else path


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # too long a name, for example
        return False


def _parse(name_or_path: str | Path, revision: str | None) -> tuple[str, str]:
    """Split a hub name into repository and revision."""
    match = _HUB_NAME.fullmatch(str(name_or_path))
    if match is None or Path(name_or_path).exists():
        raise WeightsError(
            f"{name_or_path} is neither an existing folder nor a hub name; give the folder that "
            "holds config.json and model.safetensors, or owner/name, as in "
            "google-bert/bert-large-cased, or minilm"
        )
    named = match["revision"]
    asked = revision or named or "main"
    if not _REVISION.fullmatch(asked) or ".." in asked:
        raise WeightsError(
            f"{asked!r:.200} is not a revision; give a branch, a tag or a commit, such as main"
        )
    if revision is not None and named is not None and revision != named:
        raise WeightsError(
            f"{name_or_path} asks for revision {named!r} and the caller for {revision!r}; give one"
        )
    return match["repository"], asked


def _ask_hub(repository: str, revision: str, endpoint: str | None) -> Pin:
    """Ask the hub for a revision's commit and its list of files, in one request."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=endpoint).model_info(
        repository, revision=revision, files_metadata=True, timeout=TIMEOUT_S
    )
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise ValueError(f"the hub gave {info.sha!r:.80} as a commit")
    files = {}
    for file in info.siblings or []:
        content_hash = str(file.blob_id if file.lfs is None else file.lfs.sha256)
        # The hash becomes a file name, so it must be a plain one.
        if type(file.size) is not int or not HASH.fullmatch(content_hash):
            raise ValueError(
                f"the hub lists {file.rfilename!r:.80} with the size {file.size!r:.40} and the "
                f"hash {content_hash!r:.80}"
            )
        files[file.rfilename] = PinnedFile(file.size, content_hash)
    return Pin(info.sha, files)


def _choose(pin: Pin, wanted: frozenset[str]) -> list[str]:
    """Return the names of the wanted files that the commit has, and the parts of an index.

    Empty if weights are wanted and the commit has none.
    """
    chosen = [name for name in sorted(wanted) if name in pin.files]
    if "model.safetensors" in wanted:
        if "model.safetensors" in pin.files:
            # An index beside the single file is not needed, and would make the choice ambiguous.
            chosen = [name for name in chosen if name != INDEX_FILE]
        elif INDEX_FILE in chosen:
            chosen += sorted(name for name in pin.files if PART.fullmatch(name))
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
