"""Read mutated files with every reader, and compare the results with the files' bytes.

:mod:`hostile_files` makes the files; :mod:`declared_files` reads what they declare.
"""

from __future__ import annotations

import contextlib
import copy
import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch

from spafit.adapters import BiasDelta, DirectBias, Full, LoRA, LoRALinear
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import ConfigError, PlanError, WeightsError
from spafit.plans import Plan, Stratum
from spafit.strata import adapt, fingerprint
from spafit.weights.adapter_files import load_adapter, read_adapter_header, save_adapter
from spafit.weights.pretrained import load_pretrained, load_report
from spafit.weights.safe_folder import SafeFolder
from spafit.weights.safefile import SafeFile, tensor_file
from support import declared_files
from support.declared_files import HEAD, Declared, FaultError, Tensor, declared, declared_folder
from support.hostile_files import INDEX, Case, make_case

SEED = "spafit 1"
SECONDS = 5.0
MESSAGE = 1000  # characters, beside the path

CONFIG = BertConfig(
    vocab_size=declared_files.V,
    hidden_size=declared_files.D,
    num_hidden_layers=declared_files.L,
    num_attention_heads=declared_files.A,
    intermediate_size=declared_files.F,
    max_position_embeddings=declared_files.P,
    type_vocab_size=declared_files.T,
)
PLAN = Plan(
    "three kinds",
    declared_files.L,
    [
        Stratum("biases", 0, 0, {"key": [BiasDelta()], "layer.output.LayerNorm": [DirectBias()]}),
        Stratum(
            "more",
            1,
            1,
            {
                "query": [LoRA(declared_files.RANK, 12.0, 0.25), BiasDelta()],
                "layer.output.dense": [LoRA(1, 3.0)],
                "value": [Full()],
            },
        ),
    ],
    pooler="full",
)


class SlowError(BaseException):
    """A file took too long; no ``except Exception`` holds it up."""


class WrongError(AssertionError):
    """A file was read wrongly, or refused in a wrong way."""


def require(condition: object, what: str) -> None:
    """Raise a WrongError that says what does not hold."""
    if not condition:
        raise WrongError(what)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """End the block with a SlowError if it takes longer."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise SlowError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def content_of(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes."""
    found = tensor.detach().contiguous().reshape(-1)
    return found.view(torch.uint8).numpy().tobytes() if found.numel() else b""


def same(found: torch.Tensor, expected: Tensor, name: str) -> None:
    """Compare a tensor with what the file declares, bit for bit."""
    require(found.dtype == expected.dtype, f"{name!r} was read as {found.dtype}")
    require(tuple(found.shape) == expected.shape, f"{name!r} was read as {tuple(found.shape)}")
    require(content_of(found) == expected.content, f"{name!r} has other bytes than the file")


def refused(error: Exception, paths: list[Path], listing: bool = False) -> None:
    """Hold a refusal's message against the house's rules; a listing takes a line for each fault."""
    text = str(error)
    require(any(str(path) in text for path in paths), f"the file is not named: {text!r:.300}")
    shorter = text.replace(str(paths[0].parent), "")
    lines = shorter.split("\n") if listing else [shorter]
    require(all(line.isprintable() for line in lines), f"not one printable line: {text!r:.300}")
    for line in lines:
        require(len(line) <= MESSAGE, f"{len(line)} characters: {text!r:.300}")
    require(len(lines) <= 14, f"{len(lines)} lines")


