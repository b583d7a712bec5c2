"""The training run. `train` reads from top to bottom: forward, loss, backward, update; then measure, evaluate, save."""

from __future__ import annotations

import json
import math
import socket
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fullft import activations, checkpoint, kernels, lease, model, signals, watchdog
from fullft.account import Account
from fullft.attention import form_groups
from fullft.cluster import Cluster, host_report, on_all, sum_over_ranks
from fullft.data.batches import Batch, Batches
from fullft.ends import (
    end_loading_if_asked,
    finish,
    leave_for_requeue,
    require_progress,
    stop_at_gate,
    stop_at_non_finite,
    stop_decided,
)
from fullft.engine import (
    for_evaluation,
    offloads_optimizer,
    require_same_choice,
    require_same_groups,
    start,
    with_parameters_on_host,
)
from fullft.errors import BadInput, Preempted
from fullft.flops import flops_and_peak
from fullft.head import Head
from fullft.loss import LabelWeights
from fullft.optim import build_optimizer, learning_rate
from fullft.preflight import Inputs
from fullft.profiling import Profile
from fullft.recipe import Recipe, differences, identity
from fullft.report.summary import score, summary_lines
from fullft.retention import divergence, rollback
from fullft.retention.base import ReferenceDivergence, ReplayDivergence, replay_divergence
from fullft.retention.gate import is_fine
from fullft.retention.pull import Pull, attach, averaged
from fullft.retention.suite import flat_metrics
from fullft.saver import Saver
from fullft.shards import start_optimizer
from fullft.state import remove_marker, set_state
from fullft.tiles import tile_mlps
from fullft.tracking import Tracker


def train(recipe: Recipe, cluster: Cluster, inputs: Inputs) -> None:
    """Train, from the start or from the newest checkpoint of the run folder, to the exported model. All ranks together,
    when the run folder is this job's (`lease.take_together`).

    Raises:
        TrainingStopped: loss or gradient norm is not finite; the weights are those of the step before.
        Preempted: a signal came, and the checkpoint of the last step is written.
        RetentionStopped: the gate of retention wants it so; the checkpoints of this step and of before the loss are
            written.
    """
    run = set_up(recipe, cluster, inputs)
    engine, tracker = run.engine, run.tracker
    head = Head(engine)
    if head.why_not:
        tracker.say(f"WARNING: the loss takes logits of all labels at once, and so more memory: {head.why_not}")
    evaluate_first(run)
    needs_base = recipe.train.kl_weight > 0 and run.step < inputs.total_steps
    kl_of_replay = know_base(recipe, cluster, inputs, engine, run.step, tracker) if needs_base else None
    profile = Profile(recipe, cluster, tracker.say)
    account = account_of(run, kl_of_replay, profile)

    signals.enter("training")
    if run.step == 0 and run.unevaluated is not None and recipe.retention.gate.action == "rollback":
        start_optimizer(engine)
        run.saver.copy()
        run.saver.write(checkpoint_state(run))  # what there is to go back to at first
    account.forget()
    while (step := run.step) < inputs.total_steps:
        account.phase("trace")
        profile.before(step + 1)
        torch.manual_seed(hash((recipe.train.seed, step, cluster.rank)))  # dropout, the same after a resume
        account.phase("data", step + 1)
        batches = list(inputs.batches.of_step(step, cluster.rank))
        account.phase("token count")
        # The loss is a mean over the labels of the global batch, so their number must be known before backward.
        counts = count_tokens(batches, engine.device, *account.flops_of(batches))
        task_labels, replay_labels, tokens_of_step, *flops_of_step = counts
        of_kl = recipe.train.kl_weight * run.gentler.pull / inputs.batches.replay_labels_of_step
        weights = LabelWeights.of_step(task_labels, replay_labels, inputs.batches.replay_label_weight, of_kl)
        sums = torch.zeros(3, dtype=torch.float64, device=engine.device)  # cross-entropy of task, of replay; divergence

        for batch in (batch.to(engine.device) for batch in batches):
            account.phase("forward")
            # 1. Forward pass, whose last module is the loss: the head makes logits of some positions at a time, of them
            # 2. Token cross-entropy and, of replay rows, divergence from the base model; nats and kl: sums of each row
            loss, nats, kl = head.loss(batch, weights, kl_of_replay)
            of_replay = torch.where(batch.replay, nats, 0.0).sum()
            sums += torch.stack([nats.sum() - of_replay, of_replay, kl.sum()])
            # 3. Backward pass. ZeRO averages gradients over the ranks, and the loss is a sum over them, hence × ranks.
            account.phase("backward")
            engine.backward(loss * cluster.world_size, scale_wrt_gas=False)

        # 4. AdamW update (gradients clipped to train.max_grad_norm; skipped by DeepSpeed if their norm is not finite),
        #    and with it the pull to the base weights and the moving average, if the recipe asks for them
        account.phase("update")
        rate = learning_rate(step, inputs.total_steps, recipe.train) * run.gentler.learning_rate
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        engine.step()

        account.phase("sums over ranks")
        *sums_of_step, signalled = sum_over_ranks(*sums.tolist(), bool(signals.name()), device=engine.device)
        loss_of_step = sums_of_step[0] * weights.task + sums_of_step[1] * weights.replay
        grad_norm = float(engine.get_global_grad_norm())
        if not (math.isfinite(loss_of_step) and math.isfinite(grad_norm)):
            run.saver.wait()
            stop_at_non_finite(recipe, cluster, inputs, step, batches, sums, grad_norm)
        run.step += 1
        run.tokens_seen += tokens_of_step

        seconds = account.end_step(tokens_of_step, *flops_of_step)
        account.phase("logging")
        row = {
            "train/global_step": run.step, "train/loss": loss_of_step, "train/grad_norm": grad_norm,
            "train/learning_rate": rate, "train/epoch": inputs.batches.epochs(run.step),
            "train/tokens": run.tokens_seen, "train/trained_tokens_of_step": task_labels + replay_labels,
        } | losses_by_kind(sums_of_step, task_labels, replay_labels, kl_of_replay is not None)  # fmt: skip
        row |= memory_metrics() | inputs.batches.account(step)
        speed = tokens_of_step / seconds
        show = f"loss {loss_of_step:.4f}  grad norm {grad_norm:.2f}  lr {rate:.2e}  {speed:,.0f} tokens/s"
        evaluate_log_save(run, account, row, show, seconds, signals.heed(signalled))  # the same on all ranks

    profile.end(run.step)
    run.saver.wait()
    finish(recipe, cluster, inputs, engine, tracker)


