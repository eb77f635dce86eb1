"""One run trained by many processes equals the same run in one.

The processes are forked, with the variables of torchrun; the last tests start torchrun itself. The
run has 25 examples in batches of 6, so that the last batch of an epoch is a single one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import environment
from support.captured import Recorder, captured, eager, make_feed
from support.interruptions import differences, everything
from support.many_processes import ended, ranks, train
from support.small_runs import N_DEV, STEPS_AN_EPOCH, N, SmallRun, read_log, trained
from support.tortured_runs import Trainer, Zygote, arguments, record_of

import spafit
from spafit.cli import main
from spafit.config import BertConfig
from spafit.errors import CheckpointError, ConfigError
from spafit.machine.launched import Launched, launched
from spafit.machine.random_states import seeded
from spafit.training.processes.together import SharedSaver, Together, shared_out
from spafit.training.saving import Saver
from spafit.training.state import TrainingState

EXACT: dict[str, Any] = {"exactly": True, "without_dropout": True}


@pytest.fixture
def run(zygote: Zygote, root: Path, tmp_path: Path) -> Callable[..., tuple[Path, list[Trainer]]]:
    """Return what starts a run in so many processes, in a folder of that name."""

    def start(
        name: str, count: int, *more: str, apart: Any = None, **tampering: Any
    ) -> tuple[Path, list[Trainer]]:
        given = arguments(root, tmp_path / name, *more)
        left_out = ["--r", "--lora-dropout"] * ("--method" in more)  # a plan file states its own
        for option in [*left_out, *["--save-every"] * ("interval" in tampering)]:
            at = given.index(option)
            del given[at : at + 2]
        return tmp_path / name, train(zygote, given, count, apart, **tampering)

    return start


def close(one: Path, other: Path, tolerance: float) -> None:
    """Hold two finished runs against each other: losses, scores and trained values."""
    rows = [read_log(folder, "loss") for folder in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for key in ("loss", "grad_norm"):
        found = [np.array([row[key] for row in each], dtype=float) for each in rows]
        assert np.allclose(*found, rtol=0, atol=tolerance, equal_nan=True), key
    scores = [record_of(folder)["result"]["history"] for folder in (one, other)]
    assert scores[0] == scores[1]
    states = [everything(folder) for folder in (one, other)]
    assert states[0]["last"] == states[1]["last"]
    for file in ("adapter.safetensors", "the best adapter"):
        assert states[0][file].keys() == states[1][file].keys()
        for name, tensor in states[0][file].items():
            assert tensor.dtype == states[1][file][name].dtype
            worst = (tensor - states[1][file][name]).abs().max()
            assert worst <= allowed(name, tolerance), (file, name)


def allowed(name: str, tolerance: float) -> float:
    """Return how much a trained value may differ.

    Softmax does not see the key's bias, whose gradient is rounding alone; AdamW makes steps of it.
    """
    return 1e3 * tolerance if "self.key.bias" in name else tolerance


class TestEquality:
    """Oracle: the same run in one process."""

    def test_two_and_three_processes(
        self, run: Callable[..., Any], root: Path, tmp_path: Path
    ) -> None:
        """In float64: every example once, tokens alike, all of dev once, only what trains sent."""
        counts = [tmp_path / f"count-{rank}" for rank in range(2)]
        apart = {rank: {"count": str(path)} for rank, path in enumerate(counts)}
        runs = [
            run("one", 1, **EXACT),
            run("two", 2, **EXACT, dev_batches=3, apart=apart),
            run("three", 3, "--accumulation", "2", **EXACT, own_group=True, interval=0),
        ]
        assert [ended(trainers) for _, trainers in runs] == [[0], [0, 0], [0, 0, 0]]
        for folder, trainers in runs[1:]:
            close(runs[0][0], folder, 1e-12)
            assert not any(each.said() for each in trainers[1:])  # the first alone speaks
        assert record_of(runs[1][0])["processes"] == 2
        assert (runs[2][0] / "checkpoints" / "step-29").is_dir()  # by the clock
        assert "processes" not in record_of(runs[0][0])
        notes = [[json.loads(line) for line in path.open()] for path in counts]
        trainable = record_of(runs[1][0])["trainable"]
        rows, tokens, dev = [[], []], [[], []], [[], []]
        for rank, each in enumerate(notes):
            sent = [note["sent"] for note in each if "sent" in note]
            steps = [number for number in sent if number != 2 * N_DEV]  # the logits of dev
            assert steps == [trainable + 1] * 6 * STEPS_AN_EPOCH
            rows[rank] = [note["rows"] for note in each if "rows" in note]
            tokens[rank] = [note["tokens"] for note in each if "rows" in note]
            dev[rank] = [row for note in each if "dev" in note for row in note["dev"]]
        assert sum(rows[0]) + sum(rows[1]) == 6 * N
        assert len(rows[0]) == len(rows[1]) + 6  # the single example of each epoch
        full = [step for step in range(30) if step % 5 < 4]
        first = [tokens[0][step] for step in full]
        assert max(abs(a - b) for a, b in zip(first, tokens[1], strict=True)) <= 20
        evaluations = len(record_of(runs[1][0])["result"]["history"])
        assert sorted(dev[0] + dev[1]) == sorted([*range(N_DEV)] * evaluations)
        assert min(len(dev[0]), len(dev[1])) == 5 * evaluations

    def test_what_befalls_one_befalls_all(
        self, run: Callable[..., Any], root: Path, tmp_path: Path
    ) -> None:
        """Phases, kept prefix, weights of classes, steps skipped, memory, early stopping; tiny dev.

        One process has a loss of NaN where the oracle has, and later no memory.
        """
        glue = tmp_path / "glue" / "RTE"
        glue.mkdir(parents=True)
        for split in ("train", "dev"):
            lines = (root / "glue" / "RTE" / f"{split}.tsv").read_text().splitlines()
            rows = lines if split == "train" else lines[:3]
            (glue / f"{split}.tsv").write_text("\n".join(rows) + "\n")
        plan = tmp_path / "plan.json"
        strata = [
            {"layers": "0", "train": {}},
            {"layers": "1", "train": {"all": "bias-delta"}, "thaw": 2},
            {"layers": "2", "train": {"query": {"lora": {"r": 3, "alpha": 6}}}},
        ]
        plan.write_text(json.dumps({"name": "timed", "strata": strata}))
        more = (
            f"--method {plan} --data {tmp_path / 'glue'} --no-dropout-in-group-1 "
            "--cache-prefix memory --class-weights balanced --early-stopping 2 --seed 5"
        ).split()
        sick = {"what": "nan", "calls": [3, 4]}
        short = {"at_call": {"what": "memory", "calls": [7]}}
        one, alone = run("one", 1, *more, without_dropout=True, at_call=sick)
        assert ended(alone) == [0], alone[0].said()
        three, many = run("three", 3, *more, without_dropout=True, apart={1: {"at_call": sick}})
        assert ended(many) == [0, 0, 0], many[0].said()
        again, retried = run("again", 2, *more, without_dropout=True, apart={1: short})
        assert ended(retried) == [0, 0], retried[0].said()
        close(one, three, 1e-5)
        assert record_of(three)["result"]["skipped"] == 2
        steps = [row["step"] for row in read_log(three, "loss")]
        assert len(steps) < 6 * STEPS_AN_EPOCH  # it gave up early
        notes = [row["note"] for row in read_log(again, "note")]
        assert any("not enough memory for 3 examples at a time" in note for note in notes)
        assert everything(again)["state"]["accumulation"] > 1
        assert any("begins to train" in note for note in notes)

    def test_what_is_sent_for_bert_large(self) -> None:
        """7.49 M numbers for SPAFIT-4-9-II, and the loss; counted without weights."""
        with torch.device("meta"):
            model = spafit.BertForSequenceClassification(BertConfig(), 3)
            spafit.adapt(model, spafit.plan("SPAFIT-4-9-II", 24))
        trained = [each for each in model.parameters() if each.requires_grad]
        for each in trained:
            each.grad = torch.empty_like(each)
        assert sent_for(trained, [0] * 4) == [7_485_443 + 1]

    def test_what_has_no_gradient_anywhere_keeps_none(self) -> None:
        """So that AdamW leaves it alone, as in one process; not where another process has one."""
        trained = [torch.nn.Parameter(torch.ones(size)) for size in (2, 3, 4)]
        trained[0].grad = torch.ones(2)
        used_elsewhere = torch.tensor([1, 0, 1])
        assert sent_for(trained, [0, 1, 0, 0], used_elsewhere) == [2 + 3 + 4 + 1]
        assert [each.grad is None for each in trained] == [False, True, False]
        assert torch.equal(trained[2].grad, torch.zeros(4))  # type: ignore[arg-type]

    @pytest.mark.parametrize("kind", ["eager", "captured"])
    def test_steps_of_either_kind(self, small: SmallRun, kind: str) -> None:
        """Oracle: the step itself, where the one process has the whole batch."""
        group: Any = SimpleNamespace(agree=lambda *_: [0] * 6, add_up=lambda tensor: tensor)
        losses, values = [], []
        for together in (Together(group), None):
            model = small.model(dropout=False)
            step = eager(model) if kind == "eager" else captured(model, Recorder())
            model.train()
            losses.append([])
            for fed in make_feed(small, accumulation=2, epochs=2).batches():
                if together is None:
                    result = step(fed.micro_batches, 2.0**-7)
                else:
                    result = together.step(step, fed, 2.0**-7)
                losses[-1].append([float(each) for each in result])
            values.append(trained(model))
        assert losses[0] == losses[1]
        assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


def sent_for(trained: Any, agreed: list[int], used: torch.Tensor | None = None) -> list[int]:
    """Take a step of one of two processes without another; return how many numbers were sent."""
    sent: list[int] = []
    group: Any = SimpleNamespace(
        rank=0,
        count=2,
        is_first=True,
        agree=lambda *_: [0, 0, *agreed],
        largest=lambda here: used,
        add_up=lambda tensor: sent.append(tensor.numel()),
    )
    loss = torch.zeros((), device=trained[0].device)
    step: Any = SimpleNamespace(
        trained=trained,
        spoil=loss,
        set_learning_rate=lambda rate: None,
        gradient=lambda micro_batches, n: loss,
        descend=lambda loss: loss,
    )
    fed: Any = SimpleNamespace(micro_batches=[1], drawn=[1, 2])
    Together(group).step(step, fed, 0.1)
    return sent


class TestSharing:
    @pytest.mark.parametrize("count", [1, 2, 3, 8])
    def test_each_example_once_and_tokens_alike(self, count: int) -> None:
        draw = np.random.default_rng(0)
        for n in (1, 2, 7, 16, 33):
            lengths = draw.integers(3, 129, n).tolist()
            shares = shared_out(lengths, count)
            assert sorted(each for share in shares for each in share) == list(range(n))
            assert all(share == sorted(share) for share in shares)
            tokens = [sum(lengths[each] for each in share) for share in shares]
            assert max(tokens) - min(tokens) <= max(lengths)
            if n >= 4 * count:
                assert max(tokens) <= 1.15 * sum(lengths) / count
            assert shares[0]  # the first is never without


def test_micro_batches_are_halved_alike(small: SmallRun) -> None:
    """Down to single examples in the process that has most, whatever the others have."""
    found = []
    for rank in range(4):
        feed = make_feed(small)
        group: Any = SimpleNamespace(rank=rank, count=4)
        Together(group).divide(feed)
        fed, numbers = next(feed.batches()), []
        while True:
            rows = sum(len(each.targets) for each in fed.micro_batches)
            assert len(fed.micro_batches) == min(feed.accumulation, rows)
            halved = feed.halve(fed)
            if halved is None:
                break
            fed = halved
            numbers.append(feed.accumulation)
        found.append((rows, numbers))
    assert sum(rows for rows, _ in found) == 6
    assert found[0][1] and all(numbers == found[0][1] for _, numbers in found)
    assert found[0][1][-1] == max(rows for rows, _ in found)


def test_each_process_draws_masks_of_its_own() -> None:
    def drawn(rank: int, step: int = 0) -> list[float]:
        group: Any = SimpleNamespace(rank=rank, is_first=rank == 0)
        with seeded(3, torch.device("cpu")):
            Together(group).draw_apart(torch.device("cpu"), step)
            return [*torch.rand(2).tolist(), np.random.rand(), random.random()]  # noqa: NPY002

    with seeded(3, torch.device("cpu")):
        assert drawn(0)[:2] == torch.rand(2).tolist()
    cases = [drawn(0), drawn(1), drawn(2), drawn(1, 7)]
    assert all(len(set(each)) == 4 for each in zip(*cases, strict=True))
    assert drawn(1) == cases[1]


class TestResuming:
    """Oracle: the run that nothing happened to, in as many processes or in one."""

    def test_stopped_and_killed_bit_for_bit(self, run: Callable[..., Any], tmp_path: Path) -> None:
        """With dropout, of other masks in each process; a signal or SIGKILL comes to one."""
        runs = [
            run("whole", 2),
            run("stopped", 2, apart={1: {"stop_after": 7}}),
            run("killed", 2, apart={1: {"at_call": {"what": "kill", "calls": [10]}}}),
        ]
        whole, trainers = runs[0]
        assert ended(trainers) == [0, 0], trainers[0].said()
        stopped, trainers = runs[1]
        assert ended(trainers) == [143, 143]
        said = [each.said() for each in trainers]
        assert "stopped by SIGTERM after step 7" in said[0] and "resumes the run" in said[0]
        assert not said[1]  # the first alone speaks
        assert record_of(stopped)["status"] == "interrupted"
        killed, trainers = runs[2]
        start = time.monotonic()
        assert trainers[1].wait() == -9
        assert trainers[0].wait() == 1
        assert time.monotonic() - start < 20
        assert "another process of this run has ended" in trainers[0].said()
        assert "resumes the run from its last checkpoint" in trainers[0].said()
        again = [run("stopped", 2), run("killed", 2)]
        assert [ended(trainers) for _, trainers in again] == [[0, 0]] * 2
        for folder in (stopped, killed):
            assert not differences(everything(whole), everything(folder))
        checkpoint = max((whole / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
        masks = [
            load_file(checkpoint / name)["random.cpu"]
            for name in ("state.safetensors", "process-1.safetensors")
        ]
        assert not torch.equal(*masks)

    def test_by_another_number_of_processes(self, run: Callable[..., Any]) -> None:
        """In 2, stopped in an evaluation; in 3, with steps of its own; to the end in 1 again."""
        one, alone = run("one", 1, **EXACT)
        parts = [
            (2, {1: {"stop_in_evaluation": 2}}, {"dev_batches": 2}, 143),
            (3, {2: {"stop_after": 11}}, {}, 143),
            (1, {0: {"stop_after": 16}}, {}, 143),
            (2, {}, {}, 0),
        ]
        for count, apart, more, code in parts:
            folder, trainers = run("parts", count, **EXACT, **more, apart=apart)
            assert ended(trainers) == [code] * count, trainers[0].said()
            if count == 2 and code:
                path = folder / "checkpoints" / "step-7" / "state.json"
                assert json.loads(path.read_text())["history"] == []  # it was left off
            if count == 3:
                assert "resumed after step 7" in trainers[0].said()
        assert ended(alone) == [0]
        close(one, folder, 1e-12)
        changed = [entry["changed"].get("processes") for entry in record_of(folder)["resumed"]]
        assert changed == [[2, 3], [3, None], [None, 2]]


class TestFailing:
    def test_an_error_of_one_is_that_of_all(self, run: Callable[..., Any]) -> None:
        at = {"at_call": {"what": "data", "calls": [3]}}
        bug = {"at_call": {"what": "bug", "calls": [3]}}
        cases = [
            (run("data", 2, apart={1: at}), 2, "process 1 of 2: a fault of the data"),
            (run("bug", 2, apart={1: bug}), 1, "process 1 of 2: KeyError: 'a bug'"),
            (run("first", 2, apart={0: at}), 2, "spafit: a fault of the data"),
            (run("disk", 2, failing_saves=True), 1, "the disk is full. It failed twice in a row"),
            (run("small", 3, "--batch-size", "2"), 2, "batch of 2 (batch_size) cannot be divided"),
            (run("gpu", 2, "--device", "cuda:1"), 2, "'cuda:1' is for one process"),
        ]
        for (folder, trainers), code, text in cases:
            codes = ended(trainers)
            is_bug = folder.name == "bug"
            assert codes[0] == code and (is_bug or codes == [code] * len(codes)), folder.name
            assert text in trainers[0].said(), trainers[0].said()
            assert is_bug or not any(each.said() for each in trainers[1:]), folder.name
            if folder.name in ("data", "bug", "first", "disk"):
                assert record_of(folder)["status"] == "failed"
            else:
                assert not folder.exists()

    def test_one_that_hangs_is_not_waited_for(self, zygote: Zygote, root: Path) -> None:
        """Without a run folder, too."""
        apart = {1: {"at_call": {"what": "hang", "calls": [2]}}}
        first, hanging = train(zygote, arguments(root, None), 2, apart, patience=5)
        assert first.wait(60) == 1
        assert "another process of this run has ended or cannot be reached" in first.said()
        hanging.kill()
        assert hanging.wait() == -9

    def test_processes_that_train_different_runs(
        self, zygote: Zygote, root: Path, tmp_path: Path
    ) -> None:
        trainers = [
            zygote.train(arguments(root, tmp_path / "run", "--seed", str(seed)), place=place)
            for seed, place in enumerate(ranks(2))
        ]
        assert ended(trainers) == [2, 2]
        assert "process 1 trains another run than process 0" in trainers[0].said()
        assert "seed is 0, in process 1 is 1" in trainers[0].said()
        assert "initial values" not in trainers[0].said()  # they follow from the seed

    def test_the_first_alone_has_the_run_folder(
        self, zygote: Zygote, root: Path, tmp_path: Path
    ) -> None:
        """As on several machines without a common one: the others get what it has read."""
        for code, more in ((143, {"stop_after": 7}), (0, {})):
            trainers = [
                zygote.train(arguments(root, tmp_path / name), place=place, **more)
                for name, place in zip(("run", "nowhere"), ranks(2), strict=True)
            ]
            assert ended(trainers) == [code] * 2, trainers[1].said()
        assert "resumed after step 7" in trainers[0].said()
        assert not (tmp_path / "nowhere").exists()

    def test_other_verbs_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
            monkeypatch.setenv(name, value)
        assert main(["plan", "full"]) == 2
        assert "spafit plan works in one process" in capsys.readouterr().err


def test_a_failed_save_is_tried_again_at_the_next_interval(
    monkeypatch: pytest.MonkeyPatch, small: SmallRun
) -> None:
    def refuse(*_: object) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(Saver, "_save", refuse)
    group: Any = SimpleNamespace(
        is_first=True,
        agree=lambda *_: [0, 1, 1, 0, 0, 0],  # it is still time, and the save has failed
        gather=lambda mine: [mine],
        send=lambda data: data,
    )
    together, said = Together(group), list[str]()
    step, state = eager(small.model()), TrainingState()
    saver = SharedSaver(together, None, step, small.dev, None, state, said.append)
    saver.save(state)
    assert "the disk is full; training goes on" in said[0]
    assert not saver.is_due(state)


class TestLaunched:
    def test_the_variables_of_torchrun(self) -> None:
        assert launched({}) is None
        assert launched({"WORLD_SIZE": "1", "RANK": "junk"}) is None
        given = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
        assert launched(given) == Launched(rank=3, count=4, local_rank=1)

    @pytest.mark.parametrize(
        "changed",
        [
            {"RANK": "4"},
            {"RANK": ""},
            {"RANK": "-1"},
            {"WORLD_SIZE": "two"},
            {"WORLD_SIZE": "0"},
            {"LOCAL_RANK": "4"},
            {"LOCAL_RANK": "²"},
        ],
    )
    def test_what_does_not_fit_is_refused_by_name(self, changed: dict[str, str]) -> None:
        given = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", **changed}
        with pytest.raises(ConfigError, match=next(iter(changed))):
            launched(given)


class TestOutside:
    def torchrun(self, given: list[str], *options: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, "-m", "--", "spafit", *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(OMP_NUM_THREADS="1", **variables),
        )

    @pytest.mark.parametrize("nodes", [1, 2])
    def test_torchrun_trains_several_seeds(
        self, run: Callable[..., Any], root: Path, tmp_path: Path, nodes: int
    ) -> None:
        """On one node, and with the line for several, given twice here.

        Oracle: forked processes with the same variables.
        """
        out = tmp_path / "torchrun"
        more = ("--seeds", "3", "4", "--epochs", "1")
        options = ["--nproc-per-node", "2"]
        if nodes == 2:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                endpoint = f"localhost:{free.getsockname()[1]}"
            options = "--nnodes 2 --nproc-per-node 1 --rdzv-id rte --rdzv-backend c10d".split()
            options += ["--rdzv-endpoint", endpoint]
        started = [self.torchrun(arguments(root, out, *more), *options) for _ in range(nodes)]
        forked, trainers = run("forked", 2, *more)
        assert ended(trainers) == [0, 0]
        outputs = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [0] * nodes, outputs
        said = "".join(output for output, _ in outputs)
        assert said.count("2 seeds (3, 4)") == 1 and said.count("dev  accuracy") == 2
        assert json.loads((out / "summary.json").read_text())["seeds"] == [3, 4]
        for seed in ("seed-3", "seed-4"):
            assert not differences(everything(forked / seed), everything(out / seed))

    @pytest.mark.slow  # torchrun gives the other process half a minute to end
    def test_torchrun_restarts_what_was_killed(self, root: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        started = self.torchrun(
            arguments(root, out, "--epochs", "60"),
            *"--nproc-per-node 2 --max-restarts 1 --monitor-interval 0.1".split(),
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        limit = time.monotonic() + 60
        while not list(out.glob("checkpoints/step-*")):
            assert started.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        ranks = [
            pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
        ]
        os.kill(int(ranks[0]), signal.SIGKILL)
        _, complaints = started.communicate(timeout=120)
        assert started.returncode == 0, complaints
        record = record_of(out)
        assert record["status"] == "finished" and record["processes"] == 2
        assert len(record["resumed"]) == 1

    def test_a_loop_of_one_s_own_with_ddp(self, zygote: Zygote, root: Path, tmp_path: Path) -> None:
        """Oracle: the loop in one process; and of a model that is wrapped for a trainer.

        It sends the gradient of each trained number once a step, and of no others.
        """
        found = []
        for count, wrapped in ((1, False), (2, False), (2, True)):
            out = tmp_path / f"{count}-{wrapped}.safetensors"
            own = {"model": str(root / "tiny"), "out": str(out), "wrapped": wrapped}
            trainers = train(zygote, [], count, own_loop=own)
            assert ended(trainers) == [0] * count, trainers[0].said()
            found.append(load_file(out))
            trained = sum(tensor.numel() for tensor in found[-1].values())
            sent = json.loads(out.with_suffix(".json").read_text())
            assert sent == [trained if count > 1 else 0] * 3
        for other in found[1:]:
            assert found[0].keys() == other.keys()
            for name, tensor in found[0].items():
                # AdamW divides by the root of small gradients.
                assert (tensor - other[name]).abs().max() < allowed(name, 1e-11), name
