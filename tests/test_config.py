"""BertConfig: real files are read, and settings that this encoder does not support are refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from spafit.config import BertConfig
from spafit.errors import ConfigError, SpafitError

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 20,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "intermediate_size": 37,
}


class TestRealFiles:
    """Oracle: the figures of the published models."""

    def test_bert_large_cased_is_the_default(self, shared_data: Path) -> None:
        """Its file also holds pooler_* and generation keys, which change nothing."""
        path = shared_data / "config" / "bert-large-cased" / "transformer_config.json"
        config = BertConfig.from_json(path)
        assert config == BertConfig()
        assert (config.hidden_size, config.num_hidden_layers, config.head_size) == (1024, 24, 64)
        assert (config.vocab_size, config.intermediate_size) == (28996, 4096)
        assert config.layer_norm_eps == 1e-12
        assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.1

    def test_bert_base_cased(self, shared_data: Path) -> None:
        """The folder that holds config.json may be named instead of the file."""
        folder = shared_data / "config" / "bert-base-cased"
        config = BertConfig.from_json(folder)
        assert config == BertConfig.from_json(str(folder / "config.json"))
        assert config == BertConfig(
            vocab_size=28996,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
        )

    def test_minilm(self, minilm_folder: Path) -> None:
        config = BertConfig.from_json(minilm_folder)
        assert (config.hidden_size, config.num_hidden_layers, config.head_size) == (384, 6, 32)
        assert (config.vocab_size, config.intermediate_size) == (30522, 1536)


class TestTransformers:
    """Oracle: the configuration that the installed transformers writes and reads."""

    def test_every_key_it_writes_is_known(self, tmp_path: Path) -> None:
        """With values other than the defaults wherever the encoder's numbers do not change."""
        transformers = pytest.importorskip("transformers")
        theirs = transformers.BertConfig(
            num_labels=3,
            problem_type="regression",
            architectures=["BertModel"],
            dtype="float32",
            bos_token_id=5,
            eos_token_id=6,
            chunk_size_feed_forward=7,
            output_hidden_states=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert BertConfig.from_dict(theirs.to_dict()).hidden_size == theirs.hidden_size
        theirs.save_pretrained(tmp_path)
        ours = BertConfig.from_json(tmp_path)
        for name, value in vars(ours).items():
            assert getattr(theirs, name) == value, name

    def test_it_reads_what_we_write(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        ours = BertConfig(**TINY, layer_norm_eps=1e-6, classifier_dropout=0.3, pad_token_id=7)
        (tmp_path / "config.json").write_text(json.dumps(ours.to_json_dict()))
        theirs = transformers.BertConfig.from_pretrained(tmp_path)
        for name, value in vars(ours).items():
            assert getattr(theirs, name) == value, name
        assert theirs.hidden_act == "gelu"
        assert ours.to_json_dict()["position_embedding_type"] == "absolute"


class TestReading:
    """Oracle: the entries themselves."""

    def test_round_trip(self, tmp_path: Path) -> None:
        config = BertConfig(
            **TINY,
            max_position_embeddings=13,
            type_vocab_size=3,
            layer_norm_eps=1e-7,
            hidden_dropout_prob=0.15,
            attention_probs_dropout_prob=0.25,
            classifier_dropout=0.35,
            initializer_range=0.01,
            pad_token_id=4,
        )
        assert not set(vars(config).items()) & set(vars(BertConfig()).items())
        path = tmp_path / "any name.json"
        path.write_text(json.dumps(config.to_json_dict()))
        assert BertConfig.from_json(path) == config

    def test_defaults_stand_in_for_what_old_files_leave_out(self) -> None:
        config = BertConfig.from_dict({**TINY, "pad_token_id": None})
        assert config.max_position_embeddings == 512
        assert config.type_vocab_size == 2
        assert config.layer_norm_eps == 1e-12
        assert config.pad_token_id is None  # no padding row, as transformers reads it
        assert config.classifier_dropout is None

    def test_head_dropout_is_the_hidden_rate_unless_said_otherwise(self) -> None:
        assert BertConfig(hidden_dropout_prob=0.2).head_dropout_prob == 0.2
        assert BertConfig(classifier_dropout=0.0).head_dropout_prob == 0.0

    def test_unknown_key_that_is_unset_is_let_pass(self) -> None:
        falsy: list[object] = [None, False, 0, "", [], {}]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for unset in falsy:
                BertConfig.from_dict({**TINY, "a_feature_of_tomorrow": unset, "rope": unset})

    def test_what_holds_nothing_is_let_pass(self) -> None:
        unset: dict[str, object] = {
            "adapters": {"adapters": {}, "config_map": {"text_task": None}, "fusion": [""]},
            "pruned_heads": {"3": []},
            "quantization": {"is_on": False},
            "hidden_act": None,
            "position_embedding_type": None,
            "layer_types": ["full_attention"] * 6,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert BertConfig.from_dict({**TINY, **unset}) == BertConfig.from_dict(TINY)

    def test_what_touches_nothing_is_ignored_with_one_note(self, tmp_path: Path) -> None:
        """Keys of published files: how they were trained, how to generate, what comes after."""
        keys = (
            "_num_labels num_return_sequences total_flos mlm_probability eos_token_ids "
            "num_beam_groups typical_p model_name wandb_project glue_task contact adam_epsilon"
        )
        entries = {**TINY, **dict.fromkeys(keys.split(), 5)}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(entries))
        with pytest.warns(UserWarning, match="_num_labels, adam_epsilon, .* and 6 more") as caught:
            config = BertConfig.from_json(path)
        assert len(caught) == 1
        assert str(caught[0].message).startswith(f"{path} sets _num")
        assert config == BertConfig.from_dict(TINY)

    @pytest.mark.parametrize(
        "key",
        """
        sbert_ce_default_activation_function sentence_transformers _attn_implementation_autoset
        use_flash_attn gradient_checkpointing architectures id2label _name_or_path max_grad_norm
        attn_implementation
        """.split(),
    )
    def test_known_keys_that_change_nothing(self, key: str) -> None:
        """Even those whose names speak of activations or attention."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            BertConfig.from_dict({**TINY, key: {"a": "torch.nn.modules.linear.Identity"}})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *dict.fromkeys("embedding_size embedding_dim d_model dim".split(), 20).items(),
            *dict.fromkeys("n_layers num_layers n_layer".split(), 6).items(),
            *dict.fromkeys("num_key_value_heads n_heads num_heads".split(), 5).items(),
            *(("head_dim", 4), ("d_ff", 37), ("n_positions", 512)),
            *dict.fromkeys("dropout attention_dropout head_dropout_rate".split(), 0.1).items(),
            *(("summary_type", "first"), ("summary_use_proj", True), ("summary_last_dropout", 0.1)),
            *(("multi_sample_dropout", 5), ("use_multi_sample_dropout", True)),
            *(("mlp_only_train", True), ("cls_head", 1), ("pooling", "mean")),
            *(("use_mean_pooling", True), ("pooling_mode_mean_tokens", True)),
            *(("num_layers_to_freeze", 2), ("freeze_layers", [0, 1]), ("unfreeze_embedding", 1)),
            *(("fused_mlp", True), ("fused_bias_fc", True), ("fused_dropout_add_ln", True)),
        ],
    )  # fmt: skip
    def test_what_is_elsewhere_or_restated_is_noted(self, key: str, value: object) -> None:
        with pytest.warns(UserWarning, match=f"sets {key}, which spafit does not know; ignored"):
            assert BertConfig.from_dict({**TINY, key: value}) == BertConfig.from_dict(TINY)

    @pytest.mark.parametrize(
        "entries",
        [
            {"hidden_act": "gelu_python"},
            {"attention_type": "original_full"},
            {"layer_norm_type": "post"},
        ],
        ids=str,
    )
    def test_other_names_of_what_is_computed(self, entries: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert BertConfig.from_dict({**TINY, **entries}) == BertConfig.from_dict(TINY)

    def test_no_padding_token(self) -> None:
        assert BertConfig.from_dict({**TINY, "pad_token_id": -1}).pad_token_id is None

    def test_frozen(self) -> None:
        with pytest.raises(AttributeError):
            BertConfig().hidden_size = 5  # type: ignore[misc]


class TestRefusals:
    """Oracle: the message, which must name the key and what was found."""

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("hidden_act", "relu"),
            ("hidden_act", "gelu_new"),
            ("position_embedding_type", "relative_key"),
            ("position_embedding_type", "relative_key_query"),
            ("add_cross_attention", True),
            ("is_decoder", True),
            ("model_type", "roberta"),
        ],
    )
    def test_what_is_not_computed(self, key: str, value: object) -> None:
        with pytest.raises(ConfigError) as caught:
            BertConfig.from_dict({**TINY, key: value}, source="some/config.json")
        for part in ("some/config.json", key, repr(value)):
            assert part in str(caught.value)

    def test_pruned_heads(self) -> None:
        with pytest.raises(ConfigError, match="pruned_heads"):
            BertConfig.from_dict({**TINY, "pruned_heads": {"0": [1]}})

    @pytest.mark.parametrize(
        "key",
        """
        auto_map quantization_config adapters use_attention_bias attn_type rotary_dim rope_theta
        num_relative_positions pos_att_type norm_first LayerNormEps hidden_activation act_fn
        use_swiglu glu_type ffn_type d_model embedding_size num_hidden_groups head_dim moe_top
        sliding_window stochastic_depth drop_path lora_r load_in_8bit pre_prefix emb_pooler
        """.split(),
    )
    def test_a_name_that_a_bert_could_honour(self, key: str) -> None:
        with pytest.raises(ConfigError, match=f"sets {key}, which spafit does not know"):
            BertConfig.from_dict({**TINY, key: "x", "total_flos": 1})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("embedding_size", 16), ("embedding_size", 20.0), ("head_dim", 5), ("n_layers", 12)),
            *(("num_key_value_heads", 1), ("d_ff", 20), ("n_positions", 513), ("dim", True)),
            *(("attention_type", "block_sparse"), ("layer_norm_type", "pre"), ("n_layers", [6])),
            *(("token_dropout", True), ("layerdrop", 0.1), ("attention_dropout_type", "x")),
            *(("fused_swiglu", True), ("fused_gated_mlp", True), ("use_fused_rotary", True)),
            *(("pooling_q_only", True), ("token_pooling", 2), ("cls_head_attention", 1)),
            *(("num_hidden_groups", 1), ("share_layers", True), ("prompt_dropout", 0.1)),
        ],
    )
    def test_what_only_resembles_what_is_elsewhere(self, key: str, value: object) -> None:
        with pytest.raises(ConfigError, match=f"sets {key}, which spafit does not know and which"):
            BertConfig.from_dict({**TINY, key: value})

    @pytest.mark.parametrize("key", ["x" * 101, "a\nb", "\ud800"])
    def test_a_name_that_says_nothing(self, key: str) -> None:
        with pytest.raises(ConfigError, match=r"sets .*, which spafit does not") as caught:
            BertConfig.from_dict({**TINY, key: 1})
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("value", [{"3": [0]}, {"0": ["full_attention"]}, [[[7]]]])
    def test_a_value_inside_others(self, value: object) -> None:
        with pytest.raises(ConfigError, match="pruned_heads"):
            BertConfig.from_dict({**TINY, "pruned_heads": value})
        with pytest.raises(ConfigError, match="layer_types"):
            BertConfig.from_dict({**TINY, "layer_types": ["full_attention", "sliding_attention"]})

    def test_a_key_twice(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text('{"hidden_size": 20, "hidden_size": 24}', encoding="utf-8")
        with pytest.raises(ConfigError, match="twice"):
            BertConfig.from_json(path)

    @pytest.mark.parametrize("value", [True, 0.5, "rotary", [1], {"a": 1}])
    def test_unknown_keys_that_are_set_are_all_listed(self, value: object) -> None:
        with pytest.raises(ConfigError, match="embedding_size, rope"):
            BertConfig.from_dict({**TINY, "rope": value, "embedding_size": value})

    def test_missing_sizes_are_all_listed(self) -> None:
        with pytest.raises(ConfigError, match="lacks vocab_size, intermediate_size"):
            BertConfig.from_dict(
                {k: v for k, v in TINY.items() if k not in ("vocab_size", "intermediate_size")}
            )

    @pytest.mark.parametrize("name", [*TINY, "max_position_embeddings", "type_vocab_size"])
    @pytest.mark.parametrize("size", [0, -4, 20.0, True, "20", None, float("nan"), 10**12])
    def test_absurd_sizes(self, name: str, size: object) -> None:
        with pytest.raises(ConfigError, match=f"{name} must be a whole number from 1 to") as caught:
            BertConfig.from_dict({**TINY, name: size})
        assert repr(size) in str(caught.value)

    def test_heads_that_do_not_divide_the_width(self) -> None:
        with pytest.raises(ConfigError, match=r"num_attention_heads \(3\) .* hidden_size \(20\)"):
            BertConfig.from_dict({**TINY, "num_attention_heads": 3})

    @pytest.mark.parametrize(
        "name", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
    )
    @pytest.mark.parametrize("rate", [-0.1, 1.0, 2, float("nan"), "0.1", False])
    def test_rates_outside_their_range(self, name: str, rate: object) -> None:
        with pytest.raises(ConfigError, match=rf"{name} must be a rate in \[0, 1\)"):
            BertConfig.from_dict({**TINY, name: rate})

    @pytest.mark.parametrize("name", ["layer_norm_eps", "initializer_range"])
    @pytest.mark.parametrize("value", [0, -1e-12, 1.0, float("inf"), float("nan"), None, "1e-12"])
    def test_small_numbers_outside_their_range(self, name: str, value: object) -> None:
        with pytest.raises(ConfigError, match=f"{name} must be a small positive number"):
            BertConfig.from_dict({**TINY, name: value})

    @pytest.mark.parametrize("token", [-2, 99, 0.0, "0", True])
    def test_padding_token_outside_the_vocabulary(self, token: object) -> None:
        with pytest.raises(ConfigError, match=r"pad_token_id .* \(0 to 98\)"):
            BertConfig.from_dict({**TINY, "pad_token_id": token})

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"config\.json does not exist"):
            BertConfig.from_json(tmp_path)
        with pytest.raises(ConfigError, match=r"nowhere\.json does not exist"):
            BertConfig.from_json(tmp_path / "nowhere.json")

    @pytest.mark.parametrize("content", [b"", b"{", b'{"a": }', b"\xff\xfe{}", b"PK\x03\x04"])
    def test_not_json(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "config.json"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
            BertConfig.from_json(path)

    @pytest.mark.parametrize("content", ["[]", "3", '"bert"', "null"])
    def test_not_an_object(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "config.json"
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json must hold a JSON object"):
            BertConfig.from_json(path)

    def test_the_error_names_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**TINY, "hidden_act": "relu"}))
        with pytest.raises(SpafitError, match=str(path)):
            BertConfig.from_json(path)
