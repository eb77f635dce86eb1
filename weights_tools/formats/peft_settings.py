"""An ``adapter_config.json`` of PEFT: what it says, and the modules that it names.

Each of PEFT's settings is honoured, or says nothing about what is computed, or is refused unless it
has the value with which nothing changes. An unknown one is taken for such a setting.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spafit.config import is_number
from spafit.errors import WeightsError, listed, one_line
from weights_tools.formats.foreign import read_object
from weights_tools.formats.patterns import full_matches, is_plain

CONFIG = "adapter_config.json"
KINDS = ("LORA", "IA3", "LN_TUNING")

_HONOURED = {
    "LORA": "r lora_alpha lora_dropout use_rslora bias rank_pattern alpha_pattern "
    "layers_to_transform layers_pattern",
    "IA3": "feedforward_modules",
    "LN_TUNING": "",
}
_HONOURED_IN_ALL = "peft_type task_type target_modules exclude_modules modules_to_save auto_mapping"

# What has no part in what is computed: where the files come from, how values were drawn.
_NO_MATTER = frozenset(
    "base_model_name_or_path revision peft_version inference_mode init_ia3_weights megatron_core "
    "qalora_group_size runtime_config eva_config".split()
)

# How LoRA was drawn, where that left the base as it was. The others change the base too, and what
# they add belongs to the changed one.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")

_ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Settings:
    """A checked configuration.

    Attributes
    ----------
    path : Path
        The file.
    kind : str
        One of :data:`KINDS`.
    entries : dict
        All that it holds.
    notes : list of str
        The unknown settings that were ignored.
    """

    path: Path
    kind: str
    entries: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def error(self, what: str) -> WeightsError:
        """Return an error about the file."""
        return WeightsError(f"{self.path}: {what}")

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of names of modules; of ``modules_to_save`` and the like."""
        given = self.entries.get(key)
        if given is None:
            return ()
        if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
            raise self.error(f"{key} must be a list of names, found {given!r:.120}")
        return tuple(given)

    def number(self, key: str, default: float) -> float:
        """Return a number."""
        value = self.entries.get(key, default)
        if not is_number(value):
            raise self.error(f"{key} must be a number, found {value!r:.80}")
        return value

    def flag(self, key: str) -> bool:
        """Return a truth value; False if it is missing."""
        value = self.entries.get(key, False)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, found {value!r:.80}")
        return value

    def pattern(self, key: str) -> dict[str, float]:
        """Return ``rank_pattern`` or ``alpha_pattern``."""
        given = self.entries.get(key) or {}
        if not isinstance(given, dict) or not all(map(is_number, given.values())):
            raise self.error(f"{key} must map names of modules to numbers, found {given!r:.120}")
        return given

    def targets(self, modules: Sequence[str]) -> list[str]:
        """Return the modules that the adapter changes, in their order.

        Parameters
        ----------
        modules : sequence of str
            The names of all modules of the model that hold parameters.
        """
        chosen = self.entries.get("target_modules")
        if chosen == _ALL_LINEAR:
            found = [each for each in modules if not re.search(r"classifier|embeddings|Norm", each)]
        elif isinstance(chosen, str):
            matched = full_matches([chosen], modules, self.path)[chosen]
            found = [each for each in modules if each in matched]
        else:
            ends = self.names("target_modules")
            if not ends:
                raise self.error("target_modules names no module")
            found = [each for each in modules if _ends(each, ends)]
            found = [each for each in found if self._is_in_layers(each)]
        kept = self._excluded(modules)
        return [each for each in found if each not in kept]

    def _excluded(self, modules: Sequence[str]) -> set[str]:
        """Return what PEFT leaves out: what ``exclude_modules`` names, and what is saved whole."""
        chosen = self.entries.get("exclude_modules")
        if isinstance(chosen, str) and chosen:
            left_out = set(full_matches([chosen], modules, self.path)[chosen])
        else:
            left_out = {each for each in modules if _ends(each, self.names("exclude_modules"))}
        for name in self.names("modules_to_save"):
            if not is_plain(name):
                raise self.error(f"modules_to_save has {name!r:.80}; only plain names are read")
            held = re.compile(rf"(^|.*\.){name}($|\..*)")
            left_out |= {each for each in modules if held.match(each)}
        return left_out

    def _is_in_layers(self, module: str) -> bool:
        """Return whether ``layers_to_transform`` leaves a module of a list of targets in."""
        layers = self.entries.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        numbers = layers if isinstance(layers, list) else [layers]
        if not all(type(each) is int for each in numbers):
            raise self.error(f"layers_to_transform must be layers' numbers, found {layers!r:.80}")
        given = self.entries.get("layers_pattern") or [r"[^.]*"]
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, list) or not all(
            isinstance(each, str) and (is_plain(each) or each == r"[^.]*") for each in names
        ):
            raise self.error(f"layers_pattern must be plain names, found {given!r:.80}")
        for name in names:
            found = re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module)
            if found is not None:
                return int(found[1]) in numbers
        return False

    def by_pattern(self, key: str, modules: Sequence[str], default: float) -> dict[str, float]:
        """Return the value of each module: of the first pattern that its name ends with."""
        given = self.pattern(key)
        ends = {each: rf"(.*\.)?({each})" for each in given}
        matched = full_matches(ends.values(), modules, self.path)
        return {
            module: next((given[k] for k, end in ends.items() if module in matched[end]), default)
            for module in modules
        }

    def feedforward(self, modules: Sequence[str]) -> set[str]:
        """Return the modules of which (IA)³ scales the input."""
        chosen = self.entries.get("feedforward_modules")
        if isinstance(chosen, str):
            return set(full_matches([chosen], modules, self.path)[chosen])
        return {each for each in modules if each.endswith(self.names("feedforward_modules"))}

    def is_saved_whole(self, parameter: str) -> bool:
        """Return whether ``modules_to_save`` names a module that holds this parameter."""
        ends = self.names("modules_to_save")
        parts = parameter.split(".")
        return any(".".join(parts[:n]).endswith(ends) for n in range(1, len(parts)))


