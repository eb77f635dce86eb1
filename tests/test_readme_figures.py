"""Every measured figure in README.md and the guide is one of a row in benchmarks/results.

Oracle: the rows. A sentence or a line of a table is built here from the rows' values, and must
stand in its page as it is; nothing else in the pages may look like a measurement. The page names
the commits by which the rows were made.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from support import REPOSITORY
from support.pages import EVERY_PAGE, GUIDE, PAGES

RESULTS = REPOSITORY / "benchmarks" / "results"
LENGTHS = REPOSITORY / "benchmarks" / "harness" / "recorded_lengths.json"

Row = dict[str, str]


def rows(name: str, **values: str) -> list[Row]:
    """Return the rows of a CSV that have these values."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if values.items() <= row.items()]
    assert found, (name, values)
    return found


def row(name: str, **values: str) -> Row:
    """Return the newest of such rows."""
    return rows(name, **values)[-1]


def ratio(its: Row, times: str = "") -> str:
    """Return a ratio with its range, as the pages write it."""
    median, least, most = (float(its[f"ratio{key}"]) for key in ("", "_min", "_max"))
    return f"{median:.1f}{times} ({least:.1f} to {most:.1f})"


def ratio_in_hundredths(its: Row) -> str:
    median, least, most = (float(its[f"ratio{key}"]) for key in ("", "_min", "_max"))
    return f"{median:.2f} ({least:.2f} to {most:.2f})"


def against(ours: Row, theirs: Row, form: str = ".1f") -> str:
    """Return the median and range of how many times as fast ours was in the rounds of both."""
    times = ([float(time) for time in each["round_times_ms"].split()] for each in (theirs, ours))
    ratios = [their / our for their, our in zip(*times, strict=True)]
    median, least, most = (
        format(each, form) for each in (statistics.median(ratios), min(ratios), max(ratios))
    )
    return f"{median} ({least} to {most})"


def number(its: Row, column: str = "ratio", form: str = ".1f") -> str:
    return format(float(its[column]), form)


def seconds(milliseconds: str) -> str:
    return f"{float(milliseconds) / 1000:.1f} s"


def demo() -> tuple[list[str], list[Row]]:
    every = rows("demo")
    newest = every[-1]["commit"]
    every = [each for each in every if each["commit"] == newest]
    lines = [f"| always the commonest class | | {number(every[0], 'commonest_class', '.3f')} | | |"]
    for method in dict.fromkeys(each["method"] for each in every):
        its = [each for each in every if each["method"] == method]
        scores = [float(each["accuracy"]) for each in its]
        [first] = [each for each in its if each["seed"] == "0"]
        lines.append(
            f"| {method[0].upper()}{method[1:]} | {int(first['trainable']):,} | "
            f"{number(first, 'accuracy', '.3f')} | {statistics.mean(scores):.3f} ± "
            f"{statistics.stdev(scores):.3f} | {number(first, 'time_s', '.0f')} s |"
        )
    assert len(lines) == 6
    assert "(2 minutes on 2 CPU cores)" in PAGES["README.md"]
    assert sum(float(each["time_s"]) for each in every if each["seed"] == "0") < 100
    return lines, every


def readme() -> tuple[list[str], list[Row]]:
    """Return the demo's table, and what README.md has of other pages."""
    lines, used = demo()
    step, mkl = (row(name, contender="spafit") for name in ("train_step", "train_step_mkl"))
    _, peft32, ours16, _ = rows("train_step_bf16", task="rte")[-4:]
    killed = r"^\| SIGKILL of a training process.*\| (\d+) \| 0 unreadable .*, 0 lost more than an"
    [often] = re.findall(killed, PAGES[GUIDE + "reliability.md"], re.M)
    return [
        *lines,
        f"{ratio(step, ' times as fast')} as transformers with PEFT, {ratio(mkl)} with the same "
        f"library of matrix products, and {against(ours16, peft32)} in bf16 against PEFT's float32",
        f"{number(step, 'peak_memory_ratio', '.2f')} times as much above the weights",
        f"Of {often} runs killed, none was unreadable, none lost more than an interval",
    ], [*used, step, mkl, ours16]


