"""The head of the model, whose forward is the loss while training: logits exist for some positions at a time only.

At 128k tokens of vocabulary, logits of 16k positions and what their backward needs are 14 bytes an element, 29 GB. Here
the head takes the positions that have a label, and for some of them after the other computes logits, loss and at once
its gradient (by hidden state and by weight), so that nothing is computed again in backward. It is called as the module
that it is, once a micro-batch: under ZeRO-3 its weight is gathered and prefetched like any other.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from fullft.data.batches import Batch
from fullft.loss import LabelWeights, cross_entropy, forward

# Of the logits of a chunk. The gradient of the weight is read and written once a chunk, so on GPUs, which are waiting
# for memory, chunks are large; on CPUs small ones stay in memory that the process has already.
WORKSPACE_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
# In bf16 2, of its gradient 2; in fp32 4 each: log-softmax, its gradient, the logit's. With a divergence, two more
# log-softmaxes and what their backward needs.
_BYTES_OF_LOGIT, _BYTES_WITH_DIVERGENCE = 14, 32

# The KL divergence from the base at labelled positions of a batch, from their logits and the number of the first.
Divergence = Callable[[torch.Tensor, int], torch.Tensor]
# Of a batch; open while it is asked.
DivergenceOf = Callable[[Batch], AbstractContextManager[Divergence | None]]


@dataclass(frozen=True)
class Transform:
    """What a model does to its logits: scale · z (Cohere, Granite), or cap · tanh(scale · z / cap) (Gemma 2)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Any floating dtype -> fp32, same shape."""
        logits = logits.float()
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


class Head:
    """The head of an engine's model, and the loss of micro-batches by it. All ranks together, as every forward."""

    def __init__(self, engine: Any) -> None:
        """`why_not`: why logits are computed whole after all; empty if they are not."""
        self._engine, self._module = engine, engine.module.get_output_embeddings()
        self._transform, self.why_not = _find_transform(engine, self._module)

    def loss(
        self, batch: Batch, weights: LabelWeights, divergence_of: DivergenceOf | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Forward pass, and the loss in it.

        Args:
            batch: on the engine's device.
            weights: of the labels of the step.
            divergence_of: gives the KL divergence from the base at the labels of replay rows.

        Returns:
            this micro-batch's part of the step's loss, a scalar, exact but for round-off; -ln p of the labels of each
            row, summed, [batch] fp32 without gradient; the divergence likewise.
        """
        rows = batch.labelled.rows
        terms = _Terms(batch.labelled.targets, batch.replay[rows], weights)
        opened = divergence_of(batch) if divergence_of else contextlib.nullcontext()
        if self._transform is None:
            logits = self._whole(batch)
            with opened as divergence:
                loss, nats, kl = terms.loss(logits, divergence)
        else:
            transform, sums = self._transform, list[torch.Tensor]()

            def loss_of(hidden: torch.Tensor) -> torch.Tensor:
                with opened as divergence:
                    weight, bias = self._module.weight, self._module.bias
                    loss, *of_labels = _Loss.apply(hidden, weight, bias, terms, transform, divergence)  # type: ignore[no-untyped-call]
                sums.extend(of_labels)
                return loss  # type: ignore[no-any-return]

            loss, (nats, kl) = self._run(batch, loss_of), sums
        of_rows = torch.zeros(2, len(batch.labels), device=loss.device)
        nats, kl = of_rows.index_add(1, rows, torch.stack([nats.detach(), kl.detach()]))
        return loss, nats, kl

    @torch.no_grad()
    def read(self, batch: Batch) -> AbstractContextManager[Callable[[int, int], torch.Tensor]]:
        """Forward pass, without its head if that can be.

        Returns:
            a context, a collective to enter, that gives logits [positions, vocabulary] fp32 of the labelled positions
            from one number to another, counted row after row
        """
        if self._transform is None:
            whole = self._whole(batch)
            return contextlib.nullcontext(lambda first, last: whole[first:last].float())
        hidden: list[torch.Tensor] = []

        def keep(found: torch.Tensor) -> torch.Tensor:
            hidden.append(found)
            return found.new_zeros(())

        self._run(batch, keep)
        return self._logits(hidden[0], self._transform)

    @contextlib.contextmanager
    def logits(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor
    ) -> Iterator[Iterator[tuple[int, int, torch.Tensor]]]:
        """Forward pass, for evaluation; a collective to enter, not to use.

        Args:
            all [rows, sequence] int64 in host memory, as of a `Batch`.

        Gives (row, number of a label of it, logits [positions, vocabulary] fp32 from that label on), so many positions
        at a time that logits stay small, all of them in turn.
        """
        rows, width = input_ids.shape
        batch = Batch.of(input_ids, position_ids, labels, [width] * rows, [False] * rows, [(0, 0)] * rows)
        size = _positions_at_once(self._module.weight, _BYTES_OF_LOGIT) if self._transform else width
        ends = list(itertools.accumulate(batch.labelled.counts))

        def parts(read: Callable[[int, int], torch.Tensor]) -> Iterator[tuple[int, int, torch.Tensor]]:
            for row, (end, count) in enumerate(zip(ends, batch.labelled.counts, strict=True)):
                for first in range(end - count, end, size):
                    yield row, first - (end - count), read(first, min(first + size, end))

        with self.read(batch.to(self._engine.device)) as read:
            yield parts(read)

    def _whole(self, batch: Batch) -> torch.Tensor:
        """Logits of all labels, [labels, vocabulary]."""
        where = batch.labelled
        logits = forward(self._engine, batch.input_ids, batch.position_ids, where.kept, batch.documents)
        return logits.flatten(0, 1)[where.places]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _logits(self, hidden: torch.Tensor, transform: Transform) -> Iterator[Callable[[int, int], torch.Tensor]]:
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        weight, bias = self._module.weight, self._module.bias
        # An evaluation may have gathered all of the model.
        own = [one for one in (weight, bias) if one is not None and one.ds_status is not ZeroParamStatus.AVAILABLE]
        with deepspeed.zero.GatheredParameters(own) if own else contextlib.nullcontext():
            yield lambda first, last: transform(_linear(hidden[first:last], weight, bias))

    def _run(self, batch: Batch, instead: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Forward pass whose head is a function of the hidden states of labelled positions, [labels, hidden], with a
        scalar; returns the scalar."""
        assert self._transform is not None
        where = batch.labelled

        def head(hidden: torch.Tensor) -> torch.Tensor:
            # Where a model has a softcap the scalar passes it; a small number passes it unchanged.
            return _SMALL * instead(hidden.flatten(0, 1)[where.places]).view(1, 1, 1)

        with _replaced(self._module, head):
            passed: torch.Tensor = forward(
                self._engine, batch.input_ids, batch.position_ids, where.kept, batch.documents
            )
        return passed.sum() / (_SMALL * self._transform.scale)  # type: ignore[no-any-return]


_SMALL = 2.0**-20


@dataclass
class _Terms:
    """Of the loss: labels, [labels]; whether they are of replay, bool; and what they count."""

    targets: torch.Tensor
    replay: torch.Tensor
    weights: LabelWeights

    def loss(
        self, logits: torch.Tensor, divergence: Divergence | None, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, -ln p, divergence) of labels from number `first` on, which have these logits; scalar, [labels] twice.
        All fp32."""
        part = slice(first, first + len(logits))
        nats = cross_entropy(logits, self.targets[part])
        kl = torch.zeros_like(nats) if divergence is None else divergence(logits, first)
        return self.weights.loss(nats, kl, self.replay[part]), nats, kl


class _Loss(torch.autograd.Function):
    """Σ over labels, and its gradient in the same pass: hidden states [labels, hidden] and weight [vocabulary, hidden]
    to a scalar, with -ln p and divergence of each label beside it.

    The gradient by the weight is added up in fp32 over the chunks. Any factor that comes in backward is applied to all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        terms: _Terms,
        transform: Transform,
        divergence: Divergence | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count, size = len(hidden), _positions_at_once(weight, _BYTES_WITH_DIVERGENCE if divergence else _BYTES_OF_LOGIT)
        summed_in = weight.dtype if count <= size else torch.float32
        of_weight = torch.zeros(weight.shape, dtype=summed_in, device=weight.device)
        of_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        of_hidden = torch.empty_like(hidden)
        found = [(torch.zeros((), device=hidden.device), *torch.zeros(2, 0, device=hidden.device))]
        for first in range(0, count, size):
            rows = hidden[first : first + size]
            logits = _linear(rows, weight, bias).requires_grad_()
            with torch.enable_grad():
                loss, nats, kl = terms.loss(transform(logits), divergence, first)
            (of_logits,) = torch.autograd.grad(loss, logits)
            found.append((loss.detach(), nats.detach(), kl.detach()))
            del logits, loss, nats, kl
            torch.mm(of_logits, weight, out=of_hidden[first : first + size])
            _add_product(of_weight, of_logits, rows)
            if of_bias is not None:
                of_bias += of_logits.sum(0, dtype=torch.float32)
        loss, nats, kl = (torch.cat([one.view(-1) for one in column]) for column in zip(*found, strict=True))
        ctx.gradients = (
            of_hidden, of_weight.to(weight.dtype), None if of_bias is None else of_bias.to(weight.dtype)
        )  # fmt: skip
        ctx.mark_non_differentiable(nats, kl)
        return loss.sum(), nats, kl

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[no-untyped-call]
    def backward(ctx: Any, factor: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_weight, of_bias = (None if one is None else one.mul_(factor) for one in ctx.gradients)
        del ctx.gradients
        return of_hidden, of_weight, of_bias, None, None, None


def _positions_at_once(weight: torch.Tensor, bytes_of_logit: int) -> int:
    vocabulary = weight.ds_shape[0] if hasattr(weight, "ds_shape") else weight.shape[0]
    return max(1, WORKSPACE_BYTES.get(weight.device.type, 1 << 30) // (bytes_of_logit * vocabulary))


def _linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # Not F.linear: under ZeRO-3 DeepSpeed has made that a function that keeps its input for backward.
    return torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())


def _add_product(total: torch.Tensor, of_logits: torch.Tensor, hidden: torch.Tensor) -> None:
    """total += of_logitsᵀ · hidden, summed in the dtype of total."""
    if total.dtype == hidden.dtype:
        total.addmm_(of_logits.t(), hidden)
    elif not total.is_cuda:
        total.addmm_(of_logits.t().float(), hidden.float())
    else:  # addmm takes an fp32 sum of bf16 products in some versions of torch only; so in blocks, for their memory
        block = max(1, (1 << 26) // hidden.shape[1])
        exact: dict[str, Any] = {} if torch.version.hip else {"out_dtype": total.dtype}
        for rows, columns in zip(torch.split(total, block), torch.split(of_logits, block, dim=1), strict=True):
            rows += torch.mm(columns.t(), hidden, **exact)


@contextlib.contextmanager
def _replaced(module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The module's forward is another function; its hooks stay, and with them all that ZeRO-3 does around it."""
    own = module.__dict__.get("forward")
    module.forward = function  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward  # type: ignore[method-assign]
        if own is not None:
            module.forward = own  # type: ignore[method-assign]


@torch.no_grad()
def _find_transform(engine: Any, head: Any) -> tuple[Transform | None, str]:
    """What the model does to the logits that its head gives, seen by giving it some; or why that cannot be told."""
    name = type(engine.module).__name__
    if not isinstance(head, torch.nn.Linear):
        return None, f"the head of {name} is no linear layer but {type(head).__name__}"
    given = torch.tensor([_SMALL, 0.0, -_SMALL, 0.3, -1.7, 29.3, -311.3, 1e6], device=engine.device).view(1, 1, -1)
    shapes: list[torch.Size] = []

    def probe(hidden: torch.Tensor) -> torch.Tensor:
        shapes.append(hidden.shape)
        return given

    ids = torch.tensor([[1, 2]], device=engine.device)
    training = engine.module.training
    engine.eval()
    with _replaced(head, probe):
        became = forward(engine, ids, torch.arange(2, device=engine.device)[None], torch.ones_like(ids[0, :1]))
    engine.train(training)
    if shapes != [(1, 1, head.weight.ds_shape[1] if hasattr(head.weight, "ds_shape") else head.weight.shape[1])]:
        return None, f"{name} does not call its head once with the hidden states of the positions asked for"
    if became.shape == given.shape:
        scale, limit = float(became[0, 0, 0]) / _SMALL, float(became[0, 0, -1])
        for transform in (Transform(), Transform(scale), Transform(scale, limit)) if scale and limit else ():
            if torch.allclose(transform(given), became.float(), rtol=1e-6, atol=0):
                return transform, ""
    return None, f"{name} changes its logits otherwise than by a factor or a softcap"
