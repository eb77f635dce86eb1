"""The server of examples/serve.py: its batches in this process, and the whole over loopback.

Oracle: ``spafit.predict`` with each adapter alone.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import REPOSITORY, environment
from support.examples import example
from support.small_runs import SmallRun

from spafit.methods import plan
from spafit.strata import adapt
from spafit.tasks.own import dataset
from spafit.tasks.table import TASKS
from spafit.tasks.task import Task
from spafit.training.inference import predict
from spafit.weights.adapter_files import load_adapter, save_adapter
from spafit.weights.pretrained import load_pretrained

pytest.importorskip("litserve", reason="litserve is not installed (pip install '.[test]')")

STARS = Task("stars", ("text",), (), ("pearson",), scale=(2.5, 1.5))
TASK = {"rte": TASKS["rte"], "cola": TASKS["cola"], "stars": STARS}
METHODS = {"rte": "SPAFIT-0-1-II", "cola": "full", "stars": "bitfit"}
SINGLES, PAIRS = ["a cat sees", "old dog", ""], [["a cat", "the dog sleeps"], ["dog", "child"]]


@pytest.fixture(scope="module")
def runs(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write a folder with an adapter for each task."""
    folder = tmp_path_factory.mktemp("runs")
    model = load_pretrained(small.folder)
    for name, task in TASK.items():
        adapt(model, plan(METHODS[name], 4), name=name, num_labels=task.num_labels)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        assert model.adaptation is not None
        model.adaptation.task, model.adaptation.labels = task.name, task.labels
        model.adaptation.definition = STARS.to_json_dict() if task is STARS else None
        (folder / name).mkdir()
        save_adapter(model, folder / name / "adapter.safetensors")
    return [folder / name for name in TASK]


