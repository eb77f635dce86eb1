"""The contenders of a training step, and the scripts that time them, at a tiny size on the CPU.

Oracles: transformers + PEFT, spafit's own step on the same batches, and numbers worked out by hand.
A recorder takes the place of CUDA graphs: it calls what it recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_bert import CONFIG

pytest.importorskip("transformers")
pytest.importorskip("peft")

import spafit.training.captured_step
import spafit.training.make_step
from benchmarks import __main__ as short_set
from benchmarks import glue_minilm, lora_linear, table2, train_step
from benchmarks.contenders.lora_forms import as_part, peft_maps, unsloth_maps
from benchmarks.contenders.models import SHAPES
from benchmarks.contenders.steps import FORMS, make_trainings, product_model
from benchmarks.harness import paths, report
from benchmarks.harness.arguments import RESULTS, output_of
from benchmarks.harness.lengths import TaskRows, load_rows
from benchmarks.harness.timing import Rows, check_by_truth, check_results, settle
from spafit.kernels import products, stacked_linear
from spafit.kernels.products import bf16_products

CPU = torch.device("cpu")
NOWHERE = Path("/nowhere")
SMALL = dataclasses.replace(CONFIG, vocab_size=28_996, max_position_embeddings=512)
METHOD = "SPAFIT-1-3-II"


@pytest.fixture(autouse=True)
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape "tiny" is smaller still."""
    monkeypatch.setitem(SHAPES, "tiny", SMALL)


