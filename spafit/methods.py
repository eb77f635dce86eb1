"""Make the plan of a method by name: a row of the paper's Table 1, SPAFIT-[N1]-[N2]-[I|II], ..."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

from spafit.adapters import (
    IA3,
    Bias,
    DirectBias,
    Full,
    LoRA,
    ParallelAdapter,
    PfeifferAdapter,
    SeriesAdapter,
)
from spafit.errors import PlanError, listed
from spafit.plans import (
    ATTENTION_DENSE,
    ATTENTION_OUTPUT,
    INTERMEDIATE,
    KEY,
    MODULES,
    OUTPUT,
    OUTPUT_DENSE,
    OUTPUT_NORM,
    QUERY,
    VALUE,
    Plan,
    Stratum,
    check_num_layers,
    did_you_mean,
)
from spafit.techniques import Technique

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

#: Methods of the literature that are not in Table 1: the adapters that section 2.1 describes,
#: (IA)³, and the head alone. Each is the same in all layers.
OTHERS = ("houlsby", "pfeiffer", "parallel", "ia3", "linear-probe")

R, ALPHA = 64, 128.0
"""LoRA's rank and scale in the paper, and here where nothing is said."""

# Names of rows of Table 1 for short.
SHORT = ("full", "bitfit", "lora-i", "lora-ii")


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
        ``"bitfit"``, ``"lora-i"`` and ``"lora-ii"`` for short); one of :data:`OTHERS`: the adapters
        ``"houlsby"``, ``"pfeiffer"`` and ``"parallel"``, ``"ia3"``, and ``"linear-probe"``, which
        trains the head alone (Kumar et al., 2022, arXiv 2202.10054); ``SPAFIT-[N1]-[N2]-[I|II]``
        with any N1 < N2, each a layer or, as in ``SPAFIT-20%-40%-II``, the share of the L layers up
        to the end of group 1 or 2; a JSON file of a plan; or a Plan, which is checked against
        ``num_layers`` and returned.
    num_layers : int
        L.
    r : int, optional
        LoRA's rank; the paper's 64 by default.
    alpha : float, optional
        LoRA's scale before division by r; the paper's 128 by default.
    lora_dropout : float, optional
        Rate at which the input of A is dropped; 0 by default.
    bias : {"delta", "direct"}, optional
        Whether a :class:`~spafit.adapters.BiasDelta` trains beside each frozen bias (the default),
        or the bias itself.
    numbering : {"table-2", "text"}, optional
        How layers are numbered for N1 and N2, the last layers of groups 1 and 2. ``"table-2"``, the
        default: from 0, so that group 1 is layers 0 .. N1; only this gives all six parameter counts
        of SPAFIT in the paper's Table 2. ``"text"``, another reading of its section 3.2: from 1, so
        that group 1 is layers 1 .. N1.

    Returns
    -------
    Plan

    Raises
    ------
    PlanError
        If the name is unknown, a group would have no layer (N1 >= N2, or N2 at the last layer or
        beyond), a setting is out of range, or settings are given with a Plan or file, which has its
        own.

    Examples
    --------
    >>> [stratum.layers for stratum in plan("SPAFIT-4-9-II", num_layers=24).strata]
    ['0-4', '5-9', '10-23']
    >>> plan("spafit-20%-40%-ii", 24).strata == plan("SPAFIT-4-9-II", 24).strata
    True
    """
    check_num_layers(num_layers)
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
                f"{num_layers}; name another model (--model), or change its layers"
            )
        return ready
    if bias not in (None, "delta", "direct"):
        raise PlanError(f'bias must be "delta" or "direct", found {bias!r}')
    if numbering not in (None, "table-2", "text"):
        raise PlanError(f'numbering must be "table-2" or "text", found {numbering!r}')
    lora = LoRA(
        R if r is None else r,
        ALPHA if alpha is None else alpha,
        0.0 if lora_dropout is None else lora_dropout,
    )
    given = {
        "r": r,
        "alpha": alpha,
        "lora_dropout": lora_dropout,
        "bias": bias,
        "numbering": numbering,
    }
    in_vain = [name for name, value in given.items() if value is not None]
    if in_vain and _key(method) in OTHERS:
        raise PlanError(f"{method} has no {listed(in_vain, ' and ')}; leave that out")
    biases: Technique = DirectBias() if bias == "direct" else Bias()
    return _by_name(method, num_layers, lora, biases, numbering or "table-2")


def _key(method: object) -> str:
    """Return a method's name in small letters, with a dash between its words."""
    key = re.sub(r"[\s_]+", "-", str(method).strip()).lower()
    return "linear-probe" if key == "linear-probing" else key


