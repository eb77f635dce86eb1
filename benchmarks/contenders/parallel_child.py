"""AdapterHub's ``Parallel`` in a process of its own, which the library's old transformers needs.

:mod:`benchmarks.many_tasks` starts it with the library's folder in front of the others, writes the
weights beforehand, and asks for one batch at a time: a line of JSON each way. The time of a batch
is this process's own: padding, one forward for all adapters, and their heads.

    PYTHONPATH=FOLDER:. python -m benchmarks.contenders.parallel_child WEIGHTS THREADS
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file
from torch import Tensor


def main(arguments: Sequence[str], questions: TextIO, answers: TextIO) -> None:
    """Answer questions until they end."""
    folder, threads = arguments
    torch.set_num_threads(int(threads))
    logits = parallel(Path(folder))
    versions = {name: importlib.import_module(name).__version__ for name in _LIBRARIES}
    print(json.dumps(versions), file=answers, flush=True)
    for line in questions:
        asked = json.loads(line)
        began = time.perf_counter()
        with torch.inference_mode():
            found = logits(asked["rows"])
        answer: dict[str, Any] = {"ms": 1000 * (time.perf_counter() - began)}
        if asked["check"]:
            answer["logits"] = found.tolist()
        print(json.dumps(answer), file=answers, flush=True)


_LIBRARIES = ("adapters", "transformers")


def parallel(folder: Path) -> Callable[[Sequence[int]], Tensor]:
    """Return a function from row numbers to the logits (k, n, C) of k adapters.

    Parameters
    ----------
    folder : Path
        ``setup.json``: the model's ``config``, the ``tasks``, the ``bottleneck``'s units, the
        layers to ``leave_out``, and the token ids and segments of the ``rows``. And two files of
        tensors under spafit's names: ``base.safetensors``, and ``tasks.safetensors``, where a
        task's name and a slash stand before them.
    """
    adapters, transformers = map(importlib.import_module, _LIBRARIES)
    about = json.loads((folder / "setup.json").read_text(encoding="utf-8"))
    config = transformers.BertConfig(**about["config"])
    bert = transformers.BertModel(config)
    base = load_file(folder / "base.safetensors")
    bert.load_state_dict({name.removeprefix("bert."): each for name, each in base.items()})
    adapters.init(bert)
    form = adapters.DoubleSeqBnConfig(
        reduction_factor=config.hidden_size / about["bottleneck"], leave_out=about["leave_out"]
    )
    for name in about["tasks"]:
        bert.add_adapter(name, config=form)
    bert.active_adapters = importlib.import_module("adapters.composition").Parallel(*about["tasks"])
    bert.eval()
    heads: dict[str, dict[str, Tensor]] = {name: {} for name in about["tasks"]}
    parts = {"down": "adapter_down.0", "up": "adapter_up"}
    with torch.no_grad():
        for key, values in load_file(folder / "tasks.safetensors").items():
            task, _, name = key.partition("/")
            owner, _, end = name.removeprefix("bert.").partition(".adapters.series.")
            if not end:  # the classifier's
                heads[task][name.rpartition(".")[2]] = values
                continue
            part, _, kind = end.partition(".")
            bert.get_parameter(f"{owner}.adapters.{task}.{parts[part]}.{kind}").copy_(values)

    def logits(numbers: Sequence[int]) -> Tensor:
        rows = [about["rows"][number] for number in numbers]
        longest = max(len(ids) for ids, _ in rows)
        ids, types, mask = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(3))
        for at, row in enumerate(rows):
            size = len(row[0])
            ids[at, :size], types[at, :size] = map(torch.tensor, row)
            mask[at, :size] = 1
        pooled = bert(ids, attention_mask=mask, token_type_ids=types).pooler_output
        return torch.stack(
            [
                torch.nn.functional.linear(each, head["weight"], head["bias"])
                for each, head in zip(pooled.split(len(rows)), heads.values(), strict=True)
            ]
        )

    return logits


if __name__ == "__main__":
    output, sys.stdout = sys.stdout, sys.stderr  # the libraries may print
    main(sys.argv[1:], sys.stdin, output)
