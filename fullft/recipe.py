"""The recipe: every key of a run with its default, unit and rule. One YAML file plus `key.path=value` overrides.

The recipe says *what* is trained; the cluster says how. The same recipe on another number of GPUs makes the same
optimisation steps, because the global batch is a key and gradient accumulation is derived from it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fullft.errors import BadInput


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    path: str = Field(description="Hugging Face folder or hub name of the base model")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="varlen: torch's kernel for packed documents, on CPU a call for each; sdpa, eager: with a "
        "mask of sequence_length² elements; flash_attention_2, 3: of the package flash-attn; auto: the first of "
        "varlen, sdpa, eager that the model can use. Checked to keep packed documents apart"
    )  # fmt: skip
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    new_tokens: tuple[str, ...] = Field(
        (), description="special tokens added to the tokenizer; their embeddings start as the mean of the old ones"
    )
    vocabulary_multiple: int | None = Field(
        None, ge=1, description="grow the embedding to hold all ids of the tokenizer, to a multiple of this, e.g. 64"
    )

    @property
    def grows(self) -> bool:
        """Whether the embedding may have more rows than its files."""
        return bool(self.new_tokens or self.vocabulary_multiple)


def _compiles(pattern: str | None) -> str | None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return pattern


def _known_fields(fields: dict[str, str]) -> dict[str, str]:
    if unknown := sorted(fields.keys() - set(ROW_FIELDS)):
        raise ValueError(f"{', '.join(unknown)}: no such field; fields are {', '.join(ROW_FIELDS)}")
    return fields


ROW_FIELDS = (
    "messages", "conversations", "tools", "prompt", "completion", "instruction", "input", "output", "system", "text",
    "input_ids", "labels", "context", "question", "choices", "answer", "cluster",
)  # fmt: skip


class Source(Section):
    """One data set. In a recipe a bare string stands for `{path: string}`."""

    path: str = Field(description=".jsonl, .json or .parquet file, a glob of them, an Arrow folder, or a hub name")
    split: str = Field("train", description="split of an Arrow folder or hub data set")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    format: Literal[
        "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text", "tokens", "multiple_choice"
    ] = Field("auto", description="shape of a row; auto: told by its fields, and multiple_choice for such a task")
    fields: Annotated[dict[str, str], AfterValidator(_known_fields)] = Field(
        {}, description="our field name: name of the column in the data, e.g. {output: answer}"
    )
    limit: int | None = Field(None, ge=1, description="take only the first rows")


class TrainingSource(Source):
    """A data set to train on, and how much of the run it is: without weight and fraction every row once an epoch."""

    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_.-]+$", description="stands in logs and metrics; default: from the path"
    )
    weight: float | None = Field(
        None, gt=0, description="how often its rows are seen in an epoch (default 1); 0.5: half of them"
    )
    fraction: float | None = Field(None, gt=0, lt=1, description="share of all tokens of the run, instead of a weight")
    max_epochs: float | None = Field(
        None, gt=0, description="most passes over it in the run, the rest of its share goes to the other sets; "
        "default: repeated as often as its share needs"
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_share(self) -> TrainingSource:
        if self.weight is not None and self.fraction is not None:
            raise ValueError("give weight (per epoch) or fraction (of all tokens), not both")
        return self


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


SourceLike = Annotated[Source, BeforeValidator(_as_source)]
Sources = Annotated[list[SourceLike], BeforeValidator(_as_list)]
TrainingSources = Annotated[list[Annotated[TrainingSource, BeforeValidator(_as_source)]], BeforeValidator(_as_list)]


class Data(Section):
    train: TrainingSources = Field(min_length=1, description="training sets")
    replay: TrainingSources = Field(
        [], description="general data mixed in against forgetting; each has a fraction of all tokens"
    )
    replay_weight: float | None = Field(
        None, ge=0, lt=1, description="share of the replay sets in the loss, whatever the lengths of their texts; "
        "default: the sum of their fractions"
    )  # fmt: skip
    validation: Sources = Field([], description="held-out rows of the new task; their loss is logged as eval/loss")
    sequence_length: int = Field(2048, ge=8, description="tokens of one sequence (one packed bin or one row)")
    packing: bool = Field(True, description="fill sequences with several documents; attention never crosses documents")
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant", description="which turns of chat rows carry loss; weight or train flags of messages narrow it"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="rows that cannot be used: stop, or skip and count"
    )
    on_too_long: Literal["error", "drop", "truncate", "split"] = Field(
        "error", description="rows above sequence_length: stop, drop, cut the end, or split into several documents"
    )
    on_leak: Literal["warn", "drop", "error"] = Field(
        "warn", description="training rows that stand in validation or a task's data: tell, leave out, or stop"
    )
    on_missing_cache: Literal["prepare", "error"] = Field(
        "prepare", description="a launch without prepared data: one process prepares, or ask for `fullft prepare`"
    )
    cache_dir: str | None = Field(None, description="tokenized data; default: `cache` beside the run folder")

    @model_validator(mode="after")
    def _shares(self) -> Data:
        problems = [f"replay.{at}: needs a fraction" for at, one in enumerate(self.replay) if one.fraction is None]
        if self.replay_weight is not None and not self.replay:
            problems.append("replay_weight: there is no replay; give data.replay a set, or leave it out")
        fractions = [one.fraction or 0 for one in self.training_sets]
        if sum(fractions) > 1 + 1e-9 or (sum(fractions) > 1 - 1e-9 and not all(fractions)):
            problems.append(f"the fractions of train and replay sum to {sum(fractions):g}: none is left for the rest")
        elif all(fractions) and abs(sum(fractions) - 1) > 1e-9:
            problems.append(f"every set has a fraction, and they sum to {sum(fractions):g} instead of 1")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def training_sets(self) -> list[TrainingSource]:
        return [*self.train, *self.replay]

    @property
    def names(self) -> list[str]:
        """A name of each training set, no two the same."""
        names: list[str] = []
        for source in self.training_sets:
            path = Path(source.path)
            stem = path.stem if path.suffix in (".jsonl", ".json", ".parquet") else path.name
            plain = source.name or re.sub(r"[^A-Za-z0-9_.-]", "_", stem) or "data"
            twins = sum(name == plain or name.startswith(f"{plain}#") for name in names)
            names.append(f"{plain}#{twins + 1}" if twins else plain)
        return names


def _as_checkpointing(value: Any) -> Any:
    """Recipes say true or false as well."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class Train(Section):
    epochs: float | None = Field(None, gt=0, description="passes over the training data (default 1; or give steps)")
    steps: int | None = Field(None, ge=1, description="optimizer steps (instead of epochs)")
    global_batch_size: int = Field(64, ge=1, description="sequences of one optimizer step, over all GPUs")
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="sequences of one forward pass on one GPU; auto: what is fastest of those that fit its memory"
    )
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    min_learning_rate: float = Field(0.0, ge=0, description="learning rate at the end of the cosine or linear schedule")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: float = Field(
        0.03, ge=0, description="optimizer steps of linear warm-up; below 1: share of all steps"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    no_decay: list[Literal["norm", "bias", "embedding"]] = Field(
        ["norm", "bias", "embedding"], description="kinds of parameters without weight decay"
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="gradient norm is clipped to this; 0: no clipping")
    layerwise_lr_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of a layer over that of the layer above it; below 1 the layers "
        "near the input, which hold what is general, move less"
    )  # fmt: skip
    l2_pull: float = Field(
        0.0, ge=0, description="pull to the base weights (L2-SP, decoupled): w += learning rate × l2_pull × (base - w) "
        "after each update"
    )  # fmt: skip
    l2_pull_offload: bool = Field(False, description="keep the base weights of l2_pull in host memory")
    kl_weight: float = Field(
        0.0, ge=0, description="weight in the loss of the KL divergence from the base model: that times the mean over "
        "the run's replay tokens, nats a token; of each step in proportion to its replay tokens"
    )  # fmt: skip
    kl_reference: Literal["cache", "model"] = Field(
        "cache", description="the base model of kl_weight: its likeliest tokens on the replay rows, computed before "
        "the first step, or a second copy of it in ZeRO-3 shards (exact)"
    )  # fmt: skip
    kl_reference_offload: bool = Field(False, description="keep the second copy of kl_reference: model in host memory")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="keep an exponential moving average of the weights, 4 bytes a parameter over all "
        "ranks, which is what is evaluated and exported; lower in the first steps t, at most (1 + t) / (10 + t); 0: off"
    )  # fmt: skip
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="bf16 keeps fp32 master weights; auto: bf16 on GPU, fp32 on CPU"
    )
    sequence_parallel: int = Field(
        1, ge=1, description="GPUs that share a micro-batch, each with a part of every sequence (Ulysses): for "
        "sequences too long for one GPU; divides the number of GPUs, data.sequence_length and the attention heads"
    )  # fmt: skip
    mlp_tiles: int = Field(
        1, ge=1, description="run each MLP over so many parts of the tokens in turn, and again in backward: "
        "its inner activations take that much less memory"
    )  # fmt: skip
    activation_checkpointing: Annotated[
        Literal["none", "selective", "full", "offload", "auto"], BeforeValidator(_as_checkpointing)
    ] = Field(
        "auto", description="recompute activations in backward, for memory: selective keeps attention and every second "
        "matrix product, full the inputs of layers (25 % slower), offload keeps those in host memory; auto: the least "
        "of it that fits the GPU"
    )  # fmt: skip
    on_no_memory: Literal["error", "warn"] = Field(
        "error", description="a run that by the plan (`fullft plan`) does not fit the GPU: not started, or told"
    )
    kernels: Literal["auto", "none", "liger"] = Field(
        "auto", description="fused RMSNorm, rotary embedding and SwiGLU of liger-kernel; auto: on GPUs, if installed "
        "and made for the architecture"
    )  # fmt: skip
    profile: tuple[int, int] | None = Field(
        None, description="optimizer steps [first, last] over which torch's profiler traces rank 0 of each node, into "
        "profile/ of the run folder; at most 20, since a trace is held in memory; from the third on they are typical"
    )  # fmt: skip
    seed: int = Field(42, ge=0)
    timeout_minutes: float = Field(
        30, gt=0, description="a collective that waits longer ends the run; keep it above hang_timeout, which says why"
    )
    hang_timeout: float = Field(
        1500, gt=0, description="seconds without progress (micro-batch, update, evaluation batch, save, phase of "
        "loading) after which every rank writes its stacks to hang/ of the run folder, the ranks that are missing or "
        "behind are named, and the run ends; below timeout_minutes, which ends it without a word on who hangs"
    )  # fmt: skip

    @property
    def sequences_at_once(self) -> int:
        """micro_batch_size; 1 as long as it is `auto`."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        problems = []
        if self.steps is not None and self.epochs is not None:
            problems.append("give train.steps or train.epochs, not both")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            problems.append(
                f"profile {list(self.profile)}: give the first and the last optimizer step, counted from 1, e.g. [5, 7]"
            )
        elif self.profile is not None and self.profile[1] - self.profile[0] >= 20:
            problems.append(f"profile {list(self.profile)}: at most 20 steps, a trace is held in memory")
        if self.min_learning_rate > self.learning_rate:
            problems.append(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        if self.learning_rate * self.l2_pull > 1:
            problems.append(
                f"learning_rate × l2_pull is {self.learning_rate * self.l2_pull:g}, above 1: beyond the base"
            )
        if self.l2_pull_offload and not self.l2_pull:
            problems.append("l2_pull_offload does nothing without l2_pull")
        if self.kl_reference == "model" and not self.kl_weight:
            problems.append("kl_reference does nothing without kl_weight")
        if self.kl_reference_offload and self.kl_reference != "model":
            problems.append("kl_reference_offload does nothing without kl_reference: model")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Checkpoint(Section):
    every_steps: int = Field(500, ge=1, description="optimizer steps between checkpoints; one more at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: bool = Field(
        True, description="also keep the one with the best score: gain of skill tasks less loss of retention tasks"
    )
    asynchronous: bool = Field(
        True, description="training waits only for copies of the state in host memory (12 bytes a parameter, shared by "
        "all ranks), which are written in the background"
    )  # fmt: skip
    use_node_local_storage: bool = Field(
        False, description="run_dir may be another folder on each node: it has that node's part of each checkpoint, "
        "rank 0's the rest; only the same nodes can go on from it. Without, such a run_dir is refused"
    )  # fmt: skip
    lease_seconds: float = Field(
        60, ge=1, description="a run folder whose job does not renew its lease for so long is taken over by another job"
    )
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="auto: go on from the newest valid checkpoint of the run folder; never: refuse a used folder",
    )
    grace_seconds: float = Field(
        300, gt=0, description="time between SIGTERM or SIGUSR1 and the kill: the step is ended and saved in it, or "
        "the process leaves before"
    )  # fmt: skip


class Task(Section):
    """One thing measured before, during and after training, on the same items."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="stands in file names and metric names")
    kind: Literal["text", "multiple_choice", "generate", "harness"] = Field(
        description="text: bits per byte, perplexity and token accuracy; multiple_choice: the likeliest choice; "
        "generate: greedy answer compared with the last assistant turn; harness: a task of lm-evaluation-harness"
    )  # fmt: skip
    measures: Literal["retention", "skill"] = Field(
        "retention", description="retention: what the base model could do; skill: what it is to learn"
    )
    data: SourceLike | None = Field(None, description="rows to measure on; not for kind harness")
    metric: Literal["acc", "acc_norm"] | None = Field(
        None, description="multiple_choice: by log-likelihood (default), or by that over the characters of the choice; "
        "harness: that of the task, default acc if it has it, else its first mean over items"
    )  # fmt: skip
    cluster_field: str | None = Field(
        None,
        description="column that says which rows belong together (passage, subject), so that errors count them once",
    )
    max_drop: float | None = Field(
        None, ge=0, description="retention tasks: largest loss allowed, in the task's unit; default: "
        "retention.gate.max_drop"
    )  # fmt: skip
    harness_task: str | None = Field(None, description="harness: name of the task; default: name")
    harness_path: str | None = Field(None, description="harness: folder with task files of your own (YAML)")
    num_fewshot: int | None = Field(None, ge=0, description="harness: examples in the prompt; default: the task's")
    limit: int | None = Field(None, ge=1, description="harness: take only the first items")
    answer_pattern: Annotated[str | None, AfterValidator(_compiles)] = Field(
        None, description="generate: regular expression, whose last match (group 1 if any) in answer and reference is "
        "compared"
    )  # fmt: skip
    max_new_tokens: int = Field(256, ge=1, description="generate: longest answer, tokens")

    @model_validator(mode="before")
    @classmethod
    def _complete_data(cls, value: Any) -> Any:
        """What kind and cluster_field say of the rows, said to those who read them."""
        if not isinstance(value, dict) or not isinstance(data := _as_source(value.get("data")), dict):
            return value
        if value.get("kind") == "multiple_choice" and data.get("format", "auto") == "auto":
            data = data | {"format": "multiple_choice"}
        if (column := value.get("cluster_field")) and isinstance(fields := data.get("fields", {}), dict):
            data = data | {"fields": fields | {"cluster": column}}
        return value | {"data": data}

    @model_validator(mode="after")
    def _has_data(self) -> Task:
        if (self.data is None) != (self.kind == "harness"):
            raise ValueError(f"kind {self.kind} {'needs data' if self.data is None else 'has its own data'}")
        return self

    @model_validator(mode="after")
    def _does_what_it_says(self) -> Task:
        """A key that its kind ignores would pass for a setting. One that is as by default may stand: stored recipes
        have every key."""
        given = [name for name, field in Task.model_fields.items() if getattr(self, name) != field.default]
        problems = [
            f"{name} is for kind {' or '.join(_KINDS_OF[name])}, this is {self.kind}"
            for name in given
            if name in _KINDS_OF and self.kind not in _KINDS_OF[name]
        ]
        if self.limit is not None and self.data is not None:
            problems.append("the rows of this kind are limited by data.limit")
        if self.max_drop is not None and self.measures == "skill":
            problems.append("max_drop is for retention tasks, this one measures a skill")
        if problems:
            raise ValueError("; ".join(problems))
        return self


