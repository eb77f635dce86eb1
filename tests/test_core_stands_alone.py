"""The core can be carried off: it imports torch and numpy alone, and trains without the rest.

Oracle: spafit itself in its reference form. The core's files are copied into an empty folder as a
package of another name; a process that can import nothing else of spafit, nor what spafit needs
besides torch and numpy, builds a BERT from them, adapts it by SPAFIT and takes five steps, in both
forms. Run with ``-s`` to see how many files and lines that is.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import REPOSITORY
from support.code_lines import code_lines

import spafit

PACKAGE = Path(spafit.__file__).parent
CORE = (
    "config",
    "bert",
    "layout",
    "adaptable",
    "techniques",
    "adapters",
    "plans",
    "methods",
    "adaptation",
    "strata",
    "trunk",
    "summary",
    "errors",
    "kernels",
)
ALLOWED = {"torch", "numpy", "triton", *sys.stdlib_module_names}
"""What a core file may import besides the core; Triton only where a kernel is about to run."""

FIVE_STEPS = """
import torch

from CORE.bert import BertForSequenceClassification, set_impl
from CORE.config import BertConfig
from CORE.methods import plan
from CORE.trunk.merging import merged_state_dict
from CORE.strata import adapt, fingerprint


def five_steps(impl):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=83, hidden_size=20, num_hidden_layers=5, num_attention_heads=4,
        intermediate_size=37, max_position_embeddings=29, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config, num_labels=3)
    summary = adapt(model, plan("SPAFIT-0-2-II", 5, r=3, alpha=7.0))
    set_impl(model, impl)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.randint(83, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 5 + [0] * 2])
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(ids, mask), torch.tensor([0, 2, 1]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = torch.cat([each.detach().flatten() for each in merged_state_dict(model).values()])
    return summary.trainable, losses, weights.double().norm().item(), fingerprint(model)
"""

ALONE = (
    """
import importlib.machinery, json, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):  # torch asks whether tqdm is there
        if name.partition(".")[0] in BLOCKED:
            return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is blocked here")

    def exec_module(self, module):
        pass

BLOCKED = set(sys.argv[1].split())
sys.meta_path.insert(0, Nothing())
"""
    + FIVE_STEPS.replace("CORE", "elsewhere")
    + """
print(json.dumps([five_steps("reference"), five_steps("auto")]))
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}, sys.modules
"""
)


def core_files() -> list[Path]:
    """Give the files of the core, those of kernels/ included."""
    paths = []
    for name in CORE:
        folder = PACKAGE / name
        paths += sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{name}.py"]
    return paths


def imported(path: Path) -> set[str]:
    """Give the modules that a file imports anywhere, by their first two names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: a relative import"
            module = node.module
            found |= (
                {f"spafit.{each.name}" for each in node.names} if module == "spafit" else {module}
            )
    return {".".join(name.split(".")[:2]) for name in found}


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_nothing_but_torch_and_numpy(path: Path) -> None:
    for name in imported(path):
        first, _, second = name.partition(".")
        assert second in CORE if first == "spafit" else first in ALLOWED, f"{path} imports {name}"


def test_no_linear_map_imports_the_choices() -> None:
    """They are for a GPU; ``import spafit.bert`` by itself does without them."""
    for name in ("adapters.py", "bert.py", "kernels/lora_linear.py", "kernels/packed_attention.py"):
        tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
        at_the_top = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not any("choices" in (node.module or "") for node in at_the_top), name


@pytest.mark.parametrize("without", ["nothing", "gpu"])
def test_trains_elsewhere(tmp_path: Path, without: str) -> None:
    """Also without kernels/gpu, which only a GPU needs."""
    package = tmp_path / "elsewhere"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in CORE:
        if (PACKAGE / name).is_dir():
            shutil.copytree(
                PACKAGE / name,
                package / name,
                ignore=shutil.ignore_patterns("__pycache__", without),
            )
        else:
            shutil.copy(PACKAGE / f"{name}.py", package)
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\bspafit(?=\.\w)", "elsewhere", text)
        path.write_text(re.sub(r"^from spafit import", "from elsewhere import", text, flags=re.M))
    blocked = "spafit safetensors tokenizers huggingface_hub tqdm transformers peft"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, blocked],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names: dict[str, object] = {}
    exec(compile(FIVE_STEPS.replace("CORE", "spafit"), "five steps", "exec"), names)
    trainable, losses, norm, fingerprint = names["five_steps"]("reference")  # type: ignore[operator]
    for found in json.loads(done.stdout):
        assert found[0] == trainable
        assert found[1] == pytest.approx(losses, abs=1e-5)
        assert found[2] == pytest.approx(norm, rel=1e-6)
        assert found[3] == fingerprint
    assert losses[-1] < losses[0]
    assert torch.get_rng_state().numel()

    files = core_files()
    print(f"\n{len(files)} files, {sum(map(code_lines, files)):,} lines of code", end="")
    print(f" ({sum(len(each.read_text().splitlines()) for each in files):,} in all)")


def test_the_page_says_how_much_it_is() -> None:
    """The page of the house names each file and room of the core with its lines of code."""
    house = (REPOSITORY / "docs/guide/house.md").read_text(encoding="utf-8")
    page = house.partition("## What to copy")[2]
    row = r"^\| \[([\w/.]+)\]\(../../spafit/([\w/.]+)\) \|.*\| ([\d,]+) \|$"
    rows = re.findall(row, page, re.M)
    said = {path: int(lines.replace(",", "")) for _, path, lines in rows}
    by_name = {}
    for path in core_files():
        parts = path.relative_to(PACKAGE).parts
        name = "kernels/gpu" if parts[:2] == ("kernels", "gpu") else parts[0]
        by_name[name] = by_name.get(name, 0) + code_lines(path)
    assert said.keys() == by_name.keys()
    for without in (set(), {"gpu"}):
        files = [each for each in core_files() if not without & set(each.parts)]
        [its] = re.findall(rf"\b{len(files)} files(?:,| and) ([\d,]+) lines", page)
        lines = sum(map(code_lines, files))
        assert abs(int(its.replace(",", "")) - lines) <= 50, f"said: {its}, they are {lines}"
    for name, lines in by_name.items():
        # To the nearest ten: a page that must change with every line would not be kept.
        assert abs(said[name] - lines) <= 15, f"said: {said[name]} of {name}, it has {lines}"
