"""Rows of data sets, in the shapes they are found in, made into `Conversation`, `Text` or `Pretokenized`.

messages            {"messages": [{"role": ..., "content": ...}, ...]}, as OpenAI's: tool calls, content in parts
sharegpt            {"conversations": [{"from": "human" | "gpt" | ..., "value": ...}, ...], "system": ... (optional)}
prompt_completion   {"prompt": ..., "completion": ...}: two message lists, or two strings used as they are (no template)
alpaca              {"instruction": ..., "input": ... (optional), "output": ..., "system": ... (optional)}
text                {"text": ...}
multiple_choice     {"question" | "context" | "ctx" | "messages": ..., "choices" | "endings": [...],
                    "answer" | "answerKey" | "label": ...}
tokens              {"input_ids": [...], "labels": [...] (optional, -100 where there is no loss)}, and 0/1 masks if any

Chats may come with `tools` (a list of JSON schemas, or its JSON text). A message is trained or not by its `weight`,
`loss_weight`, `train`, `training` or `trainable` (0 or 1, false or true) where it has one.
"""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass, field
from typing import Any

from fullft.recipe import Source


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    prompt_messages: int = 0  # that many first messages are context, their assistant turns are not trained
    flags: dict[int, bool] = field(default_factory=dict)  # position of a message: trained or not, where the row says so