_KINDS_OF = {
    "limit": ("harness",), "num_fewshot": ("harness",), "harness_path": ("harness",), "harness_task": ("harness",),
    "metric": ("multiple_choice", "harness"), "cluster_field": ("text", "multiple_choice", "generate"),
    "answer_pattern": ("generate",), "max_new_tokens": ("generate",),
}  # fmt: skip


class Gate(Section):
    """What happens when a retention task has lost more than is allowed, beyond doubt."""

    action: Literal["none", "alert", "stop", "rollback"] = Field(
        "alert", description="alert: tell W&B; stop: save and exit with code 75; rollback: go back to the checkpoint "
        "before the loss, with a lower learning rate and a stronger pull. With stop and rollback a checkpoint is also "
        "saved at each evaluation in which every retention task is within its limit, and the last such one kept"
    )  # fmt: skip
    max_drop: float = Field(
        0.02, ge=0, description="largest loss allowed of a task: share of items for accuracies (0.02: two points), "
        "bits a byte or nats a token for texts"
    )  # fmt: skip
    patience: int = Field(2, ge=1, description="evaluations in a row that must show it; the last one counts at once")
    rollback_lr_factor: float = Field(0.5, gt=0, le=1, description="learning rate after a rollback, over that before")
    rollback_pull_factor: float = Field(1.0, ge=1, description="l2_pull and kl_weight after it, over those before")
    max_rollbacks: int = Field(2, ge=1, description="rollbacks of a run; the next breach stops it")

    @model_validator(mode="after")
    def _rollback_changes_something(self) -> Gate:
        if self.action == "rollback" and self.rollback_lr_factor == self.rollback_pull_factor == 1:
            raise ValueError(
                "with rollback_lr_factor 1 and rollback_pull_factor 1 the same training would be done again after a "
                "rollback; lower the one, or raise the other"
            )
        return self


