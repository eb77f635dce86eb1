"""Help, the version and what is wrong with an option do without torch.

Oracle: ``sys.modules`` of fresh processes, and their processor time.
"""

from __future__ import annotations

import ast
import compileall
import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support import environment

import spafit
from spafit.cli.parser import VERBS

LIGHT = (
    [],
    ["--help"],
    ["--version"],
    *([verb, "--help"] for verb in VERBS),
    ["paint"],
    ["train", "--epoch", "3"],
    ["train", "--task", "rte", "--method", "bitfit", "--epochs", "0"],
    ["train", "--task", "rte", "--method", "bitfit", "--cache-prefix", "disk"],
    ["train", "--task", "rte", "--method", "SPAFIT-0-1-II", "--together"],
    ["grid", "table-2", "--cells", "3/2"],
    ["grid", "table-2", "--ray", "auto", "--workers", "2"],
    ["predict", "runs/rte", "--submission", "x", "--output", "y"],
    ["inspect", "runs/rte", "--tasks", "rte"],
    ["predict", "runs/rte", "runs/mrpc", "--submission", "x"],
    ["train", "--task", "foo", "--method", "bitfit"],  # the table of the tasks needs numpy
)


def python(code: str) -> str:
    """Run a process, and return what it prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=True
    ).stdout


def test_no_help_and_no_wrong_option_imports_torch() -> None:
    code = f"""
import contextlib, io, sys
from spafit.cli import main
for arguments in {LIGHT!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(arguments)
    heavy = {{"torch", "numpy", "tqdm", "huggingface_hub", "safetensors", "tokenizers"}}
    heavy -= {{"numpy"}} if "foo" in arguments else set()
    assert not heavy & sys.modules.keys(), (arguments, heavy & sys.modules.keys())
print("light")
"""
    assert python(code) == "light\n"


def test_a_plan_does_without_the_compiler_of_torch() -> None:
    """An addition on the meta device, or zeros_like, has torch import it, which takes a second."""
    code = """
import contextlib, io, sys
from spafit.cli import main
for method in ("SPAFIT-4-9-II", "houlsby", "ia3", "full"):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["plan", method]) == 0
print({"torch._dynamo", "sympy"} & sys.modules.keys())
"""
    assert python(code) == "set()\n"


def test_an_update_does_without_the_compiler_of_torch() -> None:
    code = """
import sys
import torch
import spafit
from spafit.training.optimisation import make_optimizer
from spafit.training.step import TrainingStep
config = spafit.BertConfig(hidden_size=20, num_hidden_layers=2, num_attention_heads=5)
model = spafit.BertForSequenceClassification(config, 2)
spafit.adapt(model, "lora-ii")
step = TrainingStep(model, make_optimizer(model, learning_rate=0.1, weight_decay=0.1))
before = model.classifier.bias.detach().clone()
torch.autograd.backward(model(torch.randint(99, (3, 7)))[:, 0].sum())
step.update()
assert not torch.equal(model.classifier.bias, before)
print({"torch._dynamo", "sympy"} & sys.modules.keys())
"""
    assert python(code) == "set()\n"


def test_help_takes_at_most_150_ms() -> None:
    """Of the processor's time beyond Python's own, at best of five: other work only adds.

    The modules are compiled before, as an installation compiles them; usual is 40 ms.
    """
    compileall.compile_dir(Path(spafit.__file__).parent, quiet=1)

    def seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, *arguments], env=environment(), capture_output=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    own = min(seconds("-c", "pass") for _ in range(3))
    assert min(seconds("-m", "spafit", "train", "--help") for _ in range(5)) - own <= 0.15


class TestPublicNames:
    """Oracle: the imports that type checkers and editors read."""

    def test_are_those_that_a_type_checker_sees(self) -> None:
        tree = ast.parse(Path(spafit.__file__).read_text(encoding="utf-8"))
        [block] = [node for node in tree.body if isinstance(node, ast.If)]
        seen = {"__version__": "spafit.version"}
        for node in block.body:
            assert isinstance(node, ast.ImportFrom) and node.module
            seen |= {alias.name: node.module for alias in node.names}
        assert seen.keys() == set(spafit.__all__)
        for name, module in seen.items():
            assert getattr(spafit, name) is getattr(importlib.import_module(module), name)
        assert len(spafit.__all__) == len(set(spafit.__all__))

    def test_are_imported_when_they_are_used(self) -> None:
        """And however spafit is entered, it remembers which kernels were fastest."""
        code = """
import importlib, os, sys, spafit
assert set(spafit.__all__) <= set(dir(spafit))
for name in ("__path__", "__wrapped__", "__file__"):
    hasattr(spafit, name)
if os.fork() == 0:
    from spafit.glue import load
    import spafit.tasks.glue
    os._exit("torch" in sys.modules or spafit.tasks.glue.load is not load)
assert os.wait()[1] == 0
import torch
for entry in ("weights.pretrained", "machine.precision"):  # one of them is part of all others
    if os.fork() == 0:
        importlib.import_module(f"spafit.{entry}")
        from spafit.kernels.gpu import choices
        os._exit(type(choices._memory).__name__ != "KernelsFile")
    assert os.wait()[1] == 0, entry
assert spafit.glue.load
from spafit import *
assert fit is spafit.fit and glue is spafit.glue is sys.modules["spafit.glue"] is spafit.tasks.glue
assert spafit.training.settings.complete and spafit.kernels.reference  # as modules of a package
"""
        python(code)

    def test_another_name(self) -> None:
        with pytest.raises(AttributeError, match="module 'spafit' has no attribute 'nothing'"):
            _ = spafit.nothing
        with pytest.raises(ImportError, match="cannot import name 'nothing' from 'spafit'"):
            from spafit import nothing  # noqa: F401
