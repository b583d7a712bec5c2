"""How a training run ends: well, by a signal, by the gate of retention, or by a loss that is not finite.

Each end waits for what is being saved, says in state.json and on stderr why it is, and raises the same error on all
ranks, whose class is the exit code.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from fullft import checkpoint, lease, model, signals, watchdog
from fullft.cluster import Cluster, on_all
from fullft.data.batches import Batch
from fullft.errors import LeaseLost, Preempted, RetentionStopped, TrainingStopped
from fullft.export import export
from fullft.preflight import Inputs
from fullft.recipe import Recipe
from fullft.report.runlog import evaluations
from fullft.report.summary import model_card, write_report
from fullft.retention import rollback
from fullft.retention.rollback import step_of
from fullft.saver import Saver
from fullft.state import failure, leave_marker, set_state, status
from fullft.tracking import Tracker


def finish(recipe: Recipe, cluster: Cluster, inputs: Inputs, engine: Any, tracker: Tracker) -> None:
    """Export the model, write the report, and mark the run as done. (A failed export leaves a report too: not done.)"""
    watchdog.mark("export")
    summary = write_report(recipe.run_folder) if cluster.is_main else {}
    card = model_card(recipe, summary) if cluster.is_main else ""
    export(engine, inputs.meta, inputs.tokenizer, recipe, inputs.plan["export_dtype"], card)
    tracker.artifact("model", recipe.run_folder / "export", {"step": inputs.total_steps})
    signals.enter("over")
    if cluster.is_main:
        summary = write_report(recipe.run_folder, status="done", step=inputs.total_steps)
        if summary:  # not of a folder with a damaged file
            tracker.artifact("report", recipe.run_folder / "report.html", {"step": inputs.total_steps})
        set_state(recipe.run_folder, "done", step=inputs.total_steps)
    tracker.finish(summary.get("metrics", {}))
    if summary:
        tracker.say(summary["verdict"]["sentence"])
    there = f", report in {recipe.run_folder / 'report.html'}" if summary else ""
    tracker.say(f"done: tuned model in {recipe.run_folder / 'export'}{there}")


def end_loading_if_asked(recipe: Recipe, cluster: Cluster, next_phase: str) -> None:
    if signals.agreed(model.device()):
        saved = checkpoint.newest(recipe.run_folder / "checkpoints")
        leave_for_requeue(recipe, cluster, None, int(saved.name.removeprefix("step-")) if saved else 0)
    watchdog.mark(next_phase)


def leave_for_requeue(recipe: Recipe, cluster: Cluster, tracker: Tracker | None, step: int) -> NoReturn:
    """The end that a signal asked for: everything up to `step` is saved. All ranks together."""
    if cluster.is_main:
        leave_marker(recipe.run_folder, step, signals.name(), saved=True)
        set_state(recipe.run_folder, "requeue", step=step, signal=signals.name())
        print(f"{signals.name()}: saved up to step {step}; the same command goes on from there", flush=True)
    if tracker:
        tracker.finish({})
    raise Preempted


def require_progress(recipe: Recipe, cluster: Cluster, tracker: Tracker, saver: Saver, step: int) -> None:
    """Raises TrainingStopped when a signal ends the run and nothing of it could be saved: it would be so each time."""
    if saver.saved_step > saver.resumed_step:
        return
    message = f"{signals.name()} came at step {step}, and no checkpoint of this start could be written"
    if cluster.is_main:
        set_state(recipe.run_folder, "failed", reason=message)
        print(f"fullft: {message}; nothing asks for another start", file=sys.stderr, flush=True)
    tracker.finish({})
    dist.barrier()  # the first rank to end takes the others with it
    raise TrainingStopped(message)


def stop_decided(recipe: Recipe, step: int) -> dict[str, Any] | None:
    """What the gate said at this step if it was to stop, and the recipe's gate is still the same."""
    for one in evaluations(recipe.run_folder, step):
        gate: dict[str, Any] = one.get("gate") or {}  # runs of before there was a gate have none
        is_same = gate.get("settings") == recipe.retention.gate_settings
        if one["step"] == step and gate.get("decision") == "stop" and is_same:
            return gate
    return None


