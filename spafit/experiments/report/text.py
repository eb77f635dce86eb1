"""A report as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence

from spafit.errors import one_line
from spafit.experiments.report.statistics import LEVEL, MOST_SEEDS
from spafit.experiments.report.tables import (
    Agreement,
    Cell,
    Comparison,
    Report,
    Row,
    Shares,
    Task,
)

RULES = {
    "scores": "mean ± standard deviation over seeds, and the best run, of each run at its best "
    "epoch on dev; the majority baseline is always the commonest class, or the mean score",
    "tests": "paired t-test over the seeds that both have; the difference is that of the first "
    "minus the other's, with its 95 % interval; needed: seeds with which a difference of this size "
    "and spread would be seen (power 0.8, level 0.05, by the noncentral t distribution)",
    "chosen": "The first is, among the SPAFITs that were run on the most tasks, the one with the "
    "best mean on these same scores, which favours it: the best of several equal methods looks "
    "better than they are.",
    "p": "p values are not corrected for the number of tests.",
    "agreement": "share of dev examples on which two seeds of a method give the same answer, "
    "beside what chance alone would give seeds that answer each label as often (r: Pearson's "
    "correlation of their scores), as the mean over all pairs of seeds",
    "shares": "shares of the sum of squares by main effects, each beside what chance alone would "
    "give it on average; the rest is what they leave together: interactions, and chance",
    "costs": "medians over the runs on the tasks that every method has, on the machines that ran "
    "them",
    "choices": "runs that only choose a learning rate, by their scores on dev, and whether a "
    "method is reported with it",
}
"""What the numbers of each table are."""


def millions(count: int) -> str:
    """Return a number of parameters in millions: two decimals, or three digits below one."""
    if count >= 1_000_000 or count == 0:
        return f"{count / 1e6:.2f}"
    digits = 2 - math.floor(math.log10(count / 1e6))
    return f"{count / 1e6:.{digits}f}"


def parameters(row: Row) -> str:
    """Return what a row trains in millions; both ends where its heads differ enough to show."""
    low, high = (millions(count) for count in row.trainable)
    return low if low == high else f"{low}-{high}"


def number(value: float | None, places: int = 3) -> str:
    """Return a score, or nothing; no minus sign before 0."""
    if value is None:
        return ""
    text = f"{value:.{places}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def amount(value: float) -> str:
    """Return a time, a speed or a memory, with two digits at least."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def cell_text(cell: Cell | None) -> str:
    """Return a cell of the table: 0.712 ± 0.010 (0.723), and what the paper prints."""
    if cell is None:
        return ""
    spread = cell.spread
    if spread.deviation is None:
        text = number(spread.mean)
    else:
        text = f"{number(spread.mean)} ± {number(spread.deviation)} ({number(cell.best)})"
    return text if cell.paper is None else f"{text}; paper {cell.paper:.2f}"


def seeds_text(row: Row) -> str:
    """Return how many runs a cell of a row has."""
    counts = sorted({cell.spread.n for cell in row.cells.values()})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"


def head(task: Task) -> str:
    """Return the head of a task's column."""
    return f"{task.display} ({task.metric})"


def p_text(p: float | None) -> str:
    """Return a p value with three places, or four below 0.001, and none below 0.0001."""
    if p is None:
        return "no spread"
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def agreement_text(each: Agreement | None) -> str:
    """Return an agreement in percent, beside that of chance, or the correlation of scores."""
    if each is None:
        return ""
    if each.value is None:
        return "no correlation"
    if each.by_chance is None:
        return f"r = {each.value:.3f}"
    return f"{100 * each.value:.1f} %, by chance {100 * each.by_chance:.1f} %"


def needed_text(each: Comparison) -> str:
    """Return the number of seeds that would be needed, in words where there is none."""
    if each.test is None or each.test.p is None:
        return ""
    needed = each.test.needed
    return f"over {MOST_SEEDS:,}" if needed is None else f"{needed:,}"


def outcome(each: Comparison) -> str:
    """Return whether the first is better, where the test sees a difference at level 0.05."""
    test = each.test
    if test is None:
        return "no test"
    if test.p is None:
        return "no test" if test.difference else "the same"
    if test.p >= LEVEL:
        return "no difference seen"
    return "better" if test.difference * each.sign > 0 else "worse"


COMPARISON_HEADS = "against|on|seeds|difference|95 % interval|p|needed|outcome".split("|")


