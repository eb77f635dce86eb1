"""The report as one HTML page.

Oracle: an XML parser, the rules of what a page may load, and a real browser.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.parsers import expat

import pytest
from support.chromium import asked
from support.written_runs import LARGE_CASED, write_run

from benchmarks.harness.arguments import RESULTS
from spafit.errors import ConfigError
from spafit.experiments.report import figures, statistics
from spafit.experiments.report.page import html
from spafit.experiments.report.tables import Curve, Task, make_report
from spafit.experiments.report.write import write_report

STYLE = Path(figures.__file__).with_name("page.css").read_text(encoding="utf-8")
RECORDED = sorted(path.parent.name for path in RESULTS.glob("*/report.html"))
NASTY = "</script><img src=x onerror=alert(1)> & \"'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve methods on two tasks with two seeds each, and a name that would be a tag."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    methods = [
        *("Full Fine-tuning", "Full BitFit", "Full LoRA-I", "Full LoRA-II", "Houlsby", NASTY),
        *(f"SPAFIT-{n1}-{n1 + 2}-{kind}" for n1 in (1, 2, 3) for kind in ("I", "II")),
    ]
    for place, method in enumerate(methods):
        for task in ("rte", "cola"):
            for seed in (0, 1):
                score = 0.6 + (place * 5 % 12) / 100 + seed / 200
                answers = [("a", "ab"[seed * k % 2]) for k in range(6)]
                write_run(
                    folder / task / str(place) / str(seed),
                    score,
                    task=task,
                    seed=seed,
                    method=method,
                    answers=answers,
                    trainable=4 ** (place + 2),
                )
    write_run(folder / "bad", 0.5, status="failed", method=NASTY)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return html(make_report(folder))


def test_it_loads_nothing(page: str) -> None:
    without_policy = page.replace("http-equiv", "")
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|<link|<iframe|\ssrc\s*=[^x]", without_policy
    )
    assert "default-src 'none'" in page
    assert page.count("<script") == 1


def test_foreign_text_is_escaped(page: str) -> None:
    assert "<img" not in page and "<b>" not in page
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &quot;" in page


def test_the_figures_are_xml(page: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) == 3 + 2 + 2  # sizes of all and of each task, curves, time and memory
    for each in drawn:
        found: list[tuple[str, dict[str, str]]] = []
        parser = expat.ParserCreate()
        parser.StartElementHandler = lambda name, attributes: found.append((name, attributes))  # noqa: B023
        parser.Parse(each, True)
        root = found[0][1]
        assert root["role"] == "img" and root["aria-label"]
        *_, height = map(float, root["viewBox"].split())
        for name, attributes in found:
            if name == "text":
                assert 0 <= float(attributes["x"]) <= figures.WIDTH
                assert 0 < float(attributes["y"]) <= height


class TestInABrowser:
    """Oracle: Chromium."""

    def test_no_two_methods_look_alike_without_colour(self, tmp_path: Path) -> None:
        """Sixteen of them: where there is ink in a marker, and along a line."""
        labels = [f"method {place}" for place in range(16)]
        score = statistics.spread([0.7])
        drawn = figures.curves(
            Task("rte", "RTE", "accuracy", 0.5),
            [Curve(label, ((1, score), (2, score))) for label in labels],
            {label: place for place, label in enumerate(labels)},
        )
        markers = "".join(f"<g>{figures.marker(place, 0, 0)}</g>" for place in range(16))
        page = f"<html><head><style>{STYLE}</style></head><body>{drawn}<svg>{markers}</svg></body>"
        script = """
        const paper = window.getComputedStyle(document.body).backgroundColor;
        const ink = (shape, x, y) => {
          const { fill } = window.getComputedStyle(shape), point = new window.DOMPoint(x, y);
          const isFilled = fill !== "none" && fill !== paper && shape.isPointInFill(point);
          return isFilled || shape.isPointInStroke(point) ? "#" : " ";
        };
        const steps = (low, high) => [...Array(2 * (high - low)).keys()].map((k) => low + k / 2);
        const markers = [...document.querySelectorAll("g")].map((g) =>
          steps(-7, 7).map((y) => steps(-7, 7).map((x) => ink(g.firstChild, x, y)).join("")));
        const lines = [...document.querySelectorAll("polyline")].map((line) => {
          const { x, y } = line.points[0];
          return steps(1, 61).map((far) => ink(line, x + far, y)).join("");
        });
        return [markers, lines];"""
        answer = asked(page, script, tmp_path)
        assert answer["faults"] == []
        markers, lines = (["".join(each) for each in kind] for kind in answer["answer"])
        for kind, least in ((markers, 14), (lines, 20)):  # of 28 · 28 points, and of 120
            differ = [
                sum(a != b for a, b in zip(one, other, strict=True))
                for one, other in itertools.combinations(kind, 2)
            ]
            assert len(differ) == 120 and min(differ) >= least

    def test_sorting(self, page: str, tmp_path: Path) -> None:
        """By a click on a head: numbers as numbers, the majority stays, a second click turns."""
        script = """
        const table = document.querySelector("table"), found = [];
        const read = (k) => [...table.tBodies[0].rows].map((row) => row.cells[k].textContent);
        for (const [column, clicks] of [[1, 1], [1, 1], [4, 1], [0, 1]]) {
          const head = table.tHead.rows[0].cells[column], button = head.querySelector("button");
          button.focus();
          const isFocused = document.activeElement === button && button.tabIndex === 0;
          button.click();
          found.push([read(column), head.getAttribute("aria-sort"), isFocused]);
        }
        return found;"""
        answer = asked(page, script, tmp_path)
        assert answer["faults"] == []
        up, down, scores, names = answer["answer"]
        assert [each[1] for each in answer["answer"]] == [
            *("ascending", "descending", "ascending", "ascending"),
        ]
        assert all(each[2] for each in answer["answer"])
        numbers = [float(text) for text in up[0][1:]]
        assert up[0][0] == "" and numbers == sorted(numbers) and numbers[0] < 0.001
        assert [float(text) for text in down[0][1:]] == numbers[::-1]
        means = [float(text.split()[0]) for text in scores[0][1:]]
        assert means == sorted(means)
        assert names[0][0] == "majority baseline" and names[0][1] == NASTY

    @pytest.mark.parametrize("width", [360, 1280])
    @pytest.mark.parametrize("name", ["made up", *RECORDED])
    def test_nothing_is_wider_than_the_window(
        self, page: str, tmp_path: Path, name: str, width: int
    ) -> None:
        """And no label of a figure is cut off, or covers another one; of recorded reports, too."""
        if name in RECORDED:
            page = (RESULTS / name / "report.html").read_text(encoding="utf-8")
        script = """
        const root = document.documentElement, overlaps = [], cut = [];
        for (const svg of document.querySelectorAll("svg")) {
          const frame = svg.getBoundingClientRect();
          const boxes = [...svg.querySelectorAll("text")].map((text) =>
            [text.firstChild.textContent, text.getBoundingClientRect()]);
          for (const [k, [name, a]] of boxes.entries()) {
            if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1
                || a.bottom > frame.bottom + 1) cut.push(name);
            for (const [other, b] of boxes.slice(0, k)) {
              const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
              const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
              const scale = frame.width / 340;
              if (w > 2 * scale && h > 4 * scale) overlaps.push([name, other, w, h]);
            }
          }
        }
        return { inner: window.innerWidth, wide: root.scrollWidth, overlaps, cut,
                 size: parseFloat(window.getComputedStyle(document.body).fontSize) };"""
        answer: dict[str, Any] = asked(page, script, tmp_path, width)
        found = answer["answer"]
        assert answer["faults"] == []
        assert found["inner"] >= found["wide"] > width - 30
        assert found["overlaps"] == [] and found["cut"] == []
        assert found["size"] == 16


class TestColours:
    """Oracle: the contrast of WCAG 2: of text 4.5 at least, of lines and marks 3.

    Not of the lines of grids and tables, which only guide the eye, nor of a band, whose edges are
    numbers of a table.
    """

    @pytest.mark.parametrize("scheme", range(3), ids=["light", "dark", "print"])
    def test_stand_out(self, scheme: int) -> None:
        block = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[scheme]
        colours = dict(re.findall(r"--(\w+): (#\w+)", block))
        texts, marks = set(), set()
        for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", STYLE):
            [opacity] = re.findall(r"(?<!-)opacity: ([.\d]+)", body) or ["1"]
            for kind, name in re.findall(r"(?<![-\w])([a-z]+): [^;]*var\(--(\w+)\)", body):
                is_text = kind == "color" or re.search(r"\.(label|tick|axis|note)\b", selectors)
                if name not in ("paper", "shade", "line") and ".band" not in selectors:
                    (texts if is_text else marks).add((name, float(opacity)))
        assert texts == {("ink", 1.0), ("soft", 1.0)}
        assert {name for name, _ in marks} == {"soft", "link", *(f"c{k}" for k in range(8))}
        for ground, (name, opacity) in itertools.product(("paper", "shade"), texts):
            assert contrast(colours[name], colours[ground], opacity) >= 4.5
        for name, opacity in marks:
            assert contrast(colours[name], colours["paper"], opacity) >= 3, (name, opacity)

    def test_the_formula(self) -> None:
        """Of black on white, by definition; of the grey that just fails on white."""
        assert contrast("#000", "#ffffff", 1) == pytest.approx(21)
        assert contrast("#777777", "#fff", 1) == pytest.approx(4.478, abs=1e-3)
        assert contrast("#000", "#fff", 0.5) == pytest.approx(
            contrast("#808080", "#fff", 1), abs=0.1
        )


def contrast(colour: str, ground: str, opacity: float) -> float:
    """Return (L1 + 0.05) / (L2 + 0.05) of the lighter and the darker relative luminance."""
    under, over = (
        bytes.fromhex(re.sub(r"^(\w)(\w)(\w)$", r"\1\1\2\2\3\3", text[1:]))
        for text in (ground, colour)
    )
    seen = [opacity * one + (1 - opacity) * other for one, other in zip(over, under, strict=True)]
    dark, light = sorted(map(luminance, (under, seen)))
    return (light + 0.05) / (dark + 0.05)


def luminance(rgb: Sequence[float]) -> float:
    parts = [each / 255 for each in rgb]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


class TestPlaces:
    def test_apart(self) -> None:
        placed = figures.apart([50, 52, 51, 90], 10, 0, 100)
        assert placed == pytest.approx([41, 61, 51, 90])  # around their middle, in their order
        assert figures.apart([99, 99, 98], 10, 0, 100) == pytest.approx([90, 100, 80])
        assert figures.apart([5], 10, 8, 100) == [8]

    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [(0.61, 0.78, [0.65, 0.7, 0.75]), (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3, 8, None)],
    )
    def test_ticks(self, low: float, high: float, expected: list[float] | None) -> None:
        found = figures.ticks(low, high)
        assert expected is None or found == pytest.approx(expected)
        assert 2 <= len(found) <= 6 and all(low - 1e-9 <= each <= high + 1e-9 for each in found)


def test_files_are_replaced_as_a_whole(folder: Path, tmp_path: Path) -> None:
    report = make_report(folder)
    out = tmp_path / "new" / "place"
    names = ["report.csv", "report.html", "report.md", "report.tex"]
    for _ in range(2):
        assert sorted(path.name for path in write_report(report, out)) == names
        assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "report.html").read_text(encoding="utf-8") == html(report)
    (out / "report.md").unlink()
    (out / "report.md").mkdir()
    with pytest.raises(ConfigError, match=r"report\.md cannot be written"):
        write_report(report, out)
    assert sorted(path.name for path in out.iterdir()) == names


def test_the_best_and_the_paper_s_score_stand_below_the_mean(tmp_path: Path) -> None:
    for seed, score in enumerate((0.7, 0.72)):
        large = {"base": LARGE_CASED, "trainable": 7_484_418, "method": "SPAFIT-4-9-II"}
        write_run(tmp_path / str(seed), score, seed=seed, **large)
    page = html(make_report(tmp_path))
    cell = '<td class="n" data-v="0.710">0.710 ± 0.014 <small>best 0.720; paper 0.76</small></td>'
    assert cell in page


def test_a_single_run_has_a_page(tmp_path: Path) -> None:
    """No spread, no comparison, no mean over tasks; a score that never changes."""
    run = write_run(tmp_path / "run", 0.5, task="tickets", metrics={"accuracy": 0.5})
    page = html(make_report(run))
    assert "nan" not in page and page.count("<svg") == 4
    write_run(tmp_path / "going" / "run", 0.5, status="running")
    page = html(make_report(tmp_path / "going"))
    assert "0 finished runs" in page and "running, or its process was killed" in page
