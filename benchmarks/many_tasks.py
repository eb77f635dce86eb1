"""Several tasks on one base: spafit's shared trunk, PEFT's adapters, AdapterHub's ``Parallel``.

    python -m benchmarks.many_tasks --task rte --batch-size 16
    python -m benchmarks.many_tasks --task cola --batch-size 1 --adapterhub FOLDER

The contests, each row from row numbers to the logits of all tasks:

- every: all rows of a batch for each of the k tasks. Baseline: spafit, a whole pass for each task,
  one after the other, on one base (k models of their own compute the same). Against it the trunk
  that is computed once, then the adapters in turn or mixed, and PEFT, which switches its adapters.
- own: a batch of k times as many rows, a part for each task. PEFT has the names of the adapters of
  its rows (``adapter_names``).
- bottlenecks: as every, but with Houlsby's adapters in the layers above group 1, against
  AdapterHub's ``Parallel``, which starts at the first layer with adapters. It needs the folder of
  an environment of its own (``--adapterhub``), and is timed by its own clock; in
  OUT_bottlenecks: ``pip install --target FOLDER adapters==1.3.0 transformers==4.57.6``
- sweep: how many times as fast as in turn mixed is, with 1 to 32 rows a task, as every and as own:
  where ``spafit.trunk.batches.MIXED_BELOW`` should lie; in OUT_sweep
- cost: the time of a switch, that of the thread, and resident memory with k adapters and without,
  beside the size of their files; in OUT_cost

PEFT refuses a second adapter with biases. So it has LoRA and the heads alone, and computes less
than spafit, whose deltas of biases are there, but zero, once the contenders of spafit have been
compared with deltas that are not.

``required_ratio`` is the least ratio of "every" with a shared trunk: of k passes through L layers
of which d are computed once, (d + k (L - d)) / (k L) of the time and 5 % more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contenders.models import SHAPES, TOLERANCES
from benchmarks.contenders.one_base import (
    IN_TURN,
    MIXED,
    ONE_BY_ONE,
    PEFT_MIXED,
    PEFT_SWITCHED,
    ParallelProcess,
    contender,
    model_of_tasks,
    one_by_one,
    peft_logits,
    peft_names,
    peft_tasks,
    shared,
    zero_biases,
)
from benchmarks.harness.arguments import (
    add_model_arguments,
    device_of,
    method_of,
    output_of,
    settings_of,
)
from benchmarks.harness.lengths import TaskRows, load_rows
from benchmarks.harness.peak_memory import measure_peak_memory
from benchmarks.harness.report import Row, place, results, write_results
from benchmarks.harness.timing import Rows, Timing, check_results, compare
from spafit.adapters import SeriesAdapter
from spafit.bert import BertForSequenceClassification
from spafit.machine.memory import keep_freed_memory
from spafit.methods import plan
from spafit.plans import ATTENTION_OUTPUT, OUTPUT, Plan, Stratum
from spafit.strata import remove_adapter, use
from spafit.weights.adapter_files import load_adapter, save_adapter

CONTESTS = ("every", "own", "bottlenecks", "sweep", "cost")
SWEPT = (1, 2, 4, 8, 16, 32)
_SWITCHES = 1000
_ALLOWED = 1.05
_IN_TABLE = ("task", "method", "batch_size")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_model_arguments(parser, out="many_tasks")
    parser.add_argument("--tasks", type=int, default=9, help="k (9)")
    parser.add_argument("--contests", choices=CONTESTS, nargs="+", help="all that can be")
    parser.add_argument("--adapterhub", type=Path, help="the folder of its environment")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parsed = parser.parse_args(arguments)
    device = device_of(parsed)
    if parsed.adapterhub is not None and (device.type != "cpu" or parsed.dtype != "float32"):
        parser.error("--adapterhub is compared on the CPU in float32")
    if parsed.tasks < 2:
        parser.error("--tasks must be 2 or more")
    contests = parsed.contests or [*CONTESTS]
    if parsed.contests and "bottlenecks" in contests and parsed.adapterhub is None:
        parser.error("the contest of bottlenecks is against AdapterHub; give --adapterhub FOLDER")
    keep_freed_memory()
    out = output_of(parsed, device)
    data = load_rows(parsed.task, "train", parsed.data, parsed.vocab)
    title = f"{parsed.tasks} tasks on one base: {parsed.model_shape}, {parsed.task.upper()}"
    if not {"every", "own", "sweep", "cost"}.isdisjoint(contests):
        config, method = SHAPES[parsed.model_shape], method_of(parsed)
        model = model_of_tasks(config, method, parsed.tasks, parsed.seed, device)
        for own in (False, True):  # while the deltas are what they are
            [rows] = draw(data, 1, parsed.tasks, parsed.seed)
            one, *others = _ours(model, data.encodings, parsed.dtype, own)
            check_results(one, others, rows, TOLERANCES[parsed.dtype])
        if "sweep" in contests:
            found = sweep(model, data, parsed, device)
            aside = out.with_name(f"{out.name}_sweep")
            write_results(aside, found, f"Mixed against in turn, {title}", in_table=_IN_TABLE)
        zero_biases(model)
        if found := adapters(model, data, parsed, device, contests):
            write_results(out, found, title, in_table=_IN_TABLE)
        if "cost" in contests:
            found = [{**cost, **place(device, "float32")} for cost in cost_of(model, parsed)]
            write_results(out.with_name(f"{out.name}_cost"), found, "", in_table=("method",))
        del model
    if "bottlenecks" in contests and parsed.adapterhub is not None:
        found = bottlenecks(data, parsed, device)
        aside = out.with_name(f"{out.name}_bottlenecks")
        write_results(aside, found, f"Bottlenecks, {title}", in_table=_IN_TABLE)


def sweep(
    model: BertForSequenceClassification,
    data: TaskRows,
    parsed: argparse.Namespace,
    device: torch.device,
) -> list[Row]:
    """Measure mixed against in turn for more and more rows a task; return the rows of mixed."""
    found: list[Row] = []
    for own, contest in ((False, "every"), (True, "own")):
        _, in_turn, mixed = _ours(model, data.encodings, parsed.dtype, own)
        for n in SWEPT:
            batches = draw(data, parsed.batches, n * (parsed.tasks if own else 1), parsed.seed)
            timings = compare(
                in_turn,
                [mixed],
                batches,
                repeats=parsed.repeats,
                tolerance=TOLERANCES[parsed.dtype],
            )
            rows = rows_of(contest, timings, model, batches, n, data, parsed, device)
            name = f"{contest}, {rows[1]['tokens_per_task']:.0f} tokens a task: mixed"
            found.append({**rows[1], "contender": name, "required_ratio": ""})
    return found


def adapters(
    model: BertForSequenceClassification,
    data: TaskRows,
    parsed: argparse.Namespace,
    device: torch.device,
    contests: Sequence[str],
) -> list[Row]:
    """Measure the contests with PEFT, whose model has no biases; return their rows."""
    found: list[Row] = []
    twin = None if {"every", "own"}.isdisjoint(contests) else peft_tasks(model)
    for own, contest in ((False, "every"), (True, "own")):
        if contest not in contests:
            continue
        n = parsed.batch_size
        batches = draw(data, parsed.batches, n * (parsed.tasks if own else 1), parsed.seed)
        one, *others = _ours(model, data.encodings, parsed.dtype, own)
        theirs = peft_logits(twin, peft_names(model), data.encodings, parsed.dtype, own)
        others.append(contender(PEFT_MIXED if own else PEFT_SWITCHED, theirs))
        timings = compare(
            one, others, batches, repeats=parsed.repeats, tolerance=TOLERANCES[parsed.dtype]
        )
        found += rows_of(contest, timings, model, batches, n, data, parsed, device)
    return found


def bottlenecks(data: TaskRows, parsed: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure Houlsby's adapters above group 1 against AdapterHub's ``Parallel``."""
    config = SHAPES[parsed.model_shape]
    count = config.num_hidden_layers
    first = plan(method_of(parsed), count).strata[0]
    ends = dict.fromkeys((ATTENTION_OUTPUT, OUTPUT), (SeriesAdapter(),))
    above = Plan(
        f"Houlsby's adapters above layer {first.last}",
        count,
        [first, Stratum("adapted", first.last + 1, count - 1, ends)],
    )
    model = model_of_tasks(config, above, parsed.tasks, parsed.seed, device)
    batches = draw(data, parsed.batches, parsed.batch_size, parsed.seed)
    one, *others = _ours(model, data.encodings, parsed.dtype, own=False)
    with tempfile.TemporaryDirectory() as folder:
        process = ParallelProcess(model, data.encodings, parsed.adapterhub, Path(folder))
        try:
            others.append(process.contender())
            timings = compare(
                one, others, batches, repeats=parsed.repeats, tolerance=TOLERANCES[parsed.dtype]
            )
        finally:
            process.close()
    n = parsed.batch_size
    rows = rows_of("bottlenecks", timings, model, batches, n, data, parsed, device)
    return [{**row, "adapterhub": process.versions} for row in rows]


