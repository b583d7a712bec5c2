"""Scores, standard errors, intervals and p values against scipy, brute force and the stored items of a real run."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEXTS, chats, write_jsonl
from ranks import Ranks
from scipy import stats as scipy_stats

from fullft.errors import BadInput
from fullft.retention import stats


def right_or_wrong(answers: list[bool], clusters: list[str] | None = None) -> list[dict[str, Any]]:
    items = [{"item": at, "hash": f"h{at}", "correct": value} for at, value in enumerate(answers)]
    return [item | {"cluster": name} for item, name in zip(items, clusters, strict=True)] if clusters else items


def texts(nats: list[float], sizes: list[int]) -> list[dict[str, Any]]:
    return [
        {"item": at, "hash": f"h{at}", "logprob": -value, "n_tokens": size, "n_correct": 1, "n_bytes": 4 * size}
        for at, (value, size) in enumerate(zip(nats, sizes, strict=True))
    ]


def flips(n: int, worse: int, better: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    base = [True] * worse + [False] * better + [True] * (n - worse - better)
    now = [False] * worse + [True] * better + [True] * (n - worse - better)
    return right_or_wrong(base), right_or_wrong(now)


def test_text_scores_are_ratios_of_sums_with_the_error_of_a_ratio() -> None:
    nats, sizes = [30.0, 8.0, 55.0, 21.0], [10, 4, 17, 9]
    found = stats.score("text", "bits_per_byte", texts(nats, sizes))
    assert found["score"] == pytest.approx(sum(nats) / math.log(2) / (4 * sum(sizes)))
    residuals = [n / math.log(2) - found["score"] * 4 * size for n, size in zip(nats, sizes, strict=True)]
    assert found["se"] == pytest.approx(math.sqrt(4 / 3 * sum(r * r for r in residuals)) / (4 * sum(sizes)))
    assert (found["n"], found["clusters"], found["higher_is_better"]) == (4, 4, False)
    assert found["extra"]["loss"] == pytest.approx(sum(nats) / sum(sizes))
    assert found["extra"]["perplexity"] == pytest.approx(math.exp(sum(nats) / sum(sizes)))
    assert stats.score("text", "loss", texts(nats, sizes))["score"] == found["extra"]["loss"]


def test_the_error_of_a_mean_is_scipys_and_that_of_clusters_is_that_of_their_sums() -> None:
    answers = [True, False, True, True, False, True]
    found = stats.score("generate", "exact_match", right_or_wrong(answers))
    assert found["score"] == pytest.approx(4 / 6)
    assert found["se"] == pytest.approx(scipy_stats.sem(np.array(answers, float)))
    clustered = stats.score("generate", "exact_match", right_or_wrong(answers, ["a", "a", "b", "b", "c", "c"]))
    sums = [sum(answers[at : at + 2]) - 2 * 4 / 6 for at in (0, 2, 4)]
    assert clustered["se"] == pytest.approx(math.sqrt(3 / 2 * sum(value**2 for value in sums)) / 6)
    assert (clustered["n"], clustered["clusters"]) == (6, 3)
    assert stats.score("generate", "exact_match", right_or_wrong([True]))["se"] is None


def test_choices_are_told_by_likelihood_or_by_likelihood_a_character() -> None:
    item = {"item": 0, "hash": "h", "choice_logprobs": [-4.0, -5.0], "choice_chars": [2, 10], "gold": 1}
    tie = item | {"item": 1, "choice_logprobs": [-5.0, -5.0], "choice_chars": [5, 5]}
    found = stats.score("multiple_choice", "acc", [item, tie])
    assert (found["score"], found["extra"]) == (0.0, {"acc_norm": 0.5})
    assert stats.score("multiple_choice", "acc_norm", [item, tie])["score"] == 0.5
    assert stats.chance("multiple_choice", "acc", [item, tie | {"choice_logprobs": [-1.0] * 4}], None) == 0.375


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (7, 2), (3, 11), (40, 40)])
def test_mcnemar_mid_p_by_enumeration(b: int, c: int) -> None:
    # As extreme as seen or more, what is just as extreme counted half.
    n = b + c
    weight = [math.comb(n, k) / 2**n for k in range(n + 1)]
    expected = sum(w * (1 if abs(2 * k - n) > abs(b - c) else 0.5) for k, w in enumerate(weight)
                   if abs(2 * k - n) >= abs(b - c))  # fmt: skip
    assert stats.mcnemar_midp(b, c) == pytest.approx(expected if b != c else 1.0)


def test_a_drop_of_right_or_wrong_items() -> None:
    found = stats.compare("t", "generate", "exact_match", *flips(200, 20, 5))
    assert (found["discordant"], found["drop"]) == ([20, 5], pytest.approx(0.075))
    assert found["p"] == pytest.approx(stats.mcnemar_midp(20, 5))
    d = np.array([1.0] * 20 + [-1.0] * 5 + [0.0] * 175)
    assert found["drop_se"] == pytest.approx(scipy_stats.sem(d))
    assert found["interval"] == "bootstrap"
    low, high = found["drop_ci"]
    assert low == pytest.approx(0.075 - 1.96 * scipy_stats.sem(d), abs=0.006)
    assert high == pytest.approx(0.075 + 1.96 * scipy_stats.sem(d), abs=0.006)
    assert found == stats.compare("t", "generate", "exact_match", *flips(200, 20, 5))  # the seed is the name's
    assert found["visible_drop"] == pytest.approx(2.8016 * found["drop_se"], rel=1e-4)


def test_few_flips_have_an_interval_that_is_not_empty() -> None:
    none = stats.compare("t", "generate", "exact_match", *flips(200, 0, 0))
    assert (none["drop"], none["p"], none["interval"]) == (0.0, 1.0, "adjusted_wald")
    assert none["drop_ci"][0] < -0.01
    assert none["drop_ci"][1] > 0.01


def test_if_every_answer_became_right_the_interval_still_says_how_many_were_asked() -> None:
    for n, low in ((200, -0.971), (20, -0.735)):
        found = stats.compare("t", "generate", "exact_match", *flips(n, 0, n))
        assert (found["drop"], found["interval"], found["drop_ci"][0]) == (-1.0, "adjusted_wald", -1.0)
        assert found["drop_ci"][1] == pytest.approx(low, abs=0.01)


def test_a_drop_of_texts_by_t_below_fifty_and_by_bootstrap_above() -> None:
    rng = np.random.default_rng(1)
    for n, kind in ((20, "ratio_t"), (400, "bootstrap")):
        sizes = [int(size) for size in rng.lognormal(4, 1, n)]
        base = [3.0 * size for size in sizes]
        now = [nats + size * float(rng.normal(0.05, 0.1)) for nats, size in zip(base, sizes, strict=True)]
        found = stats.compare("t", "text", "loss", texts(base, sizes), texts(now, sizes))
        d, b = np.array(now) - np.array(base), np.array(sizes, float)
        assert found["drop"] == pytest.approx(d.sum() / b.sum())
        se = math.sqrt(n / (n - 1) * ((d - found["drop"] * b) ** 2).sum()) / b.sum()
        assert (found["drop_se"], found["test"], found["interval"]) == (pytest.approx(se), "ratio_t", kind)
        assert found["p"] == pytest.approx(2 * scipy_stats.t.sf(abs(found["drop"]) / se, n - 1))
        width = scipy_stats.t.isf(0.025, n - 1) * se
        tolerance = 1e-12 if kind == "ratio_t" else 0.2 * width
        assert found["drop_ci"] == pytest.approx([found["drop"] - width, found["drop"] + width], abs=tolerance)


def test_equal_texts_are_a_t_test_and_clusters_one_over_their_means() -> None:
    rng = np.random.default_rng(2)
    base, now = rng.normal(30, 2, 36), rng.normal(31, 2, 36)
    records = texts(base.tolist(), [10] * 36), texts(now.tolist(), [10] * 36)
    assert stats.compare("t", "text", "loss", *records)["p"] == pytest.approx(scipy_stats.ttest_rel(now, base).pvalue)
    for record, at in product(records, range(36)):
        record[at]["cluster"] = f"passage {at // 3}"
    means = (now - base).reshape(12, 3).mean(1)
    found = stats.compare("t", "text", "loss", *records)
    assert (found["test"], found["interval"]) == ("cluster_t", "cluster_t")
    assert found["p"] == pytest.approx(scipy_stats.ttest_1samp(means, 0).pvalue)
    interval = scipy_stats.ttest_1samp(means / 10, 0).confidence_interval(0.95)
    assert found["drop_ci"] == pytest.approx(list(interval))


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        sizes = [int(size) for size in 1 + rng.lognormal(4, 0.8, 20)]
        now = [size * (3 + float(rng.normal(0.1, 0.05))) for size in sizes]
        found = stats.compare("t", "text", "loss", texts([3.0 * size for size in sizes], sizes), texts(now, sizes))
        covered += found["drop_ci"][0] <= 0.1 <= found["drop_ci"][1]
    assert 0.91 <= covered / 400 <= 0.98


def test_a_subset_is_compared_with_the_same_items_and_a_strange_item_with_nothing() -> None:
    base = right_or_wrong([True, True, False, True])
    found = stats.compare("t", "generate", "exact_match", base, right_or_wrong([False, True, True, True])[:2])
    assert (found["base"], found["drop"]) == (1.0, 0.5)
    with pytest.raises(BadInput, match=r"task t: item 1 \(hash other\) was not measured at step 0"):
        stats.compare("t", "generate", "exact_match", base, [base[0], base[1] | {"hash": "other"}])
    twice = [{"item": 0, "hash": "a", "correct": True}, {"item": 1, "hash": "a", "correct": False}]
    assert stats.pair("t", twice, twice[1:]) == twice[1:]
    with pytest.raises(BadInput, match="bytes or tokens"):
        stats.compare("t", "text", "loss", texts([1.0], [4]), texts([1.0], [5]))


def test_what_is_not_finite_is_unknown() -> None:
    base, now = texts([30.0, 8.0], [10, 4]), texts([math.nan, 8.0], [10, 4])
    found = stats.score("text", "loss", now) | stats.compare("t", "text", "loss", base, now)
    assert (found["score"], found["se"], found["drop"], found["drop_ci"], found["p"]) == (None,) * 5
    json.dumps(found, allow_nan=False)


def test_holm_and_benjamini_hochberg() -> None:
    ps = [0.01, None, 0.04, 0.03]
    assert stats.holm(ps) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert stats.benjamini_hochberg(ps) == [pytest.approx(0.03), None, pytest.approx(0.04), pytest.approx(0.04)]
    assert (stats.holm([]), stats.benjamini_hochberg([None])) == ([], [None])


def test_the_ratio_kept_is_measured_from_chance_and_unknown_for_a_base_at_chance() -> None:
    assert stats.retention_ratio(0.5, 0.75, 0.25, 0.01) == pytest.approx(0.5)
    assert stats.retention_ratio(2.0, 1.0, 8.0, 0.01) == pytest.approx(6 / 7)  # bits per byte
    assert stats.retention_ratio(0.3, 0.27, 0.25, 0.02) is None
    assert stats.retention_ratio(0.3, 0.27, None, 0.02) is None


def test_the_smallest_drop_that_is_seen() -> None:
    # forgetting: 1,000 questions of which a tenth flips show 2.8 points; simulated, that drop is found in 80 %
    drop, assumed = stats.smallest_drop("acc", [1] * 1000)
    assert (drop, "10%" in assumed) == (pytest.approx(0.028, abs=5e-4), True)
    rng = np.random.default_rng(4)
    found = [
        stats.mcnemar_midp(int(worse), int(better)) < 0.05
        for worse, better, _ in rng.multinomial(1000, [0.05 + drop / 2, 0.05 - drop / 2, 0.9], 2000)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
    assert stats.smallest_drop("acc", [1] * 1000, clusters=50)[0] > 1.3 * drop
    assert stats.smallest_drop("bits_per_byte", [100] * 400)[0] == pytest.approx(2.8016 * 0.05 / 20, rel=1e-4)


@pytest.fixture(scope="module")
def run_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 ranks with a chat, a text and an answer task, at a rate that does harm."""
    folder = tmp_path_factory.mktemp("run")
    lines = [{"text": f"{text} {at}"} for at, text in enumerate(TEXTS * 3)]
    tasks = [
        {"name": "texts", "kind": "text", "data": str(write_jsonl(folder / "texts.jsonl", lines))},
        {"name": "answers", "kind": "generate", "data": str(write_jsonl(folder / "prompts.jsonl", chats(5))),
         "max_new_tokens": 6},
    ]  # fmt: skip
    recipe = {
        "run_dir": str(folder / "run"), "model": {"path": str(tiny_model)},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", chats(40))), "sequence_length": 128,
                 "validation": str(write_jsonl(folder / "held-out.jsonl", chats(60)[40:]))},
        "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2, "warmup_steps": 0},
        "retention": {"every_steps": 2, "tasks": tasks}, "tracking": {"wandb": "disabled"}, "export": {"dtype": "fp32"},
    }  # fmt: skip
    with Ranks(recipe) as ranks:
        assert ranks.codes() == [0, 0], ranks.output
    return folder / "run"


