"""The choice of the fastest form: measured once, remembered in a file."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import stat
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spafit.kernels import Part, forms, stacked_linear
from spafit.kernels.gpu import choices
from spafit.layout import Packed
from spafit.machine import kernel_choices

# The functions of these names hide the modules.
lora_linear = importlib.import_module("spafit.kernels.lora_linear")
packed_attention = importlib.import_module("spafit.kernels.packed_attention")
as_one = lora_linear._as_one

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the file in a folder of the test's own; this process knows nothing yet."""
    monkeypatch.setenv("SPAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "_made", {})
    monkeypatch.setattr(choices, "_told", set())
    return tmp_path / "cache" / "kernels.json"


class Forms:
    """Forms of x -> 2 x that cost what they are said to cost, and count how often they run."""

    def __init__(self, **costs_ms: float) -> None:
        self.costs_ms = costs_ms
        self.calls: list[tuple[str, float]] = []
        self.timed: list[str] = []
        self.wrong: dict[str, torch.Tensor] = {}
        self.failing: dict[str, Exception] = {}

    def run(self, form: str, dropout: float) -> list[torch.Tensor]:
        self.calls.append((form, dropout))
        if form in self.failing:
            raise self.failing[form]
        x = torch.arange(5.0)
        return [self.wrong.get(form, 2 * x), x]

    def timer(self, call: Callable[[], object], device: torch.device) -> list[float]:
        call()
        form = self.calls[-1][0]
        self.timed.append(form)
        cost = self.costs_ms[form]
        return [cost, 1000.0, cost / 2, cost, cost]  # the median counts

    def fastest(self, shape: str = "N=5", **changes: object) -> str:
        arguments = {"dropout": 0.3, "timer": self.timer, **changes}
        names = list(self.costs_ms)
        return choices.fastest("doubling", shape, CPU, names, self.run, **arguments)  # type: ignore[arg-type]


class TestChoice:
    """Oracle: costs that are given."""

    @pytest.mark.parametrize("costs", [(1.0, 2.0, 3.0), (3.0, 1.0, 2.0), (3.0, 2.0, 1.0)])
    def test_the_fastest_wins(self, costs: tuple[float, ...], place: Path) -> None:
        forms = Forms(**dict(zip("abc", costs, strict=True)))
        winner = "abc"[costs.index(1.0)]
        assert forms.fastest() == winner
        assert forms.timed == ["a", "b", "c"]
        assert {rate for _, rate in forms.calls} == {0.0, 0.3}
        [entry] = json.loads(place.read_text())[choices.device_name(CPU)]["doubling"].values()
        assert entry == {"choice": winner, "median_ms": dict(zip("abc", costs, strict=True))}
        assert choices.made() == {"doubling": {"N=5": winner}}

    def test_measured_once_and_remembered(self, place: Path) -> None:
        assert Forms(a=2.0, b=1.0).fastest() == "b"
        again = Forms(a=1.0, b=2.0)
        assert again.fastest() == "b"
        choices.forget()  # as another process
        assert again.fastest() == "b"
        assert not again.calls
        place.unlink()
        assert again.fastest() == "b"  # this process knows it still
        choices.forget()
        assert again.fastest() == "a"

    def test_each_shape_and_operation_for_itself(self) -> None:
        assert Forms(a=2.0, b=1.0).fastest("N=5") == "b"
        assert Forms(a=1.0, b=2.0).fastest("N=6") == "a"
        choices.forget()
        assert Forms(a=2.0, b=1.0).fastest("N=6") == "a"

    def test_a_form_that_is_gone_is_not_taken(self) -> None:
        assert Forms(a=2.0, b=1.0).fastest() == "b"
        assert Forms(a=2.0, c=3.0).fastest() == "a"
        choices.forget()
        assert Forms(a=2.0, c=3.0).fastest() == "a"

    def test_the_generator_stays_as_it_was(self) -> None:
        forms = Forms(a=1.0, b=2.0)
        forms.run = lambda form, rate: [torch.rand(3) * 0 + 1]  # type: ignore[method-assign, assignment]
        before = torch.get_rng_state()
        choices.fastest("d", "s", CPU, ["a"], forms.run, timer=lambda call, _: [1.0])
        assert torch.equal(torch.get_rng_state(), before)

    def test_no_graph_of_autograds_is_left_when_the_clock_runs(self) -> None:
        """A graph that is recorded while one is there is broken by it (its streams)."""
        made: list[weakref.ref[torch.Tensor]] = []

        def run(form: str, dropout: float) -> list[torch.Tensor]:
            x = torch.ones(3, requires_grad=True)
            made.append(weakref.ref(x))
            return [2 * x]

        def timer(call: Callable[[], object], device: torch.device) -> list[float]:
            gc.collect()
            assert all(each() is None for each in made)
            return [1.0]

        assert choices.fastest("d", "s", CPU, ["a", "plain"], run, timer=timer) == "a"

    def test_a_real_clock(self) -> None:
        def run(form: str, dropout: float) -> list[torch.Tensor]:
            x = torch.ones(200, 200)
            for _ in range(40 if form == "slow" else 1):
                x = (x @ x).clamp(max=1.0)
            return [x]

        assert choices.fastest("power", "200", CPU, ["slow", "quick"], run) == "quick"


class TestRefusals:
    """Oracle: the last form; another that fails or disagrees is named with the reason."""

    def entry(self, place: Path) -> dict[str, dict[str, str]]:
        [entry] = json.loads(place.read_text())[choices.device_name(CPU)]["doubling"].values()
        return dict(entry)

    def test_one_that_fails(self, place: Path) -> None:
        forms = Forms(a=1.0, plain=2.0)
        forms.failing["a"] = RuntimeError("no kernel image\nis available")
        assert forms.fastest() == "plain"
        assert self.entry(place)["refused"] == {"a": "RuntimeError: no kernel image"}

    @pytest.mark.parametrize(
        "wrong",
        [
            2 * torch.arange(5.0) + torch.tensor([0.0, 0, 0, 0, 0.1]),
            torch.tensor([0.0, 2, 4, 6, torch.nan]),
            torch.tensor([0.0, 2, 4, 6, torch.inf]),
            torch.zeros(5),
        ],
    )
    def test_one_that_disagrees(self, place: Path, wrong: torch.Tensor) -> None:
        forms = Forms(a=1.0, plain=2.0)
        forms.wrong["a"] = wrong
        assert forms.fastest() == "plain"
        assert "differs from plain by" in self.entry(place)["refused"]["a"]

    def test_rounding_is_no_disagreement(self) -> None:
        forms = Forms(a=1.0, plain=2.0)
        forms.wrong["a"] = 2 * torch.arange(5.0) * (1 + 1e-4)
        assert forms.fastest() == "a"

    def test_want_of_memory_is_not_remembered(self, place: Path) -> None:
        forms = Forms(a=1.0, plain=2.0)
        forms.failing["a"] = torch.OutOfMemoryError("CUDA out of memory")
        assert forms.fastest() == "plain"
        assert not place.exists()
        assert forms.fastest() == "plain"  # in this process it is
        choices.forget()
        del forms.failing["a"]
        assert forms.fastest() == "a"

    def test_where_the_plain_form_fails_it_is_an_error(self) -> None:
        forms = Forms(a=1.0, plain=2.0)
        forms.failing["plain"] = RuntimeError("out of memory")
        with pytest.raises(RuntimeError, match="out of memory"):
            forms.fastest()

    @pytest.mark.parametrize(
        "results",
        [
            [2 * torch.arange(5.0), torch.tensor([0.0, 1, 2, 3, torch.nan])],
            [2 * torch.arange(5.0), torch.tensor([0.0, 1, 2, 3, 3.9])],
            [2 * torch.arange(5.0)],
        ],
    )
    def test_one_whose_gradients_disagree(self, results: list[torch.Tensor]) -> None:
        forms = Forms(plain=2.0)
        run = {"a": lambda: results, "plain": lambda: forms.run("plain", 0.0)}
        names, timer = ["a", "plain"], lambda call, _: [1.0]
        assert choices.fastest("d", "s", CPU, names, lambda f, _: run[f](), timer=timer) == "plain"

    def test_float64_is_held_to_its_own_rounding(self) -> None:
        def run(form: str, dropout: float) -> list[torch.Tensor]:
            return [torch.ones(3, dtype=torch.float64) + (1e-6 if form == "a" else 0.0)]

        names = ["a", "plain"]
        assert choices.fastest("d", "s", CPU, names, run, timer=lambda call, _: [1.0]) == "plain"

    @pytest.mark.parametrize("result", [torch.zeros(3), torch.zeros(0)])
    def test_zeros_and_nothing_agree(self, result: torch.Tensor) -> None:
        def run(form: str, dropout: float) -> list[torch.Tensor]:
            return [result]

        names = ["a", "plain"]
        assert choices.fastest("d", "s", CPU, names, run, timer=lambda call, _: [1.0]) == "a"

    def test_a_bug_of_ours_is_not_taken_for_a_form_that_cannot_run(self, place: Path) -> None:
        forms = Forms(a=1.0, plain=2.0)
        forms.failing["a"] = AttributeError("no such attribute")
        with pytest.raises(AttributeError, match="no such attribute"):
            forms.fastest()
        assert not place.exists()

    def test_a_refusal_is_told_once_a_process(self) -> None:
        for shape in ("N=5", "N=6"):
            forms = Forms(a=1.0, plain=2.0)
            forms.failing["a"] = RuntimeError("no kernel image")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert forms.fastest(shape) == "plain"
            told = [str(each.message) for each in caught]
            once = ["doubling: the form 'a' is not used (RuntimeError: no kernel image)"]
            assert told == (once if shape == "N=5" else [])

    def test_where_no_form_can_be_timed_the_plain_one_is_taken(self, place: Path) -> None:
        def timer(call: Callable[[], object], device: torch.device) -> list[float]:
            raise RuntimeError("the clock has stopped")

        assert Forms(a=1.0, plain=2.0).fastest(timer=timer) == "plain"
        assert set(self.entry(place)["refused"]) == {"a", "plain"}


class TestFile:
    """A file that cannot be read or written never stops anything."""

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "null",
            '"x"',
            '{"cpu": 3}',
            "\x00",
            "[" * 10**5,
            '{"a": {"doubling": []}}',
        ],
    )
    def test_foreign_content(self, place: Path, content: str) -> None:
        place.parent.mkdir(parents=True)
        where = choices.device_name(CPU)
        place.write_text(content.replace("cpu", where))
        assert Forms(a=2.0, b=1.0).fastest() == "b"
        assert json.loads(place.read_text())[where]["doubling"]["N=5"]["choice"] == "b"

    @pytest.mark.parametrize("entry", [3, [], {"choice": 3}, {"choice": "z"}, {}])
    def test_foreign_entries(self, place: Path, entry: object) -> None:
        place.parent.mkdir(parents=True)
        where = choices.device_name(CPU)
        place.write_text(json.dumps({where: {"doubling": {"N=5": entry}}, "other": {"x": 1}}))
        assert Forms(a=2.0, b=1.0).fastest() == "b"
        assert json.loads(place.read_text())["other"] == {"x": 1}

    def test_a_folder_that_cannot_be_made(self, place: Path) -> None:
        place.parent.write_text("a file")
        assert Forms(a=2.0, b=1.0).fastest() == "b"

    def test_nothing_half_written_is_left(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert Forms(a=2.0, b=1.0).fastest("first") == "b"
        before = place.read_text()

        def full(self: Path, *_: object, **__: object) -> None:
            self.touch()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        assert Forms(a=2.0, b=1.0).fastest("second") == "b"
        monkeypatch.undo()
        assert place.read_text() == before
        assert [each.name for each in place.parent.iterdir()] == [place.name]

    def test_made_with_the_users_umask(self, place: Path) -> None:
        before = os.umask(0o027)
        try:
            Forms(a=2.0, b=1.0).fastest()
        finally:
            os.umask(before)
        assert stat.S_IMODE(place.stat().st_mode) == 0o640

    def test_who_reads_meanwhile_reads_a_whole_file(self, place: Path) -> None:
        Forms(a=2.0, b=1.0).fastest("first")
        before = place.read_text()
        with place.open() as held:
            Forms(a=2.0, b=1.0).fastest("second")
            assert held.read() == before != place.read_text()

    def test_what_is_remembered_is_sound(self, place: Path) -> None:
        place.parent.mkdir(parents=True)
        sound = {"choice": "a", "median_ms": {"a": 1.0}}
        entries = {"N=5": sound, "N=6": {"choice": 3}, "N=7": {}, "N=8": [], "N=9": None}
        where = choices.device_name(CPU)
        place.write_text(json.dumps({where: {"doubling": entries, "other": 3}, "card": {"x": {}}}))
        assert kernel_choices.remembered(CPU) == {"doubling": {"N=5": sound}}
        assert kernel_choices.remembered(torch.device("meta")) == {}

    def test_another_torch_chooses_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert choices.device_name(CPU).startswith(f"cpu, torch {torch.__version__}")
        assert Forms(a=2.0, b=1.0).fastest() == "b"
        monkeypatch.setattr(choices, "device_name", choices.device_name.__wrapped__)
        monkeypatch.setattr(torch, "__version__", "99.0")
        assert Forms(a=1.0, b=2.0).fastest() == "a"


def test_what_warms_up_is_not_timed() -> None:
    calls: list[int] = []
    times = choices.milliseconds(lambda: calls.append(1), CPU)
    assert 0 < len(times) < len(calls)
    assert all(time >= 0 for time in times)


@pytest.mark.skipif(bool(forms.why_no_triton(CPU)), reason="runs in Triton's interpreter")
class TestOperations:
    """Oracle: two forms of each operation that agree, one in numpy by an interpreter, thus slower.

    On a GPU the same functions choose; here they are given what only a GPU would give them. They
    are far apart, so that a few rounds tell which is faster.
    """

    @pytest.fixture(autouse=True)
    def few_rounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choices, "_WARM_UP", 1)
        monkeypatch.setattr(choices, "_ROUNDS", 3)

    def refused(self, place: Path, operation: str) -> dict[str, str]:
        [entry] = json.loads(place.read_text())[choices.device_name(CPU)][operation].values()
        assert set(entry["median_ms"]) == {"triton", entry["choice"]}
        return dict(entry.get("refused", {}))

    @pytest.mark.parametrize("learns", [True, False])
    def test_attention(self, place: Path, learns: bool) -> None:
        layout = Packed([3, 5, 4])
        QKV = torch.randn(12, 3 * 32, requires_grad=learns)
        arguments = (QKV, layout.bundles, 2, 0.1, layout.spans, ["triton", "sdpa"])
        assert packed_attention._fastest(*arguments) == "sdpa"
        assert self.refused(place, "packed_attention") == {}

    @pytest.mark.parametrize("gelu", [True, False])
    @pytest.mark.parametrize("learns", [True, False])
    def test_linear_map(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, learns: bool, gelu: bool
    ) -> None:
        tensors = [torch.randn(20, 17), torch.randn(20), torch.randn(20)]
        if not gelu:
            tensors += [torch.randn(4, 17), torch.randn(20, 4)]
        parts = [Part(*tensors)]
        for tensor in tensors[2:]:
            tensor.requires_grad_(learns)
        monkeypatch.setattr(lora_linear, "suits_triton", lambda *_: True)
        calls = []
        monkeypatch.setattr(
            lora_linear, "_as_one", lambda *given: calls.append(given[3]) or as_one(*given)
        )
        x = torch.randn(9, 17)
        y = stacked_linear(x, parts, gelu=gelu)
        assert calls[-1] == "fused"
        assert "triton" in calls
        assert y.requires_grad == learns
        assert self.refused(place, "linear map") == {}
        assert all(tensor.grad is None for tensor in tensors)
        before = len(calls)
        stacked_linear(x, parts, gelu=gelu)
        assert len(calls) == before + 1


class TestWhyNoTriton:
    """Oracle: an environment that is given."""

    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Triton is installed and not loaded; no card is too old."""
        monkeypatch.delitem(sys.modules, "triton", raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(forms, "_why_too_old", lambda _: "")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_where_it_runs(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        assert forms.why_no_triton(torch.device("cuda"), dtype) == ""
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert forms.why_no_triton(CPU, dtype) == ""
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        monkeypatch.setitem(sys.modules, "triton", forms)  # loaded from wherever
        assert forms.why_no_triton(CPU, dtype) == ""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
    def test_other_types(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        assert f"found {dtype}" in forms.why_no_triton(torch.device("cuda"), dtype)
        monkeypatch.setattr(forms, "_why_too_old", lambda _: "too old")
        assert forms.why_no_triton(torch.device("cuda"), dtype) == "too old"

    def test_other_machines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "TRITON_INTERPRET=1 runs it on the CPU" in forms.why_no_triton(CPU)
        assert "a CUDA device, found meta" in forms.why_no_triton(torch.device("meta"))
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert "unset it" in forms.why_no_triton(torch.device("cuda"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert "is not installed" in forms.why_no_triton(CPU)
