"""The shape of the house: imports go one way and stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spafit

PACKAGE = Path(spafit.__file__).parent

# Every module may import only what stands above it; the modules of one line do not know each other
# unless they stand in that order.
ORDER = """
    files machine text tasks weights runs training training.prefix demo kernels.gpu version
    errors files.strict_json files.durable files.replacing files.transfers config kernels.forms
    kernels.stacking kernels.products kernels.dropout kernels.gpu.cuda_graphs
    kernels.gpu.choices kernels.gpu.triton_common kernels.attention kernels.gpu.triton_attention
    kernels.gpu.varlen_attention kernels.packed_attention kernels.gpu.triton_add_norm
    kernels.add_norm kernels.gpu.triton_gelu kernels.bias_gelu kernels.parts
    kernels.gpu.triton_low_rank kernels.gpu.triton_linear kernels.lora_linear kernels.compiled
    kernels layout batch_checks adapters plans methods bert summary strata weights.safefile
    weights.safe_folder weights.pins weights.hub_files weights.hub machine.precision
    machine.memory weights.pretrained weights.adapter_files tasks.table tasks.glue tasks.metrics
    tasks.submission files.http_file tasks.download text.vocabulary text.tokenization
    machine.versions training.prefix.file training.prefix.cache training.prefix.kept
    training.inference runs.progress machine.random_states runs.stopping runs.checkpoint
    runs.identity runs.record runs.log runs.folder training.optimisation training.step
    training.captured_step training.batches training.settings training.make_step training.state
    training.plain training.saving training.journal training.result
    training.loop training.fit demo.minilm cli.commands
    demo.acceptability_lexicon demo.acceptability_templates demo.acceptability demo.figure
    demo.run cli.doctor cli.option_types cli.parser cli __main__
""".split()


def imports_of(path: Path) -> set[str]:
    """Give the spafit modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("spafit"):
            base = node.module.removeprefix("spafit").removeprefix(".")
            found |= {f"{base}.{alias.name}".strip(".") for alias in node.names} | {base}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("spafit.")
                for alias in node.names
                if alias.name.startswith("spafit.")
            }
    return {name for name in found if name in ORDER}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path):
    name = module_name(path)
    assert name in ORDER, f"{name} has no place in the order of the house yet"
    later = ORDER[ORDER.index(name) + 1 :]
    assert not imports_of(path) & set(later)


def test_the_order_names_only_what_exists():
    assert sorted(ORDER) == sorted(module_name(path) for path in MODULES)


def test_tools_and_benchmarks_are_not_imported_by_the_package():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert "import weights_tools" not in text and "from weights_tools" not in text, path
        assert "from benchmarks" not in text, path


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    """No oracle and nothing optional is loaded by ``import spafit``."""
    loaded = run_python("import sys, spafit; print(' '.join(sys.modules))").split()
    for package in ("transformers", "peft", "matplotlib", "triton", "pyarrow", "sklearn", "scipy"):
        assert package not in loaded


def test_import_costs_at_most_300_ms_beyond_torch():
    """The best of five, each in a fresh process, because a busy machine only ever adds."""
    code = (
        "import time, torch; start = time.perf_counter(); import spafit; "
        "print(time.perf_counter() - start)"
    )
    times = [float(run_python(code)) for _ in range(5)]
    assert min(times) <= 0.3, times


def test_the_version_is_one():
    assert run_python("import importlib.metadata as m; print(m.version('spafit'))").strip() == (
        spafit.__version__
    )


def test_every_public_name_exists_and_is_documented():
    for name in spafit.__all__:
        thing = getattr(spafit, name)
        assert name in ("__version__", "METHODS", "glue") or thing.__doc__, name
