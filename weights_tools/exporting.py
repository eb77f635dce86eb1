"""Hand a run to another program (``export``)."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spafit.cli.trained import Trained
from spafit.errors import WeightsError

#: A module of weights_tools/formats each, with ``export(trained, folder)``, which returns notes.
FORMATS = {
    "hf": "a plain BERT for transformers, adapters merged into its weights",
    "peft": "an adapter for PEFT: LoRA, (IA)³ or LayerNorms, with biases and head",
    "adapters": "bottleneck adapters for the library adapters (AdapterHub)",
    "onnx": "a graph for onnxruntime, and the same as a program of torch.export",
}

EPILOG = """\
examples:
  python -m weights_tools export runs/rte exported --format hf
  python -m weights_tools export runs/rte exported --format peft
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command."""
    formats = "".join(f"  {name:8} {what}\n" for name, what in FORMATS.items())
    parser = verbs.add_parser(
        "export",
        help="write a run for transformers, PEFT, AdapterHub or onnxruntime",
        description="Write what a run has trained in the form of another program. What that has "
        "no form for is refused by name; what it cannot restore is said.",
        epilog=f"formats:\n{formats}\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", help="a run folder, or one of several seeds")
    parser.add_argument("folder", metavar="FOLDER", help="to be made; empty if it exists")
    parser.add_argument("--format", choices=FORMATS, required=True, help="see below")
    parser.add_argument("--model", metavar="M", help="the base model, if it lies elsewhere now")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Load the run, write the folder, and print what is in it and what is to be known."""
    format_ = importlib.import_module(f"weights_tools.formats.{options.format}")
    folder = Path(options.folder)
    trained = Trained(Path(options.run_folder), options.model, mapped=None)
    with made(folder):
        notes = format_.export(trained, folder)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    for note in notes:
        print(f"note: {note}")
    return 0


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder, in which the block writes; one that exists must be empty.

    If the block fails before it has written anything, the folder is removed again.

    Raises
    ------
    WeightsError
        If it is not empty, or cannot be made.
    """
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise WeightsError(f"{folder} is not empty; give a folder that is, or a new one")
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"{str(folder)!r:.200} cannot be made: {reason}") from None
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):  # something is in it
                folder.rmdir()
        raise
