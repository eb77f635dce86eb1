"""Where the figures of a report have their points.

Oracle: the scale of the numbers at the axes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any
from xml.parsers import expat

import numpy as np
import pytest
from support.written_runs import write_run

from spafit.experiments.report import figures
from spafit.experiments.report.tables import Report, make_report

Elements = list[tuple[str, dict[str, str], str]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Nine methods, one for each marker and a hollow one, on two tasks with two seeds each."""
    folder = tmp_path_factory.mktemp("figures")
    for place in range(9):
        for task, seed in (("rte", 0), ("rte", 1), ("cola", 0), ("cola", 1)):
            score = 0.6 + (place * 5 % 9) / 90 + seed / 40 + (task == "cola") * place / 100
            write_run(
                folder / task / str(place) / str(seed),
                score,
                task=task,
                seed=seed,
                method=f"Method {place}",
                trainable=3 * 5**place,
            )
    return make_report(folder)


@pytest.fixture(scope="module")
def places(report: Report) -> dict[str, int]:
    return {row.label: place for place, row in enumerate(report.rows)}


def elements(svg: str) -> Elements:
    """Return the elements: name, attributes, and the text inside, titles included."""
    found: Elements = []
    parser = expat.ParserCreate()

    def end(text: str) -> None:
        name, attributes, before = found[-1]
        found[-1] = name, attributes, before + text

    parser.StartElementHandler = lambda name, attributes: found.append((name, attributes, ""))
    parser.CharacterDataHandler = end
    parser.Parse(svg, True)
    return found


def numbers(text: str) -> list[tuple[float, float]]:
    """Return the points of a polyline, or of a path with absolute places alone."""
    found = list(map(float, re.findall(r"-?[\d.]+", text)))
    return list(zip(found[::2], found[1::2], strict=True))


def scale(ticks: list[tuple[float, float]]) -> Any:
    """Return the affine scale of numbers at an axis, which they follow to a tenth of a unit."""
    assert len(ticks) > 1
    values, where = np.transpose(ticks)
    line = np.polyfit(values, where, 1)
    assert np.polyval(line, values) == pytest.approx(where, abs=0.1)
    return lambda value: float(np.polyval(line, value))


def axes(svg: str) -> tuple[list[tuple[float, float]], Any]:
    """Return the numbers that are written along x with their places, and the scale of y."""
    units = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
    across, upwards = [], []
    for name, attributes, text in elements(svg):
        if name == "text" and attributes["class"] == "tick":
            [(value, unit)] = re.findall(r"([\d.]+)([kMG]?)", text)
            if attributes["text-anchor"] == "middle":
                across.append((float(value) * units[unit], float(attributes["x"])))
            else:  # its line is 3.5 above the foot of its letters
                upwards.append((float(value), float(attributes["y"]) - 3.5))
    return across, scale(upwards)


def spots(svg: str, places: dict[str, int]) -> dict[str, list[tuple[float, float]]]:
    """Return where the markers with a title stand, by the label in it."""
    found: dict[str, list[tuple[float, float]]] = {}
    for (_, marker, _), (inside, _, title) in itertools.pairwise(elements(svg)):
        if marker.get("class", "").startswith("m ") and inside == "title":
            label = re.split("[:,]", title)[0]
            [(_, origin, _)] = elements(figures.marker(places[label], 0, 0))
            (x, y), (x0, y0) = begin(marker), begin(origin)
            found.setdefault(label, []).append((x - x0, y - y0))
    return found


def begin(marker: dict[str, str]) -> tuple[float, float]:
    """Return the centre of a circle, or the first point of a path."""
    if "d" in marker:
        return numbers(re.split("[a-zL]", marker["d"])[0])[0]
    return float(marker["cx"]), float(marker["cy"])


def near(x: float, y: float) -> Any:
    return pytest.approx((x, y), abs=0.2)


def test_what_trains_against_the_score(report: Report, places: dict[str, int]) -> None:
    """On a logarithmic axis, y upwards: of both tasks, and of the mean over them."""
    rows = report.rows
    means, deviations = [row.mean for row in rows], [row.deviation for row in rows]
    drawn = [(figures.sizes_of_all(report, places), means, deviations)]
    for task in report.tasks:
        spreads = [row.cells[task.name].spread for row in report.rows]
        svg = figures.sizes(task, report.rows, places)
        drawn.append((svg, [each.mean for each in spreads], [each.deviation for each in spreads]))
    assert len(drawn) == 3 and all(deviations)
    for svg, means, deviations in drawn:
        ticks, y = axes(svg)
        x = scale([(math.log10(value), where) for value, where in ticks])
        assert x(2) > x(1) and y(1) < y(0)
        counts = [row.trainable[0] for row in report.rows]
        assert spots(svg, places) == {
            row.label: [near(x(math.log10(count)), y(mean))]
            for row, count, mean in zip(report.rows, counts, means, strict=True)
        }
        errors = [
            numbers(attributes["d"].replace("L", " "))
            for _, attributes, _ in elements(svg)
            if attributes.get("class", "").startswith("error")
        ]
        assert errors == [
            [near(x(math.log10(count)), y(mean + sign * deviation)) for sign in (1, -1)]
            for count, mean, deviation in zip(counts, means, deviations, strict=True)
        ]