@dataclass
class Run:
    """A training under way."""

    recipe: Recipe
    cluster: Cluster
    inputs: Inputs
    engine: Any
    tracker: Tracker
    saver: Saver
    pull: Pull | None  # to the base weights
    step: int
    tokens_seen: int
    unevaluated: dict[str, Any] | None  # metrics of this step, if its evaluation is still to be done
    gentler: rollback.Gentler


def evaluate_first(run: Run) -> None:
    """Before the first step, or after a resume what a signal had kept from being done: evaluate, and do as the gate
    says."""
    if run.inputs.suite.tasks and run.unevaluated is not None:
        if (evaluation := evaluate(run.inputs, run.engine, run.step, run.tracker)) is None:
            leave_for_requeue(run.recipe, run.cluster, run.tracker, run.step)
        when = "before training" if run.step == 0 else "evaluated"
        run.tracker.log(run.step, run.unevaluated | evaluation.metrics, when)
        match evaluation.gate["decision"]:  # after a resume
            case "stop":
                stop_at_gate(run.recipe, run.cluster, run.tracker, run.saver, run.step, evaluation.gate)
            case "rollback":
                go_back(run, evaluation)
                run.unevaluated = None
    elif decided := on_all(lambda: stop_decided(run.recipe, run.step)):  # and it was killed before it had stopped
        stop_at_gate(run.recipe, run.cluster, run.tracker, run.saver, run.step, decided)


def account_of(run: Run, kl_of_replay: ReplayDivergence | ReferenceDivergence | None, profile: Profile) -> Account:
    """The account of the steps; what it cannot measure is told."""
    flops, peak, unknown = flops_and_peak(run.inputs.meta, run.inputs.deepspeed_config["bf16"]["enabled"])
    checkpointing, tiled = run.inputs.plan["activation_checkpointing"], run.recipe.train.mlp_tiles > 1
    account = Account(run.engine, flops, peak, checkpointing, tiled, profile.phase)
    if isinstance(kl_of_replay, ReferenceDivergence):
        account.listen(kl_of_replay.engine, trains=False)
    for lacking in filter(None, (unknown, account.why_no_waits)):
        run.tracker.say(lacking)
    return account


