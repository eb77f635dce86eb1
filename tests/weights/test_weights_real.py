"""Loading weights of real sizes, and real weights."""

from __future__ import annotations

import csv
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spafit.weights.pretrained import load_pretrained

BLOCK = 1_000_003  # a prime, so that no two rows of a tensor begin alike

LOAD_AND_MEASURE = """
import json, sys
from pathlib import Path
import torch
from spafit.weights.pretrained import load_pretrained, load_report

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
before = status("VmRSS")
model = load_pretrained(sys.argv[1], num_labels=3)
peak = status("VmHWM")
report = load_report(model)
picked = json.loads(sys.argv[2])
parameters = dict(model.named_parameters())
print(json.dumps({
    "growth": peak - before,
    "loaded": report.loaded,
    "loaded_numbers": report.loaded_numbers,
    "renamed": len(report.renamed),
    "dropped": len(report.dropped),
    "newly_drawn": [name for name, _ in report.newly_drawn],
    "values": {name: parameters[name].flatten()[[0, -1]].tolist() for name in picked},
}))
"""


def test_bert_large_is_accounted_for_within_its_memory(shared_data: Path, tmp_path: Path) -> None:
    """All 399 names and shapes of BERT-large's first form, random, loaded in a process of its own.

    The oracles: the derived list of names; DESIGN.md's count of 333,582,339 numbers with a head of
    3 labels, so 333,579,264 without; and the kernel's own account of the process's peak memory,
    file-backed pages included, which must stay under 1.2 times the file.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc to measure peak memory")
    source = shared_data / "config" / "bert-large-cased"
    shapes: dict[str, list[int]] = {}
    for line in (source / "derived_tensor_names.txt").read_text().splitlines():
        name, shape = line.split("\t")
        shapes[name] = json.loads(shape)
    assert len(shapes) == 399
    (tmp_path / "config.json").write_bytes((source / "transformer_config.json").read_bytes())

    generator = np.random.default_rng(0)
    block = (0.02 * generator.standard_normal(BLOCK)).astype("<f4")
    starts: dict[str, int] = {}
    header, position = {}, 0
    for name, shape in shapes.items():
        starts[name] = position // 4
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    weights = tmp_path / "model.safetensors"
    raw = json.dumps(header).encode()
    try:
        with weights.open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            for start in range(0, position, block.nbytes):
                file.write(memoryview(block).cast("B")[: position - start])
        size = weights.stat().st_size
        assert size > 1_300_000_000
        picked = {
            "bert.embeddings.LayerNorm.weight": "bert.embeddings.LayerNorm.gamma",
            "bert.encoder.layer.23.output.dense.weight": None,
            "bert.encoder.layer.11.attention.self.key.bias": None,
            "bert.pooler.dense.weight": None,
        }
        result = subprocess.run(
            [sys.executable, "-c", LOAD_AND_MEASURE, str(tmp_path), json.dumps([*picked])],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        weights.unlink(missing_ok=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    print(f"peak growth {found['growth'] / size:.3f} of the file")
    assert found["growth"] < 1.2 * size
    assert found["growth"] > 4 * found["loaded_numbers"]  # else it was not measured
    assert found["loaded"] == 391
    assert found["loaded_numbers"] == 333_579_264
    assert found["renamed"] == 2 * 49
    assert found["dropped"] == 399 - 391
    assert found["newly_drawn"] == ["classifier.weight", "classifier.bias"]
    for name, stored_as in picked.items():
        start = starts[stored_as or name]
        last = start + math.prod(shapes[stored_as or name]) - 1
        expected = [float(block[start % BLOCK]), float(block[last % BLOCK])]
        assert found["values"][name] == expected, name


def test_minilm_gives_hugging_faces_hidden_states(minilm_folder: Path, shared_data: Path) -> None:
    """The oracle is transformers' eager BERT on real RTE pairs, to 1e-5 for every hidden state."""
    transformers = pytest.importorskip("transformers")
    with (shared_data / "glue" / "RTE" / "dev.tsv").open(encoding="utf-8", newline="\n") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    pairs = [(row[1], row[2]) for row in rows[:277:12]]
    assert len(pairs) == 24
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    batch = tokenizer(
        *map(list, zip(*pairs, strict=True)), padding=True, truncation=True, max_length=128,
        return_tensors="pt",
    )  # fmt: skip
    assert batch["token_type_ids"].any()
    assert not batch["attention_mask"].all()
    theirs = transformers.BertModel.from_pretrained(minilm_folder, attn_implementation="eager")
    ours = load_pretrained(minilm_folder).bert
    with torch.no_grad():
        expected = theirs.eval()(**batch, output_hidden_states=True)
        found = ours(
            batch["input_ids"],
            batch["attention_mask"],
            batch["token_type_ids"],
            output_hidden_states=True,
        )
    assert len(found.hidden_states) == len(expected.hidden_states) == 7
    real = batch["attention_mask"].bool()
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert float((a - b)[real].abs().max()) < 1e-5
    assert float((found.pooler_output - expected.pooler_output).abs().max()) < 1e-5
