"""The benchmarks measure what they claim to.

Oracles: the lengths of the real data, transformers + PEFT against spafit and the reverse,
and floating-point operations counted by PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.sweeps import quick
from support.tiny_bert import CONFIG, C, L, R, tiny_bert
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import train_step
from benchmarks.contenders.baseline import padded_batch, padded_logits, peft_twin, plain_name
from benchmarks.contenders.models import SHAPES, Training, packed_logits
from benchmarks.contenders.steps import FORMS
from benchmarks.harness import arithmetic, lengths, operations, report, timing
from benchmarks.harness.timing import Rows
from spafit.adapters import LoRA
from spafit.bert import BertForSequenceClassification, set_impl
from spafit.methods import plan
from spafit.plans import Plan, Stratum
from spafit.strata import adapt
from spafit.text.tokenization import Encodings

METHODS = ("SPAFIT-1-3-II", "SPAFIT-0-2-I", "lora-ii", "bitfit", "full")


def nine_rows() -> Encodings:
    """Return nine sequences of 3 to 17 tokens of the tiny model's vocabulary, in pairs."""
    generator = torch.Generator().manual_seed(7)
    sizes = [5, 17, 3, 8, 8, 12, 4, 3, 9]
    ids = [torch.randint(1, 53, (n,), generator=generator).tolist() for n in sizes]
    return Encodings(ids, [[0] * (n // 2) + [1] * (n - n // 2) for n in sizes], 0)


def adapted(method: str) -> BertForSequenceClassification:
    """Adapt the tiny model in float64, with B and deltas that are not zero."""
    model = tiny_bert()
    adapt(model, plan(method, L, r=R, alpha=12.0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".lora_B", ".bias_delta.delta")):
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


LARGE = {"sst-2", "qqp", "qnli"}


class TestLengths:
    """Oracle: the real data, where it is present."""

    @pytest.mark.parametrize("task", quick(lengths.TASKS, {*lengths.TASKS} - LARGE))
    def test_the_record_is_of_the_data(self, task: str, shared_data: Path) -> None:
        recorded = json.loads(lengths.RECORD.read_text(encoding="utf-8"))
        found = lengths.measured_lengths(
            task, shared_data / "glue", shared_data / "vocab" / "bert-cased"
        )
        assert recorded[task] == found

    @pytest.mark.parametrize(
        ("task", "split"),
        [(task, "train") for task in lengths.TASKS]
        + [(task, "dev") for task in lengths.TASKS if task not in lengths.TRAIN_ALONE],
    )
    def test_the_record_takes_the_place_of_the_data(self, task: str, split: str) -> None:
        recorded = json.loads(lengths.RECORD.read_text(encoding="utf-8"))[task][split]
        rows = lengths.load_rows(task, split, data=Path("/nowhere"))
        assert rows.source == "recorded lengths"
        assert rows.encodings.lengths == recorded["lengths"]
        pairs = zip(rows.encodings.input_ids, rows.encodings.token_type_ids, strict=True)
        for (ids, segments), first in zip(pairs, recorded["first_texts"], strict=True):
            assert ids[0] == 101 and ids[first - 1] == 102 and ids[-1] == 102
            assert segments == [0] * first + [1] * (len(ids) - first)
            assert max(ids) < 28_996

    def test_what_is_not_recorded_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no lengths of 'mnli', dev, are recorded"):
            lengths.load_rows("mnli", "dev", data=Path("/nowhere"))

    @pytest.mark.parametrize("max_length", [8, 20, 31, 64])
    def test_rows_are_cut_as_the_tokenizer_cuts(self, max_length: int, shared_data: Path) -> None:
        folders = shared_data / "glue", shared_data / "vocab" / "bert-cased"
        whole, cut = (
            lengths.load_rows("wnli", "train", *folders, limit).encodings
            for limit in (lengths.MAX_LENGTH, max_length)
        )
        for before, after in zip(whole.token_type_ids, cut.token_type_ids, strict=True):
            expected = len(after), after.count(0)
            assert lengths.cut_to(max_length, len(before), before.count(0)) == expected
        assert lengths.cut_to(10, 14, 14) == (10, 10)
        recorded = lengths.load_rows("mnli", data=Path("/nowhere"), max_length=64)
        assert max(recorded.encodings.lengths) == 64

    def test_batches(self) -> None:
        rows = lengths.load_rows("cola", data=Path("/nowhere"))
        drawn = rows.draw(3, 16, seed=4)
        assert [len(batch.numbers) for batch in drawn] == [16, 16, 16]
        assert len({row for batch in drawn for row in batch.numbers}) == 48
        assert drawn == rows.draw(3, 16, seed=4) != rows.draw(3, 16, seed=5)
        its = rows.encodings.lengths
        assert drawn[1].tokens == sum(its[row] for row in drawn[1].numbers)
        assert [batch.numbers for batch in rows.first(5, 2)] == [(0, 1), (2, 3), (4,)]
        with pytest.raises(ValueError, match="20 batches of 16 need 320 rows, there are 256"):
            rows.draw(20, 16, seed=0)


@pytest.mark.parametrize("method", METHODS)
class TestTwin:
    """Oracle: the two models are each other's."""

    def test_logits_and_gradients_are_equal(self, method: str) -> None:
        model, encodings = adapted(method), nine_rows()
        twin = peft_twin(model)
        labels = torch.tensor([0, 1, 2, 1, 0, 2, 1, 0, 2])
        rows = Rows((8, 1, 3, 0, 6), 43)
        optimizer = torch.optim.SGD(model.parameters())
        for pad_to in (0, 17):
            logits = padded_logits(twin, encodings, pad_to=pad_to)
            theirs = Training("theirs", twin, logits, optimizer, labels)
            ours = Training("ours", model, packed_logits(model, encodings), optimizer, labels)
            twin.zero_grad()
            timing.check_results(theirs.contender(), [ours.contender()], rows, 1e-10)

    def test_the_same_numbers_train(self, method: str) -> None:
        model = adapted(method)
        twin = peft_twin(model)
        ours = {plain_name(n): p.shape for n, p in model.named_parameters() if p.requires_grad}
        theirs = {plain_name(n): p.shape for n, p in twin.named_parameters() if p.requires_grad}
        assert ours == theirs
        assert sum(map(torch.Size.numel, ours.values())) > 3 * C

    def test_the_weights_are_copies(self, method: str) -> None:
        model = adapted(method)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for parameter in peft_twin(model).parameters():
                parameter.add_(1.0)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TestWhatTheTwinRefuses:
    def test_a_model_that_was_not_adapted(self) -> None:
        with pytest.raises(ValueError, match="not adapted"):
            peft_twin(tiny_bert())

    def test_two_ranks(self) -> None:
        model = tiny_bert()
        low = Stratum("low", 0, 2, {"query": [LoRA(3, 12.0)]})
        high = Stratum("high", 3, L - 1, {"query": [LoRA(4, 12.0)]})
        adapt(model, Plan("two ranks", L, [low, high]))
        with pytest.raises(ValueError, match="one rank"):
            peft_twin(model)


def test_a_step_trains_both_sides_alike() -> None:
    """Oracle: each other, over three steps of the timed work, dropout off in the tiny model."""
    model, encodings = adapted("SPAFIT-1-3-II"), nine_rows()
    twin = peft_twin(model)
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 1, 0, 2])
    trainings = [
        Training(
            name,
            side,
            logits,
            torch.optim.AdamW(
                [p for p in side.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
            ),
            labels,
        )
        for name, side, logits in (
            ("theirs", twin, padded_logits(twin, encodings)),
            ("ours", model, packed_logits(model, encodings)),
        )
    ]
    rows = Rows((8, 1, 3, 0, 6), 43)
    before = trainings[1].results(rows)["logits"]
    for training in trainings:
        for _ in range(3):
            training.step(rows)
    theirs, ours = (training.results(rows)["logits"] for training in trainings)
    assert (ours - before).abs().max() > 1e-3
    # AdamW makes rounding noise of key biases' gradients into steps, which move the logits by less.
    assert (theirs - ours).abs().max() < 1e-6


def test_padding_further_than_the_longest() -> None:
    encodings = nine_rows()
    assert padded_batch(encodings, [0, 2]).input_ids.shape == (2, 5)
    ids, mask, segments = padded_batch(encodings, [0, 2], 7)
    assert ids.shape == mask.shape == segments.shape == (2, 7)
    assert mask.sum(1).tolist() == [5, 3]
    assert padded_batch(encodings, [1], 7).input_ids.shape == (1, 17)
    assert padded_batch(encodings, [1], multiple=8).input_ids.shape == (1, 24)
    assert padded_batch(encodings, [3, 4], 2, multiple=8).input_ids.shape == (2, 8)


class TestArithmetic:
    """Oracle: PyTorch's own count of floating-point operations, on the plain model."""

    def test_forward_and_backward(self) -> None:
        model = tiny_bert()
        adapt(model, plan("bitfit", L))  # biases alone: every linear map has a dX, and no more
        set_impl(model, "reference")
        model.classifier.requires_grad_(False)
        T, B = 7, 3
        ids = torch.ones(B, T, dtype=torch.long)
        head = 2 * B * (CONFIG.hidden_size**2 + CONFIG.hidden_size * C)
        with FlopCounterMode(display=False) as forward:
            logits = model(ids)
        assert forward.get_total_flops() == arithmetic.forward_flop(CONFIG, [T] * B) + head
        with FlopCounterMode(display=False) as backward:
            torch.autograd.backward(logits.sum())
        both = arithmetic.step_flop(CONFIG, [T] * B, first_trainable=0)
        # The first layer's query, key and value need no gradient of their input.
        first = 3 * 2 * B * T * CONFIG.hidden_size**2
        counted = forward.get_total_flops() + backward.get_total_flops()
        assert counted == both + 2 * head - first

    def test_layers_that_are_kept_or_frozen_cost_less(self) -> None:
        # D = 20, F = 37: per token 2·(4·400 + 2·20·37) = 6,160; attention 4·20·(49 + 25) = 5,920.
        layer, layer_backward = 12 * 6160 + 5920, 12 * 6160 + 2 * 5920
        assert arithmetic.forward_flop(CONFIG, [7, 5]) == 6 * layer
        assert arithmetic.step_flop(CONFIG, [7, 5], 4) == 6 * layer + 2 * layer_backward
        assert arithmetic.step_flop(CONFIG, [7, 5], 4, 4) == 2 * layer + 2 * layer_backward

    def test_the_first_trainable_layer(self) -> None:
        firsts = {method: adapted(method).bert.frozen_depth for method in METHODS}
        assert firsts["SPAFIT-1-3-II"] == 2 and firsts["bitfit"] == 0

    def test_a_rate_is_measured(self) -> None:
        rate = arithmetic.matmul_rate_gflops(arithmetic.product_shapes(CONFIG, 9))
        assert rate.torch_gflops > 0
        assert rate.best_gflops == max(rate.torch_gflops, rate.onednn_gflops or 0)

    def test_the_best_rate_is_that_of_one_of_the_sizes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def seconds(product: Callable[[], torch.Tensor], device: torch.device) -> float:
            n = len(product())
            return {8: 1e-6, 16: 2e-6, 24: 1e-5}[n]

        monkeypatch.setattr(arithmetic, "_median_s", seconds)
        cpu = torch.device("cpu")
        # 2·8³ = 1,024 in 1 µs; 2·16³ = 8,192 in 2 µs; 2·24³ = 27,648 in 10 µs.
        rate, size = arithmetic.best_matmul_gflops(cpu, torch.bfloat16, (8, 16, 24))
        assert (rate, size) == (pytest.approx(4.096), 16)
        monkeypatch.setattr(arithmetic, "_median_s", lambda *_: 1e-3)
        # 4,000 bytes are read and 4,000 written in 1 ms.
        assert arithmetic.copy_gb_per_s(cpu, 4000) == pytest.approx(8e-3)

    def test_a_call_is_timed(self) -> None:
        assert 0.002 <= arithmetic._median_s(lambda: time.sleep(0.002), torch.device("cpu")) < 0.1


def test_a_profile_divides_the_whole_step() -> None:
    """Oracle: the groups' shares make 100 % of the step, and each is of what was run."""
    x = torch.randn(60, 60, requires_grad=True)

    def step() -> None:
        y = torch.nn.functional.dropout(torch.nn.functional.gelu(x @ x), 0.5)
        torch.autograd.backward(torch.nn.functional.layer_norm(y, (60,)).sum())

    shares = operations.profile_step(step, torch.device("cpu"))
    assert sum(share.percent for share in shares) == pytest.approx(100, abs=1)
    largest = {share.group: share.largest for share in shares}
    assert {"matrix products", "GELU", "LayerNorm", "dropout, random numbers"} <= largest.keys()
    assert largest["matrix products"] == "aten::mm"
    assert "| GELU |" in operations.table(shares)


class TestReport:
    """Oracle: what was written, read back."""

    def rows(self) -> list[dict[str, str | int | float]]:
        base, fast = timing.timings({"base": [9.0, 8.0], "fast": [3.0, 4.0]}, [Rows((1,), 7)] * 2)
        where = report.place(torch.device("cpu"), "float32")
        return [{"task": "rte", "seed": 3, **each.columns(), **where} for each in (base, fast)]

    def test_csv_round_trip(self, tmp_path: Path) -> None:
        path, rows = tmp_path / "folder" / "x.csv", self.rows()  # measured once: loads differ
        first = report.append_rows(path, rows)
        both = report.append_rows(path, rows)
        assert both == first + first == report.read_rows(path)
        assert first[1] | {"contender": "fast", "ratio": "2.5", "seed": "3"} == first[1]
        assert [row["round_times_ms"] for row in first] == ["9.0 8.0", "3.0 4.0"]
        assert first[1]["threads"] == str(torch.get_num_threads())
        assert {"torch", "transformers", "peft", "spafit", "commit", "processor"} <= first[1].keys()

    def test_other_columns_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.csv"
        report.append_rows(path, self.rows())
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"other columns \(loss\)"):
            report.append_rows(path, [{**row, "loss": 1.0} for row in self.rows()])
        assert path.read_bytes() == before

    def test_markdown_and_figure(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        report.write_results(tmp_path / "x", self.rows(), "A title")
        table = (tmp_path / "x.md").read_text(encoding="utf-8")
        header, rule, base, fast, _, setting, *_ = table.splitlines()
        cells = [line.strip("|").split("|") for line in (header, rule, base, fast)]
        assert {len(row) for row in cells} == {len(cells[0])}
        row = dict(
            zip(*([cell.strip() for cell in line] for line in (cells[0], cells[3])), strict=True)
        )
        assert row["contender"] == "fast" and row["ratio"] == "2.5" and row["setting"] == "1"
        assert "task" not in row and "round_times_ms" not in row
        assert setting.startswith("1. task rte, seed 3, device cpu, ")
        assert table in capsys.readouterr().out
        picture = (tmp_path / "x.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 100_000

    def test_digits(self) -> None:
        written = [report.text(value) for value in (2.34567, 0.000123456, 12345.67, 7, "x", 1.0)]
        assert written == ["2.346", "0.0001235", "12345.7", "7", "x", "1"]


def test_a_training_step_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script runs on recorded lengths, with all contenders, and writes its files."""
    small = dataclasses.replace(CONFIG, vocab_size=28_996, max_position_embeddings=512)
    monkeypatch.setitem(SHAPES, "tiny", small)
    train_step.main(
        "--model-shape tiny --method SPAFIT-1-3-II --task cola --batches 2 --batch-size 3 "
        f"--kept-prefix --padded-128 --profile --data /nowhere --out {tmp_path / 'x'}".split()
    )
    rows = report.read_rows(tmp_path / "x.csv")
    names = ("peft", "peft-128", "eager", "kept")
    assert [row["contender"] for row in rows] == [FORMS[name].name for name in names]
    assert {row["lengths"] for row in rows} == {"recorded lengths"}
    assert all(float(row["share_at_best"]) > 0 for row in rows)
    assert float(rows[3]["floor_gflop"]) < float(rows[2]["floor_gflop"])
    assert "matrix products" in capsys.readouterr().out
