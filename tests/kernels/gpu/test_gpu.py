"""On a CUDA device: the same numbers as on the CPU, and training in every precision it has.

The oracle is the same model in float32 on the CPU. Run by hand: ``pytest -m gpu``.
"""

import copy

import numpy as np
import pytest
import torch

import spafit
from spafit.machine.precision import resolve_precision
from spafit.tasks.glue import Dataset, Example
from spafit.tasks.table import get_task
from spafit.text.tokenization import Tokenizer
from weights_tools.tiny import make_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_tiny(path, num_hidden_layers=6)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return spafit.load_tokenizer(folder)


def learnable(n: int, tokenizer: Tokenizer) -> Dataset:
    """Texts of 3 to 12 words of the vocabulary; the first word decides the label."""
    words = sorted(word for word in tokenizer.recipe.vocab if word.isalpha() and word.isascii())[
        :40
    ]
    rng = np.random.default_rng(7)
    task = get_task("cola")
    examples = []
    for index in range(n):
        label = int(rng.integers(2))
        rest = rng.choice(words[2:], size=int(rng.integers(2, 12)))
        examples.append(Example(index, " ".join([words[label], *rest]), None, task.labels[label]))
    return Dataset(task, "train", tuple(examples), "generated", 0, "-")


def adapted(folder, method="SPAFIT-1-3-II"):
    model = spafit.load_pretrained(folder)
    spafit.adapt(model, spafit.plan(method, 6, r=8, alpha=16))
    return model


def test_forward_in_float32_equals_the_cpu(folder, tokenizer):
    data = learnable(23, tokenizer)
    model = adapted(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "bias_delta.delta")):
                parameter.normal_(0, 0.05)
    on_cpu = spafit.predict(model, tokenizer, data, precision="float32").logits
    on_gpu = spafit.predict(model.cuda(), tokenizer, data, precision="float32").logits
    np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_training_learns_and_leaves_the_base_alone(folder, tokenizer, precision, tmp_path):
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no bf16")
    data = learnable(160, tokenizer)
    model = adapted(folder)
    before = copy.deepcopy(model.state_dict())
    config = spafit.TrainConfig(
        out=tmp_path / precision,
        epochs=12,
        learning_rate=3e-3,
        precision=precision,
        device="cuda",
        quiet=True,
    )
    result = spafit.fit(model, tokenizer, data, data, config)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.metrics["matthews"] > 0.9
    assert result.peak_memory_mib > 0
    trained = set(model.adaptation.trainable)
    for name, tensor in model.state_dict().items():
        if name not in trained:
            assert torch.equal(tensor.cpu(), before[name]), name

    # What was saved on the GPU works on the CPU.
    on_cpu = spafit.load_pretrained(folder)
    spafit.load_adapter(on_cpu, tmp_path / precision / "adapter.safetensors")
    ours = spafit.predict(on_cpu, tokenizer, data, precision="float32").logits
    theirs = spafit.predict(model, tokenizer, data, precision="float32").logits
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_adapters_disabled_is_the_base_bit_for_bit(folder, tokenizer):
    data = learnable(23, tokenizer)
    base = spafit.load_pretrained(folder, device="cuda")
    model = adapted(folder)
    config = spafit.TrainConfig(epochs=1, learning_rate=1e-2, device="cuda", quiet=True)
    spafit.fit(model, tokenizer, data, data, config)
    with spafit.adapters_disabled(model):
        switched_off = spafit.predict(model, tokenizer, data).logits
    assert np.array_equal(switched_off, spafit.predict(base, tokenizer, data).logits)
    assert not np.array_equal(switched_off, spafit.predict(model, tokenizer, data).logits)


def test_precision_is_chosen_by_the_card():
    device = torch.device("cuda")
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    assert resolve_precision("auto", device) == ("bf16" if has_bf16 else "fp16")
