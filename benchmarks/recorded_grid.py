"""The report of a grid for the record, with the records of the runs that it is made of.

    spafit grid minilm --out runs/minilm
    python -m benchmarks.recorded_grid runs/minilm

Writes benchmarks/results/minilm/, named after the folder: ``runs.tar.xz``, which has of each
finished run its record, its answers on dev and the scores of its log, without weights; and the
report of these records in its four forms. Unpacked, they give ``spafit report`` the same report,
and ``spafit grid`` goes on where it was. ``--without`` leaves out time, speed or memory, where they
are no benchmark: because other work disturbed the runs, or a worker's memory is that of several.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import RESULTS
from spafit.errors import CheckpointError, ConfigError
from spafit.experiments.grid.places import DIVERGED, GRID
from spafit.experiments.report.found import COSTS, find_runs
from spafit.experiments.report.tables import make_report
from spafit.experiments.report.write import write_report
from spafit.files.replacing import replacing
from spafit.runs.folder import LOG
from spafit.runs.record import ANSWERS, RUN, read_run

RUNS = "runs.tar.xz"


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack the records, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the --out of spafit grid")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--without", nargs="+", choices=COSTS, default=(), help="leave these out of the runs"
    )
    parser.add_argument("--against", metavar="METHOD", help="as for spafit report")
    parsed = parser.parse_args(arguments)
    out = parsed.results / parsed.folder.resolve().name
    try:
        found = find_runs(parsed.folder)
        for name, why in found.left_out:
            print(f"left out: {name}: {why}")
        if not found.runs:
            raise CheckpointError(f"{parsed.folder} has no finished run; let its grid go on")
        files = dict(_files(parsed.folder, parsed.without))
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder, out.name, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            write_report(make_report(Path(folder, out.name), parsed.against), out)
    except (CheckpointError, ConfigError) as error:
        parser.exit(2, f"{error}\n")
    with (
        replacing(out / RUNS, CheckpointError) as temporary,
        tarfile.open(temporary, "w:xz") as file,
    ):
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{out.name}/{name}")
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


def _files(folder: Path, without: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield what is recorded of the finished runs, without some of their results."""
    if (folder / GRID).is_file():
        yield GRID, (folder / GRID).read_bytes()
    for path in sorted(folder.rglob(RUN)):
        try:
            record = read_run(path)
        except CheckpointError:  # which is said already
            continue
        run = path.parent
        if str(record.get("error")).startswith(DIVERGED):  # for a grid this is finished, too
            of_it = json.dumps(without_folders(record), indent=1)
            yield (run.relative_to(folder) / RUN).as_posix(), of_it.encode()
        if record.get("status") != "finished":
            continue
        for name in without:
            record["result"].pop(name, None)
        try:
            answers, log = ((run / name).read_text(encoding="utf-8") for name in (ANSWERS, LOG))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{error.filename} is not there; remove the run, and let its grid train it again"
            ) from None
        scores = [
            line for line in log.splitlines(keepends=True) if "evaluation" in json.loads(line)
        ]
        for name, text in (
            (RUN, json.dumps(without_folders(record), indent=1)),
            (ANSWERS, answers),
            (LOG, "".join(scores)),
        ):
            yield (run.relative_to(folder) / name).as_posix(), text.encode()


def without_folders(value: Any) -> Any:
    """Return a record in which an absolute path is its last name, because machines differ."""
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name
    return value


if __name__ == "__main__":
    main()
