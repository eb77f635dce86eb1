"""What a result was computed with: versions, processor, GPU, and peak memory."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from spafit.version import __version__


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy")
    found = {package: metadata.version(package) for package in packages}
    return {"spafit": __version__, "python": platform.python_version(), **found}


def machine() -> dict[str, Any]:
    """Describe the machine: platform, processor, threads, GPU."""
    record: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
    return record


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB since it was last reset, of the GPU or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def processor() -> str:
    """Return the processor's model name, if the system gives one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