class Retention(Section):
    every_steps: int | None = Field(
        None, ge=1, description="optimizer steps between evaluations; default: only first and last, or as often as "
        "max_overhead allows"
    )  # fmt: skip
    max_overhead: float | None = Field(
        None, gt=0, le=1, description="most time for evaluations while training, as a share of training time: picks "
        "how often, or with every_steps how many items; the first and the last evaluation are always whole"
    )  # fmt: skip
    confidence: float = Field(0.95, gt=0.5, lt=1, description="level of the confidence intervals")
    kl_tokens: int = Field(
        16384, ge=0, description="tokens of the training data, and of general text (text tasks of retention; without "
        "any the replay rows, which are trained on), on which the KL divergence from the base model is measured; 0: "
        "not measured"
    )  # fmt: skip
    kl_top_k: int = Field(64, ge=1, description="tokens of the base model's distribution that are kept for it")
    gate: Gate = Gate()  # type: ignore[call-arg]
    tasks: list[Task] = Field(
        [], description="tasks, each evaluated before the first step, while training and at the end"
    )
    generation_batch_size: int = Field(32, ge=1, description="prompts generated at once on one GPU")

    @property
    def goes_back(self) -> bool:
        """Whether a checkpoint of before a loss is needed."""
        return self.gate.action in ("stop", "rollback") and any(task.measures == "retention" for task in self.tasks)

    @property
    def gate_settings(self) -> dict[str, Any]:
        """All that the gate decides by: a run that it has stopped goes on when they are others."""
        limits = {task.name: task.max_drop for task in self.tasks if task.max_drop is not None}
        return self.gate.model_dump() | {"max_drop_of_tasks": limits}

    @model_validator(mode="after")
    def _unique_names(self) -> Retention:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1} | ({"validation"} & set(names)))
        if twice:
            raise ValueError(f"task names must differ from each other and from 'validation': {', '.join(twice)}")
        return self


