"""The plans under a budget.

Oracle: parameter counts by hand and by the model itself; the paper's Table 2.
"""

from __future__ import annotations

import dataclasses

import pytest
from support.tiny_bert import CONFIG, C, R, short, tiny_bert

import spafit
from spafit.config import BertConfig
from spafit.errors import ConfigError
from spafit.experiments.search.candidates import (
    every_candidate,
    papers_own,
    within_parameters,
    within_time,
)


def sized(L: int) -> BertConfig:
    return dataclasses.replace(CONFIG, num_hidden_layers=L)


def test_every_plan_with_its_count() -> None:
    """Of 4 layers: three pairs of N1 and N2, of two types."""
    found = {each.name: each.trainable for each in every_candidate(sized(4), C, R)}
    D, F = CONFIG.hidden_size, CONFIG.intermediate_size
    head, bias = C * D + C, 7 * D + F
    lora = {kind: n * 2 * D * R + F + 2 * D for kind, n in (("I", 3), ("II", 4))}
    assert found == {
        f"SPAFIT-{N1}-{N2}-{kind}": (N2 - N1) * bias + (3 - N2) * lora[kind] + head
        for kind in ("I", "II")
        for N1, N2 in ((0, 1), (0, 2), (1, 2))
    }
    assert list(found.values()) == sorted(found.values())


def test_the_counts_are_those_of_the_model() -> None:
    found = {each.name: each.trainable for each in every_candidate(CONFIG, C, R)}
    assert len(found) == 2 * 10
    for name in ("SPAFIT-1-3-I", "SPAFIT-0-4-II"):
        assert found[name] == spafit.adapt(tiny_bert(), short(name)).trainable


def test_table_2_of_the_paper() -> None:
    found = every_candidate(BertConfig(), 3)
    counts = {each.name: each.trainable for each in found}
    assert counts["SPAFIT-4-9-II"] == 7_485_443 and counts["SPAFIT-8-12-I"] == 4_441_091
    assert papers_own(found, 24).name == "SPAFIT-4-9-II"
    assert len(found) == 2 * 253


def test_the_paper_s_own_in_fewer_layers() -> None:
    names = [papers_own(every_candidate(sized(L), C, R), L).name for L in (3, 4, 6, 12)]
    assert names == ["SPAFIT-0-1-II", "SPAFIT-0-1-II", "SPAFIT-0-2-II", "SPAFIT-2-4-II"]


def test_a_budget_of_parameters() -> None:
    every = every_candidate(CONFIG, C, R)
    most = every[6].trainable
    assert within_parameters(every, most) == [each for each in every if each.trainable <= most]
    assert within_parameters(every, every[1].trainable) == every[:2]
    least = f"leaves 1 of 20 plans, .* the least budget is {every[1].trainable:,}"
    with pytest.raises(ConfigError, match=least):
        within_parameters(every, every[1].trainable - 1)


def test_a_budget_of_time() -> None:
    every = every_candidate(sized(5), C, R)
    seconds = {0: 90.0, 1: 61.0, 2: 30.0}
    assert {each.N1 for each in within_time(every, 61, seconds)} == {1, 2}
    with pytest.raises(ConfigError, match=r"the shortest run takes 0\.5 minutes"):
        within_time(every, 29, seconds)


def test_two_layers_are_too_few() -> None:
    with pytest.raises(ConfigError, match="three groups need 3 layers, and the model has 2"):
        every_candidate(sized(2), C, R)