def own_data() -> tuple[list[str], list[Row]]:
    every = rows("own_data", task="tickets.csv")
    lines = []
    for metric, name in (
        ("macro_f1", "macro F1"),
        ("accuracy", "accuracy"),
        ("matthews", "Matthews"),
    ):
        its = [each for each in every if each["metric"] == metric]
        scores = [float(each["score"]) for each in its]
        lines.append(
            f"| {name} | {statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f} | "
            f"{number(its[0], 'commonest_class', '.3f')} |"
        )
    [time_s] = {number(each, "time_s", ".0f") for each in every}
    return [*lines, f"3 seeds of {time_s} s each:"], every


def real_runs() -> tuple[list[str], list[Row]]:
    tables = recorded_tables("minilm", " against the others")
    of_peft = (RESULTS / "peft_scores.md").read_text(encoding="utf-8")
    tables += [line for line in of_peft.splitlines() if line.startswith("| ")]
    # By test_peft_scores.py:
    tables.append(
        "first step, 0.025, the test would have seen differences of 0.058 on CoLA and of "
        "0.036 on MRPC"
    )
    tables.append("(p 0.62 for both tasks' first metric)")
    tables += recorded_tables("cola_long", " against the others")
    last = [f"in {last_epochs('minilm')}", f"in {last_epochs('cola_long')}"]
    lines = dict.fromkeys(
        [
            *tables,
            *ablations("ablations"),
            *ablations("rank"),
            *last,
            *costs(),
            *memory_of(),
            *techniques(),
        ]
    )
    return list(lines), [*rows("techniques"), *rows("peft_scores", side="transformers + PEFT")]


def recorded_tables(name: str, *titles: str) -> list[str]:
    """Return tables of a recorded report, the first and those of these titles, as they stand."""
    report = (RESULTS / name / "report.md").read_text(encoding="utf-8")
    first, *others = report.split("\n## ")
    parts = [first, *(each for each in others if each.partition("\n")[0].endswith(titles))]
    assert len(parts) == 1 + len(titles)
    lines = [flat(line) for part in parts for line in part.splitlines() if line[:1] == "|"]
    return [line for line in lines if not line.startswith("|--")]


def costs() -> list[str]:
    """Return the table of times of the grid that was run for these alone."""
    lines = recorded_tables("costs", "Time and memory")
    return lines[lines.index("| method | seconds a run | examples/s in training |") :]


def memory_of() -> list[str]:
    """Return the table of memory of runs that had a process of their own each."""
    lines = recorded_tables("memory", "Time and memory")
    return lines[lines.index("| method | peak memory (MiB) |") :]


def last_epochs(name: str) -> str:
    """Return in how many of a grid's reported runs the best epoch was the last."""
    last = []
    with tarfile.open(RESULTS / name / "runs.tar.xz") as file:
        for entry in file:
            if entry.name.endswith("/run.json") and "/choice/" not in entry.name:
                record = json.load(file.extractfile(entry))  # type: ignore[arg-type]
                last.append(record["result"]["best_epoch"] == record["settings"]["epochs"])
    return f"{sum(last)} of {len(last)} runs the last epoch is the best"


def ablations(name: str) -> list[str]:
    """Return the table of some ablations, and their tests on the mean of the tasks."""
    lines = recorded_tables(name, " against the others")
    head = next(k for k, line in enumerate(lines) if line.startswith("| against |"))
    return [*lines[:head], *(line for line in lines[head:] if "| mean of 2 tasks |" in line)]


