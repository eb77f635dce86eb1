"""``spafit inspect``: what a run added to its base, what merging loses, and what was forgotten."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spafit.cli.evaluating import datasets
from spafit.cli.trained import Run, Trained
from spafit.errors import ConfigError, DataError
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
from spafit.tasks import glue, own, scoring
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
    rows: int
    seeds: Sequence[int]
    out: Path | None
    quiet: bool


def run_inspect(options: InspectOptions) -> None:
    """Inspect a run, print what was found, and write it if there is a folder to write to."""
    if len(set(options.seeds)) < len(options.seeds):
        raise ConfigError(f"--seeds has a duplicate: {' '.join(map(str, options.seeds))}")
    if options.out is not None:
        refuse_place(options.out, is_folder=True)
    texts = None if options.texts is None else read_texts(options.texts)
    tasks = [glue.get_task(name).name for name in options.tasks]
    trained = Trained(options.run, options.model, options.mapped)
    run = trained.runs[0]
    place = options.model or trained.recorded("model", "--model")
    revision = None if options.model else run.record["about"].get("revision")
    base = load_pretrained(
        place, num_labels=run.model.num_labels, revision=revision, mapped=options.mapped
    ).to(run.model.device)
    assert run.model.adaptation is not None
    about = {
        "run": str(options.run),
        "task": trained.task.name,
        "plan": run.model.adaptation.plan.name,
        "model": place,
        "spafit": __version__,
    }
    title = f"{about['plan']} trained on {trained.task.display} ({options.run})"
    if not (options.merging or options.forgetting):
        found = norms(run.model, base)
        print(norms_screen(found, title))
        every = [{**dataclasses.asdict(each), "relative": each.relative} for each in found]
        names = _write(options.out, "norms", {**about, "norms": every})
        is_drawn = any(each.layer is not None and each.relative for each in found)
        if options.out is not None and is_drawn:
            if importlib.util.find_spec("matplotlib") is None:
                print("for a figure of it: pip install 'spafit[plot]'")
            else:
                draw(found, base.config.num_hidden_layers, title, options.out / "norms.png")
                names.append("norms.png")
        _say(options.out, names)
        return
    names = []
    if options.forgetting:
        head = None if texts is None else load_masked_head(place, base, revision)
        data = options.data or _glue_of(trained)
        rows = {
            name: (
                some_rows(glue.load(name, "train", data), options.rows),
                some_rows(glue.load(name, "dev", data), options.rows),
            )
            for name in tasks
        }
        every_text = _encoded(run, rows[tasks[0]][1] if texts is None else texts)
        off = adapter_off(run.model, base, _first(every_text))
        models = {"before": base, "after": run.model}
        scores = {
            when: probe_scores(network, run.tokenizer, rows, options.seeds, quiet=options.quiet)
            for when, network in models.items()
        }
        losses: dict[str, list[float]] = {"before": [], "after": []}
        masked = 0
        if head is not None:
            for seed in options.seeds:
                drawn = mask(run.tokenizer, every_text, seed)
                masked = drawn.count
                for when, network in models.items():
                    losses[when].append(masked_loss(network, head, drawn))
        forgotten = Forgetting(
            off,
            {name: train.task.metrics[0] for name, (train, _) in rows.items()},
            {
                name: scoring.majority(dev.task, dev.labels)[dev.task.metrics[0]]
                for name, (_, dev) in rows.items()
            },
            {name: (len(train), len(dev)) for name, (train, dev) in rows.items()},
            scores["before"],
            scores["after"],
            losses["before"],
            losses["after"],
            masked,
        )
        print(forgetting_screen(forgotten, f"{title}: what was forgotten"))
        if texts is None:
            print("For the loss of masked tokens, too, give a file with a text a line (--texts).")
        seeds = {"seeds": list(options.seeds)}
        names += _write(options.out, "forgetting", {**about, **seeds, **forgotten.to_json_dict()})
    if options.merging:
        given = texts
        if given is None:
            form, most = trained.table_form(None, False, None), trained.bad_rows_allowed(None)
            given = datasets(trained, options.data, "dev", form, most)[0]
        some = _first(_encoded(run, given))
        errors = merging_errors(run.model, some)
        if options.forgetting:
            print()
        of = f"{len(some)} texts of {given.source}"
        print(merging_screen(errors, f"{title}: merged against unmerged, {of}"))
        each = [
            {**dataclasses.asdict(error), "share_lost": error.share, "warning": error.warning}
            for error in errors
        ]
        names += _write(options.out, "merging", {**about, "texts": len(some), "merging": each})
    _say(options.out, names)


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


def _first(encodings: Encodings) -> Encodings:
    return dataclasses.replace(
        encodings,
        input_ids=encodings.input_ids[:SOME_TEXTS],
        token_type_ids=encodings.token_type_ids[:SOME_TEXTS],
    )


def _write(folder: Path | None, name: str, content: dict[str, Any]) -> list[str]:
    """Write a JSON file into the folder, if there is one, and return its name."""
    if folder is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{name}.json", ConfigError) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [f"{name}.json"]


def _say(folder: Path | None, names: Sequence[str]) -> None:
    if folder is not None:
        print(f"written: {', '.join(names)} in {folder}")
