"""What `fullft inspect` tells of the training data, on the terminal and as a page."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import chat, chats, write_jsonl, write_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fullft import cli
from fullft.data.inspect import Run, _bars, _Decoder
from fullft.errors import BadInput

ODD = [
    chat("café <b>&", "one & <script>two</script> \x1b[31mred"),  # row 1
    chat("How are you?", "Fine."),
    chat("how are you", "fine"),  # row 3: the same but for case and punctuation
    chat("cafÃ© crÃ¨me", "garÃ§on"),  # row 4
    chat("Как дела?", "Хорошо."),  # row 5
    chat("too long", "word " * 400),  # row 6
    {"nothing": 1},  # row 7
]


class Shown:
    """shown(**settings of the section data): what the command prints and writes."""

    def __init__(self, recipe: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.recipe, self.folder, self.capsys = recipe, folder, capsys

    def __call__(self, rows: int = 50, **settings: Any) -> tuple[str, str]:
        self.recipe["data"] |= {"on_bad_row": "skip", "on_too_long": "drop"} | settings
        path, page = write_recipe(self.recipe, self.folder / "recipe.yaml"), self.folder / "inspect.html"
        cli.inspect(str(path), [], rows, page)
        return self.capsys.readouterr().out, page.read_text(encoding="utf-8")


@pytest.fixture
def shown(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shown:
    recipe["data"]["train"] = str(write_jsonl(tmp_path / "odd.jsonl", ODD))
    return Shown(recipe, tmp_path, capsys)


def _plain(page: str) -> str:
    """Text of a page, lines of a list and cells of a table one below the other."""
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"</?(p|li|td|tr|th|pre|text)\b[^>]*>", "\n", page)))


def test_each_oddity_is_told_in_text_and_page(shown: Shown, tmp_path: Path) -> None:
    text, page = shown()
    file = tmp_path / "odd.jsonl"
    for told in (text, _plain(page)):
        assert re.search(r"bad rows +1 of 7 ", told)
        assert f"{file} row 7: has fields 'nothing'" in told
        assert re.search(r"too long +1 of 6 rows, above sequence_length \(128 tokens\): dropped", told)
        assert re.search(r"scripts .*Latin 83.3%, Cyrillic 16.7%", told)
        assert re.search(rf"mojibake [^\n]*: 1 of 6 rows; the first:\s+{file} row 4\n", told)
        assert re.search(r"duplicates +of an earlier row: 1 of 6 rows \(16.7%\)", told)
        assert re.search(rf"\b2\s+{file} row 2\s+{file} row 3\n", told)
        assert re.search(r"longest +the 6 longest documents", told)
        assert re.search(r"endings +all of 5 rows", told)
        assert re.search(r"packing +a sequence of step 1, from odd: documents \d", told)
        assert "padding\n" in told


def test_trained_run_is_marked(shown: Shown) -> None:
    text, page = shown()
    assert "<|im_start|>assistant\n«Хорошо.<|im_end|>" in text
    assert re.search(
        r"assistant\n<mark>Хорошо\.</mark><mark><span class='special'>&lt;\|im_end\|&gt;</span></mark>", page
    )
    assert "<mark>Как" not in page
    assert "«Как" not in text


def test_what_rows_hold_cannot_act(shown: Shown) -> None:
    text, page = shown()
    assert "\x1b" not in text
    assert "«one & <script>two</script> ␛[31mred" in text
    assert "\x1b" not in page
    assert "<script" not in page
    assert "café &lt;b&gt;&amp;" in page
    assert "one &amp; &lt;script&gt;two&lt;/script&gt;" in page


def test_page_needs_nothing_else(shown: Shown) -> None:
    _, page = shown()
    assert not re.search(r"src=|href=|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_colour_on_a_terminal_only_and_not_with_no_color(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    text, _ = shown()
    assert "\x1b[30;42mХорошо.\x1b[0m\x1b[30;42;2m<|im_end|>\x1b[0m" in text
    assert "␛[31mred" in text
    assert all(line.count("\x1b[0m") * 2 == line.count("\x1b[") for line in text.split("\n"))
    monkeypatch.setenv("NO_COLOR", "1")
    text, _ = shown()
    assert "\x1b" not in text


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("on_too_long", "fate"), [("truncate", "truncated"), ("split", r"split into \d+ documents")])
def test_cut_rows_and_limit(shown: Shown, on_too_long: str, fate: str, packing: bool) -> None:
    text, page = shown(on_too_long=on_too_long, packing=packing)
    for told in (text, _plain(page)):
        assert re.search(rf"1 of 6 rows, above sequence_length \(128 tokens\): {fate}.*; lost are [\d,]+ tokens", told)
        assert re.search(r"row 6: 128 of its [\d,]+ tokens, \d+ trained", told)
        assert "sequence_length is 128" in told
        assert ("packing" in told) == packing
    assert re.search(r"\n +129–[\d,]+ +█+ 1  above sequence_length\n", text)
    assert "class='over'" in page


def test_no_oddity(shown: Shown, tmp_path: Path) -> None:
    text, page = shown(train=str(write_jsonl(tmp_path / "good.jsonl", chats(40))), rows=2)
    for told in (text, _plain(page)):
        assert re.search(r"rows +all are used, and none is cut", told)
        assert re.search(r"duplicates +none\n", told)
        assert len(re.findall(r"row \d+: [\d,]+ tokens, [\d,]+ trained", told)) == 2
        assert "scripts" not in told


def test_duplicates_across_sets_and_warnings(shown: Shown, tmp_path: Path) -> None:
    sets = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", [*chats(number), ODD[1]])) for name, number in (("a", 3), ("b", 1))
    ]
    text, page = shown(train=sets, validation=str(write_jsonl(tmp_path / "held.jsonl", [ODD[2]])))
    for told in (text, _plain(page)):
        assert re.search(rf"\b2\s+a, b\s+{tmp_path}/a.jsonl row 1\s+{tmp_path}/b.jsonl row 1\n", told)
        assert re.search(r"warning +a: 1 rows overlap with validation \(1 are equal", told)


def test_lost_reasoning(shown: Shown, tmp_path: Path) -> None:
    """The template of the tiny model does not write it."""
    row = chat("Why?", "So.")
    row["messages"][1]["reasoning_content"] = "Because."
    text, page = shown(train=str(write_jsonl(tmp_path / "thinking.jsonl", [row, *chats(3)])))
    for told in (text, _plain(page)):
        assert re.search(r"reasoning +left out by the chat template in 1 of 4 rows", told)


def test_rows_that_do_not_end(shown: Shown, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 3
    text, page = shown(train=str(write_jsonl(tmp_path / "endless.jsonl", rows)))
    for told in (text, _plain(page)):
        assert re.search(r"endings +3 of 3 rows looked at do not end .*\n\s*\S+endless.jsonl row 1\n", told)


def test_page_that_cannot_be_written(shown: Shown, tmp_path: Path) -> None:
    path = write_recipe(shown.recipe | {"data": shown.recipe["data"] | {"on_bad_row": "skip", "on_too_long": "drop"}},
                        tmp_path / "recipe.yaml")  # fmt: skip
    with pytest.raises(BadInput, match="cannot be written"):
        cli.inspect(str(path), [], 1, tmp_path / "absent" / "x.html")


def test_long_document_is_cut_between_characters(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    whole = "日本語 😀 and more " * 200
    ids = numpy.array(tokenizer(whole, add_special_tokens=False)["input_ids"], numpy.int32)
    for first in range(4):  # tokens of a character may lie on both sides of each border
        trained = numpy.arange(len(ids)) > first
        runs = list(_Decoder(tokenizer).runs(ids[: len(ids) - 4 * first], trained[: len(ids) - 4 * first]))
        (gap,) = (at for at, run in enumerate(runs) if run.kind == "gap")
        head, tail = ("".join(run.text for run in part) for part in (runs[:gap], runs[gap + 1 :]))
        assert whole.startswith(head)
        assert tail in whole
        hidden = int(runs[gap].text.split()[1].replace(",", ""))
        assert len(ids) - 4 * first - 608 <= hidden <= len(ids) - 4 * first - 592


def test_space_before_a_run_is_kept() -> None:
    """Tokenizers made by SentencePiece drop the first space of what they decode."""
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False)
    model.train_from_iterator(["the quick fox"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    ids = numpy.array(tokenizer("the quick fox")["input_ids"], numpy.int32)
    assert _Decoder(tokenizer).text(ids, 1, 2) == " quick"
    runs = list(_Decoder(tokenizer).runs(ids, numpy.array([False, True, False])))
    assert runs == [Run("the", False), Run(" quick", True), Run(" fox", False)]


@pytest.mark.parametrize(
    ("lengths", "limit"),
    [([1], 8), ([7, 7], 7), (range(1, 2000), 512), ([*[40] * 99, 60_000], 65_536), ([900, 950], 100), ([5, 300], 299)],
)
def test_histogram_counts_every_document_once(lengths: Any, limit: int) -> None:
    lengths = numpy.array(lengths)
    bars = _bars(lengths, limit)
    assert len(bars) <= 16
    assert [bar.documents for bar in bars] == [
        int(((lengths >= bar.first) & (lengths <= bar.last)).sum()) for bar in bars
    ]
    assert sum(bar.documents for bar in bars) == len(lengths)
    assert (bars[0].first, bars[-1].last) == (lengths.min(), lengths.max())
    assert all(bar.last <= limit or bar.first > limit for bar in bars)
    assert bars[0].documents
    assert bars[-1].documents
