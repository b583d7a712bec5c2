"""The tuned model as a Hugging Face folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fullft import lease
from fullft.errors import BadInput


def rehearse(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write all of an export but the weights, and read it back, so that nothing of it can fail after the training.

    Raises:
        BadInput: e.g. a generation config that transformers reads but refuses to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            type(tokenizer).from_pretrained(folder)
        except Exception as error:  # whatever it is, the export would meet it too
            raise BadInput(f"model.path: the tuned model could not be exported: {error}") from None


def export(
    engine: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype, max_shard_gb: float, card: str
) -> None:
    """Write config, weights, tokenizer and model card to `folder`, atomically. All ranks together.

    Each parameter is gathered by itself; rank 0 collects the whole model in host memory (2 bytes a parameter in bf16).
    """
    weights: dict[str, torch.Tensor] = {}
    is_main = dist.get_rank() == 0
    first_names: dict[int, str] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if first != name:  # tied: the same tensor under a second name, which save_pretrained leaves out
            weights |= {name: weights[first]} if is_main else {}
            continue
        full = _gather(parameter, dtype)
        if is_main:
            weights[name] = full
    if is_main:
        persistent = engine.module.state_dict().keys()
        weights |= {name: buffer.cpu() for name, buffer in engine.module.named_buffers() if name in persistent}
        partial = lease.partial(folder)
        shutil.rmtree(partial, ignore_errors=True)
        _write(engine.module, weights, partial, dtype, max_shard_gb)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card)
        lease.commit(folder)
    dist.barrier()


def _write(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype, max_shard_gb: float
) -> None:
    model.save_pretrained(folder, state_dict=weights, max_shard_size=f"{int(max_shard_gb * 1000)}MB")
    config = type(model.config).from_pretrained(folder)
    config.dtype = dtype
    config.save_pretrained(folder)


def _gather(parameter: Any, dtype: torch.dtype) -> torch.Tensor:
    """The full parameter from the optimizer's fp32 shards, on the CPU. All ranks together."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).reshape(parameter.ds_shape).to(dtype).cpu()  # type: ignore[no-any-return]