def evaluate_log_save(
    run: Run, account: Account, row: dict[str, Any], show: str, seconds: float, stopping: bool
) -> None:
    """After a step, which took so long: evaluate, log its row and save, as far as each is due; then do as the gate and
    signals (`stopping`) say."""
    recipe, step, total = run.recipe, run.step, run.inputs.total_steps
    to_evaluate = bool(run.inputs.suite.tasks) and run.inputs.suite.budget.is_due(step, seconds)
    if to_evaluate and not stopping:
        account.phase("evaluation")
    evaluation = evaluate(run.inputs, run.engine, step, run.tracker) if to_evaluate and not stopping else None
    abandoned = to_evaluate and evaluation is None  # by a signal; done after the resume, and the row logged then
    stopping |= abandoned
    verdict = evaluation.gate["decision"] if evaluation else "continue"
    to_save = stopping or verdict == "stop" or is_due(step, recipe.checkpoint.every_steps, total)
    to_save |= run.saver.keep_good and evaluation is not None and evaluation.is_fine
    to_save &= verdict != "rollback"
    if to_save:
        account.phase("checkpoint")
        run.saver.copy()
    is_logged = bool(evaluation) or is_due(step, recipe.tracking.every_steps, total)
    if run.pull is not None and is_logged:
        row["train/l2_distance"] = run.pull.distance()
    account.phase("logging")
    if is_logged or abandoned:
        row |= account.row()
    if is_logged and not abandoned:
        run.tracker.log(step, row | (evaluation.metrics if evaluation else {}) | run.saver.metrics(), show)
    if to_save:  # in the background, and after the row: a run that goes on from here does not log it again
        account.phase("checkpoint")
        run.saver.write(checkpoint_state(run) | {"unevaluated": row if abandoned else None})
    if evaluation and verdict == "stop":
        stop_at_gate(recipe, run.cluster, run.tracker, run.saver, step, evaluation.gate)
    if evaluation and verdict == "rollback":
        go_back(run, evaluation)
        account.forget()
    if stopping:
        run.saver.wait()
        require_progress(recipe, run.cluster, run.tracker, run.saver, step)
        leave_for_requeue(recipe, run.cluster, run.tracker, run.saver.saved_step)


def checkpoint_state(run: Run) -> dict[str, Any]:
    batches = run.inputs.batches
    state = {"step": run.step, "tokens_seen": run.tokens_seen, "recipe": identity(run.recipe)}
    state |= {"data": batches.fingerprint, "replay_label_weight": batches.replay_label_weight}
    return state | {"world_size": run.cluster.world_size, "rollbacks": run.gentler.rollbacks}


def is_due(step: int, every: int | None, total: int) -> bool:
    return step == total or (every is not None and step % every == 0)


