"""The command line."""

from spafit.cli.parser import main

__all__ = ["main"]
