"""`fullft report`: what it says of a run, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import evaluation, task, write_run

from fullft import cli
from fullft.recipe import Gate
from fullft.report.runlog import thin
from fullft.report.summary import before_after, summary, summary_lines, table, write_report
from fullft.report.tables import comparison, task_table
from fullft.report.wording import bound, change, plane, shown, verdict, with_error
from fullft.retention.gate import decide
from fullft.retention.stats import is_share
from fullft.retention.sweep import point

DONE = {"status": "done", "step": 300}


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (41.23, 1.34, "+41.2 ± 1.3"),
        (2.13, 0.38, "+2.1 ± 0.4"),
        (-0.0341, 0.0132, "−0.034 ± 0.013"),
        (412.3, 96.0, "+412 ± 96"),
        (1.0, 0.2, "+1.00 ± 0.20"),
        (0.00012, 0.00005, "+0.00012 ± 0.00005"),
        (-0.001, 1.4, "+0.0 ± 1.4"),  # no −0.0
        (3.9123, None, "+3.91"),
        (0.0, 0.0, "+0.0 ± 0"),
        (50.0, 0.0, "+50.0 ± 0"),
    ],
)
def test_a_number_has_the_digits_that_its_error_leaves(value: float, half: float | None, text: str) -> None:
    assert with_error(value, half, sign=True) == text


def test_shares_are_shown_in_points() -> None:
    shares = (
        "acc",
        "acc_norm",
        "exact_match",
        "token_accuracy",
        "f1",
        "em",
        "mc2",
        "pass@1",
        "exact_match,strict-match",
    )
    assert all(map(is_share, shares))
    assert not any(map(is_share, ("loss", "bits_per_byte", "perplexity", "bleu", "accept", "match_length")))
    assert shown("acc", 0.1234) == "12.3%"
    assert shown("loss", None) == shown("loss", float("nan")) == "–"
    assert (bound(2.0), bound(0.05)) == ("2.0", "0.05")


SKILL = task("exact_match", "skill", 0.123, 0.412, 1319, 0.013)
LIMITED: dict[str, Any] = {"metric": "acc", "measures": "retention", "base": 0.65, "n": 2000, "limit": 0.02}
SENTENCES: list[tuple[str, dict[str, Any], str, str]] = [
    ("loss above the limit", {"gsm8k": SKILL, "general": task(gain=-0.025, half=0.0038, **LIMITED)}, "bad",
     "Gained +41.2 ± 1.3 points on gsm8k; lost 2.5 ± 0.4 points on general: real, above the limit of 2.0."),
    ("its interval reaches below the limit", {"gsm8k": SKILL, "general": task(gain=-0.021, half=0.004, **LIMITED)},
     "bad",
     "Gained +41.2 ± 1.3 points on gsm8k; lost 2.1 ± 0.4 points on general: real, above the limit of 2.0, though the "
     "interval reaches below it."),
    ("loss within the limit", {"gsm8k": SKILL, "general": task(gain=-0.008, half=0.004, **LIMITED)}, "mixed",
     "Gained +41.2 ± 1.3 points on gsm8k; lost 0.8 ± 0.4 points on general: real, within the limit of 2.0."),
    ("within, but not surely", {"gsm8k": SKILL, "general": task(gain=-0.018, half=0.004, **LIMITED)}, "mixed",
     "Gained +41.2 ± 1.3 points on gsm8k; lost 1.8 ± 0.4 points on general: real, within the limit of 2.0, though the "
     "interval reaches above it."),
    ("nothing lost", {"gsm8k": SKILL, "general": task(gain=0.001, half=0.004, **LIMITED)}, "good",
     "Gained +41.2 ± 1.3 points on gsm8k; no loss on general (+0.1 ± 0.4 points)."),
    ("too few items to say", {"gsm8k": SKILL, "general": task(gain=-0.01, half=0.03, **LIMITED)}, "mixed",
     "Gained +41.2 ± 1.3 points on gsm8k; no significant loss on general (−1.0 ± 3.0 points; a loss above the limit of "
     "2.0 is not ruled out)."),
    ("nothing significant at all", {"gsm8k": task("exact_match", "skill", 0.12, 0.003, 1319, 0.013),
     "general": task(gain=0.0, half=0.004, **LIMITED)}, "mixed",
     "No significant change on gsm8k (+0.3 ± 1.3 points); no loss on general (+0.0 ± 0.4 points)."),
    ("worse where it was to learn", {"gsm8k": task("exact_match", "skill", 0.3, -0.03, 1319, 0.013)}, "bad",
     "Lost 3.0 ± 1.3 points on gsm8k, which it was to learn; forgetting was not measured (no retention task)."),
    ("nothing to learn measured", {"general": task("bits_per_byte", "retention", 0.8, -0.5501, 300, 0.011, 0.05)},
     "bad",
     "What it learnt was not measured (no skill task); lost 0.550 ± 0.011 bits a byte on general: real, above the "
     "limit of 0.05."),
    ("validation", {"validation": task("loss", "skill", 1.9, 0.6, 400, 0.02)}, "mixed",
     "Gained +0.600 ± 0.020 nats a token on the validation set; forgetting was not measured (no retention task)."),
    ("no statistics", {"gsm8k": task("exact_match", "skill", 0.12, 0.4, 1319, None),
     "general": task("acc", "retention", 0.65, -0.03, 2000, None)}, "mixed",
     "Gained +40.0 points on gsm8k; lost 3.00 points on general; no interval for any task, so what is chance cannot be "
     "told."),
    ("many", {f"t{at}": task(gain=-0.03 - at / 1000, half=0.004, **LIMITED) for at in range(5)}
     | {"same": task(gain=0.0, half=0.004, **LIMITED), "gsm8k": SKILL}, "bad",
     "Gained +41.2 ± 1.3 points on gsm8k; lost 3.4 ± 0.4 points on t4: real, above the limit of 2.0; lost 3.3 ± 0.4 "
     "points on t3: real, above the limit of 2.0; lost on 3 further retention tasks; no loss shown on 1 other "
     "retention task."),
    ("significant alone, not among many", {"gsm8k": SKILL,
     "general": task(gain=-0.025, half=0.02, **LIMITED) | {"p_holm": 0.2}}, "mixed",
     "Gained +41.2 ± 1.3 points on gsm8k; no significant loss on general (−2.5 ± 2.0 points; a loss above the limit of "
     "2.0 is not ruled out)."),
    ("open to the limit, not the worst", {"gsm8k": SKILL, "a": task(gain=-0.003, half=0.004, **LIMITED),
     "b": task(gain=0.001, half=0.03, **LIMITED), "c": task(gain=0.002, half=0.03, **LIMITED)}, "mixed",
     "Gained +41.2 ± 1.3 points on gsm8k; no significant loss on 3 retention tasks (worst: a −0.3 ± 0.4 points); a "
     "loss above its limit is not ruled out on 2 of 3 retention tasks."),
    ("one lost, another open", {"gsm8k": SKILL, "a": task(gain=-0.008, half=0.004, **LIMITED),
     "b": task(gain=0.0, half=0.03, **LIMITED)}, "mixed",
     "Gained +41.2 ± 1.3 points on gsm8k; lost 0.8 ± 0.4 points on a: real, within the limit of 2.0; no loss shown on "
     "1 other retention task; a loss above its limit is not ruled out on 1 of 2 retention tasks."),
    ("one without a number", {"gsm8k": SKILL, "a": task(gain=0.001, half=0.004, **LIMITED),
     "b": task(gain=0.0, half=0.004, **LIMITED) | {"score": None, "drop": None}}, "mixed",
     "Gained +41.2 ± 1.3 points on gsm8k; no loss on a (+0.1 ± 0.4 points); what became of b was not measured."),
    ("no number", {"gsm8k": SKILL, "general": task(gain=0.0, half=0.004, **LIMITED) | {"score": None, "drop": None}},
     "mixed",
     "Gained +41.2 ± 1.3 points on gsm8k; forgetting was not measured (no retention task)."),
]  # fmt: skip


@pytest.mark.parametrize(("tasks", "tone", "sentence"), [case[1:] for case in SENTENCES], ids=[c[0] for c in SENTENCES])
def test_the_verdict_claims_what_the_evaluations_show(tasks: dict[str, Any], tone: str, sentence: str) -> None:
    found = [evaluation(0, tasks), evaluation(300, tasks)]
    assert verdict(found, DONE, 300, 300) == {"sentence": sentence, "tone": tone}


def test_the_verdict_says_how_the_run_ended() -> None:
    tasks = {"gsm8k": SKILL}
    found = [evaluation(0, tasks), evaluation(200, tasks)]

    def opening(state: dict[str, Any], step: int, *decisions: str) -> str:
        judged = [one | {"gate": {"decision": what}} for one, what in zip(found, decisions or ("", ""), strict=True)]
        return verdict(judged, state, step, 300)["sentence"].split(": gained")[0]

    assert opening({"status": "stopped"}, 200, "continue", "stop") == "Stopped by the retention gate at step 200 of 300"
    assert opening({"status": "stopped"}, 210) == "Stopped at step 210 of 300, evaluated at step 200"
    assert opening({"status": "failed"}, 200) == "Failed at step 200 of 300"
    assert opening({"status": "requeue"}, 200) == "Interrupted at step 200 of 300, to be continued"
    assert opening({"status": "running"}, 200) == "Not finished, at step 200 of 300"
    text = verdict([found[0], found[1] | {"step": 300}], {"status": "running"}, 300, 300)["sentence"]
    assert text.startswith("Gained"), "the report of the end is written before state.json says so"
    assert verdict(found, {"status": "stopped"}, 200, 300)["tone"] == "bad"


def test_a_folder_of_an_evaluation_is_no_training() -> None:
    found = [evaluation(0, {"gsm8k": SKILL}), evaluation(1, {"gsm8k": SKILL})]
    text = verdict(found, {}, 0, None)["sentence"]
    assert text.startswith("Model compared with base, no training here: gained +41.2 ± 1.3 points on gsm8k")
    alone = verdict([evaluation(0, {"gsm8k": task("exact_match", "skill", 0.123, 0.0, 1319, 0.0)})], {}, 0, None)
    assert alone["sentence"] == (
        "A model was evaluated (gsm8k 12.3%) and compared with no base, so gain and loss are not known."
    )


def test_before_and_after_are_of_the_same_items() -> None:
    """The base scored 12.3 % on all 1319 items, and 30 % on the 20 that the last evaluation has."""
    part = SKILL | {"n": 20, "base": 0.30, "score": 0.35, "drop": -0.05, "drop_ci": [-0.2, 0.1]}
    bits = task("bits_per_byte", "retention", 0.8, -0.1, 300, 0.01)
    first = evaluation(0, {"gsm8k": SKILL | {"score": 0.123}, "wiki": bits | {"score": 0.8}})
    cut = bits | {"n": 30, "base": 0.7, "score": 0.75}
    assert before_after([first, evaluation(200, {"gsm8k": part, "wiki": cut}, whole=False)]) == [
        ("skill", "gsm8k", "exact_match, on part of the items", "30.0%", "35.0%"),
        ("retention", "wiki", "bits_per_byte, on part of the items", "0.7", "0.75"),
    ]
    said = verdict([first, evaluation(200, {"gsm8k": part, "wiki": cut}, whole=False)], {}, 200, 300)["sentence"]
    assert said.endswith("; measured on a part of the items (1.5% of gsm8k).")
    assert before_after([first, evaluation(300, {"gsm8k": SKILL, "wiki": bits})])[1:] == [
        ("retention", "wiki", "bits_per_byte", "0.8", "0.9"),
        ("retention", "wiki", "perplexity", "12.3", "12.3"),
    ]


@pytest.mark.parametrize("metric", ["acc", "em", "f1", "pass@1"])
def test_terminal_page_and_gate_print_the_same_amounts_and_verdicts(metric: str) -> None:
    lost = task("acc", "retention", 0.65, -0.05, 500, 0.02, limit=0.02) | {"metric": metric, "discordant": [40, 15]}
    found = decide(evaluation(1, {"x": lost}), [], Gate(action="stop", patience=1), 0.95, 1, True)
    assert "5.0 ± 2.0 points worse than base (95% CI 3 to 7), real loss, above limit" in summary_lines(found)[0]
    (reason,) = found["gate"]["reasons"]
    assert reason.startswith("task x has lost 5.0 ± 2.0 points since step 0, beyond doubt over 2.")
    assert reason.endswith("points; 2.0 points are allowed (max_drop)")
    assert "Lost 5.0 ± 2.0 points on x" in verdict([found], DONE, 1, 1)["sentence"].replace("; lost", "; Lost")


def test_terminal_and_page_agree_on_what_is_real() -> None:
    """Significant alone, not by Holm; by the interval, where there is no p."""
    shy = task(gain=-0.025, half=0.02, **LIMITED) | {"p_holm": 0.2}
    by_interval = task(gain=-0.025, half=0.02, **LIMITED) | {"p_holm": None, "q": None, "p": None}
    for one, said in ((shy, "no significant change"), (by_interval, "real loss, above limit")):
        found = evaluation(300, {"x": one})
        assert summary_lines(found)[0].endswith(said)
        assert said in task_table({"evaluations": [found]})


def test_the_verdict_without_evaluations_says_so() -> None:
    nothing = verdict([], DONE, 300, 300)
    assert nothing == {"sentence": "Nothing was evaluated, so gain and loss are not known.", "tone": "unknown"}
    base = verdict(
        [evaluation(0, {"gsm8k": task("exact_match", "skill", 0.123, 0.0, 1319, 0.0)})], {"status": "running"}, 20, 300
    )
    assert base["sentence"] == (
        "Not finished, at step 20 of 300: only the base model has been evaluated (gsm8k 12.3%), so gain and loss are "
        "not known yet."
    )
    assert base["tone"] == "unknown"


def test_skill_and_retention_of_one_point() -> None:
    tasks = {
        "a": task("acc", "skill", 0.2, 0.3, 100, None), "b": task("loss", "skill", 2.0, 0.5, 100, None),
        "c": task("bits_per_byte", "retention", 0.8, -0.08, 100, None),
        "d": task("acc", "retention", 0.5, 0.02, 100, None),
    }  # fmt: skip
    assert plane(tasks) == pytest.approx(((30 + 25) / 2, (-10 + 2) / 2))
    assert plane({"a": tasks["a"]}) is None
    blend = point(0.5, tasks)
    assert (blend["skill"], blend["retention"]) == pytest.approx((0.275, -0.04))
    unknown = tasks | {"d": tasks["d"] | {"score": None, "drop": None}}
    assert plane(unknown) is None, "a mean over fewer tasks is not to be compared"
    assert point(0.5, unknown)["retention"] is None
    assert change("x", {"drop": None, "base": 1.0}) is None


def test_a_thinned_curve_keeps_its_spike() -> None:
    values = [1.0] * 10_000
    values[5_003] = 99.0
    thinned = thin(range(10_000), values)
    assert len(thinned["value"]) == 120
    assert max(thinned["high"]) == 99.0
    assert thinned["step"][-1] == 9_999
    assert thin(range(3), [1.0, 2.0, 3.0]) == {"step": [0, 1, 2], "value": [1.0, 2.0, 3.0]}


def report(*words: object) -> int:
    """`fullft report words`, in this process."""
    before, sys.argv = sys.argv, ["fullft", "report", *map(str, words)]
    try:
        return cli.main()
    finally:
        sys.argv = before


def test_the_report_of_a_run_and_of_an_old_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, old = write_run(tmp_path / "run", blend=True), write_run(tmp_path / "old", statistics=False)
    assert report(run) == report(old) == 0
    said = capsys.readouterr().out
    assert "above the limit of 2.0" in said
    assert "no interval for any task" in said
    content = json.loads((run / "report.json").read_text())
    assert content["verdict"]["tone"] == "bad"
    assert content["verdict"]["sentence"] in said
    assert content["metrics"]["skill/gsm8k/exact_match"] == content["evaluations"][-1]["tasks"]["gsm8k"]["score"]
    assert content["data"]["replay"]["share"] == pytest.approx(5536 / 65536)
    assert (content["steps"], content["planned_steps"], len(content["evaluations"])) == (300, 300, 7)
    assert len(content["generations"]) == 20
    assert content["blend"]["best"]["alpha"] == 0.5
    assert any("hellaswag" in text for text in content["warnings"])
    assert "p (Holm)" in (run / "report.html").read_text()
    assert "p (Holm)" not in (old / "report.html").read_text()


def test_the_report_of_the_end_has_the_state_of_the_end(tmp_path: Path) -> None:
    """It is written before state.json, with which the run gives up its folder."""
    run = write_run(tmp_path / "run", state={"status": "running"})
    content = write_report(run, status="stopped", reason="step 300: lost too much", step=300)
    assert json.loads((run / "report.json").read_text())["state"] == content["state"]
    assert content["state"] == {"status": "stopped", "reason": "step 300: lost too much", "step": 300}
    page = (run / "report.html").read_text()
    assert "<dt>status</dt><dd>stopped</dd>" in page
    assert "stopped: step 300: lost too much" in page


def test_scores_of_other_items_have_no_star(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", 1, 0.3)]
    last = runs[1] / "retention" / "step-00000300.json"
    content = json.loads(last.read_text())
    content["tasks"]["hellaswag"] |= {"n": 20, "base": 0.60, "score": 0.55, "drop": 0.05, "drop_ci": [-0.1, 0.2]}
    last.write_text(json.dumps(content | {"whole": False}))
    shown = comparison([write_report(run) for run in runs])
    rows = {row.split("<")[0]: row for row in shown.split("<th scope='row'>")[1:]}
    assert "★" not in rows["hellaswag "]
    assert "★" not in rows["average forgetting"]
    assert "★" in rows["arc_easy "]
    assert "No ★ for hellaswag: measured on part of the items in some of the runs" in shown
    assert "hellaswag" in table(runs[1])


def test_what_the_gate_took_back_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rollback=True)
    content = write_report(run)
    assert content["verdict"]["sentence"].startswith("Rolled back once by the retention gate: gained")
    assert [one["step"] for one in content["rollbacks"][0]["evaluations"]] == [150, 200]
    assert "rolled back from step 200 to 100, from there on learning rate × 0.5" in content["warnings"][1]
    page = (run / "report.html").read_text()
    assert page.count(">rolled back</text>") > 5
    assert "abandoned" in page


def test_a_checkpoint_on_the_way_has_the_verdict_of_its_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rollback=True, state={"status": "failed"})
    before, last = summary(run, 50), summary(run, 300)
    assert before["verdict"]["sentence"].startswith("Gained +18 ± 4 points")
    assert before["steps"] == 50
    assert last["verdict"]["sentence"].startswith("Rolled back once by the retention gate: gained")
    assert write_report(run)["verdict"]["sentence"].startswith("Failed at step 300 of 300, rolled back once")


def test_a_run_with_nothing_but_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("run_dir: x\nmodel: {path: base}\n")
    content = write_report(tmp_path)
    assert content["verdict"]["tone"] == "unknown"
    assert "Nothing was evaluated" in (tmp_path / "report.html").read_text()


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    last = run / "retention" / "step-00000300.json"
    content = json.loads(last.read_text())
    content["tasks"]["wiki"] |= {"score": float("nan"), "drop": float("nan"), "drop_ci": [float("nan")] * 2}
    last.write_text(json.dumps(content))
    write_report(run)
    found = json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["evaluations"][-1]["tasks"]["wiki"]["drop"] is None
    assert not re.search(r"\bnan\b", (run / "report.html").read_text().split("<script>")[0], re.IGNORECASE)


def test_a_long_run_has_a_small_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows=30_000)
    write_report(run)
    assert (run / "report.html").stat().st_size < 500_000
    assert (run / "report.json").stat().st_size < 500_000


def test_what_cannot_be_reported_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert report(tmp_path, run, "--blend", run / "env.json", "--out", tmp_path / "page.pdf") == 2
    said = capsys.readouterr().err
    assert f"{tmp_path} is not a run folder of fullft" in said
    assert "is not a blend.json" in said
    assert "does not end in .html" in said
    assert "nothing was written" in said
    assert report(run, "--out", run / "env.json" / "page.html") == 2
    assert "cannot be written" in capsys.readouterr().err


# In a browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run, and that of three, of which two have the same name."""
    folder = tmp_path_factory.mktemp("reports")
    runs = [write_run(folder / "plain", blend=True), write_run(folder / "replay-5", 1, 0.3, learning_rate=2e-5)]
    runs.append(write_run(folder / "again" / "plain", 2, 0.1))
    assert report(runs[0]) == 0
    assert report(*runs, "--out", folder / "three.html") == 0
    return {"one": runs[0] / "report.html", "three": folder / "three.html"}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The system's Chromium; playwright only drives it."""
    from playwright.sync_api import sync_playwright

    if (program := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=120_000)
        yield browser
        browser.close()


