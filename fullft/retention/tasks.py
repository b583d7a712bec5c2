"""The tasks of a recipe as items to measure, tokenized once, so that every evaluation sees the same ones."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from fullft.data.formats import BadRow, Conversation, Text, parse_choices, parse_row
from fullft.data.prepare import require_chat_template, row_tokens
from fullft.data.sources import Row, read_rows
from fullft.data.tokens import beginning, encode, render
from fullft.errors import BadInput
from fullft.loss import IGNORE
from fullft.recipe import Recipe, Source, Task

VALIDATION = "validation"  # the task that data.validation makes
_SHOWN = 5  # bad rows shown by name


Pair = tuple[list[int], list[int]]  # ids of a context, ids of what follows it
Window = tuple[list[int], list[int]]  # input ids, labels


@dataclass(frozen=True)
class Prompt:
    """What is to be answered: ids up to where the answer begins, and where it ends."""

    ids: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()  # besides those of the model and the tokenizer
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One thing to measure; `key` (a hash of its row) identifies it across evaluations and runs."""

    key: str
    number: int = 0  # place in its task
    cluster: str | None = None  # items that belong together have the same
    windows: list[Window] = field(default_factory=list)  # text
    text_bytes: int = 0  # text: UTF-8 bytes that the labels spell; 0 for chats
    pairs: list[Pair] = field(default_factory=list)  # multiple choice: one for each choice
    choices: list[str] = field(default_factory=list)
    gold: int = 0  # multiple choice: the right one
    prompt: list[int] = field(default_factory=list)  # generate: ids up to where the answer begins
    stop_ids: tuple[int, ...] = ()  # generate: besides those of the model and the tokenizer
    stop_strings: tuple[str, ...] = ()
    reference: str = ""  # generate: the right answer


@dataclass(frozen=True)
class Prepared:
    """A task with its items.

    `metric` (of `score` in an evaluation) and `chance`, what guessing scores, are in its unit; `max_drop` too.
    """

    name: str
    kind: Literal["text", "multiple_choice", "generate", "value"]
    measures: Literal["retention", "skill"]
    items: list[Item]
    metric: str
    higher_is_better: bool
    max_drop: float | None = None
    chance: float | None = None
    answer_pattern: str | None = None
    max_new_tokens: int = 0
    harness: Any = None  # lm-evaluation-harness: its documents, by number of item


def prepare_tasks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Prepared]:
    """`data.validation` and all of `retention.tasks`.

    Raises:
        BadInput: rows or whole tasks that cannot be used, all of them named.
    """
    data, problems, prepared = recipe.data, list[str](), list[Prepared]()
    as_text = partial(text_item, tokenizer=tokenizer, train_on=data.train_on, width=data.sequence_length)
    if data.validation:
        items = _items(VALIDATION, data.validation, as_text, data.on_bad_row, problems)
        prepared.append(_text_task(VALIDATION, "skill", items))
    for task in recipe.retention.tasks:
        limit = recipe.retention.gate.max_drop if task.max_drop is None else task.max_drop
        if task.data is None:
            from fullft.retention.harness import prepare_harness

            try:
                prepared.append(prepare_harness(task, tokenizer, data.sequence_length, limit))
            except BadInput as error:
                problems += error.problems
            continue
        makers: dict[str, Callable[[Row, Source], Item]] = {
            "text": as_text,
            "multiple_choice": partial(choices_item, tokenizer=tokenizer),
            "generate": partial(generate_item, tokenizer=tokenizer, task=task),
        }
        make = makers[task.kind]
        items = _items(task.name, [task.data], make, data.on_bad_row, problems)
        match task.kind:
            case "text":
                prepared.append(_text_task(task.name, task.measures, items, limit))
            case "multiple_choice":
                chance = sum(1 / len(item.choices) for item in items) / max(1, len(items))
                prepared.append(
                    Prepared(
                        task.name, "multiple_choice", task.measures, items, task.metric or "acc", True, limit, chance
                    )
                )
            case _:
                prepared.append(
                    Prepared(
                        task.name, "generate", task.measures, items, "exact_match", True, limit,
                        answer_pattern=task.answer_pattern, max_new_tokens=task.max_new_tokens,
                    )
                )  # fmt: skip
    if problems:
        raise BadInput(problems)
    return prepared


def _text_task(
    name: str, measures: Literal["retention", "skill"], items: list[Item], max_drop: float | None = None
) -> Prepared:
    metric = "bits_per_byte" if all(item.text_bytes for item in items) else "loss"
    return Prepared(name, "text", measures, items, metric, False, max_drop)


def _items(
    name: str, sources: Sequence[Source], make: Callable[[Row, Source], Item], on_bad_row: str, problems: list[str]
) -> list[Item]:
    items: list[Item] = []
    bad: list[str] = []
    try:
        for source in sources:
            for row in read_rows(source):
                try:
                    cluster = _cluster(row, source)
                    items.append(replace(make(row, source), number=len(items), cluster=cluster))
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


def _cluster(row: Row, source: Source) -> str | None:
    column = source.fields.get("cluster")
    if column is None or row.value is None:
        return None
    if row.value.get(column) is None:
        raise BadRow(f"has no '{column}', which cluster_field names")
    return str(row.value[column])


