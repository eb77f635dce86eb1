"""A report as one HTML page that needs nothing else: no network, no other file.

No script is needed to read it.

Colours are never all that tells two methods apart; the page follows the reader's choice of light
or dark, fits a phone, and prints. Text from outside is escaped, and a policy in the page's head
forbids it to load anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from spafit.experiments.report import figures
from spafit.experiments.report.tables import Report
from spafit.experiments.report.text import (
    RULES,
    main_table,
    other_tables,
    paper_line,
    summary_line,
)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_SCORE = re.compile(r"([-0-9.]+(?: ± [0-9.]+)?)(?: \(([-0-9.]+)\))?(?:; (paper [0-9.]+))?")
_NUMBER = re.compile(r"(?:< |over |r = |\+)?(-?[0-9][0-9,]*(?:\.[0-9]+)?(?:e-?[0-9]+)?)(?![\w.])")


def html(report: Report) -> str:
    """Return the page."""
    here = Path(__file__)
    style, script = (here.with_name(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    title = f"Report on {report.title}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{style}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>{escape(summary_line(report))}</p>",
        *_figures_of_sizes(report),
    ]
    if report.rows:
        rules = f"On dev: {RULES['scores']}.{paper_line(report)}"
        parts += ["<h2>Scores</h2>", _rules(rules), _table("Scores", main_table(report), base=1)]
    parts += _figures_of_curves(report)
    for name, rules, rows in other_tables(report):
        parts.append(f"<h2>{escape(name)}</h2>")
        if name == "Time and memory":
            parts += _figures_of_costs(report)
        parts += [_rules(f"{rules[0].upper()}{rules[1:]}."), _table(name, rows)]
    if report.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
        parts.append(f"<h2>Notes</h2><ul>{notes}</ul>")
    parts.append(f"<script>{script}</script></body></html>")
    return "\n".join(parts) + "\n"


def _rules(text: str) -> str:
    return f'<p class="rules">{escape(text.replace("..", "."))}</p>'


def _table(name: str, rows: Sequence[Sequence[str]], base: int = 0) -> str:
    """Return a table; so many rows after its head stay on top when it is sorted."""
    head, *body = rows
    columns = list(zip(*body, strict=True))
    # A column of numbers stands to the right; a long text is broken.
    kinds = [
        "n" if k and any(map(_NUMBER.match, column)) else _long(column)
        for k, column in enumerate(columns)
    ]
    cells = [
        f'<th scope="col"{_class(kind)}>{escape(text)}</th>'
        for text, kind in zip(head, kinds, strict=True)
    ]
    lines = []
    for number, row in enumerate(body):
        first, *others = row
        is_base = ' class="base"' if number < base else ""
        inside = f'<th scope="row"{_class(kinds[0])}>{escape(first)}</th>'
        inside += "".join(map(_cell, others, kinds[1:]))
        lines.append(f"<tr{is_base}>{inside}</tr>")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}"><table>'
        f"<thead><tr>{''.join(cells)}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _long(column: Sequence[str]) -> str:
    return "long" if max(map(len, column)) > 40 else ""


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _cell(text: str, kind: str) -> str:
    """Return a cell; what follows the mean of a score is smaller, below it."""
    value = _NUMBER.match(text) if kind == "n" else None
    sort = f' data-v="{value[1].replace(",", "")}"' if value else ""
    shown = escape(text)
    parts = _SCORE.fullmatch(text)
    if parts and (parts[2] or parts[3]):
        mean, best, paper = parts.groups("")
        below = "; ".join(filter(None, (best and f"best {best}", paper)))
        shown = f"{mean} <small>{below}</small>"
    return f"<td{_class(kind)}{sort}>{shown}</td>"


def _places(report: Report) -> dict[str, int]:
    return {row.label: place for place, row in enumerate(report.rows)}


def _figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


def _figures_of_sizes(report: Report) -> list[str]:
    places = _places(report)
    drawn = []
    if of_all := figures.sizes_of_all(report, places):
        drawn.append(_figure("All tasks", of_all))
    drawn += [
        _figure(task.display, figures.sizes(task, report.rows, places)) for task in report.tasks
    ]
    rules = (
        "The mean over seeds, with ± one standard deviation; dotted: the majority's score. The "
        "names follow the scores, from the best down the first column."
    )
    return _under("What trains, and what comes of it", rules, drawn)


def _figures_of_curves(report: Report) -> list[str]:
    places = _places(report)
    drawn = [
        _figure(task.display, figures.curves(task, report.curves[task.name], places))
        for task in report.tasks
        if report.curves[task.name]
    ]
    rules = "The mean over seeds, in a band of ± one standard deviation; dotted: the majority."
    return _under("Learning curves", rules, drawn)


def _under(title: str, rules: str, drawn: list[str]) -> list[str]:
    """Return figures under a heading, if there are any."""
    if not drawn:
        return []
    return [f"<h2>{title}</h2>", _rules(rules), f'<div class="figures">{"".join(drawn)}</div>']


def _figures_of_costs(report: Report) -> list[str]:
    kinds = (
        ("Time", "a whole run", "seconds", [(row.label, row.seconds) for row in report.rows]),
        ("Memory", "at the peak", "MiB", [(row.label, row.peak_memory_mib) for row in report.rows]),
    )
    drawn = []
    for caption, title, unit, costs in kinds:
        known = [(label, cost) for label, cost in costs if cost is not None]
        if known:
            drawn.append(_figure(caption, figures.bars(title, unit, known)))
    return [f'<div class="figures">{"".join(drawn)}</div>']
