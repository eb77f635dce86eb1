"""The shape of the house: which rooms there are, and that imports go one way between them."""

import ast
import compileall
import configparser
import subprocess
import sys
from pathlib import Path

import pytest
from support import TESTS
from support.house import MODULES, OUTSIDE, PACKAGE, ROOMS, imports_of, module_name, room_of

import spafit


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    name = module_name(path)
    if name in OUTSIDE:
        return
    above = ROOMS[ROOMS.index(room_of(name)) + 1 :]
    wrong = sorted(each for each in imports_of(path) if room_of(each) in above)
    assert not wrong, f"{name} stands in {room_of(name)}, below {', '.join(wrong)}"


def test_no_two_modules_need_each_other() -> None:
    """Within a room, too: taking away what imports nothing that is left takes all away."""
    left = {
        module_name(path): {each for each in runtime_imports_of(path) if each != module_name(path)}
        for path in MODULES
    }
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"these import each other in a circle: {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def runtime_imports_of(path: Path) -> set[str]:
    """Return what a file imports when it is itself imported: not in functions, not for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "spafit":
            base = (node.module or "").removeprefix("spafit").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                is_module = (PACKAGE / inner.replace(".", "/")).with_suffix(".py").exists()
                found.add(inner if is_module or not base else base)
    return found


def test_rooms_are_small() -> None:
    """At the top no more than 16 files, in a room about a dozen."""
    for folder in {path.parent for path in MODULES}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        most = 16 if folder == PACKAGE else 14
        assert len(files) <= most, f"{folder.name} has {len(files)} files: {sorted(files)}"


def test_every_folder_is_a_room() -> None:
    folders = {path.parent.relative_to(PACKAGE).parts[:1] for path in MODULES}
    assert {each[0] for each in folders if each} == {*ROOMS, "kernels", "trunk"} - {"core"}


def test_tests_mirror_the_package() -> None:
    """Each folder of tests is one of the package, of the repository, or holds helpers."""
    others = {"support", "golden", "weights_tools", "benchmarks", "docs"}
    for folder in sorted(TESTS.rglob("*/")):
        parts = folder.relative_to(TESTS).parts
        if parts and parts[0] not in others and "__pycache__" not in parts:
            assert (PACKAGE / folder.relative_to(TESTS)).is_dir(), folder


def test_tools_and_benchmarks_are_not_imported_by_the_package() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert "import weights_tools" not in text and "from weights_tools" not in text, path
        assert "from benchmarks" not in text, path


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_import_is_light_and_costs_a_quarter_of_torch_s_at_most() -> None:
    """No oracle and nothing optional is loaded with spafit's public names.

    The time is the processor's, of compiled modules, and held against what importing torch took in
    the same process: a slow or busy machine slows both. At best of five processes; usual is 11 %.
    """
    compileall.compile_dir(PACKAGE, quiet=1)
    code = (
        "import sys, time; start = time.process_time(); import torch; middle = time.process_time();"
        "from spafit import fit; end = time.process_time();"
        "print((end - middle) / (middle - start), *sys.modules)"
    )
    shares: list[float] = []
    while len(shares) < 5 and min(shares, default=1.0) > 0.25:
        share, *loaded = run_python(code).split()
        shares.append(float(share))
        for package in "transformers peft matplotlib triton pyarrow sklearn scipy".split():
            assert package not in loaded
        assert not {"accelerate", "pytorch_lightning"} & set(loaded)
    assert min(shares) <= 0.25, shares


def test_the_version_is_one() -> None:
    assert run_python("import importlib.metadata as m; print(m.version('spafit'))").strip() == (
        spafit.__version__
    )


def test_every_public_name_exists_and_is_documented() -> None:
    for name in spafit.__all__:
        thing = getattr(spafit, name)
        assert name in ("__version__", "METHODS", "glue") or thing.__doc__, name


def test_what_is_no_python_is_in_the_wheel() -> None:
    """Oracle: the patterns of package data in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(TESTS.parent / "setup.cfg", encoding="utf-8")
    patterns = config["options.package_data"]["spafit"].split()
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and "pyc" not in path.suffix}
    assert {path for path in others if path.suffix != ".py"} == packed
