"""The commands of the command line: each calls the package and prints the results."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import ConfigError
from spafit.files.replacing import refuse_place, replacing
from spafit.methods import plan as make_plan
from spafit.plans import Plan
from spafit.strata import adapt
from spafit.tasks import glue
from spafit.tasks.download import download_glue, glue_cache
from spafit.training.result import plan_screen
from spafit.weights.hub import local_folder, pinned_revision


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """The options that turn a method's name into a plan (see :func:`spafit.plan`)."""

    method: str
    r: int | None
    alpha: float | None
    lora_dropout: float | None
    bias: str | None
    numbering: str | None

    def make(self, num_layers: int) -> Plan:
        """Return the plan for a model of L layers."""
        return make_plan(
            self.method,
            num_layers,
            r=self.r,
            alpha=self.alpha,
            lora_dropout=self.lora_dropout,
            bias=self.bias,
            numbering=self.numbering,
        )


def run_plan(options: PlanOptions, model: str | None, num_labels: int, save: Path | None) -> None:
    """Print what trains, for a model built without weights."""
    if save is not None:
        refuse_place(save)
    config = BertConfig()  # bert-large-cased
    if model is not None:
        config = BertConfig.from_json(local_folder(model, files=("config.json",)))
    with torch.device("meta"):
        shadow = BertForSequenceClassification(config, num_labels)
    plan = options.make(config.num_hidden_layers)
    print(plan_screen(adapt(shadow, plan)))
    if save is not None:
        with replacing(save, ConfigError) as temporary:
            temporary.write_text(plan.to_json() + "\n", encoding="utf-8")
        print(f"written: {save}")


def run_download(what: str, names: list[str], folder: Path | None) -> None:
    """Download a model or GLUE's files once; afterwards everything works offline."""
    if what == "model":
        if folder is not None:
            raise ConfigError("--folder is for glue; models go to the hub's cache (HF_HOME)")
        for name in names:
            if Path(name).expanduser().is_dir():
                raise ConfigError(f"{name} is a local folder already; name a model")
        for name in names or ["google-bert/bert-large-cased"]:
            place, commit = local_folder(name), pinned_revision(name)
            print(f"{name} at commit {commit}: {place}" if commit else f"{name}: {place}")
        return
    tasks = names or [task.name for task in glue.TASKS.values()]
    place = glue_cache() if folder is None else folder
    refuse_place(place, is_folder=True)
    shown: dict[str, int] = {}

    def show(name: str, done: int, total: int) -> None:
        percent = 100 * done // max(1, total)
        if percent // 10 > shown.get(name, -1):
            shown[name] = percent // 10
            print(f"{name}: {done:,} of {total:,} bytes", file=sys.stderr)

    for path in download_glue(tasks, place, progress=show):
        print(f"written: {path}")
