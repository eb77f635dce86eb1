"""Runs in bf16 on a CPU: what they ask of the processor, what they keep, and where they lead."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import Capture, call
from support.small_runs import SmallRun, make_dataset, write_glue
from torch.utils._python_dispatch import TorchDispatchMode

import spafit
from spafit.cli.examining import report
from spafit.errors import ConfigError
from spafit.kernels.products import bf16_products
from spafit.machine.precision import NO_BF16, resolve_precision
from spafit.strata import frozen_in_half
from spafit.training.settings import TrainConfig, complete

CPU = torch.device("cpu")
BF16 = {"device": "cpu", "precision": "bf16"}


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend a processor of the capabilities given."""

    def pretend(**capabilities: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        bf16_products.cache_clear()

    yield pretend
    monkeypatch.undo()
    bf16_products.cache_clear()


class Conversions(TorchDispatchMode):
    """Notes the matrices that are converted to another type, by their address."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].dim() == 2:
            self.found.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestTheProcessor:
    """Oracle: its features, pretended."""

    def test_without_the_units_it_is_warned_of(
        self, small: SmallRun, processor: Callable[..., None]
    ) -> None:
        processor(avx512_f=True)
        with pytest.warns(UserWarning, match="slower than precision float32 and less exact"):
            found = complete(TrainConfig(**BF16), small.model(), small.train)
        assert (found.precision, found.frozen_weights) == ("bf16", "float32")
        text, well = report()
        assert "bf16 products on the CPU: none\n" in text
        assert NO_BF16 in text
        assert well

    def test_each_command_warns_once(
        self, small: SmallRun, processor: Callable[..., None], capsys: Capture, tmp_path: Path
    ) -> None:
        """Where bf16 is asked for, or was in training; not where float32 is."""
        processor(avx512_f=True)
        data, run, other = write_glue(tmp_path), tmp_path / "run", tmp_path / "other"
        train = f"train --task rte --data {data} --model {small.folder} --method SPAFIT-0-1-II"
        train += f" --epochs 1 --device cpu --quiet --precision bf16 --out {run}"
        texts = "--text a --text2 b"
        for words, count in (
            (train, 1),
            (f"eval {run} --precision bf16", 1),
            (f"eval {run} --precision float32", 0),
            (f"predict {run} --input {data}/RTE/dev.tsv", 1),
            (f"predict {run} {other} {texts} --precision bf16", 1),
            (f"predict {run} {other} {texts} --precision float32", 0),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                code, _, err = call(capsys, *words.split())
            assert (code, err.count(NO_BF16)) == (0, count), (words, err)
            if words is train:
                shutil.copytree(run, other)

    @pytest.mark.parametrize("units", ["avx512_bf16", "amx_tile"])
    def test_with_them_frozen_weights_are_half(
        self, small: SmallRun, processor: Callable[..., None], units: str
    ) -> None:
        processor(**{units: True})
        with no_warnings():
            found = complete(TrainConfig(**BF16), small.model(), small.train)
        assert (found.precision, found.frozen_weights) == ("bf16", "half")
        kept = complete(TrainConfig(**BF16, frozen_weights="float32"), small.model(), small.train)
        assert kept.frozen_weights == "float32"
        assert f"bf16 products on the CPU: {bf16_products()}\n" in report()[0]
        assert NO_BF16 not in report()[0]

    @pytest.mark.parametrize("units", [True, False])
    def test_float32_is_taken_unless_bf16_is_asked_for(
        self, small: SmallRun, processor: Callable[..., None], units: bool
    ) -> None:
        processor(avx512_bf16=units)
        with no_warnings():
            found = complete(TrainConfig(device="cpu"), small.model(), small.train)
            assert resolve_precision("auto", CPU) == "float32"
        assert (found.precision, found.frozen_weights) == ("float32", "float32")
        with pytest.raises(ConfigError, match="this run has float32"):
            complete(TrainConfig(device="cpu", frozen_weights="half"), small.model(), small.train)


@pytest.mark.skipif(not bf16_products(), reason="this processor has no products in bf16")
class TestFrozenWeights:
    """Oracle: the pre-trained model."""

    def test_stay_as_they_are(self, small: SmallRun) -> None:
        model = small.model()
        before = {
            name: (each.data_ptr(), each.detach().clone())
            for name, each in model.named_parameters()
            if not each.requires_grad
        }
        small.fit(model, **BF16, epochs=1)
        for name, (address, values) in before.items():
            now = model.get_parameter(name)
            assert now.data_ptr() == address, name
            assert torch.equal(now, values), name

    def test_none_is_converted_in_a_step(self, small: SmallRun) -> None:
        """Without the block all are."""
        model = small.model("spafit-direct").train()
        ids, mask = torch.randint(5, 20, (3, 7)), torch.ones(3, 7, dtype=torch.long)
        frozen = {
            each.data_ptr()
            for name, each in model.named_parameters()
            if each.dim() == 2 and ".embeddings." not in name and not each.requires_grad
        }

        def converted() -> set[int]:
            with Conversions() as seen, torch.autocast("cpu", torch.bfloat16):
                model(ids, mask).float().sum().backward()
            return frozen & set(seen.found)

        # Of query, key and value, which lie side by side, the first has the address of all.
        assert len(converted()) >= len(frozen) * 4 // 6
        with frozen_in_half(model, torch.bfloat16, CPU):
            converted()
            assert converted() == set()

    def test_the_same_training_as_with_float32_ones(self, small: SmallRun) -> None:
        """Both round W to bf16 alike; oneDNN may add in another order."""
        [half, plain] = (
            small.fit(small.model(), **BF16, epochs=2, frozen_weights=stored).losses
            for stored in ("half", "float32")
        )
        assert np.abs(np.subtract(half, plain)).max() < 1e-2


class TestTrajectory:
    """Oracle: the same run in float32, with the same masks of dropout."""

    def test_fifty_steps_of_minilm(self, minilm_folder: Path) -> None:
        data = make_dataset("rte", 200), make_dataset("rte", 8, "dev", seed=5)
        losses = []
        for precision in ("float32", "bf16"):
            model = spafit.load_pretrained(minilm_folder, num_labels=2)
            spafit.adapt(model, "SPAFIT-1-3-II", seed=1)
            config = TrainConfig(
                epochs=1,
                batch_size=4,
                learning_rate=1e-3,
                precision=precision,
                device="cpu",
                quiet=True,
            )
            tokenizer = spafit.load_tokenizer(minilm_folder)
            losses.append(spafit.fit(model, tokenizer, *data, config).losses)
        exact, found = map(np.array, losses)
        assert len(exact) == 50
        assert exact[-10:].mean() < exact[:10].mean() - 0.2  # it learned: there is a way to lose
        assert np.abs(found - exact).max() < 0.1
        assert np.abs(found - exact).mean() < 0.02
