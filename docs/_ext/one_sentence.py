"""Write one sentence's way through the model as a page for a projector, in a file of its own.

``make sentence SENTENCE="The soup was never dull."`` makes it for any sentence; ``make docs`` makes
it for :data:`SENTENCE`. A small adapter is trained first, on the task of ``spafit demo``.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from sphinx.application import Sphinx

import spafit
from spafit.demo.run import LEARNING_RATES, SPAFIT
from spafit.demo.sentiment import datasets

SENTENCE = "The soup was never unforgettable."
FILE = "one_sentence.html"


@dataclass
class Seen:
    """What the pre-trained and the adapted model make of one sentence."""

    sentence: str
    model: spafit.BertForSequenceClassification
    summary: spafit.Summary
    result: spafit.Result
    rows: int
    labels: tuple[str, ...]
    tokens: list[str]
    ids: list[int]
    states: tuple[list[torch.Tensor], list[torch.Tensor]]  # before, after: L + 1 of (T, D)
    attentions: tuple[list[torch.Tensor], list[torch.Tensor]]  # L of (A, T, T)
    answers: tuple[torch.Tensor, torch.Tensor]  # (C,)

    @property
    def changes(self) -> torch.Tensor:
        """By layer and token, ‖after - before‖ as a share of ‖before‖, (L + 1, T)."""
        before, after = map(torch.stack, self.states)
        share: torch.Tensor = (after - before).norm(dim=-1) / before.norm(dim=-1)
        return share

    def head(self) -> tuple[int, int]:
        """Return the layer and the head whose attention changed most."""
        before, after = map(torch.stack, self.attentions)  # (L, A, T, T)
        apart = (after - before).abs().sum((-1, -2))
        layer, head = divmod(int(apart.argmax()), apart.shape[1])
        return layer, head


def look(sentence: str, model: str = "minilm", rows: int = 1200) -> Seen:
    """Train an adapter on so many sentences, and pass one through the model without and with it."""
    tokenizer = spafit.load_tokenizer(model)
    train, dev = datasets(0, train_size=rows, dev_size=100)
    network = spafit.load_pretrained(model, num_labels=2, seed=0)
    summary = spafit.adapt(network, SPAFIT, seed=0)
    config = spafit.TrainConfig(
        seed=0, epochs=1, learning_rate=LEARNING_RATES[SPAFIT], warmup=0.1, quiet=True
    )
    result = spafit.fit(network, tokenizer, train, dev, config)
    batch = tokenizer([sentence])
    spafit.set_impl(network.eval(), "reference")  # the plain form, which holds what is shown here

    def passed() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        with torch.no_grad():
            out = network(*batch, output_hidden_states=True, output_attentions=True)
        states, attentions = ([each[0] for each in of] for of in out[1:])
        return states, attentions, out.logits[0].softmax(-1)

    after = passed()
    with spafit.adapters_disabled(network):
        before = passed()
    ids = batch.input_ids[0].tolist()
    tokens = [tokenizer.decode([each]) for each in ids]
    return Seen(
        sentence,
        network,
        summary,
        result,
        rows,
        train.task.labels,
        tokens,
        ids,
        states=(before[0], after[0]),
        attentions=(before[1], after[1]),
        answers=(before[2], after[2]),
    )


_STYLE = """
body { font: 24px/1.45 sans-serif; color: #000; background: #fff; margin: 2rem auto;
  max-width: 1500px; padding: 0 1.5rem; }