def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Write a sound file; the safetensors library puts metadata into another order each time."""
    return b"".join(map(bytes, tensor_file(tensors, metadata or {})))


class Machine:
    """Makes the mutated files, has them read by every reader, and compares.

    Parameters
    ----------
    folder : Path
        An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "case"
        self.folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(1)
        base = {
            name: 0.2 * torch.randn(shape, generator=generator)
            for name, shape in declared_files.base_shapes().items()
        }
        head = {name: torch.randn(shape, generator=generator) for name, shape in HEAD.items()}
        (self.folder / "config.json").write_text(json.dumps(CONFIG.to_json_dict()))
        self.seeds: dict[str, dict[str, bytes]] = {}
        self._add("weights", base | head)
        (self.folder / "model.safetensors").write_bytes(self.seeds["weights"]["model.safetensors"])
        self.values = declared(self.seeds["weights"]["model.safetensors"]).tensors
        self.base = load_pretrained(self.folder, num_labels=declared_files.C, mapped=False)
        (self.folder / "model.safetensors").unlink()
        self.fingerprint = fingerprint(self.base)
        # A second spelling, in half precision and without a head.
        bare = {name.removeprefix("bert."): tensor.half() for name, tensor in base.items()}
        bare = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in bare.items()}
        bare["embeddings.position_ids"] = torch.arange(declared_files.P)[None]
        bare["cls.predictions.bias"] = torch.zeros(declared_files.V)
        self._add("bare", bare)
        self._add_adapter(folder / "adapter.safetensors")
        dtypes = [dtype for _, dtype in declared_files.DTYPES.values()]
        self._add("types", {
            f"t{i}": torch.ones(2, 1 + i % 3).to(dtype) for i, dtype in enumerate(dtypes)
        })  # fmt: skip
        self._add("empty", {
            "none": torch.ones(0, 3), "scalar": torch.tensor(1.5), "a": torch.ones(7),
            "nothing": torch.ones(5, 0, dtype=torch.int16), "ü\n": torch.ones(2, 2),
        }, {"format": "pt", "ü": "ä\n"})  # fmt: skip
        self._add_folder(base)
        self.counts: Counter[str] = Counter()

    def _add(
        self, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        self.seeds[name] = {"model.safetensors": written(tensors, metadata)}

    def _add_adapter(self, path: Path) -> None:
        model = copy.deepcopy(self.base)
        adapt(model, PLAN, seed=1)
        assert model.adaptation is not None
        model.adaptation.task, model.adaptation.labels = "mnli", tuple("abcd")
        save_adapter(model, path)
        self.seeds["adapter"] = {"model.safetensors": path.read_bytes()}
        model.adaptation.labels = None
        save_adapter(model, path)
        self.seeds["adapter without labels"] = {"model.safetensors": path.read_bytes()}

    def _add_folder(self, base: dict[str, torch.Tensor]) -> None:
        names = sorted(base)
        places = {name: f"model-{1 + i % 3}.safetensors" for i, name in enumerate(names)}
        files = {
            shard: written({name: base[name] for name in names if places[name] == shard})
            for shard in sorted(set(places.values()))
        }
        index = json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()
        self.seeds["shards"] = {INDEX: index, **files}

    def check(self, number: int, only: str | None = None) -> None:
        """Make the file of a number and have it read; a WrongError says what went wrong."""
        case = make_case(SEED, number, self.seeds, only)
        try:
            with within(SECONDS):
                self.read(case, number)
        except (Exception, SlowError) as error:
            message = (
                f"file {number} of seed {SEED!r} (SPAFIT_MUTATED={number} makes it again), "
                f"{' + '.join(case.steps)}: {type(error).__name__}: {error!s:.600}"
            )
            raise WrongError(message) from error

    def read(self, case: Case, number: int) -> None:
        """Have the files of a case read by all readers."""
        for old in self.folder.glob("*model*"):
            old.unlink()  # not overwritten: pages of it may still be mapped
        for name, raw in case.files.items():
            (self.folder / name).write_bytes(raw)
        sound = False
        for name, raw in case.files.items():
            if name != INDEX:
                sound = self._read_file(self.folder / name, raw)
        self._read_folder(case)
        path = self.folder / "model.safetensors"
        if path.name in case.files:
            self._read_adapter(path, case.files[path.name], number)
        # Slow, so a share: of the sound files of models, and of all.
        whole = sound and case.steps[0] in ("weights", "bare", "shards")
        if number % (4 if whole else 64) == 0:
            self._load(case)

    def _read_file(self, path: Path, raw: bytes) -> bool:
        """Read a file alone; return whether it was accepted, and whole."""
        try:
            expected: Declared | None = declared(raw)
        except FaultError as fault:
            expected, why = None, str(fault)
        try:
            file = SafeFile(path)
        except WeightsError as error:
            refused(error, [path])
            require(expected is None, f"a sound file was refused: {error}")
            self.counts["refused"] += 1
            return False
        with file:
            require(expected is not None, f"was accepted, though {expected or why}")
            assert expected is not None
            self.counts["accepted"] += 1
            require(file.metadata == expected.metadata, "other metadata")
            self._compare(file, expected, [path])
        self._ask_the_library(raw, expected)
        return not expected.sick()

    def _compare(self, file: SafeFile | SafeFolder, expected: Declared, paths: list[Path]) -> None:
        found = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
        told = {name: (each.code, each.shape) for name, each in expected.tensors.items()}
        require(found == told, f"declares {told!r:.300}, was read as {found!r:.300}")
        for name, tensor in expected.tensors.items():
            for read in (file.read, file.view):
                try:
                    result = read(name)
                except WeightsError as error:
                    refused(error, paths)
                    require(tensor.sick, f"{name!r} is finite and was refused: {error}")
                    continue
                require(not tensor.sick, f"{name!r} holds NaN or infinity and was read")
                same(result, tensor, name)

    def _ask_the_library(self, raw: bytes, expected: Declared) -> None:
        """Where the format's own library accepts the file too, it must read the same."""
        try:
            found = safetensors.deserialize(raw)
        except safetensors.SafetensorError:
            self.counts["refused by the library alone"] += 1
            return
        require(len(found) == len(expected.tensors), "the library counts other tensors")
        for name, entry in found:
            tensor = expected.tensors[name]
            require(bytes(entry["data"]) == tensor.content, f"the library reads {name!r} otherwise")
            require(tuple(entry["shape"]) == tensor.shape, f"the library reads {name!r} otherwise")

    def _read_folder(self, case: Case) -> None:
        paths = [self.folder, *(self.folder / name for name in case.files)]
        try:
            expected: Declared | None = declared_folder(case.files)
        except FaultError:
            expected = None
        try:
            folder = SafeFolder(self.folder)
        except WeightsError as error:
            refused(error, paths)
            require(expected is None, f"a sound folder was refused: {error}")
            return
        with folder:
            require(expected is not None, "a folder was accepted that is not sound")
            assert expected is not None
            if len(case.files) > 1:
                self.counts["folders accepted"] += 1
                self._compare(folder, expected, paths)

    def _read_adapter(self, path: Path, raw: bytes, number: int) -> None:
        try:
            header = read_adapter_header(path)
        except WeightsError as error:
            refused(error, [path])
            header = None
        else:
            expected = declared(raw)
            _, task, labels = declared_files.told(expected.metadata)
            require(header.task == task, "another task")
            require(header.labels == (None if labels is None else tuple(labels)), "other labels")
            shapes = {name: tensor.shape for name, tensor in expected.tensors.items()}
            require(dict(header.shapes) == shapes, "other shapes")
        model = self.base
        try:
            load_adapter(model, path)
        except (WeightsError, PlanError) as error:
            refused(error, [path])
            require(model.adaptation is None, "a refused adapter adapted the model")
            # A model that was changed stays so: after early refusals a share is looked at.
            if header is not None or number % 16 == 0:
                self._require_base(model, set())
            return
        self.base = self._fresh()
        require(header is not None, "load_adapter accepts what read_adapter_header refuses")
        self.counts["adapters accepted"] += 1
        self._require_adapted(model, declared(raw))

    def _fresh(self) -> BertForSequenceClassification:
        with torch.device("meta"):
            model = BertForSequenceClassification(CONFIG, declared_files.C)
        values = {name: tensor.converted() for name, tensor in self.values.items()}
        model.load_state_dict(values, assign=True)
        return model.eval()

    def check_base(self) -> None:
        """Require that the model is as it was before all the refusals."""
        self._require_base(self.base, set())

    def _require_base(self, model: BertForSequenceClassification, but: set[str]) -> None:
        found = dict(model.named_parameters())
        require(but or set(found) == set(self.values), "other parameters")
        for name, expected in self.values.items():
            if name not in but:
                same(found[name], expected, name)
                require(but or found[name].requires_grad, f"{name!r} was frozen")

    def _require_adapted(self, model: BertForSequenceClassification, expected: Declared) -> None:
        require(not expected.sick(), "an adapter with NaN or infinite values was loaded")
        require(expected.metadata["base_fingerprint"] == self.fingerprint, "of another base")
        plan, task, labels = declared_files.told(expected.metadata)
        shapes, loras = declared_files.trained_by(plan)
        told = {name: tensor.shape for name, tensor in expected.tensors.items()}
        require(told == shapes, "the plan and the tensors do not agree")
        found = {
            name.replace("bias_delta.delta", "bias_delta"): parameter  # as adapter files name it
            for name, parameter in model.named_parameters()
        }
        training = {name for name, parameter in found.items() if parameter.requires_grad}
        require(training == set(shapes), "other parameters train than the plan says")
        for name, tensor in expected.tensors.items():
            require(torch.equal(found[name].data, tensor.converted()), f"{name!r} has other values")
            require(bool(found[name].isfinite().all()), f"{name!r} is not finite in the model")
        self._require_base(model, set(shapes))
        require(set(found) == set(self.values) | set(shapes), "other parameters than declared")
        scales = {
            name: (module.scaling, module.dropout)
            for name, module in model.named_modules()
            if isinstance(module, LoRALinear)
        }
        require(scales == loras, f"LoRA's settings are {scales}, the plan says {loras}")
        adaptation = model.adaptation
        assert adaptation is not None
        require(adaptation.task == task, "another task")
        require(adaptation.labels == (None if labels is None else tuple(labels)), "other labels")

    def _load(self, case: Case) -> None:
        paths = [self.folder, *(self.folder / name for name in case.files)]
        try:
            model = load_pretrained(self.folder, num_labels=declared_files.C)
        except (WeightsError, ConfigError) as error:
            refused(error, paths, listing=True)
            self.counts["models refused"] += 1
            return
        self.counts["models accepted"] += 1
        expected = declared_folder(case.files)
        said = {name for name, _ in load_report(model).dropped}
        sources: dict[str, Tensor] = {}
        for name, tensor in expected.tensors.items():
            becomes = declared_files.canonical(name)
            if becomes is None:
                require(name in said, f"{name!r} was left out silently")
            else:
                require(becomes not in sources, f"{name!r} stands there twice")
                sources[becomes] = tensor
        found = model.state_dict()
        shapes = declared_files.base_shapes() | HEAD
        require({name: tuple(t.shape) for name, t in found.items()} == shapes, "another model")
        unknown = set(sources) - set(shapes)
        require(not unknown, f"{unknown} were left out silently")
        headed = {n: sources[n].shape for n in HEAD if n in sources} == HEAD
        for name in shapes:
            if name in HEAD and not headed:
                continue  # drawn anew
            if name not in sources:
                require(name.startswith("bert.pooler"), f"{name!r} is missing")
                continue
            tensor = sources[name]
            require(tensor.code in declared_files.FLOATS, f"{name!r} is {tensor.code}")
            require(torch.equal(found[name], tensor.converted()), f"{name!r} has other values")
        require(all(bool(t.isfinite().all()) for t in found.values()), "not finite")
