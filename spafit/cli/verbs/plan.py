"""``spafit plan``: its options, and all that it does."""

from __future__ import annotations

import argparse

from spafit.cli.option_types import as_name, as_new_path, as_size
from spafit.cli.shared_options import add_plan_options, plan_options
from spafit.errors import ConfigError

SUMMARY = "show what trains, layer by layer, with counts"
EXAMPLES = "spafit plan SPAFIT-4-9-II"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add its options."""
    parser.add_argument(
        "method",
        help="a method of Table 1, SPAFIT-[N1]-[N2]-[I|II], houlsby, pfeiffer, parallel, ia3, "
        "linear-probe, or a plan file",
    )
    parser.add_argument(
        "--model",
        type=as_name,
        help="folder of weights, minilm, or hub name; default: bert-large-cased's sizes",
    )
    parser.add_argument(
        "--num-labels",
        type=as_size,
        default=3,
        help="outputs of the head (default %(default)s, as in Table 2)",
    )
    parser.add_argument(
        "--save", type=as_new_path, metavar="FILE", help="write the plan as JSON, for editing"
    )
    add_plan_options(parser)
    parser.set_defaults(prints_only=lambda parsed: parsed.save is None)


def run(parsed: argparse.Namespace) -> int:
    """Print what trains, for a model built without weights."""
    import torch

    from spafit.bert import BertForSequenceClassification
    from spafit.config import BertConfig
    from spafit.files.replacing import refuse_place, replacing
    from spafit.strata import adapt
    from spafit.training.result import plan_screen
    from spafit.weights.hub import local_folder

    if parsed.save is not None:
        refuse_place(parsed.save)
    config = BertConfig()  # bert-large-cased
    if parsed.model is not None:
        config = BertConfig.from_json(local_folder(parsed.model, files=("config.json",)))
    with torch.device("meta"):
        shadow = BertForSequenceClassification(config, parsed.num_labels)
    plan = plan_options(parsed).make(config.num_hidden_layers)
    print(plan_screen(adapt(shadow, plan)))
    if parsed.save is not None:
        with replacing(parsed.save, ConfigError) as temporary:
            temporary.write_text(plan.to_json() + "\n", encoding="utf-8")
        print(f"written: {parsed.save}")
    return 0