def comparison_cells(each: Comparison) -> list[str]:
    """Return a comparison as the cells of a table."""
    test = each.test
    if test is None:
        return [each.other, each.on, str(each.seeds), "", "", "", "", outcome(each)]
    return [
        each.other,
        each.on,
        str(each.seeds),
        f"{'+' if test.difference > 0 else ''}{number(test.difference)}",
        "" if test.p is None else f"{number(test.low)} to {number(test.high)}",
        p_text(test.p),
        needed_text(each),
        outcome(each),
    ]


def main_table(report: Report) -> list[list[str]]:
    """Return Table 2's form: a head, the majority, a row a method."""
    has_mean = any(row.mean is not None for row in report.rows)
    heads = ["method", "params (M)", "seeds", *map(head, report.tasks), *(["mean"] * has_mean)]
    majority = ["majority baseline", "", "", *(number(task.majority) for task in report.tasks)]
    rows = [
        [
            row.label,
            parameters(row),
            seeds_text(row),
            *(cell_text(row.cells.get(task.name)) for task in report.tasks),
            *([number(row.mean)] * has_mean),
        ]
        for row in report.rows
    ]
    return [heads, majority + [""] * has_mean, *rows]


Table = tuple[str, str, list[list[str]]]
"""A title, what the numbers are, and the rows with their head."""


def other_tables(report: Report) -> list[Table]:
    """Return the other tables, those that have rows."""
    tables = (
        _comparisons(report),
        _agreements(report),
        _shares(report),
        _costs(report),
        _choices(report),
        _anchors(report),
        _left_out(report),
    )
    return [(title, rules, rows) for title, rules, rows in tables if len(rows) > 1]


def _comparisons(report: Report) -> Table:
    rows = [COMPARISON_HEADS, *map(comparison_cells, report.comparisons)]
    chosen = "" if report.is_named else f"{RULES['chosen']} "
    return f"{report.ours} against the others", f"{RULES['tests']}. {chosen}{RULES['p']}", rows


def _agreements(report: Report) -> Table:
    rows = [["method", *(task.display for task in report.tasks)]]
    for label in dict.fromkeys(each.label for each in report.agreements):
        by_task = {each.task: each for each in report.agreements if each.label == label}
        shown = (agreement_text(by_task.get(task.display)) for task in report.tasks)
        rows.append([label, *shown])
    return "Agreement of two seeds", RULES["agreement"], rows


def _shares(report: Report) -> Table:
    names = list(dict.fromkeys(name for each in report.shares for name in each.levels))
    rows = [["method", "task", "deviation", *names, "rest"]]
    for part in report.shares:
        shown = (
            f"{_share(part, name)} ({part.levels[name]} seeds)" if name in part.shares else ""
            for name in names
        )
        deviation = number(part.deviation, 4)
        rows.append([part.label, part.task, deviation, *shown, _share(part, "rest")])
    return "Where the spread comes from", RULES["shares"], rows


def _costs(report: Report) -> Table:
    costs = {
        "seconds a run": [row.seconds for row in report.rows],
        "examples/s in training": [row.examples_per_s for row in report.rows],
        "peak memory (MiB)": [row.peak_memory_mib for row in report.rows],
    }
    known = {
        head: found for head, found in costs.items() if any(each is not None for each in found)
    }
    rows = [["method", *known]]
    for row, *found in zip(report.rows, *known.values(), strict=True):
        if any(cost is not None for cost in found):
            rows.append([row.label, *("" if cost is None else amount(cost) for cost in found)])
    return "Time and memory", RULES["costs"], rows


def _choices(report: Report) -> Table:
    names = list(dict.fromkeys(name for each in report.choices for name in each.scores))
    rows = [["method", "learning rate", *names, "mean", "reported"]]
    for tried in report.choices:
        scores = [number(tried.scores.get(name)) for name in names]
        taken = "yes" if tried.is_taken else ""
        rows.append([tried.label, f"{tried.rate:g}", *scores, number(tried.mean), taken])
    return "Learning rates tried", RULES["choices"], rows


def _anchors(report: Report) -> Table:
    rows = [["published", *(task.display for task in report.tasks), "source"]]
    for anchor in report.anchors:
        found = [
            ", ".join(
                f"{name} {value:.3f}" for name, value in anchor.scores.get(task.name, {}).items()
            )
            for task in report.tasks
        ]
        rows.append([anchor.what, *found, anchor.source])
    return "Scores of others with BERT-large", "on dev, as published", rows


def _left_out(report: Report) -> Table:
    rows = [["run", "why"], *map(list, report.left_out)]
    return "Runs that are not reported", "unfinished, failed, damaged or repeated", rows


def _share(part: Shares, name: str) -> str:
    share, by_chance = part.shares[name]
    return f"{100 * share:.0f} %, by chance {100 * by_chance:.0f} %"


