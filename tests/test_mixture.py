"""How often each set is seen, where in the run, and that what is told of it is what the batches hold."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import chats, write_jsonl
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fullft.data.batches import Batches, Geometry
from fullft.data.mixture import Mixture, mix
from fullft.data.training import build_batches, open_data
from fullft.errors import BadInput
from fullft.loss import IGNORE
from fullft.recipe import Data, Recipe, TrainingSource

TOKENS = 100  # of each sequence, where nothing else is said


def mixed(
    *sets: tuple[int, dict[str, Any]], epochs: float = 1.0, positions: int | None = None, tokens: int = TOKENS
) -> Mixture:
    """A mixture of sets of so many sequences, with these settings."""
    sources = [TrainingSource.model_validate({"path": "x"} | settings) for _, settings in sets]
    names = [f"set{at}" for at in range(len(sets))]
    return mix(sources, names, [(count, count * tokens) for count, _ in sets], epochs, positions)


def stream(mixture: Mixture, number: int) -> list[tuple[int, int]]:
    which, before = mixture.at(0, number)
    return list(zip(which.tolist(), before.tolist(), strict=True))


def share(mixture: Mixture, of_set: int, positions: int) -> float:
    return sum(which == of_set for which, _ in stream(mixture, positions)) / positions


def random_mixture(seed: int) -> Mixture:
    """Any number of sets with weights and fractions, for an epoch or for given positions."""
    draw = random.Random(seed)
    sets: list[tuple[int, dict[str, Any]]] = [(draw.randint(1, 400), {}) for _ in range(draw.randint(1, 6))]
    for _, settings in sets:
        settings |= draw.choice([{}, {"weight": draw.choice([0.25, 0.3, 2, 7.5])}])
    sets += [(draw.randint(1, 400), {"fraction": draw.choice([0.01, 0.1, 0.3])}) for _ in range(draw.randint(0, 2))]
    return mixed(*sets, epochs=draw.choice([0.5, 1, 3]), positions=draw.choice([None, draw.randint(1, 3000)]))


# Which set comes where


@pytest.mark.parametrize("seed", range(30))
def test_any_part_of_the_stream_is_the_same_however_it_is_asked_for(seed: int) -> None:
    mixture, draw = random_mixture(seed), random.Random(seed)
    whole = stream(mixture, 1500)
    cuts = sorted({0, 1500, *(draw.randrange(1500) for _ in range(draw.randint(1, 40)))})
    parts = [mixture.at(start, end - start) for start, end in itertools.pairwise(cuts)]
    draw.shuffle(parts)  # nothing is remembered between calls
    assert [mixture.at(start, end - start)[0].tolist() for start, end in itertools.pairwise(cuts)] == [
        [which for which, _ in whole[start:end]] for start, end in itertools.pairwise(cuts)
    ]
    assert sorted(pair for which, before in parts for pair in zip(which.tolist(), before.tolist(), strict=True)) == (
        sorted(whole)
    )


@pytest.mark.parametrize("seed", range(30))
def test_each_set_is_counted_without_a_gap_and_as_told(seed: int) -> None:
    mixture = random_mixture(seed)
    count: Counter[int] = Counter()
    for position, (which, before) in enumerate(stream(mixture, 800)):
        if position % 97 == 0:
            seen = [count[at] / size for at, size in enumerate(mixture.counts)]
            assert mixture.seen(position) == pytest.approx(seen)
        assert before == count[which]
        count[which] += 1


def test_far_in_a_long_run_positions_are_still_exact() -> None:
    """A billion sequences, rates that are not small."""
    for mixture in (
        mixed((123_456_789, {}), (987_654_321, {"weight": 0.3})),
        mixed((10**8, {}), (7, {"fraction": 1e-4})),
    ):
        first = 1_000_000_000
        which, before = mixture.at(first, 5000)
        told = [epochs * size for epochs, size in zip(mixture.seen(first), mixture.counts, strict=True)]
        count = Counter({at: round(one) for at, one in enumerate(told)})
        for one, earlier in zip(which.tolist(), before.tolist(), strict=True):
            assert earlier == count[one]
            count[one] += 1


def furthest(mixture: Mixture, positions: int) -> float:
    """How far the sequences of a set are from its share, at the worst position."""
    which, _ = mixture.at(0, positions)
    ideal = numpy.arange(1, positions + 1) / sum(mixture.rates)
    return max(float(abs(numpy.cumsum(which == at) - ideal * rate).max()) for at, rate in enumerate(mixture.rates))


@pytest.mark.parametrize("seed", range(20))
def test_two_sets_have_their_shares_within_one_sequence_after_any_number(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [(draw.randint(1, 300), {"weight": draw.choice([0.1, 0.5, 1, 3])}) for _ in range(2)]
    assert furthest(mixed(*sizes), 2000) <= 1


@pytest.mark.parametrize("sets", [3, 8, 30])
def test_many_sets_are_spread_over_the_run(sets: int) -> None:
    draw = random.Random(sets)
    for _ in range(10):
        assert furthest(mixed(*((draw.randint(1, 200), {}) for _ in range(sets))), 1500) < 6


# Weights and epochs


@pytest.mark.parametrize("sizes", [(1,), (7,), (1, 1), (5, 13), (40, 3, 17), (100, 1, 1, 1, 60)])
def test_without_weights_every_sequence_comes_once_in_each_epoch(sizes: tuple[int, ...]) -> None:
    mixture = mixed(*((size, {}) for size in sizes), epochs=3)
    assert mixture.epoch == sum(sizes)
    assert mixture.total == 3 * sum(sizes)
    found = stream(mixture, mixture.total)
    for epoch in range(3):
        part = found[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]
        expected = [(at, epoch * size + one) for at, size in enumerate(sizes) for one in range(size)]
        assert sorted(part) == expected
    assert mixture.seen(mixture.total) == [3.0] * len(sizes)


@pytest.mark.parametrize("positions", [None, 220])
def test_a_weight_is_how_often_a_set_is_seen_in_an_epoch(positions: int | None) -> None:
    mixture = mixed((20, {}), (30, {"weight": 2}), (60, {"weight": 0.5}), epochs=2, positions=positions)
    assert mixture.epoch == 20 + 60 + 30
    assert mixture.total == 220
    assert mixture.seen(110) == [1, 2, 0.5]
    assert mixture.seen(220) == [2, 4, 1]


@pytest.mark.parametrize("weight", [0.001, 0.0004, 0.00012345, 1e-6])
def test_a_small_weight_still_counts(weight: float) -> None:
    """A hundred million rows of web text with a small weight are the usual case, and not none of them."""
    mixture = mixed((100_000_000, {"weight": weight}), (10_000, {}))
    expected = 100_000_000 * weight
    assert mixture.total == pytest.approx(10_000 + expected, abs=1)
    seen = mixture.seen(mixture.total)
    assert seen[0] * 100_000_000 == pytest.approx(expected, rel=1e-3, abs=2)
    assert seen[1] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("weight", [0.4, 0.0004, 1.0005, 3.14159])
def test_the_weight_of_a_set_alone_is_its_epochs(weight: float) -> None:
    mixture = mixed((10_000, {"weight": weight}))
    assert mixture.total == pytest.approx(10_000 * weight, abs=1)
    assert stream(mixture, 3) == [(0, 0), (0, 1), (0, 2)]


def test_a_weight_with_many_digits_is_kept() -> None:
    mixture = mixed((1_000_000, {"weight": 1.00049}), (1_000_000, {}))
    assert mixture.seen(mixture.total) == pytest.approx([1.00049, 1], abs=2e-6)


@pytest.mark.parametrize("epochs", [0.25, 0.5, 1.5, 2.75])
def test_parts_of_an_epoch(epochs: float) -> None:
    mixture = mixed((40, {}), (80, {"weight": 2}), epochs=epochs)
    assert mixture.total == 200 * epochs
    assert mixture.seen(mixture.total) == pytest.approx([epochs, 2 * epochs], abs=1 / 40)


# Fractions


@pytest.mark.parametrize("positions", [None, 1000])
@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.9])
def test_a_fraction_is_a_share_of_all_tokens(fraction: float, positions: int | None) -> None:
    """Whatever its size, and also where its sequences are shorter than those of the others."""
    sources = [TrainingSource(path="x"), TrainingSource(path="y", fraction=fraction)]
    for count, each in ((50, 2000), (700, 300), (3, 2000)):
        mixture = mix(sources, ["x", "y"], [(400, 400 * 2000), (count, count * each)], 1.0, positions)
        number = mixture.total
        assert positions is None or number == positions
        seen = mixture.seen(number)
        tokens = [seen[0] * 400 * 2000, seen[1] * count * each]
        # Within one sequence of either set.
        assert tokens[1] == pytest.approx(fraction * sum(tokens), abs=2001)
        if positions is None:
            assert seen[0] == pytest.approx(1, abs=1 / 400)


def test_fractions_of_all_sets_make_an_epoch_of_as_many_tokens_as_there_are() -> None:
    mixture = mixed((100, {"fraction": 0.75}), (300, {"fraction": 0.25}))
    assert mixture.total == 400
    assert mixture.seen(400) == pytest.approx([3, 1 / 3], abs=0.01)


def test_weights_and_fractions_together() -> None:
    mixture = mixed((100, {}), (50, {"weight": 2}), (10, {"fraction": 0.2}), (1000, {"fraction": 0.3}), epochs=2)
    assert mixture.total == 800
    assert [share(mixture, at, 800) for at in range(4)] == pytest.approx([0.25, 0.25, 0.2, 0.3], abs=0.005)
    assert mixture.seen(800) == pytest.approx([2, 4, 16, 0.24], abs=0.1)


# Caps


def test_in_a_run_of_epochs_a_capped_set_is_seen_so_often_and_no_more() -> None:
    mixture = mixed((100, {}), (50, {"max_epochs": 1}), epochs=3)
    assert mixture.total == 350
    assert mixture.seen(350) == pytest.approx([3, 1], abs=1 / 50)
    assert mixture.seen(350)[1] <= 1


def test_in_a_run_of_steps_the_share_of_a_capped_set_goes_to_the_others_in_proportion() -> None:
    mixture = mixed((100, {}), (100, {"weight": 2}), (100, {"max_epochs": 0.5}), positions=650)
    assert mixture.total == 650
    assert mixture.seen(650) == pytest.approx([2, 4, 0.5], abs=0.02)


def test_a_replay_set_too_small_for_its_fraction_is_capped() -> None:
    free, capped = (mixed((900, {}), (10, {"fraction": 0.25} | cap), positions=1200) for cap in ({}, {"max_epochs": 2}))
    assert free.seen(1200)[1] == pytest.approx(30, abs=0.1)
    assert capped.seen(1200)[1] == pytest.approx(2, abs=0.1)
    assert capped.seen(1200)[0] == pytest.approx(1180 / 900, abs=0.01)


def test_a_cap_binds_another_set_when_the_share_of_the_first_is_handed_on() -> None:
    mixture = mixed((100, {"max_epochs": 1}), (100, {"max_epochs": 2}), (100, {}), positions=750)
    assert mixture.seen(750) == pytest.approx([1, 2, 4.5], abs=0.02)


def test_a_cap_above_what_is_asked_changes_nothing() -> None:
    capped, free = (mixed((100, cap), (30, {}), epochs=2) for cap in ({"max_epochs": 5}, {}))
    assert stream(capped, 260) == stream(free, 260)


@pytest.mark.parametrize("positions", [301, 10_000])
def test_caps_that_leave_too_little_are_refused_with_numbers(positions: int) -> None:
    with pytest.raises(BadInput, match=rf"needs {positions:,} sequences.*\(set0 2, set1 1\).*give 300; raise max_ep"):
        mixed((100, {"max_epochs": 2}), (100, {"max_epochs": 1}), positions=positions)
    assert mixed((100, {"max_epochs": 2}), (100, {"max_epochs": 1}), positions=300).seen(300) == pytest.approx(
        [2, 1], abs=0.02
    )


@pytest.mark.parametrize("seed", range(200))
def test_no_cap_is_exceeded_and_no_sequence_of_a_plain_set_is_lost(seed: int) -> None:
    """To the sequence, also when the last step is filled up to a whole one."""
    draw = random.Random(seed)
    sets: list[tuple[int, dict[str, Any]]] = [(draw.randint(1, 2000), {}) for _ in range(draw.randint(1, 4))]
    weighted = {"weight": draw.choice([0.3, 2.5]), "max_epochs": draw.choice([0.7, 1, 1.3])}
    replayed = {"fraction": draw.choice([0.1, 0.3, 0.5]), "max_epochs": draw.choice([0.55, 1, 2, 4])}
    sets += [(draw.randint(2, 2000), replayed), *([(draw.randint(2, 2000), weighted)] * draw.randint(0, 1))]
    epochs, size = draw.choice([1, 1, 3]), draw.choice([1, 8, 64])
    for positions in (None, -(-mixed(*sets, epochs=epochs).total // size) * size):
        mixture = mixed(*sets, epochs=epochs, positions=positions)
        assert positions is None or mixture.total == positions
        found = Counter(which for which, _ in stream(mixture, mixture.total))
        for at, (count, settings) in enumerate(sets):
            if cap := settings.get("max_epochs"):
                assert found[at] <= cap * count
            elif positions is None:
                assert found[at] == epochs * count
            else:
                assert found[at] >= epochs * count


def test_a_cap_below_one_sequence_of_the_only_set_is_refused() -> None:
    with pytest.raises(BadInput, match="not one whole sequence"):
        mixed((1, {"max_epochs": 0.5}))


# What a recipe may say


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weight and fraction": ({"train": [{"path": "a", "weight": 2, "fraction": 0.1}, "b"]}, "not both"),
    "replay without fraction": ({"train": "a", "replay": ["b"]}, "replay.0: needs a fraction"),
    "replay with a weight": ({"train": "a", "replay": [{"path": "b", "weight": 0.1}]}, "replay.0: needs a fraction"),
    "fraction of 1": ({"train": "a", "replay": [{"path": "b", "fraction": 1}]}, "less than 1"),
    "fraction of 0": ({"train": "a", "replay": [{"path": "b", "fraction": 0}]}, "greater than 0"),
    "fractions leave nothing": (
        {"train": "a", "replay": [{"path": "b", "fraction": 0.5}, {"path": "c", "fraction": 0.5}]}, "sum to 1:",
    ),
    "fractions above 1": (
        {"train": "a", "replay": [{"path": "b", "fraction": 0.8}, {"path": "c", "fraction": 0.5}]}, "sum to 1.3",
    ),
    "all have fractions below 1": (
        {"train": {"path": "a", "fraction": 0.5}, "replay": [{"path": "b", "fraction": 0.4}]}, "instead of 1",
    ),
    "one set with a fraction": ({"train": {"path": "a", "fraction": 0.5}}, "instead of 1"),
    "weight of 0": ({"train": {"path": "a", "weight": 0}}, "greater than 0"),
    "negative weight": ({"train": {"path": "a", "weight": -1}}, "greater than 0"),
    "weight without end": ({"train": {"path": "a", "weight": float("inf")}}, "finite"),
    "weight that is no number": ({"train": {"path": "a", "weight": float("nan")}}, "weight"),
    "cap of 0": ({"train": {"path": "a", "max_epochs": 0}}, "greater than 0"),
    "no set": ({"train": []}, "at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_shares_that_make_no_sense_are_refused(case: str) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(ValidationError, match=re.escape(reason)):
        Data.model_validate(data)


def test_every_set_has_its_own_name() -> None:
    train: list[Any] = ["x/a.jsonl", "y/a.jsonl", "a.json", {"path": "b.jsonl", "name": "a"}, "owner/a", "d/*.jsonl",
                        "e/*.jsonl", {"path": "c", "name": "c.d"}, "weird näme (1).jsonl", "/"]  # fmt: skip
    data = Data.model_validate({"train": train, "replay": [{"path": "z/a.jsonl", "fraction": 0.1}]})
    assert len(set(data.names)) == len(data.names) == 11
    assert all(re.fullmatch(r"[A-Za-z0-9_.#-]+", name) for name in data.names)
    assert data.names[0] == "a"
    assert data.names[7] == "c.d"


def test_a_hub_name_with_a_dot_is_a_name_in_full() -> None:
    assert Data.model_validate({"train": "owner/chats-2.5"}).names == ["chats-2.5"]


# The batches of real sets


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


Build = Callable[..., Batches]


@pytest.fixture(scope="module")
def build(tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(first, second, …: settings of sets of 40, 23, 9, 9 … rows; data=…, train=…, size, world, micro, seed)."""
    folder = tmp_path_factory.mktemp("mixture")
    rows = chats(400)

    def batches(
        *sets: dict[str, Any], size: int = 6, world: int = 1, micro: int = 1, seed: int = 0, data: Any = None,
        train: Any = None, replay: dict[str, Any] | None = None,
    ) -> Batches:  # fmt: skip
        counts = [40, 23, *[9] * 40]
        starts = [0, *itertools.accumulate(counts)]
        described = []
        for at, settings in enumerate([*sets, *([replay] if replay else [])]):
            file = write_jsonl(folder / f"set{at}.jsonl", rows[starts[at] : starts[at + 1]])
            described.append({"path": str(file)} | settings)
        section = {"train": described[: len(sets)], "replay": described[len(sets) :], "sequence_length": 128}
        recipe = Recipe.model_validate(
            {
                "run_dir": str(folder / "run"), "model": {"path": str(tiny_model)}, "data": section | (data or {}),
                "train": {"global_batch_size": size} | (train or {}), "tracking": {"wandb": "disabled"},
            }
        )  # fmt: skip
        opened, _ = open_data(recipe, tokenizer)
        return build_batches(recipe, opened, Geometry(size, micro, size // (micro * world), world, seed))[0]

    return batches


THREE: list[dict[str, Any]] = [{}, {"weight": 2}, {"weight": 0.5}]


def sequences_of(which: Batches, steps: int) -> list[tuple[int, int]]:
    return [one for step in range(steps) for one in which.sequences_of_step(step)]


def held(which: Batches, step: int) -> list[tuple[tuple[int, int], ...]]:
    """(id, label) of each sequence in a global batch, in the order of micro-steps and ranks; padding cut off."""
    geometry = which.geometry
    by_rank = [list(which.of_step(step, rank)) for rank in range(geometry.world_size)]
    found = []
    for micro_step in range(geometry.accumulation):
        for rank in range(geometry.world_size):
            batch = by_rank[rank][micro_step]
            for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
                end = max(at for at, token in enumerate(ids) if token) + 1
                assert all(label == IGNORE for label in labels[end:])
                found.append(tuple(zip(ids[:end], labels[:end], strict=True)))
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world", "micro"), [(1, 2), (1, 6), (2, 1), (2, 3), (3, 1), (3, 2)])
def test_several_sets_give_the_same_global_batches_on_any_number_of_ranks(
    build: Build, packing: bool, world: int, micro: int
) -> None:
    replay = {"fraction": 0.2}
    alone = build(*THREE, replay=replay, data={"packing": packing})
    shared = build(*THREE, replay=replay, data={"packing": packing}, world=world, micro=micro)
    for step in (0, 1, 7, 30, 31, 1000):
        assert shared.sequences_of_step(step) == alone.sequences_of_step(step)
        assert held(shared, step) == held(alone, step)
        assert len(held(alone, step)) == 6


def test_a_batch_is_a_pure_function_of_seed_and_step(build: Build) -> None:
    settings: dict[str, Any] = {"data": {"packing": False}, "replay": {"fraction": 0.3}}
    steps = list(range(40))
    in_order = [
        build_step for which in [build(*THREE, **settings)] for build_step in map(which.sequences_of_step, steps)
    ]
    random.Random(0).shuffle(steps)
    other = build(*THREE, **settings)
    assert all(other.sequences_of_step(step) == in_order[step] for step in steps)
    resumed = build(*THREE, **settings)
    assert resumed.sequences_of_step(27) == in_order[27]
    assert held(resumed, 27) == held(other, 27)
    seeded = build(*THREE, **settings, seed=1)
    assert [seeded.sequences_of_step(step) for step in range(5)] != in_order[:5]


@pytest.mark.parametrize("packing", [True, False])
def test_weights_of_1_2_and_one_half_on_real_sets(build: Build, packing: bool) -> None:
    which = build(*THREE, data={"packing": packing}, size=1)
    counts = [len(one) for one in which.sets]
    two_epochs = round(2 * which.mixture.epoch)
    assert two_epochs == 2 * counts[0] + 4 * counts[1] + counts[2]
    expected = {(at, one): (2, 4, 1)[at] for at, count in enumerate(counts) for one in range(count)}
    assert Counter(sequences_of(which, two_epochs)) == expected


def test_within_each_pass_over_a_set_every_sequence_of_it_comes_once_in_a_new_order(build: Build) -> None:
    which = build(*THREE, data={"packing": False}, size=1)
    passes: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for of_set, sequence in sequences_of(which, 400):
        passes[of_set].append(sequence)
    orders = []
    for of_set, found in passes.items():
        count = len(which.sets[of_set])
        for start in range(0, len(found) - count + 1, count):
            assert sorted(found[start : start + count]) == list(range(count))
            orders.append((of_set, tuple(found[start : start + count])))
    assert len(set(orders)) == len(orders) > 6


def test_sets_of_one_size_are_not_in_the_same_order(build: Build) -> None:
    which = build({}, {}, {}, {}, data={"packing": False}, size=1)
    orders = [tuple(one for of_set, one in sequences_of(which, 81) if of_set == at) for at in (2, 3)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(9))
    assert orders[0] != orders[1]


def real_tokens(which: Batches, steps: int) -> list[int]:
    """Tokens of each set in the batches, from the batches."""
    tokens = [0] * len(which.sets)
    for step in range(steps):
        sequences = which.sequences_of_step(step)
        for (of_set, _), row in zip(sequences, held(which, step), strict=True):
            tokens[of_set] += len(row)
    return tokens


@pytest.mark.parametrize("packing", [True, False])
def test_what_is_told_of_a_step_is_what_its_batches_hold(build: Build, packing: bool) -> None:
    which = build(*THREE, replay={"fraction": 0.3, "name": "general"}, data={"packing": packing}, world=2, micro=1)
    names = [one.tokens.name for one in which.sets]
    assert names == ["set0", "set1", "set2", "general"]
    steps, told = 25, [0.0] * 4
    for step in range(steps):
        account = which.account(step)
        told = [sum_ + account[f"data/{name}/tokens_of_step"] for sum_, name in zip(told, names, strict=True)]
        in_batches = sum(batch.tokens for rank in range(2) for batch in which.of_step(step, rank))
        assert sum(account[f"data/{name}/tokens_of_step"] for name in names) == in_batches
    assert told == real_tokens(which, steps)
    times = Counter(of_set for of_set, _ in sequences_of(which, steps))
    for at, (one, name) in enumerate(zip(which.sets, names, strict=True)):
        assert account[f"data/{name}/epochs"] == pytest.approx(times[at] / len(one))


def lines_of(which: Batches, steps: int) -> list[tuple[float, float]]:
    """(share of the run's tokens, epochs) of each set, as printed."""
    found = []
    for line in which.describe(steps):
        match = re.search(r"; ([\d.]+)% of the run's tokens, ([\d.]+) epochs", line)
        assert match, line
        found.append((float(match[1]) / 100, float(match[2])))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_what_is_told_of_the_run_is_what_its_batches_hold(build: Build, packing: bool) -> None:
    which = build({}, {"weight": 2}, {}, data={"packing": packing}, size=1)
    steps = round(which.mixture.epoch)
    tokens = real_tokens(which, steps)
    assert tokens == [
        weight * one.summary["tokens"] for weight, one in zip((1, 2, 1), which.sets, strict=True)
    ]  # fmt: skip
    told = lines_of(which, steps)
    assert [share for share, _ in told] == pytest.approx([one / sum(tokens) for one in tokens], abs=0.0006)
    assert [epochs for _, epochs in told] == [1, 2, 1]


@pytest.mark.parametrize("steps", [40, 150])
def test_the_fraction_of_a_replay_set_is_what_the_batches_hold(build: Build, steps: int) -> None:
    which = build({}, {}, replay={"fraction": 0.25}, train={"steps": steps})
    tokens = real_tokens(which, steps)
    assert tokens[2] / sum(tokens) == pytest.approx(0.25, abs=0.02)
    assert lines_of(which, steps)[2][0] == pytest.approx(tokens[2] / sum(tokens), abs=0.01)


def test_a_replay_set_is_in_every_step_that_its_share_fills(build: Build) -> None:
    which = build({}, {}, replay={"fraction": 0.4}, size=12)
    for step in range(30):
        assert 3 <= sum(of_set == 2 for of_set, _ in which.sequences_of_step(step)) <= 7


def test_evenly_spread_sets_do_not_meet_the_same_rank_in_every_step(build: Build) -> None:
    sets = build({}, {}, data={"packing": False}).sets
    even = Batches(sets, Mixture((1, 1), (40, 23), 80, 80), None, Geometry(4, 1, 1, 4, 0))
    first = Counter(even.sequences_of_step(step)[0][0] for step in range(60))
    assert min(first[0], first[1]) > 10


@pytest.mark.parametrize("size", [12, 50])
def test_a_cap_holds_when_the_last_step_is_filled_up(build: Build, size: int) -> None:
    """The sequences that make the last step whole come from a set that may be repeated."""
    which = build({"max_epochs": 1}, {}, data={"packing": False}, size=size)
    steps = -(-which.mixture.total // size)
    times = Counter(sequence for of_set, sequence in sequences_of(which, steps) if of_set == 0)
    assert max(times.values()) == 1


def test_caps_that_leave_too_little_for_the_steps_are_refused(build: Build) -> None:
    with pytest.raises(BadInput, match=r"train\.steps: the run needs 600 sequences, with max_epochs"):
        build({"max_epochs": 1}, {"max_epochs": 2}, train={"steps": 100}, data={"packing": False})


@pytest.mark.parametrize("sets", [10, 24])
def test_the_next_batch_of_many_sets_needs_no_new_shuffle(
    build: Build, sets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffling a set of a million sequences takes 20 ms; once for each sequence of a batch is minutes a step."""
    which = build(*[{}] * sets, data={"packing": False}, size=2 * sets)
    shuffled = 0
    generator = numpy.random.default_rng

    def counted(*arguments: Any) -> numpy.random.Generator:
        nonlocal shuffled
        shuffled += 1
        return generator(*arguments)

    which.sequences_of_step(0)
    monkeypatch.setattr(numpy.random, "default_rng", counted)
    which.sequences_of_step(1)
    assert shuffled <= 2 + sets  # the order of the batch; a set whose next pass begins
    shuffled = 0
    which.sequences_of_step(1)
    assert shuffled <= 2