class Tracking(Section):
    every_steps: int = Field(1, ge=1, description="optimizer steps between logged rows")
    wandb: Literal["online", "offline", "disabled"] = Field(
        "online", description="Weights & Biases; WANDB_MODE overrides it"
    )
    project: str = Field("fullft", description="W&B project; WANDB_PROJECT overrides it")
    entity: str | None = Field(None, description="W&B team or user; default: that of the API key, or WANDB_ENTITY")
    name: str | None = Field(None, description="W&B run name; default: name of the run folder")
    group: str | None = Field(None, description="W&B group that this run is shown in, e.g. its other seeds")
    notes: str | None = Field(None, description="what the run is for, in W&B")
    tags: list[str] = []


class Export(Section):
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="dtype of the exported weights; auto: that of training, so the export is what was evaluated"
    )
    max_shard_gb: float = Field(5, gt=0, description="largest weight file, GB")
    push_to_hub: str | None = Field(
        None, pattern=r"^[\w.-]+/[\w.-]+$", description="hub name (owner/name) that the export is uploaded to at the "
        "end; if it does not exist it is made, private"
    )  # fmt: skip


class Recipe(Section):
    run_dir: str = Field(description="folder of this run; resumed or refused when it exists, never overwritten")
    model: Model
    data: Data
    train: Train = Train()  # type: ignore[call-arg]
    checkpoint: Checkpoint = Checkpoint()  # type: ignore[call-arg]
    retention: Retention = Retention()  # type: ignore[call-arg]
    tracking: Tracking = Tracking()  # type: ignore[call-arg]
    export: Export = Export()  # type: ignore[call-arg]
    deepspeed: str = Field(
        "ds_configs/zero3.json",
        description="DeepSpeed configuration, whose `auto` values are filled in; or auto: of zero3.json, with hpZ and "
        "with the optimizer offloaded, the fastest that fits",
    )

    @model_validator(mode="after")
    def _pull_grows(self) -> Recipe:
        if self.retention.gate.rollback_pull_factor > 1 and not (self.train.l2_pull or self.train.kl_weight):
            raise ValueError(
                "retention.gate.rollback_pull_factor: multiplies train.l2_pull and train.kl_weight, and both are 0"
            )
        return self

    @property
    def run_folder(self) -> Path:
        return Path(self.run_dir)

    @property
    def local_paths(self) -> list[str]:
        """Of model and data, as far as they are files or folders here."""
        sets = [
            *self.data.training_sets,
            *self.data.validation,
            *(one.data for one in self.retention.tasks if one.data),
        ]
        paths = [self.model.path, *(re.sub(r"[^/]*[*?\[].*", "", source.path) or "." for source in sets)]  # of a glob
        return [one for one in paths if Path(one).exists()]

    @property
    def cache_folder(self) -> Path:
        return Path(self.data.cache_dir) if self.data.cache_dir else self.run_folder.parent / "cache"

    def without_evaluation(self) -> Recipe:
        """The same training, nothing measured."""
        data = self.data.model_copy(update={"validation": []})
        return self.model_copy(update={"data": data, "retention": Retention()})  # type: ignore[call-arg]

    def with_deepspeed(self, file: str) -> Recipe:
        return self.model_copy(update={"deepspeed": file})

    def with_micro_batch(self, size: int) -> Recipe:
        """With what `auto` has come to."""
        return self.model_copy(update={"train": self.train.model_copy(update={"micro_batch_size": size})})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# What decides the optimisation steps or the numbers that are compared. The rest may change when a run is resumed.
