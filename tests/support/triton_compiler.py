"""Compile Triton kernels for GPUs that are not here, as their launchers would launch them.

The interpreter runs a kernel's arithmetic, but not Triton's compiler, so that a kernel may pass
every test on a CPU and not compile for a GPU. Triton itself compiles without a GPU, down to machine
code. Here a launcher is called with CPU tensors while launching is replaced by compiling:

    with compiling_for(90) as kernels:
        packed_attention_triton(QKV, ...)   # results are what uninitialised memory holds
    for kernel in kernels:
        assert kernel.spilled_bytes == 0 and kernel.shared_bytes < 227 * 1024

It must run in a process in which ``TRITON_INTERPRET`` is not set; :func:`in_fresh_process` starts
one and calls a function of test modules in it.
"""

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from support import REPOSITORY, environment

pytest.importorskip("triton")


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, compiled for one kind of arguments."""

    name: str
    capability: int
    registers: int
    """32-bit registers a thread, of 255."""
    spilled_bytes: int
    """Registers written to memory for want of more, bytes a thread; 0 is wanted."""
    shared_bytes: int
    """Shared memory a program: 99 KiB is the most on sm_80's smaller relatives, 163 on sm_80, 227
    on sm_90."""
    num_warps: int
    ptx: str


class _Driver:
    """What Triton asks of a device in order to compile for it."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        return self.target


@contextlib.contextmanager
def compiling_for(capability: int) -> Iterator[list[CompiledKernel]]:
    """Compile inside the block what would be launched, for a compute capability such as 90.

    Every kernel is compiled once for each kind of its arguments and listed in the order of its
    launches. Nothing runs: what a kernel would write stays uninitialised.
    """
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter does not compile"
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, KernelInterface

    from spafit.kernels import forms

    kernels: list[CompiledKernel] = []
    seen = set()

    def compile_instead(kernel: JITFunction, grid: object) -> object:
        def compile_it(*args: object, **kwargs: object) -> None:
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            if compiled is not None and compiled.hash not in seen:
                seen.add(compiled.hash)
                kernels.append(_described(compiled, capability))

        return compile_it

    with (
        mock.patch.object(driver, "_active", _Driver(capability)),
        mock.patch.object(KernelInterface, "__getitem__", compile_instead),
        mock.patch.object(forms, "_why_not_on", lambda device: ""),
        _fresh_caches(),
    ):
        yield kernels


@contextlib.contextmanager
def _fresh_caches() -> Iterator[None]:
    """Keep what is compiled for one target from being taken for another's."""
    import gc

    from triton.runtime.jit import JITFunction

    functions = [each for each in gc.get_objects() if type(each) is JITFunction]
    for each in functions:
        each.device_caches.clear()
    try:
        yield
    finally:
        for each in functions:
            each.device_caches.clear()


def _described(compiled: object, capability: int) -> CompiledKernel:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        # The same assembler that Triton calls, told to say what it used.
        options = ["-v", "--regAllocOptLevel=2", f"--gpu-name={target}"]
        command = [_assembler(), *options, file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", said)]
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    return CompiledKernel(
        compiled.metadata.name,
        capability,
        max(registers),
        sum(spills),
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        ptx,
    )


@functools.cache
def _assembler() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")


def in_fresh_process(folder: Path, modules: Sequence[str], function: str) -> None:
    """Call ``function()`` of each test module in a process without the interpreter.

    Raises an AssertionError with what the process said where it failed.
    """
    compiled = {key: value for key, value in environment().items() if key != "TRITON_INTERPRET"}
    code = f"import sys; sys.path.insert(0, {str(folder)!r})"
    for module in modules:
        code += f"\nprint({module!r})\nimport {module}\n{module}.{function}()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=compiled,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
