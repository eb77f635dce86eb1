"""The sizes and rates of a BERT encoder, read from the ``config.json`` beside its weights.

The functions at the end read JSON, here and elsewhere: strictly, and from regular files alone.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import stat
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from spafit.errors import ConfigError, listed, one_line

# Keys of a real config.json that change nothing in the encoder or its head, as the writers of such
# files use them. They are known, so they are ignored without a word.
_IRRELEVANT = frozenset(
    """
    _name_or_path architectures attn_implementation _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal bos_token_id
    chunk_size_feed_forward decoder_start_token_id directionality do_sample dtype
    early_stopping eos_token_id finetuning_task gradient_checkpointing id2label label2id
    is_encoder_decoder length_penalty max_grad_norm max_length min_length num_beams num_labels
    output_attentions output_hidden_states output_past pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type prefix problem_type
    repetition_penalty return_dict return_dict_in_generate
    sbert_ce_default_activation_function sentence_transformers sep_token_id
    task_specific_params temperature tie_word_embeddings tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version use_cache use_flash_attention use_flash_attention_2
    use_flash_attn use_memory_efficient_attention
    """.split()
)

# What a key's name speaks of if a BERT encoder could honour it. The last line holds short words,
# which are not looked for inside longer ones: property is no rope.
_TOUCHES = re.compile(
    "activation|adapter|alibi|attention|attn|auto_?map|causal|compress|depth|dropout|embed|expert"
    r"|feed_?forward|gated|gelu|glu(?!e)|head|hidden|intermediate|kernel|layer|norm|pool|position"
    r"|prefix|projection|prompt|prun|quanti|relative|residual|rotary|shar(e|ing)|silu|spars|swish"
    r"|window|\dbit|(?<![a-z])(act|att|bias|d_ff|d_model|dim|drop|emb|ffn|ln|lora|mlp|moe|peft|pos"
    r"|proj|qkv|relu|rms|rope)(?![a-z])",
    re.IGNORECASE,
)

# Names of what comes before or after the encoder, or of how it was trained or is run, although
# _TOUCHES finds a word in them. Rates of dropout have other names where BERT has them.
_ELSEWHERE = re.compile(
    r"summary_\w+|cls_head|mlp_only_train|\w*(freez|froz)\w*|\w*multi_?sample_?dropout\w*"
    r"|(use_)?fused_(mlp|bias_fc|dense|attention|attn|softmax|dropout_add_ln|layer_?norm)"
    r"|(use_)?((mean|max|avg|cls|sentence)_)?pooling(_(mode|strategy|method|output)\w*)?"
    r"|((attention|hidden|activation|head|final|fc|cls|qa|seq_classif)_)?dropout(_prob|_rate)?",
    re.IGNORECASE,
)

# Other names of a size, which say nothing if they are set to that size.
_RESTATED = {
    other: name
    for name, others in {
        "hidden_size": "embedding_size emb_size embedding_dim emb_dim embed_dim d_model dim n_embd",
        "head_size": "head_dim d_head d_kv attention_head_size",
        "num_hidden_layers": "n_layers n_layer num_layers encoder_layers num_encoder_layers",
        "num_attention_heads": "n_heads n_head num_heads num_key_value_heads",
        "intermediate_size": "d_ff ffn_dim encoder_ffn_dim n_inner",
        "max_position_embeddings": "n_positions",
    }.items()
    for other in others.split()
}

# Settings that name what BERT does.
_BERTS_OWN = {
    ("layer_types", "full_attention"),
    ("attention_type", "original_full"),
    ("layernorm_type", "post"),
    ("layer_norm_type", "post"),
}

# A longer name, or one that cannot be printed, is not a writer's, and says nothing to go by.
_LONGEST_NAME = 100

# Far above any BERT; a larger size is a mistake that would only exhaust memory.
_LARGEST_SIZE = 2**24
MOST_LAYERS = 1024
"""A model of more layers is refused, which is far above any BERT."""

# Where a config may ask for more than one thing and this encoder computes one: the names of that
# one. A file without the key, or with null, means the same.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "hidden_act": ("gelu", "gelu_python"),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes and rates of one BERT encoder.

    The legend used everywhere: D hidden, A heads, Dh = D / A head size, F intermediate, L layers.
    Field names are those of ``config.json``. The defaults are bert-large-cased's.

    Attributes
    ----------
    vocab_size : int
        Entries of the WordPiece vocabulary.
    hidden_size : int
        D, the width of every hidden state.
    num_hidden_layers : int
        L, encoder layers.
    num_attention_heads : int
        A, heads per layer; must divide D.
    intermediate_size : int
        F, the width between the two feed-forward products.
    max_position_embeddings : int
        The longest sequence, in tokens.
    type_vocab_size : int
        Segments (token types) that the embeddings tell apart.
    layer_norm_eps : float
        Added to the variance under the root of every LayerNorm.
    hidden_dropout_prob, attention_probs_dropout_prob : float
        Dropout rates of the sub-layer outputs and of the attention probabilities.
    classifier_dropout : float or None
        Dropout rate before the classifier; None means ``hidden_dropout_prob``.
    initializer_range : float
        Standard deviation with which new weights (a fresh head) are drawn.
    pad_token_id : int or None
        The token whose embedding receives no gradient; None means that all do.

    Raises
    ------
    ConfigError
        If a size is not positive, A does not divide D, or a rate is outside [0, 1).
    """

    vocab_size: int = 28996
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            size = getattr(self, name)
            most = MOST_LAYERS if name == "num_hidden_layers" else _LARGEST_SIZE
            if type(size) is not int or not 1 <= size <= most:
                raise ConfigError(
                    f"{name} must be a whole number from 1 to {most}, found {size!r:.200}"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must divide "
                f"hidden_size ({self.hidden_size})"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            rate = getattr(self, name)
            if rate is None and name == "classifier_dropout":
                continue
            if not is_number(rate) or not 0.0 <= rate < 1.0:
                raise ConfigError(f"{name} must be a rate in [0, 1), found {rate!r:.200}")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not is_number(value) or not 0.0 < value < 1.0:
                raise ConfigError(f"{name} must be a small positive number, found {value!r:.200}")
        pad = self.pad_token_id
        if pad is not None and (type(pad) is not int or not 0 <= pad < self.vocab_size):
            raise ConfigError(
                f"pad_token_id must be a token of the vocabulary (0 to {self.vocab_size - 1}) or "
                f"null, found {pad!r:.200}"
            )

    @property
    def head_size(self) -> int:
        """Dh = D / A."""
        return self.hidden_size // self.num_attention_heads

    @property
    def head_dropout_prob(self) -> float:
        """The dropout rate before the classifier."""
        if self.classifier_dropout is None:
            return self.hidden_dropout_prob
        return self.classifier_dropout

    @classmethod
    def from_json(cls, path: str | Path) -> BertConfig:
        """Read a ``config.json``.

        A key that is not known, and says something, is refused if its name speaks of anything that
        a BERT encoder could honour: attention, positions, norms, activations, layers, heads,
        dropout, adapters, quantisation, code of its own and the like. Any other is reported in one
        warning and ignored.

        Parameters
        ----------
        path : str or Path
            The file, or the folder that holds ``config.json``.

        Returns
        -------
        BertConfig

        Raises
        ------
        ConfigError
            If the file is missing or not JSON, lacks a size, or asks for something that this
            encoder does not compute (another activation, relative positions, cross-attention ...).
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            entries = read_json(path)
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist: a model folder needs the config.json of its weights"
            ) from None
        except (OSError, ValueError) as error:
            reason = one_line(str(error), 600)
            raise ConfigError(f"{path} cannot be read as JSON: {reason}") from None
        if not isinstance(entries, dict):
            raise ConfigError(f"{path} must hold a JSON object, found {type(entries).__name__}")
        return cls.from_dict(entries, source=str(path))

    @classmethod
    def from_dict(cls, entries: dict[str, Any], *, source: str = "the configuration") -> BertConfig:
        """Take the entries of a ``config.json`` (see :meth:`from_json`)."""
        fields = {field.name for field in dataclasses.fields(cls)}
        for key, computed in _COMPUTED.items():
            if entries.get(key) not in (*computed, None):
                raise ConfigError(
                    f"{source} asks for {key} = {entries[key]!r:.200}, which this BERT does not "
                    f"compute; only {computed[0]!r} is honoured"
                )
        unknown = sorted(
            key
            for key, value in entries.items()
            if key not in fields | _IRRELEVANT | _COMPUTED.keys() and _says_something(key, value)
        )
        touching = [
            key
            for key in unknown
            if len(key) > _LONGEST_NAME or not key.isprintable() or _TOUCHES.search(key)
            if not _ELSEWHERE.fullmatch(key) and not _restates(key, entries)
        ]
        if touching:
            raise ConfigError(
                f"{source} sets {listed(touching, ', ')}, which spafit does not know and which may "
                "change the model; if it changes nothing, give a folder with the model's files and "
                "leave it out of the config.json there"
            )
        if unknown:
            warnings.warn(
                f"{source} sets {listed(unknown, ', ')}, which spafit does not know; ignored, as "
                "nothing that a BERT encoder computes depends on it",
                stacklevel=2,
            )
        needed = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        )
        missing = [name for name in needed if name not in entries]
        if missing:
            raise ConfigError(f"{source} lacks {', '.join(missing)}: is it a BERT's config.json?")
        known = {key: value for key, value in entries.items() if key in fields}
        if known.get("pad_token_id") == -1:  # by convention no token
            known["pad_token_id"] = None
        try:
            return cls(**known)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def to_json_dict(self) -> dict[str, Any]:
        """Return the entries of a ``config.json`` that :meth:`from_json` and transformers read."""
        return {
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            **dataclasses.asdict(self),
        }


def _restates(key: str, entries: dict[str, Any]) -> bool:
    """Return whether a key is another name of a size, and is set to it."""
    name, value = _RESTATED.get(key), entries[key]
    if type(value) is not int or name is None:
        return False
    if name == "head_size":
        heads = entries.get("num_attention_heads")
        return type(heads) is int and entries.get("hidden_size") == value * heads
    return bool(entries.get(name, getattr(BertConfig, name, None)) == value)


def _says_something(key: str, value: object) -> bool:
    """Return whether a key is set to anything, or to a list or object that holds anything.

    ``{"adapters": {}}`` holds nothing, the heads pruned by ``{"3": [0]}`` are something, and to
    attend to the full sequence in every layer is BERT's own way.
    """
    inside = [value or None]
    while inside:
        each = inside.pop()
        if isinstance(each, (dict, list)):
            inside += each.values() if isinstance(each, dict) else each
        elif each is None or each is False or each == "":
            continue
        elif (key, each) not in _BERTS_OWN:
            return True
    return False


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a setting is a number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


MAX_JSON_BYTES = 2**24
"""A longer JSON file is refused; BERT-large's index takes 40 thousand bytes."""

_PIECE_BYTES = 2**16


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of an object's pairs, as the ``object_pairs_hook`` of ``json.loads``.

    Raises
    ------
    ValueError
        If a key occurs twice, of which a JSON reader would silently take the last.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in counts.items() if count > 1)
        raise ValueError(f"it holds twice: {listed(twice, ', ')}")
    return result