def _by_name(method: str, L: int, lora: LoRA, bias: Technique, numbering: str) -> Plan:
    lora_I = dict.fromkeys((QUERY, KEY, VALUE), (lora,))  # W_q, W_k, W_v
    lora_II = {**lora_I, ATTENTION_DENSE: (lora,)}  # and W_3
    all_biases = dict.fromkeys(MODULES, (bias,))
    late_biases = dict.fromkeys((INTERMEDIATE, OUTPUT_DENSE, OUTPUT_NORM), (bias,))

    if not isinstance(method, str):
        raise PlanError(f"a method is a name, a plan file or a Plan, found {method!r}")
    key = _key(method)
    if key in ("full", "fine-tuning", "full-fine-tuning"):
        everything = {module: (Full(),) for module in MODULES}
        strata = [Stratum("all layers", 0, L - 1, everything)]
        return Plan("Full Fine-tuning", L, strata, embeddings="full", pooler="full")
    if key in ("bitfit", "full-bitfit"):
        return Plan("Full BitFit", L, [Stratum("all layers", 0, L - 1, all_biases)])
    if key in ("lora-i", "full-lora-i"):
        return Plan("Full LoRA-I", L, [Stratum("all layers", 0, L - 1, lora_I)])
    if key in ("lora-ii", "full-lora-ii"):
        return Plan("Full LoRA-II", L, [Stratum("all layers", 0, L - 1, lora_II)])

    in_every_layer: dict[str, tuple[str, dict[str, tuple[Technique, ...]]]] = {
        "houlsby": ("Houlsby", dict.fromkeys((ATTENTION_OUTPUT, OUTPUT), (SeriesAdapter(),))),
        "pfeiffer": ("Pfeiffer", {OUTPUT: (PfeifferAdapter(),)}),
        "parallel": ("Parallel", dict.fromkeys((ATTENTION_OUTPUT, OUTPUT), (ParallelAdapter(),))),
        "ia3": ("(IA)³", {KEY: (IA3(),), VALUE: (IA3(),), OUTPUT_DENSE: (IA3(of="input"),)}),
        "linear-probe": ("Linear probing", {}),
    }
    if key in in_every_layer:
        name, train = in_every_layer[key]
        return Plan(name, L, [Stratum("all layers", 0, L - 1, train)])

    end = r"([0-9]{1,4}(?:\.[0-9]{1,4})?%|[0-9]{1,4})"  # a layer or a share
    parts = re.fullmatch(rf"spafit-{end}-{end}-(i{{1,2}})", key)
    if parts is None:
        raise PlanError(
            f"there is no method {method!r:.80}{did_you_mean(key, (*METHODS, *OTHERS, *SHORT))}; "
            f"there are {', '.join(METHODS)}, any other "
            f"SPAFIT-[N1]-[N2]-[I|II] such as SPAFIT-20%-40%-II, {', '.join(OTHERS)}, or a plan "
            "file (.json)"
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
        Stratum("group 3", end_2, L - 1, {**matrices, **late_biases}),  # Table 1's FT-I or FT-II
    ]
    # Which layers a name means depends on the numbering, so the name says if it is not the default.
    return Plan(name if numbering == "table-2" else f"{name} (text numbering)", L, strata)


def _layers_up_to(end: str, L: int, numbering: str) -> int:
    """Return the number of layers up to and including N1 or N2."""
    if end.endswith("%"):
        return math.floor(Fraction(end[:-1]) / 100 * L + Fraction(1, 2))  # exact: halves go up
    return int(end) + 1 if numbering == "table-2" else int(end)


def _read(path: Path) -> Plan:
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise PlanError(f"the plan file {path} cannot be read: it is no file; name one")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not UTF-8, or no possible name of a file
        raise PlanError(f"the plan file {path} cannot be read: {error}") from None
    return Plan.from_json(text, source=str(path), name=path.stem)
