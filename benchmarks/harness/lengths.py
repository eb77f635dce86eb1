"""Batches with real sequence lengths: of the data if present, else of a recorded list.

The cost of a batch depends on the lengths of its sequences, not on its words. So if GLUE's files
are missing, sequences of recorded lengths are filled with random token ids; everything after that
is the same. The record has, for each task, 256 random rows of train and the first rows of dev in
the order of the file (up to 277, all of RTE's), in BERT's cased vocabulary. For the three largest
tasks (:data:`TRAIN_ALONE`) it has rows of train only, from a file ``train_subset.tsv`` with a part
of them if there is no whole one. It is made by

    python -m benchmarks.harness.lengths --record
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.timing import Rows
from spafit.tasks import glue
from spafit.text.tokenization import Encodings, load_tokenizer

TASKS = ("rte", "cola", "sst-2", "mrpc", "sts-b", "wnli", "mnli", "qnli", "qqp")
TRAIN_ALONE = ("mnli", "qnli", "qqp")
DATA = Path("../shared/data/glue")
VOCABULARY = Path("../shared/data/vocab/bert-cased")
RECORD = Path(__file__).with_name("recorded_lengths.json")

MAX_LENGTH = 512  # BERT's positions; no row of the files is longer
_TRAIN_ROWS, _DEV_ROWS = 256, 277
_BAD_ROWS = 10  # QQP's file has some
_SEED = 0
_CLS, _SEP, _FIRST_WORD, _WORDS = 101, 102, 1000, 28_996  # ids of the cased vocabulary


@dataclass(frozen=True)
class TaskRows:
    """Encoded rows of one task.

    Attributes
    ----------
    encodings : Encodings
        Token ids, real or random.
    source : str
        "data", "part of the data" or "recorded lengths".
    """

    encodings: Encodings
    source: str

    def first(self, count: int, batch_size: int) -> list[Rows]:
        """Return the first rows in their order, in batches."""
        count = min(count, len(self.encodings))
        return self._batches(range(count), batch_size)

    def draw(self, batches: int, batch_size: int, seed: int) -> list[Rows]:
        """Return batches of random rows without repetition.

        Raises
        ------
        ValueError
            If there are not enough rows.
        """
        count = batches * batch_size
        if count > len(self.encodings):
            raise ValueError(
                f"{batches} batches of {batch_size} need {count} rows, there are "
                f"{len(self.encodings)} ({self.source})"
            )
        order = np.random.default_rng(seed).permutation(len(self.encodings))
        return self._batches(order[:count].tolist(), batch_size)

    def _batches(self, rows: Sequence[int], batch_size: int) -> list[Rows]:
        lengths = self.encodings.lengths
        return [
            Rows(tuple(numbers), sum(lengths[row] for row in numbers))
            for numbers in (
                rows[start : start + batch_size] for start in range(0, len(rows), batch_size)
            )
        ]


def load_rows(
    task: str,
    split: str = "train",
    data: Path = DATA,
    vocabulary: Path = VOCABULARY,
    max_length: int = MAX_LENGTH,
) -> TaskRows:
    """Encode a task's rows, or make rows of its recorded lengths if the files are missing.

    Parameters
    ----------
    task : str
        One of :data:`TASKS`.
    split : {"train", "dev"}
        Which file.
    data, vocabulary : Path
        GLUE's root, and the folder of a BERT vocabulary.
    max_length : int
        Tokens after which a row is cut, the longer text first.
    """
    if data.is_dir() and vocabulary.is_dir() and (found := _dataset(task, split, data)):
        dataset, source = found
        tokenizer = load_tokenizer(vocabulary)
        encodings = tokenizer.encode(dataset.texts_a, dataset.texts_b, max_length=max_length)
        return TaskRows(encodings, source)
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    if split not in recorded.get(task, {}):
        raise ValueError(
            f"no lengths of {task!r}, {split}, are recorded; there are {', '.join(recorded)}, and "
            f"of {', '.join(TRAIN_ALONE)} those of train"
        )
    lengths, first_texts = recorded[task][split].values()
    cut = [cut_to(max_length, *each) for each in zip(lengths, first_texts, strict=True)]
    return TaskRows(_filled(*zip(*cut, strict=True)), "recorded lengths")


def cut_to(max_length: int, length: int, first: int) -> tuple[int, int]:
    """Cut tokens off the longer of two texts until a row fits, as the tokenizer does.

    Parameters
    ----------
    max_length : int
        What the row may have.
    length, first : int
        Its tokens, and those up to the [SEP] after the first text; equal where that is the only
        one.
    """
    if length == first:
        return min(length, max_length), min(length, max_length)
    a, b = first - 2, length - first - 1  # without [CLS] and the two [SEP]
    room = max_length - 3
    if a + b > room:
        shorter = min(a, b)
        kept = min(shorter, room // 2)
        a, b = (kept, room - kept) if a <= b else (room - kept, kept)
    return a + b + 3, a + 2


def _dataset(task: str, split: str, data: Path) -> tuple[glue.Dataset, str] | None:
    """Read a split; return it and whether it is the data or a part of them, or None."""
    if task not in TRAIN_ALONE:
        return glue.load(task, split, data), "data"
    folder = data / glue.get_task(task).folder
    if (folder / glue.get_task(task).split(split).file).is_file():
        return glue.load(task, split, data, max_bad_rows=_BAD_ROWS), "data"
    if split == "train" and (part := folder / "train_subset.tsv").is_file():
        dataset = glue.read_file(task, part, "train", max_bad_rows=_BAD_ROWS)
        return dataset, "part of the data"
    return None


def random_labels(count: int, num_labels: int, seed: int) -> torch.Tensor:
    """Draw random classes (count,), one per row; they do not affect timing."""
    return torch.randint(num_labels, (count,), generator=torch.Generator().manual_seed(seed))


def _filled(lengths: Sequence[int], first_texts: Sequence[int]) -> Encodings:
    """Return sequences of random words with these total lengths and first-text lengths."""
    generator = np.random.default_rng(_SEED)
    input_ids, token_type_ids = [], []
    for length, first in zip(lengths, first_texts, strict=True):
        ids = generator.integers(_FIRST_WORD, _WORDS, length).tolist()
        ids[0], ids[first - 1], ids[-1] = _CLS, _SEP, _SEP
        input_ids.append(ids)
        token_type_ids.append([0] * first + [1] * (length - first))
    return Encodings(input_ids, token_type_ids, pad_id=0)


def measured_lengths(
    task: str, data: Path = DATA, vocabulary: Path = VOCABULARY
) -> dict[str, dict[str, list[int]]]:
    """Return a task's record: for each split, the lengths of its rows and of their first texts."""
    found = {}
    for split in ("train",) if task in TRAIN_ALONE else ("train", "dev"):
        rows = load_rows(task, split, data, vocabulary)
        if split == "train":
            numbers = rows.draw(1, _TRAIN_ROWS, _SEED)[0].numbers
        else:
            numbers = rows.first(_DEV_ROWS, _DEV_ROWS)[0].numbers
        types = [rows.encodings.token_type_ids[row] for row in numbers]
        found[split] = {
            "lengths": [len(its) for its in types],
            "first_texts": [len(its) - sum(its) for its in types],
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Record the lengths again, or print the recorded ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} from the data")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--vocab", type=Path, default=VOCABULARY)
    parsed = parser.parse_args(arguments)
    if parsed.record:
        if not (parsed.data.is_dir() and parsed.vocab.is_dir()):
            parser.error(f"{parsed.data} or {parsed.vocab} is missing")
        record = {task: measured_lengths(task, parsed.data, parsed.vocab) for task in TASKS}
        written = json.dumps(record, indent=1)
        for whitespace in ("\n     ", "\n    "):  # a list to a line
            written = written.replace(whitespace, " ")
        RECORD.write_text(written + "\n", encoding="utf-8")
    for task, splits in json.loads(RECORD.read_text(encoding="utf-8")).items():
        for split, recorded in splits.items():
            lengths = recorded["lengths"]
            print(
                f"{task:6} {split:6} {len(lengths):4} rows, {np.mean(lengths):5.1f} tokens on "
                f"average, {max(lengths)} at most"
            )


if __name__ == "__main__":
    main()
