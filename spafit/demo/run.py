"""Run the demo: five ways to fine-tune real weights, on a task that the package generates."""

from __future__ import annotations

import sys
from pathlib import Path

from spafit.bert import BertForSequenceClassification
from spafit.demo.figure import draw
from spafit.demo.sentiment import datasets
from spafit.errors import DataError, one_line
from spafit.experiments.figure import can_draw
from spafit.files.replacing import refuse_place
from spafit.strata import adapt
from spafit.tasks import own
from spafit.tasks.task import Dataset
from spafit.text.tokenization import Tokenizer, load_tokenizer
from spafit.training.fit import fit
from spafit.training.inference import predict
from spafit.training.result import Result
from spafit.training.settings import TrainConfig
from spafit.weights.pretrained import load_pretrained

PROBE = "Linear probing"
SPAFIT = "SPAFIT-1-3-II"

# The methods by how much they train. A rate each, fixed beforehand: of three, the one with the
# highest mean on seeds 11 to 14. A small model and a short run need more than the paper's 6e-5.
LEARNING_RATES = {
    PROBE: 1e-3,
    "Full BitFit": 4e-3,
    SPAFIT: 2e-3,
    "Full LoRA-II": 5e-4,
    "Full Fine-tuning": 5e-5,
}
EPOCHS = 3
BATCH_SIZE = 16
WARMUP = 0.1
QUESTIONS = 3

_TASK = """\
The task: is a sentence positive or negative, where "not", "never" and the like
turn it round? {train} sentences to learn from, and {dev} to score on, with other
adjectives, nouns and patterns. Neither adjective nor negation alone tells it:
"""
_NEXT = """
Next:
  spafit demo --ask            sentences of your own again; trains nothing twice
  spafit plan SPAFIT-4-9-II    what trains in BERT-large, as in the paper
  spafit download glue rte     a real task, once
  spafit train --task rte --method SPAFIT-1-3-II --model minilm --out runs/rte"""


def run_demo(
    *, out: Path, model: str, seed: int, ask: bool = False, overwrite: bool = False
) -> None:
    """Fine-tune by five methods, print and draw their scores, and classify the reader's sentences.

    Parameters
    ----------
    out : Path
        Below it, ``seed-N/METHOD`` is the run folder of a method, which is resumed if it exists.
    model : str
        A folder of weights, ``minilm``, or a hub name.
    seed : int
        Seed of the task, the head, LoRA, dropout and the order of the data.
    ask : bool
        Read sentences from standard input at the end, even if it is no terminal. They are read in
        any case if standard input and output are terminals.
    overwrite : bool
        Train again, in place of what the folders hold.

    Raises
    ------
    WeightsError
        If there are no such weights; the message says what to type.
    CheckpointError
        If a folder holds another run.
    """
    refuse_place(out, is_folder=True)
    tokenizer = load_tokenizer(model)
    train, dev = datasets(seed)
    print(_TASK.format(train=f"{len(train):,}", dev=len(dev)))
    for example in train.examples[:4]:
        print(f"  {example.label}: {example.text_a}")
    folder = out / f"seed-{seed}"
    results: dict[str, Result] = {}
    for number, method in enumerate(LEARNING_RATES, start=1):
        print(f"\n{number} of {len(LEARNING_RATES)}: {method}", flush=True)
        place = folder / method.replace(" ", "-")
        network, results[method] = fine_tune(
            method, model, tokenizer, train, dev, seed, place, overwrite
        )
        if method == SPAFIT:
            tuned = network
    print(f"\n{table(results)}")
    print(
        f"\nOne run each (seed {seed}, {EPOCHS} epochs, scored after the last): small "
        "differences\nmean nothing."
    )
    if can_draw():
        draw(results, folder / "demo.png")
        print(f"Figure: {folder / 'demo.png'}")
    if ask or (sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()):
        _classify(tuned, tokenizer)
    print(_NEXT)


def fine_tune(
    method: str,
    model: str,
    tokenizer: Tokenizer,
    train: Dataset,
    dev: Dataset,
    seed: int,
    out: Path | None = None,
    overwrite: bool = False,
) -> tuple[BertForSequenceClassification, Result]:
    """Fine-tune a fresh model by a method of :data:`LEARNING_RATES`, and return it and its result.

    It is scored once, after the last epoch, so that dev chooses nothing.
    """
    network = load_pretrained(model, num_labels=train.task.num_labels, seed=seed)
    adapt(network, method, seed=seed)
    settings = TrainConfig(
        out=out,
        overwrite=overwrite,
        seed=seed,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATES[method],
        warmup=WARMUP,
        eval_every=EPOCHS * len(train),
    )
    return network, fit(network, tokenizer, train, dev, settings, about={"model": model})


def table(results: dict[str, Result]) -> str:
    """Return the table of the methods' results, at most 80 columns wide."""
    first = next(iter(results.values()))
    metric = next(iter(first.metrics))
    rows = [("commonest class", "", "", first.majority[metric], "")]
    rows += [
        (
            method,
            f"{result.trainable:,}",
            f"{result.percent:.2f} %",
            result.metrics[metric],
            f"{result.seconds:.0f} s",
        )
        for method, result in results.items()
    ]
    lines = [f"{'':<16} {'trains':>11} {'share':>9}   {'dev ' + metric:<26} {'time':>6}"]
    lines += [
        f"{name:<16} {trains:>11} {share:>9}   {score:.3f} {'█' * round(20 * score):<20} {time:>6}"
        for name, trains, share, score, time in rows
    ]
    lines.insert(1, "─" * len(lines[0]))
    return "\n".join(map(str.rstrip, lines))


def _classify(network: BertForSequenceClassification, tokenizer: Tokenizer) -> None:
    """Read sentences until an empty line or the end, and say what the model takes them for."""
    print(f"\nNow your own: up to {QUESTIONS} sentences for {SPAFIT}; an empty line ends.")
    for _ in range(QUESTIONS if sys.stdin is not None else 0):
        try:
            sentence = input("> ").strip()
        except EOFError:
            break
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is no text: {error}") from None
        if not sentence:
            break
        found = predict(network, tokenizer, own.dataset([sentence]))
        sure = found.probabilities.max()
        echo = "" if sys.stdin.isatty() else f"  {one_line(sentence)}"
        print(f"  {found.labels[0]} ({sure:.0%}){echo}")
