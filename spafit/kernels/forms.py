"""What the operations have in common: the choice of a form, and what a fused form refuses."""

from __future__ import annotations

import torch

from spafit.errors import ConfigError


def choose_form(operation: str, impl: str, known: tuple[str, ...], auto: str) -> str:
    """Give the form that ``impl`` asks for, ``auto`` where it leaves the choice.

    Raises
    ------
    ConfigError
        If the operation has no such form.
    """
    if impl == "auto":
        return auto
    if impl not in known:
        choices = ", ".join(f'"{name}"' for name in known)
        raise ConfigError(f'{operation} has no impl={impl!r}; choose "auto", {choices}')
    return impl


def best_on(device: torch.device) -> str:
    """Give the form of dropout and LayerNorm that a device runs best.

    Fused on a CPU. A GPU has kernels of its own for the plain form, and a compiler fuses it itself.
    """
    plain = device.type != "cpu" or torch.compiler.is_compiling()
    return "reference" if plain else "fused"


def refuse_second_derivative(operation: str) -> None:
    """Raise a ConfigError if a fused backward is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise ConfigError(
            f"the fused {operation} cannot be differentiated twice (create_graph=True); use "
            "impl='reference', or spafit.set_impl(model, 'reference')"
        )