def techniques() -> list[str]:
    every = rows("techniques")
    lines = []
    for method, rate in dict.fromkeys((its["method"], its["learning_rate"]) for its in every):
        line = f"| `{method}` "
        if method.endswith(".json"):
            line = f"| [{Path(method).stem}](../../{method}) "
        for task, metric in (("MRPC", "f1"), ("CoLA", "matthews")):
            its = [
                each
                for each in every
                if (each["method"], each["learning_rate"]) == (method, rate)
                and (each["task"], each["metric"]) == (task, metric)
            ]
            assert [each["seed"] for each in its] == ["0", "1", "2"], (method, task)
            scores = [float(each["score"]) for each in its]
            if task == "MRPC":
                line += f"| {int(its[0]['trainable']):,} | {float(rate):g} "
            line += f"| {statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f} "
        lines.append(line + "|")
    [mrpc] = {number(each, "majority", ".3f") for each in every if each["metric"] == "f1"}
    [cola] = {number(each, "majority", ".3f") for each in every if each["task"] == "CoLA"}
    return [*lines, f"| always the commonest class | | | {mrpc} | {cola} |"]


def speed() -> tuple[list[str], list[Row]]:
    ours, kept, theirs = "spafit", "spafit, prefix kept", "transformers + PEFT, longest"
    step, step_mkl = row("train_step", contender=ours), row("train_step_mkl", contender=ours)
    on, on_mkl = row("train_step", contender=kept), row("train_step_mkl", contender=kept)
    peft = row("train_step", contender=theirs)
    files, by_length, theirs_by_length = (
        row("inference", contender=name)
        for name in (
            *("spafit, in file order", "spafit, sorted by length"),
            "transformers + PEFT, sorted by length",
        )
    )
    load = row("load", contender=ours)
    mib = [f"{float(each['above_weights_mib']):,.0f}" for each in (step, peft)]
    lines = [
        f"a training step of SPAFIT-4-9-II on RTE is {ratio(step, ' times as fast')}",
        "| training step, BERT-large's shape, SPAFIT-4-9-II, RTE, batches of 16 | "
        f"{ratio(step, ' times as fast')} | {ratio(step_mkl)} |",
        f"| the same, the prefix kept, from the second epoch on | {ratio(on)} | {ratio(on_mkl)} |",
        f"| its peak memory above the weights | {number(step, 'peak_memory_ratio', '.2f')} times "
        f"({mib[0]} of {mib[1]} MiB) | |",
        "| inference, BERT-large's shape, 48 rows of RTE dev, batches of 16 in file order | "
        f"{ratio(files)} | |",
        f"| the same, sorted by length on both sides | {against(by_length, theirs_by_length)} | |",
        f"| loading BERT-large from disk to the first logits | {ratio(load)}; the whole process "
        f"{number(load, 'whole_process_ratio')} | |",
        "The step's arithmetic alone (forward of 24 layers and backward of 19, real tokens only) "
        f"would take {number(step, 'share_at_onednn', '.2f')} of its time at the "
        f"{number(step, 'onednn_gflops', '.0f')} GFLOP/s that oneDNN reached in the same run; with "
        f"MKL's products {number(step_mkl, 'share_at_torch_mm', '.2f')} at "
        f"{number(step_mkl, 'torch_mm_gflops', '.0f')} GFLOP/s.",
    ]
    names = ("-m spafit --help", "-m spafit plan SPAFIT-4-9-II", "-c 'import torch'")
    starts = [row("start", contender=f"python {name}") for name in names]
    shown, plan, torch = (float(each["median_time_ms"]) / 1000 for each in starts)
    lines.append(
        f"Help takes {shown:.2f} s and a plan {plan:.1f} s, of which importing torch takes "
        f"{torch:.1f} s"
    )
    in_bf16, rows_of_bf16 = speed_in_bf16()
    engines, rows_of_engines = inference_engines()
    used = [step, step_mkl, files, load, *starts, *rows_of_bf16, *rows_of_engines]
    return [*lines, *in_bf16, *engines], used


