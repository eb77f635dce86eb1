"""Stratified fine-tuning of BERT (SPAFIT, arXiv 2405.00201), from scratch in PyTorch.

The public names, in the order of the tour in README.md.
"""

import sys

from spafit import interop
from spafit.adapters import (
    BiasDelta,
    DirectBias,
    Full,
    LayerNorm,
    Linear,
    LoRA,
    LoRALinear,
    Technique,
    register,
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
from spafit.kernels.gpu import choices
from spafit.machine.kernel_choices import KernelsFile
from spafit.methods import METHODS, plan
from spafit.plans import Plan, Stratum
from spafit.strata import adapt, adapters_disabled, fingerprint, merged_state_dict, summarise
from spafit.summary import Summary
from spafit.tasks import glue
from spafit.text.tokenization import Tokenizer, load_tokenizer
from spafit.training.fit import fit
from spafit.training.inference import Predictions, evaluate, predict
from spafit.training.result import Result
from spafit.training.settings import TrainConfig
from spafit.version import __version__
from spafit.weights.adapter_files import load_adapter, save_adapter
from spafit.weights.pretrained import load_pretrained, load_report

# Which form of an operation was fastest on a GPU is remembered in the cache folder.
choices.remember_in(KernelsFile())

# GLUE is known as spafit.glue: ``from spafit.glue import load`` finds it there too.
sys.modules["spafit.glue"] = glue

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
    "save_adapter",
    "load_adapter",
    # data, training, prediction
    "glue",
    "TrainConfig",
    "Result",
    "fit",
    "evaluate",
    "Predictions",
    "predict",
    # other people's trainers
    "interop",
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
