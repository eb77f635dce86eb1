"""List the tensors of a weights file, and what loading renames or leaves out (``inspect``)."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from spafit.errors import one_line
from spafit.weights.hub import local_folder
from spafit.weights.pretrained import apply_rules
from spafit.weights.safe_folder import SafeFolder
from spafit.weights.safefile import SafeFile, TensorInfo

EPILOG = """\
examples:
  python -m weights_tools inspect model.safetensors
  python -m weights_tools inspect google-bert/bert-large-cased
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command."""
    parser = verbs.add_parser(
        "inspect",
        help="list names, shapes, types and sizes, and what loading would rename or leave out",
        description="List the tensors of safetensors weights. Only the header is read, and checked "
        "in full; the values are looked at when a model is loaded.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="FILE_OR_FOLDER",
        help="a .safetensors file, a folder that holds model.safetensors or an index, or a hub "
        "name (fetched if it is not there yet)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    source: str = options.source
    if Path(source).is_file():
        with SafeFile(source) as file:
            tensors, files = file.tensors, [file.path]
    else:
        with SafeFolder(local_folder(source)) as folder:
            tensors, files = folder.tensors, [*folder.files]
    for path in files:
        print(f"{path}  {path.stat().st_size:,} bytes")
    print(table(tensors.values()))
    return 0


def table(tensors: Iterable[TensorInfo]) -> str:
    """Return a table of tensors, with totals by type and by what loading does to them.

    Parameters
    ----------
    tensors : iterable of TensorInfo
        From :class:`spafit.weights.safefile.SafeFile` or
        :class:`spafit.weights.safe_folder.SafeFolder`.

    Returns
    -------
    str
        One line a tensor, then the totals.
    """
    rows: list[Sequence[str]] = [("name", "shape", "type", "bytes", "on loading")]
    count_of, numbers_of, bytes_of = Counter[str](), Counter[str](), Counter[str]()
    for info in tensors:
        name, reason = apply_rules(info.name)
        if name is None:
            kind, remark = "left out", f"left out: {reason}"
        elif name != info.name:
            kind, remark = "renamed", f"-> {one_line(name)}"
        else:
            kind, remark = "kept", ""
        shape = str(list(info.shape))
        rows.append((one_line(info.name), shape, info.dtype, f"{info.nbytes:,}", remark))
        for total in (kind, info.dtype, "in all"):
            count_of[total] += 1
            numbers_of[total] += info.numel
            bytes_of[total] += info.nbytes
    totals: list[Sequence[str]] = [("total", "tensors", "numbers", "bytes")]
    totals += [
        (total, f"{count_of[total]:,}", f"{numbers_of[total]:,}", f"{bytes_of[total]:,}")
        for total in sorted(count_of, key=lambda total: (total == "in all", total))
    ]
    return f"{_aligned(rows, right={3})}\n\n{_aligned(totals, right={1, 2, 3})}"


def _aligned(rows: Sequence[Sequence[str]], right: set[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