class Opened:
    """A page in the browser, and what it complained of and asked the network for."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light", touch: bool = False) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=touch, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on(
            "request",
            lambda request: (
                self.trouble.append(request.url)
                if request.url != file.as_uri() and not request.url.startswith("data:")
                else None
            ),
        )
        self.page.goto(file.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: object) -> None:
        self.context.close()
        assert self.trouble == []


CONTRAST = """() => {
  // WCAG 2: of every visible text to what is behind it. SVG text is on the page's own ground.
  const parse = (c) => {
    const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const seen = {};
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e);
    let behind = e;
    while (behind && parse(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const ink = e instanceof SVGElement ? style.fill : style.color;
    seen[ink + ' on ' + getComputedStyle(behind || document.body).backgroundColor] = e;
  }
  return Object.keys(seen).map(pair => {
    const [a, b] = pair.split(' on ').map(parse).map(light);
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), pair];
  }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize(
    ("which", "width", "scheme"),
    [("one", 1280, "light"), ("one", 390, "dark"), ("three", 1280, "dark"), ("three", 390, "light")],
)
def test_the_page_fits_its_window_and_can_be_read(
    pages: dict[str, Path], chromium: Any, which: str, scheme: str, width: int, tmp_path: Path
) -> None:
    with Opened(chromium, pages[which], width, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(CONTRAST) == []
        outside = (
            "e => e.filter(t => t.getBoundingClientRect().right > innerWidth + 1 || t.getBoundingClientRect().left < 0)"
        )
        assert page.locator("figure text").evaluate_all(f"{outside[:-1]}).map(t => t.textContent)") == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert (tmp_path / "page.png").stat().st_size > 50_000


def test_everything_has_a_name(pages: dict[str, Path], chromium: Any) -> None:
    with Opened(chromium, pages["one"]) as page:
        unnamed = page.locator("svg, [role=region], section, nav, input").evaluate_all(
            "all => all.filter(e => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') "
            "|| e.closest('label'))).length"
        )
        assert unnamed == 0
        assert page.title() == "fullft: plain"
        assert page.locator("h1").inner_text() == "plain"
        assert "script" in page.locator("#answers pre", has_text="alert(1)").first.inner_text(), "shown, not run"


def test_a_click_on_a_column_sorts_the_tasks(pages: dict[str, Path], chromium: Any) -> None:
    with Opened(chromium, pages["one"]) as page:
        table = page.locator("table.sortable")

        def names() -> list[str]:
            return [text.split()[0] for text in table.locator("tbody th").all_inner_texts()]

        assert names()[:3] == ["gsm8k", "validation", "hellaswag"]
        table.get_by_role("button", name="items").click()
        assert names() == ["wiki", "validation", "arc_easy", "gsm8k", "hellaswag"]
        assert table.locator("th[aria-sort=ascending]").inner_text().startswith("items")
        table.get_by_role("button", name="items").press("Enter")
        assert names()[0] == "hellaswag"
        table.get_by_role("button", name="limit").click()
        assert set(names()[-2:]) == {"gsm8k", "validation"}, "what has no limit stands last"


def test_answers_are_filtered(pages: dict[str, Path], chromium: Any) -> None:
    with Opened(chromium, pages["one"]) as page:
        cards, filters = page.locator("#answers article:visible"), page.locator("fieldset.filter")
        assert cards.count() == 6
        page.get_by_role("button", name="Show all 20").click()
        assert cards.count() == 20
        filters.get_by_label("became wrong").check()
        assert cards.count() == 4
        assert "right" in cards.first.locator(".said > div").nth(0).inner_text()
        assert "wrong" in cards.first.locator(".said > div").nth(1).inner_text()
        filters.get_by_label("became right").press("Space")
        page.get_by_role("button", name="Show all").click()
        assert cards.count() == 16


def test_a_pointer_a_finger_and_the_arrow_keys_show_numbers(pages: dict[str, Path], chromium: Any) -> None:
    with Opened(chromium, pages["one"]) as page:
        chart, tip = page.locator("svg[aria-label^='gsm8k']"), page.locator("#tip")
        assert not tip.is_visible()
        box = chart.bounding_box()
        chart.hover(position={"x": box["width"] - 5, "y": 100})
        assert "step 300" in tip.inner_text()
        assert "[" in tip.inner_text(), "the interval"
        chart.press("Home")
        assert "step 0" in tip.inner_text()
        assert "12.3" in tip.inner_text()
        chart.press("ArrowRight")
        assert "step 50" in tip.inner_text()
        chart.press("Escape")
        assert not tip.is_visible()
        frontier = page.locator("svg[aria-label^='skill against']")
        frontier.press("End")
        assert "skill" in tip.inner_text()
    with Opened(chromium, pages["one"], 390, touch=True) as page:
        page.locator("svg[aria-label^='hellaswag']").tap()
        assert "step" in page.locator("#tip").inner_text()
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390


def test_runs_side_by_side_can_be_hidden(pages: dict[str, Path], chromium: Any) -> None:
    with Opened(chromium, pages["three"]) as page:
        boxes = page.locator("input[data-run]")
        assert boxes.count() == 3
        texts = page.locator(".runs b").all_inner_texts()
        assert len(set(texts)) == 3, "the two of one name are told apart by their folders"
        chart = page.locator("svg[aria-label^='hellaswag']")
        assert chart.locator("g.run0:visible").count() == 1
        boxes.first.uncheck()
        assert page.locator(".run0:visible").count() == 0
        assert chart.locator("g:visible").count() == 2
        chart.press("End")
        assert texts[0] not in page.locator("#tip").inner_text()
        assert "replay-5" in page.locator("#tip").inner_text()
        boxes.first.check()
        assert chart.locator("g.run0:visible").count() == 1
        differences = page.locator("#recipe-and-environment table").first.inner_text()
        assert "train.learning_rate" in differences
        assert "model.path" not in differences
        assert page.locator("td.best").count() > 3
