"""Convert a ``pytorch_model.bin`` into a safetensors file (``convert``).

Only this module loads a pickle. ``torch.load`` had vulnerabilities even with ``weights_only=True``
(CVE-2025-32434 before torch 2.6, CVE-2026-24747 before 2.10), so a pickle is loaded once, on
request, and never by a training run.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from pathlib import Path

import torch

from spafit.errors import WeightsError
from spafit.weights.safefile import SafeFile, save_tensors

EPILOG = """\
examples:
  python -m weights_tools convert models/my-bert --i-trust-this-file
  python -m weights_tools convert pytorch_model.bin --out model.safetensors --i-trust-this-file
"""

WARNING = """\
warning: {path} is a pickle. A pickle is a program: a hostile one can do harm when it is read, and
torch.load's defence against that has been broken before. Go on only if you trust who made it."""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command."""
    parser = verbs.add_parser(
        "convert",
        help="turn a pytorch_model.bin into safetensors",
        description="Turn a pytorch_model.bin into safetensors, with the same names, types and "
        "values. Reads a pickle (torch.load with weights_only), and so asks for your trust.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="FILE_OR_FOLDER", help="a .bin file, or the folder of pytorch_model.bin"
    )
    parser.add_argument("--out", metavar="FILE", help="(model.safetensors beside the source)")
    parser.add_argument("--overwrite", action="store_true", help="replace a FILE that exists")
    parser.add_argument(
        "--i-trust-this-file", action="store_true", help="needed: see the warning without it"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Warn, convert, and print what was written."""
    source = Path(options.source)
    if source.is_dir():
        source = source / "pytorch_model.bin"
    target = Path(options.out) if options.out else source.with_name("model.safetensors")
    print(WARNING.format(path=source), file=sys.stderr)
    if not options.i_trust_this_file:
        raise WeightsError(f"{source} was not read; add --i-trust-this-file if you do")
    if target.exists() and not options.overwrite:
        raise WeightsError(f"{target} exists; remove it, or add --overwrite")
    count = convert(source, target)
    print(f"{target}: {count} tensors, {target.stat().st_size:,} bytes")
    return 0


def convert(source: Path, target: Path) -> int:
    """Write the tensors of a pickle as safetensors, and read the file back to compare.

    Parameters
    ----------
    source : Path
        A file that ``torch.save`` wrote: a flat dictionary of names to tensors.
    target : Path
        The safetensors file; it is written atomically.

    Returns
    -------
    int
        The number of tensors.

    Raises
    ------
    WeightsError
        If torch is older than 2.10, the pickle is not such a dictionary or holds NaN or infinite
        values, or a file cannot be read or written.
    """
    tensors = _load(source)
    for name, tensor in tensors.items():
        # The reader would refuse the file later, so do not write it.
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{source}: {name} holds NaN or infinite values; do not use it")
    save_tensors(target, tensors, {"format": "pt"})
    with SafeFile(target) as file:
        for name, tensor in tensors.items():
            if not torch.equal(file.read(name), tensor):
                raise WeightsError(
                    f"{target}: {name} did not come back as written; is the disk ok?"
                )
    return len(tensors)


def _load(source: Path) -> dict[str, torch.Tensor]:
    if _torch_version() < (2, 10):
        raise WeightsError(
            f"torch {torch.__version__} has known holes in torch.load (CVE-2025-32434, "
            "CVE-2026-24747); install torch 2.10 or later"
        )
    if not source.is_file():
        raise WeightsError(f"{source} does not exist; give the .bin file or its folder")
    try:
        # Only the newer, zipped format can be mmapped; BERT's own files are older.
        loaded = torch.load(
            source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source)
        )
    except Exception as error:  # an invalid pickle can raise anything
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(f"{source} cannot be read as a file of weights: {reason}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise WeightsError(f"{source} holds a {type(loaded).__name__}, expected names and tensors")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise WeightsError(
                f"{source} holds {name!r}: {type(value).__name__}, expected only names and "
                "tensors; save model.state_dict() alone"
            )
    return dict(loaded)


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
