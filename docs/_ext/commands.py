"""Write the reference of the command line: what each verb's ``--help`` prints."""

from __future__ import annotations

from unittest import mock

from spafit.cli.parser import VERBS, build_parser


def reference() -> str:
    """Return the page: the verbs in a table, then each with its help."""
    lines = ["## The verbs", "", "| command | what it does |", "|---|---|"]
    lines += [f"| [`spafit {name}`](#{name}) | {verb.SUMMARY} |" for name, verb in VERBS.items()]
    with mock.patch.dict("os.environ", COLUMNS="92"):
        for name, its in build_parser().verbs.items():
            lines += ["", f"## {name}", "", "```text", its.format_help().rstrip(), "```"]
    return "\n".join(lines)
