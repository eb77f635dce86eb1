"""Triton's interpreter made cheaper for the tests of kernels; what it computes stays the same."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def patched_once_a_launch() -> Iterator[None]:
    """Have the interpreter replace Triton's language once a launch and module, not a call.

    It replaces the language's functions by its own when a kernel is launched, and all of them again
    whenever the kernel calls a function of ours or of Triton's, which takes a third of the time.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter") if _interprets() else None
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        yield
        return
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: list[set[str]] = []  # names of modules, a set for the launch under way

    def replace_once(function: Callable[..., Any]) -> Any:
        module = function.__globals__["__name__"]
        if replaced and module in replaced[-1]:
            return interpreter._LangPatchScope()  # of nothing to be undone
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


def _interprets() -> bool:
    """Return whether kernels run in the interpreter here."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return os.environ.get("TRITON_INTERPRET") == "1"
