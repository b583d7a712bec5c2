"""`fullft submit` on a real Slurm: what it submits trains, is requeued when told to end, and goes on from there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm
from conftest import REPOSITORY, Launch, losses, metrics, write_recipe
from test_launch import ON_HOSTS, skip_if

from fullft.cli import main
from fullft.errors import BadInput
from fullft.submit import NETWORKS, TRAIN, TRAIN_OF_IMAGE, Job, counts, points, problems, run_dir_of, script, seconds

Submit = Callable[..., str]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[slurm.Slurm]:
    skip_if(slurm.unavailable())
    with slurm.Slurm(tmp_path / "slurm", nodes=3) as nodes:
        yield nodes


@pytest.fixture
def submit(nodes: slurm.Slurm, recipe: dict[str, Any], tmp_path: Path) -> Submit:
    """submit(*arguments): the recipe; returns what the command says."""

    def run(*arguments: str, code: int = 0) -> str:
        config = write_recipe(recipe, tmp_path / "recipe.yaml")
        command = [sys.executable, "-m", "fullft.cli", "submit", str(config), "--gpus-per-node", "1", *arguments]
        env = ON_HOSTS | {"PYTHONPATH": str(REPOSITORY)}
        done = nodes.run(*command, env=env, cwd=tmp_path, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return str(done.stdout + done.stderr)

    return run


def wait_for(condition: Callable[[], bool], nodes: slurm.Slurm, folder: Path, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(file.read_text() for file in folder.rglob("slurm/*.log"))
        assert time.monotonic() < deadline, nodes.run("squeue").stdout + logs
        time.sleep(0.2)


def status(folder: Path) -> str:
    file = folder / "state.json"
    return str(json.loads(file.read_text())["status"]) if file.exists() else ""


def restarts(nodes: slurm.Slurm, job: str) -> int:
    return int(nodes.run("scontrol", "show", "job", job).stdout.partition("Restarts=")[2].split()[0])


def job_of(said: str) -> str:
    return said.partition("submitted  ")[2].split()[0].rstrip(",")


@pytest.mark.cluster
def test_a_job_that_is_told_to_end_is_requeued_and_ends_with_the_same_losses(
    nodes: slurm.Slurm, submit: Submit, recipe: dict[str, Any], launch: Launch, tmp_path: Path
) -> None:
    recipe["train"]["steps"] = 60
    whole = recipe | {"run_dir": str(tmp_path / "whole")}
    launch(whole)
    job, folder = job_of(submit("--nodes", "2")), Path(recipe["run_dir"])
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(recipe)) > 2, nodes, folder)
    nodes.run("scancel", "--signal=USR1", "--batch", job)  # as Slurm does before the time limit
    wait_for(lambda: status(folder) == "done", nodes, folder)
    assert restarts(nodes, job) == 1
    assert losses(recipe) == losses(whole)
    assert [row["step"] for row in metrics(recipe)] == list(range(1, 61))
    (log,) = (folder / "slurm").glob("*.log")
    assert "resumed from" in log.read_text()


@pytest.mark.cluster
def test_a_sweep_is_an_array_with_a_run_folder_for_each_point(
    nodes: slurm.Slurm, submit: Submit, tmp_path: Path
) -> None:
    """And its script can be submitted by hand from anywhere, though the paths in it are relative."""
    said = submit("--nodes", "1", "--array", "train.learning_rate=1e-3,1e-4", "run_dir=runs/sweep")
    folders = [tmp_path / f"runs/sweep-learning_rate={rate}" for rate in ("1e-3", "1e-4")]
    wait_for(lambda: all(status(one) == "done" for one in folders), nodes, tmp_path)
    rates = [json.loads((one / "metrics.jsonl").read_text().splitlines()[0])["train/learning_rate"] for one in folders]
    assert rates == pytest.approx([1e-3, 1e-4])
    assert "nothing is said of GPU memory" not in said  # on CPUs

    shutil.rmtree(folders[1])
    by_hand = ["sbatch", "--array=1", str(tmp_path / "runs/sweep/slurm/train.sbatch")]
    nodes.run(*by_hand, env=ON_HOSTS | {"PYTHONPATH": str(REPOSITORY)}, cwd="/")
    wait_for(lambda: status(folders[1]) == "done", nodes, tmp_path)


@pytest.mark.cluster
def test_what_slurm_or_the_recipe_refuses_is_told_and_nothing_is_submitted(
    nodes: slurm.Slurm, submit: Submit, recipe: dict[str, Any]
) -> None:
    assert "invalid partition" in submit("--nodes", "2", "--partition", "nowhere", code=2)
    assert "cannot be shared by 3 ranks" in submit("--nodes", "3", code=2)
    assert "cannot be shared by 3 ranks" in submit("--nodes", "2-3", code=2)
    assert "learning_rate" in submit("--nodes", "2", "--array", "train.learning_rate=1e-3,-1", code=2)
    assert not nodes.run("squeue", "--noheader").stdout.strip()
    assert not Path(recipe["run_dir"], "recipe.yaml").exists()


# state.json before the ranks start, what they leave in it, srun's code, what else; and whether it is started again.
ENDINGS = {
    "done": (None, "done 9", 0, "", False),
    "done before": ("done 9", None, 0, "", False),
    "stopped": (None, "stopped 4", 143, "", False),
    "preempted": ("running 1", "requeue 4", 143, "marker SIGTERM RUNNING", True),
    "at its limit": ("running 1", "requeue 4", 143, "marker SIGUSR1 SIGTERM COMPLETING", True),
    "cancelled while it saves": ("running 1", "requeue 4", 143, "marker SIGTERM COMPLETING", False),
    "failed": ("running 1", "failed 4", 143, "", True),
    "failed and cancelled": ("running 1", "failed 4", 143, "SIGTERM COMPLETING", False),
    "aborted by NCCL": ("running 1", "running 4", 134, "", True),
    "killed": ("running 1", "running 4", 137, "", True),
    "left by a rank": ("running 1", "running 4", 1, "", False),
    "wrong recipe after a failure": ("failed 4", None, 143, "", False),
    "could not start after a preemption": ("requeue 4", None, 143, "old marker", True),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_started_again(ending: str, tmp_path: Path) -> None:
    before, after, code, more, again = ENDINGS[ending]
    assert end_of_script(tmp_path, before, after, code, more) == (["requeue 7"] if again else [])


def test_failures_are_counted_until_it_gets_further(tmp_path: Path) -> None:
    """Restarts for other reasons, of which there may be any number, do not count; nor failures before a submission."""
    ends = []
    for number, saved in enumerate([4, 4, 4, 10, 10, 10, 10]):
        (tmp_path / f"runs/r/checkpoints/step-{saved:08d}").mkdir(parents=True, exist_ok=True)
        ends.append(bool(end_of_script(tmp_path, "running 1", "failed 11", 143, f"restart {number + 9}")))
    assert ends == [True] * 6 + [False]
    assert end_of_script(tmp_path, "running 1", "failed 11", 143)


def test_a_task_of_an_array_starts_itself_again_and_not_the_others(tmp_path: Path) -> None:
    assert end_of_script(tmp_path, "running 1", "failed 4", 143, "array") == ["requeue 7_2"]


def end_of_script(folder: Path, before: str | None, after: str | None, code: int, more: str = "") -> list[str]:
    """Run a job script, with programs in place of Slurm's: how it asks for another start."""
    run, programs = folder / "runs/r", folder / "programs"
    for one in (run, programs):
        one.mkdir(parents=True, exist_ok=True)

    def state(words: str) -> str:
        status, step = words.split()
        return json.dumps({"status": status, "step": int(step)})

    if before:
        (run / "state.json").write_text(state(before))
    if "old marker" in more:
        (run / "REQUEUE").touch()
    srun = ["trap '' TERM USR1"]
    srun += [f"kill -{one[3:]} $PPID; sleep 0.05" for one in ("SIGUSR1", "SIGTERM") if one in more]
    srun += [f"sleep 0.02; echo '{state(after)}' > runs/r/state.json"] if after else []
    srun += ["sleep 0.02; touch runs/r/REQUEUE"] if more.startswith("marker") else []
    job = f"JobState={'COMPLETING' if 'COMPLETING' in more else 'RUNNING'}"
    for name, lines in {
        "srun": [*srun, f"exit {code}"], "sleep": ['[ "$1" = 60 ] || exec /bin/sleep "$@"'],
        "scontrol": [f'case $1 in requeue) echo "$@" >> asked;; --oneliner) echo "{job} $4";; *) echo n0;; esac'],
    }.items():  # fmt: skip
        (programs / name).write_text("\n".join(["#!/bin/bash", *lines, ""]))
        (programs / name).chmod(0o755)
    (folder / "asked").write_text("")
    text = script(Job("2", 1), Path("r.yaml"), [], "runs/r", [[]])
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n0", "SLURM_JOB_ID": "7"}
    if "array" in more:
        environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    if "restart" in more:
        environment["SLURM_RESTART_COUNT"] = more.split()[1]
    done = subprocess.run(
        ["bash"], input=text, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert not done.stderr
    return (folder / "asked").read_text().splitlines()


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-2", 93600), ("1-2:30", 95400), ("1-2:30:05", 95405),
     ("UNLIMITED", None), ("soon", None)],
)  # fmt: skip
def test_limits_as_slurm_reads_them(time: str, expected: float | None) -> None:
    assert seconds(time) == expected


