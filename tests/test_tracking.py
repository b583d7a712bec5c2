"""metrics.jsonl and W&B hold every step once, whatever happens to the run, to W&B or to the network."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import chats, write_jsonl
from fake_wandb import FakeWandb, fake_wandb
from ranks import Ranks, wait_for

from fullft import wandb_run, workspace
from fullft.recipe import Recipe, parse_recipe
from fullft.report import runlog, wording
from fullft.tracking import Tracker

# A training process: logs steps after `resumed` to `last`, and ends in some way. It prints how long W&B held it up.
LOGGER = """
import json, os, signal, sys, time
import psutil
from fullft import lease, tracking
from fullft.recipe import load_recipe
from fullft.tracking import Tracker
from fullft.wandb_run import numbers_in
tracking.END_SECONDS = float(os.environ.get("END_SECONDS", tracking.END_SECONDS))
config, resumed, last, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
recipe = load_recipe(config)
if end == "taken over":
    lease.take(recipe.run_folder, 60)
started = time.perf_counter()
tracker = Tracker(recipe, True, 20, resumed)
seconds = [time.perf_counter() - started]
def processes(name):
    return [one for one in psutil.Process().children(recursive=True) if name in " ".join(one.cmdline())]
def log(*steps):
    loss = 1 + (recipe.run_folder / "retention/rollbacks.json").exists()
    for step in range(*steps):
        started = time.perf_counter()
        evaluation = {"time/evaluation_seconds": 1.0} if end == "rewound" and step in (2, 6) else {}
        tracker.log(step, {"train/global_step": step, "train/loss": loss / step} | evaluation, "")
        seconds.append(time.perf_counter() - started)
def wait_until_sent(step):
    while step not in [sent for file in recipe.run_folder.glob("wandb/*/*.wandb") for sent in numbers_in(file)]:
        time.sleep(0.1)
if end == "core dies":
    log(resumed + 1, 3)
    wait_until_sent(2)
    [one.kill() for one in processes("wandb-core")]
    log(3, last + 1)
elif end == "server dies":
    log(resumed + 1, last)
    print("dying", flush=True)
    sys.stdin.read()
    tracker.alert("pending", "while nobody answers")
    log(last, last + 1)
else:
    log(resumed + 1, last + 1)
if end == "tracker dies":
    [one.kill() for one in processes("wandb_run")]
if end == "taken over":
    wait_until_sent(5)
    (recipe.run_folder / "lease/generation-00000002").write_text("{}")
    with (recipe.run_folder / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 7, "train/global_step": 7}\\n')
if end == "rewound":
    from fullft.retention import rollback  # imports PyTorch
    wait_until_sent(6)
    entry = {"from_step": 6, "to_step": 3, "done": False}
    (recipe.run_folder / "retention/rollbacks.json").write_text(json.dumps([entry]))
    rollback.finish(recipe.run_folder)
    tracker.rewind(3)
    log(4, 8)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
tracker.alert("the end", "x" * 10_000)
started = time.perf_counter()
tracker.finish({"final": 1.0})
print("SECONDS", sum(seconds), time.perf_counter() - started)
"""


def a_recipe(folder: Path, mode: str) -> Recipe:
    recipe = parse_recipe(
        {
            "run_dir": str(folder / "run"), "model": {"path": "no/model"}, "data": {"train": "none.jsonl"},
            "tracking": {"wandb": mode, "project": "tests", "entity": "mine", "group": "seeds", "tags": ["t"]},
        }
    )  # fmt: skip
    recipe.run_folder.mkdir(parents=True)
    (recipe.run_folder / "recipe.yaml").write_text(recipe.to_yaml())
    return recipe


@pytest.fixture
def tracked(tmp_path: Path) -> Recipe:
    return a_recipe(tmp_path, "offline")


def start(recipe: Recipe, resumed: int, last: int, end: str, **env: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-c", LOGGER, str(recipe.run_folder / "recipe.yaml"), str(resumed), str(last), end]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment | env, text=True, **pipes)  # type: ignore[call-overload]


def log(recipe: Recipe, resumed: int, last: int, end: str, **env: str) -> str:
    """What it printed. A pipe that W&B's process had inherited would be open, and this wait for it."""
    process = start(recipe, resumed, last, end, **env)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == (-signal.SIGKILL if end == "killed" else 0), output
    return output


