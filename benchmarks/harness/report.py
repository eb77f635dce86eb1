"""Write results: rows appended to a CSV, its Markdown table, and a figure of the ratios."""

from __future__ import annotations

import csv
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.harness.quiet import other_load, warnings
from benchmarks.harness.timing import Timing
from spafit.kernels.products import library_on
from spafit.machine.versions import machine, versions

Row = Mapping[str, str | int | float]

SETTINGS = (
    "task", "split", "lengths", "method", "model", "layers", "hidden", "intermediate", "rank",
    "max_length", "batch_size", "epochs", "train_rows", "dev_rows", "seed",
    "device", "processor", "cpus", "threads", "dtype", "torch", "cuda", "triton", "transformers",
    "peft", "spafit", "commit", "command",
)  # fmt: skip
"""The columns that say what was measured, where, and with what; a table names them once, below."""

_LATER = ("other_load", "command", "round_times_ms")
_QUARTILES = ("ratio_low_quartile", "ratio_high_quartile")
_IN_CSV_ALONE = (*_QUARTILES, "round_times_ms")


def place(device: torch.device, dtype: str) -> dict[str, str | int]:
    """Return the machine, what else it did, versions, commit and command of a measurement.

    To be called when it is done.
    """
    where, installed = machine(), versions()
    gpu = {} if device.type == "cpu" else {"cuda": str(torch.version.cuda), "triton": _triton()}
    return {
        "device": str(where["gpu"]) if device.type == "cuda" else "cpu",
        "processor": str(where["processor"]),
        "cpus": int(where["cpus"]),
        "threads": torch.get_num_threads(),
        "products": library_on(device),
        "dtype": dtype,
        "torch": installed["torch"],
        **gpu,
        "transformers": metadata.version("transformers"),
        "peft": metadata.version("peft"),
        "spafit": installed["spafit"],
        "commit": commit(),
        "other_load": other_load(),
        "command": command(),
    }


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def results(settings: Row, timings: Sequence[Timing], where: Row) -> list[Row]:
    """Return a row for each contender: settings, results, and machine."""
    return [{**settings, **timing.columns(), **where} for timing in timings]


def commit() -> str:
    """Return the checked-out commit, with "-dirty" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return ran.stdout.strip()


def command() -> str:
    """Return the command line of this process, of absolute paths their last name alone."""
    module = sys.modules["__main__"].__spec__
    program = [Path(sys.argv[0]).name] if module is None else ["python", "-m", module.name]
    return shlex.join([*program, *map(_placeless, sys.argv[1:])]).replace(".__main__", "")


def _placeless(argument: str) -> str:
    """Return an argument without the folders of this machine, which say nothing elsewhere."""
    option, sign, value = argument.rpartition("=")
    return f"{option}{sign}{Path(value).name}" if Path(value).is_absolute() else argument


def text(value: str | int | float) -> str:
    """Return a value's text with four digits, or rounded to a tenth if it is large."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def append_rows(path: Path, rows: Sequence[Row]) -> list[dict[str, str]]:
    """Append rows to a CSV, created if missing; return all its rows.

    Rows that are older than load, command or the rounds' times have these columns empty.

    Raises
    ------
    ValueError
        If the file has other columns.
    """
    columns = list(rows[0])
    earlier = read_rows(path)
    differing = sorted(set(earlier[0]) ^ set(columns)) if earlier else []
    if not set(differing) <= set(_LATER):
        raise ValueError(
            f"{path} has other columns ({', '.join(differing)}); move it away, or give another "
            "--out"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    every = [{key: text(row.get(key, "")) for key in columns} for row in [*earlier, *rows]]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(every)
    return every


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: Sequence[Row], in_table: Sequence[str] = ()) -> str:
    """Return rows as a Markdown table, and below it their settings and machines.

    The columns of :data:`SETTINGS`, but for those of ``in_table``, are left out of the table, where
    a number in "setting" refers to the list below. Quartiles and the times of rounds stay in the
    CSV.
    """
    below = [key for key in SETTINGS if key not in in_table]
    columns = [key for key in rows[0] if key not in (*below, *_IN_CSV_ALONE)]
    settings: list[str] = []
    lines = [f"| {' | '.join([*columns, 'setting'])} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        setting = ", ".join(f"{key} {text(row[key])}" for key in below if text(row.get(key, "")))
        if setting not in settings:
            settings.append(setting)
        cells = [text(row[key]) for key in columns]
        lines.append(f"| {' | '.join([*cells, str(settings.index(setting) + 1)])} |")
    listed = [f"{number}. {setting}" for number, setting in enumerate(settings, start=1)]
    return "\n".join([*lines, "", *listed, ""])


def draw_ratios(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw a bar for each row: its median ratio, with quartiles (thick) and extremes (thin)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 1.1 + 0.42 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        keys = ("ratio", "ratio_min", "ratio_max", *_QUARTILES)
        ratio, minimum, maximum, low, high = (float(row[key]) for key in keys)
        is_baseline = minimum == maximum == 1.0
        axes.barh(y, ratio, height=0.62, color="#bbbbbb" if is_baseline else "#88aacc")
        axes.plot([minimum, maximum], [y, y], "k-", linewidth=1)
        axes.plot([low, high], [y, y], "k-", linewidth=4)
        axes.text(0, y, f" {ratio:.2f}", va="center")
    axes.set_yticks(range(len(rows)), [str(row["contender"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("times as fast as the baseline\n(median; quartiles thick, extremes thin)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_results(
    out: Path, rows: Sequence[Row], title: str, in_table: Sequence[str] = (), below: str = ""
) -> None:
    """Append rows to OUT.csv, write OUT.md from all its rows, and draw OUT.png of the new ones.

    The new rows are printed, with what speaks against them (:mod:`benchmarks.harness.quiet`), and
    where they are.

    Parameters
    ----------
    out : Path
        Without an ending.
    rows : sequence of mapping
        The new ones.
    title : str
        Of the figure, which is drawn where the rows have ratios.
    in_table : sequence of str
        Settings that differ from row to row.
    below : str
        What else is written below the table, of the new rows.
    """
    every = append_rows(out.with_suffix(".csv"), rows)
    written = markdown(every, in_table) + (f"\n{below}" if below else "")
    out.with_suffix(".md").write_text(written, encoding="utf-8")
    places = f"{out}.csv, {out}.md"
    if "ratio" in rows[0]:
        draw_ratios(rows, out.with_suffix(".png"), title)
        places += f", {out}.png"
    print(markdown(rows, in_table))
    if below:
        print(below)
    for warning in warnings(rows):
        print(f"Warning: {warning}.")
    print(f"Written: {places}", flush=True)
