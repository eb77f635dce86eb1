"""Profiles of a step: the floor of each kind of work, and the kind of each kernel.

Oracles: operations and bytes counted by hand in a small case, the floor of
benchmarks.harness.arithmetic, and names as the profiler gives them: real ones from a CPU and
invented ones for a GPU.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny_bert import CONFIG, INTERMEDIATE, C, D, L, tiny_bert
from torch.autograd import DeviceType

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import profile_step
from benchmarks.contenders.models import SHAPES
from benchmarks.harness import kernel_kinds, report, roofline
from benchmarks.harness.arithmetic import step_flop
from benchmarks.harness.kernel_kinds import Busy, Sizes, kind_of
from benchmarks.harness.roofline import Trained, step_floors
from spafit.methods import plan
from spafit.strata import adapt

F = INTERMEDIATE


def trained(method: str, r: int = 4) -> Trained:
    model = tiny_bert()
    adapt(model, plan(method, L, **({"r": r, "alpha": 2.0 * r} if "bitfit" not in method else {})))
    return Trained.of(model)


class TestWhatTrains:
    """Oracle: DESIGN's table of what each group trains."""

    def test_spafit(self) -> None:
        found = trained("SPAFIT-1-3-II")  # layers 2 and 3 biases, 4 and 5 LoRA
        assert found.first_trainable == 2
        assert found.lora == ((D, D, 4),) * 8
        # Six maps in a layer of biases, intermediate.dense and output.dense in one of LoRA.
        assert sorted(found.bias_widths) == sorted([*[D] * 5, F, *[D] * 5, F, D, F, D, F])
        per_lora = 4 * 2 * D * 4 + F + 2 * D
        assert found.numbers == 2 * (7 * D + F) + 2 * per_lora + C * D + C
        assert found.full == ()

    def test_full(self) -> None:
        model = tiny_bert()
        adapt(model, plan("full", L))
        found = Trained.of(model)
        assert (found.first_trainable, found.lora) == (0, ())
        assert sorted(found.full) == sorted([*[(D, D)] * 4, (D, F), (F, D)] * L)


class TestFloors:
    """Oracle: counted by hand for D = 2, F = 3, two layers of which one trains, lengths 4 and 1."""

    config = dataclasses.replace(
        CONFIG, hidden_size=2, intermediate_size=3, num_hidden_layers=2, num_attention_heads=1
    )
    #: The second layer: LoRA of rank 1 on query and one bias of width 3; 20 numbers train in all.
    its = Trained(1, ((2, 2, 1),), (3,), 20)

    def floors(self, element_bytes: int = 2, first_computed: int = 0) -> dict[str, roofline.Floor]:
        found = step_floors(
            self.config,
            [4, 1],
            self.its,
            element_bytes=element_bytes,
            first_computed=first_computed,
        )
        return {floor.kind: floor for floor in found}

    def test_base_products(self) -> None:
        # N = 5; (2, 6), (2, 2), (2, 3), (3, 2): 12 + 4 + 6 + 6 = 28 weights. Two passes forward and
        # one backward: 3 · 2·5·28 operations. Bytes: 5·(8 + 4 + 5 + 5) + 28 = 138 elements a pass.
        floor = self.floors()["base products"]
        assert (floor.flop, floor.traffic_bytes) == (840, 3 * 138 * 2)

    def test_attention(self) -> None:
        # 16 + 1 = 17 squares · D = 34: 4·34 in each of two layers, 8·34 backward in one.
        floor = self.floors()["attention"]
        assert floor.flop == 2 * 136 + 272
        # N·D = 10 elements: 4 forward in each layer, 8 backward in one: 16 · 10 · 2 bytes.
        assert floor.traffic_bytes == 320

    def test_lora(self) -> None:
        # in + out = 4: forward 2·5·1·4, backward 4·5·1·4.
        floor = self.floors()["LoRA"]
        assert floor.flop == 40 + 80
        # Forward 2·(5 + 4); backward 2·(10 + 10 + 20) and 4 numbers that are read in 2 bytes, with
        # gradients in 4.
        assert floor.traffic_bytes == 18 + 80 + 24

    def test_what_only_moves_bytes(self) -> None:
        floors = self.floors()
        assert all(
            floors[kind].flop == 0
            for kind in ("add + norm", "GELU", "bias gradients", "optimizer", "clipping", "copies")
        )
        # Two norms a layer, 10 elements of 2 bytes: 3 in the frozen one, 4 + 4 in the other.
        assert floors["add + norm"].traffic_bytes == 2 * 20 * (3 + 4 + 4)
        # 15 elements of 2 bytes: 2 forward in each, 3 backward in one.
        assert floors["GELU"].traffic_bytes == 30 * (2 + 2 + 3)
        assert floors["bias gradients"].traffic_bytes == 2 * 5 * 3
        assert floors["embeddings"].traffic_bytes == 10 * (3 * 4 + 2)
        assert floors["clipping"].traffic_bytes == 20 * 12
        assert floors["optimizer"].traffic_bytes == 20 * 28
        assert floors["copies"].traffic_bytes == 20 * 10
        assert self.floors(4)["copies"].traffic_bytes == 20 * 4  # nothing is rounded

    def test_what_is_kept_is_not_computed(self) -> None:
        whole, kept = self.floors(), self.floors(first_computed=1)
        assert kept["base products"].flop == whole["base products"].flop * 2 / 3
        assert kept["embeddings"].traffic_bytes == 0
        assert kept["LoRA"] == whole["LoRA"]
        assert kept["add + norm"].traffic_bytes == 2 * 20 * (4 + 4)

    def test_the_larger_one_is_the_floor(self) -> None:
        floor = roofline.Floor("x", flop=6e9, traffic_bytes=8e6)
        assert floor.floor_ms(1e12, 1e9) == pytest.approx(8.0)
        assert floor.floor_ms(1e12, 1e12) == pytest.approx(6.0)

    @pytest.mark.parametrize("method", ["SPAFIT-1-3-II", "bitfit", "lora-i"])
    @pytest.mark.parametrize("kept", [False, True])
    def test_it_is_the_floor_of_the_step(self, method: str, kept: bool) -> None:
        its = trained(method)
        first = its.first_trainable if kept else 0
        floors = step_floors(CONFIG, [7, 5, 11], its, element_bytes=2, first_computed=first)
        counted = {floor.kind: floor.flop for floor in floors}
        expected = step_flop(CONFIG, [7, 5, 11], its.first_trainable, first)
        assert counted["base products"] + counted["attention"] == expected