def test_what_would_go_wrong_on_the_nodes_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "too short" in problems(Job("1", 8, "5", grace_seconds=300), [])[0]
    assert not problems(Job("1", 8, "1:00:00", grace_seconds=300), ["/data/x"])
    image = Job("1", 8, container="x.sqsh", mounts=("/data", "/scratch/me:/scratch/me"))
    assert not problems(image, ["runs/r", str(tmp_path / "r.yaml"), "/data/x", "/scratch/me"])
    elsewhere = Job("1", 8, container="x.sqsh", mounts=("/scratch/me:/mine",))
    assert problems(elsewhere, ["/scratch/me"])
    (lacking,) = problems(image, ["runs/r", "/scratch/other", "/models/8b"])
    assert "/scratch/other, /models/8b is not seen in it" in lacking


@pytest.mark.cluster
def test_a_cancelled_job_stays_cancelled(nodes: slurm.Slurm, submit: Submit, recipe: dict[str, Any]) -> None:
    recipe["train"]["steps"] = 100_000
    recipe["checkpoint"]["every_steps"] = 100_000
    job, folder = job_of(submit("--nodes", "2")), Path(recipe["run_dir"])
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(metrics(recipe)) > 2, nodes, folder)
    nodes.run("scancel", job)
    wait_for(lambda: not nodes.run("squeue", "--noheader").stdout.strip(), nodes, folder)
    assert status(folder) == "requeue"
    assert (folder / "REQUEUE").exists()
    time.sleep(5)
    assert not nodes.run("squeue", "--noheader").stdout.strip()