def speed_in_bf16() -> tuple[list[str], list[Row]]:
    """Return what docs/guide/speed.md has of steps and whole runs in both precisions."""
    lines, used = [], []
    for task, name in (("rte", "RTE"), ("cola", "CoLA")):
        peft16, peft32, ours16, ours32 = rows("train_step_bf16", task=task)[-4:]
        lines += [
            f"| step on {name}, against PEFT in float32 | {against(ours32, peft32)} | "
            f"{against(ours16, peft32)} |",
            f"| against PEFT under bf16 autocast | {against(ours32, peft16)} | "
            f"{against(ours16, peft16)} |",
            f"| against spafit in float32 | | {against(ours16, ours32)} |",
            f"| share of the rate of large products | {number(ours32, 'share_at_best', '.2f')} | "
            f"{number(ours16, 'share_at_best', '.2f')} |",
        ]
        used += [peft16, ours16]
        if task == "rte":
            lines.append(f"and {against(ours16, peft32)} times if spafit's is in bf16")
    _, peft32, ours, ours32, recomputed = rows("train_step_bf16_memory")[-5:]
    four = (ours, peft32, ours32, recomputed)
    above, whole = (
        [float(each[column]) for each in four]
        for column in ("above_weights_mib", "peak_memory_mib")
    )
    mib, peak = ([f"{each:,.0f}" for each in its] for its in (above, whole))
    share = [f"{each / above[1]:.2f}" for each in above]
    copies = float(ours["after_setup_mib"]) - float(peft32["after_setup_mib"])
    lines += [
        f"{share[0]} times what PEFT takes in float32 ({mib[0]} of {mib[1]} MiB), and spafit's "
        f"step in float32 {share[2]} times ({mib[2]} MiB)",
        f"they stand beside the float32 matrices and take {copies:,.0f} MiB, so that the peak of "
        f"the whole process is {peak[0]} MiB, against PEFT's {peak[1]} in float32, and more than "
        f"spafit's own {peak[2]} in float32",
        f"Why {share[0]}, and not half of {share[2]}?",
        f"With `--recompute 2 3` it takes {share[3]} times ({mib[3]} MiB), at "
        f"{against(recomputed, ours, '.2f')} times the speed",
    ]
    used += [ours]
    compiled, ours = rows("train_step_compiled")[-2:]
    lines += [
        f"torch.compile makes PEFT's step under bf16 autocast {ratio_in_hundredths(compiled)} "
        f"times as fast, so that spafit's is {against(ours, compiled)} times as fast as that",
    ]
    used += [ours]
    times: list[float] = []
    dev: list[str] = []
    for task, name in (("cola", "CoLA"), ("mrpc", "MRPC"), ("rte", "RTE")):
        _, ours32, peft16, ours16 = rows(f"train_run_{task}")[-4:]
        times += [float(each["median_time_ms"]) / 1000 for each in (ours32, ours16)]
        dev.append(f"{int(ours32['dev_rows']):,}")
        lines.append(
            f"| {name}, {int(ours32['train_rows']):,} rows | {ratio(ours32)} | {ratio(ours16)} | "
            f"{ratio(peft16)} |"
        )
        used.append(ours32)
    lines.append(
        f"spafit's take {min(times):.0f} to {max(times):.0f} s, so that starting, loading and the "
        f"two evaluations of dev ({dev[0]}, {dev[1]} and {dev[2]} rows) count"
    )
    return lines, used


def memory() -> tuple[list[str], list[Row]]:
    """Return what docs/guide/memory.md has of the copies in bf16."""
    _, peft32, ours, *_ = rows("train_step_bf16_memory")[-5:]
    before, after = (float(each["after_setup_mib"]) for each in (peft32, ours))
    line = (
        f"a process has {after:,.0f} MiB after set-up, {after - before:,.0f} MiB more than PEFT's "
        f"{before:,.0f} in float32"
    )
    return [line], [ours]


SHAPES = {"large": "BERT-large", "base": "BERT-base", "minilm": "MiniLM"}
TASK_NAMES = {"rte": "RTE", "sst-2": "SST-2"}