def text_item(row: Row, source: Source, tokenizer: PreTrainedTokenizerBase, train_on: str, width: int) -> Item:
    """A text, every token of it scored, or a chat, its trained tokens scored.

    Raises:
        BadRow: it cannot be read, or has no token to score.
    """
    example, tokens = row_tokens(row, source, tokenizer, train_on)
    if not isinstance(example, Text) or example.prompt:
        return Item(_key(row), windows=rolling_windows(tokens.ids, tokens.trained, width))
    # As lm-evaluation-harness does: the first token is predicted from BOS (or EOS), and no end token is scored.
    start = beginning(tokenizer) or (tokenizer.eos_token_id,)
    ids = [token for token in start if token is not None] + encode(tokenizer, example.text)
    trained = [False] + [True] * (len(ids) - 1)
    return Item(_key(row), windows=rolling_windows(ids, trained, width), text_bytes=len(example.text.encode()))


def choices_item(row: Row, source: Source, tokenizer: PreTrainedTokenizerBase) -> Item:
    """A question with its choices, each of which may follow the same context.

    A text goes on with a space and the choice, as in lm-evaluation-harness; a chat is written by the chat template,
    and the choice is the assistant's turn.

    Raises:
        BadRow: it cannot be read, or no choice is its answer.
    """
    if row.value is None:
        raise BadRow(row.problem)
    asked = parse_choices(row.value, source)
    if isinstance(asked.context, str):
        context, delimiter = asked.context, "" if asked.context[-1:].isspace() else " "
    else:
        context, delimiter = _generation_prompt(row, asked.context, None, tokenizer), ""
    pairs = [encode_pair(tokenizer, context, delimiter + choice) for choice in asked.choices]
    if empty := [choice for choice, (_, ids) in zip(asked.choices, pairs, strict=True) if not ids]:
        raise BadRow(f"its choice {empty[0]!r} makes no token after its context")
    return Item(_key(row), pairs=pairs, choices=asked.choices, gold=asked.gold)


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Pair:
    """Ids of a context and of what follows it, cut where the context alone ends, as in lm-evaluation-harness.

    Spaces at the end of the context belong to the continuation. An empty context is the BOS token, else EOS.
    """
    if not context:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = encode(tokenizer, continuation)
        return ([first], ids) if ids[:1] != [first] else (ids[:1], ids[1:])
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    written = tokenizer.bos_token is not None and bare.startswith(tokenizer.bos_token)  # by a chat template
    start = [] if written else list(beginning(tokenizer))
    ids, before = start + encode(tokenizer, bare + continuation), start + encode(tokenizer, bare)
    return ids[: len(before)], ids[len(before) :]


def generate_item(row: Row, source: Source, tokenizer: PreTrainedTokenizerBase, task: Task) -> Item:
    """A prompt to answer: a chat up to its last assistant turn, or the prompt of prompt + completion.

    Raises:
        BadRow: it cannot be read, or has no answer to compare with, or the chat template cannot ask for one.
    """
    if row.value is None:
        raise BadRow(row.problem)
    example = parse_row(row.value, source)
    if isinstance(example, Conversation):
        *before, last = example.messages
        if last["role"] != "assistant" or not isinstance(last.get("content"), str):
            raise BadRow("its last message is not an assistant's text to compare with")
        prompt = encode(tokenizer, _generation_prompt(row, before, example.tools, tokenizer))
        stop_ids, stop_strings = end_of_turn(tokenizer)
        item = Item(_key(row), prompt=prompt, reference=last["content"], stop_ids=stop_ids, stop_strings=stop_strings)
    elif isinstance(example, Text) and example.prompt:
        prompt = [*beginning(tokenizer), *encode(tokenizer, example.prompt)]
        item = Item(_key(row), prompt=prompt, reference=example.text)
    else:
        raise BadRow("is plain text or token ids: there is no prompt to answer")
    if answer(item.reference, task.answer_pattern) is None:
        raise BadRow(f"answer_pattern {task.answer_pattern!r} is not in its reference answer")
    return item


_ANSWER = "Forty-two."  # no template has it, nor changes it


def _generation_prompt(
    row: Row, messages: list[dict[str, Any]], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The chat as text, up to where the assistant's answer begins.

    Raises:
        BadInput: the tokenizer has no chat template.
        BadRow: the template fails, leaves the last message out, or begins no answer.
    """
    require_chat_template(tokenizer, row)
    try:
        prompt, bare = (render(tokenizer, messages, tools, add_generation_prompt=begins) for begins in (True, False))
        answered = [*messages, {"role": "assistant", "content": _ANSWER}]
        whole = render(tokenizer, answered, tools) if prompt == bare else ""
    except Exception as error:  # a template is a program, and fails in all ways that a program can
        raise BadRow(f"the chat template fails on it: {type(error).__name__}: {error}") from None
    if (said := messages[-1].get("content")) and str(said).strip() not in prompt:
        raise BadRow(f"the chat template leaves its last message ({reprlib.repr(str(said))}) out of the prompt")
    if whole.startswith(bare) and (header := whole.removeprefix(bare).partition(_ANSWER)[0].strip()):
        raise BadRow(
            f"the chat template begins no answer: it ignores add_generation_prompt, and writes {header!r} before an "
            "answer; mend chat_template.jinja of the model"
        )
    return prompt


@functools.lru_cache(maxsize=4)
def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """What the chat template writes after an answer: (its first token,) if that is a special one, else (its text,)."""
    messages: Any = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
    try:
        after = render(tokenizer, messages, None).rpartition(_ANSWER)[2].strip()
    except Exception:  # a template that wants more; the model's own stops are left
        return (), ()
    ids = encode(tokenizer, after)
    known = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    if not ids:
        return (), ()
    return ((ids[0],), ()) if ids[0] in known else ((), (after.splitlines()[0],))


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
