"""Mmapped weights: equal values, never written to, and read where mmap cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spafit.errors import WeightsError
from spafit.kernels.stacking import are_together
from spafit.machine.memory import empty_in_large_pages, keep_freed_memory
from spafit.weights import pretrained
from spafit.weights.pretrained import load_pretrained, load_report
from spafit.weights.safefile import SafeFile
from weights_tools import make_tiny

ROWS = 1031  # times 257 float32: more than 1 MiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "large": torch.randn(ROWS, 257, generator=generator),
        "small": torch.randn(5, 3, generator=generator),
        "half": torch.randn(ROWS, 1027, generator=generator).bfloat16(),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model with a matrix of more than 1 MiB; smaller ones are never mapped."""
    return make_tiny(
        tmp_path_factory.mktemp("wide") / "model",
        **{"num_hidden_layers": 1, "hidden_size": 320, "num_attention_heads": 4},
        intermediate_size=900,
    )


class TestView:
    """Oracle: the tensor as it is read."""

    def test_is_what_is_read_and_outlives_the_file_object(self, path: Path) -> None:
        with SafeFile(path) as file:
            pairs = {name: (file.view(name), file.read(name)) for name in file.tensors}
        for name, (view, read) in pairs.items():
            assert torch.equal(view, read), name
            assert view.shape == read.shape
            assert view.dtype == read.dtype

    def test_writing_to_it_does_not_reach_the_file_or_another_view(self, path: Path) -> None:
        before = path.read_bytes()
        with SafeFile(path) as first, SafeFile(path) as second:
            written, other, read = first.view("large"), second.view("large"), first.read("large")
        written.zero_()
        assert torch.equal(other, read)
        assert path.read_bytes() == before

    def test_a_file_that_is_replaced_stays_as_it_was(self, path: Path, tmp_path: Path) -> None:
        with SafeFile(path) as file:
            view, read = file.view("large"), file.read("large")
        save_file({"large": torch.zeros(3)}, tmp_path / "new")
        (tmp_path / "new").replace(path)
        assert torch.equal(view, read)

    def test_a_file_that_is_replaced_before_it_is_mapped(self, path: Path, tmp_path: Path) -> None:
        """The library opens it by its name, under which another file of the same header lies."""
        with SafeFile(path) as file:
            read = file.read("large")
            tensors = load_file(path)
            tensors["large"] += 1.0
            save_file(tensors, tmp_path / "new")
            (tmp_path / "new").replace(path)
            assert torch.equal(file.view("large"), read)

    def test_a_file_that_was_cut_short_is_refused(self, path: Path) -> None:
        with SafeFile(path) as file:
            with path.open("r+b") as raw:
                raw.truncate(path.stat().st_size - 4096)
            with pytest.raises(WeightsError, match="ended while"):
                for name in file.tensors:
                    file.view(name)

    def test_values_that_are_not_finite_are_refused(self, tmp_path: Path) -> None:
        tensor = torch.zeros(ROWS, 257)
        tensor[ROWS - 1, 256] = torch.nan
        save_file({"large": tensor}, tmp_path / "w.safetensors")
        with SafeFile(tmp_path / "w.safetensors") as file, pytest.raises(WeightsError, match="NaN"):
            file.view("large")


class TestModel:
    """Oracle: the model whose weights are read."""

    def test_mapped_and_read_are_the_same_model(self, minilm_folder: Path) -> None:
        mapped = load_pretrained(minilm_folder, mapped=True)
        read = load_pretrained(minilm_folder, mapped=False)
        for (name, ours), theirs in zip(mapped.named_parameters(), read.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
        for layer in (*mapped.bert.encoder.layer, *read.bert.encoder.layer):
            attention = layer.attention.self
            assert are_together([getattr(attention, n).weight for n in ("query", "key", "value")])

    def test_training_does_not_reach_the_file(self, minilm_folder: Path) -> None:
        model = load_pretrained(minilm_folder, mapped=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        again = load_pretrained(minilm_folder, mapped=True)
        weight = "bert.encoder.layer.1.output.dense.weight"
        moved = model.get_parameter(weight) - again.get_parameter(weight)
        assert (moved - 1.0).abs().max() < 1e-5


class TestWhatIsMapped:
    """Oracle: the system's own list of what this process has mapped."""

    @staticmethod
    def is_mapped(folder: Path) -> bool:
        return str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the list is Linux's")
    @pytest.mark.parametrize(
        ("asked", "limit", "expected"),
        [
            (None, None, False), (None, "size", False), (None, "less", True),
            (True, None, True), (False, "less", False),
        ],
    )  # fmt: skip
    def test_small_weights_are_copied(
        self,
        wide: Path,
        monkeypatch: pytest.MonkeyPatch,
        asked: bool | None,
        limit: str | None,
        expected: bool,
    ) -> None:
        """Up to the limit, which counts the bytes of what is loaded."""
        if limit is not None:
            size = load_report(load_pretrained(wide, mapped=False)).loaded_numbers * 4
            monkeypatch.setattr(pretrained, "LARGEST_COPIED_BYTES", size - (limit == "less"))
        model = load_pretrained(wide, mapped=asked)
        assert self.is_mapped(wide) is expected
        assert model.config.hidden_size == 320

    def test_a_copied_model_outlives_its_file(self, wide: Path) -> None:
        """Emptied in place, as cp does before it writes: a mapped one would end the process."""
        model = load_pretrained(wide)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        content = (wide / "model.safetensors").read_bytes()
        with (wide / "model.safetensors").open("r+b") as file:
            file.truncate(0)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        (wide / "model.safetensors").write_bytes(content)


class TestMemory:
    @pytest.mark.parametrize("shape", [(3, 5), (1031, 1033), (4 * 2**20,), (0, 7)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_large_pages_are_memory_like_any_other(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        tensor = empty_in_large_pages(shape, dtype)
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        tensor.fill_(2.0)
        assert float(tensor.double().sum()) == 2.0 * tensor.numel()

    def test_keeping_freed_memory_may_be_asked_twice(self) -> None:
        assert keep_freed_memory() is keep_freed_memory()
