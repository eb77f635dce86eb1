"""Read what the bytes of a weight or adapter file declare, without spafit's readers.

This is the oracle for the mutated files: json, struct and numpy, and a second implementation of the
format's rules.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

DTYPES = {
    "F64": (8, torch.float64), "F32": (4, torch.float32), "F16": (2, torch.float16),
    "BF16": (2, torch.bfloat16), "F8_E4M3": (1, torch.float8_e4m3fn),
    "F8_E5M2": (1, torch.float8_e5m2), "I64": (8, torch.int64), "I32": (4, torch.int32),
    "I16": (2, torch.int16), "I8": (1, torch.int8), "U64": (8, torch.uint64),
    "U32": (4, torch.uint32), "U16": (2, torch.uint16), "U8": (1, torch.uint8),
    "BOOL": (1, torch.bool),
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


class FaultError(Exception):
    """Why a file must be refused."""


@dataclass(frozen=True)
class Tensor:
    """One tensor as the file has it."""

    code: str
    shape: tuple[int, ...]
    content: bytes

    @property
    def dtype(self) -> torch.dtype:
        """Its type in torch."""
        return DTYPES[self.code][1]

    @property
    def sick(self) -> bool:
        """Whether a value is NaN or infinite, by the bits of its exponent."""
        masks = {
            "F64": ("<u8", 0x7FF0_0000_0000_0000), "F32": ("<u4", 0x7F80_0000),
            "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F8_E5M2": ("u1", 0x7C),
            "F8_E4M3": ("u1", 0x7F),  # has no infinity: all ones alone is NaN
        }  # fmt: skip
        if self.code not in masks:
            return False
        unsigned, mask = masks[self.code]
        bits = np.frombuffer(self.content, dtype=unsigned)
        return bool(((bits & np.array(mask, dtype=unsigned)) == mask).any())

    def converted(self) -> torch.Tensor:
        """Return its values in float32, by numpy; for the four types of weights."""
        shape = self.shape
        if self.code == "BF16":  # the upper half of a float32
            wide = np.frombuffer(self.content, dtype="<u2").astype("<u4") << 16
            return torch.from_numpy(wide.view("<f4").reshape(shape).copy())
        read = np.frombuffer(
            self.content, dtype={"F64": "<f8", "F32": "<f4", "F16": "<f2"}[self.code]
        )
        with np.errstate(over="ignore"):
            return torch.from_numpy(read.astype("<f4").reshape(shape).copy())


@dataclass(frozen=True)
class Declared:
    """A sound file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def sick(self) -> set[str]:
        """Name the tensors with values that are not finite."""
        return {name for name, tensor in self.tensors.items() if tensor.sick}


def strict(text: str) -> Any:
    """Read JSON in which no key stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise FaultError("a key stands twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FaultError(f"no JSON: {error}") from None


def whole(value: Any) -> bool:
    """Return whether a value is a whole number that can count something."""
    return type(value) is int and 0 <= value < 2**63


def declared(raw: bytes) -> Declared:
    """Read a safetensors file, or raise a FaultError."""
    if len(raw) < 8:
        raise FaultError("no length")
    (length,) = struct.unpack("<Q", raw[:8])
    if length > len(raw) - 8:
        raise FaultError("the header is cut off")
    try:
        text = raw[8 : 8 + length].decode("utf-8")
    except UnicodeDecodeError:
        raise FaultError("not UTF-8") from None
    header = strict(text)
    if not isinstance(header, dict):
        raise FaultError("no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(each) is not str for each in metadata.values()):
        raise FaultError("metadata that are not texts")
    data = raw[8 + length :]
    tensors, used = {}, []
    for name, entry in header.items():
        tensors[name], start, end = one_tensor(entry, data)
        used.append((start, end))
    place = 0
    for start, end in sorted(used):
        if start != place:
            raise FaultError("an overlap or a hole")
        place = end
    if place != len(data):
        raise FaultError("bytes too many or too few")
    return Declared(tensors, metadata)


def one_tensor(entry: Any, data: bytes) -> tuple[Tensor, int, int]:
    """Read an entry of the header."""
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        raise FaultError("an entry of other keys")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(code) is not str or code not in DTYPES:
        raise FaultError("no such type")
    if type(shape) is not list or len(shape) > 64 or not all(map(whole, shape)):
        raise FaultError("no shape")
    if math.prod(max(1, size) for size in shape) >= 2**63:
        raise FaultError("a shape that cannot be indexed")
    if type(offsets) is not list or len(offsets) != 2 or not all(map(whole, offsets)):
        raise FaultError("no offsets")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPES[code][0]:
        raise FaultError("offsets of another length")
    return Tensor(code, tuple(shape), data[start:end]), start, end


def declared_folder(files: dict[str, bytes]) -> Declared:
    """Read a folder of one file, or of several and an index, or raise a FaultError."""
    index = "model.safetensors.index.json"
    if index not in files:
        if "model.safetensors" not in files:
            raise FaultError("no weights")
        return declared(files["model.safetensors"])
    try:
        content = strict(files[index].decode("utf-8"))
    except UnicodeDecodeError:
        raise FaultError("not UTF-8") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FaultError("no weight_map")
    tensors: dict[str, Tensor] = {}
    found: dict[str, str] = {}
    for shard in weight_map.values():
        if type(shard) is not str or shard not in files or not shard.endswith(".safetensors"):
            raise FaultError("no such file")
    for shard in set(weight_map.values()):
        for name, tensor in declared(files[shard]).tensors.items():
            if name in tensors:
                raise FaultError("a tensor in two files")
            tensors[name], found[name] = tensor, shard
    if found != weight_map:
        raise FaultError("the index and the files do not agree")
    return Declared(tensors, {})


# The legend's sizes, of the tiny model and of no default.
L, A, D, F, V, P, T, C, RANK = 2, 3, 6, 10, 11, 7, 5, 4, 8

# Module of a layer -> (out, in) of its matrix, or its one size.
MODULES: dict[str, tuple[int, ...]] = {
    "layer.attention.self.query": (D, D),
    "layer.attention.self.key": (D, D),
    "layer.attention.self.value": (D, D),
    "layer.attention.output.dense": (D, D),
    "layer.attention.output.LayerNorm": (D,),
    "layer.intermediate.dense": (F, D),
    "layer.output.dense": (D, F),
    "layer.output.LayerNorm": (D,),
}


def base_shapes() -> dict[str, tuple[int, ...]]:
    """Return the parameters of the tiny model without its head."""
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (V, D),
        "bert.embeddings.position_embeddings.weight": (P, D),
        "bert.embeddings.token_type_embeddings.weight": (T, D),
        "bert.embeddings.LayerNorm.weight": (D,),
        "bert.embeddings.LayerNorm.bias": (D,),
        "bert.pooler.dense.weight": (D, D),
        "bert.pooler.dense.bias": (D,),
    }
    for layer in range(L):
        for module, size in MODULES.items():
            name = f"bert.encoder.{module.replace('layer.', f'layer.{layer}.', 1)}"
            shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return shapes


HEAD = {"classifier.weight": (C, D), "classifier.bias": (C,)}


def told(metadata: dict[str, str]) -> tuple[Any, Any, Any]:
    """Read an adapter's plan, task and labels, or raise a FaultError."""
    if metadata.get("spafit_adapter") != "1":
        raise FaultError("no adapter")
    try:
        return tuple(strict(metadata[key]) for key in ("plan", "task", "labels"))  # type: ignore[return-value]
    except KeyError as error:
        raise FaultError(f"lacks {error}") from None


