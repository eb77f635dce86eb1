"""Training on one page: the definition of :func:`spafit.fit`, which is tested against it.

Read :func:`fit` from top to bottom: the order of the data, padded batches, forward, loss, backward,
gradient clipping, AdamW, its schedule, evaluation, and keeping the best. With a model in the
reference form (``spafit.set_impl(model, "reference")``), :func:`spafit.fit` gives the same losses,
scores and weights, on a CPU bit for bit. Its fast forms give them to rounding if there is no
dropout; with dropout they draw other masks, because packed batches have no padding to draw for.

What :func:`spafit.fit` adds is not here: run folder and checkpoints, micro-batches, other
precisions, early stopping, steps skipped because their gradient is not finite, hidden states kept
from one epoch to the next, CUDA graphs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from spafit.bert import BertForSequenceClassification
from spafit.errors import ConfigError
from spafit.tasks import scoring
from spafit.tasks.label_order import label_names
from spafit.tasks.metrics import is_better
from spafit.tasks.task import Dataset
from spafit.text.tokenization import Tokenizer
from spafit.training.settings import TrainConfig, class_weights, complete


@torch.inference_mode(False)  # with gradients, whatever mode the caller is in
def fit(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    train: Dataset,
    dev: Dataset,
    config: TrainConfig,
) -> tuple[list[float], list[dict[str, Any]]]:
    """Fine-tune the parameters that a plan declares, and keep the values that are best on dev.

    Parameters
    ----------
    model : BertForSequenceClassification
        Adapted (:func:`spafit.adapt`). It is left on the run's device in evaluation mode, with the
        trained values of the best evaluation by the task's first metric; of equal ones, the first.
    tokenizer : Tokenizer
        The model's.
    train, dev : Dataset
        Labelled examples of one task.
    config : TrainConfig
        The settings. Those for the run folder, for speed and for memory are not used.

    Returns
    -------
    losses : list of float
        The mean loss of each batch, before its step.
    history : list of dict
        The step, epoch and metrics of each evaluation.

    Raises
    ------
    ConfigError
        If the precision is not float32.
    """
    config = complete(config, model, train)  # the paper's settings, where none are given
    assert config.batch_size and config.learning_rate and config.max_length and model.adaptation
    assert config.order_seed is not None and config.dropout_seed is not None
    if config.precision != "float32":
        raise ConfigError(f"this page knows no precision but float32, found {config.precision}")
    device, task = torch.device(config.device), train.task.with_metric(config.metric)
    names, (center, spread), metric = label_names(model, train), task.scale, task.metrics[0]
    how = model.adaptation.trained  # the rate and decay of each parameter, as the plan has them
    model.to(device)
    ids = tokenizer.encode(train.texts_a, train.texts_b, max_length=config.max_length)
    dev_ids = tokenizer.encode(dev.texts_a, dev.texts_b, max_length=config.max_length)
    weights, smoothing = class_weights(config, names), config.label_smoothing
    targets = torch.tensor(
        [names.index(str(y)) if names else (float(y or 0) - center) / spread for y in train.labels]
    )

    # AdamW, with weight decay on matrices; on vectors only if asked for, or if the plan says so.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decays = config.weight_decay, config.weight_decay if config.decay_biases else 0.0
    groups: list[Any] = [
        {"params": [p], "rate": how[name].rate, "weight_decay": how[name].decay(p, *decays)}
        for name, p in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, fused=True)

    losses, history = list[float](), list[dict[str, Any]]()
    steps_an_epoch = math.ceil(len(train) / config.batch_size)  # the last batch may be smaller
    total = steps_an_epoch * config.epochs
    warm = math.ceil(config.warmup * total)
    torch.manual_seed(config.dropout_seed)  # the order of the data has its own generator
    for step in range(total):
        epoch, start = 1 + step // steps_an_epoch, step % steps_an_epoch * config.batch_size
        order = np.random.default_rng([config.order_seed, epoch]).permutation(len(train)).tolist()
        rows = order[start : start + config.batch_size]

        # What the plan has frozen at this step has no gradient, so that AdamW leaves it alone.
        for name, p in trained.items():
            p.requires_grad_(how[name].trains_at(step, steps_an_epoch, total))

        # Forward: the mean loss of a batch.
        model.train()
        if not config.dropout_in_group_1:
            model.bert.freeze_dropout()
        logits, y = model(*ids.batch(rows).to(device)), targets[rows].to(device)  # (B, C), (B,)
        if names:
            loss = F.cross_entropy(logits, y, weights, reduction="sum", label_smoothing=smoothing)
        else:
            loss = F.mse_loss(logits[:, 0], y.to(logits), reduction="sum")
        loss = loss / len(rows)
        losses.append(loss.item())

        # Backward: the gradient, its norm over all parameters clipped.
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for gradient in gradients if config.max_grad_norm else []:
            gradient *= torch.clamp(config.max_grad_norm / (norm + 1e-6), max=1.0)

        # AdamW's step. The learning rate rises linearly from 0 in the warm-up, then falls to 0.
        factor = step / warm if step < warm else (total - step) / max(1, total - warm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor * group["rate"]
        optimizer.step()

        # Evaluate on dev, in batches of similar length; keep the trained values if they are best.
        if (step + 1) % (config.eval_every or steps_an_epoch) and step + 1 < total:
            continue
        model.eval()
        outputs = torch.empty(len(dev), model.num_labels)
        order = dev_ids.by_length(range(len(dev)))
        for rows in (order[first : first + 64] for first in range(0, len(dev), 64)):
            with torch.no_grad():
                outputs[rows] = model(*dev_ids.batch(rows).to(device)).float().cpu()
        sizes = (center + spread * outputs[:, 0].double()).tolist()
        answers = [names[k] for k in outputs.argmax(1)] if names else sizes
        sure = outputs.double().softmax(1)[:, [names.index(label) for label in task.labels]]
        scores = scoring.compute(task, answers, dev.labels, sure.numpy())
        if all(is_better(metric, scores[metric], old["metrics"][metric]) for old in history):
            best = {name: p.detach().clone() for name, p in trained.items()}
        history.append({"step": step + 1, "epoch": epoch, "metrics": scores})
    for name, value in best.items():
        trained[name].requires_grad_(True).data.copy_(value)
    model.eval()
    return losses, history