def inference_engines() -> tuple[list[str], list[Row]]:
    """Return what docs/guide/speed.md has of inference beside other engines."""
    lines, used = [], []
    leads = []
    for shape, model in SHAPES.items():
        for task, texts in TASK_NAMES.items():
            its = _by_contender(shape, task, "16")
            ours32, ours16 = its["spafit, float32"], its["spafit, bf16"]
            leads.append(float(against(ours16, its["OpenVINO, bf16"], ".2f").split()[0]))
            cells = [
                *padding(ours32),
                _against_best(ours32, its, "float32"),
                _against_best(ours16, its, "bf16"),
                against(ours16, its["onnxruntime, int8"], ".2f"),
                against(ours16, its["OpenVINO, int8"], ".2f"),
            ]
            lines.append(f"| {model}, {texts} | {' | '.join(cells)} |")
            used.append(ours32)
    most = [
        padding(row("inference_engines", model="minilm", task=task, batch_size="16"))[1]
        for task in TASK_NAMES
    ]
    lines.append(
        f"would leave BERT-large, too, {most[0]} and {most[1]} tokens a real one, and less of its "
        f"lead of {leads[0]:.2f} and {leads[1]:.2f}."
    )
    columns = (
        *("onnxruntime, float32", "OpenVINO, float32", "spafit, float32", "OpenVINO, bf16"),
        *("spafit, bf16", "onnxruntime, int8", "OpenVINO, int8"),
    )
    for shape, model in SHAPES.items():
        for task, texts in TASK_NAMES.items():
            its = _by_contender(shape, task, "1")
            cells = [number(its[name], "p50_ms", ".3g") for name in columns]
            lines.append(f"| {model}, {texts} | {' | '.join(cells)} |")
            used.append(its["spafit, float32"])
    lines += _one_at_a_time()
    for name in ("spafit, bf16", "OpenVINO, bf16", "onnxruntime, int8", "OpenVINO, int8"):
        off = [
            float(_by_contender(shape, task, "16")[name]["largest_difference"])
            for shape in SHAPES
            for task in TASK_NAMES
        ]
        lines.append(f"{name.replace(', ', ' in ')} {min(off):.3f} to {max(off):.3f}")
    return lines, used


def padding(its: Row, batch_size: int = 16) -> list[str]:
    """Return how many rows were predicted, and the tokens of sorted, padded batches a real one."""
    [count] = map(int, re.findall(r"\d+", its["split"]))
    lengths = sorted(json.loads(LENGTHS.read_text())[its["task"]]["dev"]["lengths"][:count])
    assert len(lengths) == count
    real = float(its["tokens_per_s"]) / float(its["examples_per_s"])
    assert sum(lengths) / count == pytest.approx(real, rel=1e-3)  # the record is of these rows
    batches = [lengths[start : start + batch_size] for start in range(0, count, batch_size)]
    padded = sum(max(each) * len(each) for each in batches)
    return [str(count), f"{padded / sum(lengths):.2f}"]


def _one_at_a_time() -> list[str]:
    """Return how spafit's latency compares with OpenVINO's."""
    every = [_by_contender(shape, task, "1") for shape in SHAPES for task in TASK_NAMES]

    def shares(one: str, other: str, column: str) -> str:
        its = [float(each[one][column]) / float(each[other][column]) for each in every]
        return f"{min(its):.2f} to {max(its):.2f}"

    ours32, ours16 = "spafit, float32", "spafit, bf16"
    theirs32, theirs16 = "OpenVINO, float32", "OpenVINO, bf16"
    worst = [
        f"{number(its[ours32], 'p99_ms')} against {number(its[theirs32], 'p99_ms')} ms"
        for its in (_by_contender("base", "sst-2", "1"), _by_contender("minilm", "rte", "1"))
    ]
    counts = [int(padding(each[ours32], 1)[0]) for each in every]
    return [
        f"of {min(counts)} to {max(counts)} texts:",
        f"its median is {shares(theirs16, ours16, 'p50_ms')} of spafit's, and its 99th percentile "
        f"{shares(theirs16, ours16, 'p99_ms')}.",
        f"In float32 spafit's median is {shares(ours32, theirs32, 'p50_ms')} of OpenVINO's, but "
        f"its 99th percentile, which is that of the longest texts, "
        f"{shares(ours32, theirs32, 'p99_ms')}: on BERT-base with SST-2 {worst[0]}, on MiniLM with "
        f"RTE {worst[1]}.",
    ]


def _by_contender(shape: str, task: str, batch_size: str) -> dict[str, Row]:
    """Return the newest row of each, by its name without the version."""
    found = rows("inference_engines", model=shape, task=task, batch_size=batch_size)
    return {re.sub(r" [\d.]+,", ",", each["contender"]): each for each in found}


