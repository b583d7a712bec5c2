"""The loss in the head against full logits in fp32: loss and gradients, on shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_ranks

SCRIPT = Path(__file__).parent / "loss_on_ranks.py"


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_and_gradients_are_those_of_full_logits(tmp_path: Path, ranks: int) -> None:
    out = tmp_path / "out.json"
    done = run_ranks(SCRIPT, str(out), ranks=ranks, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for of_rank in json.loads(out.read_text()):
        for name, found in of_rank.items():
            # bf16 has 8 bits; what is compared is a gradient of which each element is a sum of products of such.
            round_off = 2e-2 if name == "bf16" else 3e-6
            assert found["loss"] < round_off, (name, found)
            assert found["rows"] < 1e-5, (name, found)
            assert found["gradient"] < round_off * found["size"], (name, found)
            assert found["size"] > 0.01, (name, found)