def seconds(output: str) -> tuple[float, float]:
    """(in Tracker() and log(), in finish())"""
    words = output.split("SECONDS ")[1].split()
    return float(words[0]), float(words[1])


def wait_for_trackers(folder: Path) -> None:
    def mine() -> list[psutil.Process]:
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(one.cmdline())
                if "wandb_run" in line and str(folder) in line:
                    found.append(one)
        return found

    wait_for(lambda: not mine(), "end of W&B's process", wandb_run.END_SECONDS + 60)


def of_kind(folder: Path, kind: str) -> list[Any]:
    """All records of a kind, over all offline parts of a run, as `wandb sync` reads them."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    found = [record for file in files for record in wandb_run.records(file) if record.WhichOneof("record_type") == kind]
    return [getattr(record, kind) for record in found]


def history(folder: Path) -> list[dict[str, Any]]:
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item}
        for row in of_kind(folder, "history")
    ]


def wandb_steps(recipe: Recipe) -> list[int]:
    wait_for_trackers(recipe.run_folder)
    known = json.loads((recipe.run_folder / "wandb_run.json").read_text())["id"]
    assert {run.run_id for run in of_kind(recipe.run_folder, "run")} == {known}
    return [row["train/global_step"] for row in history(recipe.run_folder)]


def rows_of(recipe: Recipe) -> list[int]:
    return [json.loads(line)["step"] for line in (recipe.run_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_resumed_run_is_one_run_with_every_step_once(tracked: Recipe) -> None:
    log(tracked, 0, 6, "killed")  # the rest is sent though the trainer is gone
    log(tracked, 3, 4, "killed")  # the checkpoint was of step 3: steps 4 to 6 are done again,
    log(tracked, 3, 9, "well")  # and again
    assert rows_of(tracked) == list(range(1, 10))
    assert wandb_steps(tracked) == list(range(1, 10))
    assert [alert.title for alert in of_kind(tracked.run_folder, "alert")] == ["the end"]


@pytest.mark.slow
def test_after_a_rollback_w_and_b_has_what_was_abandoned_and_what_came_instead(tracked: Recipe) -> None:
    retention = tracked.run_folder / "retention"
    retention.mkdir()
    (retention / "step-00000002.json").write_text(json.dumps({"step": 2, "tasks": {"broken": {}}}))
    (retention / "step-00000006.json").write_text(json.dumps({"step": 6, "tasks": {}}))
    output = log(tracked, 0, 6, "rewound")
    assert "no tables of step 2 (KeyError" in output  # and tracking goes on
    log(tracked, 6, 8, "killed")  # step 7 is done again
    assert rows_of(tracked) == list(range(1, 9))
    expected = [(step, step, 1 / step) for step in range(1, 7)]
    expected += [(step + 3, step, 2 / step) for step in range(4, 9)]
    assert wandb_steps(tracked) == [step for _, step, _ in expected]

    def values(rows: list[dict[str, Any]]) -> list[tuple[int, int, float]]:
        return [(row["_step"], row["train/global_step"], row["train/loss"]) for row in rows]

    assert values(history(tracked.run_folder)) == expected
    assert [row["_step"] for row in history(tracked.run_folder) if "tables/retention._type" in row] == [6]
    abandoned = {"time/evaluation_seconds": 1.0}
    assert "tables/retention" in wandb_run._tables(tracked.run_folder, 6, abandoned)
    assert not wandb_run._tables(tracked.run_folder, 6, abandoned | {wandb_run.ROLLBACKS: 1})
    with fake_wandb() as server:  # which has nothing, and is sent the same from other files
        send(tracked, server)
        assert values(server.history) == expected
        assert [row.get("train/rollbacks", 0) for row in server.history] == [0] * 6 + [1] * 5


def test_rows_are_numbered_the_same_by_any_process(tmp_path: Path) -> None:
    back = [{"from_step": 6, "to_step": 3}, {"from_step": 5, "to_step": 1}]
    (tmp_path / "retention").mkdir()
    (tmp_path / "retention/rollbacks.json").write_text(json.dumps(back))
    for name, steps in (
        ("rollback-1", {4: 0, 5: 0, 6: 0}),
        ("rollback-2", {2: 0, 3: 0, 4: 1, 5: 1}),
        ("", {1: 0, 2: 2}),
    ):
        rows = [{"step": step, "train/rollbacks": before} for step, before in steps.items()]
        write_jsonl(tmp_path / f"metrics.{name}.jsonl".replace("..", "."), rows)
    found = [(at, row["step"]) for at, row in wandb_run.Rows(tmp_path).new()]
    assert found == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 4), (8, 5), (9, 2)]


@pytest.mark.slow
def test_a_damaged_part_ends_where_the_damage_starts(tracked: Recipe) -> None:
    log(tracked, 0, 5, "well")
    (part,) = tracked.run_folder.glob("wandb/offline-run-*/*.wandb")
    content = part.read_bytes()
    ends = set()
    for cut in range(7, len(content), 97):
        part.write_bytes(content[:cut] + bytes(len(content) - cut))
        found = list(wandb_run.numbers_in(part))
        assert found == list(range(1, len(found) + 1))
        ends.add(len(found))
    assert ends == set(range(6))
    cut = content.rindex(b"train/loss")  # in the row of step 5
    part.write_bytes(content[:cut] + bytes(len(content) - cut))
    log(tracked, 5, 6, "well")
    assert wandb_steps(tracked) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["core dies", "tracker dies"])
def test_training_goes_on_when_wandb_dies(tracked: Recipe, end: str) -> None:
    output = log(tracked, 0, 5, end)
    assert rows_of(tracked) == [1, 2, 3, 4, 5]
    assert ("started anew" if end == "core dies" else "process ended (-9)") in output
    if end == "tracker dies":
        log(tracked, 5, 6, "well")
    assert wandb_steps(tracked) == rows_of(tracked)


@pytest.mark.slow
def test_nothing_is_sent_of_a_run_folder_that_another_job_has_taken(tracked: Recipe) -> None:
    log(tracked, 0, 5, "taken over")
    assert rows_of(tracked) == [1, 2, 3, 4, 5, 7]
    assert wandb_steps(tracked) == [1, 2, 3, 4, 5]


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path, "disabled")
    file = recipe.run_folder / "metrics.jsonl"
    file.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/lo')
    Tracker(recipe, True, 9, 1)
    assert file.read_text() == '{"step": 1, "train/loss": 2.0}\n'


def test_a_line_that_is_being_written_is_read_later(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st')
    rows = wandb_run.Rows(tmp_path)
    assert [at for at, _ in rows.new()] == [1]
    with file.open("a") as more:
        more.write('ep": 2}\n')
    assert [at for at, _ in rows.new()] == [2]
    (tmp_path / "other").write_text('{"step": 1}\n')
    (tmp_path / "other").rename(file)  # as a rollback or a new job does
    assert [at for at, _ in rows.new()] == [1]


def test_ranks_other_than_the_first_write_nothing(tracked: Recipe) -> None:
    tracker = Tracker(tracked, False, 20, 0)
    tracker.log(1, {"train/loss": 1.0}, "")
    tracker.alert("a", "b")
    tracker.rewind(0)
    tracker.finish({})
    assert [path.name for path in tracked.run_folder.iterdir()] == ["recipe.yaml"]


def test_rows_have_the_use_of_the_machine(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path, "disabled")
    tracker = Tracker(recipe, True, 9, 0)
    wait_for(lambda: tracker._system.latest, "a sample", 10)
    tracker.log(1, {"train/loss": 1.0}, "")
    tracker.finish({})
    row = json.loads((recipe.run_folder / "metrics.jsonl").read_text())
    assert 0 < row["system/rank_memory_gib"] < row["system/host_memory_gib"]
    assert 0 < row["system/host_memory_percent"] < 100


@pytest.mark.parametrize(
    ("key", "summary"),
    [
        ("train/loss", "last,min"), ("train/loss_kl", "last,min"), ("eval/loss", "last,min"),
        ("retention/wiki/drop", "last,max"), ("retention/worst", "last,max"), ("divergence/kl_general", "last,max"),
        ("retention/wiki/bits_per_byte", "last,min"), ("retention/arc/acc", "last,min"),
        ("skill/gsm8k/exact_match", "last,max"), ("skill/chat/loss", "last,min"), ("train/learning_rate", "last"),
        ("perf/tokens_per_second", "last,mean"), ("skill/x/brier_score", "last,min"), ("skill/x/mse", "last,min"),
        ("retention/wiki/word_perplexity", "last,min"), ("skill/gsm8k/ratio", "last,max"),
    ],
)  # fmt: skip
def test_the_table_of_runs_shows_the_best_or_worst_of_a_metric(key: str, summary: str) -> None:
    assert wandb_run.summary_of(key) == summary


def test_the_verdict_is_that_of_the_report() -> None:
    task = {"measures": "retention", "metric": "acc", "base": 0.5, "score": 0.4, "drop": 0.1}
    tasks = {
        "old": task, "gone": task | {"drop_ci": [0.05, 0.15], "p_holm": 0.001, "gate": "breach", "limit": 0.02},
        "chance": task | {"drop_ci": [0.01, 0.19], "p_holm": 0.09, "gate": "ok"},  # one of many tasks
        "empty": task | {"drop": None},
    }  # fmt: skip
    rows = wandb_run.retention_rows({"step": 7, "tasks": tasks})
    words = [found.verdict if (found := wording.change(name, one)) else "" for name, one in tasks.items()]
    assert [row[-2] for row in rows] == words
    assert words[1] != words[2]
    assert rows[1] == [7, "gone", "retention", "acc", 0.5, 0.4, 0.1, 0.05, 0.15, 0.001, words[1], "breach"]
    assert {len(row) for row in rows} == {len(wandb_run.RETENTION_COLUMNS)}


def test_answers_of_a_harness_have_no_judgement_and_a_row(tmp_path: Path) -> None:
    for step in (0, 4, 8):
        row = {"prompt": "2 + 2", "reference": "4", "value": 1.0, "generation": f"after {step}"}
        write_jsonl(tmp_path / f"samples/step-{step:08d}.gsm8k.jsonl", [row])
    assert wandb_run.sample_rows(tmp_path, 4) == [[4, "gsm8k", "2 + 2", "4", "after 0", "after 4", None, None]]
    assert runlog.generations(tmp_path)[0]["tuned"] == "after 8"
    aside = tmp_path / "retention/rollback-1/samples"
    write_jsonl(aside / "step-00000004.gsm8k.jsonl", [row | {"generation": "abandoned"}])
    assert wandb_run.sample_rows(tmp_path, 4, aside)[0][5] == "abandoned"


# A real run


@pytest.fixture(scope="module")
def real(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that was killed, all at once, and started again."""
    folder = tmp_path_factory.mktemp("real")
    prompts = write_jsonl(folder / "prompts.jsonl", chats(6))
    texts = write_jsonl(folder / "texts.jsonl", [{"text": "What must be kept, whatever comes."}] * 3)
    recipe = {
        "run_dir": str(folder / "run"), "model": {"path": str(tiny_model)},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", chats(40))), "sequence_length": 128},
        "train": {"steps": 8, "global_batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0},
        "retention": {
            "every_steps": 4, "generation_batch_size": 1,
            "tasks": [
                {"name": "kept", "kind": "text", "data": str(texts)},
                {"name": "learnt", "kind": "generate", "measures": "skill", "data": str(prompts), "max_new_tokens": 8},
            ],
        },
        "checkpoint": {"every_steps": 2, "keep": 9}, "tracking": {"wandb": "offline"}, "export": {"dtype": "fp32"},
    }  # fmt: skip
    run = folder / "run"
    with Ranks(recipe) as ranks:
        ranks.wait_until((run / "checkpoints").exists, "folder of checkpoints")
        (run / "checkpoints/step-00000004").touch()  # so that this checkpoint cannot be written, which is an alert
        metrics = run / "metrics.jsonl"
        ranks.wait_until(lambda: metrics.exists() and '{"step": 5' in metrics.read_text(), "step 5")
        ranks.send(signal.SIGKILL)
    (run / "checkpoints/step-00000004").unlink(missing_ok=True)
    with Ranks(recipe) as ranks:
        assert ranks.codes() == [0, 0], ranks.output
    wait_for_trackers(run)
    return run


@pytest.mark.ranks
def test_a_killed_run_is_whole_in_w_and_b(real: Path) -> None:
    assert [row["_step"] for row in history(real)] == list(range(9))
    assert len(list(real.glob("wandb/offline-run-*"))) == 2
    exits = [record.exit_code for record in of_kind(real, "exit")]
    assert exits == [1, 0]
    assert "checkpoint could not be written" in [alert.title for alert in of_kind(real, "alert")]


@pytest.mark.ranks
def test_every_evaluation_has_its_tables(real: Path) -> None:
    with_tables = [row["_step"] for row in history(real) if any(key.startswith("tables/") for key in row)]
    assert with_tables == [0, 4, 8]
    tables = {path.name: json.loads(path.read_text()) for path in real.glob("wandb/*/files/media/table/tables/*.json")}
    samples = next(table for name, table in tables.items() if name.startswith("samples_8_"))
    assert samples["columns"] == list(wandb_run.SAMPLE_COLUMNS)
    assert len(samples["data"]) == 6
    stored = [json.loads(line) for line in (real / "samples/step-00000000.learnt.jsonl").read_text().splitlines()]
    assert [row[4] for row in samples["data"]] == [one["generation"] for one in stored]
    retention = next(table for name, table in tables.items() if name.startswith("retention_8_"))
    report = json.loads((real / "retention/step-00000008.json").read_text())
    assert retention["data"] == json.loads(json.dumps(wandb_run.retention_rows(report)))


@pytest.mark.ranks
def test_the_config_tells_recipe_plan_and_environment(real: Path) -> None:
    run = of_kind(real, "run")[-1]
    config = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in run.config.update}
    assert config["train"]["learning_rate"] == 1e-3
    assert config["plan"]["steps"] == 8
    assert config["environment"]["launcher"] == "deepspeed"  # RANK and WORLD_SIZE without a launcher
    assert config["environment"]["torch"]
    assert config["environment"]["ranks_of_host"] == {socket.gethostname(): 2}
    assert config["git_commit"] == config["environment"]["git_commit"]


