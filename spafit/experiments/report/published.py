"""Published scores on GLUE's dev sets, each with its source. No run is needed to change them."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst-2", "sts-b", "wnli")
"""The tasks in the order of the paper's Table 2."""

METRICS = {
    **dict.fromkeys(TASKS, "accuracy"),
    **{"cola": "matthews", "mrpc": "f1", "sts-b": "pearson"},
}
"""The metric of each of them there."""

# Arora and Wang (2024), arXiv 2405.00201, Table 2: bert-large-cased, the maximum of all runs. The
# first number is the parameters in millions.
_TABLE_2 = """
Full Fine-tuning  333.58  0.67 0.87 0.91 0.93 0.89 0.76 0.95 0.9  0.56
Full BitFit        31.52  0.57 0.82 0.83 0.88 0.89 0.61 0.92 0.87 0.56
Full LoRA-I         9.44  0.64 0.86 0.91 0.92 0.9  0.72 0.93 0.88 0.56
Full LoRA-II       12.59  0.61 0.86 0.92 0.92 0.9  0.71 0.93 0.9  0.56
SPAFIT-8-12-I       4.44  0.62 0.86 0.92 0.92 0.9  0.73 0.93 0.9  0.56
SPAFIT-8-12-II      5.88  0.63 0.86 0.92 0.93 0.9  0.74 0.93 0.9  0.56
SPAFIT-8-16-II      3.81  0.62 0.86 0.91 0.93 0.9  0.73 0.93 0.9  0.56
SPAFIT-4-9-I        5.65  0.64 0.86 0.92 0.92 0.91 0.74 0.93 0.91 0.56
SPAFIT-4-9-II       7.49  0.64 0.87 0.92 0.92 0.91 0.76 0.93 0.9  0.56
SPAFIT-4-14-II      4.89  0.63 0.86 0.92 0.92 0.9  0.73 0.93 0.9  0.56
"""


def _table_2() -> dict[str, tuple[float, dict[str, float]]]:
    found = {}
    for line in _TABLE_2.strip().splitlines():
        words = line.split()
        method = " ".join(words[: -len(TASKS) - 1])
        millions, *scores = map(float, words[-len(TASKS) - 1 :])
        found[method] = (millions, dict(zip(TASKS, scores, strict=True)))
    return found


TABLE_2 = _table_2()
"""By method: the parameters in millions as printed, and the score on each task."""


@dataclass(frozen=True)
class Anchor:
    """Scores that others have published.

    Attributes
    ----------
    what : str
        The method, and how often it was run.
    source : str
        Where it stands.
    scores : dict of str to dict of str to float
        By task and metric.
    """

    what: str
    source: str
    scores: dict[str, dict[str, float]]


ANCHORS = (
    Anchor(
        "LoRA on Q, K, V, r 4, alpha 16, learning rate 5e-5, batch 8, 10 epochs; one seed",
        "github.com/ChengKang520/inhibited-lora, output_final/BERT_large/*/InA00",
        {
            "cola": {"matthews": 0.603},
            "mnli": {"accuracy": 0.856, "mismatched accuracy": 0.857},
            "mrpc": {"f1": 0.893, "accuracy": 0.846},
            "qnli": {"accuracy": 0.920},
            "qqp": {"accuracy": 0.897, "f1": 0.862},
            "rte": {"accuracy": 0.700},
            "sst-2": {"accuracy": 0.922},
            "sts-b": {"pearson": 0.901, "spearman": 0.899},
        },
    ),
    Anchor(
        "Full fine-tuning; one run",
        "huggingface.co/gchhablani/bert-large-cased-finetuned-cola and -wnli",
        {"cola": {"matthews": 0.596}, "wnli": {"accuracy": 0.352}},
    ),
    Anchor(
        "Full fine-tuning; mean of 100 runs (deviation 0.060, maximum 0.887)",
        "NVIDIA DeepLearningExamples, PyTorch BERT-large, MRPC",
        {"mrpc": {"accuracy": 0.826}},
    ),
)
"""Scores of others, of bert-large-cased where the source does not say otherwise."""


def paper_score(method: str, task: str, metric: str, trainable: int) -> float | None:
    """Return what the paper's Table 2 prints for a method on a task, or None.

    The metric must be the paper's, and so must the number of parameters, so that a method with
    another r has none. (Full BitFit's is printed as 31.52 M; its biases are 0.27 M.)
    """
    if method not in TABLE_2 or METRICS.get(task) != metric:
        return None
    millions, scores = TABLE_2[method]
    is_same = method == "Full BitFit" or abs(trainable / 1e6 - millions) < 0.02
    return scores[task] if is_same else None