@dataclass(frozen=True)
class Text:
    """Text without roles: loss on all of it, or on what follows `prompt`."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Pretokenized:
    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Choices:
    """A question to be answered by one of its choices: as text that each choice goes on, or as a chat."""

    context: str | list[dict[str, Any]]
    choices: list[str]
    gold: int  # the right one

    @property
    def solved(self) -> Conversation | Text:
        """With the right answer, as what could be trained on."""
        if isinstance(self.context, str):
            return Text(f" {self.choices[self.gold]}", self.context)
        return Conversation([*self.context, {"role": "assistant", "content": self.choices[self.gold]}])


class BadRow(ValueError):
    """This row cannot be trained on; the text says why."""


_ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "tokens": ("input_ids",),
    "text": ("text",),
}
# ShareGPT's names, and what others call the same.
_ROLE_OF = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles
_OPTIONAL = ("tools", "input", "system", "labels")
_CONTEXTS, _CHOICES = ("context", "ctx", "query", "question", "messages"), ("choices", "endings")
_ANSWERS = ("answer", "answerKey", "label", "gold")
_FLAGS = ("weight", "loss_weight", "train", "training", "trainable")
_IGNORED = -100


def used_fields(source: Source) -> set[str]:
    """Columns that `parse_row` may look at."""
    if source.format == "multiple_choice":
        return {*_CONTEXTS, *_CHOICES, *_ANSWERS, *source.fields.values()}
    kinds = _FIELDS if source.format == "auto" else [source.format]
    return {
        *(name for kind in kinds for name in _FIELDS[kind]), *_OPTIONAL, "history", *_MASKS, *source.fields.values()
    }  # fmt: skip


def parse_row(value: dict[str, Any], source: Source) -> Conversation | Text | Pretokenized:
    """One row as what is trained on.

    Raises:
        BadRow: fields missing or of the wrong kind, or roles out of order.
    """
    value = _mapped(value, source)
    if source.format == "multiple_choice":
        return _choices(value).solved
    kind = source.format if source.format != "auto" else _detect(value)
    if absent := [name for name in _FIELDS[kind] if value.get(name) is None]:
        raise BadRow(f"has no {_names(absent)} (fields: {_names(value)}); name the columns in `fields`")
    match kind:
        case "messages":
            return _conversation(value["messages"], value)
        case "sharegpt":
            return _conversation(_from_sharegpt(value["conversations"], value.get("system")), value)
        case "prompt_completion":
            return _prompt_completion(value)
        case "alpaca":
            return _alpaca(value)
        case "tokens":
            return _pretokenized(value)
        case _:
            if not isinstance(value["text"], str) or not value["text"]:
                raise BadRow("field 'text' is not a text or is empty")
            return Text(value["text"])


def parse_choices(value: dict[str, Any], source: Source) -> Choices:
    """One row of a multiple-choice set.

    Raises:
        BadRow: fields missing or of the wrong kind, or no choice is the answer.
    """
    return _choices(_mapped(value, source))


def _mapped(value: dict[str, Any], source: Source) -> dict[str, Any]:
    """The row with its columns under our names, as `fields` maps them."""
    mapped = {ours: value[theirs] for ours, theirs in source.fields.items() if theirs in value}
    if absent := [theirs for ours, theirs in source.fields.items() if ours not in mapped and ours not in _OPTIONAL]:
        raise BadRow(f"has no {_names(absent)}, which `fields` names (fields: {_names(value)})")
    # A column that is mapped stands no longer under its own name; a passage may be both context and cluster.
    renamed = {theirs for ours, theirs in source.fields.items() if ours != "cluster"}
    return {name: inner for name, inner in value.items() if name not in renamed} | mapped


def _detect(value: dict[str, Any]) -> str:
    for kind, names in _FIELDS.items():
        if all(value.get(name) is not None for name in names):
            return kind
    raise BadRow(
        f"has fields {_names(value)}; expected messages, conversations, prompt + completion, instruction + output, "
        "input_ids, or text (other names: map them with `fields`)"
    )


def _names(values: Any) -> str:
    return ", ".join(f"'{value}'" for value in values) or "none"


def _prompt_completion(value: dict[str, Any]) -> Conversation | Text:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise BadRow("field 'completion' is empty")
        return Text(completion, prompt)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(prompt + completion, value, prompt_messages=len(prompt))
    raise BadRow("fields 'prompt' and 'completion' must be two texts or two lists of messages")


def _alpaca(value: dict[str, Any]) -> Conversation:
    given = {name: value.get(name) for name in ("system", "instruction", "input", "output")}
    texts = {name: "" if text is None else text for name, text in given.items()}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise BadRow(f"{_names(wrong)} must be text")
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    messages = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    for turn in value.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow("field 'history' is not a list of pairs of question and answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": texts["output"]}]
    return _conversation(messages, value)


_MASKS = ("completion_mask", "assistant_masks", "loss_mask", "attention_mask")


def _pretokenized(value: dict[str, Any]) -> Pretokenized:
    """Labels and masks, as TRL and others write them, all narrow what is trained; padding is cut off."""
    ids = value["input_ids"]
    labels = ids if value.get("labels") is None else value["labels"]
    for name, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            raise BadRow(f"field '{name}' is not a list of whole numbers")
    if len(ids) != len(labels):
        raise BadRow(f"has {len(ids)} input_ids and {len(labels)} labels")
    pairs = enumerate(zip(ids, labels, strict=True))
    if wrong := [at for at, (token, label) in pairs if label not in (token, _IGNORED)]:
        raise BadRow(
            f"label {wrong[0]} is neither its input id nor {_IGNORED} (labels are not shifted; trainers shift them)"
        )
    trained = [label != _IGNORED for label in labels]
    masks = {name: value[name] for name in _MASKS if value.get(name) is not None}
    for name, mask in masks.items():
        if not isinstance(mask, list) or len(mask) != len(ids) or any(one not in (0, 1) for one in mask):
            raise BadRow(f"field '{name}' is not a list of {len(ids)} zeros and ones")
        trained = [both and bool(one) for both, one in zip(trained, mask, strict=True)]
    real = [bool(one) for one in masks.get("attention_mask", [1] * len(ids))]
    return Pretokenized(
        [token for token, keep in zip(ids, real, strict=True) if keep],
        [one for one, keep in zip(trained, real, strict=True) if keep],
    )


# Multiple choice


def _choices(value: dict[str, Any]) -> Choices:
    kinds = (("question or context", _CONTEXTS), ("choices", _CHOICES), ("answer", _ANSWERS))
    found = [next((name for name in names if value.get(name) not in (None, "")), "") for _, names in kinds]
    if absent := [f"{what} ({', '.join(names)})" for (what, names), name in zip(kinds, found, strict=True) if not name]:
        raise BadRow(f"has no {', no '.join(absent)} (fields: {_names(value)}); name the columns in `fields`")
    asked, given, answer = (value[name] for name in found)
    labels = list[Any]()
    if isinstance(given, dict):  # ARC: {"text": [...], "label": ["A", ...]}
        labels, given = given.get("label") or [], given.get("text")
    if not isinstance(given, list) or len(given) < 2 or not all(isinstance(one, str) and one for one in given):
        raise BadRow(f"field '{found[1]}' is not a list of two texts or more")
    if isinstance(asked, list):
        context: Any = [_message(message, position) for position, message in enumerate(asked, start=1)]
        if not context or context[-1]["role"] == "assistant":
            raise BadRow("its messages are none, or end with an answer; the choices are the answers")
    elif isinstance(asked, str):
        context = asked
        if question := value.get("question"):  # asked as lm-evaluation-harness asks those of ARC
            before = "" if found[0] == "question" else f"{asked}\n"
            context = f"{before}Question: {question}\nAnswer:"
    else:
        raise BadRow(f"field '{found[0]}' is neither text nor a list of messages")
    return Choices(context, given, _gold(answer, given, labels))


def _gold(answer: Any, choices: list[str], labels: list[Any]) -> int:
    """Position of the right choice, given as its label, its text, its letter or its number from 0."""
    for known in (labels, choices):
        if answer in known:
            return known.index(answer)
    text = str(answer).strip() if isinstance(answer, str) else ""
    if len(text) == 1 and text.isascii() and text.isalpha():
        answer = ord(text.upper()) - ord("A")
    elif text.isdecimal():  # HellaSwag writes its numbers as text
        answer = int(text)
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return int(answer)
    raise BadRow(
        f"its answer {reprlib.repr(answer)} is none of its {len(choices)} choices (their label, text, letter or number "
        "from 0)"
    )


# Chats


def _conversation(messages: Any, row: dict[str, Any], prompt_messages: int = 0) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise BadRow("the chat is not a list of messages, or is empty")
    plain = [_message(message, position) for position, message in enumerate(messages, start=1)]
    flags = {at: flag for at, message in enumerate(messages) if (flag := _flag(message, at + 1)) is not None}
    _require_order(plain)
    return Conversation(plain, _tools(row.get("tools")), prompt_messages, flags)


def _from_sharegpt(turns: Any, system: Any) -> list[dict[str, Any]]:
    """ShareGPT's turns as messages; some sets have `role` and `content` under the name `conversations`."""
    if not isinstance(turns, list) or not turns:
        raise BadRow("field 'conversations' is not a list of turns, or is empty")
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for position, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not ({"from", "role"} & turn.keys()):
            raise BadRow(f"turn {position} has neither 'from' nor 'role'")
        other = {key: value for key, value in turn.items() if key not in ("from", "value")}
        message = {"role": turn.get("from", turn.get("role")), "content": turn.get("value")} | other
        if message["role"] not in _CALLS:
            messages.append(message)
            continue
        calls = _calls(message["content"], f"turn {position} (function call)")
        if messages and _ROLE_OF.get(str(messages[-1]["role"]), messages[-1]["role"]) == "assistant":
            messages[-1].setdefault("tool_calls", []).extend(calls)  # says something and calls, or calls twice
        else:
            messages.append(message | {"role": "assistant", "content": "", "tool_calls": calls})
    return messages


