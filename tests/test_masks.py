"""The loss mask is exact, token by token, over chat templates of many shapes and random conversations."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from chat_templates import CALL_ID, SHAPES, Shape
from conftest import TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fullft.data.formats import BadRow, parse_row
from fullft.data.tokens import Tokens, tokenize
from fullft.recipe import Source

CONVERSATIONS = 30  # of each template

# Tokenizers

CODE = "def f(x):\n        return  x\n\n\nclass A:\n\n    def g(self):\n        pass\n\n\n- one\n- two:\n\n  text."
QWEN_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@functools.cache
def trained_model(kind: str) -> str:
    """A tokenizer without special tokens, as JSON: byte-level as Qwen's, or of pieces with bytes for other letters."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "bytes":
        split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        alphabet = sorted({*"".join(TEXTS), *CODE, "▁"} - {" ", "\n"})
        if kind == "metaspace":  # as Llama 2 and Mistral
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        else:  # as Gemma
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    # A line break is a token of its own where it is not a part of longer white space.
    tokenizer.train_from_iterator([*TEXTS, *([CODE] if kind == "bytes" else CODE.split("\n"))] * 20, trainer)
    if kind == "bytes":
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer.to_str()
    whole = json.loads(tokenizer.to_str())
    vocabulary = whole["model"]["vocab"]
    for token in ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]:
        vocabulary[token] = len(vocabulary)
    whole["model"] |= {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    return json.dumps(whole)


def make_tokenizer(shape: Shape, marks: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(trained_model(shape.kind))
    special = [token for token in (shape.bos, shape.eos, *shape.special) if token]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=shape.swallows) for token in special]
    )
    if shape.bos:  # plain text gets a BOS from the tokenizer; a chat has it from its template
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{shape.bos} $A",
            special_tokens=[(shape.bos, tokenizer.token_to_id(shape.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=shape.bos,
        eos_token=shape.eos,
        chat_template=shape.template if marks else shape.plain,
    )


@pytest.fixture(params=["with marks", "without marks"])
def marks(request: pytest.FixtureRequest) -> bool:
    return request.param == "with marks"


def byte_of_letter() -> dict[str, int]:
    """What the letters of byte-level tokens stand for."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + at): byte for at, byte in enumerate(moved)}


LETTERS = byte_of_letter()


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Decoded to the letter: decoders of the library leave out a space here and there."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    raw = b""
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token in special:
            raw += token.encode()
        elif byte_level:
            raw += bytes(LETTERS[letter] for letter in token)
        elif re.fullmatch("<0x..>", token):
            raw += bytes([int(token[3:5], 16)])
        else:
            raw += token.replace("▁", " ").encode()
    return raw.decode()


def runs(tokens: Tokens) -> list[tuple[int, int]]:
    """Where trained tokens begin and end."""
    found = []
    for trained, run in itertools.groupby(range(len(tokens)), key=tokens.trained.__getitem__):
        if trained:
            at = list(run)
            found.append((at[0], at[-1] + 1))
    return found


def trained_texts(tokenizer: PreTrainedTokenizerFast, tokens: Tokens) -> list[str]:
    return [text_of(tokenizer, tokens.ids[start:end]) for start, end in runs(tokens)]


def as_trained(shape: Shape, tokenizer: PreTrainedTokenizerFast, tokens: Tokens, expected: list[str]) -> list[str]:
    """The texts of the trained runs.

    Where a header ends with white space and the answer begins with it, one token may be part of both. It is the
    header's; such a run is given as expected.
    """
    found = trained_texts(tokenizer, tokens)
    if len(found) == len(expected):
        for at, ((start, _), want) in enumerate(zip(runs(tokens), expected, strict=True)):
            shared = want.removesuffix(found[at])
            before = text_of(tokenizer, tokens.ids[start - 1 : start])
            if shape.header[-1:].isspace() and shared.isspace() and before.endswith(shape.header[-1:] + shared):
                found[at] = want
    return found


def in_ids(shape: Shape, text: str) -> str:
    """A trained text as it can be read from the ids."""
    if not shape.swallows:
        return text
    special = "|".join(re.escape(token) for token in (shape.eos, *shape.special))
    return re.sub(rf"({special})\s+", r"\1", text.lstrip())


# Conversations

WORDS = [
    "plain words", "ä 日本語 😀", "def f(x):\n        return  x", "a\n\n\nb", "1\t2", " before", "after ",
    "\nline before", "line after\n", "\n\n", "  ", "- one\n- two:\n\n  text.\n",
    "🏳️‍🌈e\u0301", "\u00a0x", "{{ jinja }} {% if %}",
]  # fmt: skip


def draw_text(draw: random.Random, shape: Shape) -> str:
    quoted = [shape.eos, shape.header, *shape.special]
    text = ""
    while not text.strip():
        words = [draw.choice(quoted if draw.random() < 0.15 else WORDS) for _ in range(draw.randint(1, 4))]
        text = draw.choice(["", " ", "\n"]).join(words)
    return text


def draw_messages(draw: random.Random, shape: Shape) -> list[dict[str, Any]]:
    """1 to 4 questions with answers, some of them said again."""
    messages = []
    if shape.system and draw.random() < 0.4:
        messages.append({"role": "system", "content": draw_text(draw, shape)})
    again = draw_text(draw, shape)
    for _ in range(draw.randint(1, 4)):
        for role in ("user", "assistant"):
            content = again if draw.random() < 0.25 else draw_text(draw, shape)
            messages.append({"role": role, "content": content})
    return messages


def conversations(shape: Shape) -> Iterator[list[dict[str, Any]]]:
    draw = random.Random(0)
    for _ in range(CONVERSATIONS):
        yield draw_messages(draw, shape)


def answers(shape: Shape, messages: list[dict[str, Any]]) -> dict[int, str]:
    """What is to be trained of each assistant's turn, by its position."""
    return {
        at: in_ids(shape, shape.answer(message["content"], at == len(messages) - 1))
        for at, message in enumerate(messages)
        if message["role"] == "assistant"
    }


def tokens_of(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], train_on: str = "assistant", **row: Any
) -> Tokens:
    return tokenize(parse_row({"messages": messages, **row}, Source(path="x.jsonl")), tokenizer, train_on)


def require_trained(
    shape: Shape, tokenizer: PreTrainedTokenizerFast, tokens: Tokens, expected: list[str], row: Any
) -> None:
    assert as_trained(shape, tokenizer, tokens, expected) == expected, row


# Which tokens carry loss


@pytest.mark.parametrize("name", SHAPES)
def test_just_the_answers_and_their_end_of_turn_tokens_are_trained(name: str, marks: bool) -> None:
    shape = SHAPES[name]
    tokenizer = make_tokenizer(shape, marks)
    for messages in conversations(shape):
        tokens = tokens_of(tokenizer, messages)
        require_trained(shape, tokenizer, tokens, list(answers(shape, messages).values()), messages)


@pytest.mark.parametrize("name", SHAPES)
def test_marks_and_no_marks_give_the_same_mask(name: str) -> None:
    shape = SHAPES[name]
    marked, plain = make_tokenizer(shape, marks=True), make_tokenizer(shape)
    for messages in conversations(shape):
        assert tokens_of(marked, messages) == tokens_of(plain, messages), messages


@pytest.mark.parametrize("name", SHAPES)
def test_only_the_last_answer_is_trained_on_request(name: str, marks: bool) -> None:
    shape = SHAPES[name]
    tokenizer = make_tokenizer(shape, marks)
    for messages in conversations(shape):
        tokens = tokens_of(tokenizer, messages, "last_assistant")
        require_trained(shape, tokenizer, tokens, list(answers(shape, messages).values())[-1:], messages)


@pytest.mark.parametrize("name", SHAPES)
def test_flags_of_messages_are_honoured(name: str, marks: bool) -> None:
    shape = SHAPES[name]
    tokenizer = make_tokenizer(shape, marks)
    draw = random.Random(1)
    for messages in conversations(shape):
        expected = answers(shape, messages)
        flag = draw.choice(["weight", "loss_weight", "train", "training", "trainable"])
        flags = {at: draw.choice([True, False, None]) for at in expected}
        kept = [at for at in expected if flags[at] is not False]
        if not kept:
            continue
        flagged = [
            message | ({} if flags.get(at) is None else {flag: draw.choice([int, bool])(flags[at])})
            for at, message in enumerate(messages)
        ]
        tokens = tokens_of(tokenizer, flagged)
        assert tokens.ids == tokens_of(tokenizer, messages).ids
        require_trained(shape, tokenizer, tokens, [expected[at] for at in kept], flagged)


@pytest.mark.parametrize("name", SHAPES)
def test_a_question_that_is_flagged_is_trained_beside_the_answer(name: str, marks: bool) -> None:
    shape = SHAPES[name]
    tokenizer = make_tokenizer(shape, marks)
    asked = {"role": "user", "content": "What is 2 + 3?", "train": True}
    tokens = tokens_of(tokenizer, [asked, {"role": "assistant", "content": "Five."}])
    found = trained_texts(tokenizer, tokens)
    assert "What is 2 + 3?" in found[0]
    assert "".join(found).endswith(in_ids(shape, shape.answer("Five.", True)))


@pytest.mark.parametrize("name", SHAPES)
def test_every_token_but_the_first_is_trained_on_request(name: str, marks: bool) -> None:
    shape = SHAPES[name]
    tokenizer = make_tokenizer(shape, marks)
    for messages in conversations(shape):
        tokens = tokens_of(tokenizer, messages, "all")
        assert tokens.trained == [False] + [True] * (len(tokens) - 1)


@pytest.mark.parametrize("name", SHAPES)
def test_ids_are_those_that_inference_has_with_one_bos(name: str, marks: bool) -> None:
    shape = SHAPES[name]
    tokenizer = make_tokenizer(shape, marks)
    for messages in conversations(shape):
        tokens = tokens_of(tokenizer, messages)
        written = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        stop = [tokenizer.eos_token_id] if name == "glm-4.5" else []  # it writes no token to stop at
        assert tokens.ids == written + stop
        if shape.bos:
            assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
            assert tokens.ids[0] == tokenizer.bos_token_id
            assert tokens.ids[1] != tokenizer.bos_token_id
            if name != "llama-2":  # which has one before every question
                assert tokens.ids.count(tokenizer.bos_token_id) == 1


def test_a_template_without_system_role_refuses_a_system_message(marks: bool) -> None:
    tokenizer = make_tokenizer(SHAPES["gemma-2"], marks)
    asked = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}]
    assert tokens_of(tokenizer, asked)
    with pytest.raises(BadRow, match="System role not supported"):
        tokens_of(tokenizer, [{"role": "system", "content": "S"}, *asked])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_conversation_that_says_the_same_again_and_again_is_trained_in_every_turn(
    name: str, count: int, marks: bool
) -> None:
    shape = SHAPES[name]
    tokenizer = make_tokenizer(shape, marks)
    for first in [[]] + [[{"role": "system", "content": "Go on."}]] * shape.system:
        for answer in ("On.", "Go on."):
            said = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]
            messages = first + said * count
            expected = list(answers(shape, messages).values())
            require_trained(shape, tokenizer, tokens_of(tokenizer, messages), expected, messages)
            tokens = tokens_of(tokenizer, messages, "last_assistant")
            require_trained(shape, tokenizer, tokens, expected[-1:], messages)


