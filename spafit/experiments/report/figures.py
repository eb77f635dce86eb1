"""The figures of a report as SVG, made here: no library, nothing to load.

Each is 340 units wide, so that its text keeps its size on a phone. A method has the same marker,
dashes and colour in all of them, and its name with them: none is told by its colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from spafit.experiments.report.tables import Curve, Report, Row, Task
from spafit.experiments.report.text import amount, number

WIDTH = 340
_SIZE, _LINE, _LEGEND, _WIDEST = 10.5, 13.0, 15.0, 124.0
"""The size of letters, the height of a line of names beside a figure and below, and the most room
beside."""

_NARROW, _BROAD = set(" !'(),-./:;I[]fijlrt|"), set("%&+<=>@GMOQWmw~^_")

_MARKERS = ("circle", "square", "up", "diamond", "down", "cross", "plus", "star")
_DASHES = (
    *("", "6 3", "2 3", "8 3 2 3", "4 2", "10 4", "1 3", "6 2 1 2 1 2"),
    *("18 9", "6 8", "2 7", "12 3 2 3 2 3", "4 5", "14 4 6 4", "1 6", "8 2 8 6"),
)
"""Of sixteen methods no two have the same: the markers of the second eight are hollow."""


def _f(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(
    x: float, y: float, text: str, anchor: str = "start", kind: str = "label", full: str = ""
) -> str:
    title = f"<title>{escape(full)}</title>" if full and full != text else ""
    return (
        f'<text x="{_f(x)}" y="{_f(y)}" text-anchor="{anchor}" class="{kind}">'
        f"{escape(text)}{title}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path d="M{_f(x1)} {_f(y1)}L{_f(x2)} {_f(y2)}" class="{kind}"/>'


def width_of(label: str) -> float:
    """Return about how wide a label is: at least as wide as in the fonts that browsers have."""
    return _SIZE * sum(
        0.4 if each in _NARROW else 0.85 if each in _BROAD or each > "ſ" else 0.66 for each in label
    )


def short(label: str, room: float = _WIDEST) -> str:
    """Return a label that has room beside a figure; the settings at its end tell most."""
    kept, whole = len(label), label
    while width_of(label) > room:
        kept -= 1
        label = f"{whole[:3]}…{whole[3 - kept :]}"
    return label


def marker(place: int, x: float, y: float, title: str = "") -> str:
    """Return the marker of the method in this place of the table; after eight they are hollow.

    Every shape has an area, so that one can see whether it is.
    """
    shape, kind = _MARKERS[place % 8], f"m c{place % 8}" + (" hollow" if place // 8 % 2 else "")
    r = 4.2
    paths = {
        "square": f"M{_f(x - 3.6)} {_f(y - 3.6)}h7.2v7.2h-7.2z",
        "up": f"M{_f(x)} {_f(y - 4.8)}l4.6 8.2h-9.2z",
        "down": f"M{_f(x)} {_f(y + 4.8)}l4.6 -8.2h-9.2z",
        "diamond": f"M{_f(x)} {_f(y - 5)}l5 5l-5 5l-5 -5z",
        "cross": f"M{_f(x)} {_f(y - 2.4)}l2.6 -2.6l2.4 2.4l-2.6 2.6l2.6 2.6l-2.4 2.4l-2.6 -2.6"
        "l-2.6 2.6l-2.4 -2.4l2.6 -2.6l-2.6 -2.6l2.4 -2.4z",
        "plus": f"M{_f(x - 1.7)} {_f(y - 5)}h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
        "star": "M"
        + "L".join(
            f"{_f(x + r * 1.25 * math.sin(k * math.pi / 5) * (1, 0.45)[k % 2])} "
            f"{_f(y - r * 1.25 * math.cos(k * math.pi / 5) * (1, 0.45)[k % 2])}"
            for k in range(10)
        )
        + "z",
    }
    inside = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{_f(x)}" cy="{_f(y)}" r="{r}" class="{kind}">{inside}</circle>'
    return f'<path d="{paths[shape]}" class="{kind}">{inside}</path>'


def _svg(height: float, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {_f(height)}" role="img" aria-label="{escape(title)}">'
        f"{''.join(body)}</svg>"
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers within [low, high], at most so many, in steps of 1, 2 or 5 · 10^k."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """A plane of scores: y from ``low`` to ``high``, x by a function of the caller."""

    def __init__(self, scores: Sequence[float], majority: float, height: float, right: float):
        low, high = min(scores), max(scores)
        room = max(high - low, 0.02)
        if low - 0.6 * room <= majority <= high + 0.6 * room:
            low, high = min(low, majority), max(high, majority)
        self.low, self.high = low - 0.06 * room, high + 0.1 * room
        self.left, self.right, self.top, self.bottom = 40.0, right, 26.0, height - 36.0
        self.majority = majority

    def y(self, score: float) -> float:
        share = (score - self.low) / (self.high - self.low)
        return self.bottom - share * (self.bottom - self.top)

    def frame(self, y_title: str, x_title: str) -> list[str]:
        """Return the grid, the numbers at it, and what the axes are."""
        parts = [_text(2, 13, y_title, kind="axis")]
        marks = ticks(self.low, self.high)
        places = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9)) if marks[1:] else 3
        for score in marks:
            y = self.y(score)
            parts += [_line(self.left, y, self.right, y, "grid")]
            parts += [_text(self.left - 5, y + 3.5, number(score, places), "end", "tick")]
        parts.append(_line(self.left, self.bottom, self.right, self.bottom, "base"))
        middle = (self.left + self.right) / 2
        parts.append(_text(middle, self.bottom + 31, x_title, "middle", "axis"))
        if self.low <= self.majority <= self.high:
            y = self.y(self.majority)
            parts.append(_line(self.left, y, self.right, y, "majority"))
        return parts

    def majority_label(self) -> str:
        if not self.low <= self.majority <= self.high:
            is_below = self.majority < self.low
            y = self.bottom - 4 if is_below else self.top + 8
            said = f"majority {number(self.majority)}, {'below' if is_below else 'above'}"
            return _text(self.left + 3, y, said, kind="note")
        return _text(self.left + 3, self.y(self.majority) - 3, "majority", kind="note")


def curves(task: Task, found: Sequence[Curve], places: dict[str, int]) -> str:
    """Draw the score on dev by epoch: the mean over seeds, with a band of ± one deviation."""
    height = max(230.0, _LINE * len(found) + 70)
    longest = max(width_of(short(curve.label)) for curve in found)
    axes = _Axes(
        [
            spread.mean + sign * (spread.deviation or 0.0)
            for curve in found
            for _, spread in curve.points
            for sign in (-1, 1)
        ],
        task.majority,
        height,
        WIDTH - longest - 22,
    )
    epochs = [epoch for curve in found for epoch, _ in curve.points]
    first, last = min(epochs), max(max(epochs), min(epochs) + 1)
    inner = axes.left + 7, axes.right - 7

    def x(epoch: float) -> float:
        return inner[0] + (inner[1] - inner[0]) * (epoch - first) / (last - first)

    body = axes.frame(f"{task.metric} on dev", "epoch")
    step = max(1, math.ceil((last - first) / 8))
    for epoch in range(first, max(epochs) + 1, step):
        body.append(_text(x(epoch), axes.bottom + 15, str(epoch), "middle", "tick"))
    for curve in found:  # bands behind all lines
        kind = f"band c{places[curve.label] % 8}"
        if any(spread.deviation for _, spread in curve.points):
            ways = ((curve.points, 1), (curve.points[::-1], -1))
            corners = " ".join(
                f"{_f(x(epoch))},{_f(axes.y(spread.mean + sign * (spread.deviation or 0.0)))}"
                for points, sign in ways
                for epoch, spread in points
            )
            body.append(f'<polygon points="{corners}" class="{kind}"/>')
    for curve in found:
        place = places[curve.label]
        line = " ".join(f"{_f(x(e))},{_f(axes.y(spread.mean))}" for e, spread in curve.points)
        dash = _DASHES[place % 16]
        body.append(f'<polyline points="{line}" stroke-dasharray="{dash}" class="l c{place % 8}"/>')
        every = max(1, math.ceil(len(curve.points) / 6))
        for epoch, spread in curve.points[::-1][::every]:
            title = f"{curve.label}, epoch {epoch}: {_shown(spread.mean, spread.deviation)}"
            body.append(marker(place, x(epoch), axes.y(spread.mean), title))
    ends = [axes.y(curve.points[-1][1].mean) for curve in found]
    for curve, end, y in zip(found, ends, apart(ends, _LINE, 8, axes.bottom + 4), strict=True):
        place = places[curve.label]
        from_x = x(curve.points[-1][0]) + 5
        body.append(_line(from_x, end, axes.right + 6, y, "leader"))
        body.append(marker(place, axes.right + 12, y))
        body.append(_text(axes.right + 20, y + 3.5, short(curve.label), full=curve.label))
    body.append(axes.majority_label())
    return _svg(height, f"{task.metric} on dev of {task.display} by epoch", body)


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart until neighbours have a gap: as little as possible, in [low, high].

    The least squares of the moves, by pooling neighbours that are too near.
    """
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    blocks: list[list[float]] = []  # of places less the gaps before them: they may not fall
    for before, k in enumerate(order):
        blocks.append([wanted[k] - gap * before])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    pooled = [_mean(block) for block in blocks for _ in block]
    highest = high - gap * (len(wanted) - 1)
    placed = [0.0] * len(wanted)
    for before, (k, value) in enumerate(zip(order, pooled, strict=True)):
        placed[k] = max(low, min(value, highest)) + gap * before
    return placed


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _shown(mean: float, deviation: float | None) -> str:
    return number(mean) if deviation is None else f"{number(mean)} ± {number(deviation)}"


