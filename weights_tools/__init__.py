"""Tools for weight files: ``python -m weights_tools VERB``; see ``--help``."""

from weights_tools.tiny import make_tiny

__all__ = ["make_tiny"]