# Thinking

THINKING = ["qwen3", "qwen3-thinking", "glm-4.5", "deepseek-v3.1"]


@pytest.mark.parametrize("name", THINKING)
@pytest.mark.parametrize("count", [1, 3])
def test_an_empty_thinking_block_of_the_template_is_not_trained(name: str, count: int, marks: bool) -> None:
    shape = SHAPES[name]
    tokenizer = make_tokenizer(shape, marks)
    messages = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "Five."}] * count
    tokens = tokens_of(tokenizer, messages)
    assert "</think>" in text_of(tokenizer, tokens.ids)
    assert not any("think>" in text for text in trained_texts(tokenizer, tokens))
    require_trained(shape, tokenizer, tokens, list(answers(shape, messages).values()), messages)


def thinking_message(shape: Shape, how: str, thinking: str, answer: str) -> dict[str, Any]:
    if how == "inline":
        return {"role": "assistant", "content": f"<think>\n{thinking}\n</think>\n\n{answer}"}
    return {"role": "assistant", "content": answer, str(shape.thinking_key): thinking}


WAYS = [(name, "inline") for name, shape in SHAPES.items() if shape.thinking and shape.inline_thinking]
WAYS += [(name, "key") for name, shape in SHAPES.items() if shape.thinking_key]


@pytest.mark.parametrize(("name", "how"), WAYS)
@pytest.mark.parametrize("train_on", ["assistant", "last_assistant"])
def test_thinking_is_trained_where_it_stands_in_the_text(name: str, how: str, train_on: str, marks: bool) -> None:
    shape = SHAPES[name]
    tokenizer = make_tokenizer(shape, marks)
    draw = random.Random(2)
    for _ in range(CONVERSATIONS):
        messages = [{"role": "system", "content": "Think."}] * draw.randint(0, 1)
        expected = []
        turns = draw.randint(1, 4)
        for turn in range(turns):
            thinking = draw.choice(["2 + 3 makes 5.", "ä 日本語\n\n- so\n- then", "Go on."])
            answer = draw.choice(["Five.", "a\n\n\nb", "Go on.", "def f(x):\n        return  x"])
            messages.append({"role": "user", "content": draw.choice(["2 + 3?", "Go on.", "ä?"])})
            if draw.random() < 0.7:
                messages.append(thinking_message(shape, how, thinking, answer))
                expected.append(shape.thought(thinking, answer, turn == turns - 1))
            else:
                messages.append({"role": "assistant", "content": answer})
                expected.append(shape.answer(answer, turn == turns - 1))
        tokens = tokens_of(tokenizer, messages, train_on)
        require_trained(shape, tokenizer, tokens, expected if train_on == "assistant" else expected[-1:], messages)


