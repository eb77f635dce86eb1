"""Models whose parameters several processes share, average or hold in parts.

Each test runs a function of this module in a fresh process, which may fork: it has no threads yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support import environment
from support.tiny_bert import CONFIG, short, tiny_bert
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import spafit
from spafit.bert import BertForSequenceClassification

WORLD = 2
IDS = [
    torch.randint(1, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(shape[1]))
    for shape in ((3, 7), (4, 11))
]
SIGNS = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)


def adapted() -> BertForSequenceClassification:
    """Return a small adapted model in which A and B matter; the same in every process."""
    model = tiny_bert()
    spafit.adapt(model, short("SPAFIT-1-3-II"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def steps(model: torch.nn.Module, shares: list[torch.Tensor], count: int = 3) -> list[float]:
    """Descend along the mean gradient of the shares of a batch; give the loss before each step."""
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-2)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = torch.stack([(model(ids) * SIGNS).sum() for ids in shares]).mean()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


class TestShared:
    """Oracle: the values that the training process itself ends with."""

    def test_shared_memory_with_a_training_child(self) -> None:
        run_here("train_in_a_child")


class TestDistributed:
    """Oracle: one process that takes both shares of every batch."""

    def test_data_parallel_and_fully_sharded(self) -> None:
        run_here("train_in_parallel_and_in_shards")


def run_here(name: str) -> None:
    code = f"import {__name__} as here; here.{name}()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def in_child(work: Callable[[], object]) -> int:
    """Fork; the child's status is 0 if the work is done without an error."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        finally:
            os._exit(1)
    return pid


def wait(pids: list[int]) -> None:
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids)


def in_every_rank(work: Callable[[int], object]) -> None:
    """Do the work in two processes that can reach each other by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"  # no port that another process might have taken

        def member(rank: int) -> None:
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
            work(rank)
            dist.destroy_process_group()

        wait([in_child(lambda rank=rank: member(rank)) for rank in range(WORLD)])


def train_in_a_child() -> None:
    for impl in ("auto", "reference"):
        model = adapted()
        spafit.set_impl(model, impl)
        model.share_memory()
        before = {name: value.detach().clone() for name, value in trained(model).items()}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "values"

            def train(model: torch.nn.Module = model, file: Path = file) -> None:
                steps(model, IDS)
                save_file({name: value.detach() for name, value in trained(model).items()}, file)

            wait([in_child(train)])
            values = load_file(file)
        for name, value in trained(model).items():
            # A key's bias shifts all of a row's scores alike, which softmax does not see.
            assert not torch.equal(value, before[name]) or "key.bias" in name, name
            assert torch.equal(value, values[name]), name


def assert_as_one_process(rank: int, losses: list[float], values: dict[str, torch.Tensor]) -> None:
    """Hold what a rank found against one process that trains on all shares."""
    model = adapted()
    twin = adapted()
    spafit.set_impl(model, "reference")
    spafit.set_impl(twin, "reference")
    for number, loss in enumerate(losses):
        expected = (model(IDS[rank]) * SIGNS).sum().item()
        assert abs(loss - expected) < 1e-10, (rank, number, loss, expected)
        steps(model, IDS, 1)
    for name, value in trained(model).items():
        torch.testing.assert_close(values[name], value.detach(), rtol=0, atol=1e-10, msg=name)


def train_in_parallel_and_in_shards() -> None:
    def in_parallel(rank: int) -> None:
        model = adapted()
        parallel = DistributedDataParallel(model)
        losses = steps(parallel, [IDS[rank]])
        values = {name: value.detach() for name, value in trained(model).items()}
        assert_as_one_process(rank, losses, values)

    def in_shards(rank: int) -> None:
        model = adapted()
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses = steps(model, [IDS[rank]])
        values = {name: value.full_tensor().detach() for name, value in trained(model).items()}
        assert_as_one_process(rank, losses, values)

    def both(rank: int) -> None:
        in_parallel(rank)
        in_shards(rank)

    in_every_rank(both)
