"""Choose among the forms of an operation, and refuse what a form does not support."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys

import torch

from spafit.errors import ConfigError


def choose_form(operation: str, impl: str, known: tuple[str, ...], auto: str) -> str:
    """Return the form that ``impl`` asks for; ``auto`` if it is ``"auto"``.

    Inside a transform of ``torch.func`` ``"auto"`` is the plain form, because a custom backward
    cannot be transformed.

    Raises
    ------
    ConfigError
        If the operation has no such form, or the form has a custom backward inside a transform.
    """
    if impl == "auto":
        return "reference" if is_transformed() else auto
    if impl not in known:
        choices = ", ".join(f'"{name}"' for name in known)
        raise ConfigError(f'{operation} has no impl={impl!r}; choose "auto", {choices}')
    if impl in ("fused", "triton") and is_transformed():
        raise ConfigError(
            f"{operation}(impl='{impl}') cannot be transformed by torch.func; use impl='auto' or "
            "'reference', or spafit.set_impl(model, 'auto')"
        )
    return impl


def is_transformed() -> bool:
    """Return whether the call is inside a transform of ``torch.func``: ``grad``, ``vmap``, ``jvp``.

    ``torch.autograd.Function.apply`` asks the same. Code that ``torch.compile`` traces uses the
    operator of :mod:`spafit.kernels.compiled` instead.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def best_on(device: torch.device) -> str:
    """Return the form of dropout and LayerNorm that is best on a device.

    It is the fused form on a CPU. PyTorch has fast GPU kernels for the plain form, and
    ``torch.compile`` fuses it.
    """
    plain = device.type != "cpu" or torch.compiler.is_compiling()
    return "reference" if plain else "fused"


def refuse_second_derivative(operation: str) -> None:
    """Raise a ConfigError if a fused backward is itself differentiated."""
    if torch.is_grad_enabled():
        raise ConfigError(
            f"the fused {operation} cannot be differentiated twice (create_graph=True); use "
            "impl='reference', or spafit.set_impl(model, 'reference')"
        )


TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The types that the Triton kernels compute in; their sums are float32."""


def why_no_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Return why Triton kernels cannot run on a device in a type; empty if they can."""
    reason = _why_not_on(device)
    if not reason and dtype not in TRITON_TYPES:
        reason = f"it computes in float32, bfloat16 or float16, found {dtype}"
    return reason


def _why_not_on(device: torch.device) -> str:
    if device.type == "cuda" and (reason := _why_too_old(device)):
        return reason
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; a CUDA build of torch brings it along"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu":
        return "" if interpreted else "Triton needs a GPU; TRITON_INTERPRET=1 runs it on the CPU"
    if device.type != "cuda":
        return f"Triton needs a CUDA device, found {device}"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, which runs Triton on the CPU; unset it"
    return ""


@functools.cache
def _why_too_old(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"Triton needs compute capability 8.0, {device} has {major}.{minor}"
    return ""


def suits_triton(*tensors: torch.Tensor | None) -> bool:
    """Return whether ``auto`` may take a Triton form: eager work on a GPU, in a supported type."""
    given = [each for each in tensors if each is not None]
    return not torch.compiler.is_compiling() and all(
        each.device.type == "cuda" and not why_no_triton(each.device, each.dtype) for each in given
    )


def precision(dtype: torch.dtype) -> str:
    """Return the name of the precision of products in a type: for float32 "float32" or "tf32"."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def require_triton(operation: str, *tensors: torch.Tensor | None) -> None:
    """Raise an error if an operation's Triton form is not available for these tensors.

    Raises
    ------
    ConfigError
        It names the operation and the reason.
    """
    for tensor in tensors:
        if tensor is not None and (reason := why_no_triton(tensor.device, tensor.dtype)):
            raise ConfigError(f"{operation}(impl='triton') is not available: {reason}")