def set_up(recipe: Recipe, cluster: Cluster, inputs: Inputs) -> Run:
    """Run folder, model, engine and checkpoint.

    Raises:
        Preempted: a signal came to a rank.
    """
    told: list[Any] = [None] * cluster.world_size  # of each rank
    groups = inputs.deepspeed_config["zero_optimization"].get("zero_hpz_partition_size", 1)
    chosen = [inputs.plan[name] for name in ("micro_batch_size", "activation_checkpointing", "deepspeed")]
    dist.all_gather_object(told, (socket.gethostname(), groups, *chosen))
    require_same_choice([(host, *chosen) for host, _, *chosen in told])
    require_same_groups([(host, size) for host, size, *_ in told], recipe)
    hosts = [host for host, *_ in told]
    if cluster.is_main:
        _describe_run(recipe, cluster, inputs, hosts)
        print(f"loading {recipe.model.path}", flush=True)
    elif lease.is_held():  # of the folder of another node
        lease.write(recipe.run_folder / "recipe.yaml", recipe.to_yaml())
    watchdog.start(recipe.run_folder, recipe.train.hang_timeout)
    torch.manual_seed(recipe.train.seed)
    resumes = [checkpoint.newest(recipe.run_folder / "checkpoints") is not None]
    dist.broadcast_object_list(resumes, src=0)
    end_loading_if_asked(recipe, cluster, "loading of the model")
    # The pull needs the base weights; else a checkpoint has all that is needed.
    read = not resumes[0] or recipe.train.l2_pull > 0
    form_groups(recipe.train.sequence_parallel, recipe.train.timeout_minutes)
    loaded = model.load(recipe, inputs.deepspeed_config, inputs.tokenizer, read, inputs.attention)
    chosen, checkpointing = on_all(lambda: (inputs.plan["kernels"], inputs.plan["activation_checkpointing"]))
    kernels.apply(loaded, chosen, checkpointing)
    tile_mlps(loaded, recipe.train.mlp_tiles)  # around what the kernels have put in
    activations.enable(loaded, checkpointing)
    end_loading_if_asked(recipe, cluster, "start of the engine")
    optimizer = build_optimizer(loaded, recipe.train, offloads_optimizer(inputs.deepspeed_config))
    engine = start(loaded, optimizer, inputs.deepspeed_config)
    pull = attach(engine, recipe.train, model.new_rows(recipe, inputs.meta, inputs.deepspeed_config, inputs.tokenizer))
    trainable = sum(parameter.ds_numel for parameter in engine.module.parameters() if parameter.requires_grad)
    if trainable != inputs.facts.parameters:
        raise RuntimeError(
            f"{trainable} of {inputs.facts.parameters} parameters are trainable; full fine-tuning trains all"
        )
    end_loading_if_asked(recipe, cluster, "loading of the checkpoint")
    on_all(lambda: rollback.finish(recipe.run_folder))  # one that was killed
    resumed = checkpoint.load_newest(engine, recipe.run_folder / "checkpoints")
    if recipe.data.packing:
        model.require_documents_apart(engine, inputs.plan["micro_batch_size"], recipe.train.sequence_parallel)

    if resumes[0] and not resumed:
        raise RuntimeError(f"no checkpoint of {recipe.run_folder} was loaded, and so the base weights were not read")
    step, tokens_seen = (resumed["step"], resumed["tokens_seen"]) if resumed else (0, 0)
    unevaluated: dict[str, Any] | None = resumed.get("unevaluated") if resumed else {}
    end_loading_if_asked(recipe, cluster, "start of tracking")
    if resumed:
        require_same(resumed, recipe, inputs.batches)
    if resumed and resumed.get("rollbacks", 0) > on_all(lambda: len(rollback.made(recipe.run_folder))):
        raise BadInput(
            f"run_dir: {resumed['path']} is of after a rollback that {recipe.run_folder}/retention/rollbacks.json does "
            "not tell of; put it back, or use another run_dir"
        )
    tracker = Tracker(recipe, cluster.is_main, inputs.total_steps, step, step - (unevaluated is not None))
    keep_good = recipe.retention.goes_back
    saver = Saver(engine, recipe.run_folder / "checkpoints", recipe.checkpoint, tracker, step, keep_good)
    for line in _introduction(recipe, cluster, inputs, trainable):
        tracker.say(line)
    if resumed:
        for skipped in resumed["skipped"]:
            tracker.say(f"skipped checkpoint {skipped}")
        tracker.say(f"resumed from {resumed['path']} at step {step}")
    gentler = know_rollbacks(recipe, pull)
    return Run(recipe, cluster, inputs, engine, tracker, saver, pull, step, tokens_seen, unevaluated, gentler)


def require_same(resumed: dict[str, Any], recipe: Recipe, batches: Batches) -> None:
    """Raises BadInput if a checkpoint's state is not of this recipe and data."""
    if resumed["data"] != batches.fingerprint:
        raise BadInput(
            f"data.train: the data or its tokenization has changed since {resumed['path']}; use another run_dir"
        )
    if changed := differences(resumed["recipe"], identity(recipe), in_both=True):
        raise BadInput(f"run_dir: {resumed['path']} is of another recipe ({changed}); use another run_dir")
    before, now = resumed.get("replay_label_weight", 1.0), batches.replay_label_weight
    if before != now:
        raise BadInput(
            f"data.replay_weight: up to {resumed['path']} a label of replay counted {before:g} of another one, now "
            f"{now:g}; use another run_dir"
        )


