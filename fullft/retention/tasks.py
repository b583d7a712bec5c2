"""The tasks of a recipe as items to measure, tokenized once, so that every evaluation sees the same ones."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from transformers import PreTrainedTokenizerBase

from fullft.data.formats import BadRow, Conversation, Text, parse_row
from fullft.data.prepare import require_chat_template, row_tokens
from fullft.data.sources import Row, read_rows
from fullft.data.tokens import beginning, encode, render
from fullft.errors import BadInput
from fullft.loss import IGNORE
from fullft.recipe import Recipe, Source, Task

VALIDATION = "validation"  # the task that data.validation makes
_SHOWN = 5  # bad rows shown by name


@dataclass(frozen=True)
class Item:
    """One thing to measure; `key` (a hash of its row) identifies it across evaluations and runs."""

    key: str
    windows: list[tuple[list[int], list[int]]] = field(default_factory=list)  # text: (input ids, labels)
    text_bytes: int = 0  # text: UTF-8 bytes that the labels spell; 0 for chats
    prompt: list[int] = field(default_factory=list)  # generate: ids up to where the answer begins
    reference: str = ""  # generate: the right answer
    cluster: str | None = None  # items with the same one are not independent; None: alone


@dataclass(frozen=True)
class Prepared:
    """A task with its items."""

    name: str
    kind: Literal["text", "multiple_choice", "generate", "value"]
    measures: Literal["retention", "skill"]
    items: list[Item]
    metric: str
    higher_is_better: bool
    chance: float | None = None  # score of a model that knows nothing, where the items do not tell it
    max_drop: float | None = None  # of the gate; None: that of the recipe's gate
    answer_pattern: str | None = None
    max_new_tokens: int = 0


def prepare_tasks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Prepared]:
    """`data.validation` and all of `retention.tasks`.

    Raises:
        BadInput: rows or whole tasks that cannot be used, all of them named.
    """
    data, problems, prepared = recipe.data, list[str](), list[Prepared]()
    as_text = partial(text_item, tokenizer=tokenizer, train_on=data.train_on, width=data.sequence_length)
    if data.validation:
        items = _items(VALIDATION, data.validation, as_text, data.on_bad_row, problems)
        prepared.append(Prepared(VALIDATION, "text", "skill", items, *_text_metric(items)))
    for task in recipe.retention.tasks:
        as_prompt = partial(generate_item, tokenizer=tokenizer, task=task)
        make = as_text if task.kind == "text" else as_prompt
        items = _items(task.name, [task.data] if task.data else [], make, data.on_bad_row, problems)
        kind: Literal["text", "generate"] = "text" if task.kind == "text" else "generate"
        metric, higher = _text_metric(items) if kind == "text" else ("exact_match", True)
        prepared.append(
            Prepared(
                task.name, kind, task.measures, items, metric, higher, max_drop=task.max_drop,
                answer_pattern=task.answer_pattern, max_new_tokens=task.max_new_tokens,
            )
        )  # fmt: skip
    if problems:
        raise BadInput(problems)
    return prepared


def _text_metric(items: Sequence[Item]) -> tuple[str, bool]:
    """(metric, whether higher is better): chats have no bytes to divide by."""
    return ("bits_per_byte" if all(item.text_bytes for item in items) else "loss"), False


def _items(
    name: str, sources: Sequence[Source], make: Callable[[Row, Source], Item], on_bad_row: str, problems: list[str]
) -> list[Item]:
    items: list[Item] = []
    bad: list[str] = []
    try:
        for source in sources:
            for row in read_rows(source):
                try:
                    items.append(make(row, source))
                except BadRow as error:
                    bad.append(f"task {name}: {row.where}: {error}")
    except BadInput as error:
        problems += [f"task {name}: {problem}" for problem in error.problems]
        return []
    if bad and (on_bad_row == "error" or not items):
        advice = "mend them, or leave them out with data.on_bad_row=skip"
        problems += [f"task {name}: {len(bad)} of {len(bad) + len(items)} rows cannot be used; {advice}", *bad[:_SHOWN]]
    elif not items:
        problems.append(f"task {name}: has no rows")
    return items


def text_item(row: Row, source: Source, tokenizer: PreTrainedTokenizerBase, train_on: str, width: int) -> Item:
    """A text, every token of it scored, or a chat, its trained tokens scored.

    Raises:
        BadRow: it cannot be read, or has no token to score.
    """
    example, tokens = row_tokens(row, source, tokenizer, train_on)
    if not isinstance(example, Text) or example.prompt:
        return Item(_key(row), rolling_windows(tokens.ids, tokens.trained, width))
    # As lm-evaluation-harness does: the first token is predicted from BOS (or EOS), and no end token is scored.
    start = beginning(tokenizer) or (tokenizer.eos_token_id,)
    ids = [token for token in start if token is not None] + encode(tokenizer, example.text)
    trained = [False] + [True] * (len(ids) - 1)
    return Item(_key(row), rolling_windows(ids, trained, width), len(example.text.encode()))


def generate_item(row: Row, source: Source, tokenizer: PreTrainedTokenizerBase, task: Task) -> Item:
    """A prompt to answer: a chat up to its last assistant turn, or the prompt of prompt + completion.

    Raises:
        BadRow: it cannot be read, or has no answer to compare with.
    """
    if row.value is None:
        raise BadRow(row.problem)
    example = parse_row(row.value, source)
    if isinstance(example, Conversation):
        *before, last = example.messages
        if last["role"] != "assistant" or not isinstance(last.get("content"), str):
            raise BadRow("its last message is not an assistant's text to compare with")
        require_chat_template(tokenizer, row)
        prompt = encode(tokenizer, render(tokenizer, before, example.tools, add_generation_prompt=True))
        item = Item(_key(row), prompt=prompt, reference=last["content"])
    elif isinstance(example, Text) and example.prompt:
        prompt = [*beginning(tokenizer), *encode(tokenizer, example.prompt)]
        item = Item(_key(row), prompt=prompt, reference=example.text)
    else:
        raise BadRow("is plain text or token ids: there is no prompt to answer")
    if answer(item.reference, task.answer_pattern) is None:
        raise BadRow(f"answer_pattern {task.answer_pattern!r} is not in its reference answer")
    return item


def answer(text: str, pattern: str | None) -> str | None:
    """The part of a text that is compared: all of it, or the last match of the pattern; None if there is no match."""
    if pattern is None:
        return text.strip()
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    return str(found[-1].group(1 if found[-1].re.groups else 0)).strip()


def rolling_windows(ids: list[int], trained: list[bool], width: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels, at most `width` long, in which every trained token is a label exactly once.

    The last window is filled up with context from the left (as lm-evaluation-harness does).
    """
    windows = []
    count = len(ids) - 1  # predictions
    for start in range(0, count, width):
        end = min(start + width, count)
        first = max(0, end - width)
        labels = [ids[i + 1] if i >= start and trained[i + 1] else IGNORE for i in range(first, end)]
        if any(label != IGNORE for label in labels):
            windows.append((ids[first:end], labels))
    return windows


def _key(row: Row) -> str:
    return hashlib.sha256(json.dumps(row.value, sort_keys=True, default=str).encode()).hexdigest()[:16]
