"""``spafit inspect``: its tables, its files, its figure, and what it refuses.

Oracle: the files against the functions that measure, and the tables against the files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import write_glue

from spafit.cli import inspecting, main
from spafit.cli.trained import Trained
from spafit.experiments.inspect.norms import norms
from spafit.experiments.inspect.report import percent
from spafit.experiments.probe import linear_probe
from spafit.weights.pretrained import load_pretrained
from weights_tools.tiny import make_tiny

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three tiny runs on a checkpoint that has its head of the pre-training."""
    root = tmp_path_factory.mktemp("inspected")
    folder = make_tiny(root / "tiny", style="old", num_hidden_layers=3)
    write_glue(root / "glue")
    for name, method in (
        ("spafit", ["SPAFIT-0-1-II"]),
        ("full", ["full"]),
        ("houlsby", ["houlsby"]),
    ):
        base = ["train", "--task=rte", f"--model={folder}", f"--data={root / 'glue'}", "--quiet"]
        more = [f"--method={method[0]}", "--epochs=1", "--max-length=16", "--learning-rate=1e-2"]
        assert main([*base, *more, "--device=cpu", f"--out={root / name}"]) == 0
    (root / "texts.txt").write_text("a cat sees the dog\n\n the old teacher sleeps\n")
    return root


