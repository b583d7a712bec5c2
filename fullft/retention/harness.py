"""Tasks of lm-evaluation-harness, by name, on the live ZeRO-3 engine.

Its tasks make the prompts and score the answers; running them is ours. Its own HFLM cannot be used: it evens out
requests over the ranks and not forwards, of which every one is a collective under ZeRO-3, and hangs. Nor does its
`evaluate` fit: it draws few-shot examples anew, other ones for a part of the items, which then pair with nothing.
Prompts and tokens are therefore made once, and each evaluation is: run the requests, filter, score.

Prompts are those of `lm_eval --model hf` without a chat template, and the scores equal its own. Two things differ on
purpose: texts have windows of data.sequence_length, and a BOS token that the tokenizer adds is not scored.

Imported only for a recipe that names such a task.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fullft.data.tokens import beginning, encode
from fullft.errors import BadInput
from fullft.recipe import Task
from fullft.retention.run import Batching, generations, loglikelihoods, max_positions, text_records, text_sums
from fullft.retention.tasks import Item, Pair, Prepared, Prompt, Window, encode_pair, rolling_windows

_SEED = 1234  # of the few-shot examples, as lm_eval's default
_FEWEST_CLUSTERS = 10  # subtasks of a group; of fewer no standard error can be made
_MAX_NEW_TOKENS = 256  # as HFLM's default


@dataclass(frozen=True)
class Document:
    """One document of a task with its requests (lm_eval's Instances) and what each of them runs."""

    task: Any  # lm_eval.api.task.Task
    doc: Any
    instances: list[Any]
    runs: list[Pair | list[Window] | Prompt]


def prepare_harness(task: Task, tokenizer: PreTrainedTokenizerBase, width: int, max_drop: float) -> Prepared:
    """A task, or a group or tag as one task of all its subtasks' items (clusters, if they are ten or more).

    Args:
        width: longest window of a text, tokens.

    Raises:
        BadInput: lm_eval is not installed, has no such task, cannot reach its data, or scores it in a way that is not
            a mean over items.
    """
    name = task.harness_task or task.name
    with _quiet(), _explained(task, name):
        subtasks = _load(name, task.harness_path)
        metric, rolling = _metric(task, subtasks)
        items, documents = list[Item](), list[Document]()
        for subtask_name, subtask in subtasks.items():
            cluster = subtask_name if len(subtasks) >= _FEWEST_CLUSTERS else None
            for document in _documents(task, subtask, tokenizer, width):
                items.append(_item(document, len(items), subtask_name, cluster))
                documents.append(document)
    return Prepared(
        task.name, "text" if rolling else "value", task.measures, items, "bits_per_byte" if rolling else metric,
        not rolling and next(iter(subtasks.values())).higher_is_better().get(metric, True), max_drop,
        _chance(documents, metric), harness=documents,
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval tells every step, and has bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _explained(task: Task, name: str) -> Iterator[None]:
    """What fails in lm_eval, in `datasets` or in a task's own code, as BadInput of this task."""
    try:
        yield
    except BadInput:
        raise
    except ModuleNotFoundError as error:
        lacks = (
            "lm-evaluation-harness is" if error.name == "lm_eval" else f"its task needs the package {error.name}, it is"
        )
        raise BadInput(f"task {task.name}: {lacks} not installed; pip install 'fullft[eval]'") from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise BadInput(
            f"task {task.name}: lm-evaluation-harness cannot load {name} ({type(error).__name__}: {reason}). Without "
            "network its data must be in the cache of `datasets` (load it once where there is one), or in files that "
            "your own task file names (harness_path)"
        ) from None


def _load(name: str, folder: str | None) -> dict[str, Any]:
    """The tasks of this name: one, or those of a group or tag. Seeded, with the defaults that lm_eval sets itself."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        if not Path(folder).is_dir():
            raise BadInput(f"task {name}: harness_path {folder} is not a folder")
        manager = TaskManager(include_path=folder, include_defaults=False)
        if name not in manager.all_tasks:
            raise BadInput(f"task {name}: {folder} has no such task{_nearest(name, manager.all_tasks)}")
    else:
        manager = _built_in(name)
    tasks: dict[str, Any] = manager.load(name)["tasks"]
    return tasks


def _built_in(name: str) -> Any:
    """A TaskManager that knows this task of lm_eval. One that knows all 14,000 takes 15 s and 80 MB."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    known, folders = set[str](), set[Path]()
    for file in root.rglob("*.yaml"):
        text = file.read_text(errors="replace")
        names = re.findall(r"^(?:task|group|tag):[ \t]*[\"']?([\w./+-]+)", text, re.MULTILINE)
        for listed in re.findall(r"^tag:[ \t]*\n((?:[ \t]*-.*\n?)+)", text, re.MULTILINE):
            names += re.findall(r"-[ \t]*[\"']?([\w./+-]+)", listed)
        known.update(names)
        if name in names:
            folders.add(root / file.relative_to(root).parts[0])
    if not folders:
        raise BadInput(f"task {name}: lm-evaluation-harness has no such task{_nearest(name, known)}")
    manager = lm_eval.tasks.TaskManager(include_path=sorted(folders), include_defaults=False)
    try:
        manager.load(name)
    except KeyError:  # a group of tasks that stand elsewhere
        return lm_eval.tasks.TaskManager()
    return manager


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _metric(task: Task, subtasks: dict[str, Any]) -> tuple[str, bool]:
    """(metric, is it a text's): a mean over items that all subtasks have, by default acc, else the first."""
    rolling = {subtask.OUTPUT_TYPE == "loglikelihood_rolling" for subtask in subtasks.values()}
    if rolling == {True}:
        if task.metric is not None:
            raise BadInput(f"task {task.name}: metric: it is of texts, measured in bits_per_byte; leave metric out")
        return "bits_per_byte", True
    shared = [
        name
        for name, aggregation in next(iter(subtasks.values())).aggregation().items()
        if getattr(aggregation, "__name__", "") == "mean"
        and all(name in subtask.aggregation() for subtask in subtasks.values())
    ]
    if rolling != {False} or not shared:
        has = sorted({name for subtask in subtasks.values() for name in subtask.aggregation()})
        raise BadInput(
            f"task {task.name}: its metrics ({', '.join(has)}) are not means over items that all {len(subtasks)} "
            f"subtasks have, so nothing can be paired; name subtasks instead: {', '.join(list(subtasks)[:5])}"
        )
    if task.metric is not None and task.metric not in shared:
        raise BadInput(
            f"task {task.name}: metric: it has no {task.metric}, its means over items are {', '.join(shared)}; leave "
            f"it out for {'acc' if 'acc' in shared else shared[0]}"
        )
    return task.metric or ("acc" if "acc" in shared else shared[0]), False


def _documents(task: Task, subtask: Any, tokenizer: PreTrainedTokenizerBase, width: int) -> Iterator[Document]:
    if getattr(subtask, "UNSAFE_CODE", False):
        raise BadInput(f"task {task.name}: it runs code that the model writes, which training does not")
    if getattr(subtask, "MULTIMODAL", False):
        raise BadInput(f"task {task.name}: it is not of text alone")
    if task.num_fewshot is not None and subtask.get_config("num_fewshot") != 0:  # 0 says that it takes none
        subtask.set_config(key="num_fewshot", value=task.num_fewshot)
    elif subtask.get_config("num_fewshot") is None:
        subtask.set_config(key="num_fewshot", value=0)
    subtask.set_fewshot_seed(seed=_SEED)
    subtask.build_all_requests(limit=task.limit, rank=0, world_size=1)
    by_document: dict[int, list[Any]] = {}
    for instance in subtask.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    for instances in by_document.values():
        instances.sort(key=lambda instance: instance.idx)
        runs = [_run_of(task, instance, tokenizer, width) for instance in instances]
        yield Document(subtask, instances[0].doc, instances, runs)


def _run_of(task: Task, instance: Any, tokenizer: PreTrainedTokenizerBase, width: int) -> Any:
    """What a request runs, tokenized as HFLM does."""
    match instance.request_type:
        case "loglikelihood":
            pair = encode_pair(tokenizer, *instance.args)
            if not pair[1]:
                raise BadInput(f"task {task.name}: the answer {instance.args[1]!r} makes no token after its context")
            return pair
        case "loglikelihood_rolling":
            ids = [*encode_pair(tokenizer, "", "x")[0], *encode(tokenizer, instance.args[0])]
            return rolling_windows(ids, [False] + [True] * (len(ids) - 1), width)
        case "generate_until":
            return _prompt(task, instance, tokenizer)
    raise BadInput(f"task {task.name}: has requests of type {instance.request_type}, which cannot be run")


def _prompt(task: Task, instance: Any, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    context, settings = instance.args
    if settings.get("do_sample") and settings.get("temperature", 1):
        raise BadInput(f"task {task.name}: it draws its answers at random; only greedy ones can be compared")
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    longest = next((int(settings[name]) for name in names if settings.get(name)), _MAX_NEW_TOKENS)
    written = tokenizer.bos_token is not None and context.startswith(tokenizer.bos_token)
    ids = ([] if written else list(beginning(tokenizer))) + encode(tokenizer, context)
    return Prompt(ids, longest, stop_strings=tuple(stop for stop in until if stop))


def _item(document: Document, number: int, subtask: str, cluster: str | None) -> Item:
    """Its hash is of the document and of what is asked, e.g. other examples in the prompt make another item."""
    asked = [subtask, document.doc, [instance.args for instance in document.instances]]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]
    first = document.runs[0]
    if not isinstance(first, Prompt):
        return Item(key, number, cluster)
    reference = str(document.task.doc_to_target(document.doc))
    return Item(key, number, cluster, prompt=first.ids, reference=reference)


def _chance(documents: Sequence[Document], metric: str) -> float | None:
    """What guessing scores, where a document is a choice."""
    if metric not in ("acc", "acc_norm", "acc_bytes") or documents[0].task.OUTPUT_TYPE != "multiple_choice":
        return None
    return sum(1 / len(document.runs) for document in documents) / len(documents)


def run_harness(
    engine: Any, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, batching: Batching
) -> list[dict[str, Any]]:
    """Records of the prepared items (which may be a part of all): a value, or those of a text. All ranks together."""
    documents = [prepared.harness[item.number] for item in prepared.items]
    longest = max_positions(engine.module) or 1 << 30
    requests = [
        (instance, _fitted(run, longest))
        for one in documents
        for instance, run in zip(one.instances, one.runs, strict=True)
    ]
    texts = _answer(engine, tokenizer, requests, batching, prepared.name)
    for subtask in {id(document.task): document.task for document in documents}.values():
        subtask._instances = [instance for one in documents if one.task is subtask for instance in one.instances]
        subtask.apply_filters()
    records: list[dict[str, Any]] = []
    for document in documents:
        kept = next(iter(document.instances[0].filtered_resps))  # the first filter, as the task lists them
        answers = [instance.filtered_resps[kept] for instance in document.instances]
        value = document.task.process_results(document.doc, answers)[prepared.metric]
        if prepared.kind == "text":
            logprob, n_bytes = value
            records.append(texts[id(document.instances[0])] | {"logprob": float(logprob), "n_bytes": int(n_bytes)})
        elif isinstance(document.runs[0], Prompt):
            records.append({"value": float(value), "generation": str(document.instances[0].resps[0])})
        else:
            records.append({"value": float(value)})
        if any(_is_cut(run, longest) for run in document.runs):
            records[-1]["truncated"] = True
    return records


def without_room(prepared: Prepared, longest: int) -> list[str]:
    """The problem of a task one of whose answers alone has as many tokens as the model has positions, or more."""
    for item in prepared.items:
        for run in prepared.harness[item.number].runs:
            # Of a pair the last token needs no position.
            tokens = run.max_new_tokens if isinstance(run, Prompt) else len(run[1]) - 1 if isinstance(run, tuple) else 0
            if tokens >= longest:
                how = "lower max_gen_toks in" if isinstance(run, Prompt) else "leave it out with"
                return [
                    f"task {prepared.name}: item {item.number}: an answer of {tokens} tokens leaves none of the "
                    f"model's {longest} positions (max_position_embeddings) to the prompt; {how} a task file of your "
                    "own (harness_path)"
                ]
    return []


def _is_cut(run: Pair | list[Window] | Prompt, longest: int) -> bool:
    """Whether it loses its beginning, since the model has only so many positions. The last token needs none."""
    if isinstance(run, Prompt):
        return len(run.ids) + run.max_new_tokens > longest
    return isinstance(run, tuple) and len(run[0]) + len(run[1]) > longest + 1


def _fitted(run: Any, longest: int) -> Any:
    """A prompt's end that leaves room for the longest answer, as HFLM cuts it; `loglikelihoods` cuts pairs."""
    return replace(run, ids=run.ids[-(longest - run.max_new_tokens) :]) if isinstance(run, Prompt) else run


def _answer(
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[tuple[Any, Any]],
    batching: Batching,
    title: str,
) -> dict[int, dict[str, Any]]:
    """Fill `resps` of all requests; returns what else is known of those that are texts, by id."""
    pairs = [(instance, run) for instance, run in requests if isinstance(run, tuple)]
    prompts = [(instance, run) for instance, run in requests if isinstance(run, Prompt)]
    rolling = [(instance, run) for instance, run in requests if isinstance(run, list)]
    answers: list[tuple[Any, Any]] = []
    if pairs:
        found: list[Any] = loglikelihoods(engine, [run for _, run in pairs], batching.tokens, title)
        answers += zip((instance for instance, _ in pairs), found, strict=True)
    if prompts:
        found = generations(engine, tokenizer, [run for _, run in prompts], batching.prompts, title)
        answers += zip((instance for instance, _ in prompts), found, strict=True)
    totals: list[dict[str, Any]] = []
    if rolling:
        windows = [(number, window) for number, (_, run) in enumerate(rolling) for window in run]
        sums = text_sums(engine, [window for _, window in windows], batching.texts, title)
        totals = text_records(sums, [number for number, _ in windows], len(rolling))
        answers += zip((one for one, _ in rolling), (total["logprob"] for total in totals), strict=True)
    for instance, value in answers:
        instance.resps = [value] * (instance.repeats or 1)
        instance.filtered_resps = {}
    return {id(instance): total for (instance, _), total in zip(rolling, totals, strict=True)}
