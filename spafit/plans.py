"""Plans: which technique trains what in which stratum of layers, as plain data.

A plan divides the L layers, numbered from 0, into strata that follow each other without a gap, and
gives each stratum a table of (module path inside the layer -> techniques). SPAFIT is the plan with
three strata: frozen, biases, LoRA and biases. Users call the strata groups 1, 2 and 3, as the paper
does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spafit.adapters import TECHNIQUES, BiasDelta, DirectBias, Full, LoRA, Technique
from spafit.errors import PlanError

# The eight modules of a layer that hold parameters, in the order of the data. Each is written from
# ``layer.`` on, as in the checkpoint's key without its number, so that none ends another:
# ``output.dense`` alone would also end ``attention.output.dense``.
QUERY = "layer.attention.self.query"
KEY = "layer.attention.self.key"
VALUE = "layer.attention.self.value"
ATTENTION_DENSE = "layer.attention.output.dense"
ATTENTION_NORM = "layer.attention.output.LayerNorm"
INTERMEDIATE = "layer.intermediate.dense"
OUTPUT_DENSE = "layer.output.dense"
OUTPUT_NORM = "layer.output.LayerNorm"
MODULES = (
    QUERY,
    KEY,
    VALUE,
    ATTENTION_DENSE,
    ATTENTION_NORM,
    INTERMEDIATE,
    OUTPUT_DENSE,
    OUTPUT_NORM,
)

#: The rows of the paper's Table 1.
METHODS = (
    "Full Fine-tuning",
    "Full BitFit",
    "Full LoRA-I",
    "Full LoRA-II",
    "SPAFIT-4-9-I",
    "SPAFIT-4-9-II",
    "SPAFIT-4-14-II",
    "SPAFIT-8-12-I",
    "SPAFIT-8-12-II",
    "SPAFIT-8-16-II",
)

_FORMAT = "spafit-plan-1"


def resolve(entry: str) -> str:
    """Find the one module of a layer that ``entry`` names.

    Parameters
    ----------
    entry : str
        A module path inside the layer or its end: ``"query"``, ``"attention.self.query"`` and
        ``"layer.attention.self.query"`` are the same module.

    Returns
    -------
    str
        The path as it stands in :data:`MODULES`.

    Raises
    ------
    PlanError
        If the entry matches no module, or two: ``"output.dense"`` also ends
        ``attention.output.dense`` and must be written ``"layer.output.dense"``.
    """
    matches = [module for module in MODULES if f".{module}".endswith(f".{entry}")]
    if not matches:
        known = ", ".join(MODULES)
        raise PlanError(f"the entry {entry!r} matches no module of a layer; there are {known}")
    if len(matches) > 1:
        raise PlanError(
            f"the entry {entry!r} matches {' and '.join(matches)}; write the one that is meant"
        )
    return matches[0]


@dataclass(frozen=True)
class Stratum:
    """Some consecutive layers and what trains in each of them.

    Attributes
    ----------
    name : str
        What it is called in print, such as ``"group 2"``.
    first, last : int
        The layers, numbered from 0; both ends belong to it.
    train : mapping of str to sequence of Technique
        Module (see :func:`resolve`) -> the techniques that it takes. A module that is not named is
        frozen. LoRA and a bias technique may stand together.

    Raises
    ------
    PlanError
        If the range is empty, an entry matches no module or two, two entries are the same module,
        or techniques cannot stand together.
    """

    name: str
    first: int
    last: int
    train: Mapping[str, Sequence[Technique]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.first) is not int or type(self.last) is not int or self.first < 0:
            raise PlanError(f"{self.name}: layers are numbered from 0, found {self.layers}")
        if self.last < self.first:
            raise PlanError(f"{self.name}: layers {self.layers} are none at all")
        resolved: dict[str, tuple[Technique, ...]] = {}
        for entry, techniques in self.train.items():
            module = resolve(entry)
            if module in resolved:
                raise PlanError(f"{self.name}: {entry!r} names {module} a second time")
            resolved[module] = _checked(f"{self.name}, {module}", techniques)
        in_order = {module: resolved[module] for module in MODULES if module in resolved}
        object.__setattr__(self, "train", in_order)

    @property
    def layers(self) -> str:
        """The layers in print: ``"5-9"``, or ``"5"`` for one."""
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"

    def __len__(self) -> int:
        return self.last - self.first + 1


def _checked(place: str, techniques: Sequence[Technique]) -> tuple[Technique, ...]:
    techniques = tuple(techniques)
    names = [technique.name for technique in techniques]
    if not techniques:
        raise PlanError(f"{place}: no technique is named; leave the entry out to freeze it")
    if len(set(names)) < len(names):
        raise PlanError(f"{place}: {' and '.join(names)} are the same technique twice")
    alone = [name for name in names if name == Full.name]
    biases = [name for name in names if name in (BiasDelta.name, DirectBias.name)]
    if (alone and len(names) > 1) or len(biases) > 1:
        raise PlanError(f"{place}: {' and '.join(names)} cannot stand together")
    if LoRA.name in names and place.endswith("LayerNorm"):
        raise PlanError(f"{place}: LoRA needs a Linear; a LayerNorm has no matrix to update")
    # LoRA last: a LoRALinear takes over the delta that stands already.
    return tuple(sorted(techniques, key=lambda technique: technique.name == LoRA.name))


@dataclass(frozen=True)
class Plan:
    """What trains in a whole model; the classifier always does.

    Attributes
    ----------
    name : str
        The method's name, or any.
    num_layers : int
        L, the layers of the model that it is for.
    strata : sequence of Stratum
        They follow each other from layer 0 to layer L - 1 without gap or overlap.
    embeddings, pooler : {"frozen", "full"}
        Whether these train.

    Raises
    ------
    PlanError
        If the strata do not cover the layers exactly once, in order.
    """

    name: str
    num_layers: int
    strata: Sequence[Stratum]
    embeddings: str = "frozen"
    pooler: str = "frozen"

    def __post_init__(self) -> None:
        object.__setattr__(self, "strata", tuple(self.strata))
        _check_num_layers(self.num_layers)
        expected = 0
        for stratum in self.strata:
            if stratum.first != expected:
                raise PlanError(
                    f"{self.name}: {stratum.name} begins at layer {stratum.first}, but layer "
                    f"{expected} comes next; strata follow each other without gap or overlap"
                )
            expected = stratum.last + 1
        if expected != self.num_layers:
            raise PlanError(
                f"{self.name}: the strata end at layer {expected - 1}, but the last of "
                f"{self.num_layers} layers is {self.num_layers - 1}"
            )
        for name in ("embeddings", "pooler"):
            if getattr(self, name) not in ("frozen", "full"):
                raise PlanError(
                    f'{self.name}: {name} must be "frozen" or "full", found {getattr(self, name)!r}'
                )

    @property
    def writes_pretrained(self) -> bool:
        """Whether any pre-trained tensor of embeddings, encoder or pooler is itself trained."""
        return "full" in (self.embeddings, self.pooler) or any(
            technique.writes_pretrained
            for stratum in self.strata
            for techniques in stratum.train.values()
            for technique in techniques
        )

    def to_json(self) -> str:
        """Write the plan out; :meth:`from_json` gives an equal plan back."""
        strata = [
            {
                "name": stratum.name,
                "layers": [stratum.first, stratum.last],
                "train": {
                    module: _techniques_to_json(techniques)
                    for module, techniques in stratum.train.items()
                },
            }
            for stratum in self.strata
        ]
        entries = {
            "format": _FORMAT,
            "name": self.name,
            "num_layers": self.num_layers,
            "embeddings": self.embeddings,
            "pooler": self.pooler,
            "strata": strata,
        }
        return json.dumps(entries, indent=2)

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan") -> Plan:
        """Read what :meth:`to_json` writes, or a plan written by hand.

        Parameters
        ----------
        text : str
            JSON. ``"layers"`` is ``[first, last]``, both included and numbered from 0. A technique
            is its name (``"bias-delta"``, ``"bias-direct"``, ``"lora"``, ``"full"``) or an object
            such as ``{"lora": {"r": 8, "alpha": 16}}``; a module takes one or a list of them.
        source : str
            What the text is called in an error.

        Raises
        ------
        PlanError
            If it is not such a plan, or the plan is impossible.
        """
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{source} is not JSON: {error}") from None
        try:
            known = {"format", "name", "num_layers", "embeddings", "pooler", "strata"}
            _refuse_unknown("a plan", entries, known)
            if entries.get("format") != _FORMAT:
                found = entries.get("format")
                raise PlanError(f'"format" must be "{_FORMAT}", found {found!r}')
            strata = [_stratum_from_json(stratum) for stratum in _listed(entries, "strata")]
            return cls(
                name=str(entries.get("name", "custom")),
                num_layers=entries.get("num_layers", 0),
                strata=strata,
                embeddings=entries.get("embeddings", "frozen"),
                pooler=entries.get("pooler", "frozen"),
            )
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from None


def _techniques_to_json(techniques: Sequence[Technique]) -> Any:
    written = [
        {technique.name: settings}
        if (settings := dataclasses.asdict(technique))
        else technique.name
        for technique in techniques
    ]
    return written[0] if len(written) == 1 else written


def _stratum_from_json(entries: Any) -> Stratum:
    _refuse_unknown("a stratum", entries, {"name", "layers", "train"})
    name = str(entries.get("name", "a stratum"))
    layers = _listed(entries, "layers")
    if len(layers) != 2:
        raise PlanError(f'{name}: "layers" must be [first, last], found {layers}')
    train = entries.get("train", {})
    if not isinstance(train, dict):
        raise PlanError(f'{name}: "train" must map modules to techniques, found {train!r}')
    return Stratum(
        name,
        layers[0],
        layers[1],
        {
            module: [
                _technique_from_json(one) for one in (given if isinstance(given, list) else [given])
            ]
            for module, given in train.items()
        },
    )


def _technique_from_json(given: Any) -> Technique:
    name: Any = given
    settings: Any = {}
    if isinstance(given, dict) and len(given) == 1:
        ((name, settings),) = given.items()
    if not isinstance(name, str) or name not in TECHNIQUES or not isinstance(settings, dict):
        raise PlanError(f"{given!r} is no technique; there are {', '.join(TECHNIQUES)}")
    technique = TECHNIQUES[name]
    fields = {each.name for each in dataclasses.fields(technique)}
    _refuse_unknown(f"the technique {name}", settings, fields)
    return technique(**settings)


def _listed(entries: dict[str, Any], key: str) -> list[Any]:
    value = entries.get(key)
    if not isinstance(value, list):
        raise PlanError(f'"{key}" must be a list, found {value!r}')
    return value


def _refuse_unknown(thing: str, entries: Any, known: set[str]) -> None:
    if not isinstance(entries, dict):
        raise PlanError(f"{thing} must be a JSON object, found {entries!r}")
    unknown = sorted(entries.keys() - known)
    if unknown:
        has = ", ".join(sorted(known)) or "none"
        raise PlanError(f"{thing} has no setting {' or '.join(unknown)}; there are {has}")


def _check_num_layers(num_layers: object) -> None:
    if type(num_layers) is not int or num_layers < 1:
        raise PlanError(f"num_layers must be a whole number of at least 1, found {num_layers!r}")


def plan(
    method: str | Path | Plan,
    num_layers: int,
    *,
    r: int | None = None,
    alpha: float | None = None,
    lora_dropout: float | None = None,
    bias: str | None = None,
    numbering: str | None = None,
) -> Plan:
    """Make the plan of a method for a model of L layers.

    Parameters
    ----------
    method : str, Path or Plan
        A row of the paper's Table 1 by name in any case (:data:`METHODS`; ``"full"``,
        ``"bitfit"``, ``"lora-i"`` and ``"lora-ii"`` for short); ``SPAFIT-[N1]-[N2]-[I|II]`` with
        any N1 < N2, each a layer or, as in ``SPAFIT-20%-40%-II``, the share of the L layers that
        lies up to the end of group 1 or 2; a JSON file of a plan; or a Plan, which is checked
        against ``num_layers`` and given back.
    num_layers : int
        L.
    r : int, optional
        LoRA's rank; the paper's 64 by default.
    alpha : float, optional
        LoRA's scale before division by r; the paper's 128 by default.
    lora_dropout : float, optional
        Rate at which the input of A is dropped; 0 by default.
    bias : {"delta", "direct"}, optional
        Whether biases train as a :class:`~spafit.adapters.BiasDelta` beside the frozen bias (the
        default) or are themselves written to.
    numbering : {"table-2", "text"}, optional
        How N1 and N2 count. ``"table-2"``, the default: layers are 0 .. L-1 and group 1 is
        0 .. N1 with both ends; all six parameter counts of the paper's Table 2 come out only so.
        ``"text"``: the words of the paper, layers are 1 .. L and group 1 is 1 .. N1.

    Returns
    -------
    Plan

    Raises
    ------
    PlanError
        If the name is unknown, N1 >= N2, N2 leaves no layer for group 3 or lies beyond the last
        layer, a setting is out of range, or settings are given beside a Plan or file, which has
        its own.

    Examples
    --------
    >>> [stratum.layers for stratum in plan("SPAFIT-4-9-II", num_layers=24).strata]
    ['0-4', '5-9', '10-23']
    >>> plan("spafit-20%-40%-ii", 24).strata == plan("SPAFIT-4-9-II", 24).strata
    True
    """
    _check_num_layers(num_layers)
    if isinstance(method, (Plan, Path)) or str(method).lower().endswith(".json"):
        if (r, alpha, lora_dropout, bias, numbering) != (None,) * 5:
            raise PlanError(
                "r, alpha, lora_dropout, bias and numbering belong to methods by name; "
                "a plan or plan file states its own"
            )
        ready = method if isinstance(method, Plan) else _read(Path(method))
        if ready.num_layers != num_layers:
            raise PlanError(
                f"the plan {ready.name} is for {ready.num_layers} layers, the model has "
                f"{num_layers}"
            )
        return ready
    if bias not in (None, "delta", "direct"):
        raise PlanError(f'bias must be "delta" or "direct", found {bias!r}')
    if numbering not in (None, "table-2", "text"):
        raise PlanError(f'numbering must be "table-2" or "text", found {numbering!r}')
    lora = LoRA(
        64 if r is None else r,
        128.0 if alpha is None else alpha,
        0.0 if lora_dropout is None else lora_dropout,
    )
    biases: Technique = DirectBias() if bias == "direct" else BiasDelta()
    return _by_name(method, num_layers, lora, biases, numbering or "table-2")


def _by_name(method: str, L: int, lora: LoRA, bias: Technique, numbering: str) -> Plan:
    lora_I = dict.fromkeys((QUERY, KEY, VALUE), (lora,))
    lora_II = {**lora_I, ATTENTION_DENSE: (lora,)}
    all_biases = dict.fromkeys(MODULES, (bias,))
    late_biases = dict.fromkeys((INTERMEDIATE, OUTPUT_DENSE, OUTPUT_NORM), (bias,))

    key = re.sub(r"[\s_]+", "-", method.strip()).lower().removeprefix("full-") or "full"
    if key in ("full", "fine-tuning"):
        everything = {module: (Full(),) for module in MODULES}
        strata = [Stratum("all layers", 0, L - 1, everything)]
        return Plan("Full Fine-tuning", L, strata, embeddings="full", pooler="full")
    if key == "bitfit":
        return Plan("Full BitFit", L, [Stratum("all layers", 0, L - 1, all_biases)])
    if key == "lora-i":
        return Plan("Full LoRA-I", L, [Stratum("all layers", 0, L - 1, lora_I)])
    if key == "lora-ii":
        return Plan("Full LoRA-II", L, [Stratum("all layers", 0, L - 1, lora_II)])

    parts = re.fullmatch(r"spafit-(\d+(?:\.\d+)?%|\d+)-(\d+(?:\.\d+)?%|\d+)-(i{1,2})", key)
    if parts is None:
        raise PlanError(
            f"there is no method {method!r}; there are {', '.join(METHODS)}, any other "
            "SPAFIT-[N1]-[N2]-[I|II] such as SPAFIT-20%-40%-II, or a plan file (.json)"
        )
    name = key.upper()
    end_1 = _layers_up_to(parts[1], L, numbering)
    end_2 = _layers_up_to(parts[2], L, numbering)
    first, last = (0, L - 1) if numbering == "table-2" else (1, L)
    where = f"{name} on {L} layers, numbered {first} to {last}"
    if end_1 < 1:
        raise PlanError(f"{where}: N1 = {parts[1]} leaves no layer for group 1")
    if end_1 >= end_2:
        raise PlanError(
            f"{where}: N1 = {parts[1]} must end before N2 = {parts[2]}, or group 2 has no layer"
        )
    if end_2 > L:
        raise PlanError(f"{where}: N2 = {parts[2]} is beyond the last layer, {last}")
    if end_2 == L:
        raise PlanError(f"{where}: N2 = {parts[2]} leaves no layer for group 3")
    matrices = lora_I if parts[3] == "i" else lora_II
    strata = [
        Stratum("group 1", 0, end_1 - 1),
        Stratum("group 2", end_1, end_2 - 1, all_biases),
        Stratum("group 3", end_2, L - 1, {**matrices, **late_biases}),
    ]
    return Plan(name, L, strata)


def _layers_up_to(end: str, L: int, numbering: str) -> int:
    """How many layers lie up to and including N1 or N2."""
    if end.endswith("%"):
        return math.floor(float(end[:-1]) / 100 * L + 0.5)
    return int(end) + 1 if numbering == "table-2" else int(end)


def _read(path: Path) -> Plan:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"the plan file {path} cannot be read: {error}") from None
    return Plan.from_json(text, source=str(path))


@dataclass
class Adaptation:
    """What :func:`spafit.adapt` has done to a model; it stands at ``model.adaptation``.

    Attributes
    ----------
    plan : Plan
        The plan that was applied.
    trainable : tuple of str
        The names of all parameters that train, the head's last.
    untrained : dict of str to torch.Tensor
        The values before training of the head and of biases that train directly, so that
        ``adapters_disabled`` can show the model as it was.
    base_fingerprint : str or None
        The base's, taken before training where the plan writes to pre-trained tensors; otherwise it
        can be taken from the model at any time, and is None here.
    task : str or None
        The name of the task, once trained or loaded.
    labels : tuple of str or None
        The label names in the order of the logits, once trained or loaded; empty for a score.
    """

    plan: Plan
    trainable: tuple[str, ...]
    untrained: dict[str, torch.Tensor]
    base_fingerprint: str | None = None
    task: str | None = None
    labels: tuple[str, ...] | None = None