def stop_at_gate(
    recipe: Recipe, cluster: Cluster, tracker: Tracker, saver: Saver, step: int, gate: dict[str, Any]
) -> NoReturn:
    """The end that the gate wants, once the checkpoint of this step is on disk. All ranks together."""
    saver.wait()
    good = on_all(lambda: rollback.target(recipe.run_folder, step))
    keep = f"fullft export {recipe.run_dir} FOLDER --step {step_of(good)}" if good else "there is no checkpoint"
    reason = (
        f"step {step}: {'; '.join(gate['reasons'])}. The model of before the loss: {keep}. To train on all the same, "
        f"raise {limits_of_breaches(recipe, gate)} or set retention.gate.action=alert, and start again. Else train "
        "into another run_dir, with a lower train.learning_rate, data.replay, train.kl_weight or train.l2_pull"
    )
    if cluster.is_main:
        write_report(recipe.run_folder, status="stopped", reason=reason, step=step)
        set_state(recipe.run_folder, "stopped", reason=reason, step=step, gate=gate["settings"])
        print(f"fullft: training stopped by retention.gate at {reason}", file=sys.stderr, flush=True)
    signals.enter("over")
    tracker.finish({})
    dist.barrier()  # the first rank to end takes the others with it
    raise RetentionStopped(reason)


def limits_of_breaches(recipe: Recipe, gate: dict[str, Any]) -> str:
    """The keys of the limits that the tasks of a gate's decision have passed."""
    keys = [
        "retention.gate.max_drop" if task.max_drop is None else f"retention.tasks.{number}.max_drop"
        for number, task in enumerate(recipe.retention.tasks)
        if gate["breaches_in_row"].get(task.name)
    ]
    return " and ".join(sorted(set(keys)))


def stop_at_non_finite(
    recipe: Recipe,
    cluster: Cluster,
    inputs: Inputs,
    step: int,
    batches: list[Batch],
    sums: torch.Tensor,
    grad_norm: float,
) -> None:
    """Save what led to a loss or gradient norm that is not finite, and stop on all ranks."""
    lease.check()
    folder = recipe.run_folder / "failure" / f"step-{step + 1:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save([asdict(batch) for batch in batches], folder / f"rank-{cluster.rank}.pt")
    losses: list[Any] = [None] * cluster.world_size
    dist.all_gather_object(losses, float(sums.sum()))
    if cluster.is_main:
        rows = inputs.batches.rows_of_step(step)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    broken = [str(rank) for rank, value in enumerate(losses) if not math.isfinite(value)]
    what = (
        f"the loss of rank {', '.join(broken)} is not finite" if broken else "the loss is finite, its gradient is not"
    )
    good = checkpoint.newest(recipe.run_folder / "checkpoints")
    message = (
        f"step {step + 1}: {what} (gradient norm {grad_norm}). The rows and batches of this step are in {folder}. "
        + (f"Last good checkpoint: {good}. " if good else "There is no checkpoint yet. ")
        + "Look at the rows, or lower train.learning_rate; started again, the same data come in the same order."
    )
    if cluster.is_main:
        set_state(recipe.run_folder, "stopped", reason=message)
        print(f"fullft: training stopped at {message}", file=sys.stderr, flush=True)
    dist.barrier()  # the first rank to end takes the others with it, so all must have written before
    raise TrainingStopped(message)


def mark_failed(folder: Path, reason: str) -> None:
    """state.json: failed, if this process owns the folder and trains into it; by what the first rank has left that did,
    as the others meet no more than its absence."""
    if lease.is_held() and status(folder) == "running":
        with contextlib.suppress(OSError, LeaseLost):  # what has failed may be the disk
            set_state(folder, "failed", reason=failure(folder) or reason)
        lease.release()
