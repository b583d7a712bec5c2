"""Scores and drops with their errors, from item records alone: no model, no ranks.

Every score is a ratio of sums over items, sum(a) / sum(b): bits over bytes, nats over tokens, correct answers over
items (b = 1). So is a drop, of the paired differences of `a`, and one formula gives all standard errors (ratio
estimator, Cochran 1977, chapter 6), with sums over clusters in the place of items where items belong together (Miller
2024, "Adding error bars to evals"):

    r_g = sum over g of (a_i - ratio · b_i)        SE = sqrt(G / (G - 1) · sum r_g²) / sum(b)        G clusters

Drops are positive when the model is worse, in the task's unit. What cannot be known (one item, a score that is not
finite) is None, never NaN.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fullft.errors import BadInput

ItemRecord = dict[str, Any]  # one line of retention/items/step-….<task>.jsonl
Array = NDArray[np.float64]

RESAMPLES = 2000
FEWEST_DOCUMENTS = 50  # below it a percentile bootstrap is too narrow, and t is right
FEWEST_CLUSTERS = 40
FEWEST_FLIPS = 10  # items that did not do what most did (stay, or flip); with fewer, t and bootstrap are too sure
POWER = 0.8
ASSUMED_FLIPS = 0.1  # share of items whose correctness changes, where nothing is measured yet
ASSUMED_SPREAD = 0.05  # between documents, of the change in bits per byte or nats a token
ASSUMED_ICC = 0.05  # correlation of the changes within a cluster
_LOWER_IS_BETTER = ("bits_per_byte", "loss", "perplexity", "word_perplexity", "byte_perplexity", "brier_score", "mse")
_SHARES = re.compile(r"(^|_)(acc(_norm|_bytes)?|accuracy|match|em|f1|mc[12]|pass@\d+)(,|$)")  # the harness's too


def is_higher_better(metric: str) -> bool:
    """Of the metrics that are known by name."""
    return metric not in _LOWER_IS_BETTER


def is_share(metric: str) -> bool:
    """Whether a metric is a share of 1, shown as percent and its changes as points."""
    return _SHARES.search(metric) is not None


def score(kind: str, metric: str, items: Sequence[ItemRecord], higher_is_better: bool | None = None) -> dict[str, Any]:
    """The numbers of one task at one step: metric, higher_is_better, score, se, n, clusters, extra.

    kind, metric: text with bits_per_byte or loss (nats a token), multiple_choice with acc or acc_norm, generate with
    exact_match, value with any mean over items; higher_is_better: default as `is_higher_better` says.
    """
    a, b = _sums(kind, metric, items)
    clusters = _clusters(items)
    if higher_is_better is None:
        higher_is_better = is_higher_better(metric)
    return {
        "metric": metric, "higher_is_better": higher_is_better, "n": len(items),
        "clusters": int(clusters.max()) + 1, "score": finite(a.sum() / b.sum()), "se": _standard_error(a, b, clusters),
        "extra": _extra(kind, metric, items),
    }  # fmt: skip


def compare(
    name: str,
    kind: str,
    metric: str,
    base: Sequence[ItemRecord],
    items: Sequence[ItemRecord],
    confidence: float = 0.95,
    higher_is_better: bool | None = None,
) -> dict[str, Any]:
    """What a task lost since step 0, paired item by item: base, drop, drop_se, drop_ci, level, p, test, discordant.

    p, two-sided: McNemar's mid-p for right-or-wrong items without clusters (Fagerland 2013), else t with G - 1 degrees
    of freedom. drop_ci: paired bootstrap over clusters, 2,000 resamples with a seed from the task's name; t where there
    are too few of them; for right-or-wrong items of which few, or nearly all, flip the adjusted Wald interval (Bonett &
    Price 2012).
    `base` may have more items: those that `items` lacks are left out of both.

    Raises:
        BadInput: `items` has one that was not measured at step 0; names the first.
    """
    base = pair(name, base, items)
    (before, b), (now, b_now) = _sums(kind, metric, base), _sums(kind, metric, items)
    if (odd := np.flatnonzero(b != b_now)).size:
        first = items[odd[0]]
        raise BadInput(
            f"task {name}: item {first['item']} (hash {first['hash']}) has {b_now[odd[0]]:g} bytes or tokens, at step "
            f"0 it had {b[odd[0]]:g}: tokenizer or data have changed; use another run_dir"
        )
    if higher_is_better is None:
        higher_is_better = is_higher_better(metric)
    d = before - now if higher_is_better else now - before
    clusters = _clusters(items)
    count = int(clusters.max()) + 1
    drop, se = finite(d.sum() / b.sum()), _standard_error(d, b, clusters)
    result: dict[str, Any] = {
        "base": finite(before.sum() / b.sum()), "drop": drop, "drop_se": se, "drop_ci": None, "level": confidence,
        "p": None, "test": None, "interval": None, "discordant": None, "visible_drop": None,
    }  # fmt: skip
    if drop is None or se is None:
        return result
    clustered, binary = count < len(items), _is_binary(metric, before, now)
    if binary:
        result["discordant"] = [int((d > 0).sum()), int((d < 0).sum())]
    if binary and not clustered:
        result |= {"test": "mcnemar_midp", "p": mcnemar_midp(*result["discordant"])}
    else:
        result |= {"test": "cluster_t" if clustered else "ratio_t", "p": two_sided_p(drop, se, count - 1)}
    result |= _interval(name, d, b, clusters, result, confidence)
    result["visible_drop"] = (float(stats.norm.isf((1 - confidence) / 2)) + float(stats.norm.ppf(POWER))) * se
    return result


def _interval(
    name: str, d: Array, b: Array, clusters: NDArray[np.int64], found: dict[str, Any], confidence: float
) -> dict[str, Any]:
    tail = (1 - confidence) / 2
    if found["test"] == "mcnemar_midp":
        worse, better = found["discordant"]
        others = len(d) - max(worse, better, len(d) - worse - better)
        if len(d) < FEWEST_DOCUMENTS or others < FEWEST_FLIPS:
            centre, se = adjusted_wald(worse, better, len(d))
            width = float(stats.norm.isf(tail)) * se
            return {"interval": "adjusted_wald", "drop_ci": [max(-1.0, centre - width), min(1.0, centre + width)]}
    groups = int(clusters.max()) + 1
    few = FEWEST_CLUSTERS if groups < len(d) else FEWEST_DOCUMENTS
    if groups < few:
        width = float(stats.t.isf(tail, groups - 1)) * found["drop_se"]
        kind = "cluster_t" if groups < len(d) else "ratio_t"
        return {"interval": kind, "drop_ci": [found["drop"] - width, found["drop"] + width]}
    d_sums: Array = np.bincount(clusters, d).astype(np.float64)
    b_sums: Array = np.bincount(clusters, b).astype(np.float64)
    return {"interval": "bootstrap", "drop_ci": bootstrap(name, d_sums, b_sums, confidence)}


def pair(name: str, base: Sequence[ItemRecord], items: Sequence[ItemRecord]) -> list[ItemRecord]:
    """The records of `base` of the same items, in the order of `items`: by hash, equal hashes by item number as well.

    Raises:
        BadInput: one of `items` is not in `base`, or is another one.
    """
    times = Counter(item["hash"] for item in base)
    there = {_key(item, times): item for item in base}
    for item in items:
        if _key(item, times) not in there:
            raise BadInput(
                f"task {name}: item {item['item']} (hash {item['hash']}) was not measured at step 0, so there is "
                "nothing to compare it with: the task's data have changed since; put them back, or use another run_dir"
            )
    return [there[_key(item, times)] for item in items]


def _key(item: ItemRecord, times: Counter[str]) -> tuple[str, int]:
    return item["hash"], item["item"] if times[item["hash"]] > 1 else -1


def mcnemar_midp(b: int, c: int) -> float:
    """Two-sided p of b against c discordant pairs: 2 P(X <= k) - P(X = k), X ~ Bin(b + c, 1/2), k the smaller one."""
    n, k = b + c, min(b, c)
    return 1.0 if b == c else float(2 * stats.binom.cdf(k, n, 0.5) - stats.binom.pmf(k, n, 0.5))


def adjusted_wald(b: int, c: int, n: int) -> tuple[float, float]:
    """(centre, SE) for the interval of (b - c) / n, b worse and c better of n pairs (Bonett & Price 2012): one more of
    each is added, so that it stays honest when few or no items flip."""
    worse, better = (b + 1) / (n + 2), (c + 1) / (n + 2)
    return worse - better, math.sqrt((worse + better - (worse - better) ** 2) / (n + 2))


def two_sided_p(drop: float, se: float, degrees: int) -> float:
    """p of drop / SE under t; of an SE of 0, that of a drop that is the same in all items: 1 if that is 0, else 0."""
    if se == 0:
        return 1.0 if drop == 0 else 0.0
    return float(2 * stats.t.sf(abs(drop) / se, degrees))


def bootstrap(name: str, d: Array, b: Array, confidence: float) -> list[float]:
    """Percentile interval of sum(d) / sum(b), the pairs (d_i, b_i) resampled; the seed is a function of the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

    def ratio(d: Array, b: Array, axis: int = -1) -> Array:
        return np.asarray(d.sum(axis) / b.sum(axis))

    interval = stats.bootstrap(
        (d, b), ratio, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=max(1, 1_000_000 // len(d)),
        confidence_level=confidence, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return [float(interval.low), float(interval.high)]


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Adjusted p (Holm 1979): the probability of one false finding or more is at most that; None stays None."""
    known = sorted((p, at) for at, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, at) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[at] = largest
    return adjusted


def benjamini_hochberg(ps: Sequence[float | None]) -> list[float | None]:
    """q values: the share of false ones among what is found at a q up to this one; None stays None."""
    known = [p for p in ps if p is not None]
    adjusted = iter(stats.false_discovery_control(known).tolist() if known else [])
    return [None if p is None else float(next(adjusted)) for p in ps]


def chance(kind: str, metric: str, items: Sequence[ItemRecord], declared: float | None) -> float | None:
    """The score of a model that knows nothing: 1 / choices of these items; what the task declares; 8 bits a byte."""
    if kind == "multiple_choice":
        return sum(1 / len(item["choice_logprobs"]) for item in items) / len(items)
    if declared is not None:
        return declared
    return {"bits_per_byte": 8.0, "exact_match": 0.0}.get(metric)


def retention_ratio(now: float | None, base: float | None, chance: float | None, base_se: float | None) -> float | None:
    """(now - chance) / (base - chance): 1 is all kept, 0 all lost. None where base is not above chance by 2 SE."""
    if now is None or base is None or chance is None or base_se is None:
        return None
    above = base - chance
    return None if above == 0 or abs(above) < 2 * base_se else (now - chance) / above


def smallest_drop(
    metric: str, sizes: Sequence[float], clusters: int | None = None, confidence: float = 0.95
) -> tuple[float, str]:
    """The smallest drop that a task finds with 80 % power, before anything is measured, and the assumption in words.

    sizes: bytes or tokens of each text, 1 for each question. Of accuracies, with flips D: k sqrt(D / n) / sqrt(1 + k² /
    n) (McNemar); of texts k · spread / sqrt(n'), n' = sum(sizes)² / sum(sizes²). k = z(confidence) + z(power) = 2.80.
    """
    k = float(stats.norm.isf((1 - confidence) / 2) + stats.norm.ppf(POWER))
    n = sum(sizes) ** 2 / sum(size * size for size in sizes)
    if clusters is not None and clusters < len(sizes):
        n /= 1 + (len(sizes) / clusters - 1) * ASSUMED_ICC  # design effect
    if is_higher_better(metric):
        return k * math.sqrt(ASSUMED_FLIPS / n) / math.sqrt(1 + k * k / n), f"if {ASSUMED_FLIPS:.0%} of the items flip"
    return k * ASSUMED_SPREAD / math.sqrt(n), f"if the change differs by {ASSUMED_SPREAD} from text to text"


def finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _sums(kind: str, metric: str, items: Sequence[ItemRecord]) -> tuple[Array, Array]:
    """(a, b) of each item, of which the score is sum(a) / sum(b)."""
    if kind == "text":
        b = [item["n_bytes"] if metric == "bits_per_byte" else item["n_tokens"] for item in items]
        unit = math.log(2) if metric == "bits_per_byte" else 1.0
        return np.array([-item["logprob"] / unit for item in items], np.float64), np.array(b, np.float64)
    if kind == "multiple_choice":
        a = [float(choose(item, metric) == item["gold"]) for item in items]
    elif kind == "generate":
        a = [float(item["correct"]) for item in items]
    else:
        a = [float(item["value"]) for item in items]
    return np.array(a, np.float64), np.ones(len(items))


def choose(item: ItemRecord, metric: str) -> int:
    """The choice of the highest log-likelihood (acc), or of that over its characters (acc_norm); first of equals."""
    values = np.array(item["choice_logprobs"])
    return int(np.argmax(values / np.array(item["choice_chars"]) if metric == "acc_norm" else values))


def _extra(kind: str, metric: str, items: Sequence[ItemRecord]) -> dict[str, Any]:
    if kind == "multiple_choice":
        other = "acc" if metric == "acc_norm" else "acc_norm"
        return {other: float(_sums(kind, other, items)[0].mean())}
    if kind != "text":
        return {}
    tokens = sum(item["n_tokens"] for item in items)
    loss = -sum(item["logprob"] for item in items) / tokens
    hits = sum(item["n_correct"] for item in items)
    perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else None
    return {"loss": finite(loss), "perplexity": perplexity, "tokens": tokens, "token_accuracy": hits / tokens}


def _is_binary(metric: str, before: Array, now: Array) -> bool:
    return is_share(metric) and bool(np.isin(np.concatenate([before, now]), (0.0, 1.0)).all())


def _clusters(items: Sequence[ItemRecord]) -> NDArray[np.int64]:
    """A number from 0 for each item, equal where they share a `cluster`; an item without one is its own."""
    numbers: dict[Any, int] = {}
    names = [("item", at) if item.get("cluster") is None else item["cluster"] for at, item in enumerate(items)]
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def _standard_error(a: Array, b: Array, clusters: NDArray[np.int64]) -> float | None:
    residuals = np.bincount(clusters, a - a.sum() / b.sum() * b)
    groups = len(residuals)
    if groups < 2:
        return None
    return finite(math.sqrt(groups / (groups - 1) * float(residuals @ residuals)) / b.sum())