@pytest.mark.ranks
def test_every_metric_goes_by_the_optimizer_step(real: Path) -> None:
    defined = {metric.name: metric for metric in of_kind(real, "metric")}
    logged = {key for row in history(real) for key in row if not key.startswith(("_", "tables/"))}
    groups = {"train", "retention", "skill", "perf", "data", "checkpoint", "system"}
    assert {key.split("/")[0] for key in logged} >= groups
    assert {key: defined[key].step_metric for key in logged - {"train/global_step"}} == dict.fromkeys(
        logged - {"train/global_step"}, "train/global_step"
    )
    assert defined["train/loss"].summary.min
    assert defined["retention/kept/drop"].summary.max


@pytest.mark.ranks
def test_checkpoints_and_the_model_are_artifacts_by_reference(real: Path) -> None:
    places: dict[tuple[str, int], set[str]] = {}  # -> folders of the files that are referred to
    for one in of_kind(real, "artifact"):
        folders = {entry.ref.rpartition("/")[0] for entry in one.manifest.contents if entry.ref}
        places[one.type, json.loads(one.metadata or "{}").get("step", 0)] = folders
    for step in (2, 6, 8):
        assert places["checkpoint", step] == {(real / f"checkpoints/step-{step:08d}").as_uri()}
    assert places["model", 8] == {(real / "export").as_uri()}
    assert ("report", 8) in places