SIZES = Sizes.of([64], [1024, 4096, 1000])
BASE, LORA = [[1000, 1024], [1024, 3072]], [[1000, 1024], [1024, 192]]
NVJET = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT"


class TestKindOfAKernel:
    """Oracle: names as the profiler and the libraries give them."""

    @pytest.mark.parametrize(
        ("callers", "kernel", "shapes", "kind"),
        [
            (["aten::mm", "_StackedLinear"], NVJET, BASE, "base products"),
            (["aten::addmm_", "_StackedLinear"], "sm90_xmma_gemm_bf16", LORA, "LoRA"),
            (["aten::mm", "autograd::engine::evaluate_function: MmBackward0"],
             "void cutlass::Kernel2<x>", [[64, 1000], [1000, 1024]], "LoRA"),
            (["_StackedLinear"], "_forward", [], "base products"),
            (["_StackedLinearBackward"], "_dx", [], "base products"),
            (["_StackedLinear"], "_narrow", [], "LoRA"),
            (["_StackedLinearBackward"], "_gradients", [], "LoRA"),
            (["aten::sum", "_StackedLinearBackward"], "reduce_kernel", [], "bias gradients"),
            (["_PackedAttention"], "_forward_kernel", [], "attention"),
            (["aten::bmm", "_PackedAttentionBackward"], NVJET, BASE, "attention"),
            (["aten::_efficient_attention_forward"], "fmha_cutlassF_bf16", [], "attention"),
            (["_DropoutAddNorm"], "_forward_kernel", [], "add + norm"),
            (["aten::native_layer_norm", "aten::layer_norm"], "vectorized_layer_norm", [],
             "add + norm"),
            (["aten::native_dropout", "aten::dropout"], "fused_dropout_kernel_vec", [], "dropout"),
            (["aten::gelu_backward", "_StackedLinearBackward"], "vectorized_elementwise", [],
             "GELU"),
            (["_BiasGelu"], "_forward_kernel", [], "GELU"),
            (["aten::_fused_adamw_", "Optimizer.step#AdamW.step"],
             "multi_tensor_apply_kernel<FusedAdamMathFunctor>", [], "optimizer"),
            (["aten::_foreach_norm"], "multi_tensor_apply_kernel<LpNormFunctor>", [], "clipping"),
            (["aten::_foreach_mul_"], "multi_tensor_apply_kernel<x>", [], "clipping"),
            (["aten::_amp_foreach_non_finite_check_and_unscale_"], "multi_tensor_apply_kernel", [],
             "clipping"),
            (["aten::_foreach_zero_", "Optimizer.zero_grad#AdamW.zero_grad"], "Memset", [],
             "copies"),
            (["aten::copy_", "aten::to"], "Memcpy HtoD (Pinned -> Device)", [], "copies"),
            (["aten::copy_", "_StackedLinearBackward"], "elementwise_kernel", [], "copies"),
            (["aten::embedding"], "index_select", [], "embeddings"),
            (["aten::add"], "vectorized_elementwise_kernel<CUDAFunctor_add>", [], "other"),
            (["Torch-Compiled Region: 0/1"],
             "triton_per_fused_add_native_dropout_native_layer_norm_5", [], "add + norm"),
        ],
    )  # fmt: skip
    def test_kinds(
        self, callers: list[str], kernel: str, shapes: list[list[int]], kind: str
    ) -> None:
        assert kind_of(callers, kernel, shapes, SIZES) == kind
        assert kind in kernel_kinds.KINDS

    def test_a_size_that_is_no_rank(self) -> None:
        shapes = [[128, 1024], [1024, 1024]]
        assert Sizes.of([64], [1024]).is_low_rank(shapes)
        assert not Sizes.of([64], [1024, 128]).is_low_rank(shapes)  # 128 tokens
        assert not Sizes.of([], [1024]).is_low_rank(LORA)

    def test_time_that_several_kernels_cover_counts_once(self) -> None:
        def event(start: float, end: float, device: DeviceType, note: bool = False) -> object:
            span = SimpleNamespace(start=start, end=end)
            return SimpleNamespace(time_range=span, device_type=device, is_user_annotation=note)

        gpu, cpu = DeviceType.CUDA, DeviceType.CPU
        events = [
            event(5000, 7000, gpu), event(1000, 3000, gpu), event(2000, 4000, gpu),
            event(0, 9000, cpu), event(0, 9000, gpu, note=True),
        ]  # fmt: skip
        assert kernel_kinds.busy_ms(events) == 5.0
        assert kernel_kinds.busy_ms([]) == 0.0


