"""Stratified fine-tuning of BERT (SPAFIT, arXiv 2405.00201), from scratch in PyTorch.

The public names, in the order of the guide (docs/guide). They are imported when the first of them
is used, so that ``spafit --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spafit.version import __version__

if TYPE_CHECKING:  # for type checkers and editors; when the program runs, _HOMES says the same
    from spafit import interop
    from spafit.adaptable import LayerNorm, Linear
    from spafit.adapters import (
        IA3,
        BiasDelta,
        DirectBias,
        Full,
        LayerNormGain,
        LoRA,
        LoRALinear,
        ParallelAdapter,
        PfeifferAdapter,
        SeriesAdapter,
    )
    from spafit.bert import BertForSequenceClassification, BertModel, set_impl
    from spafit.config import BertConfig
    from spafit.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        PlanError,
        SpafitError,
        StoppedError,
        TrainingError,
        WeightsError,
    )
    from spafit.methods import METHODS, plan
    from spafit.plans import Plan, Stratum
    from spafit.runs.train_config import TrainConfig
    from spafit.strata import (
        adapt,
        adapters_disabled,
        fingerprint,
        remove_adapter,
        summarise,
        use,
    )
    from spafit.summary import Summary
    from spafit.tasks import glue
    from spafit.tasks.own import dataset
    from spafit.tasks.task import Dataset, Example, Task
    from spafit.techniques import Technique, register
    from spafit.text.tokenization import Tokenizer, load_tokenizer
    from spafit.training.fit import fit
    from spafit.training.inference import Predictions, Predictor, evaluate, predict, predict_all
    from spafit.training.optimisation import parameter_groups
    from spafit.training.prefix.shared import SharedPrefix
    from spafit.training.result import Result
    from spafit.trunk.batches import forward_rows, forward_tasks
    from spafit.trunk.combining import combine, copy_adapter
    from spafit.trunk.merging import merge, merged_state_dict, unmerge
    from spafit.weights.adapter_files import load_adapter, save_adapter
    from spafit.weights.pretrained import load_pretrained, load_report

__all__ = [
    "__version__",
    # the model and its weights
    "BertConfig",
    "BertModel",
    "BertForSequenceClassification",
    "set_impl",
    "load_pretrained",
    "load_report",
    "fingerprint",
    # text
    "Tokenizer",
    "load_tokenizer",
    # techniques, strata, plans
    "BiasDelta",
    "DirectBias",
    "LoRA",
    "Linear",
    "LayerNorm",
    "LoRALinear",
    "SeriesAdapter",
    "PfeifferAdapter",
    "ParallelAdapter",
    "IA3",
    "LayerNormGain",
    "Full",
    "Technique",
    "register",
    "METHODS",
    "Plan",
    "Stratum",
    "plan",
    "adapt",
    "summarise",
    "Summary",
    "adapters_disabled",
    "merged_state_dict",
    "merge",
    "unmerge",
    "save_adapter",
    "load_adapter",
    "use",
    "remove_adapter",
    "copy_adapter",
    "combine",
    "forward_tasks",
    "forward_rows",
    # data, training, prediction
    "glue",
    "Task",
    "Dataset",
    "Example",
    "dataset",
    "TrainConfig",
    "Result",
    "fit",
    "SharedPrefix",
    "evaluate",
    "Predictions",
    "Predictor",
    "predict",
    "predict_all",
    # other people's trainers
    "interop",
    "parameter_groups",
    # errors
    "SpafitError",
    "ConfigError",
    "WeightsError",
    "PlanError",
    "DataError",
    "TrainingError",
    "CheckpointError",
    "StoppedError",
]

_HOMES = {
    "adaptable": "LayerNorm Linear",
    "adapters": "BiasDelta DirectBias Full IA3 LayerNormGain LoRA LoRALinear ParallelAdapter "
    "PfeifferAdapter SeriesAdapter",
    "bert": "BertForSequenceClassification BertModel set_impl",
    "trunk.combining": "combine copy_adapter",
    "config": "BertConfig",
    "errors": "CheckpointError ConfigError DataError PlanError SpafitError StoppedError "
    "TrainingError WeightsError",
    "trunk.merging": "merge merged_state_dict unmerge",
    "methods": "METHODS plan",
    "plans": "Plan Stratum",
    "runs.train_config": "TrainConfig",
    "strata": "adapt adapters_disabled fingerprint remove_adapter summarise use",
    "summary": "Summary",
    "tasks.own": "dataset",
    "tasks.task": "Dataset Example Task",
    "techniques": "Technique register",
    "text.tokenization": "Tokenizer load_tokenizer",
    "trunk.batches": "forward_rows forward_tasks",
    "training.fit": "fit",
    "training.inference": "Predictions Predictor evaluate predict predict_all",
    "training.optimisation": "parameter_groups",
    "training.prefix.shared": "SharedPrefix",
    "training.result": "Result",
    "weights.adapter_files": "load_adapter save_adapter",
    "weights.pretrained": "load_pretrained load_report",
}


def __getattr__(name: str) -> Any:
    """Import all that is public when something of it is first used (PEP 562)."""
    if not name.startswith("__") and "fit" not in globals():
        modules = ("glue", "interop")
        found = {each: importlib.import_module(f"{__name__}.{each}") for each in modules}
        for home, names in _HOMES.items():
            module = importlib.import_module(f"{__name__}.{home}")
            found |= {each: getattr(module, each) for each in names.split()}
        globals().update(found)
        if name in globals():  # public, or a module that is imported now
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
