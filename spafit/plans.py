"""Plans: which technique trains what in which stratum of layers, as plain data.

A plan divides the L layers, numbered from 0, into strata of consecutive layers and gives each of
them a table (module path inside the layer -> techniques). SPAFIT is the plan with three strata, the
paper's groups 1, 2 and 3: frozen, biases, LoRA and biases. methods.py makes plans by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from spafit.adaptable import Adaptable, LayerNorm, Linear, SublayerEnd
from spafit.config import MOST_LAYERS, is_number, no_duplicates
from spafit.errors import PlanError, listed, nearest, one_line
from spafit.techniques import TECHNIQUES, Technique, check_decay, check_rate, in_order

# The eight modules of a layer that hold parameters, in the order of the forward pass. Each is the
# checkpoint's key from ``layer.`` on, without the layer's number. With ``layer.`` no path is the
# end of another: ``output.dense`` alone is also the end of ``attention.output.dense``.
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


# The ends of the two sub-layers, where adapters stand.
ATTENTION_OUTPUT = "layer.attention.output"
OUTPUT = "layer.output"
PLACES = (*MODULES[:4], ATTENTION_OUTPUT, *MODULES[4:7], OUTPUT, OUTPUT_NORM)
"""All that a stratum may name, in the order of the forward pass."""

ALL = "all"
"""Names all of :data:`MODULES` in a stratum's table."""

_FORMAT = "spafit-plan-1"

_SMALLEST_RATE = 1e-30  # of the learning rate; less moves nothing in float32


def resolve(entry: str) -> str:
    """Return the path of the one place in a layer that ``entry`` names.

    Parameters
    ----------
    entry : str
        A module path inside the layer or its end: ``"query"``, ``"attention.self.query"`` and
        ``"layer.attention.self.query"`` are the same module. ``"attention.output"`` and
        ``"layer.output"`` are the ends of the sub-layers, for adapters.

    Returns
    -------
    str
        The path in :data:`PLACES`.

    Raises
    ------
    PlanError
        If the entry matches no module, or two: ``"output.dense"`` is also the end of
        ``attention.output.dense`` and must be written ``"layer.output.dense"``.
    """
    matches = [place for place in PLACES if f".{place}".endswith(f".{entry}")]
    if not matches:
        ends = [place.split(".", n)[-1] for place in PLACES for n in range(place.count(".") + 1)]
        known = {ALL, *(end for end in ends if ends.count(end) == 1)}
        raise PlanError(
            f"the entry {entry!r:.200} matches no module of a layer{did_you_mean(entry, known)}; "
            f"there are {', '.join(PLACES)}"
        )
    if len(matches) > 1:
        raise PlanError(
            f"the entry {entry!r:.200} matches {' and '.join(matches)}; write the one that is meant"
        )
    return matches[0]