def recording(
    function: Callable[[], torch.Tensor],
) -> tuple[torch.Tensor, Callable[[], object]]:
    """Record as a CUDA graph does: the replay calls it and writes to the same result."""
    result = torch.full((), math.nan)

    def replay() -> None:
        result.copy_(function())

    return result, replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What records CUDA graphs is replaced."""
    monkeypatch.setattr(spafit.training.captured_step, "CudaCapture", lambda _: recording)


def cola(batches: int = 3, size: int = 5) -> tuple[TaskRows, list[Rows]]:
    data = load_rows("cola", "train", NOWHERE)
    return data, data.draw(batches, size, seed=1)


def trainings(names: list[str], opened: ExitStack, **settings: Any) -> list[Any]:
    data, batches = cola()
    how: dict[str, Any] = {"precision": "float32", "seed": 3, "device": CPU, **settings}
    return make_trainings(names, SMALL, METHOD, data, batches, opened=opened, **how)


@pytest.mark.usefixtures("recorder")
class TestContenders:
    """Oracle: the baseline, and spafit's eager step."""

    names = ("peft", "peft-128", "eager", "recomputed", "kept", "captured", "captured-kept")

    def test_all_of_them_agree(self) -> None:
        with ExitStack() as opened:
            first, *others = (each.contender() for each in trainings(list(self.names), opened))
            check_results(first, others, cola()[1][0], 1e-4)

    def test_a_wrong_gradient_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with ExitStack() as opened:
            peft, captured = trainings(["peft", "captured"], opened)
            before = spafit.training.step.loss_function
            monkeypatch.setattr(
                spafit.training.step, "loss_function", lambda *given: 1.01 * before(*given)
            )
            with pytest.raises(RuntimeError, match=r"gradients of .* differs"):
                check_results(peft.contender(), [captured.contender()], cola()[1][0], 1e-4)

    @pytest.mark.parametrize("kept", [False, True])
    def test_a_captured_step_is_the_eager_one_also_after_it_was_checked(self, kept: bool) -> None:
        end = "-kept" if kept else ""
        _, batches = cola()
        with ExitStack() as opened:
            eager, captured = trainings(["kept" if kept else "eager", f"captured{end}"], opened)
            captured.results(batches[0])
            for _ in range(3):
                for rows in batches:
                    eager.step(rows)
                    captured.step(rows)
            assert captured.prepared() > 0
            pairs = zip(eager.model.parameters(), captured.model.parameters(), strict=True)
            assert max(float((a - b).detach().abs().max()) for a, b in pairs) < 1e-6

    def test_it_trains(self) -> None:
        """A step moves what trains and nothing else.

        The bias of a key is left out where it trains: it adds the same to all scores of a query,
        which softmax ignores, so that its gradient is 0 but for rounding, and AdamW moves it by
        nothing or by a whole step, as the processor rounds.
        """
        with ExitStack() as opened:
            for training in trainings(list(self.names), opened):
                before = {name: p.clone() for name, p in training.model.named_parameters()}
                training.step(cola()[1][0])
                for name, parameter in training.model.named_parameters():
                    moved = bool((parameter != before[name]).any())
                    if parameter.requires_grad and ".key." in name and "bias" in name:
                        continue
                    assert moved == parameter.requires_grad, (training.name, name)

    def test_captured_ones_settle_when_every_shape_is_recorded(self) -> None:
        _, batches = cola()
        with ExitStack() as opened:
            [captured] = trainings(["captured"], opened)
            assert settle(captured.contender(), batches) == 3
            buckets = {captured.part(rows)[1].batch.layout.bucket for rows in batches}
            assert captured.prepared() == len(buckets)

    def test_the_layers_of_groups_2_and_3_are_recomputed(self) -> None:
        computed: list[int] = []
        with ExitStack() as opened:
            eager, recomputed = trainings(["eager", "recomputed"], opened)
            for layer, each in enumerate(recomputed.model.bert.encoder.layer):
                each.register_forward_pre_hook(lambda *_, layer=layer: computed.append(layer))
            recomputed.step(cola()[1][0])
            assert eager.model.bert.encoder.recomputed == set()
        assert sorted(computed) == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5]

    def test_models_are_shared_by_eager_ones_alone(self) -> None:
        with ExitStack() as opened:
            found = trainings(list(self.names), opened)
            models = dict(zip(self.names, (id(each.model) for each in found), strict=True))
        assert models["peft"] == models["peft-128"]
        assert models["eager"] == models["kept"]
        assert len(set(models.values())) == 5

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_half_precision(self, precision: str) -> None:
        with ExitStack() as opened:
            found = trainings(
                ["peft", "eager", "captured"], opened, precision=precision, frozen_weights="half"
            )
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
            weight = found[1].model.bert.encoder.layer[5].output.dense.weight
            if dtype == torch.bfloat16 and bf16_products():  # beside the model
                assert any(weight.data_ptr() in each.weights for each in products._laid_out)
            else:
                assert weight.dtype == dtype
            first, *others = (each.contender() for each in found)
            data, batches = cola()
            check_by_truth(train_step.truth_of(found[0], data), first, others, batches[0])
            for each in found:
                each.step(cola()[1][0])
            scalers = [found[0].scaler, found[1].take_step.scaler]
            assert [each.is_enabled() for each in scalers] == [precision == "fp16"] * 2

    def test_a_step_that_cannot_be_captured_is_no_eager_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(function: Callable[[], torch.Tensor]) -> Any:
            raise RuntimeError("not permitted")

        monkeypatch.setattr(spafit.training.captured_step, "CudaCapture", lambda _: failing)
        with ExitStack() as opened:
            [captured] = trainings(["captured"], opened)
            with pytest.raises(RuntimeError, match="cannot be captured"):
                settle(captured.contender(), cola()[1])


