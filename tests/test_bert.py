"""BERT as a module: names, order, inputs, modes and initial values. Numbers: test_equations.py."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import pytest
import torch
from torch import nn

import spafit.bert
from spafit.adaptable import LayerNorm, Linear
from spafit.bert import BertForSequenceClassification, BertModel, initialise, set_impl
from spafit.config import BertConfig
from spafit.errors import ConfigError

B, T, C = 3, 7, 8
CONFIG = BertConfig(
    vocab_size=99,
    hidden_size=20,
    num_hidden_layers=6,
    num_attention_heads=5,
    intermediate_size=37,
    max_position_embeddings=13,
)


@pytest.fixture
def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(CONFIG, num_labels=C).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 99, (B, T), generator=generator),
        "attention_mask": (torch.arange(T) < torch.tensor([[7], [4], [1]])).long(),
        "token_type_ids": torch.randint(0, 2, (B, T), generator=generator),
    }


class TestNames:
    """Oracle: the keys and shapes of Hugging Face's BertForSequenceClassification."""

    def test_keys_and_shapes_are_the_checkpoints(self) -> None:
        transformers = pytest.importorskip("transformers")
        with torch.device("meta"):
            ours = BertForSequenceClassification(CONFIG, num_labels=C)
            theirs = transformers.BertForSequenceClassification(
                transformers.BertConfig(**CONFIG.to_json_dict(), num_labels=C)
            )
        expected = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
        assert {name: tuple(t.shape) for name, t in ours.state_dict().items()} == expected
        assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}

    def test_bert_large_has_the_papers_size(self) -> None:
        """Table 2's 333.58 M: all of bert-large-cased with a head of three labels."""
        with torch.device("meta"):
            model = BertForSequenceClassification(BertConfig(), num_labels=3)
        assert sum(p.numel() for p in model.parameters()) == 333_582_339
        assert sum(p.numel() for p in model.bert.parameters()) == 333_579_264
        assert len(model.bert.state_dict()) == 391
        assert all(p.requires_grad for p in model.parameters())

    def test_without_pooler(self, batch: dict[str, torch.Tensor]) -> None:
        """The same keys without pooler.*, the same hidden states, and pooler_output None."""
        torch.manual_seed(0)
        whole = BertModel(CONFIG).eval()
        headless = BertModel(CONFIG, add_pooler=False).eval()
        without = {k: v for k, v in whole.state_dict().items() if not k.startswith("pooler.")}
        assert len(without) == len(whole.state_dict()) - 2
        headless.load_state_dict(without, strict=True)
        out, expected = headless(**batch), whole(**batch)
        assert out.pooler_output is None
        assert torch.equal(out.last_hidden_state, expected.last_hidden_state)


class TestReadingOrder:
    """Oracle: the way of the data."""

    def test_classes_stand_in_the_order_of_the_data(self) -> None:
        tree = ast.parse(inspect.getsource(spafit.bert))
        modules = [
            node.name
            for node in tree.body
            if isinstance(node, ast.ClassDef)
            and issubclass(vars(spafit.bert)[node.name], nn.Module)
        ]
        assert modules == [
            "Embeddings",
            "SelfAttention",
            "SelfOutput",
            "Attention",
            "Intermediate",
            "Output",
            "Layer",
            "Encoder",
            "Pooler",
            "BertModel",
            "BertForSequenceClassification",
        ]

    @pytest.mark.parametrize(
        ("name", "equations"),
        [
            ("SelfAttention", (1, 2, 3, 4, 5)),
            ("SelfOutput", (6, 7)),
            ("Intermediate", (8,)),
            ("Output", (9, 10)),
        ],
    )
    def test_each_equation_is_cited_where_it_is_computed(
        self, name: str, equations: tuple[int, ...]
    ) -> None:
        forward = inspect.getsource(vars(spafit.bert)[name].forward)
        for number in equations:
            assert f"Eq. ({number})" in forward