@dataclass(frozen=True)
class _Point:
    """A method's place in a plane of sizes."""

    label: str
    trainable: int
    mean: float
    deviation: float | None


def sizes(task: Task, rows: Sequence[Row], places: dict[str, int]) -> str:
    """Draw how many numbers train (on a logarithmic axis) against the score."""
    cells = [(row.label, row.cells[task.name]) for row in rows if task.name in row.cells]
    return _sizes(
        f"{task.metric} on dev",
        f"numbers that train and {task.metric} on dev of {task.display}",
        [
            _Point(label, cell.trainable[1], cell.spread.mean, cell.spread.deviation)
            for label, cell in cells
        ],
        task.majority,
        places,
        task.sign,
    )


def sizes_of_all(report: Report, places: dict[str, int]) -> str:
    """Draw how many numbers train against the mean score over all tasks; or nothing."""
    points = [
        _Point(row.label, row.trainable[1], row.mean, row.deviation)
        for row in report.rows
        if row.mean is not None
    ]
    if not points:
        return ""
    majority = sum(task.majority for task in report.tasks) / len(report.tasks)
    title = f"mean score on dev of {len(report.tasks)} tasks"
    return _sizes(title, f"numbers that train and {title}", points, majority, places, 1)


def _sizes(
    y_title: str,
    title: str,
    points: Sequence[_Point],
    majority: float,
    places: dict[str, int],
    sign: int,
) -> str:
    """Draw the plane, and below it the markers with their names, the best score first."""
    ends = [p.mean + side * (p.deviation or 0) for p in points for side in (-1, 1)]
    axes = _Axes(ends, majority, 260.0, WIDTH - 8.0)
    counts = [max(1, p.trainable) for p in points]
    low, high = math.log10(min(counts)) - 0.3, math.log10(max(counts)) + 0.3

    def x(count: int) -> float:
        share = (math.log10(max(1, count)) - low) / (high - low)
        return axes.left + 8 + share * (axes.right - axes.left - 16)

    body = axes.frame(y_title, "numbers that train (logarithmic)")
    for count in round_counts(10**low, 10**high):
        at = x(count)
        body.append(_line(at, axes.top, at, axes.bottom, "grid"))
        body.append(_text(at, axes.bottom + 15, amount_of(count), "middle", "tick"))
    for p in points:  # behind all markers
        if p.deviation:
            top, bottom = axes.y(p.mean + p.deviation), axes.y(p.mean - p.deviation)
            at = x(p.trainable)
            body.append(_line(at, top, at, bottom, f"error c{places[p.label] % 8}"))
    for p in points:
        said = f"{p.label}: {_shown(p.mean, p.deviation)}, {p.trainable:,} numbers"
        body.append(marker(places[p.label], x(p.trainable), axes.y(p.mean), said))
    body.append(axes.majority_label())
    best_first = sorted(points, key=lambda p: -sign * p.mean)
    columns = 2 if max(width_of(p.label) for p in points) < WIDTH / 2 - 24 else 1
    wide, in_a_column = WIDTH / columns, math.ceil(len(points) / columns)
    for k, p in enumerate(best_first):
        column, line = divmod(k, in_a_column)
        left, middle = 12 + column * wide, 276 + _LEGEND * line
        body.append(marker(places[p.label], left, middle))
        body.append(_text(left + 10, middle + 3.5, short(p.label, wide - 24), full=p.label))
    return _svg(272 + _LEGEND * in_a_column, title, body)


