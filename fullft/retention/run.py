"""Running the items of a task on all ranks of the live ZeRO-3 engine.

Every forward under ZeRO-3 is a collective, so all ranks must run equally many. Items are cut into the same batches on
every rank; rank r runs batches r, r + W, ...; a rank that has one fewer runs its last batch again and throws the
result away. Batches do not depend on the world size, so neither do the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fullft import signals, watchdog
from fullft.cluster import available_host_memory
from fullft.data.progress import progress
from fullft.errors import Preempted
from fullft.head import Head
from fullft.loss import IGNORE, cross_entropy, labelled_logits
from fullft.retention.tasks import Pair, Prepared, Prompt, Window, answer

SAID_SECONDS = 30  # between two lines on how far an evaluation is
_MEMORY_SHARE = 0.5  # of the free memory, that whole weights may take


@dataclass(frozen=True)
class Batching:
    """How much is run at once on one GPU."""

    texts: int  # windows of texts
    tokens: int  # padded tokens of multiple choice
    prompts: int  # answers generated


def run_task(
    engine: Any, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, batching: Batching
) -> list[dict[str, Any]]:
    """What an item file holds of each item, but for its number and hash. All ranks together; the same on all."""
    if prepared.harness is not None:
        from fullft.retention.harness import run_harness

        return run_harness(engine, tokenizer, prepared, batching)
    match prepared.kind:
        case "text":
            return _run_text(engine, prepared, batching)
        case "multiple_choice":
            return _run_choices(engine, prepared, batching)
        case _:
            return _run_generate(engine, tokenizer, prepared, batching)


@contextmanager
def whole_weights(engine: Any) -> Iterator[bool]:
    """All weights on every rank within, if they fit: each is gathered once, and not again for every forward.

    That is for generation above all, where a forward makes but one token of each answer. They fit if their bytes (in
    the dtype of training) are at most half of the memory that is free on each rank; else every layer is gathered when
    it is run, as in training. Yields whether they fit. All ranks together.
    """
    import deepspeed

    parameters = list(engine.module.parameters())
    needed = sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)
    fits = torch.tensor(int(needed <= _MEMORY_SHARE * _free_memory()), device=engine.device)
    dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    if not fits.item():
        yield False
        return
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:  # else the first forward lets go of each weight after its layer
            parameter.ds_active_sub_modules.add(_EVALUATION)
        try:
            yield True
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(_EVALUATION)


_EVALUATION = -1  # stands among the numbers of modules that use a weight


def _free_memory() -> int:
    """Bytes that this rank can still take."""
    if not torch.cuda.is_available():
        return available_host_memory() // dist.get_world_size()  # as if all ranks were on this host
    return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def share(count: int, run: Callable[[int], Any], device: str, title: str = "evaluation") -> list[Any]:
    """[run(0), ..., run(count - 1)] on every rank, the calls dealt out to the ranks, equally many on each.

    Raises:
        Preempted: a signal came to a rank; on all ranks after the same batch.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = {}
    with progress(-(-count // world), title, " batches", SAID_SECONDS, shown=rank == 0) as advance:
        for batch in range(rank, count + (-count) % world, world):
            if signals.agreed(device):
                raise Preempted
            watchdog.mark("evaluation")
            result = run(min(batch, count - 1))
            if batch < count:
                mine[batch] = result
            advance(1)
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, mine)
    merged = {batch: result for part in parts for batch, result in part.items()}
    return [merged[batch] for batch in range(count)]


def batched(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices by falling length in batches of `size`: little padding, and the largest batch comes first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _batched_by_tokens(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """The same in batches of at most so many padded tokens, but of one row at least."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def max_positions(model: Any) -> int | None:
    """Tokens that a model has positions for; None if it has no limit."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def _padded(rows: Sequence[Sequence[int]], filler: int, device: Any = "cpu") -> torch.Tensor:
    """[rows, longest] int64, filled up at the end."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)


# Texts


def text_sums(engine: Any, windows: Sequence[Window], size: int, title: str) -> list[tuple[float, int, int]]:
    """Of each window: sum of ln p of its labels (nats), number of labels, how many were the likeliest token."""
    head, batches = Head(engine), batched([len(ids) for ids, _ in windows], size)

    @torch.no_grad()
    def run(batch: int) -> list[tuple[float, int, int]]:
        chosen = [windows[index] for index in batches[batch]]
        ids, labels = _padded([ids for ids, _ in chosen], 0), _padded([labels for _, labels in chosen], IGNORE)
        found = [(0.0, 0, 0)] * len(chosen)
        with head.logits(ids, torch.arange(ids.shape[1]).expand_as(ids).contiguous(), labels) as parts:
            for row, first, logits in parts:
                targets = labels[row][labels[row] != IGNORE][first : first + len(logits)].to(logits.device)
                nats = -cross_entropy(logits, targets).double().sum()
                hits = (logits.argmax(-1) == targets).sum()
                now = (nats.item(), len(targets), int(hits))
                found[row] = tuple(a + b for a, b in zip(found[row], now, strict=True))  # type: ignore[assignment]
        return found

    results = share(len(batches), run, engine.device, title)
    sums = {
        index: one for at, result in zip(batches, results, strict=True) for index, one in zip(at, result, strict=True)
    }
    return [sums[index] for index in range(len(windows))]


def text_records(sums: Sequence[tuple[float, int, int]], owners: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Sums of windows added up to those of `count` items; owners[window]: its item."""
    totals: list[dict[str, Any]] = [{"logprob": 0.0, "n_tokens": 0, "n_correct": 0} for _ in range(count)]
    for owner, (logprob, tokens, right) in sorted(zip(owners, sums, strict=True)):
        totals[owner]["logprob"] += logprob
        totals[owner]["n_tokens"] += tokens
        totals[owner]["n_correct"] += right
    return totals


def _run_text(engine: Any, prepared: Prepared, batching: Batching) -> list[dict[str, Any]]:
    windows = [(number, window) for number, item in enumerate(prepared.items) for window in item.windows]
    sums = text_sums(engine, [window for _, window in windows], batching.texts, prepared.name)
    totals = text_records(sums, [number for number, _ in windows], len(prepared.items))
    return [total | {"n_bytes": item.text_bytes} for total, item in zip(totals, prepared.items, strict=True)]


# Multiple choice


def loglikelihoods(engine: Any, pairs: Sequence[Pair], tokens: int, title: str) -> list[tuple[float, bool]]:
    """Of each pair of context and continuation: ln p of the continuation (nats, softmax in fp32), is it the greedy one.

    Pairs with the same input, e.g. the letters of one question, share a row of a forward. What is longer than the
    model's positions loses its beginning, as in lm-evaluation-harness. At most `tokens` padded tokens a forward.
    """
    longest = max_positions(engine.module) or 1 << 30
    inputs, rows = [], dict[tuple[int, ...], list[int]]()
    for number, (context, continuation) in enumerate(pairs):
        inputs.append(tuple([*context, *continuation][-(longest + 1) :][:-1]))
        rows.setdefault(inputs[-1], []).append(number)
    distinct = list(rows)
    batches = _batched_by_tokens([len(row) for row in distinct], tokens)

    @torch.no_grad()
    def run(batch: int) -> list[tuple[int, float, bool]]:
        chosen = [distinct[index] for index in batches[batch]]
        ids = _padded(chosen, 0, engine.device)
        labels = torch.full_like(ids, IGNORE)
        for at, row in enumerate(chosen):
            most = max(len(pairs[number][1]) for number in rows[row])
            labels[at, max(0, len(row) - most) : len(row)] = 0
        place = (labels != IGNORE).any(dim=0).cumsum(0) - 1  # of a position among those whose logits are kept
        positions = torch.arange(ids.shape[1], device=engine.device).expand_as(ids)
        logits, _ = labelled_logits(engine, ids, positions, labels)
        logs = F.log_softmax(logits.flatten(0, 1).float(), dim=-1).view(logits.shape)
        numbers, sums, greedy = [], [], []
        for at, row in enumerate(chosen):
            for number in rows[row]:
                target = torch.tensor(pairs[number][1][-len(row) :], device=engine.device)
                kept = place[len(row) - len(target) : len(row)]
                numbers.append(number)
                sums.append(logs[at, kept, target].double().sum())
                greedy.append((logits[at, kept].argmax(-1) == target).all())
        return list(zip(numbers, torch.stack(sums).tolist(), torch.stack(greedy).tolist(), strict=True))

    found: dict[int, tuple[float, bool]] = {}
    for result in share(len(batches), run, engine.device, title):
        found |= {number: (nats, is_greedy) for number, nats, is_greedy in result}
    return [found[number] for number in range(len(pairs))]


def _run_choices(engine: Any, prepared: Prepared, batching: Batching) -> list[dict[str, Any]]:
    pairs = [pair for item in prepared.items for pair in item.pairs]
    found = iter(loglikelihoods(engine, pairs, batching.tokens, prepared.name))
    records = []
    for item in prepared.items:
        logprobs = [next(found)[0] for _ in item.pairs]
        chars, sizes = [len(choice) for choice in item.choices], [len(choice.encode()) for choice in item.choices]
        weights = chars if prepared.metric == "acc_norm" else [1] * len(chars)
        scores = [logprob / weight for logprob, weight in zip(logprobs, weights, strict=True)]
        best = scores.index(max(scores))  # of equal ones the first, as numpy.argmax takes
        records.append({
            "choice_logprobs": logprobs, "choice_chars": chars, "choice_bytes": sizes, "gold": item.gold, "pred": best,
            "correct": best == item.gold,
        })  # fmt: skip
    return records


# Generation


def generations(
    engine: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], size: int, title: str
) -> list[str]:
    """The greedy answer to each prompt, without special tokens, up to its first stop string."""
    module = engine.module
    stop = module.generation_config.eos_token_id
    known = [*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id]
    padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)

    @torch.no_grad()
    def run(numbers: Sequence[int]) -> list[tuple[int, str]]:
        chosen = [prompts[number] for number in numbers]
        width, first = max(len(prompt.ids) for prompt in chosen), chosen[0]
        ids = torch.tensor(
            [[padding] * (width - len(prompt.ids)) + prompt.ids for prompt in chosen], device=engine.device
        )
        mask = torch.tensor(
            [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in chosen], device=engine.device
        )
        # generate() fills what is unset from the model's own config, where a repetition penalty would make it not
        # greedy.
        module.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=first.max_new_tokens,
            eos_token_id=sorted({token for token in (*known, *first.stop_ids) if token is not None}) or None,
            pad_token_id=padding,
            stop_strings=list(first.stop_strings) or None,
        )
        # synced_gpus: ranks whose answers end early go on running the forwards that the others need. With whole weights
        # too: until DeepSpeed has seen two forwards alike, it compares between all ranks what each of them has run.
        synced = dist.get_world_size() > 1
        answers = module.generate(input_ids=ids, attention_mask=mask, synced_gpus=synced, tokenizer=tokenizer)
        texts = tokenizer.batch_decode(answers[:, width:], skip_special_tokens=True)
        return list(zip(numbers, (_cut(text, first.stop_strings) for text in texts), strict=True))

    def shared(alike: Sequence[int]) -> Iterator[tuple[int, str]]:
        lengths = [len(prompts[number].ids) for number in alike]
        batches = [[alike[index] for index in batch] for batch in batched(lengths, size)]
        for result in share(len(batches), lambda batch: run(batches[batch]), engine.device, title):
            yield from result

    own = module.generation_config
    try:
        # Alike by alike, lest a rank that is done run on beyond its positions for another's longer answers.
        texts = dict(pair for alike in _alike(prompts) for pair in shared(alike))
    finally:
        module.generation_config = own
    return [texts[number] for number in range(len(prompts))]


def _alike(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Numbers of the prompts that may be answered in one batch: with equal limits and stops."""
    groups: dict[Any, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault((prompt.max_new_tokens, prompt.stop_ids, prompt.stop_strings), []).append(number)
    return list(groups.values())


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _run_generate(
    engine: Any, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, batching: Batching
) -> list[dict[str, Any]]:
    """Per item: the greedy answer, and whether it equals the reference."""
    prompts = [
        Prompt(item.prompt, prepared.max_new_tokens, item.stop_ids, item.stop_strings) for item in prepared.items
    ]
    texts = generations(engine, tokenizer, prompts, batching.prompts, prepared.name)
    results = []
    for item, text in zip(prepared.items, texts, strict=True):
        found = answer(text, prepared.answer_pattern)
        right = found is not None and found == answer(item.reference, prepared.answer_pattern)
        results.append({"correct": right, "generation": text})
    return results
