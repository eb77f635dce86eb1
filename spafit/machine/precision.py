"""The device that a model runs on, and the precision of its products."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

import spafit.machine.kernel_choices  # noqa: F401 (what it remembers is used from here on)
from spafit.errors import ConfigError
from spafit.kernels.products import bf16_products
from spafit.machine import PRECISIONS

NO_BF16 = (
    "this processor has no products in bf16 (AVX512-BF16 or AMX-BF16): precision bf16 computes "
    "them by way of float32, which is slower than precision float32 and less exact"
)
"""What asking for bf16 costs on a CPU without such products."""


def resolve_device(name: str) -> torch.device:
    """Return the device with this name; ``"auto"`` is a GPU if there is one.

    Raises
    ------
    ConfigError
        If there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).item()  # "meta" makes tensors, but they hold no values
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"the device {name!r} cannot be used: {reason}") from None
    return torch.device(name)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision for a device: ``"float32"``, ``"tf32"``, ``"bf16"`` or ``"fp16"``.

    ``"tf32"`` is float32, except that a GPU of compute capability 8.0 or later rounds the factors
    of matrix products to 10 bits of fraction. ``"auto"`` is float32 on the CPU, bf16 on a GPU that
    has it (8.0 or later), and fp16 on older ones such as the V100.

    Raises
    ------
    ConfigError
        If the device does not have the precision asked for.

    Warns
    -----
    UserWarning
        If the precision is bf16 on a CPU without products in it (:data:`NO_BF16`).
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}: {precision!r}")
    has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "auto":
        if device.type != "cuda":
            return "float32"
        return "bf16" if has_bf16 else "fp16"
    if precision == "bf16" and not has_bf16:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"{name} has no bf16 units; use precision fp16, or auto")
    if precision == "bf16" and device.type == "cpu" and not bf16_products():
        warnings.warn(NO_BF16, stacklevel=1)  # one place for all callers, so that it is shown once
    if precision == "tf32" and (device.type != "cuda" or not has_bf16):
        raise ConfigError(
            f"tf32 needs a GPU of compute capability 8.0, the device is {device}; use precision "
            "float32"
        )
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"fp16 needs a GPU, the device is {device}; use precision float32")
    return precision


def has_half(precision: str, device: torch.device) -> bool:
    """Return whether a device multiplies in a half precision: bf16 or fp16, and has the units."""
    if precision not in ("bf16", "fp16"):
        return False
    return device.type == "cuda" or (device.type == "cpu" and bool(bf16_products()))


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Run matrix products in ``precision``, even inside another autocast.

    Parameters stay in float32.
    """
    if precision == "float32":
        return torch.autocast(device.type, enabled=False)
    if precision == "tf32":
        return _tf32_alone(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def _tf32_alone(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False), tf32_products():
        yield


@contextlib.contextmanager
def tf32_products(enabled: bool = True) -> Iterator[None]:
    """Have a GPU multiply float32 matrices in tf32, inside the block: forward and backward alike.

    Unlike autocast, it must enclose the backward pass too.
    """
    if not enabled:
        yield
        return
    # The older of PyTorch's two settings: torch.compile reads it, and raises an error if only the
    # newer one is set.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
