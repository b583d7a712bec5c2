"""Activation checkpointing: the same training in every mode, what each keeps, and what auto takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from fullft import activations
from fullft.planner.memory import Layer, activation_bytes, layer_of

SCRIPT = Path(__file__).parent / "activations_on_ranks.py"
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, vocab_size=97, pad_token_id=None,
)  # fmt: skip
TOKENS = 64


@pytest.mark.ranks
def test_training_is_the_same_in_every_mode(tmp_path: Path) -> None:
    done = run_ranks(SCRIPT, str(tmp_path / "out.json"), ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for name, modes in json.loads((tmp_path / "out.json").read_text()).items():
        assert abs(modes["none"]["moved"]) > 1e-4, name
        assert modes["full"]["kept"] < modes["none"]["kept"], name
        for mode, found in modes.items():
            assert found["loss"] < 1e-6, (name, mode, found)
            assert found["weights"] < 1e-6, (name, mode, found)


def kept_and_flops(mode: str) -> tuple[int, int]:
    """Bytes kept from forward to backward in the layers, and the FLOP of backward."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).train()
    activations.enable(model, mode)
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    rest = {one.untyped_storage().data_ptr() for one in model.buffers()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if (where := tensor.untyped_storage().data_ptr()) not in weights | rest:
            kept[where] = tensor.untyped_storage().nbytes()
        return tensor

    alive: list[Any] = []
    real = activations._Kept.__init__

    def spy(self: Any, tensors: Any) -> None:
        real(self, tensors)
        alive.append(self)

    activations._Kept.__init__ = spy  # type: ignore[method-assign]
    try:
        with FlopCounterMode(display=False) as counter:
            hidden = torch.randn(1, TOKENS, CONFIG.hidden_size, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                out = model.model.layers[0](
                    hidden, position_embeddings=model.model.rotary_emb(hidden, torch.arange(TOKENS)[None])
                )
            for one in alive:
                for tensor in torch.utils._pytree.tree_leaves(one.tensors):
                    note(tensor)
            forward = counter.get_total_flops()
            out.sum().backward()
        return sum(kept.values()), counter.get_total_flops() - forward
    finally:
        activations._Kept.__init__ = real  # type: ignore[method-assign]


def test_what_is_kept_and_computed_again() -> None:
    found = {mode: kept_and_flops(mode) for mode in ("none", "selective", "full")}
    kept, flops = ({mode: one[at] for mode, one in found.items()} for at in (0, 1))
    assert kept["full"] < kept["selective"] < 0.5 * kept["none"]
    assert flops["none"] < flops["selective"] < flops["full"]
    # Half of the products that are computed again at all; FLOP of attention are not counted on CPU.
    again = (flops["selective"] - flops["none"]) / (flops["full"] - flops["none"])
    assert 0.3 < again < 0.6
    layer = layer_of(CONFIG)
    one = Layer(1, layer.hidden, layer.mlp, layer.queries, layer.keys, layer.heads)
    predicted = {mode: TOKENS * activation_bytes(one, mode, bf16=False) for mode in found}
    whole = predicted["none"]
    # cos and sin of positions are kept beside, once for all layers
    assert kept["none"] == pytest.approx(whole, rel=0.05)
    assert kept["selective"] == pytest.approx(predicted["selective"] - whole, rel=0.1)
    assert kept["full"] == predicted["full"] - whole
