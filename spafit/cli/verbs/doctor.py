"""``spafit doctor``: spafit/cli/examining.py does the work."""

from __future__ import annotations

import argparse

SUMMARY = "show versions, devices, kernels, and what is missing"
EXAMPLES = "spafit doctor"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add none: it has no options of its own."""
    parser.set_defaults(prints_only=lambda parsed: True)


def run(parsed: argparse.Namespace) -> int:
    """Print what the machine has; 1 if anything that is needed is missing."""
    from spafit.cli import examining

    text, well = examining.report()
    print(text)
    return 0 if well else 1