def _calls(text: Any, what: str) -> list[dict[str, Any]]:
    """One call or a list of them, as JSON text or as objects."""
    if isinstance(text, str) and text.lstrip().startswith("["):
        try:
            text = json.loads(text)
        except ValueError as error:
            raise BadRow(f"{what} is not valid JSON: {error}") from None
    return [_json_object(call, what) for call in (text if isinstance(text, list) else [text])]


def _message(given: Any, position: int) -> dict[str, Any]:
    """A message as chat templates expect it: text content, tool calls with their arguments as objects."""
    if not isinstance(given, dict) or "role" not in given:
        raise BadRow(f"message {position} has no 'role'")
    message = {key: value for key, value in given.items() if key not in _FLAGS and value is not None}
    role = message["role"] = _ROLE_OF.get(str(given["role"]), given["role"])
    if isinstance(message.get("content"), list):
        message |= _joined(message["content"], position)
    if role in _CALLS:
        made = _calls(message.get("content"), f"message {position} (function call)")
        message |= {"role": "assistant", "content": "", "tool_calls": made}
    elif role not in _ROLES:
        raise BadRow(f"message {position} has role {reprlib.repr(role)}; roles are {', '.join(_ROLES)}")
    if "function_call" in message:  # OpenAI's first form of tool calls
        message["tool_calls"] = [*message.get("tool_calls", []), message.pop("function_call")]
    if message.get("content") is None and not message.get("tool_calls"):
        raise BadRow(f"message {position} ({role}) has no 'content'")
    if not isinstance(message.get("content"), str | None):
        kind = type(message["content"]).__name__
        raise BadRow(f"message {position} ({role}): 'content' is a {kind}; only text can be trained on")
    if calls := message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(calls, position)
    return message