@dataclass(frozen=True)
class Stratum:
    """Consecutive layers, and what trains in each of them.

    Attributes
    ----------
    name : str
        Its name in print, such as ``"group 2"``.
    first, last : int
        The first and the last layer, both included, numbered from 0.
    train : mapping of str to sequence of Technique
        Module (see :func:`resolve`), or several with commas between them -> their techniques.
        ``"all"`` names the eight modules that hold parameters; what is named beside it is added to
        it. A module that is not named is frozen. LoRA and a bias technique may be combined; they
        are sorted by the order of attachment. The attribute has one entry for each module.

    rate : float
        Factor of the learning rate in these layers.
    weight_decay : float or None
        AdamW's weight decay of what trains in them, matrices and vectors alike; None is the run's.
        A technique's own comes first.
    dropout : float or None
        Rate of all dropout of these layers in training; None is the model's own. It belongs to the
        layers, not to what is added: in training mode it holds inside ``adapters_disabled`` too. In
        evaluation mode nothing is dropped.
    thaw, freeze : float or str
        When these layers begin to train and when they end, in epochs or, as in ``"30%"``, as a
        share of the training. By default they train from its beginning (0) to its end (None).

    Raises
    ------
    PlanError
        If the range is empty, an entry matches no module or two, two entries are the same module,
        techniques cannot be combined, or a setting is out of range.
    """

    name: str
    first: int
    last: int
    train: Mapping[str, Sequence[Technique]] = field(default_factory=dict)
    rate: float = field(default=1.0, kw_only=True)
    weight_decay: float | None = field(default=None, kw_only=True)
    dropout: float | None = field(default=None, kw_only=True)
    thaw: float | str = field(default=0, kw_only=True)
    freeze: float | str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_name(self.name)
        name = one_line(self.name)
        if type(self.first) is not int or type(self.last) is not int or self.first < 0:
            raise PlanError(f"{name}: layers are numbered from 0, found {self.layers:.80}")
        if self.last < self.first:
            raise PlanError(f"{name}: layers {self.layers:.80} are none at all")
        named: set[str] = set()
        resolved: dict[str, list[Technique]] = {}
        for entry, techniques in self.train.items():
            given = _checked_list(f"{name}, {one_line(str(entry))}", techniques)
            for each in map(str.strip, str(entry).split(",")):
                with _at(name):
                    modules = MODULES if each == ALL else (resolve(each),)
                if each != ALL and modules[0] in named:
                    raise PlanError(f"{name}: {each!r:.200} names {modules[0]} a second time")
                named |= set(modules) if each != ALL else set()
                for module in modules:
                    resolved.setdefault(module, []).extend(given)
        train = {
            module: _checked(f"{name}, {module}", module, resolved[module])
            for module in PLACES
            if module in resolved
        }
        object.__setattr__(self, "train", train)
        check_rate(name, self.rate)
        check_decay(name, self.weight_decay)
        if self.dropout is not None and not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise PlanError(f"{name}: dropout must be a rate in [0, 1), found {self.dropout!r:.80}")
        for setting in ("thaw", "freeze"):
            _check_time(name, setting, getattr(self, setting))
        end = "100%" if self.freeze is None else self.freeze
        thaw, freeze = (float(str(each).removesuffix("%")) for each in (self.thaw, end))
        alike = isinstance(self.thaw, str) == isinstance(end, str)
        if freeze == 0 or (alike and thaw >= freeze):
            raise PlanError(
                f"{name}: it would never train, for it {self.times}; let it thaw earlier or freeze "
                'later, or leave its "train" out'
            )

    @property
    def is_timed(self) -> bool:
        """Whether these layers train for a part of the training alone."""
        return bool(self.thaw) or self.freeze is not None

    @property
    def times(self) -> str:
        """When these layers train, in words; empty if they do so throughout."""
        said = [f"thaws after {_duration(self.thaw)}"] if self.thaw else []
        said += [f"freezes after {_duration(self.freeze)}"] if self.freeze is not None else []
        return " and ".join(said)

    @property
    def layers(self) -> str:
        """The layers in print: ``"5-9"``, or ``"5"`` for one."""
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"

    def __len__(self) -> int:
        return self.last - self.first + 1


def _duration(when: float | str) -> str:
    """Return a time in words: ``"30 %"``, ``"1 epoch"`` or ``"2 epochs"``."""
    if isinstance(when, str):
        return when.replace("%", " %")
    return f"{when:g} epoch{'s' if when != 1 else ''}"


def _check_time(name: str, setting: str, when: object) -> None:
    """Raise a PlanError if a time is neither a number of epochs nor a share of the training."""
    is_share = isinstance(when, str) and re.fullmatch(r"([0-9]{1,2}(\.[0-9]+)?|100)%", when)
    is_epochs = is_number(when) and 0 <= when < 1e6
    if not (is_share or is_epochs or (setting == "freeze" and when is None)):
        raise PlanError(
            f"{name}: {setting} must be a number of epochs from 0, or a share of the training such "
            f'as "30%", found {when!r:.80}'
        )


def _checked_list(place: str, techniques: Sequence[Technique]) -> Sequence[Technique]:
    if isinstance(techniques, str) or not isinstance(techniques, Sequence):
        raise PlanError(f"{place}: expected a list of techniques, found {techniques!r:.200}")
    for technique in techniques:
        if type(technique) not in TECHNIQUES.values():
            raise PlanError(
                f"{place}: {technique!r:.200} is no technique such as LoRA(r=8, alpha=16)"
            )
    if not techniques:
        raise PlanError(f"{place}: no technique is named; leave the entry out to freeze it")
    return techniques


def _checked(place: str, module: str, techniques: Sequence[Technique]) -> tuple[Technique, ...]:
    kind: type[Adaptable] = LayerNorm if module.endswith("LayerNorm") else Linear
    if module in (ATTENTION_OUTPUT, OUTPUT):
        kind = SublayerEnd
    with _at(place):
        return in_order(kind, techniques)


@contextlib.contextmanager
def _at(place: str, then: str = ": ") -> Iterator[None]:
    """Name the place in a plan where what is done is refused."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{place}{then}{error}") from None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a question that names the nearest of the known names, if one is near."""
    near = nearest(str(name), sorted(known))
    return f" (did you mean {' or '.join(near)}?)" if near else ""


