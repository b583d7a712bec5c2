"""Conversations and texts → token ids, and which of them carry loss."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from fullft.data.formats import BadRow, Conversation, Text


@dataclass(frozen=True)
class Tokens:
    """`ids` and `trained` have equal length; `trained[i]` says whether token i is a target of the loss."""

    ids: list[int]
    trained: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(example: Conversation | Text, tokenizer: PreTrainedTokenizerBase, train_on: str) -> Tokens:
    """Token ids and loss mask of one row. The first token is never trained: nothing predicts it.

    Raises:
        BadRow: the chat template refuses the row, or its assistant turns cannot be told from the rest.
    """
    tokens = _text(example, tokenizer) if isinstance(example, Text) else _conversation(example, tokenizer, train_on)
    return Tokens(tokens.ids, [False, *tokens.trained[1:]])


def _text(example: Text, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    prompt = [*beginning(tokenizer), *encode(tokenizer, example.prompt)]
    text = encode(tokenizer, example.text)
    if tokenizer.eos_token_id is not None:
        text = [*text, tokenizer.eos_token_id]  # else the model never learns to stop
    return Tokens(prompt + text, [False] * len(prompt) + [True] * len(text))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text, without any special token added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


@functools.lru_cache(maxsize=4)
def beginning(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before plain text: the BOS token, or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return tuple(first) if first == [tokenizer.bos_token_id] else ()


def _conversation(example: Conversation, tokenizer: PreTrainedTokenizerBase, train_on: str) -> Tokens:
    try:
        if train_on == "all":
            encoded = _encode_rendered(tokenizer, render(tokenizer, example.messages, example.tools))
            return Tokens(encoded["input_ids"], [True] * len(encoded["input_ids"]))
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template())
        if marked and not example.prompt_messages:
            return _by_generation_marks(example, tokenizer)
        return _by_incremental_rendering(example, tokenizer)
    except jinja2.TemplateError as error:
        raise BadRow(f"the chat template refuses it: {error}") from None


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


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    # Templates write the BOS token themselves: add_special_tokens would double it.
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)


def _by_generation_marks(example: Conversation, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    encoded: Any = tokenizer.apply_chat_template(
        example.messages, tools=example.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    trained = [bool(token) for token in encoded["assistant_masks"]]
    return Tokens(encoded["input_ids"], _with_end_of_turn(encoded["input_ids"], trained, tokenizer))


def _with_end_of_turn(ids: list[int], trained: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Train the end-of-turn token also where the template closes its mark before it: else the model never stops.

    It is the EOS token, or the special token that ends a conversation whose last words are the assistant's.
    """
    ends = {tokenizer.eos_token_id}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    tail = ids[max((at for at, token in enumerate(trained) if token), default=len(ids)) + 1 :]
    if tail and tail[0] in special and not special.intersection(tail[1:]):
        ends.add(tail[0])
    return [token or (at > 0 and trained[at - 1] and ids[at] in ends) for at, token in enumerate(trained)]


def _by_incremental_rendering(example: Conversation, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The assistant's part is what its message adds after the generation prompt, up to its end-of-turn token."""
    whole = render(tokenizer, example.messages, example.tools)
    spans = []
    for position, message in enumerate(example.messages):
        if message["role"] != "assistant" or position < example.prompt_messages:
            continue
        before = render(tokenizer, example.messages[:position], example.tools, add_generation_prompt=True)
        after = render(tokenizer, example.messages[: position + 1], example.tools).rstrip()
        if not (after.startswith(before) and whole.startswith(after)):
            raise BadRow(
                f"message {position + 1} is rendered differently by the chat template when later messages follow, so "
                "its tokens cannot be told apart; use a template with {% generation %} marks, or data.train_on=all"
            )
        spans.append((len(before), len(after)))
    encoded = _encode_rendered(tokenizer, whole)
    trained = []
    reached = 0
    for start, end in encoded["offset_mapping"]:
        # Offsets of some tokenizers leave spaces out: a token of spaces is empty, at its end.
        begin = start if start < end else reached
        trained.append(any(first <= begin < end <= last for first, last in spans))
        reached = max(reached, end)
    return Tokens(encoded["input_ids"], trained)
