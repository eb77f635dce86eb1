"""No Python of this repository loads a pickle, runs a text as code or asks a shell.

The check reads the syntax trees and follows names through imports and plain assignments, so that
another name for a thing does not hide it. What it cannot see is a name that is put together when
the program runs.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDERS = ("spafit", "weights_tools", "benchmarks", "tests")

# Importing any of these is a finding, and so is every use of what is in them.
MODULES = {
    "pickle": "runs what the file says", "_pickle": "runs what the file says",
    "cPickle": "runs what the file says", "cloudpickle": "runs what the file says",
    "dill": "runs what the file says", "joblib": "a pickle inside",
    "shelve": "a pickle inside", "marshal": "code inside",
    "torch.hub": "runs code from the net", "runpy": "runs a file as code",
}  # fmt: skip
NAMES = {
    "torch.load": "a pickle inside", "torch.serialization.load": "a pickle inside",
    "torch.jit.load": "code inside", "torch.package.PackageImporter": "a pickle inside",
    "pandas.read_pickle": "a pickle inside", "numpy.core.multiarray.load": "a pickle inside",
    "builtins.eval": "runs a text as code", "builtins.exec": "runs a text as code",
    "builtins.compile": "makes code of a text", "builtins.__import__": "hides an import",
    "os.system": "asks a shell", "os.popen": "asks a shell",
    "subprocess.getoutput": "asks a shell", "subprocess.getstatusoutput": "asks a shell",
    "asyncio.create_subprocess_shell": "asks a shell",
    "tempfile.mktemp": "another may take the name first",
    "yaml.load": "makes any object", "yaml.load_all": "makes any object",
    "yaml.unsafe_load": "makes any object", "yaml.full_load": "makes any object",
}  # fmt: skip
# Keywords, and keys of dictionaries, that may only be what stands here.
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}

# The package itself starts no process and asks the net only where it says so.
IN_THE_PACKAGE = {
    **dict.fromkeys(
        "subprocess multiprocessing pty concurrent.futures.process "
        "concurrent.futures.ProcessPoolExecutor".split(),
        "starts a process",
    ),
    **dict.fromkeys(
        "socket ssl http urllib.request urllib.error requests httpx aiohttp ftplib smtplib "
        "telnetlib xmlrpc websocket urllib3 huggingface_hub socketserver".split(),
        "asks the net",
    ),
}

# File -> finding, or everything below it -> why it may stand.
EXEMPT: dict[str, dict[str, str]] = {
    "spafit/weights/hub.py": {"huggingface_hub.*": "the downloads of models"},
    "spafit/weights/hub_files.py": {"huggingface_hub.*": "the downloads of models"},
    "spafit/files/http_file.py": {
        "http.client.*": "the downloads of data",
        "urllib.request.*": "the same",
        "urllib.error.*": "the same",
    },
    "spafit/files/durable.py": {
        "socket": "for the next",
        "socket.gethostname": "this machine's own name",
    },
    "tests/test_readme.py": {
        "builtins.exec": "runs the README's snippets",
        "builtins.compile": "the same",
    },
    "tests/test_model_memory.py": {
        "pickle": "for the next",
        "pickle.dumps": "a model of the test's own",
        "pickle.loads": "the same",
    },
}
# The one place that reads a pickle, and only so.
CONVERTER, READS = "weights_tools/convert.py", "torch.load"


class Findings(ast.NodeVisitor):
    """Everything in one file that should not be there.

    Parameters
    ----------
    tree : ast.Module
        The file.
    modules : set of str
        The modules that are not to be used in it.
    """

    def __init__(self, tree: ast.Module, modules: set[str]) -> None:
        self.modules = modules
        self.found: list[tuple[int, str]] = []
        self.names = dict(_imported(tree))
        # ``t = torch`` and ``load = t.load`` name the same thing; a few rounds follow them.
        assigned = [
            (target.id, node.value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name) and node.value is not None
        ]
        for _ in range(4):
            for name, value in assigned:
                meant = self.meaning(value)
                if meant is not None:
                    self.names.setdefault(name, meant)
        self.visit(tree)

    def meaning(self, node: ast.AST) -> str | None:
        """Give the dotted name that an expression stands for."""
        if isinstance(node, ast.Name):
            is_builtin = f"builtins.{node.id}" in NAMES
            return self.names.get(node.id, f"builtins.{node.id}" if is_builtin else None)
        if isinstance(node, ast.Attribute):
            base = self.meaning(node.value)
            if base is not None and node.attr == "__dict__":
                return base
            return None if base is None else f"{base}.{node.attr}"
        if isinstance(node, ast.Subscript):  # torch.__dict__["load"], sys.modules["pickle"]
            base, key = self.meaning(node.value), _text(node.slice)
            if key is None:
                return None
            if base == "sys.modules":
                return key
            return (
                f"builtins.{key}"
                if base == "builtins" or _is_builtins(node.value)
                else (None if base is None else f"{base}.{key}")
            )
        if isinstance(node, ast.Call):
            called = self.meaning(node.func) or (
                node.func.id if isinstance(node.func, ast.Name) else None
            )
            texts = [_text(each) for each in node.args]
            if called == "getattr" and len(texts) > 1 and texts[1] is not None:
                base = self.meaning(node.args[0])
                return None if base is None else f"{base}.{texts[1]}"
            if called == "vars" and len(texts) == 1:
                return self.meaning(node.args[0])
            if called == "importlib.import_module" and texts and texts[0] is not None:
                return texts[0]
        return None

    def note(self, node: ast.AST, name: str) -> None:
        self.found.append((getattr(node, "lineno", 0), name))

    def check(self, node: ast.AST, name: str | None) -> None:
        if name is None:
            return
        for old, new in (("numpy.lib.npyio.", "numpy."), ("__builtin__.", "builtins.")):
            name = name.replace(old, new)
        if name in NAMES or any(name == m or name.startswith(f"{m}.") for m in self.modules):
            self.note(node, name)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.check(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name == "*":
                self.note(node, f"{node.module}.*")
            elif not node.level:
                self.check(node, f"{node.module}.{alias.name}")

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.check(node, self.meaning(node))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.check(node, self.meaning(node))
        if self.meaning(node) is None:
            self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.check(node, self.meaning(node))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.check(node, self.meaning(node))
        for keyword in node.keywords:
            self.check_keyword(keyword.value, keyword.arg)
        is_safe = any(
            keyword.arg == "weights_only" and _is(keyword.value, True) for keyword in node.keywords
        )
        if self.meaning(node.func) == READS and is_safe:
            self.note(node, f"{READS} with weights_only=True")
        else:
            self.visit(node.func)
        for part in (*node.args, *node.keywords):
            self.visit(part)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            self.check_keyword(value, None if key is None else _text(key))
        self.generic_visit(node)

    def check_keyword(self, value: ast.expr, name: str | None) -> None:
        if name in KEYWORDS and not _is(value, KEYWORDS[name]):
            self.note(value, f"{name}={ast.unparse(value)}")


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Give the names that imports bind, anywhere in a file, and what they stand for."""
    yield "builtins", "builtins"
    yield "__builtins__", "builtins"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.asname or whole, whole
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _is(node: ast.AST, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _is_builtins(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "__builtins__"


def findings(source: str, path: str) -> list[tuple[int, str]]:
    """Give line and name of everything in a file that should not be there."""
    modules = set(MODULES) | (set(IN_THE_PACKAGE) if path.startswith("spafit/") else set())
    found = Findings(ast.parse(source), modules).found
    if path == CONVERTER:
        found = [each for each in found if each[1] != f"{READS} with weights_only=True"]
    return sorted(set(found))


def is_exempt(path: str, name: str) -> bool:
    return any(
        name == entry or (entry.endswith(".*") and f"{name}.".startswith(entry[:-1]))
        for entry in EXEMPT.get(path, {})
    )


def sources(repository: Path) -> list[Path]:
    """Give every Python file of the repository."""
    return sorted(path for folder in FOLDERS for path in (repository / folder).rglob("*.py"))


class TestTheRepository:
    """Oracle: the tables above."""

    def test_nothing_dangerous_is_called(self, repository: Path) -> None:
        found = []
        for path in sources(repository):
            name = path.relative_to(repository).as_posix()
            for line, what in findings(path.read_text(encoding="utf-8"), name):
                if not is_exempt(name, what):
                    found.append(f"{name}:{line}: {what}")
        assert not found, "\n".join(found)

    def test_every_exemption_is_used(self, repository: Path) -> None:
        for name, entries in EXEMPT.items():
            found = findings((repository / name).read_text(encoding="utf-8"), name)
            for entry in entries:
                used = [w for _, w in found if f"{w}.".startswith(f"{entry.removesuffix('.*')}.")]
                assert used, (name, entry)

    def test_the_converter_is_the_one_that_reads_pickles(self, repository: Path) -> None:
        text = (repository / CONVERTER).read_text(encoding="utf-8")
        tree = ast.parse(text)
        names = [name for _, name in Findings(tree, set(MODULES)).found]
        assert names == [f"{READS} with weights_only=True"]

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


PLANTED = {
    "import torch\ntorch.load('x')": "torch.load",
    "import torch as t\nt.load('x', weights_only=True)": "torch.load with weights_only=True",
    "import torch as t\nt.load('x', weights_only=False)": "torch.load",
    "from torch import load\nload('x')": "torch.load",
    "from torch import load as read": "torch.load",
    "import torch\ngetattr(torch, 'load')('x')": "torch.load",
    "import torch\nread = torch.load\nread('x')": "torch.load",
    "import torch\nt = torch\nu = t\nu.load('x')": "torch.load",
    "import torch\ntorch.__dict__['load']('x')": "torch.load",
    "import torch\nvars(torch)['load']('x')": "torch.load",
    "def f():\n    import torch\n    return lambda x: torch.load(x)": "torch.load",
    "import functools, torch\nread = functools.partial(torch.load, f='x')": "torch.load",
    "import torch.serialization\ntorch.serialization.load('x')": "torch.serialization.load",
    "import torch\nx = torch.jit.load('x')": "torch.jit.load",
    "from torch.jit import load": "torch.jit.load",
    "import torch\ntorch.hub.load('a/b', 'c')": "torch.hub.load",
    "from torch import hub": "torch.hub",
    "import pickle": "pickle",
    "import pickle as p": "pickle",
    "from pickle import loads as l": "pickle.loads",
    "def f():\n    import _pickle": "_pickle",
    "import importlib\nimportlib.import_module('pickle').loads(b'')": "pickle.loads",
    "from importlib import import_module as im\nim('marshal')": "marshal",
    "import sys\nsys.modules['pickle'].loads(b'')": "pickle.loads",
    "__import__('pickle')": "builtins.__import__",
    "import dill, json": "dill",
    "import joblib": "joblib",
    "import shelve": "shelve",
    "import marshal": "marshal",
    "eval('1')": "builtins.eval",
    "run = exec\nrun('1')": "builtins.exec",
    "map(eval, [])": "builtins.eval",
    "import builtins\nbuiltins.exec('1')": "builtins.exec",
    "import builtins as b\nb.eval('1')": "builtins.eval",
    "__builtins__['eval']('1')": "builtins.eval",
    "compile('1', 'x', 'eval')": "builtins.compile",
    "import os\nos.system('ls')": "os.system",
    "from os import popen as p": "os.popen",
    "import subprocess as s\ns.run('ls', shell=True)": "shell=True",
    "import subprocess\nsubprocess.run('ls', **{'shell': True})": "shell=True",
    "import subprocess\nsubprocess.run('ls', shell=bool(1))": "shell=bool(1)",
    "import subprocess\nsubprocess.getoutput('ls')": "subprocess.getoutput",
    "import yaml\nyaml.load('x', Loader=yaml.Loader)": "yaml.load",
    "import numpy as np\nnp.load('x', allow_pickle=True)": "allow_pickle=True",
    "options = dict(allow_pickle=1)": "allow_pickle=1",
    "import transformers\ntransformers.AutoModel.from_pretrained('x', trust_remote_code=True)": (
        "trust_remote_code=True"
    ),
    "import tempfile\ntempfile.mktemp()": "tempfile.mktemp",
    "from os import *": "os.*",
}
PLANTED_IN_THE_PACKAGE = {
    "import subprocess": "subprocess",
    "from subprocess import run": "subprocess.run",
    "import socket": "socket",
    "import urllib.request": "urllib.request",
    "import urllib\nurllib.request.urlopen('x')": "urllib.request.urlopen",
    "from urllib import request": "urllib.request",
    "from http.client import HTTPConnection": "http.client.HTTPConnection",
    "import requests": "requests",
    "from huggingface_hub import HfApi": "huggingface_hub.HfApi",
    "import multiprocessing as mp": "multiprocessing",
}
INNOCENT = [
    "model.eval()",
    "import re\nre.compile('x')",
    "import torch\ntorch.compile(model)",
    "import json\njson.load(open('x'))",
    "class A:\n    def load(self): ...\nA().load()",
    "import numpy as np\nnp.load('x', allow_pickle=False)",
    "import subprocess\nsubprocess.run(['ls'], shell=False)",
    "import yaml\nyaml.safe_load('x')",
    "text = 'import pickle; eval(1); os.system(1)'",
    "import os\nos.path.join('a', 'system')",
    "import tempfile\ntempfile.mkstemp()",
    "import ast\nast.literal_eval('1')",
    "from spafit.glue import load\nload('rte', 'dev', '.')",
    "from spafit import glue as torch_like\ntorch_like.load('rte', 'dev', '.')",
    "factory.mktemp('x')",
    "import urllib.parse\nurllib.parse.quote('x')",
    "settings = {'shell': False}",
]


class TestTheTester:
    """Oracle: sources that are planted, and the one thing wrong with each."""

    @pytest.mark.parametrize(("source", "name"), PLANTED.items())
    def test_what_is_planted_is_found(self, source: str, name: str) -> None:
        for path in ("spafit/tasks/glue.py", "tests/tasks/test_glue.py", "spafit/weights/hub.py"):
            assert name in [what for _, what in findings(source, path)]

    @pytest.mark.parametrize(("source", "name"), PLANTED_IN_THE_PACKAGE.items())
    def test_what_the_package_may_not_do(self, source: str, name: str) -> None:
        assert name in [what for _, what in findings(source, "spafit/tasks/glue.py")]
        assert findings(source, "benchmarks/load.py") == []

    @pytest.mark.parametrize("source", INNOCENT)
    def test_what_is_innocent_is_not(self, source: str) -> None:
        assert (
            findings(source, "spafit/tasks/glue.py" if "subprocess" not in source else "tests/x.py")
            == []
        )

    def test_the_converter_may_read_a_pickle_in_one_way(self) -> None:
        safe = "import torch\ntorch.load('x', map_location='cpu', weights_only=True)"
        assert findings(safe, CONVERTER) == []
        for unsafe in (
            safe.replace("True", "False"),
            safe.replace("True", "not 0"),
            "import pickle",
        ):
            assert findings(unsafe, CONVERTER)
        assert findings(safe, "weights_tools/tiny.py")

    def test_an_exemption_is_for_one_file_and_one_name(self) -> None:
        assert is_exempt("spafit/weights/hub.py", "huggingface_hub.HfApi")
        assert is_exempt("spafit/weights/hub.py", "huggingface_hub")
        assert not is_exempt("spafit/weights/hub.py", "huggingface_hubs.x")
        assert not is_exempt("spafit/weights/hub.py", "pickle")
        assert not is_exempt("spafit/tasks/glue.py", "huggingface_hub")
        assert not is_exempt("spafit/files/durable.py", "socket.socket")