@pytest.mark.usefixtures("recorder")
class TestTrainStep:
    """Oracle: what was written, read back."""

    def test_captured_from_end_to_end(self, tmp_path: Path) -> None:
        train_step.main(
            "--model-shape tiny --method SPAFIT-1-3-II --task mnli --max-length 32 --batches 2 "
            "--batch-size 3 --contenders captured captured-kept --precision bf16 --data /nowhere "
            f"--frozen-weights half --out {tmp_path / 'x'}".split()
        )
        rows = report.read_rows(tmp_path / "x.csv")
        names = ("peft", "captured", "captured-kept")
        assert [row["contender"] for row in rows] == [FORMS[name].name for name in names]
        assert {row["dtype"] for row in rows} == {"bf16"}

    @pytest.mark.parametrize(
        ("name", "dtype"), [("peft", "float32"), ("captured", "float32"), ("eager", "bf16")]
    )
    def test_the_work_whose_memory_is_measured(self, name: str, dtype: str) -> None:
        train_step.peak_of_steps(
            name=name,
            shape="tiny",
            method=METHOD,
            task="cola",
            data="/nowhere",
            vocab="/nowhere",
            max_length=64,
            batches=2,
            batch_size=3,
            device="cpu",
            dtype=dtype,
            frozen_weights="auto",
            compile_mode="default",
            impl="auto",
            threads=torch.get_num_threads(),
            seed=0,
        )()

    def test_the_contenders_of_a_device(self) -> None:
        parsed = train_step.parse([])
        assert train_step.names_of(parsed, CPU) == ["peft", "eager"]
        in_bf16 = train_step.names_of(train_step.parse(["--precision", "bf16"]), CPU)
        assert sorted(in_bf16) == sorted(train_step.IN_BF16)
        gpu = train_step.names_of(parsed, torch.device("cuda"))
        assert sorted(gpu) == sorted(train_step.ON_A_GPU)
        asked = train_step.parse(["--contenders", "captured", "--padded-128"])
        assert train_step.names_of(asked, CPU) == ["peft", "peft-128", "captured"]

    @pytest.mark.parametrize("method", [METHOD, "bitfit", "full", "SPAFIT-0-2-I"])
    def test_the_first_layer_that_trains(self, method: str) -> None:
        with ExitStack() as opened:
            model = product_model(
                SMALL, method, precision="float32", seed=0, device=CPU, opened=opened
            )
        assert train_step.first_trainable_of(model) == model.bert.frozen_depth

    def test_shares(self) -> None:
        # 2 rounds of 3 ms took 6 ms: 12 GFLOP in them are 2,000 GFLOP/s.
        from benchmarks.harness.arithmetic import MatmulRate
        from benchmarks.harness.timing import timings

        [timing] = timings({"a": [3.0, 3.0]}, [Rows((1,), 7)] * 2)
        rates = [MatmulRate(4000.0, None), MatmulRate(5000.0, None)]
        found = train_step.floor_columns(12e9, timing, rates, (8000.0, 4096))
        assert found["floor_gflop"] == 6.0
        assert found["share_at_torch_mm"] == pytest.approx(0.4)
        assert found["share_of_card"] == pytest.approx(0.25)
        on_cpu = train_step.floor_columns(12e9, timing, [MatmulRate(4000.0, 5000.0)], (0.0, 0))
        assert on_cpu["share_at_best"] == on_cpu["share_at_onednn"] == pytest.approx(0.4)

    def test_a_gpu_has_results_of_its_own(self) -> None:
        default, own = (argparse.Namespace(out=path) for path in (RESULTS / "x", Path("runs/x")))
        gpu = torch.device("cuda")
        assert output_of(default, gpu) == RESULTS / "x_cuda"
        assert output_of(default, CPU) == RESULTS / "x"
        assert output_of(own, gpu) == Path("runs/x")


