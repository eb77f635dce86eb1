"""Run folders written by hand, for the tests of reports: run.json, log.jsonl, dev.tsv, an adapter.

They hold what a report reads of a run, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "vocab_size": 30522}
LARGE_CASED = {"hidden_size": 1024, "num_hidden_layers": 24, "vocab_size": 28996}

LABELS = {"rte": ("entailment", "not_entailment"), "cola": ("unacceptable", "acceptable")}
METRIC = {"rte": "accuracy", "cola": "matthews", "sts-b": "pearson", "mrpc": "f1"}

#: What benchmarks read of a run's settings and record, beside what a report does.
SETTINGS = {"batch_size": 16, "warmup": 0.1, "weight_decay": 0.01, "max_grad_norm": 1.0}
OF_BENCHMARKS = {
    "data": {"train": {"rows": 2490}, "dev": {"rows": 277}},
    "machine": {"processor": "a processor", "torch_threads": 1},
    "versions": {"torch": "2.13.0", "spafit": "0.1.0"},
}


def write_run(
    folder: Path,
    score: float,
    *,
    task: str = "rte",
    method: str = "SPAFIT-1-3-II",
    seed: int = 0,
    status: str = "finished",
    trainable: int = 407_042,
    cell: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    base: dict[str, int] | None = None,
    answers: Sequence[tuple[object, object]] = (),
    plan: dict[str, Any] | None = None,
    majority: float = 0.5,
    **changes: Any,
) -> Path:
    """Write the folder of a run with this score after its second epoch of three.

    ``answers`` are pairs of a label and a prediction; ``changes`` replace entries of the record.
    """
    folder.mkdir(parents=True)
    metrics = {METRIC.get(task, "accuracy"): score, **(metrics or {})}
    first = next(iter(metrics))
    history = [
        {"step": 10 * epoch, "epoch": epoch, "metrics": {**metrics, first: found}}
        for epoch, found in ((1, score - 0.1), (2, score), (3, score - 0.02))
    ]
    about: dict[str, Any] = {"model": "minilm"}
    if cell is not None:
        about["cell"] = {"grid": "small", "purpose": "report", "settings": {}, **cell}
    result = {
        "metrics": metrics,
        "majority": dict.fromkeys(metrics, majority),
        "best_epoch": 2,
        "best_step": 20,
        "history": history,
        "trainable": trainable,
        "examples_per_s": 100.0,
        "peak_memory_mib": 400.0 + seed,
        "seconds": 60.0 + seed,
    }
    record: dict[str, Any] = {
        "status": status,
        "task": task,
        "method": method,
        "about": about,
        "settings": {"seed": seed, "epochs": 3, "learning_rate": 6e-5, **(settings or {})},
        "plan": plan or {"name": method, "strata": []},
        "data": {"dev": {"sha256": f"of {task}"}},
        "base_config": base or MINILM,
        "labels": list(LABELS.get(task, ())),
        "trainable": trainable,
        **({"result": result} if status == "finished" else {"error": "ConfigError: it was <b>"}),
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    rows = [{**each, "evaluation": each["metrics"]} for each in history]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "adapter.safetensors").write_bytes(b"of no use")
    if answers:
        table = [f"{n}\t{label}\t{answer}\n" for n, (label, answer) in enumerate(answers)]
        text = "".join(["index\tlabel\tprediction\n", *table])
        (folder / "dev.tsv").write_text(text, encoding="utf-8")
    return folder