@dataclass(frozen=True)
class Plan:
    """What trains in a whole model, stratum by stratum; the classifier always trains.

    Attributes
    ----------
    name : str
        The method's name, or any other.
    num_layers : int
        L, the number of layers of the model that it is for.
    strata : sequence of Stratum
        In order from layer 0 to layer L - 1, without gap or overlap.
    embeddings, pooler : {"frozen", "full"}
        Whether these train: the embeddings as long as the first stratum, the pooler as the last.
    rate_decay : float
        Factor of the learning rate from each layer to the one below it, at most 1: layer l learns
        at rate_decay ** (L - 1 - l) of the rate, the embeddings at rate_decay ** L (Howard and
        Ruder, 2018). The pooler and the head learn at the full rate.

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
    rate_decay: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strata", tuple(self.strata))
        _check_name(self.name)
        called = one_line(self.name)
        check_num_layers(self.num_layers)
        expected = 0
        for number, stratum in enumerate(self.strata, 1):
            if stratum.first != expected:
                raise PlanError(
                    f"{called}: stratum {number}, {one_line(stratum.name)}, begins at layer "
                    f"{stratum.first}, but layer {expected} comes next; strata follow each other "
                    "without gap or overlap"
                )
            expected = stratum.last + 1
        if expected != self.num_layers:
            raise PlanError(
                f"{called}: the strata end at layer {expected - 1}, but the last of "
                f"{self.num_layers} layers is {self.num_layers - 1}"
            )
        self._refuse_settings_in_vain(called)
        for name in ("embeddings", "pooler"):
            if getattr(self, name) not in ("frozen", "full"):
                raise PlanError(
                    f'{called}: {name} must be "frozen" or "full", found '
                    f"{getattr(self, name)!r:.200}"
                )
        if not is_number(self.rate_decay) or not 0 < self.rate_decay <= 1:
            raise PlanError(
                f"{called}: rate_decay, a factor of the learning rate from layer to layer, must be "
                f"above 0 and at most 1, found {self.rate_decay!r:.80}"
            )
        if self.rate_decay**self.num_layers < _SMALLEST_RATE:
            raise PlanError(
                f"{called}: rate_decay {self.rate_decay!r} leaves the first of {self.num_layers} "
                "layers no rate at all; let it be nearer to 1"
            )

    def _refuse_settings_in_vain(self, called: str) -> None:
        """Refuse settings of the training of a stratum in which nothing trains."""
        for stratum in self.strata:
            is_followed = (stratum is self.strata[0] and self.embeddings == "full") or (
                stratum is self.strata[-1] and self.pooler == "full"
            )
            known = ("rate", "weight_decay", *(() if is_followed else ("thaw", "freeze")))
            in_vain = [name for name in known if name in _unusual(stratum)]
            if in_vain and not stratum.train:
                raise PlanError(
                    f"{called}: nothing trains in {one_line(stratum.name)} (layers "
                    f"{stratum.layers}), so that its {listed(in_vain, ' and ')} would change "
                    'nothing; leave that out, or name under "train" what trains'
                )

    @property
    def writes_pretrained(self) -> bool:
        """Whether a pre-trained tensor of embeddings, encoder or pooler is trained directly."""
        return "full" in (self.embeddings, self.pooler) or any(
            technique.writes_pretrained
            for stratum in self.strata
            for techniques in stratum.train.values()
            for technique in techniques
        )

    def to_json(self) -> str:
        """Return the plan as JSON, from which :meth:`from_json` makes an equal plan."""
        strata = [
            {
                "name": stratum.name,
                "layers": [stratum.first, stratum.last],
                "train": {
                    module: _techniques_to_json(techniques)
                    for module, techniques in stratum.train.items()
                },
                **_unusual(stratum),
            }
            for stratum in self.strata
        ]
        entries = {
            "format": _FORMAT,
            "name": self.name,
            "num_layers": self.num_layers,
            "embeddings": self.embeddings,
            "pooler": self.pooler,
            **_unusual(self),
            "strata": strata,
        }
        return json.dumps(entries, indent=2)

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan", name: str = "custom") -> Plan:
        """Make a plan from the JSON of :meth:`to_json`, or from JSON written by hand.

        By hand, all that has a default may be left out::

            {"strata": [
              {"layers": "0-4"},
              {"layers": "5-9", "train": {"all": "bias-delta"}},
              {"layers": "10-23", "rate": 0.5, "train": {
                "query, key, value": {"lora": {"r": 8, "alpha": 16}},
                "all": "bias-delta",
                "attention.output": ["series", {"parallel": {"scaling": 2}}]}}
            ]}

        =============  ===========================================================================
        of the plan    ``strata``; ``name``, ``num_layers`` (by default that of the strata),
                       ``embeddings``, ``pooler``, ``rate_decay``, ``format``
        of a stratum   ``layers``: ``"0-4"`` or ``[0, 4]``, both included and numbered from 0, or
                       ``"5"``; ``train``; ``name`` (by default group 1, group 2 ...); the
                       settings of :class:`Stratum`
        of ``train``   a module, several with commas between them, or ``"all"``: its technique,
                       or a list of them
        a technique    its name, or ``{name: {setting: value}}``; a setting that is left out has
                       its default
        =============  ===========================================================================

        Parameters
        ----------
        text : str
            JSON.
        source : str
            The name of the text in an error message.
        name : str
            The plan's name if the text has none.

        Raises
        ------
        PlanError
            If it is not such JSON, or the plan is impossible. It names the stratum by number and
            name, the entry, the technique and the setting, and for a misspelt name the nearest.
        """
        if not isinstance(text, str):
            raise PlanError(f"{source} must be text in JSON, found a {type(text).__name__}")
        try:
            entries = json.loads(text, object_pairs_hook=no_duplicates)
            known = {each.name for each in dataclasses.fields(cls)} | {"format"}
            _refuse_unknown("a plan", entries, known)
            if entries.get("format", _FORMAT) != _FORMAT:
                found = entries["format"]
                raise PlanError(f'"format" must be "{_FORMAT}", found {found!r:.200}')
            given = entries.get("strata")
            if not isinstance(given, list) or not given:
                raise PlanError(
                    '"strata" must be a list of one stratum or more'
                    + (f", found {_shown(given)}" if "strata" in entries else "; it is missing")
                )
            num_layers = entries.get("num_layers", MOST_LAYERS)
            check_num_layers(num_layers)
            if len(given) > num_layers:
                raise PlanError(f'"strata" are {len(given)}, for {num_layers} layers')
            strata = [_stratum_from_json(number, each) for number, each in enumerate(given, 1)]
            settings = {"name": name, "num_layers": strata[-1].last + 1, **entries}
            settings.pop("format", None)
            return cls(**{**settings, "strata": strata})
        except PlanError as error:
            raise PlanError(f"{source}: {one_line(str(error), 600)}") from None
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{source} is not JSON: {one_line(str(error))}") from None


def _techniques_to_json(techniques: Sequence[Technique]) -> Any:
    written: list[Any] = []
    for technique in techniques:
        own = [each.name for each in dataclasses.fields(technique) if not each.kw_only]
        settings = {name: getattr(technique, name) for name in own} | _unusual(technique)
        written.append({technique.name: settings} if settings else technique.name)
    return written[0] if len(written) == 1 else written


def _unusual(thing: Technique | Stratum | Plan) -> dict[str, Any]:
    """Return the settings by keyword alone that do not have their default."""
    return {
        each.name: getattr(thing, each.name)
        for each in dataclasses.fields(thing)
        if each.kw_only and getattr(thing, each.name) != each.default
    }


def _stratum_from_json(number: int, entries: Any) -> Stratum:
    settings = {each.name for each in dataclasses.fields(Stratum) if each.kw_only}
    with _at(f"stratum {number}"):
        _refuse_unknown("a stratum", entries, {"name", "layers", "train", *settings})
        name = entries.get("name", f"group {number}")
        _check_name(name)
    with _at(f"stratum {number}", ", "):  # what follows names the stratum first
        with _at(one_line(name)):
            first, last = _layers_from_json(entries.get("layers"))
            train = entries.get("train", {})
            if not isinstance(train, dict):
                raise PlanError(
                    '"train" must map modules to techniques, as in {"all": "bias-delta"}, found '
                    + _shown(train)
                )
        table = {}
        for entry, given in train.items():
            with _at(f"{one_line(name)}, {one_line(entry)}"):
                several = given if isinstance(given, list) else [given]
                table[entry] = [_technique_from_json(each) for each in several]
        return Stratum(
            name, first, last, table, **{each: entries[each] for each in settings & entries.keys()}
        )


def _layers_from_json(layers: Any) -> tuple[Any, Any]:
    """Return the first and the last layer of ``"0-4"``, ``"5"`` or ``[0, 4]``."""
    if isinstance(layers, list) and len(layers) == 2:
        return layers[0], layers[1]
    ends = re.fullmatch(r"([0-9]{1,9})(?: ?- ?([0-9]{1,9}))?", str(layers))
    if not isinstance(layers, str) or ends is None:
        raise PlanError(
            '"layers" must be the first and the last, such as "0-4" or [0, 4], or a single one '
            'such as "5"'
            + (f", found {_shown(layers)}" if layers is not None else "; it is missing")
            + ("; shares of the layers are for a method's name" if "%" in str(layers) else "")
        )
    return int(ends[1]), int(ends[2] or ends[1])


def _technique_from_json(given: Any) -> Technique:
    name: Any = given
    settings: Any = {}
    if isinstance(given, dict) and len(given) == 1:
        ((name, settings),) = given.items()
    if isinstance(given, dict) and len(given) > 1:
        raise PlanError(
            f"{_shown(given)} names {len(given)} techniques; write a list with one object for each"
        )
    if not isinstance(name, str) or name not in TECHNIQUES:
        raise PlanError(
            f"{_shown(name)} is no technique{did_you_mean(name, TECHNIQUES)}; there are "
            f"{', '.join(TECHNIQUES)}; one of your own must be registered first (spafit.register)"
        )
    if not isinstance(settings, dict):
        raise PlanError(
            f'{_shown(given)} is no technique; write "{name}", or its settings as an object'
        )
    technique = TECHNIQUES[name]
    fields = dataclasses.fields(technique)
    _refuse_unknown(f"the technique {name}", settings, {each.name for each in fields})
    missing = [each.name for each in fields if _must_be_given(each) and each.name not in settings]
    if missing:
        raise PlanError(f"the technique {name} lacks its setting {listed(missing, ' and ')}")
    return technique(**{key: _as_tuple(value) for key, value in settings.items()})


def _shown(value: Any) -> str:
    """Return a value as a plan file has it."""
    return f"{json.dumps(value, ensure_ascii=False):.200}"


def _as_tuple(value: Any) -> Any:
    """Give a setting as it was before JSON made a list of a tuple."""
    return tuple(_as_tuple(each) for each in value) if isinstance(value, list) else value


def _must_be_given(setting: dataclasses.Field[Any]) -> bool:
    return setting.default is setting.default_factory is dataclasses.MISSING


def _refuse_unknown(thing: str, entries: Any, known: set[str]) -> None:
    if not isinstance(entries, dict):
        raise PlanError(f"{thing} must be a JSON object, found {_shown(entries)}")
    unknown = sorted(entries.keys() - known)
    if unknown:
        raise PlanError(
            f"{thing} has no setting {listed(unknown, ' or ')}{did_you_mean(unknown[0], known)}; "
            f"there are {', '.join(sorted(known))}"
        )


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise PlanError(f"a name must be text, found {name!r:.200}")


def path_in_model(path: str, number: int) -> str:
    """Return the name in a model of one of :data:`PLACES` in the layer of a number."""
    return f"bert.encoder.{path.replace('layer', f'layer.{number}', 1)}"


def check_num_layers(num_layers: object) -> None:
    """Raise a PlanError if ``num_layers`` is not a number of layers."""
    if type(num_layers) is not int or not 1 <= num_layers <= MOST_LAYERS:
        raise PlanError(
            f"num_layers must be a whole number from 1 to {MOST_LAYERS}, found {num_layers!r:.200}"
        )


class Trained(NamedTuple):
    """How a parameter that a plan declares is trained.

    Attributes
    ----------
    rate : float
        Factor of the run's learning rate.
    weight_decay : float or None
        AdamW's; None is the run's.
    thaw, freeze : float, str or None
        When it begins to train and when it ends, as in :class:`Stratum`.
    """

    rate: float = 1.0
    weight_decay: float | None = None
    thaw: float | str = 0
    freeze: float | str | None = None

    def steps(self, steps_an_epoch: float, total_steps: int) -> tuple[int, int]:
        """Return the numbers of steps after which it begins and ceases to train."""
        first, end = (
            round(float(when.removesuffix("%")) / 100 * total_steps)
            if isinstance(when, str)
            else round(when * steps_an_epoch)
            for when in (self.thaw, "100%" if self.freeze is None else self.freeze)
        )
        return first, end

    def trains_at(self, step: int, steps_an_epoch: float, total_steps: int) -> bool:
        """Return whether it trains in the step that follows ``step`` steps."""
        first, end = self.steps(steps_an_epoch, total_steps)
        return first <= step < end

    def decay(self, parameter: torch.Tensor, of_matrices: float, of_vectors: float) -> float:
        """Return its weight decay: the plan's, or the run's of such a parameter."""
        if self.weight_decay is not None:
            return self.weight_decay
        return of_matrices if parameter.dim() > 1 else of_vectors