class TestProfileStep:
    """Oracle: numbers worked out by hand; what was written, read back."""

    def test_lines(self) -> None:
        busy = Busy({"base products": 4.0, "other": 1.0}, {"base products": "a|b"}, 17)
        floors = [roofline.Floor("base products", 2e9, 0.0), roofline.Floor("GELU", 0.0, 2**20)]
        found = profile_step.lines(busy, floors, 8.0, 3.0, 1e12, 2.0**30)
        by_kind = {str(line["kind"]): line for line in found}
        assert [str(line["kind"]) for line in found[-3:]] == [
            "gaps", "kernels, replayed", "whole step",
        ]  # fmt: skip
        base = by_kind["base products"]
        assert (base["percent"], base["floor_ms"], base["times_the_floor"]) == (50.0, 2.0, 2.0)
        assert (base["gflop"], base["most_of_it"]) == (2.0, "a/b")
        assert by_kind["GELU"]["time_ms"] == 0.0 and by_kind["GELU"]["mib"] == 1.0
        assert by_kind["gaps"]["time_ms"] == 5.0  # what the replay leaves of the step
        whole = by_kind["whole step"]
        assert whole["floor_ms"] == pytest.approx(2.0 + 1000 / 1024)
        eager = profile_step.lines(busy, floors, 8.0, None, 1e12, 2.0**30)
        assert {line["kind"]: line for line in eager}["gaps"]["time_ms"] == 3.0

    def test_from_end_to_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        small = dataclasses.replace(CONFIG, vocab_size=28_996, max_position_embeddings=512)
        monkeypatch.setitem(SHAPES, "tiny", small)
        profile_step.main(
            "--model-shape tiny --method SPAFIT-1-3-II --task cola --batch-size 3 --repeats 2 "
            "--card-sizes 16 24 --copy-bytes 40000 --data /nowhere "
            f"--out {tmp_path / 'x'}".split()
        )
        rows = {row["kind"]: row for row in report.read_rows(tmp_path / "x.csv")}
        assert list(rows)[: len(kernel_kinds.KINDS)] == list(kernel_kinds.KINDS)
        for kind in ("base products", "LoRA", "attention", "add + norm", "GELU", "optimizer"):
            assert float(rows[kind]["time_ms"]) > 0, kind
            assert float(rows[kind]["floor_ms"]) > 0, kind
        assert float(rows["clipping"]["time_ms"]) > 0
        assert (
            "PackedAttention" in rows["attention"]["most_of_it"]
            or "aten" in rows["attention"]["most_of_it"]
        )
