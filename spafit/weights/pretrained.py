"""Load pre-trained weights into a model, strictly, and report what was done with every tensor.

Checkpoints of BERT differ in the names of their tensors. Each change to a name is one row of
:data:`CHECKPOINT_RULES` below. Every other name must be one of the model's, with the model's shape,
and only the head's and the pooler's may be missing. So a tensor within the encoder that the model
does not have is refused, because it may change what the encoder computes; one outside of it that is
not the sentence classifier belongs to a head of another kind, and is left out, unless its name
speaks of what is added to an encoder from outside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import spafit.machine.kernel_choices  # noqa: F401 (what it remembers is used from here on)
from spafit.bert import BertForSequenceClassification, lay_side_by_side
from spafit.config import BertConfig
from spafit.errors import WeightsError, one_line
from spafit.kernels.stacking import cut
from spafit.machine.memory import empty_in_large_pages
from spafit.weights.heads import label_names_of, other_kind, read_entries, reads_otherwise
from spafit.weights.hub import local_folder
from spafit.weights.hub_files import commit_of
from spafit.weights.safe_folder import SafeFolder
from spafit.weights.safefile import FLOAT_DTYPES, TORCH_DTYPES, TensorInfo

LOADABLE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The types that a model may be loaded in."""

LARGEST_COPIED_BYTES = 2**29
"""Weights of at most this size are copied where nothing else is asked for, larger ones are mapped.

BERT-base stays below it. To copy instead of to map takes 25 ms more for MiniLM and 130 ms for
BERT-base, on one core of an AMD EPYC with the file in memory.
"""


@dataclass(frozen=True)
class Rule:
    """One row of :data:`CHECKPOINT_RULES`.

    Attributes
    ----------
    pattern : str
        A regular expression that is searched for in a checkpoint's name.
    becomes : str or None
        What the match is replaced by; None drops the tensor on purpose.
    reason : str
        Why.
    """

    pattern: str
    becomes: str | None
    reason: str


_FOREIGN = "outside of the encoder, and not the sentence classifier: a head of another kind"

# Applied from the top; all renaming rows that match apply, until a row drops the name.
CHECKPOINT_RULES = (
    Rule(r"^cls\.", None, "a head of the pre-training; the classifier takes its place"),
    Rule(r"^(bert\.)?embeddings\.position_ids\Z", None, "the constant 0, 1, 2 ..."),
    Rule(r"^(bert\.)?embeddings\.token_type_ids\Z", None, "the constant 0"),
    Rule(r"(?<=\bLayerNorm\.)gamma\Z", "weight", "the older spelling"),
    Rule(r"(?<=\bLayerNorm\.)beta\Z", "bias", "the older spelling"),
    Rule(r"^(?=(embeddings|encoder|pooler)\.)", "bert.", "saved without the head's prefix"),
    # Also an encoder under another prefix, such as "module.", is no head, and no more is what is
    # added to an encoder from outside, such as P-tuning's prefix_encoder.
    Rule(
        r"(?s)^(?!classifier\.(weight|bias)\Z)(?!(.*\.)?(bert|embeddings|encoder|pooler)\.)"
        r"(?!(?i:.*(prefix|prompt|adapter|lora|ia3|embeddings_project)))",
        None,
        _FOREIGN,
    ),
)

HEAD = ("classifier.weight", "classifier.bias")
POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")

# Of DataParallel, of a module of one's own around the model (Lightning), of torch.compile.
_WRAPPERS = re.compile(r"((module|model|_orig_mod)\.)+")

# The most faults that an error lists.
_MOST_FAULTS = 12


