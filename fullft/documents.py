"""Where the documents of a micro-batch begin and end, as attention kernels for ragged batches want to know it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

VARLEN = "varlen"  # name of `attention.varlen` among the implementations of transformers


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor of host memory on the device. The host does not wait for a GPU, which takes pinned memory."""
    on_gpu = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=on_gpu)


@dataclass(frozen=True)
class Documents:
    """Of a micro-batch whose rows are laid end to end. The padding of a row counts as a document: all is covered."""

    ends: torch.Tensor  # int32 [documents + 1]: 0, then where each document ends among the batch · sequence tokens
    longest: int  # tokens; known on the host, so that no kernel's launch waits for the device
    ranks: int = 1  # that share the micro-batch, each with a part of every row; the rest is said of whole rows

    @staticmethod
    def of(positions: torch.Tensor) -> Documents:
        """Of position ids [batch, sequence] in host memory that begin at 0 in every document and every row.

        Raises:
            ValueError: a row begins with another position.
        """
        if positions[:, 0].any():
            raise ValueError("position ids of a row must begin at 0")
        ends = torch.cat([(positions.flatten() == 0).nonzero()[:, 0], torch.tensor([positions.numel()])])
        return Documents(ends.to(torch.int32), int(ends.diff().max()))

    def to(self, device: torch.device | str) -> Documents:
        return replace(self, ends=moved(self.ends, device))

    @property
    def arguments(self) -> dict[str, Any]:
        """As transformers' models take them and hand them to their attention."""
        cumulative = {"cu_seq_lens_q": self.ends, "cu_seq_lens_k": self.ends}
        lengths = {"max_length_q": self.longest, "max_length_k": self.longest}
        return cumulative | lengths | ({"sequence_parallel": self.ranks} if self.ranks > 1 else {})


def documents_arguments(model: Any, documents: Documents | None) -> dict[str, Any]:
    """What a forward pass of a model (or of the engine around one) is given so that its attention sees the documents.

    sdpa and eager, which cannot be told, get nothing: transformers makes them a mask from the position ids.
    """
    name = getattr(model, "module", model).config._attn_implementation
    if documents is None or not (name == VARLEN or name.startswith("flash")):
        return {}
    # A mask of 4 dimensions passes for ready made. Without one, transformers would look for documents in the position
    # ids, for which it waits for the device, and make a mask of sequence² elements.
    ready = {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=documents.ends.device)}
    return documents.arguments | (ready if name == VARLEN else {})