def _ours(
    model: BertForSequenceClassification, encodings: Any, precision: str, own: bool
) -> list[Any]:
    """Return spafit's contenders, the baseline first."""
    given = (model, encodings, precision, own)
    return [
        contender(ONE_BY_ONE, one_by_one(*given)),
        contender(IN_TURN, shared(*given, mixed=False)),
        contender(MIXED, shared(*given, mixed=True)),
    ]


def draw(data: TaskRows, batches: int, size: int, seed: int) -> list[Rows]:
    """Return batches of random rows, of which none occurs again before all have occurred."""
    lengths, count = data.encodings.lengths, batches * size
    generator = np.random.default_rng(seed)
    passes = [generator.permutation(len(lengths)) for _ in range(-(-count // len(lengths)))]
    order = np.concatenate(passes)[:count].tolist()
    each = [tuple(order[start : start + size]) for start in range(0, count, size)]
    return [Rows(numbers, sum(lengths[number] for number in numbers)) for numbers in each]


def rows_of(
    contest: str,
    timings: Sequence[Timing],
    model: BertForSequenceClassification,
    batches: Sequence[Rows],
    n: int,
    data: TaskRows,
    parsed: argparse.Namespace,
    device: torch.device,
) -> list[Row]:
    """Return the rows of a contest: settings, results, machine."""
    tokens = statistics.mean(rows.tokens for rows in batches)
    if contest == "own":
        tokens /= parsed.tasks
    [depth] = {each.depth for each in model.adaptations.values()}
    settings = {
        **settings_of(parsed, data.source),
        "method": next(iter(model.adaptations.values())).plan.name,
        "layers": model.config.num_hidden_layers,
        "batch_size": n,
        "contest": contest,
        "tasks": parsed.tasks,
        "tokens_per_task": tokens,
    }
    least = required_ratio(depth, model.config.num_hidden_layers, parsed.tasks)
    return [
        {
            **row,
            "contender": f"{contest}: {row['contender']}",
            "required_ratio": least
            if contest != "own" and row["contender"] in (IN_TURN, MIXED)
            else "",
        }
        for row in results(settings, timings, place(device, parsed.dtype))
    ]


def required_ratio(depth: int, layers: int, tasks: int) -> float:
    """Return how many times as fast as separate passes a trunk of some layers has to be."""
    return tasks * layers / (depth + tasks * (layers - depth)) / _ALLOWED


def cost_of(model: BertForSequenceClassification, parsed: argparse.Namespace) -> list[Row]:
    """Measure switches between the adapters, and the memory that they take."""
    names = list(model.adaptations)
    adaptation = model.adaptations[names[0]]
    settings: Row = {
        "model": parsed.model_shape,
        "seed": parsed.seed,
        "method": adaptation.plan.name,
        "layers": model.config.num_hidden_layers,
        "tasks": len(names),
    }
    ours = switch_columns(lambda name: use(model, name), names)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            use(model, name)
            save_adapter(model, Path(folder) / f"{name}.safetensors")
        use(model, None)
        files = sum(each.stat().st_size for each in Path(folder).iterdir()) / 2**20
        given = {"folder": folder, "shape": parsed.model_shape, "seed": parsed.seed}
        without, with_all = (
            measure_peak_memory("benchmarks.many_tasks:load_adapters", {**given, "count": count})
            for count in (0, len(names))
        )
    grown = with_all.after_setup_mib - without.after_setup_mib
    memory = {
        "base_mib": without.after_setup_mib,
        "with_adapters_mib": with_all.after_setup_mib,
        "files_mib": files,
        "grown_by_files": grown / files,
    }
    rows: list[Row] = [{**settings, "contender": "spafit", **ours, **memory}]
    zero_biases(model)
    twin = peft_tasks(model)
    theirs = switch_columns(twin.set_adapter, peft_names(model))
    rows.append({**settings, "contender": PEFT_SWITCHED, **theirs, **dict.fromkeys(memory, "")})
    return rows


def switch_columns(switch: Callable[[str], object], names: Sequence[str]) -> Row:
    """Return the columns of a switch's time: the thread's, so that other programs do not count."""
    times_ms = []
    for number in range(_SWITCHES):
        name = names[number % len(names)]
        began = time.thread_time()
        switch(name)
        times_ms.append(1000 * (time.thread_time() - began))
    low, median, high = np.quantile(times_ms, [0.25, 0.5, 0.75]).tolist()
    return {
        "switches": _SWITCHES,
        "switch_ms": median,
        "switch_low_quartile_ms": low,
        "switch_high_quartile_ms": high,
        "switch_max_ms": max(times_ms),
    }


def load_adapters(folder: str, shape: str, seed: int, count: int) -> Callable[[], object]:
    """Build a base and load so many adapters; for :mod:`benchmarks.harness.peak_memory`."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(SHAPES[shape], num_labels=2).eval()
    paths = sorted(Path(folder).glob("*.safetensors"))
    load_adapter(model, paths[0], name="first")  # what loading itself takes is there without one
    remove_adapter(model, "first")
    for path in paths[:count]:
        load_adapter(model, path, name=path.stem)
    return lambda: model


if __name__ == "__main__":
    main()