@dataclass(frozen=True)
class LoadReport:
    """What was done with every tensor of a checkpoint and every parameter of the model.

    Attributes
    ----------
    folder : Path
        Where the weights came from.
    files : tuple of Path
        The safetensors files.
    revision : str or None
        The commit, where the folder is one of the hub's cache.
    dtypes : dict of str to int
        How many loaded tensors the files hold in each type.
    loaded : int
        The number of tensors loaded.
    loaded_numbers : int
        The number of their elements.
    renamed : tuple of (str, str)
        The names in the file and in the model, where they differ.
    dropped : tuple of (str, str)
        The names left out on purpose, and why.
    newly_drawn : tuple of (str, str)
        The parameters that were drawn at random, and why.
    head : str
        What is known of the file's classifier, if it was taken; else empty.
    labels : tuple of str or None
        The names that config.json gives the rows of the file's classifier, in their order; None if
        they are not known, or if the head was newly drawn.
    """

    folder: Path
    files: tuple[Path, ...]
    revision: str | None
    dtypes: dict[str, int]
    loaded: int
    loaded_numbers: int
    renamed: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str, str], ...]
    newly_drawn: tuple[tuple[str, str], ...]
    head: str
    labels: tuple[str, ...] | None

    def __str__(self) -> str:
        types = ", ".join(f"{count} in {name}" for name, count in sorted(self.dtypes.items()))
        commit = f" at commit {self.revision}" if self.revision else ""
        lines = [
            f"loaded {self.loaded} tensors, {self.loaded_numbers:,} numbers ({types}) "
            f"from {one_line(str(self.folder), 600)}{commit}"
        ]
        if self.renamed:
            lines.append(f"renamed {len(self.renamed)}, such as {' -> '.join(self.renamed[0])}")
        if self.head:
            lines.append(f"took the file's classifier: {self.head}")
        lines += [f"left out {one_line(name)}: {reason}" for name, reason in self.dropped]
        lines += [f"newly drawn {name}: {reason}" for name, reason in self.newly_drawn]
        return "\n".join(lines)


def load_pretrained(
    name_or_folder: str | Path,
    *,
    num_labels: int = 2,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    mapped: bool | None = None,
) -> BertForSequenceClassification:
    """Build a classifier and load pre-trained weights into it.

    Parameters
    ----------
    name_or_folder : str or Path
        A folder with ``config.json`` and ``model.safetensors`` (or several files and their index),
        or the name of a model on the hub, which is downloaded once (:mod:`spafit.weights.hub`).
    num_labels : int
        C: the classes, or 1 for a score.
    revision : str, optional
        The branch, tag or commit of a hub name.
    dtype : torch.dtype
        The type of the model's parameters, one of :data:`LOADABLE_DTYPES`.
    device : torch.device or str
        Their device.
    seed : int
        Of the generator that draws the head and the pooler if the file has none that fit.
    mapped : bool, optional
        Whether large matrices may be the file's own pages, copied only when they are written to
        (:meth:`spafit.weights.safefile.SafeFile.view`). False reads everything into the process's
        own memory, for a file that may be cut short or written to in place while the model is in
        use, of which a mapped one may die. None maps only what takes more than
        :data:`LARGEST_COPIED_BYTES`.

    Returns
    -------
    BertForSequenceClassification
        In evaluation mode. :func:`load_report` says what was done with every tensor.

    Raises
    ------
    WeightsError
        If the files cannot be fetched or trusted, or do not fit the configuration.
    ConfigError
        If the configuration is not supported.
    """
    folder = local_folder(name_or_folder, revision=revision)
    config = BertConfig.from_json(folder / "config.json")
    # The meta device allocates and draws nothing: the file's tensors become the parameters.
    with torch.device("meta"):
        model = BertForSequenceClassification(config, num_labels)
    load_weights(model, folder, dtype=dtype, device=device, seed=seed, mapped=mapped)
    return model.eval()


