"""Write a report's files."""

from __future__ import annotations

from pathlib import Path

from spafit.errors import ConfigError
from spafit.experiments.report.page import html
from spafit.experiments.report.tables import Report
from spafit.experiments.report.text import comma_separated, latex, markdown
from spafit.files.replacing import refuse_place, replacing


def write_report(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write report.md, report.csv, report.tex and report.html, each replaced as a whole.

    Returns
    -------
    tuple of Path
        The files.

    Raises
    ------
    ConfigError
        If one cannot be written.
    """
    refuse_place(folder, is_folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.md": markdown(report),
        "report.csv": comma_separated(report),
        "report.tex": latex(report),
        "report.html": html(report),
    }
    for name, text in contents.items():
        with replacing(folder / name, ConfigError) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    return tuple(folder / name for name in contents)