@pytest.fixture
def inspect(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Return a function that inspects a run, and returns exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(linear_probe, "STRENGTHS", (1.0,))  # to save time

    def inspect(name: str, *arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["inspect", str(runs / name), *arguments])
        return code, *capsys.readouterr()

    return inspect


def test_norms(inspect: Run, runs: Path, tmp_path: Path) -> None:
    code, out, err = inspect("spafit", "--out", "new/here")
    assert (code, err) == (0, "")
    content = json.loads((tmp_path / "new" / "here" / "norms.json").read_text())
    trained = Trained(runs / "spafit", None, None).runs[0]
    expected = norms(trained.model, load_pretrained(runs / "tiny"))
    assert len(content["norms"]) == len(expected) == 8 + 4 + 3
    for row, each in zip(content["norms"], expected, strict=True):
        assert (row["layer"], row["place"], row["kind"]) == (each.layer, each.place, each.kind)
        assert (row["norm"], row["relative"]) == (each.norm, each.relative)
    assert {"plan": "SPAFIT-0-1-II", "task": "rte"}.items() <= content.items()
    lora = {each.place: each for each in expected if each.kind == "LoRA"}
    table = out[out.index("LoRA") :].splitlines()
    places = ("self.query", "self.key", "self.value", "output.dense")
    assert table[1].split() == ["%", "query", "key", "value", "attn", "out"]
    row = [f"{100 * (lora[f'attention.{place}'].relative or 0):.3g}" for place in places]
    assert table[3].split() == ["2", *row]
    assert table[6].split() == ["2", *[f"{lora[f'attention.{p}'].norm:.3g}" for p in places]]
    assert all(len(line) <= 80 for line in out.splitlines()[2:-1])
    png = (tmp_path / "new" / "here" / "norms.png").read_bytes()
    assert png.startswith(b"\x89PNG") and "written: norms.json, norms.png in new/here" in out


def test_nothing_is_written_where_no_folder_is_named(inspect: Run, tmp_path: Path) -> None:
    code, out, _ = inspect("full")
    assert code == 0 and "embeddings.word_embeddings" in out and "written" not in out
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(inspect: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, _ = inspect("houlsby", "--out", "o")
    assert code == 0 and "series: ‖·‖ of s UD" in out
    assert "for a figure of it: pip install '.[plot]'" in out
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["norms.json"]


def test_what_is_no_number_is_shown_and_null_in_json(
    inspect: Run, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = inspecting.merging_errors

    def with_nan(*arguments: Any) -> Any:
        odd = {"largest": math.nan, "apart": (0.0, math.inf)}
        return [dataclasses.replace(each, **odd) for each in real(*arguments)]

    monkeypatch.setattr(inspecting, "merging_errors", with_nan)
    code, out, _ = inspect("spafit", "--merging", "--out", "o")
    text = (tmp_path / "o" / "merging.json").read_text()
    assert code == 0 and re.search(r"largest difference of a logit +nan +nan +nan\n", out)
    assert "NaN" not in text and "Infinity" not in text
    assert [each["largest"] for each in json.loads(text)["merging"]] == [None] * 3
    assert json.loads(text)["merging"][0]["apart"] == [0.0, None]


def test_merging(inspect: Run, runs: Path, tmp_path: Path) -> None:
    code, out, _ = inspect("spafit", "--merging", "--out", "o")
    content = json.loads((tmp_path / "o" / "merging.json").read_text())
    assert code == 0 and content["texts"] == 11  # of dev
    assert [each["dtype"] for each in content["merging"]] == ["fp16", "bf16", "float32"]
    row = next(line for line in out.splitlines() if line.startswith("logits"))
    assert row.split()[1:] == [
        f"{each[name][-1]:.1e}"
        for each in content["merging"]
        for name in ("apart", "unmerged", "merged")
    ]
    [of_all] = [line for line in out.splitlines() if line.startswith("all ")]
    assert of_all.split()[1:] == [f"{100 * x['share_lost']:.2f}" for x in content["merging"]]
    assert "Warning: in bf16 merging loses" in out
    assert content["merging"][1]["warning"] in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines())
    code, out, _ = inspect("full", "--merging", "--texts", str(runs / "texts.txt"))
    assert code == 0 and "Nothing was added beside the base" in out and "2 texts of" in out


def test_forgetting(inspect: Run, runs: Path, tmp_path: Path) -> None:
    more = ["--forgetting", "--tasks", "RTE", "--seeds", "3", "5", "--quiet"]
    code, out, _ = inspect("spafit", *more, "--texts", str(runs / "texts.txt"), "--out", "o")
    assert code == 0
    content = json.loads((tmp_path / "o" / "forgetting.json").read_text())
    off = content["adapter_off"]
    assert off["base"] == off["off"] and off["states"] and off["logits"] and off["texts"] == 2
    assert out.count("the base's, bit for bit") == 3
    assert [each["states"] for each in content["probes"]] == ["cls", "mean"]
    for each in content["probes"]:
        assert each["rows"] == {"train": 25, "dev": 11} and each["metric"] == "accuracy"
        before, after = each["before"]["scores"], each["after"]["scores"]
        assert each["difference"]["scores"] == [y - x for x, y in zip(before, after, strict=True)]
        assert f"{each['before']['mean']:.3f} ± {each['before']['standard_deviation']:.3f}" in out
    losses = content["masked_tokens"]
    assert losses["texts"] == 2 and len(losses["before"]["scores"]) == 2
    assert losses["before"]["scores"] != losses["after"]["scores"]
    assert f"{losses['after']['mean']:.3f} ± " in out.splitlines()[-4]
    assert all(len(line) <= 80 for line in out.splitlines()[2:-1])

    code, out, _ = inspect("full", "--forgetting", "--tasks", "rte", "--seeds", "3", "--quiet")
    assert code == 0 and "Adapter off: it cannot be" in out and "(--texts)" in out
    assert "Masked" not in out and "95 %" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--tasks rte", "--tasks needs --forgetting"),
        ("--merging --rows 50", "--rows needs --forgetting"),
        ("--texts texts.txt", "--texts needs --forgetting or --merging"),
        ("--max-bad-rows 1", "--max-bad-rows needs --forgetting or --merging"),
        ("--forgetting --seeds 1 1", "--seeds has a duplicate: 1 1"),
        ("--forgetting --tasks foo", "unknown GLUE task 'foo'"),
        ("--forgetting --tasks rte --rows 9", "a probe needs 10 rows or more"),
        ("--merging --texts nowhere", "cannot read nowhere"),
        ("--merging --texts empty", "empty has no text; it should have one on each line"),
        ("--merging --texts latin", "latin, line 1: not UTF-8"),
        ("--out empty", "empty cannot be written"),
    ],
)
def test_what_is_refused(inspect: Run, tmp_path: Path, arguments: str, said: str) -> None:
    (tmp_path / "empty").write_text("\n  \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    code, out, err = inspect("spafit", *arguments.split())
    assert code == 2 and said in err and err.count("\n") == 1 and out == ""
    assert len(list(tmp_path.iterdir())) == 2


def test_adapters_are_not_merged(inspect: Run) -> None:
    code, _, err = inspect("houlsby", "--merging")
    assert code == 2 and "series stands beside its maps" in err


def test_percent_is_short() -> None:
    found = [percent(each) for each in (1.5, 0.0995, 0.042, 0.0085, 0.00093, 4.2e-7)]
    assert found == ["150", "10", "4.2", "0.9", "0.09", "4e-05"]