def read_settings(folder: Path) -> Settings:
    """Read and check an ``adapter_config.json``.

    Raises
    ------
    WeightsError
        If it cannot be read, or asks for what spafit does not compute; the setting is named.
    """
    path = folder / CONFIG
    entries = read_object(path)
    kind = entries.get("peft_type")
    if kind not in KINDS:
        raise WeightsError(
            f"{path}: adapters of the type {kind!r:.80} have no form in spafit; {', '.join(KINDS)} "
            "have one"
        )
    settings = Settings(path, kind, entries)
    task_type = entries.get("task_type")
    if task_type not in (None, "SEQ_CLS"):
        raise settings.error(f"task_type is {task_type!r:.80}; spafit classifies texts (SEQ_CLS)")
    _check_model(settings)
    honoured = {*_HONOURED_IN_ALL.split(), *_HONOURED[kind].split()}
    for key, value in sorted(entries.items()):
        if key in honoured or key in _NO_MATTER:
            continue
        if key == "init_lora_weights":
            if value not in _PLAIN_STARTS:
                raise settings.error(
                    f"init_lora_weights is {value!r:.80}, with which PEFT changes the base itself; "
                    "convert the adapter to plain LoRA with PEFT "
                    "(path_initial_model_for_weight_conversion), and import that"
                )
        elif not _is_neutral(value):
            raise settings.error(f"{one_line(key)} is {value!r:.120}, which spafit does not honour")
        elif key not in _KNOWN:
            settings.notes.append(f"ignored: {one_line(key)}, unknown, is {value!r:.20}")
    if kind == "LORA":
        _check_lora(settings)
    return settings


_KNOWN = frozenset(
    "fan_in_fan_out use_dora use_qalora lora_bias layer_replication trainable_token_indices "
    "target_parameters alora_invocation_tokens velora_config monteclora_config use_bdlora "
    "arrow_config kasa_config megatron_config loftq_config corda_config lora_ga_config "
    "ensure_weight_tying".split()
)


def _is_neutral(value: object) -> bool:
    """Return whether a setting is off: null, false, 0 or empty."""
    return value in (None, False, 0, "", [], {})


def _check_model(settings: Settings) -> None:
    mapping = settings.entries.get("auto_mapping")
    model = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    if mapping is not None and model != "BertForSequenceClassification":
        raise settings.error(
            f"auto_mapping names {model!r:.80}; spafit's model is a BertForSequenceClassification"
        )


def _check_lora(settings: Settings) -> None:
    entries = settings.entries
    if entries.get("bias", "none") not in ("none", "all", "lora_only"):
        raise settings.error(f"bias must be none, all or lora_only, found {entries['bias']!r:.80}")
    by_layer = [key for key in ("layers_to_transform", "layers_pattern") if entries.get(key)]
    if by_layer and isinstance(entries.get("target_modules"), str):
        raise settings.error(
            f"{listed(by_layer, ' and ')} beside a regular expression of target_modules: PEFT "
            "refuses it too; write target_modules as a list"
        )


def _ends(module: str, ends: Sequence[str]) -> bool:
    """Return whether a module's name is one of the names, or ends with one after a dot."""
    return any(module == end or module.endswith(f".{end}") for end in ends)
