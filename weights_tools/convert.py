"""Convert a ``pytorch_model.bin``, whole or in parts, into a safetensors file (``convert``).

Only this module loads a pickle. ``torch.load`` had vulnerabilities even with ``weights_only=True``
(CVE-2025-32434 before torch 2.6, CVE-2026-24747 before 2.10), so a pickle is loaded once, on
request, and never by a training run.
"""

from __future__ import annotations

import argparse
import errno
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch

from spafit.errors import WeightsError, listed, one_line
from spafit.weights.pretrained import wrapper_prefix
from spafit.weights.safe_folder import read_index
from spafit.weights.safefile import NO_WEIGHTS, TORCH_DTYPES, SafeFile, all_finite, save_tensors

EPILOG = """\
examples:
  python -m weights_tools convert models/my-bert --i-trust-this-file
  python -m weights_tools convert pytorch_model.bin --out model.safetensors --i-trust-this-file
"""

WARNING = """\
warning: {path} is a pickle, or names some. A pickle is a program: a hostile one can do harm when
it is read, and torch.load's defence against that has been broken before. Go on only if you trust
who made it."""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command."""
    parser = verbs.add_parser(
        "convert",
        help="turn a pytorch_model.bin into safetensors",
        description="Turn a pytorch_model.bin, or the parts that a pytorch_model.bin.index.json "
        "names, into one safetensors file with the same names, types and values. Reads pickles "
        "(torch.load with weights_only), and so asks for your trust.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="FILE_OR_FOLDER",
        help="a .bin file, the .index.json of several, or the folder of either",
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
        source = _in_folder(source)
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

    A prefix that a wrapper such as DataParallel gave all names is taken off, and told.

    Files in PyTorch's newer format are mapped, not read, so that memory need not hold them.

    Parameters
    ----------
    source : Path
        A file that ``torch.save`` wrote: a flat dictionary of names to tensors. Or the index
        (``.json``) of several such files beside it.
    target : Path
        The safetensors file; it is written atomically.

    Returns
    -------
    int
        The number of tensors.

    Raises
    ------
    WeightsError
        If torch is older than 2.10, a pickle is not such a dictionary or holds NaN or infinite
        values, index and files do not agree, or a file cannot be read or written.
    """
    part = re.fullmatch(r"(.+)-[0-9]+-of-0*([0-9]+)\.bin", source.name)
    if part is not None and part[2] != "1":
        raise WeightsError(
            f"{source} is one of {part[2]} parts; give the folder, or {part[1]}.bin.index.json"
        )
    tensors = _load_parts(source) if source.suffix == ".json" else _load(source)
    prefix = wrapper_prefix(tensors)
    if prefix and any(name.endswith("embeddings.word_embeddings.weight") for name in tensors):
        print(f"took {prefix} off all names, which a wrapper of the model added", file=sys.stderr)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        # The reader would refuse the file later, so do not write it.
        if tensor.is_floating_point() and not all_finite(tensor):
            raise WeightsError(
                f"{source}: {one_line(name)} holds NaN or infinite values; do not use it"
            )
    save_tensors(target, tensors, {"format": "pt"})
    try:
        with SafeFile(target) as file:
            for name, tensor in tensors.items():
                if not torch.equal(file.read(name), tensor):
                    raise WeightsError(
                        f"{target}: {one_line(name)} did not come back as written; is the disk ok?"
                    )
    except WeightsError:
        target.unlink(missing_ok=True)
        raise
    return len(tensors)


def _in_folder(folder: Path) -> Path:
    """Return a folder's pickle, or the index of its parts."""
    single, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if single.exists() and index.exists():
        raise WeightsError(f"{folder} has both {single.name} and {index.name}; name the right one")
    parts = sorted(path.name for path in folder.glob("pytorch_model-*-of-*.bin"))
    if parts and not single.exists() and not index.exists():
        raise WeightsError(
            f"{folder} holds {listed(parts, ', ', 2)}, but no {index.name}, which says what they "
            "hold; fetch it too"
        )
    return index if index.exists() else single


def _load_parts(index: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all files that an index names."""
    if index.is_file():
        _refuse_impostor(index)
    part_of = read_index(index, ".bin")
    tensors: dict[str, torch.Tensor] = {}
    for part in sorted(set(part_of.values())):
        for name, tensor in _load(index.with_name(part)).items():
            if part_of.get(name) != part:
                raise WeightsError(
                    f"{index.with_name(part)} holds {one_line(name)}, which {index.name} does not "
                    "expect there; fetch all again"
                )
            tensors[name] = tensor
    missing = part_of.keys() - tensors.keys()
    if missing:
        raise WeightsError(
            f"{index} names {listed(sorted(missing), ', ')}, which its files lack; fetch all again"
        )
    return tensors


def _refuse_impostor(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(16)
    for magic, remedy in NO_WEIGHTS.items():
        if start.startswith(magic):
            raise WeightsError(f"{path} cannot be read as a file of weights: {remedy}")


def _load(source: Path) -> dict[str, torch.Tensor]:
    if _torch_version() < (2, 10):
        raise WeightsError(
            f"torch {torch.__version__} has known holes in torch.load (CVE-2025-32434, "
            "CVE-2026-24747); install torch 2.10 or later"
        )
    if not source.is_file():
        raise WeightsError(f"{source} does not exist; give the .bin file or its folder")
    try:
        _refuse_impostor(source)
        with warnings.catch_warnings():  # torch's own, about how to load other kinds of files
            warnings.simplefilter("ignore")
            # Only the newer, zipped format can be mmapped; BERT's own files are older.
            loaded = torch.load(
                source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source)
            )
    except WeightsError:
        raise
    except Exception as error:  # an invalid pickle can raise anything
        raise WeightsError(
            f"{source} cannot be read as a file of weights: {_reason(error)}"
        ) from None
    if not isinstance(loaded, dict) or not loaded:
        raise WeightsError(f"{source} holds a {type(loaded).__name__}, expected names and tensors")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise WeightsError(
                f"{source} holds {name!r:.200}: {type(value).__name__}, expected only names and "
                "tensors; save model.state_dict() alone"
            )
        if value.is_meta or name == "__metadata__":
            why = "without values" if value.is_meta else "which is no tensor's name in safetensors"
            raise WeightsError(
                f"{source} holds {one_line(name)}, {why}; save the state_dict of a model without it"
            )
        if value.layout != torch.strided or value.dtype not in TORCH_DTYPES.values():
            raise WeightsError(
                f"{source} holds {one_line(name)} as {value.dtype}, {value.layout}, which a "
                "safetensors file cannot hold; save it as a plain tensor of numbers"
            )
    return dict(loaded)


def _reason(error: Exception) -> str:
    """Say in our words what torch refuses; its own advise to load the file without the refusal."""
    # A file that is cut short at some places is an "Invalid argument", for it cannot be mapped.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f"{error.strerror or error}"
    if isinstance(error, UnicodeEncodeError):
        return "its path is not in UTF-8, which torch needs; rename the folder"
    found = re.search(r"GLOBAL ([\w.]+)", str(error))  # a class or function that makes no tensor
    if found is not None:
        return (
            f"it holds a {one_line(found[1], 120)} (a whole model?), which is a program and not "
            "weights; save model.state_dict() alone"
        )
    return (
        "it is damaged, or not the names and tensors that torch.save writes; fetch it again, or "
        "save model.state_dict() alone"
    )


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
