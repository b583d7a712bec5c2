"""Which keys of a DeepSpeed configuration DeepSpeed knows: it ignores most of those that it does not."""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError


def key_problems(config: dict[str, Any]) -> list[str]:
    """Each key (dotted) that the installed DeepSpeed does not ask for or does not allow, each value that it refuses.

    It reads the configuration itself, and what it looks at is written down: no list of its keys here could follow its
    versions. Sections that it takes as a whole, unchecked, are so here too.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": None}
    left = copy.deepcopy(config) | {"bf16": config.get("bf16") or {}} | sizes
    problems: list[str] = []
    while True:  # once more for each section that has unknown keys: reading ends at the first
        sections: list[tuple[str, ...]] = []
        read = _Read(left, sections)
        try:
            with _quiet():
                DeepSpeedConfig(read)
        except ValidationError as error:
            found = [(_place(item["loc"], left, sections), item) for item in error.errors()]
            unknown = [(place, item) for place, item in found if item["type"] == "extra_forbidden"]
            for place, item in unknown:
                problems.append(_unknown(place, _fields_of(error.title if len(item["loc"]) == 1 else None)))
            problems += [
                f"{'.'.join(place)}: {item['msg'].removeprefix('Value error, ')} (given: {item['input']!r})"
                for place, item in found
                if item["type"] != "extra_forbidden"
            ]
            if len(unknown) < len(found):
                return problems
            for place, _ in unknown:
                if place[-1] not in (section := _section(left, place[:-1])):
                    return problems  # not where it was looked for: else this would not end
                del section[place[-1]]
            continue
        except (DeepSpeedConfigError, ValueError, TypeError, AttributeError) as error:
            return [*problems, f"is refused by DeepSpeed: {error}"]
        except AssertionError:  # what this machine lacks, as a login node may; told when the engine starts
            return problems
        return problems + [_unknown(place, names) for place, names in read.unread()]


class _Read(dict[str, Any]):
    """A section that writes down which of its keys are looked at."""

    def __init__(self, section: dict[str, Any], sections: list[tuple[str, ...]], place: tuple[str, ...] = ()) -> None:
        super().__init__(
            (key, _Read(value, sections, (*place, key)) if isinstance(value, dict) else value)
            for key, value in section.items()
        )
        self._keys, self._asked, self._place, self._sections = list(section), set[str](), place, sections
        self._whole = False

    def unread(self) -> Iterator[tuple[tuple[str, ...], set[str]]]:
        """The places of the keys that nobody has looked at, each with those that somebody has, there or not.

        None of a section that was taken as a whole, or handed on to what does not look by these methods (pydantic).
        """
        if self._whole or not self._asked:
            return
        for key in self._keys:
            value = dict.get(self, key)
            if key not in self._asked:
                yield (*self._place, key), self._asked
            elif isinstance(value, _Read):
                yield from value.unread()

    def _take_whole(self) -> None:
        self._whole = True
        self._sections.append(self._place)

    def __contains__(self, key: object) -> bool:
        self._asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self._take_whole()
        return super().__iter__()

    def keys(self) -> Any:
        return self  # for `key in section.keys()`; to go through them is to iterate, as above

    def items(self) -> Any:
        self._take_whole()
        return super().items()

    def __copy__(self) -> _Read:
        if self._place:
            self._take_whole()
        return self

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        self._take_whole()
        return {key: copy.deepcopy(value, memo) for key, value in super().items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DeepSpeed's remarks, which come again when the engine starts."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _place(loc: tuple[int | str, ...], config: dict[str, Any], sections: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Where in the file an error of a section is: below the last section that was taken as a whole, or below none."""
    inner = tuple(str(part) for part in loc)
    last = (*sections[-1], *inner) if sections else inner
    return last if inner and last[-1] in _section(config, last[:-1]) else inner


def _section(config: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    for key in place:
        config = config.get(key) or {}
        if not isinstance(config, dict):
            return {}
    return config


def _fields_of(title: str | None) -> set[str]:
    """The keys of one of DeepSpeed's sections, by the name of its class; None: of all."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    classes: list[type[BaseModel]] = [DeepSpeedConfigModel]
    for one in classes:
        classes += one.__subclasses__()
    fields = [one.model_fields for one in classes if title in (None, one.__name__)]
    return {name for found in fields for key, field in found.items() for name in (field.alias or key,)}


def _unknown(place: tuple[str, ...], names: set[str]) -> str:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    key, text = place[-1], f"{'.'.join(place)}: DeepSpeed knows no such key"
    if len(place) == 1 and key in _fields_of(DeepSpeedZeroConfig.__name__):
        return f"{text} here; it belongs into zero_optimization"
    if near := difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.6):
        return f"{text}; did you mean {'.'.join((*place[:-1], near[0]))}?"
    return f"{text}; remove it"
