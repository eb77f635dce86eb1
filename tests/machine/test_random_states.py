"""The states of the random generators: saved, set, and restored for the caller."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from spafit.machine import random_states
from spafit.machine.random_states import RandomStates

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def draw(count: int = 3) -> list[Any]:
    """Draw from all three: words, floats, and normal ones, of which two are made at a time."""
    found: list[Any] = []
    for _ in range(count):
        found += [random.getrandbits(64), random.random(), random.gauss(0, 1)]
        found += [int(np.random.randint(2**62)), float(np.random.standard_normal())]  # noqa: NPY002
        found += torch.randint(2**62, (2,)).tolist() + torch.randn(17).tolist()
    return found


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Leave other tests the generators as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])  # noqa: NPY002
    torch.set_rng_state(before[2])


class TestTakeAndPut:
    """Oracle: what is drawn after it, bit for bit."""

    @pytest.mark.parametrize("drawn", range(1, 4), ids=["one", "two", "three"])
    @pytest.mark.parametrize("through_json", [False, True])
    def test_the_same_numbers_again(self, through_json: bool, drawn: int) -> None:
        """After an odd and an even number of normal ones: the other of a pair is kept too."""
        random.seed(5)
        np.random.seed(7)  # noqa: NPY002
        torch.manual_seed(11)
        draw(drawn)
        states = random_states.take(CPU)
        expected = draw(400)  # beyond the 624 words after which a Mersenne twister makes new ones
        if through_json:
            text = json.dumps(states.to_json(), allow_nan=False)
            tensors = {name: tensor.clone() for name, tensor in states.tensors.items()}
            states = RandomStates.from_json(tensors, json.loads(text))
        assert draw(400) != expected
        random_states.put(states, CPU)
        assert draw(400) == expected
        random_states.put(states, CPU)  # which setting has not used up
        assert draw(2) == expected[: len(draw(2))]

    def test_pairs_are_halfway(self) -> None:
        """Otherwise the test above would not see them kept."""
        np.random.seed(7)  # noqa: NPY002
        random.seed(5)
        draw(1)
        assert random.getstate()[2] is not None
        assert np.random.get_state()[3] == 1  # type: ignore[index]  # noqa: NPY002

    def test_json_has_them_bit_for_bit(self) -> None:
        draw(1)
        states = random_states.take(CPU)
        again = RandomStates.from_json(
            states.tensors, json.loads(json.dumps(states.to_json(), allow_nan=False))
        )
        assert again.python == states.python
        assert again.numpy[0] == states.numpy[0]
        assert again.numpy[1].dtype == states.numpy[1].dtype == np.uint32
        assert np.array_equal(again.numpy[1], states.numpy[1])
        assert again.numpy[2:] == states.numpy[2:]
        assert states.to_json().keys() == {"python", "numpy"}
        assert states.tensors.keys() == {"random.cpu"}

    def test_what_was_taken_stays(self) -> None:
        states = random_states.take(CPU)
        before = (states.tensors["random.cpu"].clone(), states.python, states.numpy[1].copy())
        draw()
        assert torch.equal(states.tensors["random.cpu"], before[0])
        assert states.python == before[1]
        assert np.array_equal(states.numpy[1], before[2])


class TestSeeded:
    """Oracle: the libraries' own seeding."""

    @pytest.mark.parametrize("seed", [0, 3, 2**32 - 1, 2**32, 2**40 + 5, 2**63 - 1])
    def test_inside_by_the_seed_and_outside_the_callers(self, seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        expected = draw()
        draw()
        before = random_states.take(CPU)
        outside = draw()
        random_states.put(before, CPU)
        for _ in range(2):
            with random_states.seeded(seed, CPU):
                assert draw() == expected
        assert draw() == outside

    def test_also_after_an_error(self) -> None:
        before = random_states.take(CPU)
        outside = draw()
        random_states.put(before, CPU)
        with pytest.raises(ZeroDivisionError), random_states.seeded(4, CPU):
            draw()
            _ = 1 / 0
        assert draw() == outside

    def test_seeds_differ(self) -> None:
        found = []
        for seed in (0, 1, 2):
            with random_states.seeded(seed, CPU):
                found.append(draw(1))
        for numbers in zip(*found, strict=True):
            assert len(set(numbers)) == 3


class Cards:
    """Generators of two GPUs, each a number, and the one that is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states = {0: 100, 1: 200}
        self.current = 0
        cards = self

        class Inside:
            def __init__(self, device: torch.device) -> None:
                self.index = device.index

            def __enter__(self) -> None:
                self.before, cards.current = cards.current, self.index

            def __exit__(self, *_: object) -> None:
                cards.current = self.before

        def get(device: torch.device) -> torch.Tensor:
            return torch.tensor([cards.states[device.index]])

        def put(state: torch.Tensor, device: torch.device) -> None:
            cards.states[device.index] = int(state)

        def seed(value: int) -> None:
            cards.states[cards.current] = value

        monkeypatch.setattr(torch.cuda, "device", Inside)
        monkeypatch.setattr(torch.cuda, "get_rng_state", get)
        monkeypatch.setattr(torch.cuda, "set_rng_state", put)
        monkeypatch.setattr(torch.cuda, "manual_seed", seed)


class TestOnAGPU:
    """Oracle: pretended generators of two cards; the run is on the second."""

    def test_only_its_own_is_seeded_and_given_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cards = Cards(monkeypatch)
        with random_states.seeded(7, GPU):
            assert cards.states == {0: 100, 1: 7}
            cards.states[1] = 8  # something was drawn
        assert cards.states == {0: 100, 1: 200}
        assert cards.current == 0

    def test_taken_and_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cards = Cards(monkeypatch)
        states = random_states.take(GPU)
        assert states.tensors.keys() == {"random.cpu", "random.cuda"}
        cards.states[1] = 9
        random_states.put(states, GPU)
        assert cards.states == {0: 100, 1: 200}

    def test_from_a_machine_without_one_and_to_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A run may be taken up on another device; the host's numbers go on all the same."""
        cards = Cards(monkeypatch)
        of_cpu, of_gpu = random_states.take(CPU), random_states.take(GPU)
        expected = draw()
        cards.states[1] = 9
        random_states.put(of_cpu, GPU)
        assert cards.states == {0: 100, 1: 9}
        assert draw() == expected
        random_states.put(of_gpu, CPU)
        assert cards.states == {0: 100, 1: 9}
        assert draw() == expected