# The network


def online(server: FakeWandb | int) -> dict[str, str]:
    url = server.url if isinstance(server, FakeWandb) else f"http://127.0.0.1:{server}"
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "k" * 40}


@pytest.fixture(scope="module")
def outages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, str]]:
    """Runs of 5 steps, at once because each waits: a port that is silent, one that refuses, a server that dies."""
    recipes = {name: a_recipe(tmp_path_factory.mktemp(name), "online") for name in ("silent", "refused", "dying")}
    with socket.socket() as silent, socket.socket() as refused, ThreadPoolExecutor() as pool:
        for one in (silent, refused):
            one.bind(("127.0.0.1", 0))
        silent.listen(50)
        waiting = {
            name: pool.submit(log, recipes[name], 0, 5, "well", **online(one.getsockname()[1]))
            for name, one in (("silent", silent), ("refused", refused))
        }
        server = FakeWandb()
        process = start(recipes["dying"], 0, 5, "server dies", END_SECONDS="20", **online(server))
        wait_for(lambda: server.steps == [1, 2, 3, 4], "rows at the server")
        server.stop()
        output, _ = process.communicate("go", timeout=180)
        assert process.returncode == 0, output
        outputs = {name: one.result() for name, one in waiting.items()} | {"dying": output}
    return {name: (recipe, outputs[name]) for name, recipe in recipes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["silent", "refused", "dying"])