# Tools


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
CALLS = [
    {"name": "add", "arguments": {"a": 2, "b": 3}},
    {"name": "find", "arguments": {"text": "ä 😀 \"quoted\"\n", "deep": {"list": [1, None, True]}}},
    {"name": "now", "arguments": {}},
]  # fmt: skip


def call_message(calls: list[dict[str, Any]], content: str, as_text: bool) -> dict[str, Any]:
    """As OpenAI writes it: arguments are JSON text; or as templates want it: an object."""
    written = [call | {"arguments": json.dumps(call["arguments"])} if as_text else call for call in calls]
    listed = [{"type": "function", "id": CALL_ID, "function": call} for call in written]
    return {"role": "assistant", "content": content, "tool_calls": listed}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.calls])
def test_tool_calls_are_trained_as_the_template_writes_them_and_results_are_not(
    name: str, as_text: bool, marks: bool
) -> None:
    shape = SHAPES[name]
    several = shape.calls in ("tags", "list")
    tokenizer = make_tokenizer(shape, marks)
    draw = random.Random(3)
    for _ in range(CONVERSATIONS):
        messages: list[dict[str, Any]] = [{"role": "system", "content": "Add."}] * draw.randint(0, 1)
        expected = []
        turns = draw.randint(1, 3)
        for turn in range(turns):
            messages.append({"role": "user", "content": draw.choice(["2 + 3?", "Again."])})
            for _ in range(draw.randint(0 if turn else 1, 2)):
                calls = [draw.choice(CALLS) for _ in range(draw.randint(1, 2) if several else 1)]
                content = draw.choice(["", "Let me see."]) if shape.calls == "tags" else ""
                messages.append(call_message(calls, content, as_text))
                expected.append(shape.called(content, calls))
                messages += [{"role": "tool", "content": "Result 5.", "tool_call_id": CALL_ID}] * len(calls)
            messages.append({"role": "assistant", "content": "It is five."})
            expected.append(shape.answer("It is five.", turn == turns - 1))
        tokens = tokens_of(tokenizer, messages, tools=[TOOL])
        require_trained(shape, tokenizer, tokens, expected, messages)
        assert "Result 5." in text_of(tokenizer, tokens.ids)
        flagged = [message | {"weight": 0} if message.get("tool_calls") else message for message in messages]
        plain = [text for text in expected if "It is five." in text]
        require_trained(shape, tokenizer, tokens_of(tokenizer, flagged, tools=[TOOL]), plain, flagged)


def test_a_tool_call_that_ends_a_conversation_is_trained_with_its_end(marks: bool) -> None:
    for shape in SHAPES.values():
        if not shape.calls:
            continue
        tokenizer = make_tokenizer(shape, marks)
        messages = [{"role": "user", "content": "2 + 3?"}, call_message(CALLS[:1], "", as_text=True)]
        tokens = tokens_of(tokenizer, messages, tools=json.dumps([TOOL]))
        require_trained(shape, tokenizer, tokens, [shape.called("", CALLS[:1])], messages)
