"""The model card of an adapter, made from the record of its run."""

from __future__ import annotations

import json
import textwrap
from typing import Any, NamedTuple

import torch

from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.strata import adapt
from spafit.tasks.table import TASKS
from spafit.weights import minilm
from spafit.weights.adapter_files import AdapterHeader


class Score(NamedTuple):
    """What runs scored on dev by one metric, a value for each seed.

    ``best`` is the value of the run that is sent, ``majority`` that of the commonest class.
    """

    metric: str
    values: list[float]
    best: float
    majority: float


def card(
    repository: str,
    record: dict[str, Any],
    header: AdapterHeader,
    scores: list[Score],
    rows: dict[str, int],
) -> str:
    """Return the text of README.md.

    Parameters
    ----------
    repository : str
        Where the adapter is, ``owner/name``.
    record : dict
        What is shared of the run's record.
    header : AdapterHeader
        Of its adapter.
    scores : list of Score
        Of this run, or of all seeds' runs, whose best this is.
    rows : dict of str to int
        How many rows ``train`` and ``dev`` had.
    """
    name = _display(record)
    base, revision = record["about"].get("model"), record["about"].get("revision")
    tags = ["spafit", "bert", "adapter", "text-classification"]
    top = ["---", "library_name: spafit", "pipeline_tag: text-classification"]
    top += [f"base_model: {json.dumps(base)}"] if revision else []
    top += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(
        [
            *top,
            "",
            f"# {_plain(name)}, {_plain(header.plan.name)}",
            "",
            "What spafit (stratified fine-tuning of BERT) has trained, without the base model: "
            "one safetensors file, tied to its base.",
            "",
            "## Scores",
            "",
            *_scores(scores, rows),
            "",
            "## What it is",
            "",
            f"- task: {_plain(name)}, {'pairs of texts' if _pair(record) else 'single texts'}",
            f"- {_labels(header)}",
            f"- base: {_base(record, header)}",
            f"- texts are cut at {record['settings']['max_length']} tokens",
            "",
            "What trained:",
            "",
            _drawing(record, header),
            "",
            "## How to load it",
            "",
            *_loading(repository, record, header),
            "",
        ]
    )


def _display(record: dict[str, Any]) -> str:
    definition = record.get("definition") or {}
    task = TASKS.get(record["task"])
    return str(definition.get("display") or (task.display if task else record["task"]))


def _pair(record: dict[str, Any]) -> bool:
    if (definition := record.get("definition")) is not None:
        return len(definition["fields"]) == 2
    return record["task"] in TASKS and TASKS[record["task"]].pair


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    return "".join(f"\\{each}" if each in "\\`*_{}[]<>#|!&~$" else each for each in text)


def _scores(scores: list[Score], rows: dict[str, int]) -> list[str]:
    if not scores:
        return ["The record of the run has none."]
    count = len(scores[0].values)
    what = f"On the {rows['dev']:,} rows of dev" if "dev" in rows else "On dev"
    after = f", after training on {rows['train']:,} rows" if "train" in rows else ""
    if count == 1:
        header = "score (1 seed)"
        note = "One seed has no spread"
    else:
        header = f"mean ± standard deviation ({count} seeds) | best seed, which this is"
        note = f"The best of {count} seeds by the first metric is here"
    columns = header.count("|") + 3
    lines = [
        f"{what}{after}:",
        "",
        f"| metric | {header} | majority baseline |",
        "|" + "---|" * columns,
    ]
    for metric, values, best, majority in scores:
        shown = f"{best:.4f}"
        if count > 1:
            tensor = torch.tensor(values, dtype=torch.float64)
            shown = f"{tensor.mean():.4f} ± {tensor.std():.4f} | {best:.4f}"
        lines.append(f"| {metric} | {shown} | {majority:.4f} |")
    return [*lines, "", f"{note}, and the epoch was chosen on dev: expect a little less elsewhere."]


def _labels(header: AdapterHeader) -> str:
    if not header.labels:
        return "it gives a score" if header.num_labels == 1 else f"{header.num_labels} labels"
    names = ", ".join(_plain(name) for name in header.labels)
    return f"labels, in the order of the logits: {names}"


def _base(record: dict[str, Any], header: AdapterHeader) -> str:
    base, revision = record["about"].get("model"), record["about"].get("revision")
    sizes = record["base_config"]
    shape = f"{sizes['num_hidden_layers']} layers, hidden size {sizes['hidden_size']}"
    which = "a BERT that the author had in a folder"
    if base == minilm.NAME:
        which = f"`{base}`, the weights of `{minilm.MEND}`"
    elif revision:
        which = f"[{base}](https://huggingface.co/{base}/tree/{revision}) at commit `{revision}`"
    fingerprint = f"fingerprint `{header.base_fingerprint}`"
    return f"{which} ({shape}; {fingerprint}, and another base is refused)"


def _drawing(record: dict[str, Any], header: AdapterHeader) -> str:
    """Return what trains, indented: whatever a stratum is called, nothing ends the block."""
    config = BertConfig.from_dict(record["base_config"])
    with torch.device("meta"):
        shadow = BertForSequenceClassification(config, header.num_labels)
    return textwrap.indent(str(adapt(shadow, header.plan)), "    ")


def _loading(repository: str, record: dict[str, Any], header: AdapterHeader) -> list[str]:
    base, revision = record["about"].get("model"), record["about"].get("revision")
    text = "--text 'A text.'" + (" --text2 'Another.'" if _pair(record) else "")
    option = "" if base else " --model BASE"
    more = f", revision={revision!r}" if revision else ""
    named = repr(base) if base else "BASE"
    return [
        "```",
        f"python -m weights_tools pull {repository} adapter",
        f"spafit predict adapter{option} {text} --probabilities",
        "```",
        "",
        "Or in Python, after the first line:",
        "",
        "```python",
        "import spafit",
        "",
        f"model = spafit.load_pretrained({named}, num_labels={header.num_labels}{more})",
        'spafit.load_adapter(model, "adapter/adapter.safetensors")',
        "```",
        *([] if base else ["", "BASE is the folder of the base model."]),
    ]