def round_counts(low: float, high: float) -> list[int]:
    """Return the powers of ten in [low, high], or where these are few 2 and 5 times them, too."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), range(1, 10)):
        found = [n * 10**power for power in powers if power >= 0 for n in factors]
        if sum(low <= count <= high for count in found) > 1:
            break
    return [count for count in found if low <= count <= high]


def amount_of(count: int) -> str:
    """Return a round number of parameters in short: 20k, 1M."""
    unit, name = next((u, n) for u, n in ((9, "G"), (6, "M"), (3, "k"), (0, "")) if count >= 10**u)
    return f"{count // 10**unit}{name}"


def bars(title: str, unit: str, values: Sequence[tuple[str, float]]) -> str:
    """Draw a bar for each method, with its number."""
    left = max(width_of(short(label)) for label, _ in values) + 8
    most = max(value for _, value in values) or 1.0
    room = WIDTH - left - 52
    body = [_text(2, 13, f"{title} ({unit})", kind="axis")]
    for k, (label, value) in enumerate(values):
        y = 24 + 20 * k
        body.append(_text(left - 6, y + 11, short(label), "end", full=label))
        wide = max(1.0, room * value / most)
        body.append(
            f'<rect x="{_f(left)}" y="{y + 1}" width="{_f(wide)}" height="14" class="bar"/>'
        )
        body.append(_text(left + wide + 5, y + 11, amount(value), kind="tick"))
    return _svg(30 + 20 * len(values), f"{title} by method", body)
