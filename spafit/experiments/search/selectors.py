"""Scores of the layers, for nothing or for little, and N1 and N2 from such scores.

Each selector returns one number a layer, (L,), in float64; the larger, the more there is to be said
for training that layer. They are proposals of the literature, of which none has been shown to find
the best N1 and N2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import torch

from spafit.adaptable import Linear
from spafit.bert import BertForSequenceClassification
from spafit.config import BertConfig
from spafit.errors import ConfigError
from spafit.training.optimisation import loss_function

LabelledBatch = tuple[Mapping[str, torch.Tensor], torch.Tensor]
"""What the model is called with, and the targets (B,)."""


def fisher_scores(
    model: BertForSequenceClassification, batches: Iterable[LabelledBatch]
) -> torch.Tensor:
    """Return the mean squared gradient of what each layer would train.

    With g_b the gradient of the mean loss of batch b, and P_l the numbers that train in layer l:

        F_l = 1/|P_l| Σ_{p in P_l} 1/|batches| Σ_b g_b[p]²

    With batches of one example it is the diagonal of the empirical Fisher information, by which
    Sung, Nair and Raffel (2021, "Training Neural Networks with Fixed Sparse Masks", arXiv
    2111.09839) choose what to train. Larger batches are cheaper, and make it smaller.

    Parameters
    ----------
    model : BertForSequenceClassification
        Adapted by a plan in which every layer trains what it would train, such as ``lora-ii``. It
        is in evaluation mode meanwhile, so there is no dropout. (B of LoRA is 0 at first, and so is
        A's gradient.)
    batches : iterable of (mapping of str to torch.Tensor, torch.Tensor)
        Some labelled batches.

    Returns
    -------
    torch.Tensor of float64, (L,)
        0 for a layer in which nothing trains.

    Raises
    ------
    ConfigError
        If there are no batches, or nothing trains in any layer.
    """
    squares = [
        torch.stack([layer.square().sum() / max(1, len(layer)) for layer in gradients])
        for gradients, _ in _gradients(model, batches)
    ]
    return torch.stack(squares).mean(0)


def gradient_norms(
    model: BertForSequenceClassification, batches: Iterable[LabelledBatch]
) -> torch.Tensor:
    """Return the norm of the gradient of what each layer would train.

        G_l = ‖gradient of the mean loss of all examples, by P_l‖₂

    Lee et al. (2023, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", arXiv
    2210.11466) take it relative to the norm of the parameters (Auto-RGN). That is not defined here,
    where a bias delta and B of LoRA are 0 at first. Parameters and errors as for
    :func:`fisher_scores`.
    """
    found = _gradients(model, batches)
    examples = sum(size for _, size in found)
    return torch.stack(
        [
            torch.stack([gradients[layer] * size for gradients, size in found]).sum(0).norm()
            / examples
            for layer in range(len(model.bert.encoder.layer))
        ]
    )


def _gradients(
    model: BertForSequenceClassification, batches: Iterable[LabelledBatch]
) -> list[tuple[list[torch.Tensor], int]]:
    """Return for each batch the gradient of its mean loss by layer, flat, and its size."""
    layers = [
        [parameter for parameter in layer.parameters() if parameter.requires_grad]
        for layer in model.bert.encoder.layer
    ]
    trained = list(itertools.chain.from_iterable(layers))
    if not trained:
        raise ConfigError("nothing trains in any layer; adapt the model by a plan first")
    found = []
    was_training = model.training
    model.eval()
    try:
        for inputs, targets in batches:
            loss = loss_function(model(**inputs), targets) / len(targets)
            gradients = iter(torch.autograd.grad(loss, trained))
            of_layers = [
                torch.cat([loss.new_zeros(0), *(next(gradients).flatten() for _ in layer)]).double()
                for layer in layers
            ]
            found.append((of_layers, len(targets)))
    finally:
        model.train(was_training)
    if not found:
        raise ConfigError("there are no batches to take gradients of")
    return found


def representation_changes(states: torch.Tensor) -> torch.Tensor:
    """Return how much each layer changes the states: 1 - linear CKA of its input and its output.

    With X and Y (n, D) the two, centred (Kornblith et al., 2019, "Similarity of Neural Network
    Representations Revisited", arXiv 1905.00414):

        CKA(X, Y) = ‖Yᵀ X‖²_F / (‖Xᵀ X‖_F ‖Yᵀ Y‖_F)

    Ogawa et al. (2026, "Layer-wise LoRA fine-tuning: a similarity metric approach", arXiv
    2602.05988) train the layers that change them most. CKA and not the cosine, because it does not
    see rotation, scale and the large common part of BERT's states, which keeps every cosine near 1.

    Parameters
    ----------
    states : torch.Tensor, (L + 1, n, D)
        Of one kind, as :func:`~spafit.experiments.probe.states.layer_states` returns them.

    Returns
    -------
    torch.Tensor of float64, (L,)
        From 0 to 1; 1 where input or output is the same for all rows, as [CLS] before layer 0 is.
    """
    X = states.double()
    X = X - X.mean(1, keepdim=True)
    # A constant has nothing but its rounding left.
    X = torch.where(X.abs() > 1e-6 * states.abs().amax(1, keepdim=True), X, 0.0)
    found = []
    for before, after in itertools.pairwise(X):
        size = (before.T @ before).norm() * (after.T @ after).norm()
        found.append(1 - (after.T @ before).square().sum() / size if size else size + 1)
    return torch.stack(found)


def condition_scores(model: BertForSequenceClassification) -> torch.Tensor:
    """Return minus the mean log condition number of each layer's matrices; needs no data.

    With σ the singular values of the six matrices W of layer l:

        K_l = -1/6 Σ_W log(σ_max(W) / σ_min(W))

    A high condition number may mean that a matrix holds knowledge which training would harm, so the
    layers with low ones are to be trained: Ludwig (2025, "The Condition Number as a
    Scale-Invariant Proxy for Information Encoding in Neural Units", arXiv 2506.16289), who chooses
    single matrices.

    Parameters
    ----------
    model : BertForSequenceClassification
        Of its Linear modules the pre-trained weights are taken.

    Returns
    -------
    torch.Tensor of float64, (L,)
        -inf where a matrix has not full rank.
    """
    found = []
    for layer in model.bert.encoder.layer:
        values = [
            torch.linalg.svdvals(module.weight.detach().double())
            for module in layer.modules()
            if isinstance(module, Linear)
        ]
        found.append(-torch.stack([(each[0] / each[-1]).log() for each in values]).mean())
    return torch.stack(found)


def layer_costs(config: BertConfig, kind: str = "II", r: int = 64) -> tuple[int, int]:
    """Return how many numbers a layer of group 2, and one of group 3, trains.

    7D + F, and 2Dr for each LoRA (three in FT-I, four in FT-II) with F + 2D for the biases.
    """
    D, F = config.hidden_size, config.intermediate_size
    return 7 * D + F, {"I": 3, "II": 4}[kind] * 2 * D * r + F + 2 * D


def boundaries(scores: torch.Tensor, sizes: Mapping[tuple[int, int], int]) -> tuple[int, int]:
    """Return N1 and N2, numbered from 0 with both ends, for scores, of those that are allowed.

    Those three groups are taken that say most about the scores: with the least sum of squares of
    the scores about m₁ <= m₂ <= m₃, one a group, which rise with depth as what SPAFIT trains does.
    Of equal ones that which trains most is taken, and of equally large ones that with the smaller
    N1. So scores that fall with depth, which no SPAFIT can follow, decide nothing.

    Parameters
    ----------
    scores : torch.Tensor, (L,)
        Finite; the larger, the more is to be trained.
    sizes : mapping of (int, int) to int
        How many numbers train with each (N1, N2) that is allowed, as under a budget.

    Raises
    ------
    ConfigError
        If a score is not finite, or nothing is allowed.
    """
    values = [float(each) for each in scores]
    if not bool(torch.isfinite(scores).all()):
        raise ConfigError("a score of a layer is not finite; take another selector")
    if not sizes:
        raise ConfigError("no N1 and N2 are allowed; raise the budget")
    size = max(map(abs, values)) or 1.0

    def rank(at: tuple[int, int]) -> tuple[float, int, int]:
        N1, N2 = at
        groups = (values[: N1 + 1], values[N1 + 1 : N2 + 1], values[N2 + 1 :])
        rest = _rest([[each / size for each in group] for group in groups])
        return round(rest, 12), -sizes[at], N1

    return min(sizes, key=rank)


def _rest(groups: list[list[float]]) -> float:
    """Return the sum of squares about means that rise from group to group.

    Neighbours whose means fall are put together until none do (isotonic regression).
    """
    joined: list[list[float]] = []
    for group in groups:
        joined.append(group)
        while len(joined) > 1 and _mean(joined[-2]) > _mean(joined[-1]):
            last = joined.pop()
            joined[-1] = joined[-1] + last
    return sum((each - _mean(group)) ** 2 for group in joined for each in group)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
