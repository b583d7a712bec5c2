"""From rows to the batches of a step: every shape and file kind, which tokens carry loss, packing, order, cache."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
from conftest import TEXTS, chat, chats, write_jsonl
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fullft.data import sequences
from fullft.data.batches import Batches, Geometry
from fullft.data.cache import open_sets
from fullft.data.formats import BadRow, Conversation, Text
from fullft.data.mixture import mix
from fullft.data.packing import pack
from fullft.data.sequences import Sequences, open_sequences
from fullft.data.tokens import Tokens, tokenize
from fullft.errors import BadInput
from fullft.loss import IGNORE
from fullft.recipe import Data, TrainingSource

BOS, END = "<|endoftext|>", "<|im_end|>"


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    """Fresh for each test, so that a test may change its template."""
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(params=["with generation marks", "without generation marks"])
def either_tokenizer(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return tokenizer if request.param == "with generation marks" else without_marks(tokenizer)


def without_marks(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A template that renders the same text, as most models have it."""
    plain, count = re.subn(r"\{%-? *(end)?generation *-?%\}", "", tokenizer.chat_template)
    assert count == 2
    tokenizer.chat_template = plain
    return tokenizer


@dataclass(frozen=True)
class Found:
    """Prepared and packed sets. `rows`: their documents after cutting to length, in order."""

    sets: list[Sequences]

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for number, one in enumerate(self.sets):
            for start, document, length in sorted(one.slices.tolist()):
                ids, trained = one.tokens.read(start, length)
                row = {"input_ids": ids.tolist(), "trained": [False, *trained[1:].tolist()], "length": length}
                rows.append(row | {"source": number, "row": one.tokens.place(document)[1]})
        return rows

    @property
    def summary(self) -> dict[str, Any]:
        """Of all sets together; counts of 0 left out."""
        totals: Counter[str] = Counter()
        for one in self.sets:
            counts = one.tokens.summary | one.summary
            totals.update({name: value for name, value in counts.items() if isinstance(value, int)})
        return {name: value for name, value in totals.items() if value} | {
            "first_bad_rows": [line for one in self.sets for line in one.tokens.summary["first_bad_rows"]]
        }


class Prepare:
    """prepare(train, **settings of the section data): the documents, from a cache of this test."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
        self.tokenizer = tokenizer
        self.cache = cache

    def __call__(self, train: Any, **settings: Any) -> Found:
        data = Data.model_validate({"train": train, "sequence_length": 512} | settings)
        return Found([open_sequences(one, data) for one in open_sets(data, self.tokenizer, self.cache)])

    def refusal(self, train: Any, **settings: Any) -> list[str]:
        with pytest.raises(BadInput) as caught:
            self(train, **settings)
        return caught.value.problems

    def prepared(self) -> dict[str, int]:
        """What the cache holds, and when each part of it was written."""
        return {file.parent.name: file.stat().st_mtime_ns for file in self.cache.glob("*/documents.npy")}


@pytest.fixture
def prepare(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Prepare:
    return Prepare(tokenizer, tmp_path / "cache")


def tokens_of(documents: Found) -> list[tuple[list[int], list[bool]]]:
    return [(row["input_ids"], row["trained"]) for row in documents.rows]


def places_of(documents: Found) -> list[tuple[int, int]]:
    return [(row["source"], row["row"]) for row in documents.rows]


def trained_text(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> str:
    return str(tokenizer.decode([token for token, trained in zip(tokens.ids, tokens.trained, strict=True) if trained]))


def turns(*texts: str, system: str = "") -> Conversation:
    """user, assistant, user, assistant, ..."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Conversation([{"role": "system", "content": system}, *messages] if system else messages)


# Formats and file kinds


QUESTIONS = [("Add 2 and 3.", "5", ""), ("Translate.\n\nGuten Tag", "Good day.", "Be brief."), ("Say ä.", "ä", "")]


def in_shape(shape: str) -> list[dict[str, Any]]:
    """The same three conversations as rows of this shape."""
    rows: list[dict[str, Any]] = []
    for question, answer, system in QUESTIONS:
        first = [{"role": "system", "content": system}] if system else []
        asked = [*first, {"role": "user", "content": question}]
        answered = [{"role": "assistant", "content": answer}]
        instruction, _, more = question.partition("\n\n")
        rows.append(
            {
                "messages": {"messages": asked + answered, "id": "x"},
                "prompt_completion": {"prompt": asked, "completion": answered},
                "alpaca": {"instruction": instruction, "input": more, "output": answer, "system": system},
            }[shape]
        )
    return rows


@pytest.mark.parametrize("given", ["auto", "named"])
def test_every_shape_of_a_chat_gives_the_same_documents(prepare: Prepare, tmp_path: Path, given: str) -> None:
    results = {}
    for shape in ("messages", "prompt_completion", "alpaca"):
        file = write_jsonl(tmp_path / f"{shape}.jsonl", in_shape(shape))
        results[shape] = tokens_of(prepare({"path": str(file), "format": "auto" if given == "auto" else shape}))
    assert len(results["messages"]) == 3
    assert results["messages"] == results["prompt_completion"] == results["alpaca"]


