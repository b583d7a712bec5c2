"""Conversations and texts → token ids, and which of them carry loss."""

from __future__ import annotations

import functools
import json
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import numpy
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fullft.data.formats import BadRow, Conversation, Pretokenized, Text

Span = tuple[int, int]  # characters of a rendered conversation


@dataclass(frozen=True)
class Tokens:
    """`ids` and `trained` have equal length; `trained[i]` says whether token i is a target of the loss."""

    ids: list[int]
    trained: list[bool]
    reasoning_lost: bool = (
        False  # the row has reasoning for its last trained answer, and the chat template leaves it out
    )

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(example: Conversation | Text | Pretokenized, tokenizer: PreTrainedTokenizerBase, train_on: str) -> Tokens:
    """Token ids and loss mask of one row. The first token is never trained: nothing predicts it.

    Raises:
        BadRow: the chat template refuses the row, or its assistant turns cannot be told from the rest.
    """
    match example:
        case Text():
            tokens = _text(example, tokenizer)
        case Pretokenized():
            tokens = _pretokenized(example, tokenizer)
        case _:
            tokens = _conversation(example, tokenizer, train_on)
    return replace(tokens, trained=[False, *tokens.trained[1:]])


def _text(example: Text, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    prompt, text = encode(tokenizer, example.prompt), encode(tokenizer, example.text)
    first = list(beginning(tokenizer))
    if (prompt or text)[: len(first)] != first:  # chats that were rendered before have it
        prompt = first + prompt
    if tokenizer.eos_token_id is not None and text[-1:] != [tokenizer.eos_token_id]:
        text = [*text, tokenizer.eos_token_id]  # else the model never learns to stop
    return Tokens(prompt + text, [False] * len(prompt) + [True] * len(text))


def _pretokenized(example: Pretokenized, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    known = vocabulary_size(tokenizer)
    if wrong := [token for token in example.ids if not 0 <= token < known]:
        raise BadRow(f"has the token id {wrong[0]}; the tokenizer has ids from 0 to {known - 1}")
    return Tokens(example.ids, example.trained)


@functools.lru_cache(maxsize=4)
def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest token id."""
    return int(max(tokenizer.get_vocab().values())) + 1


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text, without any special token added."""
    return list(backend(tokenizer).encode(text, add_special_tokens=False).ids) if text else []


def backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer of the library `tokenizers`, as `tokenizer(text)` uses it, without its cost for each call."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


@functools.lru_cache(maxsize=4)
def beginning(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before plain text: the BOS token, or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return tuple(first) if first == [tokenizer.bos_token_id] else ()


# Conversations: rendered by the chat template; the trained turns are spans of that text


def _conversation(example: Conversation, tokenizer: PreTrainedTokenizerBase, train_on: str) -> Tokens:
    turns, template = trained_turns(example, train_on), tokenizer.get_chat_template(tools=example.tools)
    if not turns:
        raise BadRow("no message of it is to be trained")
    try:
        text, spans = _rendered_with_spans(example, tokenizer, turns, train_on)
    except jinja2.TemplateError as error:
        raise BadRow(f"the chat template refuses it: {error}") from None
    except TypeError:  # some templates join a tool call's arguments to a text, and cannot with an object
        if (as_text := _with_arguments_as_text(example)) == example:
            raise
        text, spans = _rendered_with_spans(as_text, tokenizer, turns, train_on)
    if train_on != "all":
        for at, (start, end) in zip(turns, spans, strict=True):
            _require_written(example.messages[at], at + 1, text[start:end])
    # Templates write the BOS token themselves: add_special_tokens would double it.
    encoded = backend(tokenizer).encode(text, add_special_tokens=False)
    ids = encoded.ids
    trained = _tokens_at_clean_borders(encoded, spans, len(text))
    if trained is None:
        offsets = encoded.offsets
        if stripping := _tokens_that_strip(tokenizer):  # their offsets hold the space after them
            offsets = [(start, min(end, start + stripping.get(token, end)))
                       for token, (start, end) in zip(ids, offsets, strict=True)]  # fmt: skip
        trained = tokens_in_spans(offsets, spans)
    if example.messages[-1]["role"] == "assistant" and _last_answer_has_no_end(tokenizer, template):
        last_is_trained = turns[-1] == len(example.messages) - 1
        ids, trained = [*ids, tokenizer.eos_token_id], [*trained, last_is_trained]  # as after plain text
    reasoning = str(example.messages[turns[-1]].get("reasoning_content") or "").strip()
    return Tokens(ids, trained, reasoning not in text)


def _with_arguments_as_text(example: Conversation) -> Conversation:
    messages = []
    for message in example.messages:
        calls = [
            call | {"function": function | {"arguments": json.dumps(function.get("arguments", {}), ensure_ascii=False)}}
            for call in message.get("tool_calls", [])
            for function in [call["function"]]
        ]  # fmt: skip
        messages.append(message | ({"tool_calls": calls} if calls else {}))
    return replace(example, messages=messages)


def _require_written(message: dict[str, Any], position: int, turn: str) -> None:
    """A template without tools leaves calls out without a word, and the model would learn to say nothing."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    if lost := [call.get("name") for call in calls if str(call.get("name")) not in turn]:
        raise BadRow(f"message {position} calls the tool {lost[0]!r}, which the chat template does not write")
    if message["role"] == "assistant" and not calls and not str(message.get("content") or "").strip():
        raise BadRow(f"message {position} is an empty answer")


@functools.lru_cache(maxsize=4)
def _last_answer_has_no_end(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template writes no token to stop at after the last answer (GLM: the next role's token is its end)."""
    messages: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PLACEHOLDER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except Exception:  # a template that wants more; what it writes is taken as it is
        return False
    return not text.rpartition(_PLACEHOLDER)[2].strip() and tokenizer.eos_token_id is not None


def trained_turns(example: Conversation, train_on: str) -> list[int]:
    """Positions of the messages that carry loss."""
    answers = [
        at for at, message in enumerate(example.messages)
        if message["role"] == "assistant" and at >= example.prompt_messages
    ]  # fmt: skip
    if train_on == "last_assistant":
        answers = answers[-1:]
    chosen = range(len(example.messages)) if train_on == "all" else answers
    extra = [] if train_on == "last_assistant" else [at for at, flag in example.flags.items() if flag]
    return sorted({at for at in chosen if example.flags.get(at, True)}.union(extra))


def _rendered_with_spans(
    example: Conversation, tokenizer: PreTrainedTokenizerBase, turns: list[int], train_on: str
) -> tuple[str, list[Span]]:
    """The conversation as text, and where its trained turns are in it, each with its end-of-turn token."""
    template = tokenizer.get_chat_template(tools=example.tools)
    if train_on == "all" and len(turns) == len(example.messages):
        text = render(tokenizer, example.messages, example.tools)
        return text, [(0, len(text))]
    answers = [at for at, message in enumerate(example.messages) if message["role"] == "assistant"]
    if _has_marks(template) and set(turns) <= set(answers):
        text, marked = _render_with_marks(tokenizer, template, example)
        if len(marked) == len(answers):
            of_turn = dict(zip(answers, marked, strict=True))
            return text, [
                (start, _end_of_turn(text, end, tokenizer) if _marks_leave_the_end_out(tokenizer, template) else end)
                for start, end in (of_turn[at] for at in turns)
            ]
    text = render(tokenizer, example.messages, example.tools)
    return text, [_span_of_turn(text, example, tokenizer, at) for at in turns]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: Any = None,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as the model reads it, with all special tokens written out."""
    text: str = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text


@functools.lru_cache(maxsize=4)
def _has_marks(template: str) -> bool:
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))


def _render_with_marks(
    tokenizer: PreTrainedTokenizerBase, template: str, example: Conversation
) -> tuple[str, list[Span]]:
    """By the template's {% generation %} marks; what `apply_chat_template` does before it tokenizes."""
    rendered, spans = render_jinja_template(
        [example.messages], tools=example.tools, chat_template=template, return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )  # fmt: skip
    return rendered[0], list(spans[0])


@functools.lru_cache(maxsize=4)
def _marks_leave_the_end_out(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template closes its mark before the end-of-turn token; untrained, the model would never stop."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PLACEHOLDER}]
    text, spans = _render_with_marks(tokenizer, template, Conversation(messages))
    return not spans or text[slice(*spans[-1])].rstrip().endswith(_PLACEHOLDER)


_PLACEHOLDER = "\ue000\ue001"  # of a private-use area, so not in anyone's text
_EMPTY_THINKING = re.compile(r"\s*(<(\w+)>\s*)?</(think|thinking|thought|reasoning|reason)>\s*")


def _span_of_turn(text: str, example: Conversation, tokenizer: PreTrainedTokenizerBase, at: int) -> Span:
    """Where message `at` is in the rendered conversation `text`, with its end-of-turn token.

    Raises:
        BadRow: it cannot be told.
    """
    for way in (_by_placeholder, _by_cutting, _by_prefixes):
        if span := way(text, example, tokenizer, at):
            return span
    raise BadRow(
        f"message {at + 1} is rendered differently by the chat template when later messages follow, so its tokens "
        "cannot be told apart; use a template with {% generation %} marks, or data.train_on=all"
    )


def _by_placeholder(text: str, example: Conversation, tokenizer: PreTrainedTokenizerBase, at: int) -> Span | None:
    """Render with a placeholder instead of the turn: what is around it is the template's own, the rest is the turn's.

    Right also where a template rewrites earlier turns (drops their thinking).
    """
    rendered = _with_placeholder(example, tokenizer, at)
    if rendered is None:
        return None
    head, tail = rendered
    start, end = _start_of_turn(text, head, example, tokenizer, at), len(text) - len(tail)
    if start is None or not text.endswith(tail) or start > end:
        return None
    return start, _end_of_turn(text, end, tokenizer)


def _with_placeholder(example: Conversation, tokenizer: PreTrainedTokenizerBase, at: int) -> tuple[str, str] | None:
    """What the template writes before and after a turn; None if it looks into the turn, e.g. for tool calls."""
    messages = list(example.messages)
    messages[at] = {"role": messages[at]["role"], "content": _PLACEHOLDER}
    try:
        head, *tail = render(tokenizer, messages, example.tools).split(_PLACEHOLDER)
    except Exception:  # a template is a program, and fails in all ways that a program can
        return None
    return (head, tail[0]) if len(tail) == 1 else None


def _start_of_turn(
    text: str, head: str, example: Conversation, tokenizer: PreTrainedTokenizerBase, at: int
) -> int | None:
    """A turn begins after the generation prompt; an empty thinking block that the template adds is not the turn's."""
    answers = example.messages[at]["role"] == "assistant"
    start = _end_of_prompt(head, generation_prompt(tokenizer, example.tools)) if answers else len(head)
    if not text.startswith(head[:start]):
        return None
    added = head[start:]
    return start + len(added) if _EMPTY_THINKING.fullmatch(added) and text.startswith(added, start) else start


def _end_of_prompt(head: str, prompt: str) -> int:
    """Where the generation prompt, or as much of it as is there, ends in the template's text before a turn.

    Without one, before the space that joins header and answer: it is part of the answer's first token.
    """
    if prompt and prompt in head:
        return head.rfind(prompt) + len(prompt)
    if any(head.endswith(prompt[:length]) for length in range(1, len(prompt))):
        return len(head)
    return len(head.rstrip())


def _by_cutting(text: str, example: Conversation, tokenizer: PreTrainedTokenizerBase, at: int) -> Span | None:
    """The turn's end from the conversation that ends with it, its start from the same with a placeholder."""
    cut = replace(example, messages=example.messages[: at + 1])
    end = len(render(tokenizer, cut.messages, cut.tools).rstrip())
    rendered = _with_placeholder(cut, tokenizer, at)
    if rendered is None or not text.startswith(render(tokenizer, cut.messages, cut.tools)[:end]):
        return None
    start = _start_of_turn(text, rendered[0], cut, tokenizer, at)
    return (start, end) if start is not None and start <= end else None


def _by_prefixes(text: str, example: Conversation, tokenizer: PreTrainedTokenizerBase, at: int) -> Span | None:
    """Incremental rendering: a turn is what its message adds after the generation prompt."""
    answers = example.messages[at]["role"] == "assistant"
    before = render(tokenizer, example.messages[:at], example.tools, add_generation_prompt=answers) if at else ""
    after = render(tokenizer, example.messages[: at + 1], example.tools).rstrip()
    return (len(before), len(after)) if after.startswith(before) and text.startswith(after) else None


@functools.lru_cache(maxsize=4)
def _generation_prompt(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    asked: Any = [{"role": "user", "content": "x"}]
    try:
        without, whole = (
            str(tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False, add_generation_prompt=add))
            for add in (False, True)
        )
    except Exception:  # a template that wants more than one user message; turns are then cut by their own text
        return ""
    return whole[len(os.path.commonprefix([without, whole])) :]  # noqa: RUF071  # of characters


def generation_prompt(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """What the template writes to make the model answer, e.g. `<|im_start|>assistant\\n`; empty if nothing."""
    return _generation_prompt(tokenizer, tokenizer.get_chat_template(tools=tools))


def _end_of_turn(text: str, end: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """`end`, moved behind the special token that follows the turn: untrained, the model would never stop."""
    after_space = end + len(text[end : end + 8]) - len(text[end : end + 8].lstrip())
    token = _special_tokens(tokenizer).match(text, after_space)
    return token.end() if token else end


@functools.lru_cache(maxsize=4)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {tokenizer.eos_token} if tokenizer.eos_token else set()
    special -= {tokenizer.bos_token} - {tokenizer.eos_token}
    return re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or r"(?!)")


@functools.lru_cache(maxsize=4)
def _tokens_that_strip(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Ids of added tokens that take the space after them, with the lengths of their own texts."""
    return {number: len(str(token)) for number, token in tokenizer.added_tokens_decoder.items() if token.rstrip}


def _tokens_at_clean_borders(encoded: Any, spans: Sequence[Span], text_length: int) -> list[bool] | None:
    """As `tokens_in_spans`, in a tenth of its time, where tokens begin and end just where the spans do; else None."""
    count = len(encoded.ids)
    trained = [False] * count
    for start, end in spans:
        first = encoded.char_to_token(start)
        last = count if end == text_length else encoded.char_to_token(end)
        if first is None or last is None or first >= last or encoded.token_to_chars(first)[0] != start:
            return None
        if first and not _ends_before(encoded.token_to_chars(first - 1), start):
            return None
        if not _ends_before(encoded.token_to_chars(last - 1), end):
            return None
        if last < count and encoded.token_to_chars(last)[0] != end:
            return None
        trained[first:last] = [True] * (last - first)
    return trained


def _ends_before(chars: Span, border: int) -> bool:
    return chars[0] < chars[1] <= border


def tokens_in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens lie in a span. A token belongs to where it begins, unless it reaches over the end of its span."""
    starts, ends = numpy.array(offsets, numpy.int64).reshape(-1, 2).T
    # Offsets of some tokenizers leave spaces out: a token of spaces is empty, at its end.
    reached = numpy.concatenate([[0], numpy.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
    begins = numpy.where(starts < ends, starts, reached)
    trained = [False] * len(begins)
    for start, end in spans:
        first, last = numpy.searchsorted(begins, (start, end)).tolist()
        while last > first and ends[last - 1] > end:
            last -= 1
        trained[first:last] = [True] * (last - first)
    return trained