def records(run_folder: Path, step: int, task: str) -> list[dict[str, Any]]:
    file = run_folder / f"retention/items/step-{step:08d}.{task}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.ranks
def test_every_number_of_an_evaluation_is_made_of_its_item_files(run_folder: Path) -> None:
    for step in (0, 2, 4):
        stored = json.loads((run_folder / f"retention/step-{step:08d}.json").read_text())
        assert (stored["step"], stored["look"], stored["looks_planned"], stored["whole"]) == (step, step // 2, 2, True)
        for name, task in stored["tasks"].items():
            now, base = records(run_folder, step, name), records(run_folder, 0, name)
            again = stats.score(task["kind"], task["metric"], now)
            again |= stats.compare(name, task["kind"], task["metric"], base, now)
            if step == 0:
                again |= {"drop": 0.0, "drop_se": 0.0, "drop_ci": [0.0, 0.0], "p": 1.0, "visible_drop": None}
            chance = stats.chance(task["kind"], task["metric"], now, None)
            base_score = stats.score(task["kind"], task["metric"], base)
            again |= {"chance": chance}
            again |= {"retention": stats.retention_ratio(task["score"], task["base"], chance, base_score["se"])}
            assert {key: task[key] for key in again} == again
            assert task["base"] == base_score["score"]
        kept = {name: task for name, task in stored["tasks"].items() if task["measures"] == "retention"}
        assert set(kept) == {"texts", "answers"}
        assert [task["p_holm"] for task in kept.values()] == stats.holm([task["p"] for task in kept.values()])
        every = stored["tasks"].values()
        assert [task["q"] for task in every] == stats.benjamini_hochberg([task["p"] for task in every])
        drops = [task["drop"] for task in kept.values()]
        assert stored["summary"]["average_forgetting"] == pytest.approx(sum(drops) / 2)
        assert stored["summary"]["bwt"] == pytest.approx(-sum(drops) / 2)
        assert stored["summary"]["worst"]["drop"] == max(drops)
        assert stored["summary"]["skill"]["validation"]["gain"] == pytest.approx(-stored["tasks"]["validation"]["drop"])
        assert stored["summary"]["retention_mean"] is None or stored["tasks"]["texts"]["retention"] is not None


@pytest.mark.ranks
def test_the_suite_and_the_rows_of_metrics_tell_the_same(run_folder: Path) -> None:
    last = json.loads((run_folder / "retention/step-00000004.json").read_text())
    row = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    texts_now = last["tasks"]["texts"]
    assert row["retention/texts/bits_per_byte"] == texts_now["score"]
    assert [row[f"retention/texts/drop{end}"] for end in ("", "_lo", "_hi")] == [
        texts_now["drop"],
        *texts_now["drop_ci"],
    ]
    assert row["retention/texts/ratio"] == texts_now["retention"]
    assert row["eval/drop"] == last["tasks"]["validation"]["drop"]
    assert row["retention/worst"] == last["summary"]["worst"]["drop"]
    suite = json.loads((run_folder / "retention/suite.json").read_text())
    assert (suite["looks_planned"], suite["confidence"]) == (2, 0.95)
    assert suite["limits"] == {"texts": 0.02, "answers": 0.02}
    assert {name: task["n"] for name, task in suite["tasks"].items()} == {"validation": 20, "texts": 12, "answers": 5}
