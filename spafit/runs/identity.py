"""Check that the run in a folder is the one asked for, so that it may be resumed or used.

Task, method, seed, base, tokenizer, data, and every setting that the steps depend on must be equal:
otherwise the record would be wrong. Settings that change no step already done, such as the number
of epochs, may differ (:data:`FREE`); the difference is recorded. To evaluate or predict, what is
loaded must be what the run was trained with.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from spafit.errors import CheckpointError, ConfigError

FREE = frozenset(
    "out epochs accumulation eval_every save_every keep_checkpoints cache_prefix cache_limit_gib "
    "recompute frozen_weights step device early_stopping overwrite quiet".split()
)
"""Settings that may differ when a run is resumed; only steps still to be done depend on them."""

LENGTH = ("epochs", "eval_every", "early_stopping")
"""Those of them that decide which steps there are, and which of them is the best."""

IDLE = FREE.difference(LENGTH)
"""The others: they do not change what is learnt, beyond rounding and which masks dropout draws."""

RENAMED = {"frozen_dropout": "dropout_in_group_1"}
"""Settings by the names that older records, and older callers, have for them."""

_FIXED = (
    *("task", "definition", "labels", "loss", "method", "plan", "base_fingerprint", "base_config"),
    *("tokenizer_fingerprint", "data", "frozen_by_user"),
)

_OWN = frozenset("out overwrite quiet device cache_prefix cache_limit_gib".split())
"""Settings that may differ between the processes that train a run together."""

_ADDED = {"label_smoothing": 0.0}
"""Settings that older records lack, with the value that they had."""

_TRAINING_ALONE = frozenset(
    f"base_config.{name}"
    for name in "initializer_range hidden_dropout_prob attention_probs_dropout_prob "
    "classifier_dropout".split()
)
"""What no score or prediction depends on."""

_NO_MATTER = re.compile(r"data\.[^.]+\.source|plan(\.strata\.[0-9]+)?\.name", re.DOTALL)
"""Where the same data lie, and what the same plan and its strata are called."""

_NAMELESS = "custom"
"""The method in older records of a plan file without a name; today it has the file's."""

_MOST_NAMED = 4

_START = "initial values"


def require_same_run(
    folder: Path,
    old: Any,
    new: dict[str, Any],
    mend: str = "Give another folder, the same settings, or overwrite (--overwrite) to replace it",
) -> None:
    """Refuse to resume a run as another one.

    Parameters
    ----------
    folder : Path
        The run folder, for the message.
    old, new : dict
        Their records, as ``run.json`` has them.
    mend : str
        What can be done, for the message.

    Raises
    ------
    CheckpointError
        If they describe different runs; the message names the differences, with both values.
    """
    if not isinstance(old, dict):
        raise CheckpointError(f"{folder} holds a run whose record is damaged")
    try:
        if "definition" not in old:  # an older record of a task of one's own has only its labels
            new = {key: value for key, value in new.items() if key != "definition"}
        before, now = _identity(old), _identity(new)
        if before.get("method") == _NAMELESS:
            before["method"] = now.get("method")
        _free(old)  # read later, by changes()
    except RecursionError:
        raise CheckpointError(f"{folder} holds a run whose record is damaged") from None
    differing = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    if not differing:
        return
    # Details of the plan are named only if the method's name is the same.
    if "method" in differing:
        differing = [key for key in differing if not key.startswith("plan.")]
    raise CheckpointError(
        f"{folder} holds another run: {_named(differing, before, now, 'asked for')}. {mend}"
    )