class TestOutputs:
    """Oracle: the same model called another way."""

    def test_shapes(
        self, model: BertForSequenceClassification, batch: dict[str, torch.Tensor]
    ) -> None:
        assert model.num_labels == C
        assert model(**batch).shape == (B, C)
        out = model.bert(**batch)
        assert out.last_hidden_state.shape == (B, T, 20)
        assert out.pooler_output.shape == (B, 20)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_device_and_dtype(
        self, model: BertForSequenceClassification, dtype: torch.dtype
    ) -> None:
        for each in (model, model.bert):
            assert (each.device, each.dtype) == (torch.device("cpu"), torch.float32)
        model.to(dtype).to("meta")
        for each in (model, model.bert):
            assert (each.device, each.dtype) == (torch.device("meta"), dtype)

    def test_hidden_states_only_when_asked_for(
        self, model: BertForSequenceClassification, batch: dict[str, torch.Tensor]
    ) -> None:
        assert model.bert(**batch).hidden_states is None
        out = model.bert(**batch, output_hidden_states=True)
        assert len(out.hidden_states) == CONFIG.num_hidden_layers + 1
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        embedded = model.bert.embeddings(batch["input_ids"], batch["token_type_ids"])
        keep = batch["attention_mask"].bool()
        assert torch.equal(out.hidden_states[0][keep], embedded[keep])
        assert torch.count_nonzero(out.hidden_states[0][~keep]) == 0

    def test_no_mask_means_all_real_and_no_types_means_all_0(
        self, model: BertForSequenceClassification, batch: dict[str, torch.Tensor]
    ) -> None:
        ids, ones = batch["input_ids"], torch.ones_like(batch["input_ids"])
        bare = model(ids)
        spelled_out = model(ids, ones, torch.zeros_like(ids))
        assert (bare - spelled_out).abs().max() < 1e-6
        assert (bare - model(ids, ones, ones)).abs().max() > 1e-4

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
    def test_mask_of_any_type(
        self,
        model: BertForSequenceClassification,
        batch: dict[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        mask = batch["attention_mask"]
        expected = model(batch["input_ids"], mask)
        assert torch.equal(model(batch["input_ids"], mask.to(dtype)), expected)

    def test_padding_and_neighbours_do_not_matter(
        self, model: BertForSequenceClassification, batch: dict[str, torch.Tensor]
    ) -> None:
        """A sequence alone and unpadded has the logits that it has inside a padded batch."""
        together = model.double()(**batch)
        for row, length in enumerate([7, 4, 1]):
            ids = batch["input_ids"][row : row + 1, :length]
            types = batch["token_type_ids"][row : row + 1, :length]
            assert (model(ids, None, types) - together[row]).abs().max() < 1e-12


class TestModes:
    """Oracle: the same call repeated."""

    def test_eval_is_deterministic(
        self, model: BertForSequenceClassification, batch: dict[str, torch.Tensor]
    ) -> None:
        before = torch.get_rng_state()
        assert torch.equal(model(**batch), model(**batch))
        assert torch.equal(torch.get_rng_state(), before)

    def test_train_drops_and_a_seed_repeats_it(
        self, model: BertForSequenceClassification, batch: dict[str, torch.Tensor]
    ) -> None:
        model.train()
        torch.manual_seed(3)
        first, second = model(**batch), model(**batch)
        torch.manual_seed(3)
        assert torch.equal(model(**batch), first)
        assert not torch.equal(first, second)

    @pytest.mark.parametrize(
        "rate", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
    )
    def test_each_rate_is_heard(self, rate: str, batch: dict[str, torch.Tensor]) -> None:
        """One rate above zero makes training random; all at zero make it equal to eval."""
        none = dataclasses.replace(
            CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model = BertForSequenceClassification(none).train()
        assert torch.equal(model(**batch), model.eval()(**batch))
        one = BertConfig(**{**dataclasses.asdict(none), rate: 0.5})
        model = BertForSequenceClassification(one).train()
        if rate == "attention_probs_dropout_prob":
            with torch.no_grad():  # Fresh values are so alike that dropping their weights is faint.
                for name, parameter in model.named_parameters():
                    if name.endswith("value.weight"):
                        parameter.mul_(50.0)
        assert (model(**batch) - model(**batch)).abs().max() > 1e-4

    def test_works_in_half_precision(
        self, model: BertForSequenceClassification, batch: dict[str, torch.Tensor]
    ) -> None:
        assert model.to(torch.bfloat16)(**batch).dtype == torch.bfloat16


class TestRefusals:
    """Oracle: the message, which must name the argument and both shapes or bounds."""

    def test_not_a_batch(self, model: BertForSequenceClassification) -> None:
        for shape in ((7,), (0, 7), (3, 0), (3, 7, 1)):
            with pytest.raises(ConfigError, match=r"input_ids must be .*\(B, T\)") as caught:
                model(torch.ones(shape, dtype=torch.int64))
            assert str(shape) in str(caught.value)

    def test_too_long(self, model: BertForSequenceClassification) -> None:
        model(torch.ones(1, 13, dtype=torch.int64))
        with pytest.raises(ConfigError, match="14 tokens do not fit the model's 13 positions"):
            model(torch.ones(1, 14, dtype=torch.int64))

    @pytest.mark.parametrize("name", ["attention_mask", "token_type_ids"])
    def test_shapes_that_do_not_fit(
        self, model: BertForSequenceClassification, batch: dict[str, torch.Tensor], name: str
    ) -> None:
        batch[name] = batch[name][:, :6]
        with pytest.raises(ConfigError, match=rf"{name} must have .*\(3, 7\), found \(3, 6\)"):
            model(**batch)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("input_ids", 99, r"input_ids must lie in 0 \.\. 98, found \d+ \.\. 99"),
            ("input_ids", -1, r"input_ids must lie in 0 \.\. 98, found -1 \.\."),
            ("token_type_ids", 2, r"token_type_ids must lie in 0 \.\. 1, found 0 \.\. 2"),
            ("token_type_ids", -5, r"token_type_ids must lie in 0 \.\. 1, found -5 \.\."),
        ],
    )
    def test_ids_outside_their_table(
        self,
        model: BertForSequenceClassification,
        batch: dict[str, torch.Tensor],
        name: str,
        value: int,
        message: str,
    ) -> None:
        batch[name][2, 6] = value  # even at a padded token
        with pytest.raises(ConfigError, match=message):
            model(**batch)

    @pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "attention_mask"])
    def test_what_is_no_tensor(
        self, model: BertForSequenceClassification, batch: dict[str, torch.Tensor], name: str
    ) -> None:
        for value in (batch[name].tolist(), batch[name].numpy(), "ids"):
            kind = type(value).__name__
            with pytest.raises(ConfigError, match=rf"^{name} must be a tensor.*, found {kind}$"):
                model(**{**batch, name: value})
        with pytest.raises(ConfigError, match="input_ids must be a tensor of int64, found None"):
            model(None)

    @pytest.mark.parametrize("name", ["input_ids", "token_type_ids"])
    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_ids_that_are_no_whole_numbers(
        self,
        model: BertForSequenceClassification,
        batch: dict[str, torch.Tensor],
        name: str,
        impl: str,
    ) -> None:
        """An embedding takes int64 and int32."""
        set_impl(model, impl)
        expected = model(**batch)
        assert torch.equal(model(**{**batch, name: batch[name].int()}), expected)
        for kind in (torch.float32, torch.float16, torch.bool, torch.int8, torch.complex64):
            message = f"{name} must be a tensor of int64, found {kind}"
            with pytest.raises(ConfigError, match=message):
                model.bert(**{**batch, name: batch[name].to(kind)})

    def test_nothing_but_padding(
        self, model: BertForSequenceClassification, batch: dict[str, torch.Tensor]
    ) -> None:
        batch["attention_mask"][1] = 0
        with pytest.raises(ConfigError, match="at least one real token"):
            model(**batch)

    @pytest.mark.parametrize("num_labels", [0, -1, 2.0, True, "2"])
    def test_number_of_labels(self, num_labels: int) -> None:
        with pytest.raises(ConfigError, match="num_labels must be a whole number"):
            BertForSequenceClassification(CONFIG, num_labels=num_labels)


