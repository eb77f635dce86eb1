"""Load a folder of weights and run one row, in a process with only the imports that this needs.

    python -m benchmarks.contenders.first_logits spafit FOLDER 2

prints the time without imports, and the logits, as a line of JSON; 2 is the number of threads.
:mod:`benchmarks.load` runs it.
"""

from __future__ import annotations

import json
import sys
import time

import torch

TRANSFORMERS, SPAFIT = "transformers", "spafit"
TOKENS = 66  # an average row of RTE


def main(name: str, folder: str, threads: str) -> None:
    """Measure and print."""
    torch.set_num_threads(int(threads))
    ids = torch.arange(TOKENS)[None] + 1000
    if name == TRANSFORMERS:
        from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

        # Naming the class imports it, which transformers would put off until it is first needed.
        assert BertForSequenceClassification is not None
        load = AutoModelForSequenceClassification.from_pretrained
    else:
        from spafit import load_pretrained

        load = load_pretrained
    began = time.perf_counter()
    model = load(folder, num_labels=2).eval()
    with torch.inference_mode():
        output = model(ids)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    load_ms = 1000 * (time.perf_counter() - began)
    print(json.dumps({"load_ms": load_ms, "logits": logits[0].tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
