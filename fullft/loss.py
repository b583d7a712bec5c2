"""The loss of a step: token cross-entropy, and what a token of which kind of row counts in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fullft.documents import Documents, documents_arguments, moved

IGNORE = -100  # label of a position without loss, as everywhere in PyTorch


def positions_with_label(labels: torch.Tensor) -> torch.Tensor:
    """Positions at which some row has a label, [kept] int64 of labels [batch, sequence].

    `kept` ≥ 1 even when nothing has a label, so that every rank runs the same modules: under ZeRO-3 each of them is a
    collective.
    """
    kept = (labels != IGNORE).any(dim=0).nonzero().squeeze(1)
    return kept if kept.numel() else torch.zeros(1, dtype=torch.int64, device=labels.device)


@dataclass(frozen=True)
class Labelled:
    """Where the labels of a micro-batch are, row after row; found on the host, so that no launch waits for the GPU."""

    kept: torch.Tensor  # as of `positions_with_label`
    places: torch.Tensor  # [labels] int64: their numbers among the batch · kept positions
    rows: torch.Tensor  # [labels] int64
    targets: torch.Tensor  # [labels] int64
    counts: tuple[int, ...]  # of each row

    @staticmethod
    def of(labels: torch.Tensor) -> Labelled:
        """`labels`: [batch, sequence] in host memory."""
        kept, (rows, columns) = positions_with_label(labels), (labels != IGNORE).nonzero(as_tuple=True)
        places = rows * len(kept) + torch.searchsorted(kept, columns)
        return Labelled(
            kept, places, rows, labels[rows, columns], tuple((labels != IGNORE).sum(1).tolist())
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Labelled:
        tensors = (self.kept, self.places, self.rows, self.targets)
        kept, places, rows, targets = (moved(one, device) for one in tensors)
        return Labelled(kept, places, rows, targets, self.counts)


def forward(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    kept: torch.Tensor,
    documents: Documents | None = None,
) -> Any:
    """Forward pass: what the head gives at the positions `kept`; logits [batch, kept, vocabulary]."""
    # No attention mask over the tokens: with one, transformers would not look for document borders in position_ids.
    return model(
        input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=kept,
        **documents_arguments(model, documents),
    ).logits  # fmt: skip


def labelled_logits(
    model: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labels: torch.Tensor,
    documents: Documents | None = None,
) -> Any:
    """Forward pass, with logits only where some row has a label: the head costs 2·hidden·vocabulary FLOP a token.

    For evaluation; the loss of training, which has no use for logits, is `head.Head`'s.

    Args:
        model: a transformers causal language model, or the DeepSpeed engine around one.
        input_ids, position_ids, labels: [batch, sequence] int64; labels already shifted.
        documents: of the micro-batch; without them attention goes by the position ids, or takes a row for a document.

    Returns:
        logits [batch, kept, vocabulary] and labels [batch, kept], `kept` as of `positions_with_label`.
    """
    kept = positions_with_label(labels)
    return forward(model, input_ids, position_ids, kept, documents), labels[:, kept]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-ln p(label) in fp32, [positions], 0 where there is no label, of logits [positions, vocabulary]."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")


def kl_divergence(
    logits: torch.Tensor, tokens: torch.Tensor, logprobs: torch.Tensor, rest: torch.Tensor
) -> torch.Tensor:
    """KL(p || q) at each position, nats: of p are known the k likeliest tokens, all others are taken as one.

    A lower bound of the whole divergence, by the log-sum inequality, and never below 0. It misses how p and q differ
    among the other tokens, so the mean of p's mass there says how good a bound it is.

    Args:
        logits: of q, [positions, vocabulary].
        tokens, logprobs: the likeliest tokens of p and their ln p, which may have been rounded, [positions, k].
        rest: the mass of p outside of these tokens, [positions].

    Returns:
        [positions] fp32.
    """
    log_q = logits.gather(-1, tokens).float() - logits.float().logsumexp(-1, keepdim=True)
    # What rounding adds to the sum of p would pass for mass elsewhere, where a sure model has next to none.
    log_p = logprobs + ((1 - rest) / logprobs.exp().sum(-1)).log()[:, None]
    rest_p, rest_q = (one.clamp(min=1e-8) for one in (rest, 1 - log_q.exp().sum(-1)))
    return (log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())


@dataclass(frozen=True)
class LabelWeights:
    """What a label counts in the loss of its step, so that the loss is a sum over all labels of the global batch:
    cross-entropy of a task row's label, of a replay row's, and the KL divergence from the base at a replay row's."""

    task: float
    replay: float
    kl: float

    @staticmethod
    def of_step(task_labels: float, replay_labels: float, replay_label_weight: float, kl: float) -> LabelWeights:
        """From the numbers of labels in the global batch, the same on all ranks.

        The cross-entropy is the mean over all labels, replay's counting `replay_label_weight`; it is the plain mean in
        a step without replay rows.

        Args:
            kl: train.kl_weight over the replay labels that a step of the run has on average. So the divergence in the
                loss is, over the steps, kl_weight × its mean over replay labels, and a label counts the same in each:
                a mean over the step's own labels would give a short row that is the only one all the weight.
        """
        whole = task_labels + replay_label_weight * replay_labels or 1.0  # 0 in a step of replay that does not count
        return LabelWeights(1 / whole, replay_label_weight / whole, kl)

    def loss(self, nats: torch.Tensor, kl: torch.Tensor, replay: torch.Tensor) -> torch.Tensor:
        """Part of the step's loss, a scalar: of labels, or of rows that hold their sums, with these -ln p and
        divergences, of replay or not."""
        return (nats * torch.where(replay, self.replay, self.task) + self.kl * kl).sum()
