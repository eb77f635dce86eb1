"""Draw what trains in each layer under a plan, as the paper's Figure 2 does: ``docs/strata.svg``.

``python docs/_ext/strata.py`` draws it anew, from the summary of SPAFIT-4-9-II on BERT-large.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import torch

import spafit

PICTURE = Path(__file__).resolve().parents[1] / "strata.svg"
_SUBLAYERS = ("attention.self", "attention.output", "intermediate", "output")
_KINDS = {"frozen": "frozen", "bias": "biases train", "LoRA": "LoRA trains", "full": "all trains"}
_LEFT, _TOP, _COLUMN, _ROW = 258, 140, 26, 42  # of the first layer; of a cell with its gap


def summary() -> spafit.Summary:
    """Return what trains in BERT-large, adapted without values, with three labels."""
    with torch.device("meta"):
        model = spafit.BertForSequenceClassification(spafit.BertConfig(), num_labels=3)
    return spafit.adapt(model, spafit.plan("SPAFIT-4-9-II", num_layers=24))


def _cell(kind: str, x: int, y: int, width: int, height: int) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="3"/>'


def _text(x: int, y: int, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def _upright(x: int, words: str, kind: str) -> str:
    middle = _TOP + 2 * _ROW
    turned = f' class="on-{kind}" transform="rotate(-90 {x} {middle})" dominant-baseline="central"'
    return _text(x, middle, words, more=turned)


def draw(its: spafit.Summary) -> str:
    """Return the picture as SVG; it is legible on a light and on a dark page."""
    groups = {group.name: group for group in its.groups}
    bottom = _TOP + 4 * _ROW
    right = _LEFT + its.plan.num_layers * _COLUMN
    width = right + 70
    share = f"{its.percent:.2f} % of {its.pretrained:,}"
    drawn = [
        _text(width // 2, 40, f"{its.plan.name}: {its.trainable:,} numbers train, {share}"),
        *(
            _text(_LEFT - 54, _TOP + 27 + _ROW * number, words, "end")
            for number, words in enumerate(_SUBLAYERS)
        ),
        _cell("frozen", _LEFT - 44, _TOP, 34, 4 * _ROW - 4),
        _upright(_LEFT - 27, "embeddings", "frozen"),
        _cell("full", right + 6, _TOP, 34, 4 * _ROW - 4),
        _upright(right + 23, "classifier", "full"),
        _text(right + 23, bottom + 32, f"{groups['classifier'].trainable:,}"),
        _text(_LEFT - 54, bottom + 32, "numbers", "end"),
    ]
    for stratum in its.plan.strata:
        group = groups[stratum.name]
        middle = _LEFT + _COLUMN * (stratum.first + stratum.last + 1) // 2
        drawn += [
            _text(middle, 92, stratum.name, more=' class="name"'),
            _text(middle, 122, f"layers {stratum.layers}"),
            _text(middle, bottom + 32, f"{group.trainable:,}"),
        ]
        for layer in range(stratum.first, stratum.last + 1):
            for number, words in enumerate(group.trains):
                kind = words.split()[0]
                x, y = _LEFT + _COLUMN * layer, _TOP + _ROW * number
                drawn.append(_cell(kind, x, y, _COLUMN - 4, _ROW - 4))
    for number, (kind, words) in enumerate(_KINDS.items()):
        x = 60 + (width - 60) // 4 * number
        drawn += [_cell(kind, x, bottom + 62, 26, 26), _text(x + 36, bottom + 83, words, "start")]
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 112}">
<title>What trains in each layer under {its.plan.name}</title>
<style>
svg {{ --page: #ffffff; --text: #1a1a1a; --line: #8a8a8a;
  --frozen: #eeeeee; --bias: #8db9e8; --lora: #1f5fa8; --full: #10243e; }}
@media (prefers-color-scheme: dark) {{ svg {{ --page: #16181c; --text: #ececec; --line: #77797d;
  --frozen: #2a2d33; --bias: #4f7fb3; --lora: #a9d0fa; --full: #ffffff; }} }}
text {{ font: 23px sans-serif; fill: var(--text); }}
.name {{ font-weight: bold; }}
rect {{ stroke: var(--line); }}
.page {{ fill: var(--page); stroke: none; }}
.frozen {{ fill: var(--frozen); }}
.bias {{ fill: var(--bias); }}
.LoRA {{ fill: var(--lora); }}
.full {{ fill: var(--full); }}
.on-full {{ fill: var(--page); }}
</style>
<rect class="page" width="{width}" height="{bottom + 112}" rx="8"/>
{chr(10).join(drawn)}
</svg>
"""


if __name__ == "__main__":
    PICTURE.write_text(draw(summary()), encoding="utf-8")