def test_an_outage_neither_slows_training_nor_keeps_it_from_ending(
    outages: dict[str, tuple[Recipe, str]], name: str
) -> None:
    recipe, output = outages[name]
    logging, finishing = seconds(output)
    assert logging < 2  # init alone would block for 20 s
    assert finishing < (20 if name == "dying" else wandb_run.END_SECONDS) + 6
    assert rows_of(recipe) == [1, 2, 3, 4, 5]
    if name == "dying":
        assert "`fullft wandb` with the run folder sends them" in output
    else:
        assert wandb_steps(recipe) == [1, 2, 3, 4, 5]
        assert "tracked offline" in output


def send(recipe: Recipe, server: FakeWandb) -> None:
    """With `fullft wandb`."""
    command = [sys.executable, "-m", "fullft.cli", "wandb", str(recipe.run_folder)]
    done = subprocess.run(command, env=os.environ | online(server), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_what_w_and_b_lacks_is_sent_later_and_nothing_twice(outages: dict[str, tuple[Recipe, str]]) -> None:
    for name, held in (("dying", [1, 2, 3, 4]), ("silent", [])):
        recipe, _ = outages[name]
        wait_for_trackers(recipe.run_folder)
        if name == "dying":  # step 5 was never delivered, though the .wandb file of the online start has it
            log(recipe, 5, 6, "well", WANDB_MODE="offline")
            assert wandb_steps(recipe) == [1, 2, 3, 4, 5, 6]
        with fake_wandb() as server:
            server.history += [{"_step": step} for step in held]
            for _ in range(2 if name == "dying" else 1):
                send(recipe, server)
                assert server.steps == [1, 2, 3, 4, 5, 6][: len(rows_of(recipe))]
        assert not list(recipe.run_folder.glob("wandb/offline-run-*"))  # `wandb sync` would send it again


@pytest.mark.slow
def test_online_a_killed_run_is_continued(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path, "online")
    with fake_wandb() as server:
        log(recipe, 0, 6, "killed", **online(server))
        output = log(recipe, 3, 9, "well", WANDB_ENTITY="others", **online(server))
        assert server.steps == list(range(1, 10))
        assert server.alerts == ["the end"]
        assert server.entities == ["mine", "others"]
        assert f"{server.url}/somebody/tests/runs/" in output


@pytest.mark.slow
def test_without_a_key_a_run_is_tracked_offline(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path, "online")
    assert "No API key" in log(recipe, 0, 3, "well", HOME=str(tmp_path))
    assert wandb_steps(recipe) == [1, 2, 3]


@pytest.mark.skipif(importlib.util.find_spec("wandb_workspaces") is None, reason="needs the extra `workspace`")
def test_the_workspace_has_the_charts() -> None:
    written = workspace.template("somebody", "tests")._to_model().model_dump(mode="json", by_alias=True)
    sections = written["spec"]["section"]["panelBankConfig"]["sections"]
    assert [one["name"] for one in sections][:2] == ["Skill against retention", "Tables of the last evaluation"]
    charts = [panel["config"] for one in sections for panel in one["panels"] if panel["viewType"] != "Weave"]
    assert {chart["xAxis"] for chart in charts} == {"train/global_step"}
    assert "^retention/.*/drop$" in {chart["metricRegex"] for chart in charts}
    assert "tables/samples" in json.dumps(sections)
