"""What is asked of a search, as ``search.json`` says it: the same command resumes the search."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from spafit.bert import BertForSequenceClassification
from spafit.config import read_json
from spafit.errors import ConfigError, listed
from spafit.experiments.search.candidates import Candidate
from spafit.experiments.search.runs import Base
from spafit.files.replacing import replacing
from spafit.methods import ALPHA, R
from spafit.methods import plan as make_plan
from spafit.runs.identity import FREE
from spafit.strata import adapt, fingerprint
from spafit.tasks.task import Dataset
from spafit.training.settings import complete

SEARCH = "search.json"

_RUNS = ("selection", "report")
"""The folders of the runs that choose, and of those that are reported."""

_DIGESTS = {
    "base": "the weights are others (--model)",
    "tokenizer": "the tokenizer is another one (--model)",
    "train": "the rows of train are others (--data, --rows)",
    "dev": "the rows of dev are others (--data, --dev)",
}
"""What search.json has as digests, which nobody can compare by eye."""


def data_and_model(
    base: Base, model: BertForSequenceClassification, train: Dataset, dev: Dataset
) -> dict[str, Any]:
    """Return what tells the task, the model and the rows from others."""
    return {
        "task": train.task.name,
        "metric": train.task.metrics[0],
        "base": fingerprint(model),
        "tokenizer": base.tokenizer.fingerprint,
        "train": train.sha256,
        "dev": dev.sha256,
    }


def settings_asked(
    base: Base, model: BertForSequenceClassification, papers: Candidate, train: Dataset
) -> dict[str, Any]:
    """Return the settings of a full run, and refuse what no run could be; the model is adapted."""
    plan = make_plan(papers.name, model.config.num_hidden_layers, r=base.r, alpha=base.alpha)
    adapt(model, plan)
    every = dataclasses.asdict(complete(base.config, model, train))
    names = every.keys() - FREE - {"metric", "seed", "order_seed", "dropout_seed"}
    return {
        "r": base.r or R,
        "alpha": ALPHA if base.alpha is None else base.alpha,
        **{name: every[name] for name in sorted(names | {"epochs"})},
    }


def begun_before(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return what search.json says of the same search, begun before or finished.

    Raises
    ------
    ConfigError
        If it is another search; the message names what differs.
    """
    path = out / SEARCH
    try:
        old = read_json(path)
        if not isinstance(old, dict) or not isinstance(old.get("asked"), dict):
            raise ValueError("it is not the summary of a search")
    except (FileNotFoundError, NotADirectoryError):
        if any((out / folder).exists() for folder in _RUNS):
            raise ConfigError(
                f"{out} holds runs of a search, and no {SEARCH} that says which; give another "
                "folder (--out)"
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error!s:.200}), and so nothing says which search its runs "
            "are of; give another folder (--out)"
        ) from None
    before = old["asked"]
    # An older one lacks what is not compared then.
    differing = [name for name in asked if name in before and before[name] != asked[name]]
    if differing:
        found = [
            _DIGESTS.get(name) or f"{name} was {_shown(before[name])}, and is {_shown(asked[name])}"
            for name in differing
        ]
        raise ConfigError(
            f"{out} holds another search: {listed(found)}. Give another folder (--out), or the "
            "same settings"
        )
    return old


def _shown(value: object) -> str:
    return "not given" if value is None else f"{value!r:.80}"


def write_summary(path: Path, content: dict[str, Any]) -> None:
    """Write search.json, whole or not at all."""
    with replacing(path, ConfigError) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