def count_tokens(batches: list[Batch], device: Any, *more: float) -> tuple[int, ...]:
    """(labels of task rows, of replay rows, tokens without padding, and what more is to be summed) of the global batch:
    all micro-batches of all ranks."""
    labels = sum(sum(batch.labelled.counts) for batch in batches)
    counts = [zip(batch.labelled.counts, batch.is_replay, strict=True) for batch in batches]
    replay = sum(count for rows in counts for count, is_replay in rows if is_replay)
    tokens = sum(batch.tokens for batch in batches)
    return tuple(int(count) for count in sum_over_ranks(labels - replay, replay, tokens, *more, device=device))


def losses_by_kind(sums: list[float], task_labels: int, replay_labels: int, has_kl: bool) -> dict[str, float]:
    """Means over their own tokens, nats, of the kinds of rows that the step has; none if it has no replay rows."""
    if not replay_labels:
        return {}
    found = {"train/loss_replay": sums[1] / replay_labels}
    found |= {"train/loss_kl": sums[2] / replay_labels} if has_kl else {}
    return found | ({"train/loss_task": sums[0] / task_labels} if task_labels else {})


def know_base(
    recipe: Recipe, cluster: Cluster, inputs: Inputs, engine: Any, step: int, tracker: Tracker
) -> ReplayDivergence | ReferenceDivergence:
    """What the divergence from the base model on replay rows is taken from."""
    watchdog.mark("base model")
    if recipe.train.kl_reference == "model":
        config = for_evaluation(inputs.deepspeed_config)
        config = with_parameters_on_host(config) if recipe.train.kl_reference_offload else config
        loaded = model.load(recipe, config, inputs.tokenizer, attention=inputs.attention).requires_grad_(False)
        base = start(loaded, None, config)
        base.eval()
        return ReferenceDivergence(base)
    try:
        kl_of_replay, line = replay_divergence(recipe, inputs.batches, engine, step, inputs.total_steps)
    except Preempted:
        leave_for_requeue(recipe, cluster, tracker, step)
    tracker.say(line)
    return kl_of_replay


@dataclass(frozen=True)
class Measured:
    """What an evaluation has for the loop."""

    metrics: dict[str, Any]
    gate: dict[str, Any]  # `decision` and why, the same on all ranks
    is_fine: bool  # every retention task is within its limit


def evaluate(inputs: Inputs, engine: Any, step: int, tracker: Tracker) -> Measured | None:
    """Run the retention suite; its numbers and what the gate decides, or None if a signal came to a rank."""
    watchdog.mark("evaluation", step)
    try:
        inputs.divergence.know_base(engine, step, tracker.say)  # once, so it is not what an evaluation takes
        started = time.perf_counter()
        with averaged(engine) as weights:
            distance = inputs.divergence.measure(engine, tracker.say)
            report = inputs.suite.evaluate(engine, step, weights, distance, started)
    except Preempted:
        tracker.say(f"evaluation at step {step} abandoned; it is done when the run goes on")
        return None
    tracker.say(f"evaluation at step {step} ({time.perf_counter() - started:.1f} s)")
    for line in summary_lines(report):
        tracker.say(line)
    metrics: dict[str, Any] = {"train/global_step": step, "time/evaluation_seconds": time.perf_counter() - started}
    metrics |= flat_metrics(report) | divergence.metrics(distance) | {"checkpoint/score": score(report)}
    gate = report["gate"]
    for reason in gate["reasons"]:
        tracker.say(f"RETENTION {gate['decision'].upper()} at step {step}: {reason}")
    if gate["decision"] != "continue":
        for task, times in gate["breaches_in_row"].items():
            if times:  # the title is always the same, so that W&B can limit how often it tells
                tracker.alert(f"retention of {task}", f"step {step}, {gate['decision']}: {'; '.join(gate['reasons'])}")
    return Measured(metrics, gate, is_fine(report))


def know_rollbacks(recipe: Recipe, pull: Pull | None) -> rollback.Gentler:
    """How much gentler the run has to train since its rollbacks; the pull is set so. All ranks together."""
    gentler: rollback.Gentler = on_all(lambda: rollback.gentler(recipe.run_folder))
    if pull is not None:
        pull.strength = recipe.train.l2_pull * gentler.pull
    return gentler