def summary_line(report: Report) -> str:
    """Return how many runs there are, in one sentence."""
    tasks = ", ".join(task.display for task in report.tasks)
    others = len(report.left_out)
    left = f"; {others} other{' is' if others == 1 else 's are'} not reported" if others else ""
    runs = f"{report.runs} finished run{'s' * (report.runs != 1)}"
    methods = f"{len(report.rows)} method{'s' * (len(report.rows) != 1)}"
    return f"{runs} of {methods} on {tasks or 'no task'}{left}."


def paper_line(report: Report) -> str:
    """Return what the paper's numbers are, if the table has some."""
    if not any(cell.paper is not None for row in report.rows for cell in row.cells.values()):
        return ""
    return (
        " The paper (arXiv 2405.00201, Table 2) reports the maximum of all its runs, to two places."
    )


def markdown(report: Report) -> str:
    """Return the report in Markdown, with the tables aligned for a terminal."""
    lines = [f"# Report on {_md(report.title)}", "", _md(summary_line(report)), ""]
    if report.rows:
        lines += [*_md_table(main_table(report)), "", f"Scores on dev: {RULES['scores']}."]
        lines[-1] += paper_line(report)
    for title, rules, rows in other_tables(report):
        lines += ["", f"## {_md(title)}", "", *_md_table(rows), "", f"({rules})"]
    if report.notes:
        lines += ["", "## Notes", "", *(f"- {_md(note)}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    """Return text that Markdown shows as it is; an underscore within a word needs nothing."""
    return re.sub(r"([\\`*\[\]<>|#&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_line(text, 1000))


def _md_table(rows: Sequence[Sequence[str]]) -> list[str]:
    shown = [[_md(cell) for cell in row] for row in rows]
    wide = [max(3, *(len(row[k]) for row in shown)) for k in range(len(shown[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, wide)) + " |" for row in shown]
    return [lines[0], "|" + "|".join("-" * (each + 2) for each in wide) + "|", *lines[1:]]


def comma_separated(report: Report) -> str:
    """Return the scores as CSV, a row for each method and task, with all digits.

    The row is of the task's first metric; of further metrics, mean and deviation have columns of
    their own.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    first = {task.name: task.metric for task in report.tasks}
    further = dict.fromkeys(
        metric
        for row in report.rows
        for task, cell in row.cells.items()
        for metric in cell.metrics
        if metric != first[task]
    )
    writer.writerow(
        "method trainable task metric seeds n mean standard_deviation minimum maximum majority "
        "paper".split()
        + [f"{name}_{what}" for name in further for what in ("mean", "standard_deviation")]
    )
    for row in report.rows:
        for task in report.tasks:
            cell = row.cells.get(task.name)
            if cell is None:
                continue
            spread = cell.spread
            others = [cell.metrics.get(name) for name in further]
            writer.writerow(
                [
                    row.label,
                    cell.trainable[1] if cell.trainable[0] == cell.trainable[1] else "varies",
                    task.name,
                    task.metric,
                    " ".join(cell.seeds),
                    spread.n,
                    spread.mean,
                    spread.deviation,
                    spread.minimum,
                    spread.maximum,
                    task.majority,
                    cell.paper,
                    *(
                        value
                        for each in others
                        for value in ((each.mean, each.deviation) if each else (None, None))
                    ),
                ]
            )
    return file.getvalue()


_TEX = {
    **{each: f"\\{each}" for each in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "³": r"\textsuperscript{3}",
    "[": "{[}",  # after a line's end it would be an option of it
    "]": "{]}",
}


def tex(text: str) -> str:
    """Return text that LaTeX typesets as it is; what is not in Latin-1 becomes a question mark."""
    return "".join(_TEX.get(each, each if each <= "ÿ" else "?") for each in text)


def latex(report: Report) -> str:
    """Return the table in LaTeX, with booktabs."""
    rows = main_table(report)
    columns = "lrr" + "c" * (len(rows[0]) - 3)
    lines = [
        "% \\usepackage{booktabs,graphicx} \\usepackage[T1]{fontenc}",
        "\\begin{table}",
        "\\centering",
        "\\resizebox{\\textwidth}{!}{%",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        f"{_tex_row(rows[0])}",
        "\\midrule",
        f"{_tex_row(rows[1])}",
        "\\midrule",
        *map(_tex_row, rows[2:]),
        "\\bottomrule",
        "\\end{tabular}}",
        f"\\caption{{Scores on dev: {tex(RULES['scores'])}.{tex(paper_line(report))}}}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(tex, cells)) + r" \\"