def trained_by(plan: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[float, float]]]:
    """Return the shapes of what a plan trains, and (alpha / r, dropout) of each LoRA."""
    if not isinstance(plan, dict) or plan.get("format") != "spafit-plan-1":
        raise FaultError("no plan")
    if set(plan) - {"format", "name", "num_layers", "embeddings", "pooler", "strata"}:
        raise FaultError("a plan of other keys")
    if plan.get("num_layers") != L or type(plan["num_layers"]) is not int:
        raise FaultError("another depth")
    shapes: dict[str, tuple[int, ...]] = {}
    loras: dict[str, tuple[float, float]] = {}
    for part in ("embeddings", "pooler"):
        mode = plan.get(part, "frozen")
        if mode not in ("frozen", "full"):
            raise FaultError(f"no mode of the {part}")
        if mode == "full":
            own = {k: v for k, v in base_shapes().items() if k.startswith(f"bert.{part}.")}
            shapes |= own
    following = 0
    for stratum in plan["strata"]:
        if set(stratum) - {"name", "layers", "train"}:
            raise FaultError("a stratum of other keys")
        first, last = stratum["layers"]
        if type(first) is not int or type(last) is not int or first != following or last < first:
            raise FaultError("a gap")
        following = last + 1
        for entry, given in stratum.get("train", {}).items():
            (module,) = [each for each in MODULES if f".{each}".endswith(f".{entry}")]
            for layer in range(first, last + 1):
                name = f"bert.encoder.{module.replace('layer.', f'layer.{layer}.', 1)}"
                for one in given if isinstance(given, list) else [given]:
                    add_technique(name, MODULES[module], one, shapes, loras)
    if following != L:
        raise FaultError("layers are left over")
    return shapes | HEAD, loras


def add_technique(
    name: str,
    size: tuple[int, ...],
    given: Any,
    shapes: dict[str, tuple[int, ...]],
    loras: dict[str, tuple[float, float]],
) -> None:
    """Add what one technique trains in one module."""
    technique, settings = given, {}
    if isinstance(given, dict):
        ((technique, settings),) = given.items()
    adds = {
        "bias-delta": {"bias_delta": size[:1]},
        "bias-direct": {"bias": size[:1]},
        "full": {"weight": size, "bias": size[:1]},
    }
    if technique == "lora":
        r, alpha = settings.get("r", 64), settings.get("alpha", 128.0)
        adds["lora"] = {"lora_A": (r, size[1]), "lora_B": (size[0], r)}
        loras[name] = (alpha / r, settings.get("dropout", 0.0))
    for key, shape in adds[technique].items():
        if f"{name}.{key}" in shapes:
            raise FaultError("twice the same")
        shapes[f"{name}.{key}"] = shape


def canonical(name: str) -> str | None:
    """Return the model's name of a checkpoint's tensor, None where it is left out."""
    if name.startswith("cls.") or name.removeprefix("bert.") == "embeddings.position_ids":
        return None
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        before = name.removesuffix(old)
        if before != name and not before[-1:].isalnum() and before[-1:] != "_":
            name = before + new
    folders = name.split(".")[:-1]
    if folders[:1] in (["embeddings"], ["encoder"], ["pooler"]):
        return f"bert.{name}"
    is_of_encoder = not {"bert", "embeddings", "encoder", "pooler"}.isdisjoint(folders)
    return name if is_of_encoder or name in ("classifier.weight", "classifier.bias") else None
