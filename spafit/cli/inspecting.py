"""The work of ``spafit inspect``: what a run added, what merging loses, and what was forgotten."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spafit.bert import BertForSequenceClassification
from spafit.cli.evaluating import datasets
from spafit.cli.trained import Run, Trained
from spafit.errors import ConfigError, DataError
from spafit.experiments.figure import can_draw
from spafit.experiments.inspect.figure import draw
from spafit.experiments.inspect.forgetting import adapter_off, probe_scores
from spafit.experiments.inspect.masked import load_masked_head, mask, masked_loss
from spafit.experiments.inspect.merging import merging_errors
from spafit.experiments.inspect.norms import norms
from spafit.experiments.inspect.report import (
    Forgetting,
    forgetting_screen,
    merging_screen,
    norms_screen,
)
from spafit.experiments.probe.layers import some_rows
from spafit.files.replacing import refuse_place, replacing
from spafit.tasks import glue, own
from spafit.tasks.download import glue_cache
from spafit.tasks.reading import lines, require_file
from spafit.tasks.task import Dataset
from spafit.text.tokenization import Encodings
from spafit.training.inference import encode
from spafit.version import __version__
from spafit.weights.pretrained import load_pretrained

SOME_TEXTS = 32
"""So many texts the hidden states are compared of."""


@dataclass(frozen=True)
class InspectOptions:
    """The options of ``spafit inspect``.

    Attributes
    ----------
    run : Path
        A run folder.
    model : str or None
        Another place of the base.
    mapped : bool or None
        As for :func:`spafit.load_pretrained`.
    merging, forgetting : bool
        What is inspected; without either the norms.
    texts : Path or None
        A file with a text a line.
    tasks : sequence of str
        The GLUE tasks that are probed.
    data : Path or None
        GLUE's root.
    max_bad_rows : int or None
        How many malformed rows may be left out of a file; None as in training.
    rows : int
        The most rows of train, and of dev, that a probe has.
    seeds : sequence of int
        Of the probes and of the masks.
    out : Path or None
        The folder to write to.
    quiet : bool
        Whether to show no progress.
    """

    run: Path
    model: str | None
    mapped: bool | None
    merging: bool
    forgetting: bool
    texts: Path | None
    tasks: Sequence[str]
    data: Path | None
    max_bad_rows: int | None
    rows: int
    seeds: Sequence[int]
    out: Path | None
    quiet: bool


@dataclass(frozen=True)
class _Inspected:
    """A run with its base, which is loaded beside it."""

    options: InspectOptions
    trained: Trained
    texts: Dataset | None
    place: str
    revision: str | None
    base: BertForSequenceClassification
    bad_rows: int

    @property
    def run(self) -> Run:
        return self.trained.runs[0]

    @property
    def plan(self) -> str:
        assert self.run.model.adaptation is not None
        return self.run.model.adaptation.plan.name

    @property
    def title(self) -> str:
        return f"{self.plan} trained on {self.trained.task.display} ({self.options.run})"

    @property
    def about(self) -> dict[str, Any]:
        return {
            "run": str(self.options.run),
            "task": self.trained.task.name,
            "plan": self.plan,
            "model": self.place,
            "spafit": __version__,
        }


def run_inspect(options: InspectOptions) -> None:
    """Inspect a run, print what was found, and write it if there is a folder to write to."""
    if len(set(options.seeds)) < len(options.seeds):
        raise ConfigError(f"--seeds has a duplicate: {' '.join(map(str, options.seeds))}")
    if options.out is not None:
        refuse_place(options.out, is_folder=True)
    texts = None if options.texts is None else read_texts(options.texts)
    for name in options.tasks:
        glue.get_task(name)
    trained = Trained(options.run, options.model, options.mapped)
    place = options.model or trained.recorded("model", "--model")
    revision = None if options.model else trained.record["about"].get("revision")
    model = trained.runs[0].model
    base = load_pretrained(
        place, num_labels=model.num_labels, revision=revision, mapped=options.mapped
    ).to(model.device)
    allowed = trained.bad_rows_allowed(options.max_bad_rows)
    inspected = _Inspected(options, trained, texts, place, revision, base, allowed)
    names = []
    if options.forgetting:
        names += _forgetting(inspected)
    if options.forgetting and options.merging:
        print()
    if options.merging:
        names += _merging(inspected)
    if not (options.forgetting or options.merging):
        names += _norms(inspected)
    if options.out is not None:
        print(f"written: {', '.join(names)} in {options.out}")


def _norms(inspected: _Inspected) -> list[str]:
    found = norms(inspected.run.model, inspected.base)
    print(norms_screen(found, inspected.title))
    every = [{**dataclasses.asdict(each), "relative": each.relative} for each in found]
    folder = inspected.options.out
    names = _write(folder, "norms", {**inspected.about, "norms": every})
    if folder is None or not any(each.layer is not None and each.relative for each in found):
        return names
    if not can_draw():
        return names
    layers = inspected.base.config.num_hidden_layers
    draw(found, layers, inspected.title, folder / "norms.png")
    return [*names, "norms.png"]


def _forgetting(inspected: _Inspected) -> list[str]:
    options, run = inspected.options, inspected.run
    head = None
    if inspected.texts is not None:  # it is refused before anything takes time
        head = load_masked_head(inspected.place, inspected.base, inspected.revision)
    data = options.data or _glue_of(inspected.trained)
    tasks = {}
    for name in options.tasks:
        train, dev = (
            some_rows(glue.load(name, split, data, max_bad_rows=inspected.bad_rows), options.rows)
            for split in ("train", "dev")
        )
        tasks[train.task.name] = train, dev
    texts = next(iter(tasks.values()))[1] if inspected.texts is None else inspected.texts
    off = adapter_off(run.model, inspected.base, _encoded(run, texts[:SOME_TEXTS]))
    before, after = (
        probe_scores(model, run.tokenizer, tasks, options.seeds, quiet=options.quiet)
        for model in (inspected.base, run.model)
    )
    losses: dict[str, list[float]] = {"before": [], "after": []}
    if head is not None:
        encodings = _encoded(run, texts)
        for seed in options.seeds:
            masked = mask(run.tokenizer, encodings, seed)
            losses["before"].append(masked_loss(inspected.base, head, masked))
            losses["after"].append(masked_loss(run.model, head, masked))
    found = Forgetting(off, tasks, before, after, losses["before"], losses["after"], len(texts))
    print(forgetting_screen(found, f"{inspected.title}: what was forgotten"))
    if head is None:
        print("For the loss of masked tokens, too, give a file with a text a line (--texts).")
    content = {**inspected.about, "seeds": list(options.seeds), **found.to_json_dict()}
    return _write(options.out, "forgetting", content)


def _merging(inspected: _Inspected) -> list[str]:
    texts = inspected.texts
    if texts is None:
        trained = inspected.trained
        form = trained.table_form(None, False, None)
        data = inspected.options.data
        texts = datasets(trained, data, "dev", form, inspected.bad_rows)[0]
    some = _encoded(inspected.run, texts[:SOME_TEXTS])
    found = merging_errors(inspected.run.model, some)
    of = f"{len(some)} texts of {texts.source}"
    print(merging_screen(found, f"{inspected.title}: merged against unmerged, {of}"))
    each = [
        {**dataclasses.asdict(error), "share_lost": error.share, "warning": error.warning}
        for error in found
    ]
    content = {**inspected.about, "texts": len(some), "merging": each}
    return _write(inspected.options.out, "merging", content)


def read_texts(path: Path) -> Dataset:
    """Read a file with a text a line, in UTF-8; empty lines are left out.

    Raises
    ------
    DataError
        If it cannot be read, or has no text.
    """
    require_file(path)
    try:
        found = [line for _, line in lines(path) if line.strip()]
    except ValueError:  # a NUL in the name
        raise DataError(f"cannot read {str(path)!r:.200}: no file has such a name") from None
    if not found:
        raise DataError(f"{path} has no text; it should have one on each line")
    return dataclasses.replace(own.dataset(found), source=str(path))


def _glue_of(trained: Trained) -> Path:
    """Return GLUE's root: where the run's own task was read from, or the download cache."""
    recorded = trained.record["about"].get("data")
    is_root = trained.record.get("definition") is None and isinstance(recorded, str)
    return Path(recorded) if is_root else glue_cache()


def _encoded(run: Run, texts: Dataset) -> Encodings:
    longest = run.record["settings"]["max_length"]
    return encode(run.model, run.tokenizer, texts, longest)


def _write(folder: Path | None, name: str, content: dict[str, Any]) -> list[str]:
    """Write a JSON file into the folder, if there is one, and return its name.

    A number that is infinite or none is null there.
    """
    if folder is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{name}.json", ConfigError) as temporary:
        text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
        temporary.write_text(text, encoding="utf-8")
    return [f"{name}.json"]


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(each) for name, each in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(each) for each in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