h1 { font-size: 1.9em; margin-bottom: 0; } h2 { font-size: 1.4em; margin: 2.2em 0 .4em; }
q { font-size: 1.5em; font-weight: bold; } p { max-width: 60em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { border: 1px solid #666; padding: .25em .55em; text-align: right; font-weight: normal; }
th { background: #eee; } td.words, th.words { text-align: left; }
.tokens { display: flex; flex-wrap: wrap; gap: .5em; }
.tokens span { border: 2px solid #000; border-radius: .3em; padding: .2em .6em; font-size: 1.2em; }
.tokens small { display: block; font-size: .6em; color: #444; }
code, .shape { font-family: monospace; white-space: nowrap; }
.group-1 { background: #fff; } .group-2 { background: #d4d4d4; }
.group-3 { background: #555; color: #fff; }
.pair { display: flex; flex-wrap: wrap; gap: 2.5em; } .pair > * { max-width: 100%; }
caption { text-align: left; padding: .3em 0; }
.numbers { font-size: .95em; } .numbers td { min-width: 2em; }
"""


def page(seen: Seen, head: tuple[int, int] | None = None) -> str:
    """Return the page: large, in grey, with nothing to load from elsewhere."""
    config, summary = seen.model.config, seen.summary
    T, D, A = len(seen.ids), config.hidden_size, config.num_attention_heads
    layer, number = seen.head() if head is None else head
    majority, score = (
        next(iter(each.values())) for each in (seen.result.majority, seen.result.metrics)
    )
    before, after = (each[layer][number] for each in seen.attentions)  # (T, T)
    places = ["embeddings", *(f"layer {each}" for each in range(config.num_hidden_layers))]
    largest = max(float(seen.changes.max()), 1e-9)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>One sentence through the model</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>One sentence through the model</h1>
<p><q>{escape(seen.sentence)}</q></p>
<p>The model has {summary.pretrained:,} numbers. {escape(summary.plan.name)} trains
{summary.trainable:,} of them ({summary.percent:.1f} %). It was trained just now on {seen.rows}
sentences, to say whether a sentence is {" or ".join(seen.labels)}; on 100 others it is right in
{score:.0%}. Guessing one answer always gives {majority:.0%}.</p>

<h2>1. The sentence becomes {T} tokens</h2>
<p>A word that the vocabulary lacks is cut into pieces, marked ##. Above each token its place, below
it its row in the table of {config.vocab_size:,} embeddings.</p>
<div class="tokens">{"".join(map(_token, range(T), seen.tokens, seen.ids))}</div>

<h2>2. From layer to layer</h2>
<p>Every layer gives one vector of D = {D} numbers for each token. What differs from group to group
is how much of a layer trains.</p>
<div class="wide"><table><tr><th class="words">part</th><th class="words">what trains</th>
<th>numbers that train</th><th>of all</th><th class="words">gives</th></tr>
{_parts(seen)}</table></div>

<h2>3. Inside a layer</h2>
<p>The same in all {config.num_hidden_layers} layers; T = {T} tokens, A = {A} heads of
Dh = {config.head_size} numbers, F = {config.intermediate_size:,}.</p>
<div class="wide"><table>{_inside(T, config)}</table></div>

<h2>4. What the adapter changed</h2>
<p>How far a token's vector moved after each layer, in percent of its length: the adapted model
against the pre-trained one. Group 1 is frozen, so nothing moves there.</p>
{_shares("Change", places, seen.tokens, seen.changes, largest)}

<h2>5. What one head attends to</h2>
<p>Layer {layer}, head {number}{", the one that the adapter changed most" if head is None else ""}.
A row is a token that looks, a column a token that is looked at; a row adds up to 100 percent.</p>
<div class="pair">
{_shares("Pre-trained", seen.tokens, seen.tokens, before)}
{_shares("With the adapter", seen.tokens, seen.tokens, after)}
</div>

<h2>6. The answer</h2>
<p>Before training the head is drawn at random, so the first row means nothing.</p>
<div class="wide"><table>
<tr><th></th>{"".join(f"<th>{escape(each)}</th>" for each in seen.labels)}</tr>
{_answer("pre-trained, untrained head", seen.answers[0])}
{_answer("with the adapter", seen.answers[1])}</table></div>
</body></html>
"""


def _token(place: int, token: str, number: int) -> str:
    return f"<span><small>{place}</small>{escape(token)}<small>{number}</small></span>"


def _parts(seen: Seen) -> str:
    """Return a row for the embeddings, each layer, the pooler and the classifier."""
    bert, T, D = seen.model.bert, len(seen.ids), seen.model.config.hidden_size
    groups = {each.name: each for each in seen.summary.groups}
    assert bert.pooler is not None
    rows: list[tuple[str, torch.nn.Module, str, str, str]] = [
        ("embeddings", bert.embeddings, "", "frozen", f"X ({T}, {D})")
    ]
    for stratum in seen.summary.plan.strata:
        trains = (each.partition(" (")[0] for each in groups[stratum.name].trains)
        words = " · ".join(dict.fromkeys(trains))
        for number in range(stratum.first, stratum.last + 1):
            name = f"layer {number}, {stratum.name}"
            kind = stratum.name.replace(" ", "-")
            rows.append((name, bert.encoder.layer[number], kind, words, f"H7 ({T}, {D})"))
    rows.append(("pooler, of [CLS] alone", bert.pooler, "", "frozen", f"({D},)"))
    C = len(seen.labels)
    rows.append(("classifier", seen.model.classifier, "group-3", "full", f"({C},)"))
    lines = []
    for name, module, kind, words, shape in rows:
        sizes = [(each.numel(), each.requires_grad) for each in module.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        lines.append(
            f'<tr class="{kind}"><td class="words">{name}</td><td class="words">{words}</td>'
            f"<td>{trained:,}</td><td>{sum(size for size, _ in sizes):,}</td>"
            f'<td class="words shape">{shape}</td></tr>'
        )
    return "\n".join(lines)


def _inside(T: int, config: spafit.BertConfig) -> str:
    """Return a row for each step of a layer, with the shape of what it gives."""
    D, A, Dh, F = (
        config.hidden_size,
        config.num_attention_heads,
        config.head_size,
        config.intermediate_size,
    )
    steps = [
        ("Q, K, V", "three maps of the layer's input X, Eq. (1) to (3)", f"3 × ({T}, {D})"),
        ("", "cut into heads", f"3 × ({A}, {T}, {Dh})"),
        ("softmax(QKᵀ / √Dh)", "who attends to whom, in each head", f"({A}, {T}, {T})"),
        ("H1", "the values, weighted by it, Eq. (4)", f"({A}, {T}, {Dh})"),
        ("H2", "the heads side by side, Eq. (5')", f"({T}, {D})"),
        ("H4", "a map, plus X, normalised, Eq. (7')", f"({T}, {D})"),
        ("H5", "a wider map and GELU, Eq. (8)", f"({T}, {F})"),
        ("H7", "a map back, plus H4, normalised, Eq. (10')", f"({T}, {D})"),
    ]
    return "\n".join(
        f'<tr><td class="words"><code>{symbol}</code></td><td class="words">{words}</td>'
        f'<td class="words shape">{shape}</td></tr>'
        for symbol, words, shape in steps
    )


def _grey(share: float, text: str) -> str:
    """Return a cell that is the darker the larger the share is, its text legible on it."""
    light = round(255 - 200 * min(max(share, 0.0), 1.0))
    ink = "#fff" if light < 150 else "#000"
    return f'<td style="background: rgb({light}, {light}, {light}); color: {ink}">{text}</td>'


def _shares(
    caption: str, rows: list[str], tokens: list[str], shares: torch.Tensor, darkest: float = 1.0
) -> str:
    """Return a table of shares in percent, with a column for each token."""
    heads = "".join(f"<th>{escape(each)}</th>" for each in tokens)
    lines = [
        f'<tr><th class="words">{escape(name)}</th>'
        + "".join(_grey(each / darkest, f"{100 * each:.0f}") for each in row)
        + "</tr>"
        for name, row in zip(rows, shares.tolist(), strict=True)
    ]
    return (
        f'<div class="wide"><table class="numbers"><caption>{caption}</caption>'
        f"<tr><th></th>{heads}</tr>{''.join(lines)}</table></div>"
    )


def _answer(name: str, shares: torch.Tensor) -> str:
    cells = "".join(_grey(each, f"{each:.0%}") for each in shares.tolist())
    return f'<tr><th class="words">{name}</th>{cells}</tr>'


def main() -> None:
    """Write the page for the sentence that the command line gives."""
    parser = argparse.ArgumentParser(description="Show one sentence on its way through the model.")
    parser.add_argument("sentence", nargs="?", default="", help=f"{SENTENCE!r} if left out")
    parser.add_argument("--head", help="LAYER.HEAD, from 0; left out: the one that changed most")
    parser.add_argument("--out", type=Path, default=Path(FILE))
    given = parser.parse_args()
    numbers = re.fullmatch(r"(\d+)\.(\d+)", given.head or "0.0")
    seen = look(given.sentence or SENTENCE)
    sizes = seen.model.config.num_hidden_layers, seen.model.config.num_attention_heads
    if numbers is None or int(numbers[1]) >= sizes[0] or int(numbers[2]) >= sizes[1]:
        parser.error(f"--head is LAYER.HEAD, below {sizes[0]} and {sizes[1]}; found {given.head!r}")
    head = None if given.head is None else (int(numbers[1]), int(numbers[2]))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(page(seen, head), encoding="utf-8")
    print(given.out)


def _write(app: Sphinx) -> list[None]:
    (Path(app.outdir) / FILE).write_text(page(look(SENTENCE)), encoding="utf-8")
    return []


def setup(app: Sphinx) -> dict[str, bool]:
    """Have the build write the page beside its own."""
    app.connect("html-collect-pages", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    main()