def refuse_pointer(raw: bytes) -> None:
    """Refuse what git leaves in place of a large file that it did not fetch.

    Raises
    ------
    ValueError
        If the bytes of the file are a Git LFS pointer.
    """
    if raw.startswith(b"version http"):
        raise ValueError("it is a Git LFS pointer, not the file itself: run `git lfs pull`")


def parse_json(raw: bytes) -> Any:
    """Read UTF-8 as JSON.

    Raises
    ------
    ValueError
        If it is not both, holds a key twice, is nested too deeply, or is a Git LFS pointer.
    """
    refuse_pointer(raw)
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    OSError
        If it is missing, no regular file, or cannot be read.
    ValueError
        As :func:`parse_json`, or if it takes more than :data:`MAX_JSON_BYTES`.
    """
    raw = bytearray()
    with open_regular(path) as file:
        # In pieces: asked for all at once, the limit itself would be allocated for every file.
        while len(raw) <= MAX_JSON_BYTES and (piece := file.read(_PIECE_BYTES)):
            raw += piece
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"it takes more than the {MAX_JSON_BYTES} bytes that are accepted")
    return parse_json(bytes(raw))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, and refuse anything else.

    Raises
    ------
    OSError
        If it is missing or cannot be read, or is a device or a pipe, which may never end.
    """

    def without_waiting(name: str, flags: int) -> int:
        # Opening a pipe would wait for a writer.
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=without_waiting)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return file
