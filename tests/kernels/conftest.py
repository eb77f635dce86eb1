"""Make Triton's interpreter faster for the tests of kernels, with the same results."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def patched_once_a_launch() -> Iterator[None]:
    """Let the interpreter patch Triton's language once per launch and module, not once per call.

    It replaces the language's functions by its own when a kernel is launched, and all of them again
    whenever the kernel calls a jitted function, which takes a third of the time. Where Triton's
    private names for this are others, nothing is changed.
    """
    interpreter = _interpreter()
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        yield
        return
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: list[set[str]] = []  # the modules patched in each running launch

    def replace_once(function: Callable[..., Any]) -> Any:
        module = function.__globals__["__name__"]
        if replaced and module in replaced[-1]:
            return interpreter._LangPatchScope()  # that undoes nothing
        if replaced:
            replaced[-1].add(module)
        return replace(function)

    def launch_once(executor: Any, *args: Any, **kwargs: Any) -> None:
        replaced.append(set())
        try:
            launch(executor, *args, **kwargs)
        finally:
            replaced.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_once)
        yield


def _interpreter() -> Any:
    """Return the module of Triton's interpreter if kernels run in it here, else None."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from triton.runtime import interpreter
    except ImportError:
        return None
    return interpreter
