"""Rows in the shapes, and files of the kinds, that people have: what is trained on, what is refused and why."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import chat, chats, write_jsonl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fullft.data import cache, sources
from fullft.data import pieces as cutting
from fullft.data.formats import BadRow, Conversation, Pretokenized, Text, parse_row
from fullft.data.pieces import pieces, scan_file
from fullft.data.prepare import row_tokens
from fullft.data.sources import Row, read_piece, read_rows, source_files
from fullft.data.tokens import Tokens
from fullft.errors import BadInput
from fullft.recipe import ROW_FIELDS, Source

END = "<|im_end|>"
# Writes tools and calls, as most models' templates do and the tiny model's does not.
WITH_TOOLS = """{%- if tools %}{{- '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['reasoning_content'] %}{{- '<think>' + message['reasoning_content'] + '</think>' }}{%- endif %}
{{- message['content'] or '' }}
{%- for call in message['tool_calls'] or [] %}
{{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    """Fresh for each test, so that a test may change its template."""
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def with_tools(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = WITH_TOOLS
    return tokenizer


def source(**settings: Any) -> Source:
    return Source.model_validate({"path": "x"} | settings)


def parsed(row: dict[str, Any], **settings: Any) -> Conversation | Text | Pretokenized:
    return parse_row(row, source(**settings))


def spoken(row: dict[str, Any], **settings: Any) -> list[tuple[str, str]]:
    """(role, content) of the messages of a chat."""
    example = parsed(row, **settings)
    assert isinstance(example, Conversation)
    return [(message["role"], message["content"]) for message in example.messages]


def tokens_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Tokens:
    return row_tokens(Row("x", 1, row), source(**settings), tokenizer, "assistant")[1]


def texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> tuple[str, str]:
    """All of a row as the model reads it, and what of it is trained."""
    tokens = tokens_of(row, tokenizer, **settings)
    trained = [token for token, is_trained in zip(tokens.ids, tokens.trained, strict=True) if is_trained]
    return str(tokenizer.decode(tokens.ids)), str(tokenizer.decode(trained))


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def said(who: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": who, "value": value} | more


def part(text: str, kind: str = "text") -> dict[str, str]:
    return {"type": kind, "text": text}


ASKED, ANSWERED = turn("user", "Où est Zoë? 😀"), turn("assistant", "À Köln, 東京.")


# The same chat in each shape


PLAIN = [turn("system", "Be brief."), ASKED, ANSWERED]
PLAIN_SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": PLAIN},
    "messages with other columns": {"messages": PLAIN, "id": 7, "source": "web", "score": 0.5, "tools": None},
    "messages in parts": {"messages": [m | {"content": [part(m["content"])]} for m in PLAIN]},
    "messages in several parts": {
        "messages": [*PLAIN[:2], turn("assistant", [part("À Köln"), part(", 東京.", "output_text")])]
    },
    "parts whose text is called value": {
        "messages": [m | {"content": [{"type": "text", "value": m["content"]}]} for m in PLAIN]
    },
    "messages from columns": {
        "messages": [m | {"name": None, "tool_calls": None, "tool_call_id": None, "weight": None} for m in PLAIN],
        "conversations": None, "prompt": None, "completion": None, "text": None, "input_ids": None,
    },
    "sharegpt": {
        "conversations": [
            said("system", "Be brief."), said("human", ASKED["content"]), said("gpt", ANSWERED["content"]),
        ]
    },
    "sharegpt with a system column": {
        "conversations": [said("human", ASKED["content"]), said("gpt", ANSWERED["content"])], "system": "Be brief.",
        "tools": "",
    },
    "sharegpt, other names": {
        "conversations": [
            said("system", "Be brief."), said("user", ASKED["content"]), said("chatgpt", ANSWERED["content"]),
        ],
        "system": None, "tools": "[]",
    },
    "role and content under the name conversations": {"conversations": PLAIN},
    "role and content, from and value null": {"conversations": [m | {"from": None, "value": None} for m in PLAIN]},
    "alpaca": {
        "instruction": ASKED["content"], "input": "", "output": ANSWERED["content"], "system": "Be brief.",
        "text": "Below is an instruction that describes a task.", "history": [],
    },
    "alpaca, all of it in input": {
        "instruction": "", "input": ASKED["content"], "output": ANSWERED["content"], "system": "Be brief."
    },
    "prompt and completion": {"prompt": PLAIN[:2], "completion": PLAIN[2:]},
}  # fmt: skip


@pytest.mark.parametrize("shape", PLAIN_SHAPES)
def test_a_chat_is_the_same_in_every_shape(shape: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert spoken(PLAIN_SHAPES[shape]) == [(m["role"], m["content"]) for m in PLAIN]
    whole, trained = texts(PLAIN_SHAPES[shape], tokenizer)
    assert whole == "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in PLAIN)
    assert trained == ANSWERED["content"] + END


TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
WANTED = {"what": "chili & “beans”", "many": [1, 2], "deep": {"a": True}}


def called(arguments: Any, **more: Any) -> dict[str, Any]:
    calls = [{"id": "call_1", "type": "function", "function": {"name": "find", "arguments": arguments}}]
    return {"role": "assistant", "tool_calls": calls} | more


def with_call(call: Any, content: Any = '{"found": 3}') -> list[dict[str, Any]]:
    return [turn("user", "Find."), call, turn("tool", content, tool_call_id="call_1"), turn("assistant", "Three.")]


FUNCTION_CALL = json.dumps({"name": "find", "arguments": WANTED})
CALL_SHAPES: dict[str, dict[str, Any]] = {
    "arguments as JSON text": {"messages": with_call(called(json.dumps(WANTED), content=None)), "tools": TOOLS},
    "arguments as an object": {"messages": with_call(called(WANTED, content="")), "tools": TOOLS},
    "no content": {"messages": with_call(called(WANTED)), "tools": json.dumps(TOOLS)},
    "calls without the shell `function`": {
        "messages": with_call({"role": "assistant", "tool_calls": [{"name": "find", "arguments": WANTED}]}),
        "tools": TOOLS,
    },
    "calls as a part of the content": {
        "messages": with_call(turn("assistant", [{"type": "tool_call", "value": FUNCTION_CALL}])), "tools": TOOLS
    },
    "answer of the tool in parts": {"messages": with_call(called(WANTED), [part('{"found": 3}')]), "tools": TOOLS},
    "columns": {
        "messages": [{"content": None, "tool_calls": None} | m for m in with_call(called(json.dumps(WANTED)))],
        "tools": TOOLS, "system": None,
    },
    "sharegpt": {
        "conversations": [
            said("human", "Find."), said("function_call", FUNCTION_CALL), said("observation", '{"found": 3}'),
            said("gpt", "Three."),
        ],
        "tools": json.dumps(TOOLS), "system": "",
    },
    "sharegpt, parallel columns": {
        "conversations": [
            said("human", "Find."), said("function_call", FUNCTION_CALL), said("function_response", '{"found": 3}'),
            said("gpt", "Three."),
        ],
        "tools": TOOLS,
    },
    "prompt and completion": {
        "prompt": [turn("user", "Find.")], "completion": with_call(called(WANTED))[1:], "tools": TOOLS
    },
    "function_call of OpenAI's first format": {
        "messages": [
            turn("user", "Find."),
            turn("assistant", None, function_call={"name": "find", "arguments": json.dumps(WANTED)}),
            {"role": "function", "name": "find", "content": '{"found": 3}'},
            turn("assistant", "Three."),
        ],
        "tools": TOOLS,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", CALL_SHAPES)
def test_tools_and_calls_are_the_same_in_every_shape(shape: str, with_tools: PreTrainedTokenizerBase) -> None:
    whole, trained = texts(CALL_SHAPES[shape], with_tools)
    expected, expected_trained = texts(CALL_SHAPES["arguments as an object"], with_tools)
    assert (whole, trained) == (expected, expected_trained)
    assert whole.startswith("<|im_start|>tools\n")
    assert "found" in whole
    assert trained.count(END) == 2
    assert trained.endswith(f"Three.{END}")
    assert "<call>find {" in trained
    assert '\\"' not in trained  # arguments were not quoted twice


def test_a_call_beside_text_in_openais_first_format_is_not_lost(with_tools: PreTrainedTokenizerBase) -> None:
    """Trained without it, the model learns to say that it looks, and not to look."""
    call = turn("assistant", "I look.", function_call={"name": "find", "arguments": "{}"})
    row = {"messages": [turn("user", "Find."), call, {"role": "function", "name": "find", "content": "3"}, ANSWERED]}
    try:
        _, trained = texts(row, with_tools)
    except BadRow:
        return
    assert "<call>find" in trained


@pytest.mark.parametrize("arguments", ["", "{}", None, {}])
def test_a_call_without_arguments(arguments: Any, with_tools: PreTrainedTokenizerBase) -> None:
    _, trained = texts({"messages": with_call(called(arguments))}, with_tools)
    assert trained == f"<call>find {{}}</call>{END}Three.{END}"


def test_several_calls_in_one_turn_are_all_trained(with_tools: PreTrainedTokenizerBase) -> None:
    calls = [{"function": {"name": name, "arguments": {"n": at}}} for at, name in enumerate(("find", "count"))]
    answers = [turn("tool", "1"), turn("tool", "2")]
    row = {"messages": [turn("user", "?"), {"role": "assistant", "tool_calls": calls}, *answers, ANSWERED]}
    _, trained = texts(row, with_tools)
    assert '<call>find {"n": 0}</call><call>count {"n": 1}</call>' in trained


def test_a_call_that_the_template_does_not_write_makes_the_row_unusable(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadRow, match="calls the tool 'find', which the chat template does not write"):
        tokens_of({"messages": with_call(called(WANTED, content=""))}, tokenizer)


@pytest.mark.parametrize("kind", ["reasoning", "thinking"])
def test_reasoning_in_parts_goes_where_templates_look_for_it(kind: str, with_tools: PreTrainedTokenizerBase) -> None:
    thought = {"type": kind, "thinking" if kind == "thinking" else "value": "Hm."}
    row = {"messages": [turn("user", "?"), turn("assistant", [thought, part("So.")])]}
    assert texts(row, with_tools)[1] == f"<think>Hm.</think>So.{END}"


def test_several_turns_are_all_trained_and_a_developer_may_come_first(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"messages": [turn("developer", "d"), *chat("1?", "one")["messages"], *chat("2?", "two")["messages"]]}
    assert texts(row, tokenizer)[1] == f"one{END}two{END}"


# Prompt and completion, text, token ids


def test_of_prompt_and_completion_messages_only_the_completion_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": [*chat("1?", "one")["messages"], turn("user", "2?")], "completion": [turn("assistant", "two")]}
    whole, trained = texts(row, tokenizer)
    assert "one" in whole
    assert trained == f"two{END}"


@pytest.mark.parametrize(("prompt", "completion"), [("2 + 3 =", " 5"), ("", "5"), ("Zoë 😀\n", "東京")])
def test_prompt_and_completion_texts_have_no_template(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole, trained = texts({"prompt": prompt, "completion": completion}, tokenizer)
    assert whole == prompt + completion + END
    assert (prompt + trained if prompt else whole) == whole


@pytest.mark.parametrize("text", ["a\r\nb\n", "  indented\n", "Zoë \u2028 😀 العربية", "<|im_end|> in a text"])
def test_plain_text_is_kept_to_the_letter(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert texts({"text": text, "meta": {"lang": None}}, tokenizer)[0] == text + END


@pytest.mark.parametrize(
    ("row", "trained"),
    [
        ({"input_ids": [5, 6, 7]}, [False, True, True]),
        ({"input_ids": [5, 6, 7], "labels": None}, [False, True, True]),
        ({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, [False, True, True]),
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "attention_mask": [1, 1, 1]}, [False, False, True]),
        ({"input_ids": [0, 299], "labels": [-100, 299]}, [False, True]),
    ],
)
def test_token_ids_are_taken_as_they_are(
    row: dict[str, Any], trained: list[bool], tokenizer: PreTrainedTokenizerBase
) -> None:
    assert tokens_of(row, tokenizer) == Tokens(row["input_ids"], trained)


# Detection and columns of other names


ONE_OF_EACH: dict[str, dict[str, Any]] = {
    "messages": {"messages": [ASKED, ANSWERED]},
    "sharegpt": {"conversations": [said("human", "q"), said("gpt", "a")]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "output": "a"},
    "text": {"text": "a text"},
    "tokens": {"input_ids": [5, 6, 7]},
}


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_shape_is_told_by_its_fields_and_can_be_named(kind: str) -> None:
    nothing = dict.fromkeys(ROW_FIELDS)  # as Parquet has it when rows of several shapes are joined
    row = ONE_OF_EACH[kind]
    assert parsed(row) == parsed(row, format=kind) == parsed(nothing | row) == parsed(row | {"other": [1]})
    everything = {name: value for one in ONE_OF_EACH.values() for name, value in one.items()}
    assert parsed(everything, format=kind) == parsed(row)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_named_shape_that_a_row_does_not_have_is_told(kind: str) -> None:
    other = ONE_OF_EACH["text" if kind != "text" else "alpaca"]
    for row in (other, other | dict.fromkeys(ONE_OF_EACH[kind])):
        with pytest.raises(BadRow, match=r"has no '\w+'.*name the columns in `fields`"):
            parsed(row, format=kind)


@pytest.mark.parametrize("how", ["auto", "named"])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_columns_of_any_name_are_mapped(kind: str, how: str) -> None:
    row = ONE_OF_EACH[kind]
    renamed = {f"my {name}": value for name, value in row.items()}
    fields = {name: f"my {name}" for name in row}
    assert parsed(renamed, fields=fields, format=kind if how == "named" else "auto") == parsed(row)


def test_columns_beside_the_chat_are_mapped() -> None:
    row = {"turns": ONE_OF_EACH["sharegpt"]["conversations"], "persona": "Be brief.", "apis": json.dumps(TOOLS)}
    found = parsed(row, fields={"conversations": "turns", "system": "persona", "tools": "apis"})
    assert isinstance(found, Conversation)
    assert found.messages[0] == {"role": "system", "content": "Be brief."}
    assert found.tools == TOOLS


@pytest.mark.parametrize(
    ("row", "fields", "kind"),
    [
        ({"prompt": "q", "completion": "a"}, {"instruction": "prompt", "output": "completion"}, "alpaca"),
        ({"input_ids": "q", "text": "a"}, {"instruction": "input_ids", "output": "text"}, "alpaca"),
        ({"messages": "a text", "prompt": "p"}, {"text": "messages"}, "text"),
        ({"instruction": "q", "output": "a"}, {"prompt": "instruction", "completion": "output"}, "prompt_completion"),
        ({"text": "q", "output": "a"}, {"instruction": "text"}, "alpaca"),
    ],
)
def test_a_mapping_wins_over_what_the_mapped_columns_are_called(
    row: dict[str, Any], fields: dict[str, str], kind: str
) -> None:
    """Who maps `prompt` to `instruction` wants the chat template; by the column's old name there would be none."""
    assert parsed(row, fields=fields) == parsed(row, fields=fields, format=kind)


def test_two_columns_can_change_places() -> None:
    row = {"prompt": "a", "completion": "q"}
    assert parsed(row, fields={"prompt": "completion", "completion": "prompt"}) == Text("a", "q")


# Flags


def test_flags_of_messages_hold_in_every_shape_of_a_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = chat("1?", "one")["messages"], chat("2?", "two")["messages"]
    first[1]["weight"], second[1]["weight"] = 0, 1.0
    turns = [said(("human", "gpt")[at % 2], m["content"], weight=m.get("weight")) for at, m in
             enumerate([*first, *second])]  # fmt: skip
    for row in (
        {"messages": [*first, *second]},
        {"conversations": [*first, *second]},
        {"conversations": turns},
        {"prompt": first[:1], "completion": [first[1], *second]},
    ):
        whole, trained = texts(row, tokenizer)
        assert "one" in whole
        assert "weight" not in whole
        assert trained == f"two{END}"


def test_flags_that_contradict_each_other_are_refused_or_leave_the_message_out(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    answer = turn("assistant", "one", weight=1, train=False)
    with pytest.raises(BadRow):
        tokens_of({"messages": [turn("user", "1?"), answer]}, tokenizer)


# Rows that cannot be used


def messages(*given: Any, **row: Any) -> dict[str, Any]:
    return {"messages": list(given)} | row


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no field": ({}, "has fields none; expected messages"),
    "other fields": ({"question": "q"}, "has fields 'question'; expected messages"),
    "all null": (dict.fromkeys(ROW_FIELDS), "expected messages"),
    "no message": (messages(), "is empty"),
    "messages as JSON text": ({"messages": json.dumps([ASKED, ANSWERED])}, "not a list of messages"),
    "messages are an object": ({"messages": {"role": ["user"], "content": ["q"]}}, "not a list of messages"),
    "messages are texts": (messages("q", "a"), "message 1 has no 'role'"),
    "message is null": (messages(None, ANSWERED), "message 1 has no 'role'"),
    "no answer": (messages(ASKED), "no assistant message"),
    "empty answer": (messages(ASKED, turn("assistant", "")), "empty answer"),
    "blank answer": (messages(ASKED, turn("assistant", " \n")), "empty answer"),
    "empty parts": (messages(ASKED, turn("assistant", [])), "empty answer"),
    "answer is null": (messages(ASKED, turn("assistant", None)), r"message 2 \(assistant\) has no 'content'"),
    "question is null": (messages(turn("user", None), ANSWERED), r"message 1 \(user\) has no 'content'"),
    "answer is a number": (messages(ASKED, turn("assistant", 5)), "'content' is a int"),
    "answer is an object": (messages(ASKED, turn("assistant", {"text": "a"})), "'content' is a dict"),
    "unknown role": (messages(ASKED, turn("narrator", "a")), "message 2 has role 'narrator'; roles are system"),
    "role in capitals": (messages(ASKED, turn("ASSISTANT", "a")), "has role 'ASSISTANT'"),
    "role is null": (messages(ASKED, turn("assistant", "a") | {"role": None}), "has role None"),
    "role is a list": (messages(turn("user", "q") | {"role": ["user"]}, ANSWERED), "message 1 has role"),
    "answer first": (messages(ANSWERED, ASKED, ANSWERED), "message 1 is 'assistant' after the start"),
    "two questions": (messages(ASKED, ASKED, ANSWERED), "message 2 is 'user' after user"),
    "system in the middle": (messages(ASKED, turn("system", "s"), ANSWERED), "message 2 is 'system' after user"),
    "image": (
        messages(turn("user", [part("What?"), {"type": "image_url", "image_url": {"url": "data:"}}]), ANSWERED),
        "message 1: a part of its content is 'image_url'; only text",
    ),
    "image without type": (messages(turn("user", [{"image": "x"}]), ANSWERED), "message 1: a part of its content"),
    "audio": (messages(turn("user", [{"type": "input_audio"}]), ANSWERED), "a part of its content is 'input_audio'"),
    "broken arguments": (messages(*with_call(called('{"what": '))), r"message 2 \(arguments\) is not valid JSON"),
    "arguments are a JSON list": (messages(*with_call(called("[1]"))), r"message 2 \(arguments\) is not a JSON object"),
    "arguments are a list": (messages(*with_call(called([1]))), r"message 2.*not a(?: JSON)? object"),
    "calls are an object": (messages(ASKED, {"role": "assistant", "tool_calls": {"name": "f"}}), "not a list of obje"),
    "call without name": (messages(ASKED, {"role": "assistant", "tool_calls": [{"function": {}}]}), "has no name"),
    "call is null": (messages(ASKED, {"role": "assistant", "tool_calls": [None]}), "not a list of objects"),
    "tools are not JSON": (messages(ASKED, ANSWERED, tools="find(what)"), "field 'tools' is not valid JSON"),
    "tools are an object": (messages(ASKED, ANSWERED, tools={"name": "f"}), "field 'tools' is not a list of objects"),
    "tools are names": (messages(ASKED, ANSWERED, tools='["find"]'), "field 'tools' is not a list of objects"),
    "weight between": (messages(ASKED, ANSWERED | {"weight": 0.5}), "message 2 has weight 0.5"),
    "weight is text": (messages(ASKED, ANSWERED | {"weight": "1"}), "message 2 has weight '1'"),
    "weight is not a number": (messages(ASKED, ANSWERED | {"weight": float("nan")}), "message 2 has weight nan"),
    "all weights 0": (messages(ASKED, ANSWERED | {"train": False}), "no message of it is to be trained"),
    "half a surrogate pair": (messages(ASKED, turn("assistant", "a\ud83d")), "surrogate"),
    "no turn": ({"conversations": []}, "is empty"),
    "turns as columns": ({"conversations": {"from": ["human"], "value": ["q"]}}, "not a list of turns"),
    "turns are texts": ({"conversations": ["q", "a"]}, "turn 1 has neither 'from' nor 'role'"),
    "gpt first": ({"conversations": [said("gpt", "a"), said("human", "q"), said("gpt", "a")]}, "wrong role order"),
    "turn is null": ({"conversations": [said("human", "q"), said("gpt", None)]}, "has no 'content'"),
    "system twice": (
        {"conversations": [said("system", "s"), said("human", "q"), said("gpt", "a")], "system": "t"}, "'system' after"
    ),
    "broken function call": (
        {"conversations": [said("human", "q"), said("function_call", '{"name": "f", "argu')]},
        r"turn 2 \(function call\) is not valid JSON",
    ),
    "function call without name": (
        {"conversations": [said("human", "q"), said("function_call", '{"arguments": {}}')]}, "has no name"
    ),
    "function call is a text": (
        {"conversations": [said("human", "q"), said("function_call", "find()")]}, "is not valid JSON"
    ),
    "alpaca without answer": ({"instruction": "q", "output": ""}, "empty answer"),
    "alpaca answer null": ({"instruction": "q", "output": None}, "expected messages"),
    "alpaca answer is a list": ({"instruction": "q", "output": ["a"]}, "'output' must be text"),
    "alpaca answer is 0": ({"instruction": "Of 2 - 2?", "output": 0}, "'output' must be text"),
    "alpaca input is 0": ({"instruction": "Double it.", "input": 0, "output": "0"}, "'input' must be text"),
    "no completion": ({"prompt": "q", "completion": ""}, "field 'completion' is empty"),
    "completion null": ({"prompt": "q", "completion": None}, "expected messages"),
    "mixed": ({"prompt": [ASKED], "completion": "a"}, "two texts or two lists of messages"),
    "completion without answer": ({"prompt": [ASKED, ANSWERED], "completion": [ASKED]}, "no message of it is to be tr"),
    "empty completion": ({"prompt": [ASKED], "completion": []}, "no assistant message"),
    "empty text": ({"text": ""}, "is empty"),
    "text is a list": ({"text": ["a"]}, "is not a text"),
    "no ids": ({"input_ids": []}, "."),
    "one id": ({"input_ids": [5]}, "no token of it is trained"),
    "nothing labelled": ({"input_ids": [5, 6], "labels": [-100, -100]}, "no token of it is trained"),
    "only the first is labelled": ({"input_ids": [5, 6], "labels": [5, -100]}, "no token of it is trained"),
    "shifted labels": ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "labels are not shifted"),
    "too few labels": ({"input_ids": [5, 6, 7], "labels": [5, 6]}, "has 3 input_ids and 2 labels"),
    "ids are numbers with a point": ({"input_ids": [5.0, 6.0]}, "not a list of whole numbers"),
    "ids are truths": ({"input_ids": [True, False]}, "not a list of whole numbers"),
    "ids are a batch": ({"input_ids": [[5, 6, 7]]}, "not a list of whole numbers"),
    "ids are text": ({"input_ids": "5 6 7"}, "not a list of whole numbers"),
    "an id is null": ({"input_ids": [5, None]}, "not a list of whole numbers"),
    "id above the vocabulary": ({"input_ids": [5, 300]}, "has the token id 300; the tokenizer has ids from 0 to 299"),
    "id below zero": ({"input_ids": [5, -6]}, "has the token id -6"),
    "id of no machine": ({"input_ids": [5, 10**30]}, "has the token id 10000"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_row_that_cannot_be_used_is_told_with_the_reason(row: str, tokenizer: PreTrainedTokenizerBase) -> None:
    value, reason = BAD_ROWS[row]
    with pytest.raises(BadRow, match=reason) as caught:
        tokens_of(value, tokenizer)
    assert len(str(caught.value)) < 300


def test_a_reason_is_short_however_much_the_row_holds(tokenizer: PreTrainedTokenizerBase) -> None:
    """Reasons are stored and printed; a picture in base64 has megabytes."""
    image = {"image": "A" * 1_000_000}
    for row in (messages(turn("user", [image]), ANSWERED), messages(ASKED, turn("user" * 100_000, "a"))):
        with pytest.raises(BadRow) as caught:
            tokens_of(row, tokenizer)
        assert len(str(caught.value)) < 1000


def test_earlier_turns_of_an_alpaca_row_are_not_lost(tokenizer: PreTrainedTokenizerBase) -> None:
    """LLaMA-Factory's `history`: an answer to a question that the model has not read teaches it to invent."""
    row = {"instruction": "And its capital?", "output": "Paris.", "history": [["A country?", "France."]]}
    try:
        whole, _ = texts(row, tokenizer)
    except BadRow:
        return
    assert "France." in whole


@pytest.mark.parametrize("depth", [100, 900, 980, 985, 1000, 100_000])
def test_a_deep_row_is_read_or_told(depth: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    line = json.dumps(chat("q", "a"))[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
    file = write_jsonl(tmp_path / "a.jsonl", [line, chat("q", "a")])
    deep, other = read_rows(source(path=str(file)))
    try:
        row_tokens(deep, source(), tokenizer, "assistant")
    except BadRow as error:
        assert "JSON" in str(error)  # noqa: PT017
    assert other.value == chat("q", "a")


# .json, read as a stream


def items_of(file: Path, text: str | bytes) -> list[Any]:
    """What each row of a .json file is, or why it is none."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [row.problem if row.value is None else row.value for row in read_rows(source(path=str(file)))]


def random_value(draw: random.Random, depth: int = 0) -> Any:
    kinds = ["text", "number", "float", "constant"] + (["list", "object"] if depth < 3 else [])
    match draw.choice(kinds):
        case "text":
            letters = ["a", "é", "😀", '"', "\\", "\n", "\u2028", "]", "}", ",", "[", "{", ":", " ", "\x00", "\ud83d"]
            return "".join(draw.choices(letters, k=draw.randint(0, 8)))
        case "number":
            return draw.choice([0, -1, draw.randint(-(10**20), 10**20)])
        case "float":
            return draw.choice([0.5, -1e-300, 1e22, draw.random()])
        case "constant":
            return draw.choice([True, False, None])
        case "list":
            return [random_value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
        case _:
            return {random_value(draw, 9).__repr__(): random_value(draw, depth + 1) for _ in range(draw.randint(0, 3))}


def spaced(value: Any, draw: random.Random) -> str:
    """JSON with odd spacing."""

    def space() -> str:
        return "".join(draw.choices(" \n\t\r", k=draw.choice([0, 0, 1, 5])))

    match value:
        case dict():
            pairs = [f"{space()}{json.dumps(k)}{space()}:{space()}{spaced(v, draw)}" for k, v in value.items()]
            return "{" + f"{space()},".join(pairs) + space() + "}"
        case list():
            return "[" + f"{space()},".join(space() + spaced(one, draw) for one in value) + space() + "]"
        case _:
            return json.dumps(value, ensure_ascii=draw.random() < 0.5 or "\ud83d" in str(value))


def random_rows(seed: int) -> tuple[list[dict[str, Any]], random.Random]:
    draw = random.Random(seed)
    rows = [{"n": at, "v": random_value(draw)} for at in range(draw.randint(1, 8))]
    return rows, draw


@pytest.mark.parametrize("block", [1, 2, 7, 64])
@pytest.mark.parametrize("seed", range(12))
def test_a_json_list_is_read_as_json_would(
    seed: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_BLOCK", block)
    for more in range(10):
        rows, draw = random_rows(seed * 100 + more)
        text = spaced(rows, draw) + draw.choice(["", "\n", "\n\n"])
        assert items_of(tmp_path / "a.json", text) == json.loads(text) == rows


@pytest.mark.parametrize("start", ["\ufeff", "\n", " " * 100, "\ufeff" + "\r\n" * 50])
def test_a_json_list_may_begin_with_spaces_and_a_mark(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_BLOCK", 8)
    assert items_of(tmp_path / "a.json", start + '[{"a": 1}]') == [{"a": 1}]


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_items_that_are_no_objects_are_bad_rows_wherever_a_block_ends(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_BLOCK", block)
    found = items_of(tmp_path / "a.json", '["text", 12345, 1.25, 1e5, -2E-3, null, true, NaN, [], {"a": 1}]')
    kinds = ["str", "int", "float", "float", "float", "NoneType", "bool", "float", "list"]
    assert found == [*(f"is a {kind}, not an object with fields" for kind in kinds), {"a": 1}]


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_a_json_file_cut_off_anywhere_is_told(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BLOCK", block)
    text = ' [{"a": "é\\n😀", "b": [1, 2.5]} , {"c": {"d": null}},\n{"e": true}]'
    for end in range(1, len(text)):
        with pytest.raises(BadInput, match=r"a\.json"):
            items_of(tmp_path / "a.json", text[:end])


@pytest.mark.parametrize("block", [1, 4, 1000])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"a": 1} {"a": 2}]', "expected ',' or ']' after item 1"),
        ('[{"a": 1}{"a": 2}]', "expected ',' or ']' after item 1"),
        ('[{"a": 1},, {"a": 2}]', "not valid JSON"),
        ('[{"a": 1},]', "not valid JSON"),
        ('[,{"a": 1}]', "not valid JSON"),
        ("[,]", "not valid JSON"),
        ('[{"a": 1}]x', "after the list comes"),
        ('[{"a": 1}] [{"a": 2}]', "after the list comes"),
        ('[{"a": 1}]\n{"a": 2}\n', "after the list comes"),
        ('[{"a" 1}, {"a": 2}]', "not valid JSON"),
        ('[{"a": 1}, {"a": \'x\'}]', "not valid JSON"),
        ("[{'a': 1}]", "not valid JSON"),
        ('[{"a": "line\nbreak"}]', "not valid JSON"),
        ('{"a": 1}\n{"a": 2}\n', r"one object a line is a \.jsonl file"),
        ('{"a": [{"b": 1}]}', "must hold a list of rows, it holds an object"),
        ('"text"', "must hold a list of rows, it holds a str"),
        ("null", "must hold a list of rows"),
        ("[]", "has no rows"),
        ("[\n ]\n", "has no rows"),
        ("  \n", "not valid JSON"),
        (b'[{"a": "\xff"}]', "not valid JSON"),
        ('[{"a": ' + "[" * 100_000 + "]" * 100_000 + "}]", "not valid JSON"),
    ],
)
def test_a_damaged_json_file_is_told(
    text: str | bytes, told: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_BLOCK", max(block, len(text) // 50))
    with pytest.raises(BadInput, match=told):
        items_of(tmp_path / "a.json", text)


@pytest.mark.parametrize("block", [3, 64, 1000])
def test_the_place_of_damage_in_a_json_file_is_that_in_the_file(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_BLOCK", block)
    good = "".join('{"text": "é"},\n' for _ in range(50))
    where = rf"item 51, which begins at byte {len(('[' + good).encode()):,}: "
    for bad in ('{"a" 1}', "nothing", '{"a": "\x01"}', '{"a": tru', '{"a": ' + "[" * 100_000):
        with pytest.raises(BadInput, match=where):
            items_of(tmp_path / "a.json", f"[{good}{bad}")


@pytest.mark.parametrize("damage", ["in a row", "between rows", "one object a line", "one object", "none"])
def test_no_more_than_a_part_of_a_json_file_is_in_memory(damage: str, tmp_path: Path) -> None:
    """Also when it is damaged at its start: who is told so must not run out of memory before."""
    row = json.dumps({"text": "x" * 1000})
    first, joint, start, end = row, ",\n", "[", "]"
    match damage:
        case "in a row":
            first = row.replace(":", " ")
        case "between rows":
            first = row + row
        case "one object a line":
            joint, start, end = "\n", "", ""
        case "one object":
            start, end = '{"data": [', "]}"
    file = tmp_path / "a.json"
    file.write_text(start + joint.join([first, *[row] * 20_000]) + end)
    rows = 0
    tracemalloc.start()
    try:
        for _ in read_rows(source(path=str(file))):
            rows += 1
    except BadInput:
        assert damage != "none"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (rows == 20_001) == (damage == "none")
    assert peak < file.stat().st_size / 2


# .jsonl in pieces


def in_pieces(given: Source) -> list[Row]:
    scans = [scan_file(file) for file in source_files(given)]
    return [row for piece in pieces(given, scans) for row in read_piece(given, piece)]


def count_of_pieces(given: Source) -> int:
    return len(pieces(given, [scan_file(file) for file in source_files(given)]))


def small_pieces(monkeypatch: pytest.MonkeyPatch, size: int, block: int = 1 << 20) -> None:
    monkeypatch.setattr(cutting, "_PIECES", 1 << 30)
    monkeypatch.setattr(cutting, "_SMALLEST_PIECE", size)
    monkeypatch.setattr(sources, "_BLOCK", block)
    monkeypatch.setattr(cutting, "_BLOCK", block)


@pytest.mark.parametrize(("size", "block"), [(1, 1), (1, 1000), (3, 2), (10, 64), (64, 10), (500, 1 << 20)])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["with a last end of line", "without", "blank lines at the end"])
def test_all_pieces_of_a_jsonl_file_give_the_rows_of_the_whole(
    size: int, block: int, end: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch, size, block)
    for seed in range(4):
        draw = random.Random(seed)
        kinds = ["row", "row", "row", "blank", "spaces", "broken", "long", "number", "letters"]
        lines = [
            {
                "row": json.dumps({"n": at}), "blank": "", "spaces": "  \t", "broken": '{"n": ', "number": "17",
                "long": json.dumps({"n": at, "long": "x" * draw.choice([100, 3000])}),
                "letters": json.dumps({"n": at, "é": "😀\u2028\u0085"}, ensure_ascii=False),
            }[draw.choice(kinds)]
            for at in range(draw.randint(5, 40))
        ]  # fmt: skip
        lines = ['{"n": "first"}', *lines, '{"n": "last"}']
        text = end.join(lines) + {"without": "", "blank lines at the end": end * 4}.get(last, end)
        file = tmp_path / "a.jsonl"
        file.write_bytes(text.encode())
        given = source(path=str(file))
        found = in_pieces(given)
        assert found == list(read_rows(given))
        assert [row.number for row in found] == [at for at, line in enumerate(lines, start=1) if line.strip()]
        assert size > 100 or count_of_pieces(given) > 1


def test_pieces_are_about_as_large_as_told_and_none_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 1000, 777)
    file = write_jsonl(tmp_path / "a.jsonl", chats(500))
    found = pieces(source(path=str(file)), [scan_file(file)])
    assert sum(piece.bytes for piece in found) == file.stat().st_size
    assert all(0 < piece.bytes < 1400 for piece in found)


def test_a_jsonl_file_of_one_long_line_is_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 10, 10)
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 100_000}])
    assert count_of_pieces(source(path=str(file))) == 1
    assert [row.number for row in in_pieces(source(path=str(file)))] == [1]


# .json in pieces


@pytest.mark.parametrize(("size", "block"), [(1, 1), (1, 1000), (10, 2), (40, 7), (40, 1 << 20), (500, 64)])
@pytest.mark.parametrize("start", ["", "\ufeff", " \r\n\u2003", "\ufeff\n "])
def test_all_pieces_of_a_json_file_give_the_rows_of_the_whole(
    size: int, block: int, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut between items by bytes, whatever letters, lists and spaces are in and around them."""
    small_pieces(monkeypatch, size, block)
    file = tmp_path / "a.json"
    given = source(path=str(file))
    for seed in range(20):
        rows, draw = random_rows(seed)
        values = [*rows, *draw.choices([17, -1.5e3, "é]", None, [{"n": 1}, [[]]], {}, {"é": "😀" * 50}], k=8)]
        file.write_bytes((start + spaced(values, draw) + draw.choice(["", "\r\n"])).encode())
        found = in_pieces(given)
        assert found == list(read_rows(given))
        assert [row.number for row in found] == list(range(1, len(values) + 1))
        assert [row.value for row in found] == [value if isinstance(value, dict) else None for value in values]
        assert count_of_pieces(given) == len(values) if size == 1 else size > 100 or count_of_pieces(given) > 1


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize(
    "damaged",
    [
        '[{"a": 1}, {"a": 2}, {"a": ', '[{"a": 1}, {"a": 2},', '[{"a": 1}, {"a": 2}', '[{"a": 1}, {"a": 2}] x',
        '[{"a": 1}, {"a": 2} {"a": 3}]', b'[{"a": 1}, {"a": 2}, {"a": "\xff"}]', '{"a": 1}\n{"a": 2}\n', "[", "",
    ],
)  # fmt: skip
def test_a_damaged_json_file_is_one_piece_that_tells_what_reading_it_tells(
    damaged: str | bytes, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch, 1, block)
    file = tmp_path / "a.json"
    file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    scan = scan_file(file)
    assert (scan.sha256, scan.cuts, scan.rows) == (hashlib.sha256(file.read_bytes()).hexdigest(), [(0, 0)], None)
    told = []
    if damaged:  # an empty file is told before
        for read in (read_rows, in_pieces):
            with pytest.raises(BadInput) as caught:
                list(read(source(path=str(file))))
            told.append(caught.value.problems)
        assert told[0] == told[1]


def test_an_empty_json_list_is_one_piece_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(" [ ]\n")
    assert in_pieces(source(path=str(tmp_path / "a.json"))) == []


def test_no_more_than_a_part_of_a_json_file_is_in_memory_while_it_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": "x" * 1000}] * 20_000))
    tracemalloc.start()
    try:
        scan = scan_file(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert scan.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (scan.rows, len(scan.cuts)) == (20_000, 20)
    assert peak < file.stat().st_size / 2


# Other files, several files


def test_files_are_scanned_together_each_once_and_in_order(
    three_files: tuple[Source, list[tuple[str, int, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, _ = three_files
    small_pieces(monkeypatch, 5)
    for file in source_files(given):
        os.utime(file, (0, 0))
    read: list[Path] = []
    monkeypatch.setattr(cache, "scan_file", lambda file, advance: read.append(file) or scan_file(file, advance))
    monkeypatch.setattr(cache.time, "time_ns", lambda: 1 << 62)  # long after they were written
    expected = [scan_file(file) for file in source_files(given)]
    assert [len(scan.cuts) > 1 for scan in expected] == [True, True, False]
    for _ in range(2):
        assert cache.scans_of(given, tmp_path) == expected
    assert sorted(read) == source_files(given)


def test_no_file_is_read_to_its_end_after_one_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch, 5, block=10)
    long = write_jsonl(tmp_path / "1.jsonl", [{"text": "x" * 1000}] * 1000)
    write_jsonl(tmp_path / "2.jsonl", [{"text": "x"}])
    read: list[int] = []

    def scan(file: Path, advance: Any) -> Any:
        if file != long:
            while not read:
                time.sleep(0.01)
            raise PermissionError(file)
        return scan_file(file, lambda count: (read.append(count), time.sleep(0.0001), advance(count)))

    monkeypatch.setattr(cache, "scan_file", scan)
    with pytest.raises(PermissionError):
        cache.scans_of(source(path=str(tmp_path / "*.jsonl")), tmp_path)
    assert 0 < sum(read) < long.stat().st_size / 2


def write_parquet(file: Path, rows: list[dict[str, Any]], group: int = 1000) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=group)
    return file


def test_all_row_groups_of_a_parquet_file_give_the_rows_of_the_whole(tmp_path: Path) -> None:
    rows = [chat(f"{at}?", f"{at}!") for at in range(20)]
    rows[3]["messages"][0]["name"] = "Zoë"  # a column then, null in all other rows
    given = source(path=str(write_parquet(tmp_path / "a.parquet", rows, group=3)))
    assert count_of_pieces(given) == 7
    found = in_pieces(given)
    assert found == list(read_rows(given))
    assert [row.number for row in found] == list(range(1, 21))
    assert [row.value for row in found] == rows


@pytest.mark.parametrize("group", [1, 7, 100, 1000])
@pytest.mark.parametrize("size", [1, 300, 5000])
def test_all_row_ranges_of_large_row_groups_give_the_rows_of_the_whole(
    size: int, group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch, size, block=500)
    rows = [chat(f"{at}? é😀", "!" * (at % 50)) | {"tags": [{"t": None}, {"t": ["x"] * (at % 3)}]} for at in range(250)]
    given = source(path=str(write_parquet(tmp_path / "a.parquet", rows, group)))
    found = in_pieces(given)
    assert found == list(read_rows(given))
    assert [row.number for row in found] == list(range(1, 251))
    assert [row.value["messages"] for row in found if row.value] == [row["messages"] for row in rows]
    groups = -(-250 // group)
    assert groups <= count_of_pieces(given) <= groups * 17
    assert count_of_pieces(given) > groups or size == 5000 or group < 100


def test_a_parquet_file_without_rows_gives_none(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "a.parquet")
    assert in_pieces(source(path=str(tmp_path / "a.parquet"))) == []


def test_no_more_than_a_part_of_a_row_group_is_in_memory(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [{"text": draw.randbytes(1000).hex()} for _ in range(20_000)]
    given = source(path=str(write_parquet(tmp_path / "a.parquet", rows, group=20_000)))
    del rows
    before = pyarrow.total_allocated_bytes()
    for piece in pieces(given, [scan_file(file) for file in source_files(given)])[::10]:
        reading = read_piece(given, piece)
        assert next(reading).number == piece.start + 1
        assert pyarrow.total_allocated_bytes() - before < 20_000_000  # of 40 MB


def write_columns(file: Path, **columns: Any) -> Source:
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return source(path=str(file))


def texts_not_utf8() -> Any:
    """a, a byte that is no text, c."""
    offsets = pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1]
    return pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"a\xffc"))


@pytest.mark.parametrize(
    "unused", [pyarrow.array([1, 1 << 60, 2], pyarrow.timestamp("us")), texts_not_utf8()], ids=["far date", "no text"]
)
def test_a_column_that_nobody_asked_for_is_not_read(unused: Any, tmp_path: Path) -> None:
    given = write_columns(tmp_path / "a.parquet", text=["a", "b", "c"], note=unused)
    for found in (list(read_rows(given)), in_pieces(given)):
        assert [parse_row(row.value or {}, given) for row in found] == [Text("a"), Text("b"), Text("c")]
    with pytest.raises(BadRow, match="'text', 'note'"):  # its name is still told
        parse_row(next(read_rows(given)).value or {}, source(path="x", format="messages"))


@pytest.mark.parametrize("kind", ["auto", "text", "messages", "tokens", "alpaca"])
def test_every_column_that_a_row_may_use_is_read(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    shape = ONE_OF_EACH["text" if kind == "auto" else kind]
    given = source(path=str(write_parquet(tmp_path / "a.parquet", [shape])), format=kind)
    (row,) = read_rows(given)
    assert texts(row.value or {}, tokenizer, format=kind) == texts(shape, tokenizer, format=kind)


@pytest.mark.parametrize("how", ["by its name", "mapped"])
def test_a_value_that_cannot_be_read_is_a_bad_row(how: str, tmp_path: Path) -> None:
    name = "text" if how == "by its name" else "body"
    for column in (texts_not_utf8(), pyarrow.array([1, 1 << 60, 2], pyarrow.timestamp("us"))):
        given = write_columns(tmp_path / "a.parquet", **{name: column})
        given = given.model_copy(update={"fields": {} if name == "text" else {"text": name}})
        first, second, third = read_rows(given)
        assert (second.number, second.value) == (2, None)
        assert "cannot be read" in second.problem
        assert [isinstance((one.value or {})[name], str | datetime.datetime) for one in (first, third)] == [True, True]


def test_a_text_that_stands_once_in_a_dictionary_is_not_decoded_for_all_rows(tmp_path: Path) -> None:
    long = "x" * 200_000
    given = write_columns(tmp_path / "a.parquet", text=pyarrow.array([long] * 2000).dictionary_encode())
    plain = write_columns(tmp_path / "b.parquet", text=[long] * 2000)
    assert (tmp_path / "b.parquet").stat().st_size < 1_000_000
    for one in (given, plain):
        before = pyarrow.total_allocated_bytes()
        tracemalloc.start()
        for at, row in enumerate(read_rows(one)):
            assert (row.value or {})["text"] == long
            assert pyarrow.total_allocated_bytes() - before < 20_000_000  # of 400 MB
            if at == 100:
                break
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()


def test_rows_of_several_shapes_in_one_parquet_file(tmp_path: Path, with_tools: PreTrainedTokenizerBase) -> None:
    call = CALL_SHAPES["arguments as JSON text"] | {"tools": json.dumps(TOOLS)}
    shapes = [ONE_OF_EACH["text"], ONE_OF_EACH["alpaca"], call, ONE_OF_EACH["tokens"], ONE_OF_EACH["sharegpt"]]
    given = source(path=str(write_parquet(tmp_path / "a.parquet", [dict.fromkeys(ROW_FIELDS) | one for one in shapes])))
    for row, shape in zip(read_rows(given), shapes, strict=True):
        assert row.value is not None
        assert texts(row.value, with_tools) == texts(shape, with_tools)


def test_a_parquet_file_of_objects_as_arguments_loses_no_argument(
    tmp_path: Path, with_tools: PreTrainedTokenizerBase
) -> None:
    """Parquet gives every key to every call; the nulls are not the user's."""
    rows = [{"messages": with_call(called(arguments))} for arguments in ({"a": 1}, {"b": "x", "c": [1]})]
    first, second = read_rows(source(path=str(write_parquet(tmp_path / "a.parquet", rows))))
    assert first.value is not None
    assert second.value is not None
    assert texts(first.value, with_tools) == texts(rows[0], with_tools)
    assert texts(second.value, with_tools) == texts(rows[1], with_tools)


def test_all_pieces_of_an_arrow_folder_give_the_rows_of_the_whole(tmp_path: Path) -> None:
    rows = [{"text": f"{at}"} for at in range(2500)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "a")
    given = source(path=str(tmp_path / "a"))
    assert count_of_pieces(given) == 3
    found = in_pieces(given)
    assert found == list(read_rows(given))
    assert [(row.number, row.value) for row in found] == list(enumerate(rows, start=1))


@pytest.fixture
def three_files(tmp_path: Path) -> tuple[Source, list[tuple[str, int, Any]]]:
    """A glob of a file of each kind; and (file, row number, row) of all rows."""
    folder = tmp_path / "files"
    rows = [{"text": f"{at}"} for at in range(12)]
    write_jsonl(folder / "1.jsonl", ["", *rows[:4]])
    (folder / "2.json").write_text(json.dumps(rows[4:8]))
    write_parquet(folder / "3.parquet", rows[8:], group=3)
    places = [("1.jsonl", at) for at in range(2, 6)] + [(name, at) for name in ("2.json", "3.parquet") for at in
                                                        range(1, 5)]  # fmt: skip
    expected = [(str(folder / name), at, row) for (name, at), row in zip(places, rows, strict=True)]
    return source(path=str(folder / "*")), expected


def test_a_glob_gives_the_rows_of_all_files_in_order_of_their_names(
    three_files: tuple[Source, list[tuple[str, int, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, expected = three_files
    small_pieces(monkeypatch, 5)
    for found in (list(read_rows(given)), in_pieces(given)):
        assert [(row.file, row.number, row.value) for row in found] == expected


@pytest.mark.parametrize("limit", [1, 4, 5, 9, 12, 100])
def test_a_limit_takes_the_first_rows_of_all_files_together(
    limit: int, three_files: tuple[Source, list[tuple[str, int, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, expected = three_files
    small_pieces(monkeypatch, 5)
    limited = given.model_copy(update={"limit": limit})
    for found in (list(read_rows(limited)), in_pieces(limited)):
        assert [(row.file, row.number, row.value) for row in found] == expected[:limit]


@pytest.mark.parametrize("size", [1, 60, 400, 1 << 20])
def test_a_limit_at_any_row_gives_the_rows_of_one_read(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At, before and behind borders of pieces and files; blank lines are no rows, broken ones are."""
    small_pieces(monkeypatch, size, block=100)
    rows = [{"text": f"{at} é😀 " + "x" * (at % 40)} for at in range(60)]
    lines = ["\ufeff", *(line for row in rows[:20] for line in ("", json.dumps(row, ensure_ascii=False), " \t", "{"))]
    (tmp_path / "1.jsonl").write_bytes("\r\n".join(lines).encode())
    (tmp_path / "2.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows[20:40], ensure_ascii=False).encode())
    write_parquet(tmp_path / "3.parquet", rows[40:], group=15)
    given = source(path=str(tmp_path / "*"))
    whole = list(read_rows(given))
    assert len(whole) == 81
    for limit in range(1, 84):
        limited = given.model_copy(update={"limit": limit})
        assert in_pieces(limited) == list(read_rows(limited)) == whole[:limit]
    assert count_of_pieces(given.model_copy(update={"limit": 80})) > 3 + 60 * (size == 1)


def test_a_limit_takes_the_first_rows_of_an_arrow_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": f"{at}"} for at in range(2500)]).save_to_disk(tmp_path / "a")
    for limit, count in ((1, 1), (1000, 1), (1001, 2), (2500, 3), (9999, 3)):
        given = source(path=str(tmp_path / "a"), limit=limit)
        assert in_pieces(given) == list(read_rows(given))
        assert (len(in_pieces(given)), count_of_pieces(given)) == (min(limit, 2500), count)


def test_damage_behind_the_limit_is_not_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 1)
    (tmp_path / "1.json").write_text('[{"text": "a"}, {"text": "b"}, {"text": ')
    (tmp_path / "2.parquet").write_text("no Parquet")
    for limit in (1, 2):
        given = source(path=str(tmp_path / "*"), limit=limit)
        assert in_pieces(given) == list(read_rows(given))
        assert len(in_pieces(given)) == limit
    for read in (read_rows, in_pieces):
        with pytest.raises(BadInput, match=r"1\.json is not valid JSON"):
            list(read(source(path=str(tmp_path / "*"), limit=3)))


@pytest.mark.parametrize(
    "names",
    [
        ["a.jsonl", "b.jsonl", "c.jsonl"],
        ["a.jsonl", "b.jsonl", "c.parquet"],
        ["train.jsonl", "more.jsonl"],
        ["a.jsonl", "sub/b.jsonl"],
        ["train-1.jsonl", "train-2.jsonl", "rest.jsonl"],
    ],
)
def test_no_file_of_a_folder_is_left_out_without_a_word(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "data"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            write_jsonl(folder / name, [{"text": name}])
        else:
            write_parquet(folder / name, [{"text": name}])
    try:
        found = [row.value for row in read_rows(source(path=str(folder)))]
    except BadInput:
        return  # told, so nothing is lost
    assert sorted(row["text"] for row in found if row) == sorted(names)


# Which files a source has


def test_hidden_files_of_a_folder_are_none_of_its_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    for name in ("._a.jsonl", ".cache/b.jsonl", "sub/.ipynb_checkpoints/a-checkpoint.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("not data")
    assert source_files(source(path=str(tmp_path))) == [tmp_path / "a.jsonl"]


@pytest.mark.parametrize("by", ["folder", "glob"])
def test_endings_are_read_in_large_and_small_letters(by: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "1.JSONL", [{"text": "a"}])
    write_jsonl(tmp_path / "2.ndjson", [{"text": "b"}])
    (tmp_path / "3.Json").write_text('[{"text": "c"}]')
    write_parquet(tmp_path / "4.PARQUET", [{"text": "d"}])
    given = source(path=str(tmp_path / "*" if by == "glob" else tmp_path))
    for found in (list(read_rows(given)), in_pieces(given)):
        assert [(row.value or {})["text"] for row in found] == list("abcd")


@pytest.mark.parametrize("name", ["b.CSV", "b.jsonl.xz", "b.json.bz2", "b.xlsx", "b.txt"])
def test_what_may_be_data_and_cannot_be_read_is_told(name: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / name).write_text("x")
    for path in (tmp_path, tmp_path / "*"):
        with pytest.raises(BadInput, match=rf"{name}: unknown kind"):
            source_files(source(path=str(path)))


def test_no_file_is_read_twice(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "sub" / "a.jsonl", [{"text": "a"}])
    assert source_files(source(path=str(tmp_path / "**" / "**" / "*.jsonl"))) == [file]
    (tmp_path / "sub" / "b.jsonl").symlink_to(file)
    for path in (tmp_path, tmp_path / "sub" / "*"):
        with pytest.raises(BadInput, match=r"b\.jsonl is the same file as .*a\.jsonl"):
            source_files(source(path=str(path)))


def test_a_source_of_many_files_is_listed_once_and_in_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(2000):
        (tmp_path / f"{at}.jsonl").write_text('{"text": "a"}')
    given = source(path=str(tmp_path))
    start = time.monotonic()
    scans = [scan_file(file) for file in source_files(given)]
    cut = pieces(given, scans)
    monkeypatch.setattr(sources, "source_files", lambda _: pytest.fail("listed anew"))
    assert sum(1 for piece in cut for _ in read_piece(given, piece)) == 2000
    assert time.monotonic() - start < 60  # listed for each piece it took many minutes


def test_a_piece_is_of_its_file_whatever_comes_into_the_folder(tmp_path: Path) -> None:
    for name in "bc":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    given = source(path=str(tmp_path))
    cut = pieces(given, [scan_file(file) for file in source_files(given)])
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert [row.value for piece in cut for row in read_piece(given, piece)] == [{"text": "b"}, {"text": "c"}]


@pytest.mark.parametrize(
    "content", ["[]", "null", "7", '{"FILE": 1}', '{"FILE": {}}', '{"FILE": {"settled": true}}', "["]
)
def test_damaged_memory_of_files_is_not_trusted(content: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "files.json").write_text(content.replace("FILE", str(file)))
    assert cache.scans_of(source(path=str(file)), tmp_path) == [scan_file(file)]