def require_trained_with(folder: Path, record: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Refuse to use a run with another task, model or tokenizer than it was trained with.

    Parameters
    ----------
    folder : Path
        The run folder, for the message.
    record : dict
        The run's record. What it lacks, as an older one may, is not compared.
    loaded : dict
        The entries of a record that describe what was loaded.

    Raises
    ------
    CheckpointError
        If they differ; the message names the differences, with both values.
    """
    before: dict[str, Any] = {}
    now: dict[str, Any] = {}
    try:
        for key in loaded.keys() & record.keys():
            _flatten(key, record[key], before)
            _flatten(key, loaded[key], now)
    except RecursionError:
        raise CheckpointError(f"{folder} holds a run whose record is damaged") from None
    lacking = {key for key in now.keys() - before.keys() if key.startswith("base_config.")}
    every = (before.keys() | now.keys()) - lacking - _TRAINING_ALONE
    differing = [key for key in every if before.get(key) != now.get(key)]
    if differing:
        raise CheckpointError(
            f"{folder} holds a run that was trained with something else: "
            f"{_named(differing, before, now, 'loaded')}. "
            "Use it with the files that it was trained with"
        )


def require_same_in_all(rank: int, first: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse to train a run together with a process that trains another one.

    Parameters
    ----------
    rank : int
        The number of this process.
    first, here : dict
        The records of process 0 and of this one.

    Raises
    ------
    ConfigError
        If they differ in more than where files lie; the message names the differences.
    """
    before, now = (
        {
            **_identity(record),
            **{key: each for key, each in _free(record, machine=False).items() if key not in _OWN},
            _START: record.get("start"),
        }
        for record in (first, here)
    )
    differing = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    differing = [key for key in differing if key != _START] or differing  # it follows from others
    if differing:
        raise ConfigError(
            f"process {rank} trains another run than process 0: "
            f"{_named(differing, before, now, f'in process {rank}')}. "
            "Start all with the same command, on the same files"
        )


def digests(record: dict[str, Any]) -> dict[str, str]:
    """Return a digest of each thing that identifies a run, besides its task, method and settings.

    Of the data, those of "train" and "dev" are apart. What the record lacks has no digest.
    """
    found: dict[str, list[Any]] = {}
    for key, value in sorted(_identity({**record, "settings": {}}).items()):
        name, _, inner = key.partition(".")
        if name == "data":
            name, _, inner = inner.partition(".")
        # How many examples were truncated follows from the tokenizer and a setting.
        if value is None or name in ("task", "method", "init_seed") or inner == "truncated":
            continue
        found.setdefault(name, []).append([inner, value])
    return {
        name: hashlib.sha256(json.dumps(each).encode()).hexdigest() for name, each in found.items()
    }


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the other differences, each with both values.

    They are free settings, the library of products, versions, machine and number of processes.
    """
    before, now = _free(old), _free(new)
    return {
        key: [before.get(key), now.get(key)]
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def _named(differing: list[str], before: dict[str, Any], now: dict[str, Any], found: str) -> str:
    """Name the first differences, the gravest first, and count the others."""
    gravest = sorted(
        differing, key=lambda key: (list(_FIXED).index(key) if key in _FIXED else 9, key)
    )
    named = [
        f"{_shown(key)} is {before.get(key)!r:.80}, {found} is {now.get(key)!r:.80}"
        for key in gravest[:_MOST_NAMED]
    ]
    more = len(differing) - len(named)
    return "; ".join([*named, f"and {more} more"] if more else named)


def _shown(key: str) -> str:
    """Return a key for a message; an unusual one is quoted and shortened.

    Strata are counted from 1, as in all messages.
    """
    if stratum := re.match(r"plan\.strata\.([0-9]{1,9})\.", key):
        return f"stratum {int(stratum[1]) + 1} of the plan, {_shown(key[stratum.end() :])},"
    is_plain = key.isascii() and key.replace(".", "_").isidentifier() and len(key) <= 80
    return key if is_plain else f"{key!r:.80}"


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """Flatten what identifies a run into one level of dotted names."""
    found: dict[str, Any] = {}
    for key in _FIXED:
        _flatten(key, record.get(key), found)
    settings = record.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    for key, value in ({**_ADDED, **settings} if settings else {}).items():
        if key not in FREE:
            _flatten(RENAMED.get(str(key), str(key)), value, found)
    about = record.get("about")
    about = about if isinstance(about, dict) else {}
    found["init_seed"] = about.get("init_seed")
    if "started_from" in about:
        found["started_from"] = about["started_from"]
    for key in ("order_seed", "dropout_seed", "init_seed"):
        if found.get(key) == settings.get("seed"):
            found.pop(key, None)  # as in older records: there is one seed
    return {key: value for key, value in found.items() if not _NO_MATTER.fullmatch(key)}


def _free(record: dict[str, Any], machine: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {}
    settings = record.get("settings")
    for key, value in (settings if isinstance(settings, dict) else {}).items():
        if key in FREE:
            found[key] = list(value) if isinstance(value, tuple) else value
    for key in ("products", "versions", "machine", "processes") if machine else ():
        _flatten(key, record.get(key), found)
    return found


def _flatten(key: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for inner, each in value.items():
            _flatten(f"{key}.{inner}", each, found)
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            _flatten(f"{key}.{number}", each, found)
    else:
        found[key] = value