_MAY_CHANGE_ON_RESUME = (
    "run_dir", "deepspeed", "tracking.", "checkpoint.", "export.", "data.cache_dir", "data.on_missing_cache",
    "train.micro_batch_size", "train.sequence_parallel", "train.mlp_tiles", "train.profile", "model.attention",
    "train.activation_checkpointing", "train.on_no_memory", "train.kernels", "train.timeout_minutes",
    "train.hang_timeout",
    "retention.generation_batch_size",
    "retention.every_steps", "retention.max_overhead", "retention.gate.", "retention.confidence",
    "train.l2_pull_offload", "train.kl_reference_offload", "model.trust_remote_code",
)  # fmt: skip
_LIMIT_OF_TASK = re.compile(r"retention\.tasks\.\d+\.max_drop")  # may change as well


def identity(recipe: Recipe) -> dict[str, Any]:
    """The keys (dotted) that make two runs the same experiment."""
    return {
        key: value
        for key, value in _flatten(recipe.model_dump(mode="json"))
        if not key.startswith(_MAY_CHANGE_ON_RESUME) and not _LIMIT_OF_TASK.fullmatch(key)
    }


def differences(before: dict[str, Any], now: dict[str, Any], in_both: bool = False) -> str:
    """The keys whose values differ between two identities, with both; empty if there are none.

    in_both: leave out keys that only one has, e.g. new ones of a later version.
    """
    keys = before.keys() & now.keys() if in_both else before.keys() | now.keys()
    changed = [key for key in sorted(keys) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)


