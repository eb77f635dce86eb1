"""Download a model from the hub once, check its hashes and pin its commit (``download``)."""

from __future__ import annotations

import argparse

from spafit.weights.hub import local_folder, pinned_revision

EPILOG = """\
examples:
  python -m weights_tools download google-bert/bert-large-cased
  python -m weights_tools download google-bert/bert-base-cased --refresh
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command."""
    parser = verbs.add_parser(
        "download",
        help="fetch a model from the hub once; afterwards its name works offline",
        description="Fetch config, safetensors weights and tokenizer of a model from the hub, hold "
        "each file against the hub's hash, and pin the commit: later runs use the same one, "
        "offline.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="owner/name, or owner/name@revision")
    parser.add_argument("--revision", help="a branch, tag or commit (main)")
    parser.add_argument(
        "--refresh", action="store_true", help="ask the hub again, and pin what it says today"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fetch, and print where the files are."""
    folder = local_folder(options.name, revision=options.revision, refresh=options.refresh)
    commit = pinned_revision(options.name, options.revision)
    print(f"{folder}  (pinned to commit {commit})" if commit else f"{folder}  (a local folder)")
    return 0
