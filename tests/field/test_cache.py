"""Complaint: tokens of another tokenizer, template or version are taken from a stale cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import chat, write_jsonl
from test_data import Prepare, batches, prepare, tokenizer  # noqa: F401

from fullft.data import cache


def test_another_version_of_the_library_that_tokenizes_is_another_cache_and_the_same_run(
    prepare: Prepare,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", [chat("1?", "one"), chat("2?", "two")]))
    before = batches(prepare(file), packing=True)
    installed = cache.version
    for count, library in enumerate(("tokenizers", "transformers", "jinja2"), start=2):
        other: dict[str, Any] = {library: "99.0"}
        monkeypatch.setattr(cache, "version", lambda name, other=other: other.get(name) or installed(name))
        after = batches(prepare(file), packing=True)
        assert len(prepare.prepared()) == count
        assert after.fingerprint == before.fingerprint  # a checkpoint is resumed: the tokens are as many as before
    monkeypatch.setattr(cache, "version", installed)
    prepare(file)
    assert len(prepare.prepared()) == count


@pytest.mark.parametrize("system", ["Be brief.", "Be brief!"])
def test_another_system_prompt_is_another_cache(prepare: Prepare, tmp_path: Path, system: str) -> None:  # noqa: F811
    rows = [chat("1?", "one")]
    prepare(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    rows[0]["messages"].insert(0, {"role": "system", "content": system})
    prepare(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert len(prepare.prepared()) == 2
    template = prepare.tokenizer.chat_template  # or in the template, as a default
    prepare.tokenizer.chat_template = "{{- '" + system + "' }}" + template
    prepare(str(tmp_path / "a.jsonl"))
    assert len(prepare.prepared()) == 3
