"""The command line ``python -m weights_tools VERB``: each verb is a module beside this one."""

from __future__ import annotations

import argparse
import sys
import traceback

from spafit.errors import SpafitError
from weights_tools import compare_hf, convert, download, exporting, importing, inspect, tiny
from weights_tools.hub import pull, push

EPILOG = """\
examples:
  python -m weights_tools make-tiny tiny
  python -m weights_tools inspect tiny
  python -m weights_tools compare-hf tiny
  python -m weights_tools download google-bert/bert-large-cased
  python -m weights_tools export runs/rte exported --format hf
  python -m weights_tools push runs/rte me/rte-spafit

exit codes: 0 done; 1 a comparison found a difference; 2 something was wrong, and was said
"""


def build_parser() -> argparse.ArgumentParser:
    """Put the verbs' parsers together."""
    parser = argparse.ArgumentParser(
        prog="python -m weights_tools",
        description="Look at, make, convert, compare, fetch and exchange BERT weights.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for module in (inspect, tiny, convert, compare_hf, download, exporting, importing, push, pull):
        module.add_parser(verbs)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one verb.

    Parameters
    ----------
    arguments : list of str, optional
        Without the program's name; None takes the process's.

    Returns
    -------
    int
        The exit code: 0 done, 1 a comparison found a difference, 2 an error.
    """
    options = build_parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except SpafitError as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stderr.close()
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