@pytest.mark.parametrize(
    ("majority", "drawn", "label"),
    [
        (0.64, True, "majority"),
        (0.76, True, "majority"),  # all methods are worse
        (0.59, True, "majority"),
        (0.1, False, "majority 0.100, below"),
        (2.5, False, "majority 2.500, above"),
    ],
)
def test_the_majority_is_drawn_or_said(
    report: Report, places: dict[str, int], majority: float, drawn: bool, label: str
) -> None:
    task = dataclasses.replace(report.tasks[1], majority=majority)
    for svg in (
        figures.sizes(task, report.rows, places),
        figures.curves(task, list(report.curves[task.name]), places),
    ):
        found = elements(svg)
        lines = [each["d"] for _, each, _ in found if each.get("class") == "majority"]
        assert [text for _, each, text in found if each.get("class") == "note"] == [label]
        assert len(lines) == drawn
        if drawn:
            _, y = axes(svg)
            assert numbers(lines[0])[0][1] == pytest.approx(y(majority), abs=0.2)


def test_names_stand_with_their_markers(report: Report, places: dict[str, int]) -> None:
    """Below the plane, the best first, in two columns, or in one where a name is long."""
    task = report.tasks[0]
    long = "Method 3, with no biases in its group 3 (r 4)"
    for label, columns in (("Method 3", 2), (long, 1)):
        rows = [
            dataclasses.replace(row, label=label) if row.label == "Method 3" else row
            for row in report.rows
        ]
        of = {**places, label: places["Method 3"]}
        drawn = elements(figures.sizes(task, rows, of))
        named = [
            (text, begin(before))
            for (_, before, _), (name, each, text) in itertools.pairwise(drawn)
            if name == "text" and each["class"] == "label"
        ]
        by_score = sorted(rows, key=lambda row: -row.cells[task.name].spread.mean)
        assert [text for text, _ in named] == [row.label for row in by_score]
        for text, place in named:
            [(_, origin, _)] = elements(figures.marker(of[text], 0, 0))
            (x, y), (x0, y0) = place, begin(origin)
            assert (x - x0) in [12 + k * figures.WIDTH / columns for k in range(columns)]
            assert y - y0 > 260


def test_learning_curves(report: Report, places: dict[str, int]) -> None:
    """Each point of a line, the marker on it, and the edges of the band around it."""
    for task in report.tasks:
        found = report.curves[task.name]
        svg = figures.curves(task, found, places)
        ticks, y = axes(svg)
        x = scale(ticks)
        assert x(2) > x(1) and y(1) < y(0)
        points = {
            curve.label: [near(x(epoch), y(spread.mean)) for epoch, spread in curve.points]
            for curve in found
        }
        every = elements(svg)
        lines = [each for name, each, _ in every if name == "polyline"]
        assert [numbers(each["points"]) for each in lines] == list(points.values())
        assert [each["class"] for each in lines] == [
            f"l c{places[curve.label] % 8}" for curve in found
        ]
        assert spots(svg, places) == {label: each[::-1] for label, each in points.items()}
        bands = [each["points"] for name, each, _ in every if name == "polygon"]
        assert [numbers(each) for each in bands] == [
            [
                *(near(x(e), y(s.mean + s.deviation)) for e, s in curve.points),
                *(near(x(e), y(s.mean - s.deviation)) for e, s in curve.points[::-1]),
            ]
            for curve in found
        ]


def test_labels_keep_the_end_that_tells_them_apart() -> None:
    labels = [f"SPAFIT-1-3-II (r {r}, alpha {alpha})" for r in (4, 16) for alpha in (8, 128)]
    shown = [figures.short(label) for label in labels]
    assert len(set(shown)) == 4
    for label, text in zip(labels, shown, strict=True):
        first, last = text.split("…")
        assert label.startswith(first) and label.endswith(last) and len(last) > len(first) > 0
        assert figures.width_of(text) < figures.width_of(label)
    assert figures.short("Houlsby") == "Houlsby"


@pytest.mark.parametrize(
    ("low", "high", "counts"),
    [
        (385, 22_713_986, "1k 10k 100k 1M 10M"),
        (38_402, 411_266, "50k 100k 200k"),
        (210_000, 480_000, "300k 400k"),
        (900, 1_100, "900 1k"),
        (1.0, 9.0, "1 2 5"),
    ],
)
def test_numbers_on_the_logarithmic_axis(low: float, high: float, counts: str) -> None:
    found = figures.round_counts(low, high)
    assert [figures.amount_of(each) for each in found] == counts.split()
