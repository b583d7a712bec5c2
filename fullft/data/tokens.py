"""Conversations and texts → token ids, and which of them carry loss."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fullft.data.formats import BadRow, Conversation, Pretokenized, Text

Span = tuple[int, int]  # characters of a rendered conversation


@dataclass(frozen=True)
class Tokens:
    """`ids` and `trained` have equal length; `trained[i]` says whether token i is a target of the loss."""

    ids: list[int]
    trained: list[bool]

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
    return Tokens(tokens.ids, [False, *tokens.trained[1:]])


def _text(example: Text, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    prompt = [*beginning(tokenizer), *encode(tokenizer, example.prompt)]
    text = encode(tokenizer, example.text)
    if tokenizer.eos_token_id is not None:
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
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


@functools.lru_cache(maxsize=4)
def beginning(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before plain text: the BOS token, or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return tuple(first) if first == [tokenizer.bos_token_id] else ()


# Conversations: rendered once by the chat template; the trained turns are spans of that text


def _conversation(example: Conversation, tokenizer: PreTrainedTokenizerBase, train_on: str) -> Tokens:
    turns = trained_turns(example, train_on)
    try:
        text, spans = _rendered_with_spans(example, tokenizer, turns, train_on)
    except jinja2.TemplateError as error:
        raise BadRow(f"the chat template refuses it: {error}") from None
    for at in turns:
        _require_written(example.messages[at], at + 1, text)
    # Templates write the BOS token themselves: add_special_tokens would double it.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Tokens(encoded["input_ids"], tokens_in_spans(encoded["offset_mapping"], spans))


def _require_written(message: dict[str, Any], position: int, text: str) -> None:
    """A template without tools leaves calls out without a word, and the model would learn to say nothing."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or []]
    if lost := [call.get("name") for call in calls if str(call.get("name")) not in text]:
        raise BadRow(f"message {position} calls the tool {lost[0]!r}, which the chat template does not write")
    if message["role"] == "assistant" and not calls and not str(message.get("content") or "").strip():
        raise BadRow(f"message {position} is an empty answer")


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
    if train_on == "all" and len(turns) == len(example.messages):
        text = render(tokenizer, example.messages, example.tools)
        return text, [(0, len(text))]
    all_answers = [at for at, message in enumerate(example.messages) if message["role"] == "assistant"]
    if turns == all_answers and _has_marks(tokenizer.get_chat_template(tools=example.tools)):
        text, spans = _render_with_marks(tokenizer, example)
        special = _special_tokens(tokenizer)
        closed = [special.findall(text[start:end][-64:])[-1:] for start, end in spans]
        return text, [
            (start, end if last and text.endswith(last[0], start, end) else _end_of_turn(text, end, tokenizer))
            for (start, end), last in zip(spans, closed, strict=True)
        ]
    if not turns:
        raise BadRow("no message of it is to be trained")
    text = render(tokenizer, example.messages, example.tools)
    return text, _spans_by_placeholders(text, example, tokenizer, turns) or _spans_by_prefixes(
        text, example, tokenizer, turns
    )


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


def _has_marks(template: str) -> bool:
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))


def _render_with_marks(tokenizer: PreTrainedTokenizerBase, example: Conversation) -> tuple[str, list[Span]]:
    """By the template's {% generation %} marks; what `apply_chat_template` does before it tokenizes."""
    rendered, spans = render_jinja_template(
        [example.messages], tools=example.tools, chat_template=tokenizer.get_chat_template(tools=example.tools),
        return_assistant_tokens_mask=True, **tokenizer.special_tokens_map,
    )  # fmt: skip
    return rendered[0], list(spans[0])


_PLACEHOLDER = "\ue000{}\ue001"  # of a private-use area, so not in anyone's text
_EMPTY_THINKING = re.compile(r"\s*(<(\w+)>\s*)?</(think|thinking|thought|reasoning|reason)>\s*")