def _against_best(ours: Row, its: dict[str, Row], precision: str) -> str:
    """Return how many times as fast ours was as the best other engine of a precision."""
    others = {
        name: each
        for name, each in its.items()
        if f", {precision}" in name and not name.startswith("spafit")
    }
    best = min(others, key=lambda name: float(others[name]["median_time_ms"]))
    return f"{against(ours, others[best], '.2f')}, {best.split(',')[0]}"


def checkpoint() -> tuple[list[str], list[Row]]:
    ours, theirs = (
        row("checkpoint", model="large", contender=name) for name in ("spafit", "torch.save")
    )
    least, most = (float(ours[f"ratio_{key}"]) for key in ("min", "max"))
    its, torch_s = (seconds(each["median_time_ms"]) for each in (ours, theirs))
    line = (
        f"takes {number(ours, 'nbytes_mib', '.0f')} MiB and {its} on 2 CPU cores (torch.save of "
        f"the same tensors, without fsync and without reading back, takes {torch_s}; ratio "
        f"{number(ours, 'ratio', '.2f')}, {least:.2f} to {most:.2f}, "
        f"`python -m benchmarks.checkpoint`), and {seconds(ours['restore_ms'])} to load"
    )
    return [line], [ours]


BOTTLENECKS = "many_tasks_bottlenecks"


def many_tasks() -> tuple[list[str], list[Row]]:
    columns = [("cola", "1"), ("cola", "16"), ("rte", "1")]
    used = []
    lines = []
    for label, name, contender in (
        ("in turn", "many_tasks", "every: spafit, shared trunk, in turn"),
        ("mixed", "many_tasks", "every: spafit, shared trunk, mixed"),
        ("PEFT, one after the other", "many_tasks", "every: PEFT, set_adapter, no biases"),
        ("Houlsby's adapters, mixed", BOTTLENECKS, "bottlenecks: spafit, shared trunk, mixed"),
        ("the same, AdapterHub's `Parallel`", BOTTLENECKS, "bottlenecks: AdapterHub, Parallel"),
        ("each adapter its own texts, mixed", "many_tasks", "own: spafit, shared trunk, mixed"),
        ("the same, PEFT", "many_tasks", "own: PEFT, adapter_names, no biases"),
    ):
        its = [row(name, task=task, batch_size=size, contender=contender) for task, size in columns]
        used += its
        lines.append(f"| {label} | {' | '.join(map(ratio_in_hundredths, its))} |")
        if label == "in turn":
            assert all(float(each["ratio"]) >= float(each["required_ratio"]) for each in its)
    names = ("spafit", "PEFT, set_adapter, no biases")
    ours, theirs = (row("many_tasks_cost", contender=name) for name in names)
    grown = float(ours["with_adapters_mib"]) - float(ours["base_mib"])
    lines.append(
        f"A switch takes {number(ours, 'switch_ms', '.2f')} ms (PEFT's "
        f"{number(theirs, 'switch_ms')} ms), and nine adapters {grown:.0f} MiB, of which their "
        f"files have {number(ours, 'files_mib', '.0f')}."
    )
    return lines, [*used, ours]


def serving() -> tuple[list[str], list[Row]]:
    lines, used = [], []
    for callers in ("1", "8", "32"):
        cells = []
        for contender in ("spafit", "PEFT, by task", "PEFT, by request"):
            its = row("serving", callers=callers, contender=contender)
            used.append(its)
            cells.append(
                f"{number(its, 'p50_ms', '.0f')} / {number(its, 'p99_ms', '.0f')} ms, "
                f"{number(its, 'rows_per_s', '.0f')} rows/s"
            )
        lines.append(f"| {callers} | {' | '.join(cells)} |")
    return lines, used


def together() -> tuple[list[str], list[Row]]:
    plain, own, ours, on_disk = rows("together")
    assert ours["contender"] == "together" and "disk" in on_disk["contender"]
    line = (
        f"{ratio_in_hundredths(ours)} times as fast as one after the other; these are "
        f"{ratio_in_hundredths(own)} times as fast if each keeps its own states, and "
        f"{ratio_in_hundredths(on_disk)} if they share them on disk, as the cells of a grid do"
    )
    return [line], [plain]