@pytest.fixture(scope="module")
def alone(small: SmallRun, runs: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Answer all texts by each adapter alone."""
    found = {}
    for run in runs:
        task = TASK[run.name]
        model = load_pretrained(small.folder, num_labels=task.num_labels)
        load_adapter(model, run / "adapter.safetensors")
        texts = [tuple(each) for each in PAIRS] if task.pair else SINGLES
        one = predict(model, small.tokenizer, dataset(texts, task=task))
        rows = zip(one.labels, one.probabilities.tolist(), strict=True)
        found[run.name] = [
            {"label": label, "probabilities": dict(zip(task.labels, sure, strict=True))}
            if task.labels
            else {"score": label}
            for label, sure in rows
        ]
    return found


def check(answer: Any, alone: dict[str, list[dict[str, Any]]], tasks: list[str]) -> None:
    for row, each in enumerate(answer):
        assert list(each) == tasks
        for task in tasks:
            expected = alone[task][row]
            assert each[task].keys() == expected.keys()
            if "score" in expected:
                assert each[task]["score"] == pytest.approx(expected["score"], abs=1e-4)
            else:
                assert each[task]["label"] == expected["label"]
                pairs = each[task]["probabilities"], expected["probabilities"]
                assert pairs[0].keys() == pairs[1].keys()
                assert np.allclose(*(list(one.values()) for one in pairs), atol=1e-5)


def question(texts: list[Any], tasks: list[str]) -> dict[str, Any]:
    return {"texts": texts, "tasks": tasks}


GOOD = (question(SINGLES, ["stars", "cola"]), question(PAIRS, ["rte"]), question(SINGLES, ["cola"]))
BAD = {
    "unknown task": question(["a"], ["sst-2"]),
    "a pair for one text": question(PAIRS, ["cola"]),
    "one text for a pair": question(["a"], ["rte", "cola"]),
}
MALFORMED: dict[str, bytes | dict[str, Any] | list[int]] = {
    "no texts": question([], ["cola"]),
    "no text": {"tasks": ["cola"]},
    "no task": question(["a"], []),
    "no tasks": {"texts": ["a"]},
    "a number": question([3], ["cola"]),
    "nothing": question([None], ["cola"]),
    "a text alone": {"texts": "a", "tasks": ["cola"]},
    "three": question([["a", "b", "c"]], ["cola"]),
    "half a character": question(["\ud800"], ["cola"]),
    "half a name": question(["a"], ["\ud800"]),
    "a name of half a character": {**question(["a"], ["cola"]), "\ud800": 1},
    "more": {**question(["a"], ["cola"]), "model": "x"},
    "a long text": question(["a" * 20_001], ["cola"]),
    "many texts": question(["a"] * 65, ["cola"]),
    "very many": question([3] * 200_000, ["cola"]),
    "a list": [1],
    "NaN": b'{"texts": [NaN], "tasks": ["cola"]}',
    "infinity": b'{"texts": [1e999], "tasks": ["cola"]}',
    "broken": b'{"texts": ["a"], "tasks": ["cola"]',
    "no JSON": b"\xff\xfe",
    "empty": b"",
    "deep": b"[" * 100_000,
}


@pytest.fixture(scope="module")
def serve() -> Any:
    return example("serve")


@pytest.fixture
def api(serve: Any, small: SmallRun, runs: list[Path]) -> Any:
    api = serve.Tasks(small.folder, runs)
    api.setup("cpu")
    return api


class TestBatches:
    """In this process: requests as the server hands them over."""

    def test_what_one_has_wrong_is_no_fault_of_the_others(
        self, serve: Any, api: Any, alone: dict[str, list[dict[str, Any]]]
    ) -> None:
        asked = [GOOD[0], *BAD.values(), GOOD[1], GOOD[2]]
        answers = api.predict([serve.Question(**each) for each in asked])
        assert len(answers) == len(asked)
        for answer, each in zip(answers, asked, strict=True):
            if each in GOOD:
                check(answer, alone, each["tasks"])
            else:
                assert answer.status_code == 400
        said = json.loads(answers[1].body)["detail"]
        assert said == "the model has no adapter 'sst-2'; it has 'rte', 'cola', 'stars'"

    def test_a_batch_is_one_call(
        self, serve: Any, api: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []
        answer = api.answer

        def counting(questions: list[Any]) -> Any:
            calls.append(len(questions))
            return answer(questions)

        monkeypatch.setattr(api, "answer", counting)
        api.predict([serve.Question(**each) for each in GOOD])
        assert calls == [3]

    @pytest.mark.parametrize(
        "name", [name for name, body in MALFORMED.items() if isinstance(body, dict)]
    )
    def test_what_the_door_refuses(self, serve: Any, name: str) -> None:
        with pytest.raises(ValueError, match="validation error"):
            serve.Question(**MALFORMED[name])


class Served:
    """A server in a process of its own."""

    def __init__(self, model: Path, runs: list[Path], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, str(REPOSITORY / "examples/serve.py"), model, self.port, *runs]
        self.log = log.open("wb")
        self.process = subprocess.Popen(
            list(map(str, command)),
            env={**environment(), "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def ask(
        self, body: Any, path: str = "/predict", timeout: float = 30.0
    ) -> tuple[int, Any, float]:
        """Return the status, the answer, and the seconds that it took."""
        began = time.monotonic()
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            how = {"Content-Type": "application/json"}
            connection.request("GET" if data is None else "POST", path, data, how)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        with_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(text) if with_json else text, time.monotonic() - began

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.ask(None, "/health", timeout=2.0)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"it did not start: {Path(self.log.name).read_text()[-2000:]}")

    def processes(self) -> list[int]:
        found = []
        for each in Path("/proc").glob("[0-9]*"):
            try:
                fields = (each / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == self.process.pid and fields[0] != "Z":
                found.append(int(each.name))
        return found


@pytest.fixture(scope="module")
def served(
    small: SmallRun, runs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Start the server; stop it by a signal, after which none of its processes is left."""
    served = Served(small.folder, runs, tmp_path_factory.mktemp("log") / "log")
    try:
        served.wait(120)
        yield served
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(60)
        end = time.monotonic() + 10  # those that watch it end a moment later
        while (left := served.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        assert left == []
        assert "Traceback" not in Path(served.log.name).read_text()
    finally:
        if served.processes():
            os.killpg(served.process.pid, signal.SIGKILL)
        served.log.close()


@pytest.mark.server
class TestServer:
    """Over loopback, with a real client."""

    def test_callers_at_once(self, served: Served, alone: dict[str, list[dict[str, Any]]]) -> None:
        """Sixteen callers, a third of whom ask what is refused."""
        asked = [*GOOD, *BAD.values()]
        found: list[tuple[Any, int, Any, float]] = []

        def caller(number: int) -> None:
            for turn in range(4):
                each = asked[(number + turn) % len(asked)]
                found.append((each, *served.ask(each)))

        threads = [threading.Thread(target=caller, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(found) == 64
        for each, status, answer, seconds in found:
            assert seconds < 30
            if each in GOOD:
                assert status == 200
                check(answer, alone, each["tasks"])
            else:
                assert (status, list(answer)) == (400, ["detail"])

    @pytest.mark.parametrize("name", MALFORMED)
    def test_malformed_requests_stop_nothing(
        self, served: Served, alone: dict[str, list[dict[str, Any]]], name: str
    ) -> None:
        status, answer, _ = served.ask(MALFORMED[name])
        assert 400 <= status < 500
        assert len(answer["detail"]) <= 600
        status, answer, _ = served.ask(GOOD[0])
        assert status == 200
        check(answer, alone, GOOD[0]["tasks"])

    def test_a_huge_body(self, served: Served) -> None:
        assert served.ask(question(["a" * 2**21], ["cola"]))[0] == 413
        assert served.ask(GOOD[0])[0] == 200

    def test_a_caller_who_hangs_up(self, served: Served) -> None:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", served.port), timeout=5) as half:
                half.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert served.ask(GOOD[0])[0] == 200