def load_weights(
    model: BertForSequenceClassification,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    mapped: bool | None = None,
) -> LoadReport:
    """Load a folder's weights into all parameters of a model, which may be on the meta device.

    Parameters
    ----------
    model : BertForSequenceClassification
        A model as built, without techniques.
    folder, dtype, device, seed, mapped
        As for :func:`load_pretrained`.

    Returns
    -------
    LoadReport
        :func:`load_report` returns it again later.

    Raises
    ------
    WeightsError
        If the files cannot be trusted or do not fit the model; the model is then unchanged.
    """
    if dtype not in LOADABLE_DTYPES:
        raise WeightsError(f"weights load as one of {LOADABLE_DTYPES}, not as {dtype}")
    folder = Path(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    entries = read_entries(folder)
    with SafeFolder(folder) as files:
        chosen = _match(files.tensors, shapes, folder, other_kind(entries, model.num_labels))
        state = {}
        faults = []
        if mapped is None:
            mapped = sum(info.nbytes for info in chosen.sources.values()) > LARGEST_COPIED_BYTES
        places = _places(shapes, dtype)
        for name, info in chosen.sources.items():
            try:
                if name in places:
                    tensor = files.read(info.name, dtype, into=places.pop(name))
                elif mapped and TORCH_DTYPES[info.dtype] == dtype:
                    tensor = files.view(info.name)
                else:
                    into = empty_in_large_pages(info.shape, dtype)
                    tensor = files.read(info.name, dtype, into=into)
                state[name] = tensor.to(device)
            except WeightsError as error:
                faults.append(str(error))
        for name, _ in chosen.dropped:
            if name.endswith(("position_ids", "token_type_ids")):
                faults += _constant_faults(files.read(name), f"{folder}: {name}")
    if faults:
        raise WeightsError(_some("\n", faults))
    to_draw = {name: shapes[name] for name, _ in chosen.newly_drawn}
    for name, tensor in _draw(to_draw, model.config.initializer_range, seed).items():
        state[name] = tensor.to(device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    lay_side_by_side(model)  # changes nothing, unless the tensors were copied to a device
    infos = chosen.sources
    labels, head = None, ""
    if HEAD[0] in infos:
        labels, head = label_names_of(entries, model.num_labels)
    report = LoadReport(
        folder=folder,
        files=files.files,
        revision=commit_of(folder),
        dtypes=dict(Counter(info.dtype for info in infos.values())),
        loaded=len(infos),
        loaded_numbers=sum(info.numel for info in infos.values()),
        renamed=tuple((info.name, name) for name, info in infos.items() if info.name != name),
        dropped=chosen.dropped,
        newly_drawn=chosen.newly_drawn,
        head=head,
        labels=labels,
    )
    model.load_report = report  # type: ignore[assignment]
    return report


def _places(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Allocate adjacent memory for the query, key and value matrices of each layer.

    One product then computes all three (:mod:`spafit.kernels.stacking`).
    """
    places: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if not name.endswith(".attention.self.query.weight"):
            continue
        trio = [name.replace("query", each) for each in ("query", "key", "value")]
        whole = empty_in_large_pages((3 * shape[0], *shape[1:]), dtype)
        places |= zip(trio, cut(whole, [shape[0]] * 3), strict=True)
    return places


def load_report(model: BertForSequenceClassification) -> LoadReport:
    """Return the report of how this model's weights were loaded.

    Parameters
    ----------
    model : BertForSequenceClassification
        From :func:`load_pretrained`.

    Returns
    -------
    LoadReport

    Raises
    ------
    WeightsError
        If the model was not loaded.
    """
    report = getattr(model, "load_report", None)
    if not isinstance(report, LoadReport):
        raise WeightsError("this model was not loaded by load_pretrained, so it has no load report")
    return report


def apply_rules(name: str) -> tuple[str | None, str]:
    """Apply :data:`CHECKPOINT_RULES` to a checkpoint's name.

    Parameters
    ----------
    name : str
        The name in the file.

    Returns
    -------
    (str or None, str)
        The name in the model, or None if it is dropped on purpose; and why it was changed, empty if
        it was not.
    """
    reasons = []
    for rule in CHECKPOINT_RULES:
        if re.search(rule.pattern, name) is None:
            continue
        reasons.append(rule.reason)
        if rule.becomes is None:
            return None, rule.reason
        name = re.sub(rule.pattern, rule.becomes, name)
    return name, "; ".join(reasons)


def wrapper_prefix(names: Iterable[str]) -> str:
    """Return the prefix that a wrapper such as DataParallel gave all names; empty if none did."""
    names = list(names)
    found = _WRAPPERS.match(names[0]) if names else None
    return found[0] if found and all(name.startswith(found[0]) for name in names) else ""


@dataclass(frozen=True)
class _Match:
    """Which tensor each parameter is read from, the dropped tensors, and the parameters to draw."""

    sources: dict[str, TensorInfo]
    dropped: tuple[tuple[str, str], ...]
    newly_drawn: tuple[tuple[str, str], ...]


def _match(
    tensors: dict[str, TensorInfo],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    other_kind: str,
) -> _Match:
    """Match the file's tensors with the model's, or raise one error for all that do not fit.

    A head of another kind, for the reason that is given, is not taken.
    """
    sources: dict[str, TensorInfo] = {}
    dropped: list[tuple[str, str]] = []
    newly_drawn: list[tuple[str, str]] = []
    faults: list[str] = []
    for file_name, info in tensors.items():
        name, reason = apply_rules(file_name)
        if name is None:
            dropped.append((file_name, reason))
        elif name in sources:
            faults.append(f"twice: {name}, as {sources[name].name} and as {file_name}")
        else:
            sources[name] = info

    misfit = _head_misfit(sources, shapes) or other_kind or reads_otherwise(tensors)
    if misfit:
        dropped += [(name, misfit) for name in HEAD if sources.pop(name, None) is not None]
        newly_drawn += [(name, misfit) for name in HEAD]
    if not any(name in sources for name in POOLER):
        newly_drawn += [(name, "the file has no pooler") for name in POOLER]

    newly_drawn += [(name, _WITHOUT_BIAS) for name in _biases_in_no_layer(shapes, sources)]
    drawn = {name for name, _ in newly_drawn}
    missing = sorted(shapes.keys() - sources.keys() - drawn)
    faults += [f"missing: {name} {list(shapes[name])}" for name in missing]
    if missing:  # perhaps under one of these names
        foreign = [name for name, reason in dropped if reason == _FOREIGN]
        faults += [f"unexpected: {name} {list(tensors[name].shape)}" for name in sorted(foreign)]
    for name, info in sorted(sources.items()):
        if name not in shapes:
            faults.append(f"unexpected: {info.name} {list(info.shape)}")
        elif info.shape != shapes[name]:
            faults.append(
                f"of the wrong shape: {info.name} is {list(info.shape)}, "
                f"the configuration asks for {list(shapes[name])}"
            )
        elif info.dtype not in FLOAT_DTYPES:
            faults.append(
                f"of the wrong type: {info.name} is {info.dtype}, "
                f"expected one of {', '.join(FLOAT_DTYPES)}"
            )
    if faults:
        prefix = wrapper_prefix(tensors)
        hint = f"all names begin with {prefix}, so save the model without its wrapper; "
        inspect = f"`python -m weights_tools inspect {folder}` lists its tensors"
        raise WeightsError(
            f"the weights in {folder} do not fit its config.json, {_counted(faults)} "
            f"({hint if prefix else ''}{inspect}):\n  " + _some("\n  ", faults)
        )
    return _Match(sources, tuple(dropped), tuple(newly_drawn))


_WITHOUT_BIAS = "no layer of the file has this bias, so it is 0"


def _biases_in_no_layer(
    shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, TensorInfo]
) -> list[str]:
    """Return the biases of the encoder that a checkpoint without them lacks: in every layer alike.

    A layer without a bias is one whose bias is 0. A file in which one layer alone lacks its bias is
    damaged.
    """
    places: dict[str, list[str]] = {}
    for name in shapes:
        weight = f"{name.removesuffix('.bias')}.weight"
        if name.startswith("bert.encoder.") and name.endswith(".bias") and weight in sources:
            place = re.sub(r"\.[0-9]+\.", ".", name, count=1)
            places.setdefault(place, []).append(name)
    return [name for names in places.values() if not sources.keys() & set(names) for name in names]


def _some(between: str, faults: list[str]) -> str:
    """Join the first faults, one per line."""
    shown = [one_line(fault, 500) for fault in faults[:_MOST_FAULTS]]
    more = len(faults) - len(shown)
    return between.join([*shown, f"and {more} more"] if more else shown)


def _counted(faults: list[str]) -> str:
    counts = Counter(fault.split(":")[0] for fault in faults)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _head_misfit(sources: dict[str, TensorInfo], shapes: dict[str, tuple[int, ...]]) -> str:
    """Return why the file's head cannot be used in the model; empty if it can."""
    found = {name: sources[name].shape for name in HEAD if name in sources}
    if not found:
        return "the file has no classifier"
    if found == {name: shapes[name] for name in HEAD}:
        return ""
    described = ", ".join(f"{name} {list(shape)}" for name, shape in found.items())
    return f"the file has {described}, the model needs {list(shapes[HEAD[0]])} and its bias"


def _constant_faults(ids: torch.Tensor, name: str) -> list[str]:
    """Return a fault if position ids are not 0, 1, 2 ..., or token types not 0, in whatever type.

    In a floating-point type positions may be rounded, as 0, 1, 2 ... is if all of a file is cast.
    """
    expected, told = torch.arange(ids.numel()), "0, 1, 2 ..., so these weights count positions"
    if name.endswith("token_type_ids"):
        expected, told = torch.zeros_like(expected), "0 everywhere, so these weights take segments"
    elif ids.numel() > max(ids.shape, default=1):
        return [
            f"{name} has the shape {list(ids.shape)}, expected one row; leave it out of the file"
        ]
    if ids.is_floating_point():
        expected = expected.to(ids.dtype)
    if torch.equal(ids.flatten().double(), expected.double()):
        return []
    return [f"{name} is not {told} in another way"]


def _draw(
    shapes: dict[str, tuple[int, ...]], standard_deviation: float, seed: int
) -> dict[str, torch.Tensor]:
    """Draw matrices from N(0, σ²) and set biases to 0.

    They are drawn on the CPU in float32, so that a seed gives the same numbers everywhere, and the
    head first, so that it does not depend on whether the pooler is drawn too.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name in sorted(shapes, key=lambda name: (name not in HEAD, name)):
        drawn[name] = torch.zeros(shapes[name], device="cpu")
        if name.endswith(".weight"):
            drawn[name].normal_(0.0, standard_deviation, generator=generator)
    return drawn