def several_tasks() -> tuple[list[str], list[Row]]:
    found = [many_tasks(), serving(), together()]
    return [line for lines, _ in found for line in lines], [
        each for _, its in found for each in its
    ]


def forgetting() -> tuple[list[str], list[Row]]:
    every = rows("forgetting")
    lines = []
    for method in dict.fromkeys(each["method"] for each in every):
        cells = []
        for task in ("sst-2", "cola"):
            for states in ("cls", "mean"):
                its = [
                    float(each["difference"])
                    for each in every
                    if (each["method"], each["probed"], each["states"]) == (method, task, states)
                ]
                assert len(its) == 3
                cells.append(f"{statistics.mean(its):+.3f} ± {statistics.stdev(its):.3f}")
        [off] = {each["off"] for each in every if each["method"] == method}
        lines.append(f"| {method} | {off} | {' | '.join(cells)} |")
    return lines, every


def int8() -> tuple[list[str], list[Row]]:
    forms = ("spafit", "spafit, bf16", "ONNX", "ONNX, int8", "OpenVINO, int8")
    ours, half, graph, its, other = (row("onnx_int8", metric="f1", form=form) for form in forms)
    scores = [number(each, "score", ".3f") for each in (ours, half, its, other)]
    same = [number(each, "same_answers", ".1%") for each in (half, its, other)]
    assert number(other, "size_mib", ".0f") == number(its, "size_mib", ".0f")
    line = (
        f"on MRPC, where the run has an F1 of {scores[0]}, it is {scores[1]} in spafit's bf16, "
        f"{scores[2]} in onnxruntime's int8 and {scores[3]} in OpenVINO's (the same answer on "
        f"{same[0]}, {same[1]} and {same[2]} of the rows), and the file shrinks from "
        f"{number(graph, 'size_mib', '.0f')} to {number(its, 'size_mib', '.0f')} MiB"
    )
    return [line], [its]


def probes() -> tuple[list[str], list[Row]]:
    """Return the best layer of each task in docs/guide/where_to_cut.md, and the last one."""
    lines, used = [], []
    for task in ("order", "pos", "number", "depth", "sts-b", "mrpc", "rte", "cola"):
        cells = []
        for states in ("cls", "mean"):
            its = rows("probes", task=task, states=states)
            used += its
            best = max(its, key=lambda each: float(each["score"]))
            for each in (best, its[-1]):
                score = f"{number(each, 'score', '.3f')} ± {number(each, 'deviation', '.3f')}"
                cells.append(f"layer {each['layer']}: {score}" if each is best else score)
        commonest = number(used[-1], "commonest_class", ".3f")
        lines.append(f"| {task} | {' | '.join(cells)} | {commonest} |")
    return lines, used


def searched() -> list[str]:
    """Return the table of the recorded search, and what its search.json says of random choice."""
    summary = json.loads((RESULTS / "search_sts-b" / "search.json").read_text(encoding="utf-8"))
    against = {each["proposer"]: each for each in summary["comparisons"]}
    lines = []
    for each in summary["proposals"]:
        plans, scores = set(each["plans"].values()), list(each["scores"].values())
        plan = plans.pop() if len(plans) == 1 else "one a seed"
        shown = f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}"
        test = ""
        if its := against.get(each["proposer"]):
            test = f"{its['against']}: {its['test']['difference']:+.3f}, p {its['test']['p']:.3f}"
        what = f"{each['proposer']} | {plan} | {each['trainable']:,.0f} | {each['cost']} | {shown}"
        lines.append(f"| {what} | {test} |".replace("|  |", "| |"))
    return [*lines, summary["says"]]


def cutting() -> tuple[list[str], list[Row]]:
    lines, used = probes()
    return [*lines, *searched()], used