def _spans_by_placeholders(
    text: str, example: Conversation, tokenizer: PreTrainedTokenizerBase, turns: Sequence[int]
) -> list[Span] | None:
    """Render again with a placeholder for each turn: what is between them is the template's own, the rest is theirs.

    Right also where a template rewrites earlier turns (drops their thinking). A turn begins after the generation
    prompt; an empty thinking block that the template adds is not the turn's. None if it cannot be told for certain.
    """
    messages = list(example.messages)
    for number, at in enumerate(turns):
        messages[at] = {"role": messages[at]["role"], "content": _PLACEHOLDER.format(number)}
    try:
        fixed = re.split("\ue000(\\d+)\ue001", render(tokenizer, messages, example.tools))
    except Exception:  # the template looks into the turn, e.g. for tool calls
        return None
    if fixed[1::2] != [str(number) for number in range(len(turns))]:
        return None
    *heads, tail = fixed[::2]
    starts: list[int] = []
    ends: list[int] = []
    at = 0
    for number, (head, turn) in enumerate(zip(heads, turns, strict=True)):
        prompt = generation_prompt(tokenizer) if example.messages[turn]["role"] == "assistant" else head
        own, added = _split_after(head, prompt)
        found = text.find(own, at)
        if found < 0 or text.find(own, found + 1) >= 0 or (number == 0 and found > 0):
            return None
        ends += [found] if number else []
        at = found + len(own)
        if _EMPTY_THINKING.fullmatch(added) and text.startswith(added, at):
            at += len(added)
        starts.append(at)
    ends.append(len(text) - len(tail))
    if not text.endswith(tail) or any(end < start for start, end in zip(starts, ends, strict=True)):
        return None
    return [(start, _end_of_turn(text, end, tokenizer)) for start, end in zip(starts, ends, strict=True)]


def _split_after(head: str, prompt: str) -> tuple[str, str]:
    """A template's text before a turn, cut after the generation prompt in it; else before the space that joins them."""
    cut = head.rfind(prompt) + len(prompt) if prompt and prompt in head else len(head.rstrip())
    return head[:cut], head[cut:]


def _spans_by_prefixes(
    text: str, example: Conversation, tokenizer: PreTrainedTokenizerBase, turns: Sequence[int]
) -> list[Span]:
    """Incremental rendering: a turn is what its message adds after the generation prompt.

    Raises:
        BadRow: the template renders a turn differently when later messages follow.
    """
    spans = []
    for at in turns:
        answers = example.messages[at]["role"] == "assistant"
        before = render(tokenizer, example.messages[:at], example.tools, add_generation_prompt=answers) if at else ""
        after = render(tokenizer, example.messages[: at + 1], example.tools).rstrip()
        if not (after.startswith(before) and text.startswith(after)):
            raise BadRow(
                f"message {at + 1} is rendered differently by the chat template when later messages follow, so its "
                "tokens cannot be told apart; use a template with {% generation %} marks, or data.train_on=all"
            )
        spans.append((len(before), len(after)))
    return spans


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
    return whole.removeprefix(without) if whole.startswith(without) else ""


def generation_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes to make the model answer, e.g. `<|im_start|>assistant\\n`; empty if nothing."""
    return _generation_prompt(tokenizer, tokenizer.get_chat_template())


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


def tokens_in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens lie in a span. A token belongs to where it begins, unless it reaches over the end of its span."""
    begins = []
    reached = 0
    for start, end in offsets:
        # Offsets of some tokenizers leave spaces out: a token of spaces is empty, at its end.
        begins.append(start if start < end else reached)
        reached = max(reached, end)
    trained = [False] * len(begins)
    for start, end in spans:
        first, last = bisect.bisect_left(begins, start), bisect.bisect_left(begins, end)
        while last > first and offsets[last - 1][1] > end:
            last -= 1
        trained[first:last] = [True] * (last - first)
    return trained