class TestInitialise:
    """Oracle: N(0, σ²) by its moments, and the same draw repeated."""

    def test_moments_biases_and_norms(self) -> None:
        torch.manual_seed(4)
        model = BertForSequenceClassification(dataclasses.replace(CONFIG, initializer_range=0.05))
        drawn = []
        for part in model.modules():
            if isinstance(part, Linear):
                drawn.append(part.weight.flatten())
                assert torch.count_nonzero(part.bias) == 0
            elif isinstance(part, LayerNorm):
                assert (part.weight == 1).all()
                assert torch.count_nonzero(part.bias) == 0
        table = model.bert.embeddings.word_embeddings.weight
        assert torch.count_nonzero(table[CONFIG.pad_token_id]) == 0
        assert torch.count_nonzero(table) == 98 * 20
        numbers = torch.cat([*drawn, table[1:].flatten()]).detach()
        n = len(numbers)
        assert abs(numbers.mean()) < 5 * 0.05 / n**0.5
        assert abs(numbers.std() / 0.05 - 1) < 5 / (2 * n) ** 0.5

    def test_generator_repeats_it_and_leaves_the_global_one_alone(
        self, model: BertForSequenceClassification
    ) -> None:
        before = torch.get_rng_state()
        initialise(model, 0.02, torch.Generator().manual_seed(5))
        first = {name: p.clone() for name, p in model.state_dict().items()}
        initialise(model, 0.02, torch.Generator().manual_seed(5))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(p, first[name]) for name, p in model.state_dict().items())
        initialise(model, 0.02, torch.Generator().manual_seed(6))
        assert not torch.equal(model.classifier.weight, first["classifier.weight"])

    def test_without_a_generator_it_takes_the_global_one(self) -> None:
        torch.manual_seed(7)
        first = BertForSequenceClassification(CONFIG)
        torch.manual_seed(7)
        second = BertForSequenceClassification(CONFIG)
        for mine, again in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(mine, again)
            assert mine.requires_grad