def _joined(parts: list[Any], position: int) -> dict[str, Any]:
    """Content in parts as a template takes it: text, reasoning and tool calls each under their own key."""
    texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
    calls = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        names = ("text", "value", "thinking", "reasoning") if kind else ()
        text = next((part[name] for name in names if name in part), None)
        if kind in ("text", "output_text", "input_text") and isinstance(text, str):
            texts["content"].append(text)
        elif kind in ("reasoning", "thinking") and isinstance(text, str):
            texts["reasoning_content"].append(text)
        elif kind == "tool_call":
            calls.append(_json_object(text, f"message {position} (tool call)"))
        else:
            raise BadRow(
                f"message {position}: a part of its content is {reprlib.repr(kind or part)}; only text can be trained "
                "on"
            )
    joined: dict[str, Any] = {key: "".join(found) for key, found in texts.items() if found or key == "content"}
    return joined | ({"tool_calls": calls} if calls else {})


def _tool_calls(calls: Any, position: int) -> list[Any]:
    """OpenAI writes arguments as JSON text; chat templates turn objects into JSON and would quote a text twice."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(f"message {position}: 'tool_calls' is not a list of objects")
    found = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"message {position}: a tool call has no name")
        given = function.get("arguments")
        arguments = {} if given in (None, "") else _json_object(given, f"message {position} (arguments)")
        function = {"name": function["name"], "arguments": arguments}
        found.append({"type": "function"} | (call if "function" in call else {}) | {"function": function})
    return found


def _json_object(value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRow(f"{what} is not a JSON object")
    return value


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(f"field 'tools' is not valid JSON: {error}") from None
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("field 'tools' is not a list of objects")
    return tools


def _flag(message: dict[str, Any], position: int) -> bool | None:
    """Whether a message says that it is trained or not."""
    given = {name: message[name] for name in _FLAGS if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1):  # True and False are these too
            raise BadRow(f"message {position} has {name} {reprlib.repr(value)}; 0 and 1 are supported")
    if len({bool(value) for value in given.values()}) > 1:
        raise BadRow(f"message {position} is to be trained by one of {_names(given)}, and not by another")
    return bool(next(iter(given.values()))) if given else None


_BEFORE = {
    "system": ("the start",), "developer": ("the start",), "user": ("the start", "system", "developer", "assistant"),
    "assistant": ("user", "tool"), "tool": ("assistant", "tool"),
}  # fmt: skip


def _require_order(messages: list[dict[str, Any]]) -> None:
    """Roles in an order that a chat can have: system? then user (assistant|tool …) …"""
    before = "the start"
    for position, message in enumerate(messages, start=1):
        if before not in _BEFORE[message["role"]]:
            raise BadRow(f"wrong role order: message {position} is '{message['role']}' after {before}")
        before = message["role"]
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow("has no assistant message to train on")