# What is measured on each page.
FIGURES = {
    "README.md": readme,
    GUIDE + "own_data.md": own_data,
    GUIDE + "several_tasks.md": several_tasks,
    GUIDE + "inspect.md": forgetting,
    GUIDE + "exchange.md": int8,
    GUIDE + "where_to_cut.md": cutting,
    GUIDE + "results.md": real_runs,
    GUIDE + "speed.md": speed,
    GUIDE + "memory.md": memory,
    GUIDE + "reliability.md": checkpoint,
}


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", FIGURES)
def test_the_figures_are_those_of_the_rows(name: str) -> None:
    lines, _ = FIGURES[name]()
    for line in lines:
        assert line in flat(PAGES[name]), line


@pytest.mark.parametrize("name", FIGURES)
def test_the_commits_of_the_rows_are_named(name: str) -> None:
    for commit in {each["commit"] for each in FIGURES[name]()[1]}:
        assert "dirty" not in commit
        assert f"`{commit}`" in PAGES[name], commit


MEASURED = re.compile(
    r"\d[\d,.]*\d? ?(?:KiB|MiB|GiB|GFLOP/s|ms|s|seconds|minutes|hours|examples/s|times|%)(?!\w)"
    r"|(?<![\w.-])\d+\.\d+(?![\w.]*\d)"
)

# What looks like a measurement and is none, or is shown by a test, or was counted by `make torture`
# at the commits that are named there.
OTHERS = (
    "arXiv 2405.00201",
    "arxiv.org/abs/2405.00201",
    "arXiv 2202.10054",
    "arxiv.org/abs/2202.10054",
    "arXiv 1905.05950",
    "arxiv.org/abs/1905.05950",
    "arXiv 1502.07943",
    "arxiv.org/abs/1502.07943",
    "22.7 million numbers",
    "SPAFIT-20%-40%-II",
    "dropout 0.1,",
    "compute capability of 7.0",
    "CPython 3.11's",
    "Weights of more than 512 MiB,",
    "A model of more than 1 GiB,",
    "on WNLI every row is 0.56,",
    "a 95 % bootstrap interval,",
    "its 95 % interval, p,",
    "(power 0.8, level 0.05,",
    "then it kills what takes more than 30 seconds to its checkpoint.",
    "every 10 minutes or",
    "an epoch, 10 minutes |",
    "a weight decay of 0.01,",
    "weight decay of matrices; of biases, too | 0.01,",
    "5.5 D + F + A·T + 4",
    "Python 3.10 to 3.13, torch 2.10 or later",
    "tested with Python 3.11.",
    "6,773 rounds in 3,600 s | resident memory 423.5 MiB after warming up, 423.5 at the end",
    "one step of 7.3 MiB, 1.7 %,",
    *(
        f"| {printed} M |"
        for printed in "333.58 9.44 12.59 4.44 5.88 3.81 5.65 7.49 4.89 31.52".split()
    ),
)


def left_over(texts: Iterable[str]) -> list[str]:
    """Return what looks like a measurement in the pages without these texts and blocks of code."""
    prose = flat(re.sub(r"^```.*?^```$", "", EVERY_PAGE, flags=re.M | re.S))
    for text in sorted(texts, key=len, reverse=True):  # the head of a table may begin another's
        assert text in prose, text
        prose = prose.replace(text, "")
    return [prose[max(0, m.start() - 60) : m.end() + 20] for m in MEASURED.finditer(prose)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It takes 3 s.", ["3 s"]),
        ("It is 4.7 times as fast; 12,345 MiB.", ["4.7 times", "12,345 MiB"]),
        ("A score of 0.9 ± 0.1, or 82 %.", ["0.9", "0.1", "82 %"]),
        ("torch 2.13.0, SPAFIT-4-9-II, r=64, 24 layers, H7, 1e-12, section 2.1.", ["2.1"]),
    ],
)
def test_what_looks_like_a_measurement(text: str, found: list[str]) -> None:
    assert [match[0] for match in MEASURED.finditer(text)] == found


def test_there_are_no_other_measurements() -> None:
    built = [line for each in FIGURES.values() for line in each()[0]]
    assert left_over([*built, *OTHERS]) == []
