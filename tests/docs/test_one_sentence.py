"""The page of one sentence says what the model computes.

Oracle: the tiny model, and the page's own numbers, added up.
"""

import re
from html.parser import HTMLParser
from pathlib import Path

import one_sentence
import pytest
import torch

from weights_tools.tiny import make_tiny

SENTENCE = "the <cat> sat & never ran"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> one_sentence.Seen:
    folder = make_tiny(tmp_path_factory.mktemp("weights") / "tiny", num_hidden_layers=5)
    return one_sentence.look(SENTENCE, str(folder), rows=64)


@pytest.fixture(scope="module")
def html(seen: one_sentence.Seen) -> str:
    return one_sentence.page(seen)


def test_nothing_changes_in_group_1_and_something_does_above(seen: one_sentence.Seen) -> None:
    """SPAFIT-1-3-II: the embeddings and layers 0 and 1 are frozen."""
    changes = seen.changes
    assert changes.shape == (6, len(seen.ids))
    assert torch.count_nonzero(changes[:3]) == 0
    assert (changes[3:] > 0).all()


def test_the_head_is_the_one_that_changed_most(seen: one_sentence.Seen) -> None:
    layer, head = seen.head()
    apart = [
        [float((new - old).abs().sum()) for old, new in zip(before, after, strict=True)]
        for before, after in zip(*seen.attentions, strict=True)
    ]
    assert apart[layer][head] == max(map(max, apart)) > 0


def test_the_numbers_that_train_add_up(seen: one_sentence.Seen, html: str) -> None:
    cells = re.findall(r"<td>([\d,]+)</td><td>([\d,]+)</td>", html)
    trained, every = (
        sum(int(cell.replace(",", "")) for cell in each) for each in zip(*cells, strict=True)
    )
    assert len(cells) == 8  # embeddings, five layers, pooler, classifier
    assert trained == seen.summary.trainable
    assert every == sum(each.numel() for each in seen.model.parameters())


def test_rows_of_attention_add_up_to_100(seen: one_sentence.Seen, html: str) -> None:
    change, *tables = re.findall(r"<caption>.*?</table>", html, flags=re.DOTALL)
    assert len(re.findall("<tr>", change)) == 1 + 6  # tokens; embeddings and five layers
    assert len(tables) == 2
    for table in tables:
        _, *rows = re.findall(r"<tr>(.*?)</tr>", table)
        assert len(rows) == len(seen.ids)
        for row in rows:
            shares = re.findall(r">(\d+)</td>", row)
            assert abs(sum(map(int, shares)) - 100) <= len(shares) / 2


def test_the_page_is_whole_and_loads_nothing(html: str) -> None:
    """Every tag is closed, the sentence is text, and there is no address in it."""

    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attributes: object) -> None:
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    tags = Tags()
    tags.feed(html)
    assert not tags.open
    assert "<q>the &lt;cat&gt; sat &amp; never ran</q>" in html
    assert not re.search(r"https?:|<script|<link|src=|url\(", html)


def run(monkeypatch: pytest.MonkeyPatch, seen: one_sentence.Seen, *words: str) -> None:
    monkeypatch.setattr(one_sentence, "look", lambda sentence: seen)
    monkeypatch.setattr("sys.argv", ["one_sentence.py", *words])
    one_sentence.main()


def test_the_command_shows_the_head_that_is_asked_for(
    seen: one_sentence.Seen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "page.html"
    run(monkeypatch, seen, "--out", str(out), "--head", "4.1", "--", SENTENCE)
    assert "Layer 4, head 1.\n" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("head", ["5.0", "0.99", "one", "-1.0", "3"])
def test_a_head_that_is_not_there_is_refused(
    seen: one_sentence.Seen,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    head: str,
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, seen, f"--head={head}")
    assert f"LAYER.HEAD, below 5 and 3; found '{head}'" in capsys.readouterr().err