class TestLoraLinear:
    """Oracle: spafit's plain form in float64; each other."""

    def test_the_form_of_unsloth(self) -> None:
        torch.manual_seed(0)
        maps = peft_maps(3, 20, 4, CPU)
        parts = [as_part(each.double()) for each in maps]
        x = torch.randn(7, 20, dtype=torch.float64, requires_grad=True)
        dY = torch.randn(7, 60, dtype=torch.float64)
        trained = [x, *(each for part in parts for each in (part.A, part.B))]
        found = torch.cat(unsloth_maps(parts)(x), dim=1)
        right = stacked_linear(x, parts, impl="reference")
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
        for a, b in zip(
            torch.autograd.grad(found, trained, dY),
            torch.autograd.grad(right, trained, dY),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("precision", ["float32", "bf16"])
    def test_from_end_to_end(
        self, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lora_linear, "why_no_triton", lambda *_: "it is slow here")
        lora_linear.main(
            f"--model-shape tiny --rank 4 --maps 3 --tokens 37 --repeats 2 --precision {precision} "
            f"--out {tmp_path / 'x'}".split()
        )
        rows = report.read_rows(tmp_path / "x.csv")
        assert [row["contender"] for row in rows] == [
            "frozen, a product each", "frozen, one product", "PEFT", "unsloth's form",
            "spafit, reference", "spafit, fused", "spafit, auto",
        ]  # fmt: skip
        assert rows[0]["over_frozen"] == rows[1]["over_one_product"] == "0"
        frozen, peft = (float(rows[at]["median_time_ms"]) for at in (0, 2))
        assert float(rows[2]["over_frozen"]) == pytest.approx(100 * (peft / frozen - 1), rel=1e-2)
        assert {row["tokens"] for row in rows} == {"37"}

    def test_graphs_are_compared_with_graphs(self) -> None:
        from benchmarks.harness.timing import timings

        times = {
            lora_linear.FROZEN: [4.0], lora_linear.FROZEN_AS_ONE: [2.0], "a": [6.0],
            "frozen, a product each, graph": [2.0], "frozen, one product, graph": [1.0],
            "a, graph": [1.5],
        }  # fmt: skip
        found = timings(times, [Rows((0,), 5)])
        by_name = {each.name: lora_linear.overheads(each, found) for each in found}
        assert by_name["a"] == {"over_frozen": 50.0, "over_one_product": 200.0}
        assert by_name["a, graph"] == {"over_frozen": -25.0, "over_one_product": 50.0}


class TestTable2:
    """Oracle: numbers worked out by hand."""

    def test_projection(self) -> None:
        # 21 rows in batches of 4: 6 steps, 60 in 10 epochs; 60 · 6,000 ms are a tenth of an hour.
        found = table2.projection([5000.0, 7000.0], 21, 4)
        assert (found["steps"], found["step_time_ms"]) == (60, 6000.0)
        assert found["hours"] == pytest.approx(0.1)
        # The standard deviation is 1,414, its share of the mean of two 1,000.
        assert found["low_hours"] == pytest.approx(60 * 4000 / 3.6e6)
        assert found["high_hours"] == pytest.approx(60 * 8000 / 3.6e6)
        one = table2.projection([5000.0], 21, 4)
        assert one["low_hours"] == one["hours"] == one["high_hours"]

    def test_rounds_are_put_together_by_batch(self) -> None:
        batches = [Rows((at,), 3) for at in range(3)]
        assert table2.by_batch([1.0, 2.0, 3.0, 5.0, 6.0, 7.0], batches) == [3.0, 4.0, 5.0]

    def test_the_rows_are_the_whole_tasks(self) -> None:
        assert [table2.train_rows(task) for task in ("mnli", "wnli")] == [392_702, 635]

    @pytest.mark.usefixtures("recorder")
    @pytest.mark.parametrize("contender", ["captured", "peft"])
    def test_from_end_to_end(self, contender: str, tmp_path: Path) -> None:
        arguments = (
            "--model-shape tiny --tasks wnli qqp --batches 2 --rounds 1 --data /nowhere "
            f"--contender {contender} --out {tmp_path / 'x'}"
        )
        table2.main([*arguments.split(), "--methods", "Full BitFit"])
        rows = report.read_rows(tmp_path / "x.csv")
        assert [(row["task"], row["batch_size"]) for row in rows] == [("wnli", "16"), ("qqp", "8")]
        assert [row["steps"] for row in rows] == ["400", "454810"]
        written = (tmp_path / "x.md").read_text(encoding="utf-8")
        assert "projected from measured steps" in written and "| task | method |" in written

    def test_summary(self) -> None:
        rows = [
            {"method": m, "task": t, "hours": h}
            for m, t, h in (("a", "x", 1.0), ("a", "y", 2.0), ("b", "x", 3.0), ("b", "y", 0.5))
        ]
        assert table2.summary(rows).splitlines()[2:] == [
            "| method | x | y | all |", "|---|---|---|---|", "| a | 1 | 2 | 3 |",
            "| b | 3 | 0.5 | 3.5 |", "| all | 4 | 2.5 | 6.5 |",
        ]  # fmt: skip


class TestPaths:
    """Oracle: numbers worked out by hand."""

    def test_a_difference(self) -> None:
        # sd 0.02 and 0.01; √((0.0004 + 0.0001) / 3) = 0.01291.
        within = paths.Difference.of([0.68, 0.70, 0.72], [0.66, 0.67, 0.68])
        assert (within.fast, within.plain) == (pytest.approx(0.70), pytest.approx(0.67))
        assert within.error == pytest.approx(0.0129099, abs=1e-6)
        assert within.verdict == "outside"
        assert paths.Difference.of([0.68, 0.70, 0.72], [0.67, 0.68, 0.69]).verdict == "within"
        assert paths.Difference.of([0.68], [0.70]).verdict == "-"
        with pytest.raises(ValueError, match="2 runs of the fast path and 1"):
            paths.Difference.of([0.1, 0.2], [0.1])

    def test_what_a_path_asks_for(self) -> None:
        assert paths.settings_of_path("plain float32", "bf16").impl == "reference"
        fast = paths.settings_of_path("fast", "bf16")
        assert fast == ("auto", {"step": "auto", "precision": "bf16"})

    def test_from_end_to_end(
        self, tmp_path: Path, shared_data: Path, tiny: Path, capsys: pytest.CaptureFixture
    ) -> None:
        glue_minilm.main(
            f"--paths --data {shared_data / 'glue'} --model {tiny} --tasks sst-2 "
            "--seeds 0 1 --sst2-rows 20 --device cpu --precision bf16 --method bitfit "
            f"--out {tmp_path / 'x.csv'}".split()
        )
        rows = report.read_rows(tmp_path / "x.csv")
        assert [(row["path"], row["seed"], row["precision"]) for row in rows] == [
            ("fast", "0", "bf16"), ("plain float32", "0", "float32"),
            ("fast", "1", "bf16"), ("plain float32", "1", "float32"),
        ]  # fmt: skip
        written = (tmp_path / "x.md").read_text(encoding="utf-8")
        line = next(line for line in written.splitlines() if line.startswith("| SST-2"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:5] == ["accuracy", "20", "1", "2"]
        assert cells[9] in ("within", "outside")
        assert written in capsys.readouterr().out


class TestShortSet:
    """Oracle: the parsers of the scripts themselves."""

    def commands(self, arguments: str) -> dict[str, list[str]]:
        parser = argparse.Namespace(out=Path("runs/x"), device="cpu", precision="bf16", only=None)
        for pair in arguments.split():
            key, value = pair.split("=")
            setattr(parser, key, value.split(",") if key == "only" else value)
        return short_set.commands_of(parser)

    def test_a_gpu_s(self) -> None:
        found = self.commands("device=cuda precision=fp16")
        assert list(found) == list(short_set.GPU_SET)
        for name, command in found.items():
            assert command[-6:-2] == ["--device", "cuda", "--precision", "fp16"]
            assert command[-1] == f"runs/x/{name}"
            if command[0] == "benchmarks.train_step":
                parsed = train_step.parse(command[1:])
                assert (parsed.device, parsed.dtype) == ("cuda", "fp16")
                # The record has 256 rows of each task: it must be enough where there are no data.
                assert parsed.batches * parsed.batch_size <= 256
            elif command[0] == "benchmarks.table2":
                assert table2.parse(command[1:]).rounds == 1

    def test_what_is_asked_for(self) -> None:
        [(name, command)] = self.commands("only=load_large").items()
        assert command == ["benchmarks.load", "--repeats", "3", "--out", f"runs/x/{name}"]
        with pytest.raises(SystemExit, match="not in the set of cuda: load_large"):
            self.commands("device=cuda only=load_large")
