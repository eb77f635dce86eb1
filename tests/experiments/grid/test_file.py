"""Grid files: what they say, and what is refused, with its place and the nearest name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from spafit.cli import main
from spafit.errors import ConfigError
from spafit.experiments.grid.file import DEFAULTS, read_grid

BLOCK = {"task": "rte", "method": "bitfit"}


def grid(folder: Path, entries: Any) -> Path:
    path = folder / "some.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


class TestReading:
    """Oracle: written by hand."""

    def test_a_value_or_a_list_and_a_block_comes_first(self, tmp_path: Path) -> None:
        entries = {
            "task": ["rte", "mrpc"],
            "epochs": 3,
            "recompute": [2, 3],
            "cells": [
                {"method": ["lora-ii", "bitfit"], "epochs": [1, 2]},
                {"method": "full", "task": "cola", "recompute": [[1], [2, 3]], "seed": [5, 6]},
            ],
        }
        one, other = read_grid(grid(tmp_path, entries)).blocks
        assert one.settings == {
            "task": ("rte", "mrpc"),
            "method": ("lora-ii", "bitfit"),
            "model": (DEFAULTS["model"],),
            "epochs": (1, 2),
            "recompute": ((2, 3),),
            "seed": (0,),
        }
        assert other.settings["recompute"] == ((1,), (2, 3))
        assert other.settings["task"] == ("cola",)
        assert other.settings["seed"] == (5, 6)
        assert one.rates == other.rates == ()

    def test_what_a_block_says_of_the_rate_comes_first(self, tmp_path: Path) -> None:
        choose = {"learning_rate": [2e-3, 1e-3], "seed": 100}
        blocks = [BLOCK, {**BLOCK, "learning_rate": 1e-4}, {**BLOCK, "choose": None}]
        read = read_grid(grid(tmp_path, {"choose": choose, "cells": blocks})).blocks
        assert [block.rates for block in read] == [(1e-3, 2e-3), (), ()]
        assert [block.settings.get("learning_rate") for block in read] == [None, (1e-4,), None]
        assert read[0].seeds == (100,)
        blocks = [{**BLOCK, "choose": choose}, BLOCK]
        one, other = read_grid(grid(tmp_path, {"learning_rate": 1e-4, "cells": blocks})).blocks
        assert "learning_rate" not in one.settings and one.rates == (1e-3, 2e-3)
        assert other.settings["learning_rate"] == (1e-4,)

    def test_its_name_is_the_file_s_unless_it_has_one(self, tmp_path: Path) -> None:
        assert read_grid(grid(tmp_path, {"cells": [BLOCK]})).name == "some"
        assert read_grid(grid(tmp_path, {"cells": [BLOCK], "name": "mine"})).name == "mine"


CHOOSE = {"learning_rate": 1e-3, "seed": 9}

REFUSED: list[tuple[Any, str]] = [
    ("{", r"^the grid file .*some\.json cannot be read: "),
    ('{"cells": [], "cells": []}', "it holds twice: cells"),
    ([], r"^some\.json must be a JSON object"),
    ({}, r'some\.json: "cells" must be a list of one block or more: None'),
    ({"cells": []}, '"cells" must be a list'),
    ({"cells": [3]}, r"some\.json, block 1 must be a JSON object, found 3"),
    *(
        ({"cells": [BLOCK], "name": name}, r"some\.json: name must be a plain name, found")
        for name in ("", 3, "../x", "a/b", "..", "a\nb", None)
    ),
    ({"cells": [BLOCK], "epoch": 3}, r"some\.json has no setting epoch \(did you mean epochs\?\)"),
    (
        {"cells": [BLOCK, {**BLOCK, "lerning_rate": 1}]},
        r"block 2 has no setting lerning_rate \(did you mean learning_rate\?\)",
    ),
    ({"cells": [{**BLOCK, "lr": 1}]}, r"has no setting lr \(did you mean learning_rate\?\)"),
    ({"cells": [{**BLOCK, "out": "x"}]}, "block 1 has no setting out"),
    ({"cells": [{**BLOCK, "overwrite": True}]}, "has no setting overwrite"),
    ({"cells": [{"method": "bitfit"}]}, "block 1: it has no task"),
    ({"cells": [{"task": "rte"}]}, "block 1: it has no method"),
    ({"cells": [BLOCK], "seed": []}, r"some\.json: seed is an empty list"),
    ({"cells": [{**BLOCK, "r": []}]}, "block 1: r is an empty list"),
    ({"cells": [{**BLOCK, "seed": [0, 1, 0]}]}, "block 1: seed has 0 twice"),
    ({"cells": [{**BLOCK, "epochs": [3, 3]}]}, "block 1: epochs has 3 twice"),
    ({"cells": [{**BLOCK, "task": "rtee"}]}, "block 1: unknown GLUE task 'rtee'"),
    ({"cells": [{**BLOCK, "task": "ax"}]}, "block 1: AX has no split 'train'"),
    ({"cells": [{**BLOCK, "task": 3}]}, "block 1: unknown GLUE task 3"),
    ({"cells": [{**BLOCK, "method": 3}]}, "block 1: method must be a name: 3"),
    ({"cells": [{**BLOCK, "method": ""}]}, "block 1: method must be a name"),
    ({"cells": [{**BLOCK, "model": None}]}, "block 1: model must be a name"),
    ({"cells": [{**BLOCK, "revision": 3}]}, "block 1: revision must be a name"),
    ({"cells": [{**BLOCK, "seed": -1}]}, "block 1: seed must be a whole number"),
    ({"cells": [{**BLOCK, "seed": None}]}, "block 1: seed must be a whole number"),
    ({"cells": [{**BLOCK, "seed": "0"}]}, "block 1: seed must be a whole number"),
    ({"cells": [{**BLOCK, "init_seed": 1.5}]}, "block 1: init_seed must be a whole number"),
    ({"cells": [{**BLOCK, "order_seed": True}]}, "block 1: order_seed must be a whole number"),
    ({"cells": [{**BLOCK, "r": "16"}]}, "block 1: r must be a whole number: '16'"),
    ({"cells": [{**BLOCK, "r": True}]}, "block 1: r must be a whole number: True"),
    ({"cells": [{**BLOCK, "alpha": "1"}]}, "block 1: alpha must be a number"),
    ({"cells": [{**BLOCK, "epochs": [3, 0]}]}, "block 1: epochs must be a whole number"),
    ({"cells": [{**BLOCK, "learning_rate": "1e-3"}]}, "block 1: learning_rate must be a number"),
    ({"cells": [BLOCK], "warmup": 2}, r"some\.json: warmup must be a number from 0 to 1"),
    ({"cells": [{**BLOCK, "precision": "fp8"}]}, "block 1: precision must be one of"),
    ({"cells": [{**BLOCK, "seed": list(range(30_000))}]}, "block 1: it makes 30,000 cells; 20,000"),
    (
        {"cells": [{**BLOCK, "learning_rate": 1e-3, "choose": CHOOSE}]},
        "block 1: learning_rate is given, and choose chooses it",
    ),
    (
        {"cells": [BLOCK], "learning_rate": 1e-3, "choose": CHOOSE},
        r"some\.json: learning_rate is given, and choose",
    ),
    ({"cells": [{**BLOCK, "choose": 3}]}, "block 1, choose must be a JSON object"),
    ({"cells": [{**BLOCK, "choose": {"seed": 1}}]}, "block 1, choose: it has no learning_rate"),
    (
        {"cells": [{**BLOCK, "choose": {"learning_rate": 1e-3}}]},
        "block 1, choose: it has no seed",
    ),
    (
        {"cells": [{**BLOCK, "choose": {**CHOOSE, "warmup": 0.1}}]},
        "block 1, choose has no setting warmup",
    ),
    (
        {"cells": [{**BLOCK, "choose": {**CHOOSE, "epochs": [2, 3]}}]},
        "block 1, choose: epochs must be one number",
    ),
    (
        {"cells": [{**BLOCK, "choose": {**CHOOSE, "task": "rtee"}}]},
        "block 1, choose: .*rtee",
    ),
    (
        {"cells": [{**BLOCK, "choose": {**CHOOSE, "learning_rate": [None]}}]},
        "choose: learning_rate must be a number",
    ),
    (
        {"cells": [{**BLOCK, "choose": {**CHOOSE, "learning_rate": [1e-3, 2]}}]},
        "choose: learning_rate must be a number from 0 to 1: 2",
    ),
    (
        {"cells": [{**BLOCK, "choose": CHOOSE}, {**BLOCK, "seed": [8, 9]}]},
        "block 1: seed 9 of choose is also a seed that is reported",
    ),
]


class TestRefusals:
    """Oracle: the table; of the command line, exit code 2 and one line."""

    @pytest.mark.parametrize(("entries", "match"), REFUSED)
    def test_the_place_is_named(self, tmp_path: Path, entries: Any, match: str) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            read_grid(grid(tmp_path, entries))
        assert "\n" not in str(caught.value)

    def test_no_finite_number(self, tmp_path: Path) -> None:
        text = json.dumps({"cells": [{**BLOCK, "warmup": math.nan}]})
        with pytest.raises(ConfigError, match="warmup must be a number"):
            read_grid(grid(tmp_path, text))

    def test_no_such_grid(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["grid", "table2"]) == 2
        err = capsys.readouterr().err
        assert "there is no grid file table2 (did you mean table-2?)" in err
        assert "minilm, table-1, table-2" in err and err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
