"""Complaint: the model never stops, because the token that ends an answer was taken for padding and not trained."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from conftest import chats, write_jsonl
from test_data import Prepare, batches, prepare, tokenizer  # noqa: F401

from fullft.loss import IGNORE


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["chats", "texts"])
def test_the_end_token_is_trained_and_padding_is_not_where_both_are_the_same_token(
    prepare: Prepare,  # noqa: F811
    tmp_path: Path,
    packing: bool,
    kind: str,
) -> None:
    rows: list[Any] = chats(9) if kind == "chats" else [{"text": f"text {at} " * (at + 1)} for at in range(9)]
    tokens = prepare.tokenizer
    tokens.pad_token = tokens.eos_token
    found = batches(prepare(str(write_jsonl(tmp_path / "a.jsonl", rows))), packing=packing, micro=4)
    ends = 0
    for batch in found.of_step(0, 0) if not packing else [b for step in range(9) for b in found.of_step(step, 0)]:
        for ids, positions, labels in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True):
            starts = [at for at, position in enumerate(positions.tolist()) if position == 0] + [len(ids)]
            for start, end in itertools.pairwise(starts):
                wanted = labels[start:end].tolist()
                if set(wanted) == {IGNORE}:
                    continue  # padding up to the length of the sequence
                last = max(at for at, label in enumerate(wanted) if label != IGNORE)
                assert wanted[last] == tokens.eos_token_id
                assert wanted.count(tokens.eos_token_id) == 1
                ends += 1
    assert ends >= 4