def test_alpaca_rows_need_neither_input_nor_system(prepare: Prepare, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add 2 and 3.", "output": "5"},
        {"instruction": "Add 2 and 3.", "output": "5", "input": None, "system": None},
        {"instruction": "", "output": "5", "input": "Add 2 and 3."},
        chat("Add 2 and 3.", "5"),
    ]
    one, *others = tokens_of(prepare(str(write_jsonl(tmp_path / "a.jsonl", rows))))
    assert others == [one] * 3


def test_columns_of_other_names_are_mapped(prepare: Prepare, tmp_path: Path) -> None:
    renamed = write_jsonl(tmp_path / "q.jsonl", [{"question": q, "answer": a} for q, a, _ in QUESTIONS])
    usual = write_jsonl(tmp_path / "i.jsonl", [{"instruction": q, "output": a} for q, a, _ in QUESTIONS])
    mapped = prepare({"path": str(renamed), "fields": {"instruction": "question", "output": "answer"}})
    assert tokens_of(mapped) == tokens_of(prepare(str(usual)))


def test_a_named_format_wins_over_what_the_fields_look_like(
    prepare: Prepare, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write_jsonl(tmp_path / "both.jsonl", [chat("Hi", "Hello") | {"text": "Only this."}])
    (chosen,) = prepare({"path": str(file), "format": "text"}).rows
    assert tokenizer.decode(chosen["input_ids"]) == f"Only this.{END}"


def test_prompt_and_completion_texts_are_used_as_they_are(
    tokenizer: PreTrainedTokenizerBase, prepare: Prepare, tmp_path: Path
) -> None:
    row = {"prompt": "2 + 3 =", "completion": " 5"}
    (document,) = prepare(str(write_jsonl(tmp_path / "p.jsonl", [row]))).rows
    assert tokenizer.decode(document["input_ids"]) == f"2 + 3 = 5{END}"
    assert trained_text(tokenizer, Tokens(document["input_ids"], document["trained"])) == f" 5{END}"


def mixed_rows() -> list[dict[str, Any]]:
    """Rows that are awkward in columns: other letters, line breaks, a system turn in some, tool turns in one."""
    long = turns("A?", "B \n\n B.", "C?", "D", system="S ü 😀").messages
    return [*chats(9), {"messages": long}, *chats(3)]


def write_kind(kind: str, folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows as a data set of this kind; returns the source to read it with."""
    folder.mkdir()
    table = datasets.Dataset.from_list(rows)
    match kind:
        case "jsonl":
            write_jsonl(folder / "a.jsonl", rows)
        case "jsonl with blank lines, CRLF and byte order mark":
            lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
        case "json":
            (folder / "a.json").write_text(json.dumps(rows, indent=2))
        case "parquet":
            table.to_parquet(folder / "a.parquet")
        case "glob":
            write_jsonl(folder / "1.jsonl", rows[:5])
            (folder / "2.json").write_text(json.dumps(rows[5:8]))
            table.select(range(8, len(rows))).to_parquet(folder / "3.parquet")
            return {"path": str(folder / "*")}
        case "arrow folder":
            table.save_to_disk(folder / "a.arrow")
            return {"path": str(folder / "a.arrow")}
        case "arrow folder with splits":
            datasets.DatasetDict(test=table.select([0]), extra=table).save_to_disk(folder / "a")
            return {"path": str(folder / "a"), "split": "extra"}
        case "folder of files":
            write_jsonl(folder / "a.jsonl", rows)
            return {"path": str(folder)}
    (file,) = folder.iterdir()
    return {"path": str(file)}


KINDS = [
    "jsonl with blank lines, CRLF and byte order mark", "json", "parquet", "glob", "arrow folder",
    "arrow folder with splits", "folder of files",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_documents(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    rows = mixed_rows()
    expected = prepare(write_kind("jsonl", tmp_path / "first", rows))
    found = prepare(write_kind(kind, tmp_path / "second", rows))
    assert tokens_of(found) == tokens_of(expected)
    assert found.summary == expected.summary
    assert found.summary["documents"] == len(rows)
    if kind not in KINDS[:1] + KINDS[3:4]:
        assert places_of(found) == [(0, number) for number in range(1, len(rows) + 1)]


TOOL_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if 'tool_calls' in message %}{{- message['tool_calls'] | tojson }}
{%- else %}{{- message['content'] }}{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


@pytest.mark.parametrize("kind", ["json", "parquet", "arrow folder"])
def test_fields_that_only_some_messages_have_read_the_same_from_columns(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str
) -> None:
    """Columns hold every key of every message, null where it was absent; templates ask whether a key is there."""
    tokenizer.chat_template = TOOL_TEMPLATE
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    asked = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "Five."},
    ]
    rows = [{"messages": asked}, *chats(2)]
    expected = prepare(write_kind("jsonl", tmp_path / "first", rows))
    assert tokens_of(prepare(write_kind(kind, tmp_path / "second", rows))) == tokens_of(expected)
    text = tokenizer.decode(expected.rows[0]["input_ids"])
    assert '"name": "add"' in text
    assert "Five.<|im_end|>" in text


def test_a_glob_reads_its_files_in_order_of_their_names(prepare: Prepare, tmp_path: Path) -> None:
    for name, row in (("b", chat("2", "two")), ("a", chat("1", "one")), ("sub/c", chat("3", "three"))):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", [row])
    together = write_jsonl(tmp_path / "all.jsonl", [chat("1", "one"), chat("2", "two"), chat("3", "three")])
    found = prepare(str(tmp_path / "data" / "**" / "*.jsonl"))
    assert tokens_of(found) == tokens_of(prepare(str(together)))


def test_several_sources_are_read_one_after_the_other_and_limited_each(prepare: Prepare, tmp_path: Path) -> None:
    first = str(write_jsonl(tmp_path / "1.jsonl", chats(5)))
    second = str(write_jsonl(tmp_path / "2.jsonl", [{"text": text} for text in TEXTS]))
    found = prepare([{"path": first, "limit": 2}, {"path": second, "limit": 3}])
    assert places_of(found) == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]
    assert found.summary["rows"] == 5


@pytest.mark.parametrize("name", ["owner/name", "name", "owner/Name-2.5", "owner/name_v1.1"])
def test_a_hub_name_goes_to_datasets(prepare: Prepare, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked.append((arguments, options))
        return datasets.Dataset.from_list(chats(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = prepare({"path": name, "subset": "main", "split": "test"})
    assert asked
    assert all(request == ((name, "main"), {"split": "test"}) for request in asked)
    assert places_of(found) == [(0, 1), (0, 2), (0, 3)]


def test_a_hub_name_that_cannot_be_reached_is_named(prepare: Prepare) -> None:
    (problem,) = prepare.refusal({"path": "owner/name", "split": "test"})  # tests run with HF_HUB_OFFLINE=1
    assert "data set owner/name (split test) cannot be loaded" in problem


def test_a_split_that_an_arrow_folder_lacks_is_told_beside_those_it_has(prepare: Prepare, tmp_path: Path) -> None:
    source = write_kind("arrow folder with splits", tmp_path / "data", chats(2))
    (problem,) = prepare.refusal(source | {"split": "train"})
    assert source["path"] in problem
    assert "split train" in problem
    assert "test" in problem
    assert "extra" in problem


# Which tokens carry loss


def test_only_the_assistants_text_and_its_end_of_turn_are_trained(either_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenize(turns("Add 2 and 3.", "It is 5.", system="Be brief."), either_tokenizer, "assistant")
    assert trained_text(either_tokenizer, tokens) == f"It is 5.{END}"
    assert either_tokenizer.decode(tokens.ids) == (
        f"<|im_start|>system\nBe brief.{END}\n<|im_start|>user\nAdd 2 and 3.{END}\n"
        f"<|im_start|>assistant\nIt is 5.{END}\n"
    )


def test_every_assistant_turn_is_trained(either_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenize(turns("1?", "one", "2?", "two", "3?", "three", "Thanks."), either_tokenizer, "assistant")
    assert trained_text(either_tokenizer, tokens) == f"one{END}two{END}three{END}"


ANSWERS = [
    "plain", " leading space", "\nleading line", "trailing space ", "trailing line\n", "ä 日本語 😀", "😀",
    "a\n\n\nb", "def f(x):\n        return  x\n", f"quotes {END} itself", "<|im_start|>assistant\nquoted", "1\t2",
]  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_of_any_characters_are_trained_whole(either_tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    tokens = tokenize(turns("1?", answer, "Q " + answer, answer), either_tokenizer, "assistant")
    assert trained_text(either_tokenizer, tokens) == f"{answer}{END}" * 2


@pytest.mark.parametrize("answer", ANSWERS)
def test_marks_and_placeholders_agree(tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    conversation = turns("1?", answer, "2?", "two", answer, "three", system="S")
    marked = tokenize(conversation, tokenizer, "assistant")
    assert tokenize(conversation, without_marks(tokenizer), "assistant") == marked


def test_spaces_are_trained_with_a_tokenizer_whose_offsets_leave_them_out(
    either_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """As in GPT-NeoX's tokenizer.json. Code without its indentation would be learned otherwise."""
    either_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    answer = "def f(x):\n        return  x"
    assert trained_text(either_tokenizer, tokenize(turns("Q ", answer), either_tokenizer, "assistant")) == answer + END


def test_all_tokens_of_a_chat_are_trained_on_request(either_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenize(turns("1?", "one"), either_tokenizer, "all")
    assert tokens.trained == [False] + [True] * (len(tokens) - 1)


def test_tool_turns_are_read_and_not_trained(either_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = turns("1?", "look").messages
    messages += [{"role": "tool", "content": "seen"}, {"role": "assistant", "content": "one"}]
    tokens = tokenize(Conversation(messages), either_tokenizer, "assistant")
    assert trained_text(either_tokenizer, tokens) == f"look{END}one{END}"
    assert "seen" in either_tokenizer.decode(tokens.ids)


FORGETFUL = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' and loop.last %}{{- '<think></think>' }}{%- endif %}
{{- message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def test_the_end_of_turn_is_trained_where_the_template_closes_its_mark_before_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    right = tokenize(Conversation(chat("Hi", "Hello there")["messages"] * 2), tokenizer, "assistant")
    marked = "{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    assert marked in tokenizer.chat_template
    early = tokenizer.chat_template.replace(marked, "{{- message['content'] }}{%- endgeneration %}{{- '<|im_end|>' }}")
    tokenizer.chat_template = early
    assert tokenize(Conversation(chat("Hi", "Hello there")["messages"] * 2), tokenizer, "assistant") == right


def test_an_empty_thinking_block_that_the_template_adds_is_not_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = FORGETFUL
    tokens = tokenize(turns("1?", "one", "2?", "two"), tokenizer, "assistant")
    assert trained_text(tokenizer, tokens) == f"one{END}two{END}"
    assert "<think></think>two" in tokenizer.decode(tokens.ids)


def test_a_template_whose_turns_cannot_be_told_apart_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """Here the number of turns stands before each of them, and their text is turned round."""
    tokenizer.chat_template = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + ' of ' + (messages | length) | string + '\n' }}
    {{- message['content'] | reverse + '<|im_end|>\n' }}{%- endfor %}"""
    with pytest.raises(BadRow, match=r"message 2 is rendered differently.*data\.train_on=all"):
        tokenize(turns("1?", "one", "2?", "two"), tokenizer, "assistant")


def test_the_last_answer_alone_is_trained_on_request(either_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenize(turns("1?", "one", "2?", "two"), either_tokenizer, "last_assistant")
    assert trained_text(either_tokenizer, tokens) == f"two{END}"


@pytest.mark.parametrize("flag", ["weight", "loss_weight", "train", "training", "trainable"])
def test_messages_say_themselves_whether_they_are_trained(
    either_tokenizer: PreTrainedTokenizerBase, prepare: Prepare, tmp_path: Path, flag: str
) -> None:
    prepare.tokenizer = either_tokenizer
    messages = turns("1?", "one", "2?", "two", "3?", "three").messages
    messages[1][flag], messages[3][flag] = 0, True
    rows = [{"messages": messages}, {"messages": [{**messages[0], flag: 1.0}, {**messages[1], flag: 1.0}]}]
    first, second = prepare(str(write_jsonl(tmp_path / "a.jsonl", rows))).rows
    assert trained_text(either_tokenizer, Tokens(first["input_ids"], first["trained"])) == f"two{END}three{END}"
    assert trained_text(either_tokenizer, Tokens(second["input_ids"], second["trained"])) == f"1?{END}one{END}"


def test_flags_that_are_neither_0_nor_1_or_leave_nothing_are_told(prepare: Prepare, tmp_path: Path) -> None:
    half, none = chat("1?", "one"), chat("2?", "two")
    half["messages"][1]["weight"] = 0.5
    none["messages"][1]["weight"] = 0
    _, first, second = prepare.refusal(str(write_jsonl(tmp_path / "a.jsonl", [half, none, chat("3?", "three")])))
    assert "message 2 has weight 0.5" in first
    assert "no message of it is to be trained" in second


def test_plain_text_is_trained_from_its_second_token_to_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenize(Text(TEXTS[0]), tokenizer, "assistant")
    assert tokenizer.decode(tokens.ids) == TEXTS[0] + END
    assert tokens.trained == [False] + [True] * (len(tokens) - 1)
    assert tokens.ids[-1] == tokenizer.eos_token_id


def test_texts_that_carry_their_end_token_get_no_second_one(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenize(Text(TEXTS[0] + END), tokenizer, "all") == tokenize(Text(TEXTS[0]), tokenizer, "all")


def test_masks_of_token_ids_are_honoured_and_padding_is_cut(prepare: Prepare, tmp_path: Path) -> None:
    row = {"input_ids": [5, 6, 7, 8, 0], "completion_mask": [0, 0, 1, 1, 0], "attention_mask": [1, 1, 1, 1, 0]}
    (found,) = prepare(str(write_jsonl(tmp_path / "a.jsonl", [row]))).rows
    assert (found["input_ids"], found["trained"]) == ([5, 6, 7, 8], [False, False, True, True])


def test_special_tokens_are_not_doubled_with_a_tokenizer_that_adds_them(tokenizer: PreTrainedTokenizerBase) -> None:
    bos, end = (tokenizer.convert_tokens_to_ids(token) for token in (BOS, END))
    tokenizer.bos_token = BOS
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {END}", special_tokens=[(BOS, bos), (END, end)]
    )
    tokenizer.chat_template = "{{- bos_token }}" + tokenizer.chat_template
    assert tokenizer("a")["input_ids"][0] == bos
    assert tokenizer("a")["input_ids"][-1] == end
    for example in (Text("text"), Text("text", prompt="prompt"), turns("1?", "one")):
        for train_on in ("assistant", "all"):
            tokens = tokenize(example, tokenizer, train_on)
            assert tokens.ids[0] == bos
            assert tokens.ids.count(bos) == 1
            assert not tokens.trained[0]
            assert tokens.ids[-2:].count(end) == 1
    plain = tokenize(turns("1?", "one"), without_marks(tokenizer), "assistant")
    assert plain.ids.count(bos) == 1
    assert trained_text(tokenizer, plain) == f"one{END}"


# Rows that do not fit


def lengths_of(prepare: Prepare, rows: list[dict[str, Any]], folder: Path) -> list[int]:
    """Tokens of each row when nothing is too long."""
    return [row["length"] for row in prepare(str(write_jsonl(folder / "any.jsonl", rows)), sequence_length=10_000).rows]


LONG = [chat("1?", "one"), chat("2?", "two " * 60), chat("words " * 60, "3"), chat("4?", "four")]


def test_rows_at_the_limit_fit(prepare: Prepare, tmp_path: Path) -> None:
    longest = max(lengths_of(prepare, LONG, tmp_path))
    found = prepare(str(write_jsonl(tmp_path / "a.jsonl", LONG)), sequence_length=longest)
    assert max(row["length"] for row in found.rows) == longest
    assert "too_long_rows" not in found.summary


def test_too_long_rows_are_dropped_and_counted(prepare: Prepare, tmp_path: Path) -> None:
    lengths = lengths_of(prepare, LONG, tmp_path)
    found = prepare(str(write_jsonl(tmp_path / "a.jsonl", LONG)), sequence_length=64, on_too_long="drop")
    assert places_of(found) == [(0, 1), (0, 4)]
    assert found.summary["rows"] == 4
    assert found.summary["documents"] == 2
    assert found.summary["too_long_rows"] == 2
    assert found.summary["tokens_cut"] == lengths[1] + lengths[2]
    assert found.summary["tokens"] == lengths[0] + lengths[3]


def test_too_long_rows_are_truncated_and_counted(prepare: Prepare, tmp_path: Path) -> None:
    lengths = lengths_of(prepare, LONG, tmp_path)
    found = prepare(str(write_jsonl(tmp_path / "a.jsonl", LONG)), sequence_length=64, on_too_long="truncate")
    assert places_of(found) == [(0, 1), (0, 2), (0, 4)]  # of the third row, only the question is left
    assert found.rows[1]["length"] == 64
    assert found.summary["too_long_rows"] == 2
    assert found.summary["documents_without_trained_tokens"] == 1
    assert found.summary["tokens_cut"] == lengths[1] + lengths[2] - 128


def test_too_long_rows_are_split_with_every_trained_token_kept_but_the_first_of_each_piece(
    prepare: Prepare, tmp_path: Path
) -> None:
    rows = [{"text": " ".join(TEXTS * 3)}, {"text": "short"}]
    file = str(write_jsonl(tmp_path / "a.jsonl", rows))
    whole = prepare(file, sequence_length=10_000).rows[0]
    found = prepare(file, sequence_length=50, on_too_long="split")
    pieces = [row for row in found.rows if row["row"] == 1]
    assert [token for piece in pieces for token in piece["input_ids"]] == whole["input_ids"]
    assert [piece["length"] for piece in pieces[:-1]] == [50] * (len(pieces) - 1)
    assert all(piece["trained"] == [False] + [True] * (piece["length"] - 1) for piece in pieces)
    assert found.summary["documents"] == len(pieces) + 1
    assert found.summary["too_long_rows"] == 1
    assert found.summary.get("tokens_cut", 0) == 0


def test_skipped_rows_are_counted_and_the_first_are_named(prepare: Prepare, tmp_path: Path) -> None:
    rows = [chat("1?", "one"), "{broken", {"other": 1}, chat("2?", "two"), *({"n": i} for i in range(20))]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    found = prepare(str(file), on_bad_row="skip")
    assert places_of(found) == [(0, 1), (0, 4)]
    assert found.summary["rows"] == 24
    assert found.summary["bad_rows"] == 22
    assert found.summary["first_bad_rows"][0].startswith(f"{file} row 2: not valid JSON")
    assert 1 < len(found.summary["first_bad_rows"]) < 22


# Packing and batches


def packed(lengths: list[int], capacity: int) -> list[list[int]]:
    order, starts = pack(numpy.array(lengths), capacity)
    return [order[start:end].tolist() for start, end in itertools.pairwise(starts.tolist())]


@pytest.mark.parametrize("seed", range(20))
def test_packing_puts_every_document_into_one_sequence_and_none_overflows(seed: int) -> None:
    draw = random.Random(seed)
    capacity = draw.choice([8, 100, 2048])
    lengths = [draw.randint(1, capacity) for _ in range(draw.choice([1, 2, 50, 500]))]
    sequences = packed(lengths, capacity)
    assert sorted(index for sequence in sequences for index in sequence) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in sequence) <= capacity for sequence in sequences)
    assert packed(list(lengths), capacity) == sequences
    # Two sequences that fit into one would have been one.
    filled = sorted(sum(lengths[index] for index in sequence) for sequence in sequences)
    assert len(filled) == 1 or filled[0] + filled[1] > capacity


@pytest.mark.parametrize("seed", range(20))
def test_packing_needs_no_more_sequences_than_best_fit_decreasing_one_by_one(seed: int) -> None:
    draw = random.Random(seed)
    capacity, shortest = draw.choice([(512, 1), (2048, 100), (4096, 97)])
    lengths = [min(capacity, shortest + int(draw.expovariate(1 / 120))) for _ in range(800)]
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, at) for at, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    sequences = packed(lengths, capacity)
    assert sorted(index for sequence in sequences for index in sequence) == list(range(len(lengths)))
    assert len(sequences) <= len(rooms)


@pytest.mark.parametrize("capacity", [4096, 8192])
@pytest.mark.parametrize("shape", ["many short, few long", "none short", "half as long as a sequence and longer"])
def test_sequences_are_full(capacity: int, shape: str) -> None:
    draw = numpy.random.default_rng(0)
    lengths = {
        "many short, few long": numpy.exp(draw.normal(5.5, 1, 100_000)),
        "none short": 97 + draw.gamma(2, 60, 100_000),
        "half as long as a sequence and longer": draw.beta(2, 3, 50_000) * capacity,
    }[shape]
    lengths = lengths.clip(8, capacity).astype(numpy.int32)
    _, starts = pack(lengths, capacity)
    assert lengths.sum() / (capacity * (len(starts) - 1)) > 0.995


@pytest.fixture
def documents(prepare: Prepare, tmp_path: Path) -> Found:
    return prepare(str(write_jsonl(tmp_path / "train.jsonl", [*chats(30), *({"text": text} for text in TEXTS)])))


def batches(documents: Found, packing: bool, world: int = 1, micro: int = 1, size: int = 4, seed: int = 0) -> Batches:
    geometry = Geometry(size, micro, size // (micro * world), world, seed)
    sets = [open_sequences(one.tokens, settings(packing=packing)) for one in documents.sets]
    sources = [TrainingSource(path="x")] * len(sets)
    mixture = mix(sources, ["x"] * len(sets), [(len(one), one.summary["tokens"]) for one in sets], 1.0, None)
    return Batches(sets, mixture, 128 if packing else None, geometry)


def settings(**changes: Any) -> Data:
    return Data.model_validate({"train": "x", "sequence_length": 128} | changes)


def sequences_of_step(which: Batches, step: int) -> list[tuple[tuple[int, int, int], ...]]:
    """The global batch of a step over all ranks: (id, position, label) of each sequence without its padding."""
    geometry = which.geometry
    found = []
    for rank in range(geometry.world_size):
        micro_batches = list(which.of_step(step, rank))
        assert len(micro_batches) == geometry.accumulation
        for batch in micro_batches:
            assert batch.input_ids.shape == batch.position_ids.shape == batch.labels.shape
            assert len(batch.input_ids) == geometry.micro_batch_size
            columns = (tensor.tolist() for tensor in (batch.input_ids, batch.position_ids, batch.labels))
            rows = [tuple(zip(*row, strict=True)) for row in zip(*columns, strict=True)]
            trimmed = [row[: max(at for at, (token, _, _) in enumerate(row) if token) + 1] for row in rows]
            assert batch.tokens == sum(map(len, trimmed))
            assert all(label == IGNORE for row, cut in zip(rows, trimmed, strict=True) for *_, label in row[len(cut) :])
            found += trimmed
    return sorted(found)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world", "micro"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_step_has_the_same_sequences_however_it_is_shared(
    documents: Found, packing: bool, world: int, micro: int
) -> None:
    alone, shared = batches(documents, packing), batches(documents, packing, world, micro)
    for step in range(20):  # over the border of an epoch
        assert sequences_of_step(shared, step) == sequences_of_step(alone, step)


def sequences_in_order(which: Batches, steps: int) -> list[tuple[int, int]]:
    return [sequence for step in range(steps) for sequence in which.sequences_of_step(step)]


@pytest.mark.parametrize("packing", [True, False])
def test_each_epoch_has_each_sequence_once_in_its_own_order(documents: Found, packing: bool) -> None:
    which = batches(documents, packing, size=3)
    count = sum(map(len, which.sets))
    stream = [index for _, index in sequences_in_order(which, count)]  # 3 epochs
    epochs = [stream[start : start + count] for start in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again, other = (sequences_in_order(batches(documents, packing, size=3, seed=seed), count) for seed in (0, 1))
    assert stream == [index for _, index in again] != [index for _, index in other]


@pytest.mark.parametrize("packing", [True, False])
def test_documents_in_a_batch_are_apart_and_have_their_own_labels(documents: Found, packing: bool) -> None:
    which = batches(documents, packing, size=1)
    seen = []
    for step in range(len(which.sets[0])):
        (sequence,) = sequences_of_step(which, step)
        starts = [at for at, (_, position, _) in enumerate(sequence) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(sequence)], strict=True):
            ids, positions, labels = zip(*sequence[start:end], strict=True)
            assert positions == tuple(range(end - start))
            assert labels[-1] == IGNORE  # nothing is predicted over the border
            assert all(label in (IGNORE, following) for label, following in zip(labels, ids[1:], strict=False))
            seen.append((list(ids), [False] + [label != IGNORE for label in labels[:-1]]))
    assert sorted(seen) == sorted(tokens_of(documents))
    assert packing == (len(which.sets[0]) < len(documents.rows))


def test_a_training_set_smaller_than_the_global_batch_is_repeated(prepare: Prepare, tmp_path: Path) -> None:
    which = batches(prepare(str(write_jsonl(tmp_path / "a.jsonl", chats(3)))), packing=False, size=8)
    times = Counter(which.sequences_of_step(0))
    assert times.keys() == {(0, 0), (0, 1), (0, 2)}
    assert set(times.values()) == {2, 3}


def test_the_rows_of_a_step_are_those_of_its_batches(documents: Found) -> None:
    which = batches(documents, packing=True)
    by_place = {row["row"]: row["input_ids"] for row in documents.rows}
    for step in (0, 5):
        named = [by_place[row["row"]] for row in which.rows_of_step(step)]
        trained = [token for sequence in sequences_of_step(which, step) for token, _, _ in sequence]
        assert sorted(token for ids in named for token in ids) == sorted(trained)


# The cache


def test_unchanged_data_is_not_prepared_again_wherever_it_lies(prepare: Prepare, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", chats(5))
    first = tokens_of(prepare(str(file)))
    before = prepare.prepared()
    os.utime(file, (0, 0))
    assert tokens_of(prepare(str(file))) == first
    moved = file.rename(tmp_path / "moved.jsonl")
    assert tokens_of(prepare({"path": str(moved)})) == first
    assert prepare.prepared() == before
    assert len(before) == 1


@pytest.mark.parametrize(
    "change", ["a letter", "limit", "format", "fields", "template", "end token", "tokenizer", "train_on"]
)
def test_whatever_changes_the_tokens_is_prepared_anew(
    prepare: Prepare, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, change: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [chat("1?", "one"), chat("2?", "two")])
    prepare(str(file))
    source: dict[str, Any] = {"path": str(file)}
    match change:
        case "a letter":  # same size, same time
            stat = file.stat()
            file.write_text(file.read_text().replace("two", "too"))
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        case "limit":
            source["limit"] = 1
        case "format":
            source["format"] = "messages"
        case "fields":
            source["fields"] = {"messages": "messages"}
        case "template":
            tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_start|>'", "'<|im_start|> '")
        case "end token":
            tokenizer.eos_token = BOS
        case "tokenizer":
            tokenizer.add_tokens(["one"])
    prepare(source, train_on="all" if change == "train_on" else "assistant")
    assert len(prepare.prepared()) == 2


def test_other_lengths_weights_and_ways_with_bad_rows_need_no_new_tokens(prepare: Prepare, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*LONG, "{broken"])
    prepare(str(file), on_bad_row="skip")
    before = prepare.prepared()
    prepare({"path": str(file), "weight": 3}, on_bad_row="skip", sequence_length=300, on_too_long="split")
    prepare(str(file), on_bad_row="skip", sequence_length=64, on_too_long="drop", packing=False)
    assert prepare.refusal(str(file), on_bad_row="error")
    assert prepare.refusal(str(file), on_bad_row="skip", sequence_length=64)
    assert prepare.prepared() == before


def test_bad_data_are_refused_each_time_and_mended_data_are_prepared(prepare: Prepare, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [chat("1?", "one"), "{broken"])
    assert prepare.refusal(str(file)) == prepare.refusal(str(file))
    write_jsonl(file, [chat("1?", "one")])
    assert len(prepare(str(file)).rows) == 1


@pytest.mark.parametrize("on_too_long", ["drop", "truncate", "split"])
def test_packing_in_chunks_loses_and_doubles_nothing(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_too_long: str
) -> None:
    rows = [*chats(40), {"text": " ".join(TEXTS * 3)}, *({"text": text} for text in TEXTS), *chats(9)]
    file = str(write_jsonl(tmp_path / "a.jsonl", rows))
    together = prepare(file, sequence_length=100, on_too_long=on_too_long)
    expected = tokens_of(together), places_of(together)
    (made,) = (folder for folder in prepare.cache.glob("*/sequences-*") if folder.is_dir())
    made.rename(made.with_name("aside"))
    monkeypatch.setattr(sequences, "_CHUNK", 7)
    chunked = prepare(file, sequence_length=100, on_too_long=on_too_long)
    assert (tokens_of(chunked), places_of(chunked)) == expected
    for name in ("documents", "tokens", "trained_tokens", "too_long_rows", "tokens_cut", "trained_tokens_cut"):
        assert chunked.summary.get(name) == together.summary.get(name)
    (one,) = chunked.sets
    assert all(length <= 100 for length in one.lengths)
    spans = itertools.pairwise(one.starts.tolist())
    assert one.lengths.tolist() == [int(one.slices["length"][start:end].sum()) for start, end in spans]


def test_a_longest_row_of_a_later_chunk_is_named(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "_CHUNK", 2)
    file = write_jsonl(tmp_path / "a.jsonl", [*chats(5), *LONG])
    (said,) = prepare.refusal(str(file), sequence_length=64)
    assert said.startswith("data.sequence_length: 2 of 9 rows")
    assert f"({file} row " in said


def test_splits_of_one_arrow_folder_are_sets_of_their_own(prepare: Prepare, tmp_path: Path) -> None:
    source = write_kind("arrow folder with splits", tmp_path / "data", chats(5))
    one, other = (prepare(source | {"split": split}) for split in ("test", "extra"))
    assert (len(one.rows), len(other.rows)) == (1, 5)


def test_a_file_under_another_ending_is_read_anew(prepare: Prepare, tmp_path: Path) -> None:
    wrong = tmp_path / "a.jsonl"
    wrong.write_text(json.dumps(chats(3)))
    assert prepare.refusal(str(wrong))
    assert len(prepare(str(wrong.rename(tmp_path / "a.json"))).rows) == 3


def test_a_tokenizer_that_cuts_or_pads_gives_one_cache(prepare: Prepare, tmp_path: Path) -> None:
    """Many a tokenizer.json was saved with truncation and padding on."""
    file = str(write_jsonl(tmp_path / "a.jsonl", chats(3)))
    first = tokens_of(prepare(file))
    prepare.tokenizer.backend_tokenizer.enable_truncation(8)
    prepare.tokenizer.backend_tokenizer.enable_padding()
    assert tokens_of(prepare(file)) == first
    assert len(prepare.prepared()) == 1


@pytest.mark.parametrize("harm", ["cut short", "gone", "documents gone"])
def test_a_cache_that_lost_a_part_is_made_anew(prepare: Prepare, tmp_path: Path, harm: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", chats(20))
    first = tokens_of(prepare(str(file)))
    (part,) = prepare.cache.glob("*/part-00000.tokens")
    if harm == "gone":
        part.unlink()
    elif harm == "documents gone":
        part.with_name("documents.npy").unlink()
    else:
        os.truncate(part, part.stat().st_size - 4)
    assert tokens_of(prepare(str(file))) == first


PREPARE = """
import os, signal, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from fullft.data import cache, prepare
from fullft.recipe import Data

model, file, folder, kill_at = sys.argv[1:]
rows = 0
tokenize = prepare.tokenize

def counted(*arguments):
    global rows
    rows += 1
    if rows == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)  # the other process comes while this one is at work
    return tokenize(*arguments)

prepare.tokenize = counted
data = Data(train=file)
tokenizer = AutoTokenizer.from_pretrained(model)
print("ready", flush=True)
sys.stdin.readline()
(documents,) = cache.open_sets(data, tokenizer, Path(folder))
print(rows, len(documents.documents))
"""


def start_preparing(model: Path, file: Path, cache: Path, kill_at: int = -1) -> subprocess.Popen[str]:
    """A process that has imported everything and prepares when it is told to."""
    command = [sys.executable, "-c", PREPARE, str(model), str(file), str(cache), str(kill_at)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def let_go(*processes: subprocess.Popen[str]) -> list[str]:
    """Let all prepare at once; what each printed."""
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    return [process.communicate(timeout=120)[0] for process in processes]


@pytest.mark.ranks
def test_a_killed_preparation_is_not_trusted_and_two_at_once_do_it_once(tiny_model: Path, tmp_path: Path) -> None:
    file, cache = write_jsonl(tmp_path / "a.jsonl", chats(50)), tmp_path / "cache"
    killed, one, other = (start_preparing(tiny_model, file, cache, kill_at) for kill_at in (30, -1, -1))
    assert let_go(killed) == [""]
    assert killed.returncode == -signal.SIGKILL
    assert not list(cache.glob("*/summary.json"))
    printed = sorted(line.split() for line in let_go(one, other))
    assert printed == [["0", "50"], ["50", "50"]]  # rows tokenized, documents found
    (summary,) = (file for file in cache.glob("*/summary.json") if not file.parent.suffix)
    assert json.loads(summary.read_text())["documents"] == 50
    assert not list(cache.glob("*.partial"))  # nor does it take room for ever
