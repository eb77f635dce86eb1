"""Answer texts by several tasks on one base: python examples/serve.py MODEL PORT RUN [RUN ...].

A RUN is a folder of spafit train, and its name that of a task. A text, or a pair in a list:

    curl localhost:PORT/predict --json '{"texts": ["it crashes"], "tasks": ["kind", "tone"]}'

The server is LitServe, because it does what a server of a model has to and little else: FastAPI at
the door, the model in a process of its own, and requests that wait together handed over as one
batch. It brings eleven small packages; Ray Serve, which spreads models over a cluster, about forty.
Whoever reaches the port may ask: encryption, names and limits are for a proxy in front of it. What
other engines take instead is in docs/guide/engines.md.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import litserve
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

import spafit

Text = Annotated[str, Field(strict=True, max_length=20_000)]


class Question(BaseModel, extra="forbid"):
    texts: list[Text | tuple[Text, Text]] = Field(min_length=1, max_length=64)
    tasks: list[Text] = Field(min_length=1, max_length=64)


class Tasks(litserve.LitAPI):
    def __init__(self, model, runs):
        super().__init__(max_batch_size=32, batch_timeout=0.002)  # requests; seconds
        self.base, self.runs = model, runs

    def setup(self, device):
        self.model = spafit.load_pretrained(self.base).to(device)
        self.tokenizer = spafit.load_tokenizer(self.base)
        for run in map(Path, self.runs):
            spafit.load_adapter(self.model, run / "adapter.safetensors", name=run.name)

    def decode_request(self, request: Question):
        return request

    def predict(self, questions):
        try:
            return self.answer(questions)
        except (spafit.ConfigError, spafit.DataError, spafit.PlanError) as error:
            if len(questions) == 1:
                return [JSONResponse({"detail": str(error)}, 400)]
            half = len(questions) // 2  # the others are answered all the same
            return self.predict(questions[:half]) + self.predict(questions[half:])

    def answer(self, questions):
        texts = [text for question in questions for text in question.texts]
        tasks = [question.tasks for question in questions for _ in question.texts]
        found = spafit.predict_all(self.model, self.tokenizer, texts, tasks)
        rows = {name: self.rows(predictions) for name, predictions in found.items()}
        answers = iter([{name: next(rows[name]) for name in dict.fromkeys(each)} for each in tasks])
        return [[next(answers) for _ in question.texts] for question in questions]

    def rows(self, predictions):
        names, sure = predictions.names, predictions.probabilities.tolist()
        for label, row in zip(predictions.labels, sure, strict=True):
            named = {"label": label, "probabilities": dict(zip(names, row, strict=False))}
            yield named if names else {"score": label}


def refuse(_, error):  # FastAPI's own answer repeats the input, which need not be valid JSON
    said = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:3]]
    return JSONResponse({"detail": ascii("; ".join(said))[1:-1][:600]}, 422)


def run(api, port):
    own = os.getpid()

    def stop(*_):  # LitServe ends all its processes on an interrupt alone
        if os.getpid() == own:
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    server = litserve.LitServer(api, max_payload_size=2**20)  # bytes
    server.app.add_exception_handler(RequestValidationError, refuse)
    server.run("127.0.0.1", port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    model, port, *runs = sys.argv[1:]
    run(Tasks(model, runs), int(port))
