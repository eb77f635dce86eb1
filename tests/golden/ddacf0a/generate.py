"""Make the run folder and the adapter files beside this script, as commit ddacf0a wrote them.

Run it in an empty folder with that commit on the path: ``python generate.py``. The tests of
tests/test_older_files.py read what it made; ``expected.json`` holds what that commit computed.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch

import spafit
from spafit.cli import main
from weights_tools.tiny import make_tiny

WORDS = "cat dog child children student teacher sees see likes sleeps sleep old quickly".split()
METHODS = {"delta": "SPAFIT-0-1-II", "direct": "SPAFIT-0-1-I"}


def write_rte(folder: Path) -> None:
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for split, rows in (("train", 20), ("dev", 9)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for index in range(rows):
            texts = [
                " ".join(draw.choices(WORDS[index % 2 :: 2], k=draw.randint(1, 5))) for _ in "12"
            ]
            lines.append(
                f"{index}\t{texts[0]}\t{texts[1]}\t{('not_entailment', 'entailment')[index % 2]}"
            )
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(out: str, *more: str) -> None:
    words = "train --task rte --method SPAFIT-0-1-II --r 2 --alpha 3 --model tiny --data glue "
    words += f"--out {out} --batch-size 6 --learning-rate 0.01 --max-length 16 --quiet"
    assert main([*words.split(), *more]) == 0


def losses(out: str) -> list[float]:
    rows = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


torch.set_num_threads(1)
make_tiny(
    "tiny",
    num_hidden_layers=3,
    hidden_size=6,
    intermediate_size=7,
    num_attention_heads=3,
    max_position_embeddings=19,
)
write_rte(Path("glue", "RTE"))
train("run", "--epochs", "1")
shutil.copytree("run", "longer")
train("longer", "--epochs", "2")
train("run_without_dropout", "--epochs", "1", "--no-frozen-dropout")
shutil.copytree("run_without_dropout", "longer_without_dropout")
train("longer_without_dropout", "--epochs", "2", "--no-frozen-dropout")
tokenizer = spafit.load_tokenizer("tiny")
batch = tokenizer.encode(["the cat sees", "old dog"], max_length=16).batch([0, 1])
expected = {
    "losses": losses("longer"),
    "losses without dropout in group 1": losses("longer_without_dropout"),
    "result": json.loads(Path("run", "run.json").read_text())["result"]["metrics"],
    "logits": {},
}
for kind, method in METHODS.items():
    model = spafit.load_pretrained("tiny", num_labels=2)
    spafit.adapt(model, spafit.plan(method, 3, r=2, alpha=3.0, bias=kind))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in model.adaptation.trainable:
            parameter = model.get_parameter(name)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    spafit.save_adapter(model, f"{kind}.safetensors")
    expected["logits"][kind] = model.eval()(*batch).tolist()
model = spafit.load_pretrained("tiny", num_labels=2)
spafit.load_adapter(model, "run/adapter.safetensors")
expected["logits"]["run"] = model.eval()(*batch).tolist()
shutil.rmtree("longer")
shutil.rmtree("longer_without_dropout")
Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
sys.exit(0)