def fingerprint(recipe: Recipe) -> str:
    """sha256 (16 hex digits) of `identity`."""
    return hashlib.sha256(json.dumps(identity(recipe), sort_keys=True).encode()).hexdigest()[:16]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.path=value` overrides (values are YAML) and validate it.

    Raises:
        BadInput: with every problem found, each with its key.
    """
    return parse_recipe(_read_yaml(Path(path)), overrides)


def parse_recipe(raw: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Validate a recipe given as nested dicts; see `load_recipe`."""
    problems = [problem for text in overrides if (problem := _apply_override(raw, text))]
    raw = {section: value for section, value in raw.items() if value is not None}  # all keys commented out
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems += [_explain(item) for item in error.errors()]
    if problems:
        raise BadInput(problems)
    return recipe


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key must be a word, line {key_node.start_mark.line + 1}")
            key = key_node.value
            if key in seen:
                raise yaml.YAMLError(f"key '{key}' is given twice, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise BadInput(f"recipe {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"recipe {path} is empty or not a mapping of sections")
    return raw


def _apply_override(raw: dict[str, Any], text: str) -> str | None:
    """Set one `key.path=value` in place; returns the problem, if any."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        return f"'{text}' is not an override: write key.path=value"
    *parents, last = key.strip().lstrip("-").split(".")
    node: Any = raw
    holder: Any = None
    at: Any = None
    for part in parents:
        if isinstance(node, str) and part == "0":  # a bare path is a list of one source
            node = holder[at] = [{"path": node}]
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            if isinstance(node[int(part)], str):
                node[int(part)] = {"path": node[int(part)]}
            holder, at, node = node, int(part), node[int(part)]
        elif isinstance(node, dict):
            node[part] = node[part] if node.get(part) is not None else {}
            holder, at, node = node, part, node[part]
        else:
            return f"override {key}: '{part}' does not exist in the recipe"
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        return f"override {key}: value is not valid YAML: {error}"
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        return f"override {key}: '{last}' does not exist in the recipe"
    return None


def _explain(item: Any) -> str:
    """One pydantic error as `key: what is wrong; what to do`."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(key)}"
    if item["type"] == "missing":
        return f"{key}: must be given"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict | BaseModel) else f" (given: {item['input']!r})"
    return f"{key}: {message}{given}" if key else message


def _suggestion(key: str) -> str:
    """Where an unknown key belongs: by what Trainer, TRL or Axolotl call it, or by spelling."""
    known = [name for name, _ in _schema_keys(Recipe)]
    last = key.rsplit(".", 1)[-1]
    if (ours := _NAMES_ELSEWHERE.get(last)) and ours != key:
        return f"; it is called {ours} here"
    if elsewhere := [name for name in known if name.rpartition(".")[2] == last and name.count(".") == 1]:
        return f"; did you mean {' or '.join(elsewhere)}?"
    same_section = [name for name in known if name.rpartition(".")[0] == _without_indices(key).rpartition(".")[0]]
    for candidates in (same_section, known):
        by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(candidates)}
        if near := difflib.get_close_matches(last, by_last, n=1, cutoff=0.6):
            return f"; did you mean {by_last[near[0]]}?"
    return f"; keys here are: {', '.join(name.rsplit('.', 1)[-1] for name in same_section)}" if same_section else ""


def _without_indices(key: str) -> str:
    return ".".join(part for part in key.split(".") if not part.isdigit())


def _schema_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys of a section, list items under their list's name, with pydantic's field information."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        for inner in _sections_in(field.annotation):
            yield from _schema_keys(inner, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _sections_in(argument)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}{key}.")
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            yield from _flatten(inner, f"{prefix}{index}.")
    else:
        yield prefix.rstrip("."), value


_NAMES_ELSEWHERE = {
    "model_name_or_path": "model.path", "base_model": "model.path", "attn_implementation": "model.attention",
    "dataset": "data.train", "datasets": "data.train", "dataset_name": "data.train", "val_files": "data.validation",
    "eval_dataset": "data.validation", "max_length": "data.sequence_length", "max_seq_length": "data.sequence_length",
    "sequence_len": "data.sequence_length", "cutoff_len": "data.sequence_length", "sample_packing": "data.packing",
    "assistant_only_loss": "data.train_on", "train_on_inputs": "data.train_on", "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs", "max_steps": "train.steps", "train_iters": "train.steps", "lr": "train.learning_rate",
    "lr_scheduler_type": "train.schedule", "lr_scheduler": "train.schedule", "warmup_ratio": "train.warmup_steps",
    "per_device_train_batch_size": "train.micro_batch_size (the batch over all GPUs is train.global_batch_size)",
    "gradient_accumulation_steps": "nothing (derived from train.global_batch_size and the number of GPUs);"
    " the global batch is train.global_batch_size",
    "adam_beta1": "train.beta1", "adam_beta2": "train.beta2", "adam_epsilon": "train.eps", "bf16": "train.precision",
    "gradient_clipping": "train.max_grad_norm", "gradient_checkpointing": "train.activation_checkpointing",
    "output_dir": "run_dir", "save_steps": "checkpoint.every_steps", "save_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "checkpoint.resume", "logging_steps": "tracking.every_steps",
    "eval_steps": "retention.every_steps", "report_to": "tracking.wandb", "wandb_project": "tracking.project",
    "run_name": "tracking.name", "wandb_name": "tracking.name", "use_liger_kernel": "train.kernels",
    "liger": "train.kernels", "tiled_mlp": "train.mlp_tiles", "sequence_parallel_size": "train.sequence_parallel",
    "sequence_parallel_degree": "train.sequence_parallel", "zero_hpz_partition_size": "deepspeed (of its JSON file)",
}  # fmt: skip
