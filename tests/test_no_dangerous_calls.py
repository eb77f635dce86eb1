"""No Python of this repository loads a pickle, runs a text as code or asks a shell.

Ruff's rules S and TID251 (ruff.toml) see to it; here stands what they do not see, and that they see
what they should.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDERS = ("spafit", "weights_tools", "benchmarks", "examples", "docs", "tests")

# Keywords, and keys of dictionaries, that may only be what stands here.
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}
# Not even handed on: S102 and S307 see only calls.
BUILTINS = {"eval", "exec", "compile", "__import__", "__builtins__"}
# The package starts no process and asks the net only where EXEMPT says so.
OUTSIDE = set(
    "subprocess multiprocessing pty concurrent.futures.process "
    "concurrent.futures.ProcessPoolExecutor socket ssl http requests httpx aiohttp ftplib smtplib "
    "telnetlib xmlrpc websocket urllib3 urllib.request urllib.error huggingface_hub "
    "socketserver".split()
)

EXEMPT = {
    "spafit/weights/hub.py": {"huggingface_hub"},
    "spafit/weights/hub_files.py": {"huggingface_hub"},
    "spafit/files/http_file.py": {"http", "urllib.request", "urllib.error"},
    "spafit/files/durable.py": {"socket"},  # for the name of this machine
    "spafit/experiments/grid/ray_tasks.py": {"socket"},  # whether a cluster can be reached
    "spafit/experiments/grid/workers.py": {"subprocess"},  # the workers of a grid
    "tests/test_readme.py": {"exec", "compile"},  # runs the README's snippets
    "tests/test_core_stands_alone.py": {"exec", "compile"},  # runs the core's five steps
}


def findings(source: str, path: str) -> Iterator[str]:
    """Give everything in one file that should not be there."""
    for node in ast.walk(ast.parse(source)):
        pairs: list[tuple[object, ast.expr]] = []
        if isinstance(node, ast.Call):
            pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            pairs = list(zip(keys, node.values, strict=True))
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom) and path.startswith("spafit/"):
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = {f"{base}{alias.name}." for alias in node.names}
            yield from (each for each in OUTSIDE for name in names if name.startswith(f"{each}."))
        for key, value in pairs:
            if key in KEYWORDS and ast.unparse(value) != str(KEYWORDS[str(key)]):
                yield f"{key}={ast.unparse(value)}"


class TestTheRepository:
    """Oracle: the tables above."""

    def test_nothing_dangerous_is_called(self, repository: Path) -> None:
        """And every exemption is used."""
        found = {}
        for path in (path for folder in FOLDERS for path in (repository / folder).rglob("*.py")):
            name, source = path.relative_to(repository).as_posix(), path.read_text("utf-8")
            found[name] = set(findings(source, name))
            for noqa in re.findall(r"# no[q]a\b(.*)", source):
                # Neither all rules nor those that matter here; a reason may follow.
                assert re.match(r": (?!S\d|TID)[A-Z]+\d+(?!.*,)", noqa), name
        assert {name: what for name, what in found.items() if what} == EXEMPT

    def test_the_converter_loads_weights_only(self, repository: Path) -> None:
        """Oracle: the one place that names torch.load; its keywords are checked above."""
        source = (repository / "weights_tools/convert.py").read_text("utf-8")
        used = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
        assert [ast.unparse(node) for node in used if node.attr == "load"] == ["torch.load"]
        assert re.search(r"torch\.load\([^()]*weights_only=True", source)

    def test_no_python_lies_elsewhere(self, repository: Path) -> None:
        """Oracle: git."""
        command = ["git", "ls-files", "*.py", "*.pyi", "*.pyx"]
        try:
            said = subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=repository
            ).stdout
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this is no checkout, or git is not here")
        elsewhere = [name for name in said.split() if name.split("/")[0] not in FOLDERS]
        assert elsewhere == []


SEEN_BY_RUFF = (
    "import torch\ntorch.load('x')",
    "import torch as t\nt.load('x', weights_only=True)",
    "from torch import load\nload('x')",
    "import torch\ngetattr(torch, 'load')('x')",
    "import torch\nread = torch.load\nread('x')",
    "import functools, torch\nread = functools.partial(torch.load, f='x')",
    "import torch.serialization\ntorch.serialization.load('x')",
    "import torch\nx = torch.jit.load('x')",
    "import torch\nx = torch.export.load('x')",
    "from torch import hub",
    "import pickle",
    "from pickle import loads as l",
    "def f():\n    import _pickle",
    "import dill, json",
    "import joblib",
    "import marshal",
    "eval('1')",
    "exec('1')",
    "import builtins\nbuiltins.exec('1')",
    "import os\nos.system('ls')",
    "from os import popen as p",
    "import subprocess as s\ns.run('ls', shell=True)",
    "import subprocess\nsubprocess.getoutput('ls')",
    "import yaml\nyaml.load('x', Loader=yaml.Loader)",
    "import tempfile\ntempfile.mktemp()",
    "from os import *",
)
SEEN_HERE = {
    "import subprocess\nsubprocess.run('ls', **{'shell': True})": "shell=True",
    "import subprocess\nsubprocess.run('ls', shell=bool(1))": "shell=bool(1)",
    "import numpy as np\nnp.load('x', allow_pickle=True)": "allow_pickle=True",
    "options = dict(allow_pickle=1)": "allow_pickle=1",
    "AutoModel.from_pretrained('x', trust_remote_code=True)": "trust_remote_code=True",
    "import torch as t\nt.load('x', weights_only=False)": "weights_only=False",
    "run = exec\nrun('1')": "exec",
    "map(eval, [])": "eval",
    "__builtins__['eval']('1')": "__builtins__",
    "compile('1', 'x', 'eval')": "compile",
    "__import__('x')": "__import__",
    "from subprocess import run": "subprocess",
    "import urllib.request": "urllib.request",
    "from urllib import request": "urllib.request",
    "from http.client import HTTPConnection": "http",
    "from huggingface_hub import HfApi": "huggingface_hub",
    "import multiprocessing as mp": "multiprocessing",
}
INNOCENT = (
    "model.eval()",
    "import re\nre.compile('x')",
    "import torch\ntorch.compile(model)",
    "import json\njson.load(file)",
    "import numpy as np\nnp.load('x', allow_pickle=False)",
    "import yaml\nyaml.safe_load('x')",
    "text = 'import pickle; eval(1); os.system(1)'",
    "import tempfile\ntempfile.mkstemp()",
    "import ast\nast.literal_eval('1')",
    "from spafit.glue import load\nload('rte', 'dev', '.')",
    "import urllib.parse\nurllib.parse.quote('x')",
    "settings = {'shell': False}",
)


class TestTheTester:
    """Oracle: sources that are planted."""

    def test_what_ruff_sees(self, repository: Path, tmp_path: Path) -> None:
        pytest.importorskip("ruff")
        for number, source in enumerate((*SEEN_BY_RUFF, *INNOCENT)):
            (tmp_path / f"{number}.py").write_text(f"{source}\n")
        command = [sys.executable, "-m", "ruff", "check", "--output-format", "json", "--no-cache",
                   "--config", str(repository / "ruff.toml"), "--select", "S,TID251,B009,F403",
                   str(tmp_path)]  # fmt: skip
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        found = {int(Path(each["filename"]).stem) for each in json.loads(said)}
        assert found == set(range(len(SEEN_BY_RUFF)))

    @pytest.mark.parametrize(("source", "name"), SEEN_HERE.items())
    def test_what_is_seen_here(self, source: str, name: str) -> None:
        assert name in findings(source, "spafit/tasks/glue.py")

    @pytest.mark.parametrize("source", INNOCENT)
    def test_what_is_innocent_is_not(self, source: str) -> None:
        assert not list(findings(source, "spafit/tasks/glue.py"))