def test_without_sbatch_it_says_where_to_run_it(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_recipe(recipe, tmp_path / "recipe.yaml")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["fullft", "submit", str(config), "--nodes", "2", "--gpus-per-node", "1"])
    assert main() == 2
    assert "run this on a login node of the cluster, or give --dry-run" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    sys.argv += ["--container", "fullft.sqsh", "--dry-run"]
    assert main() == 2
    assert f"{recipe['model']['path']} is not seen in it; give --mount" in capsys.readouterr().err
    sys.argv += ["--mount", recipe["model"]["path"]]
    assert main() == 0
    assert f"  python {TRAIN_OF_IMAGE} --config {config} " in capsys.readouterr().out


@pytest.mark.parametrize("container", ["fullft.sqsh", "fullft.sif"])
def test_a_container_runs_the_code_of_the_checkout_or_its_own(
    container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def text() -> str:
        return script(Job("1", 8, container=container), Path("r.yaml"), [], "runs/r", [[]])

    monkeypatch.chdir(REPOSITORY)
    assert ' env PYTHONPATH="$PWD" python launch/train.py --config r.yaml ' in text()
    monkeypatch.chdir(tmp_path)
    assert f" python {TRAIN_OF_IMAGE} --config r.yaml " in text()
    folder = TRAIN_OF_IMAGE.removesuffix("/launch/train.py")
    assert f"\nCOPY . {folder}\n" in (REPOSITORY / "docker" / "Dockerfile").read_text()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("container", [None, "ghcr.io/me/fullft:1", "/images/fullft.sif"])
@pytest.mark.parametrize("chain", [1, 2])
def test_every_script_is_shell_that_bash_can_read(network: str, container: str | None, chain: int) -> None:
    job = Job("2-4", 8, "1:00:00", "gpu", "me", 12, network, container, ("/data",), ("module load cuda",), chain)
    text = script(job, Path("my recipe.yaml"), ["tracking.name=two words"], "runs/it's", [["a.b=1"], ["a.b=2"]])
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + text
    assert "#SBATCH --nodes=2-4\n" in text
    assert f"#SBATCH --{'no-requeue' if chain > 1 else 'requeue'}\n" in text


def test_nodes_are_a_number_or_a_range() -> None:
    assert [list(counts(nodes)) for nodes in ("4", "2-4")] == [[4], [2, 3, 4]]
    for wrong in ("0", "3-2", "0-2", "-1", "2-", "two", "2,4"):
        with pytest.raises(BadInput, match="is no number of nodes"):
            counts(wrong)


def test_a_sweep_has_all_combinations() -> None:
    every = points(["a.x=1,2", "b=3,4"])
    assert every == [["a.x=1", "b=3"], ["a.x=1", "b=4"], ["a.x=2", "b=3"], ["a.x=2", "b=4"]]
    assert [run_dir_of("runs/r", one) for one in every[:2]] == ["runs/r-x=1-b=3", "runs/r-x=1-b=4"]
    assert points([]) == [[]]
    assert run_dir_of("runs/r", []) == "runs/r"


def test_an_array_of_one_trains_where_it_was_checked() -> None:
    text = script(Job("1", 8), Path("r.yaml"), [], "runs/r", points(["train.seed=7"]))
    assert "run=runs/r-seed=7; overrides=(train.seed=7 run_dir=runs/r-seed=7)" in text
    assert "run=runs/r; overrides=()" in script(Job("1", 8), Path("r.yaml"), [], "runs/r", points([]))


def test_the_template_is_what_submit_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    template = REPOSITORY / "launch" / "slurm" / "train.sbatch"
    job = Job("8", 8, "24:00:00", "gpu", cpus_per_task=12, network="infiniband", grace_seconds=600)
    text = script(job, Path("launch/recipes/llama-3.1-70b.yaml"), [], "runs/llama-3.1-70b-math", [[]])
    lines = template.read_text().splitlines(keepends=True)
    kept = "".join(line for line in lines if not line.startswith("# EDIT: "))
    rendered = text.replace(f"{sys.executable} {TRAIN}", "python launch/train.py")
    assert kept == rendered.replace(f"#SBATCH --chdir={REPOSITORY}\n", "")  # the template's is where it is submitted
