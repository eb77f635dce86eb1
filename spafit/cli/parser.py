"""The console command ``spafit``, whose verbs are the modules of ``spafit/cli/verbs``.

Bad input gives a one-line error and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn, Protocol, TextIO

from spafit.cli import bus_errors
from spafit.cli.verbs import (
    demo,
    doctor,
    download,
    grid,
    inspect,
    plan,
    predict,
    probe,
    report,
    search,
    train,
)
from spafit.cli.verbs import eval as evaluate
from spafit.errors import (
    ConfigError,
    SpafitError,
    StoppedError,
    TrainingError,
    nearest,
    one_line,
)
from spafit.machine.launched import launched
from spafit.machine.terminal import lasting
from spafit.version import __version__


class Verb(Protocol):
    """What the module of a verb has; its examples are commands, each in a line of its own."""

    SUMMARY: str
    EXAMPLES: str

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's own options.

        Where the verb only prints, a default ``prints_only(parsed)`` says when: it may then end as
        soon as nobody reads on.
        """

    def run(self, parsed: argparse.Namespace) -> int:
        """Do it, and return the exit code."""


VERBS: dict[str, Verb] = {
    "demo": demo,
    "plan": plan,
    "download": download,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "grid": grid,
    "report": report,
    "probe": probe,
    "search": search,
    "inspect": inspect,
    "doctor": doctor,
}
"""Each verb's module, in the order of the help."""

_DESCRIPTION = "Fine-tune BERT by strata of layers (SPAFIT): frozen, biases, LoRA and biases."

_EXAMPLES = """\
examples:
  spafit demo
  spafit plan SPAFIT-4-9-II
  spafit download glue rte && spafit download model google-bert/bert-large-cased
  spafit train --task rte --method SPAFIT-4-9-II --out runs/rte
  spafit eval runs/rte
  spafit grid table-2 --dry-run
  spafit predict runs/rte --submission submissions
  spafit report runs
  spafit inspect runs/rte --forgetting

exit codes: 0 success, 1 the run failed, 2 the input is wrong,
            128 + n stopped by signal n
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    The reader of the output may have exited, or the disk be full. Standard error is then dropped,
    and so is standard output if it only reports on work whose result is elsewhere.

    Parameters
    ----------
    arguments : sequence of str, optional
        None means the process's own.

    Returns
    -------
    int
        0; 1 if training failed or the doctor found a fault; 2 if the input is wrong or there is
        none; 128 + n if a run was stopped by signal n.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # its descriptor is closed; print(file=None) would use sys.stdout
            null = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(null, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):  # for characters that its encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        with contextlib.redirect_stderr(lasting(sys.stderr)), warnings.catch_warnings():
            warnings.showwarning = _print_note
            given = sys.argv[1:] if arguments is None else arguments
            parser = build_parser()
            if not given:
                parser.print_help()
                parser.error("a verb is missing")
            _refuse_unknown(parser, given)
            return _run(parser.parse_args(given))
    finally:
        _let_go(sys.stdout)
        _let_go(sys.stderr)


def _print_note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, without the place in the source that it comes from."""
    print(f"spafit: note: {_message(str(message))}", file=sys.stderr)


def _message(text: str) -> str:
    """Return a message as one line; of a long one the end is kept too, which has the remedy."""
    if len(text) > 1200:
        text = f"{text[:800]} ... {text[-300:]}"
    return one_line(text, limit=10 * len(text))


def _run(parsed: argparse.Namespace) -> int:
    prints_only = hasattr(parsed, "prints_only") and parsed.prints_only(parsed)
    try:
        with contextlib.redirect_stdout(sys.stdout if prints_only else lasting(sys.stdout)):
            with bus_errors.explained(_mend_of_bus_error(parsed)):
                _refuse_many_processes(parsed.verb)
                code = VERBS[parsed.verb].run(parsed)
            sys.stdout.flush()
            return code
    except StoppedError as stopped:
        if not stopped.is_told_elsewhere:
            print(f"spafit: {_message(str(stopped))}", file=sys.stderr)
        return 128 + stopped.signal
    except (SpafitError, OSError) as error:
        if isinstance(error, BrokenPipeError) and prints_only:  # `spafit plan ... | head`
            return 0
        if parsed.debug:
            traceback.print_exc()
        if not getattr(error, "is_told_elsewhere", False):
            print(f"spafit: {_message(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        print("spafit: interrupted", file=sys.stderr)
        return 130


def _refuse_many_processes(verb: str) -> None:
    if verb != "train" and launched() is not None:
        raise ConfigError(
            f"spafit {verb} works in one process, and torchrun has started several; many "
            "processes are for spafit train"
        )


def _mend_of_bus_error(parsed: argparse.Namespace) -> str:
    mend = "copy to another name and rename it (mv) to replace a file"
    return f"{mend}, or give --no-mapped" if hasattr(parsed, "mapped") else mend


def _let_go(stream: TextIO) -> None:
    """Drop output that cannot be written: Python would retry at exit, and exit with 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # it has no descriptor any more
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


class _Parser(argparse.ArgumentParser):
    """A parser with one-line errors, without the usage before them."""

    verbs: Mapping[str, _Parser] = MappingProxyType({})

    def options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def error(self, message: str) -> NoReturn:
        see = "" if message.endswith("?") else f"; see {self.prog} --help"
        self.exit(2, f"{self.prog}: {_message(message)}{see}\n")


def _refuse_unknown(parser: _Parser, given: Sequence[str]) -> None:
    """Name an unknown verb or option before argparse names what is lacking for want of it."""
    of = parser
    for text in itertools.takewhile(lambda text: text != "--", given):
        option = text.partition("=")[0]
        if re.match("--?[A-Za-z]", text) and " " not in text:  # argparse takes others for values
            if option not in of.options():
                of.error(f"unknown option {option:.60}{_did_you_mean(option, of.options())}")
        elif of is parser and text in parser.verbs:
            of = parser.verbs[text]
        elif of is parser:
            known = ", ".join(parser.verbs)
            nearest = _did_you_mean(text, parser.verbs) or f"; the verbs are {known}"
            of.error(f"unknown verb {text:.60}{nearest}")


def _did_you_mean(text: str, known: Iterable[str]) -> str:
    """Return the end of a message: the known words that a word begins, or else the nearest ones."""
    known = list(known)
    near = [each for each in known if text.strip("-") and each.startswith(text)]
    near = near or nearest(text, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def build_parser() -> _Parser:
    """Return the parser of the whole command line; its ``verbs`` are those of the verbs."""
    parser = _Parser(
        prog="spafit",
        allow_abbrev=False,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"spafit {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    parser.verbs = verbs.choices
    for name, verb in VERBS.items():
        each = verbs.add_parser(
            name,
            help=verb.SUMMARY,
            description=f"{verb.SUMMARY[0].upper()}{verb.SUMMARY[1:]}.",
            epilog=f"example:\n{textwrap.indent(verb.EXAMPLES, '  ')}",
            parents=[common],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_options(each)
    return parser
