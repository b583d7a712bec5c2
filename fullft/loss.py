"""Token cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100  # label of a position without loss, as everywhere in PyTorch


def labelled_logits(model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> Any:
    """Forward pass, with logits only where some row has a label: the head costs 2·hidden·vocabulary FLOP a token.

    Args:
        model: a transformers causal language model, or the DeepSpeed engine around one.
        input_ids, position_ids, labels: [batch, sequence] int64; labels already shifted.

    Returns:
        logits [batch, kept, vocabulary] and labels [batch, kept]. `kept` ≥ 1 even when nothing has a label, so that
        every rank runs the same modules: under ZeRO-3 each of them is a collective.
    """
    kept = (labels != IGNORE).any(dim=0).nonzero().squeeze(1)
    if kept.numel() == 0:
        kept = torch.zeros(1, dtype=torch.int64, device=labels.device)
    # No attention mask: with one, transformers would not look for document borders in position_ids.
    output = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=kept)
    return output.logits, labels[:, kept]


def token_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum (not mean) of -ln p(label) over positions with a label, in fp32; a scalar.

    The caller divides by the number of labels of the whole global batch: micro-batches and ranks have different
    numbers of them, so a mean of means would weight tokens unevenly.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