def go_back(run: Run, evaluation: Measured) -> None:
    """Load the checkpoint of before the loss, and put aside what came after it. All ranks together.

    Raises:
        RetentionStopped: there is no checkpoint of before the loss.
    """
    run.saver.wait()
    watchdog.mark("rollback", run.step)
    folder, gate = run.recipe.run_folder, run.recipe.retention.gate
    if not on_all(lambda: rollback.begin(folder, run.step, gate, evaluation.gate["reasons"])):
        reasons = [*evaluation.gate["reasons"], "there is no checkpoint of before it to go back to"]
        told = evaluation.gate | {"reasons": reasons}
        stop_at_gate(run.recipe, run.cluster, run.tracker, run.saver, run.step, told)
    on_all(lambda: rollback.finish(folder))
    state = checkpoint.load_newest(run.engine, folder / "checkpoints")
    assert state is not None
    run.step, run.tokens_seen = state["step"], state["tokens_seen"]
    run.tracker.rewind(run.step)
    run.saver.rewind(run.step)
    run.gentler = gentler = know_rollbacks(run.recipe, run.pull)
    run.tracker.say(
        f"rolled back to step {run.step} (rollback {gentler.rollbacks} of at most {gate.max_rollbacks}); the "
        f"learning rate is now {gentler.learning_rate:g}, pull and divergence {gentler.pull:g} times the recipe's"
    )


def memory_metrics() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    statistics = torch.cuda.memory_stats()
    return {
        "memory/peak_gib": statistics["reserved_bytes.all.peak"] / 2**30,
        "memory/alloc_retries": statistics["num_alloc_retries"],
    }


def _describe_run(recipe: Recipe, cluster: Cluster, inputs: Inputs, hosts: list[str]) -> None:
    """Write down in the run folder what is trained in it, and where (`hosts`: of each rank).

    Raises:
        BadInput: it cannot be written.
    """
    folder = recipe.run_folder
    environment: dict[str, Any] = host_report() | {"launcher": cluster.launcher, "world_size": str(cluster.world_size)}
    environment["ranks_of_host"] = {host: hosts.count(host) for host in sorted(set(hosts))}
    try:
        lease.write(folder / "recipe.yaml", recipe.to_yaml())
        lease.write(folder / "env.json", json.dumps(environment, indent=1))
        lease.write(folder / "plan.json", json.dumps(inputs.plan | {"warnings": inputs.warnings}, indent=1))
        remove_marker(folder)
        set_state(folder, "running")
        if (folder / "export").exists():  # of an end that was interrupted: it is exported again
            lease.remove(folder / "export")
    except OSError as error:
        raise BadInput(f"run_dir: {folder} cannot be written ({error}); mend it, or choose another run_dir") from None


def _ranks(recipe: Recipe, cluster: Cluster) -> str:
    parts = recipe.train.sequence_parallel
    return f"{cluster.world_size} ranks" if parts == 1 else f"{cluster.world_size // parts} groups of {parts} ranks"


def _introduction(recipe: Recipe, cluster: Cluster, inputs: Inputs, trainable: int) -> list[str]:
    plan = inputs.plan
    return [
        f"model  {inputs.facts.architecture}, {trainable:,} parameters, all trainable, {model.precision(recipe)}; "
        f"ZeRO-3 over {cluster.world_size} ranks",
        *(f"data   {line}" for line in inputs.batches.describe(inputs.total_steps)),
        f"step   {recipe.train.global_batch_size} sequences = micro-batch {plan['micro_batch_size']} × accumulation "
        f"{plan['gradient_accumulation_steps']} × {_ranks(recipe, cluster)}; {inputs.total_steps} steps",
        f"attn   {inputs.attention.name}: {inputs.attention.reason}",
        f"speed  kernels: {plan['kernels_why']}",
        f"memory activation checkpointing: {plan['activation_checkpointing_why']}",
        *([f"memory deepspeed: {plan['deepspeed_why']}"] if plan["deepspeed_why"] else []),
        f"run    {recipe.run_folder}",
        *(f"warning: {warning}" for warning in inputs.warnings),
    ]
