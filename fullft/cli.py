"""The `fullft` command. Each verb is a few lines around the module that does it."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fullft.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, BadInput
from fullft.recipe import Recipe, load_recipe
from fullft.submit import NETWORKS

if TYPE_CHECKING:
    from fullft.cluster import Cluster

# The options of the verbs with overrides that may stand without a value.
_FLAGS = ("--resolved", "--sweep", "--json", "--search", "--dry-run")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fullft", description="Full-parameter fine-tuning of large language models.")
    verbs = parser.add_subparsers(dest="verb", required=True)

    verb = verbs.add_parser(
        "check",
        usage="fullft check RECIPE.yaml [key.path=value ...] [--world-size N] [--resolved]",
        help="check recipe, files, model and data without a GPU; every problem at once",
    )
    verb.add_argument("recipe", help="recipe.yaml")
    verb.add_argument(
        "--world-size", type=int, default=1, metavar="N", help="ranks (GPUs) the run will have (default 1)"
    )
    verb.add_argument("--gpu", metavar="NAME", help="they will be these, as `fullft plan` names them: does it fit?")
    verb.add_argument("--resolved", action="store_true", help="print the recipe with all defaults")

    _plan_parser(verbs)
    _before_parsers(verbs)
    _measuring_parsers(verbs)
    _submit_parser(verbs)
    _after_parsers(verbs)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser


def _before_parsers(verbs: Any) -> None:
    """What looks at machines and data before training."""
    verb = verbs.add_parser(
        "rehearse",
        usage="fullft rehearse RECIPE.yaml --world-size N [--device cpu|cuda] [options] [key.path=value ...]",
        help="run rank 0 of N for real on one device, and measure its memory and time beside the plan",
    )
    verb.add_argument("recipe", help="recipe.yaml")
    verb.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks (GPUs) the run will have")
    verb.add_argument("--device", default="cpu", help="cpu (default; fp32 unless the recipe says bf16) or cuda")
    verb.add_argument("--micro-batches", type=int, metavar="M", help="of a step (default: 2 if it has several, else 1)")
    verb.add_argument("--steps", type=int, default=3, metavar="S", help="the third is typical (default 3)")
    verb.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="for hpZ (default 8)")
    verb.add_argument("--json", action="store_true", help="print what was measured and planned as JSON")

    verb = verbs.add_parser(
        "doctor",
        usage="[LAUNCHER] fullft doctor [RECIPE.yaml] [--hostfile HOSTS] [--json] [key.path=value ...]",
        help="examine the machines of a run: versions, code, data, GPUs, network, disks; what is wrong, how to mend it",
    )
    verb.add_argument("recipe", nargs="?", help="recipe.yaml, for its data, model and run folder")
    verb.add_argument("--hostfile", type=Path, metavar="HOSTS", help="examine these hosts by ssh: `NAME slots=GPUS`")
    verb.add_argument("--network-gbps", type=float, metavar="G", help="expected for each GPU (default: as planned)")
    verb.add_argument("--json", action="store_true", help="print all facts and findings as JSON")

    verb = verbs.add_parser(
        "prepare",
        usage="[mpirun -np N] fullft prepare RECIPE.yaml [key.path=value ...] [--workers N]",
        help="tokenize and pack the training data before GPUs are asked for; under mpirun on all its hosts",
    )
    verb.add_argument("recipe", help="recipe.yaml")
    verb.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: its cores)")

    verb = verbs.add_parser(
        "inspect",
        usage="fullft inspect RECIPE.yaml [key.path=value ...] [--rows N] [--html FILE]",
        help="show the training data as the model sees it, and what is odd about it",
    )
    verb.add_argument("recipe", help="recipe.yaml")
    verb.add_argument("--rows", type=int, default=3, metavar="N", help="documents of each set shown (default 3)")
    verb.add_argument("--html", type=Path, metavar="FILE", help="also write a page for the browser")


def _measuring_parsers(verbs: Any) -> None:
    """What measures models, and tells of runs."""
    verb = verbs.add_parser(
        "report",
        help="write report.html and report.json: verdict, curves, answers; of several runs side by side",
    )
    verb.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    verb.add_argument(
        "--out", type=Path, metavar="FILE.html",
        help="page to write, the JSON beside it (default: report.html of the run folder, or comparison.html here)",
    )  # fmt: skip
    verb.add_argument("--blend", type=Path, metavar="FILE", help="blend.json of the last run, if not in its folder")

    verb = verbs.add_parser(
        "eval",
        usage="fullft eval RECIPE.yaml --model MODEL [--base BASE] [--out FOLDER] [key.path=value ...]",
        help="measure any model with the recipe's tasks; large ones: deepspeed --module fullft.cli eval ...",
    )
    verb.add_argument("recipe", help="recipe.yaml")
    verb.add_argument("--model", required=True, help="Hugging Face folder, hub name, or run folder (its export)")
    verb.add_argument("--base", help="compared with: a folder with an evaluation (a run, an earlier FOLDER) or a model")
    verb.add_argument("--out", type=Path, metavar="FOLDER", help="new folder (default: <run_dir>-eval-<model>)")

    verb = verbs.add_parser(
        "blend",
        usage="""fullft blend [BASE] TUNED OUT --alpha A [--layer-scale WHICH=SHARE ...]
       fullft blend [BASE] TUNED --sweep [A,A,...] [--recipe RECIPE.yaml] [--out FOLDER] [key.path=value ...]""",
        help="weights between base and tuned model; --sweep measures several and names the best",
    )
    verb.add_argument(
        "models", nargs="+", metavar="MODEL",
        help="Hugging Face folders or hub names; if TUNED is a run folder, its export, and BASE may be left out",
    )  # fmt: skip
    verb.add_argument("--alpha", type=float, metavar="A", help="0: the base, 1: the tuned model")
    verb.add_argument(
        "--layer-scale", action="append", default=[], metavar="WHICH=SHARE",
        help="share of A for layers (0-7=0.3), rising with depth (0-=0.2..1), or tensors by name ('*embed*=0')",
    )  # fmt: skip
    verb.add_argument(
        "--sweep", nargs="?", const="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", metavar="A,A,...",
        help="measure these blends (default 0,0.1,...,1); large models: deepspeed --module fullft.cli blend ...",
    )  # fmt: skip
    verb.add_argument("--recipe", help="whose tasks are measured (default: that of the run folder)")
    verb.add_argument("--out", type=Path, metavar="FOLDER", help="for blend.json (default: the run folder)")


def _submit_parser(verbs: Any) -> None:
    verb = verbs.add_parser(
        "submit",
        usage="fullft submit RECIPE.yaml --nodes N --gpus-per-node G [options] [key.path=value ...] [--dry-run]",
        help="check everything, then train as a Slurm job that is requeued until it is done",
    )
    verb.add_argument("recipe", help="recipe.yaml")
    verb.add_argument("--nodes", required=True, metavar="N", help="or N-M: after a node is lost it goes on with fewer")
    verb.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="and ranks (default 8)")
    verb.add_argument("--gpu", metavar="NAME", help="they are these, as `fullft plan` names them: does it fit?")
    verb.add_argument("--time", metavar="HH:MM:SS", help="limit of the job; runs that are longer go on in the next")
    verb.add_argument("--partition", metavar="NAME")
    verb.add_argument("--account", metavar="NAME")
    verb.add_argument("--cpus-per-task", type=int, metavar="C", help="cores of each rank, which are bound to it")
    verb.add_argument("--network", choices=NETWORKS, default="plain", help="what NCCL is told (default plain)")
    verb.add_argument(
        "--container",
        metavar="IMAGE",
        help="for pyxis; an .sif file for apptainer; runs the code of the checkout where you submit, else its own",
    )
    verb.add_argument("--mount", action="append", default=[], metavar="DIR", help="seen in the container too")
    verb.add_argument("--setup", action="append", default=[], metavar="'LINE'", help="shell before training: modules")
    verb.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="of sbatch: --sbatch=--qos=high")
    verb.add_argument("--array", action="append", default=[], metavar="KEY=A,B", help="a job array over these values")
    verb.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs in turn, where requeueing is not allowed"
    )
    verb.add_argument("--restarts", type=int, default=3, metavar="N", help="after failures that may pass (default 3)")
    verb.add_argument("--dry-run", action="store_true", help="check, and print the script")


def _after_parsers(verbs: Any) -> None:
    """What is done with a run that has ended."""
    verb = verbs.add_parser("export", help="make a Hugging Face folder of a checkpoint, without GPU, in little memory")
    verb.add_argument("run_dir", type=Path)
    verb.add_argument("out", type=Path, metavar="OUT", help="new folder")
    verb.add_argument("--step", type=int, metavar="N", help="of this checkpoint (default: the newest that is whole)")
    verb.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="of the weights (default: as the run exports)")
    verb.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it afterwards")

    verb = verbs.add_parser("wandb", help="send to Weights & Biases what it lacks of a run that has ended")
    verb.add_argument("run_dir", type=Path)
    verb.add_argument(
        "--workspace", action="store_true", help="also save a view of the project with fullft's charts (new each time)"
    )


def main() -> int:
    rest, overrides = split_overrides(sys.argv[1:])
    arguments = _parser().parse_args(rest)
    try:
        match arguments.verb:
            case "check":
                check(arguments.recipe, overrides, arguments.world_size, arguments.resolved, arguments.gpu)
            case "plan":
                return plan(arguments, overrides)
            case "rehearse":
                return rehearse(arguments, overrides)
            case "doctor":
                examine(arguments, overrides)
            case "prepare":
                prepare(arguments.recipe, overrides, arguments.workers)
            case "inspect":
                inspect(arguments.recipe, overrides, arguments.rows, arguments.html)
            case "eval":
                evaluate(arguments.recipe, overrides, arguments.model, arguments.base, arguments.out)
            case "blend" if arguments.sweep is None:
                blend(arguments, overrides)
            case "blend":
                sweep(arguments, overrides)
            case "submit":
                submit(arguments, overrides)
            case "export":
                return export(arguments.run_dir, arguments.out, arguments.step, arguments.dtype, arguments.push_to_hub)
            case "wandb":
                return send(arguments.run_dir, arguments.workspace)
            case _:
                report(arguments.run_dirs, arguments.out, arguments.blend)
    except BadInput as error:
        done = {
            "export": "exported", "blend": "blended", "eval": "evaluated", "report": "written", "wandb": "sent",
            "submit": "submitted", "rehearse": "rehearsed", "doctor": "examined", "plan": "planned",
        }.get(arguments.verb)  # fmt: skip
        consequence = f"nothing was {done}" if done else "training was not started"
        print(error.report(consequence), file=sys.stderr, end="")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("fullft: stopped; what is finished is kept", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def _plan_parser(verbs: Any) -> None:
    verb = verbs.add_parser(
        "plan",
        usage="""fullft plan RECIPE.yaml --nodes N --gpus-per-node G --gpu NAME [options] [key.path=value ...]
       fullft plan --model FOLDER_OR_HUB_NAME | --params 70b [--layers L] [options] [key.path=value ...]""",
        help="whether a run fits, what a step takes and what a run costs, from the model's config alone",
    )
    verb.add_argument("recipe", nargs="?", help="recipe.yaml")
    verb.add_argument("--model", metavar="MODEL", help="Hugging Face folder or hub name, without a recipe")
    verb.add_argument("--params", metavar="P", help="of a Llama: 7b, 8b, 13b, 70b, 405b, or any with --layers")
    verb.add_argument("--layers", type=int, metavar="L", help="of --params")
    verb.add_argument("--hidden", type=int, metavar="H", help="of --params (default: what P leaves for L layers)")
    verb.add_argument("--nodes", type=int, default=1, metavar="N", help="default 1")
    verb.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default 8")
    verb.add_argument("--gpu", metavar="NAME", help="default h100-80gb; --gpu ? lists them")
    verb.add_argument("--hardware", metavar="FILE", help="YAML with more GPUs, as fullft/planner/hardware.yaml")
    verb.add_argument("--network-gbps", type=float, metavar="X", help="Gb/s for each GPU, in place of the table's")
    verb.add_argument("--efficiency", type=float, metavar="X", help="share of the best matmul (default 0.62)")
    verb.add_argument("--tokens", type=float, metavar="X", help="of the run (default: of the prepared data)")
    verb.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="for the cost")
    verb.add_argument("--search", action="store_true", help="the smallest and the cheapest cluster for it")
    verb.add_argument("--plot", type=Path, metavar="FILE", help="also draw the memory, .svg or .png")
    verb.add_argument("--json", action="store_true", help="print all of it as JSON")


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """(words for argparse, overrides `key.path=value`), which may stand anywhere, as argparse cannot do behind a verb.

    A word that names no section of a recipe is one too, and told as an unknown key, unless it is a file or folder.
    """
    verb = next((word for word in words if not word.startswith("-")), "")
    if verb not in ("check", "plan", "rehearse", "doctor", "prepare", "inspect", "eval", "blend", "submit"):
        return words, []
    rest, overrides, before = list[str](), list[str](), ""
    for word in words:
        is_value = before.startswith("--") and "=" not in before and before not in _FLAGS
        section = re.match(r"([A-Za-z_]\w*)[\w.]*=", word)
        chosen = section and not is_value and (section[1] in Recipe.model_fields or not Path(word).exists())
        (overrides if chosen else rest).append(word)
        before = word
    return rest, overrides


def check(path: str, overrides: list[str], world_size: int, resolved: bool, gpu: str | None = None) -> None:
    """Everything that training checks before it forms a process group; tokenizes the data into the cache."""
    recipe = load_recipe(path, overrides)
    if resolved:
        print(recipe.to_yaml(), end="")
    import transformers

    from fullft.planner import hardware
    from fullft.planner.memory import GIB
    from fullft.preflight import preflight
    from fullft.retention.baseline import smallest_drops

    transformers.utils.logging.disable_progress_bar()  # a trial of the export has bars
    if world_size < 1:
        raise BadInput(f"--world-size: {world_size} is not a number of ranks")
    # This may be a login node without GPU: what is asked is about the GPUs, unless CPU ranks are wanted.
    on_gpu = gpu is not None or os.environ.get("DS_ACCELERATOR") != "cpu"
    inputs = preflight(recipe, world_size, on_gpu, gpu=hardware.gpu(gpu) if gpu else None)
    plan = inputs.plan
    print(f"model    {inputs.facts.architecture}, {inputs.facts.parameters:,} parameters")
    print(f"attn     {inputs.attention.name}: {inputs.attention.reason}")
    for line in inputs.batches.describe(inputs.total_steps):
        print(f"data     {line}")
    print(f"run      {plan['steps']:,} steps of {recipe.train.global_batch_size} sequences on {world_size} ranks")
    print(f"memory   {plan['device_bytes_per_rank'] / GIB:.2f} GiB of training state a rank, activations on top")
    if plan["gpu"]:
        print(f"         {plan['gpu_bytes'] / GIB:.1f} GiB of a GPU at its peak, by the plan; it is a {plan['gpu']}")
    print(f"         micro-batch: {plan['micro_batch_why']}")
    print(f"         activation checkpointing: {plan['activation_checkpointing_why']}")
    if plan["deepspeed_why"]:
        print(f"         deepspeed: {plan['deepspeed_why']}")
    print(f"disk     {plan['run_folder_bytes'] / GIB:.2f} GiB for checkpoints and export in {recipe.run_dir}")
    for line in smallest_drops(inputs.suite):
        print(f"measures {line}")
    for warning in inputs.warnings:
        print(f"warning  {warning}")
    print("ok")


def _log_of_deepspeed_to_stderr() -> None:
    """Its logger writes to what stdout is when it is imported (that there is no GPU); here results stand there."""
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed  # noqa: F401


def plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan; a run that does not fit is told with exit code 1."""
    import json

    _log_of_deepspeed_to_stderr()
    from fullft.planner import show

    arguments.gpu_given, arguments.gpu = arguments.gpu is not None, arguments.gpu or "h100-80gb"
    with show.recipe_of(arguments, overrides) as (recipe, assumed):
        found = show.plan(recipe, arguments)
    if assumed:
        found["assumed"] = "; ".join(filter(None, (assumed, found["assumed"])))
    if arguments.plot:
        show.plot(found, arguments.plot)
    print(json.dumps(found, indent=1) if arguments.json else show.table(found))
    return EXIT_DONE if found["fits"] else EXIT_FAILED


def rehearse(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Measure rank 0 of N; a rehearsal that does not fit, or fails, is told with exit code 1."""
    recipe = load_recipe(arguments.recipe, overrides)
    import json

    _log_of_deepspeed_to_stderr()
    from fullft import rehearsal

    try:
        found = rehearsal.rehearse(
            recipe, arguments.world_size, arguments.device, arguments.micro_batches, arguments.steps,
            arguments.gpus_per_node,
        )  # fmt: skip
    except RuntimeError as error:
        print(f"fullft: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(found, indent=1) if arguments.json else rehearsal.table(found))
    return EXIT_DONE


def examine(arguments: argparse.Namespace, overrides: list[str]) -> NoReturn:
    """This host, those of a hostfile, or those of all ranks, if this was started on several."""
    _log_of_deepspeed_to_stderr()
    from fullft import cluster
    from fullft.doctor.examine import doctor

    if overrides and not arguments.recipe:
        raise BadInput(f"{', '.join(overrides)}: of use with a recipe only")
    me = cluster.discover()
    try:
        code = doctor(
            me, arguments.recipe, overrides, arguments.hostfile, arguments.network_gbps, arguments.json
        )  # fmt: skip
    except BadInput as error:
        cluster.exit_bad_input(error, me, "nothing was examined")
    cluster.exit_now(code)


def prepare(path: str, overrides: list[str], workers: int | None) -> None:
    """Fill the cache. Under mpirun, rank 0 hands the pieces out and the other ranks, on any host, tokenize them."""
    recipe = load_recipe(path, overrides)
    if workers is not None and workers < 1:
        raise BadInput(f"--workers: {workers} is not a number of processes")
    from fullft.data.prepare import worker_processes
    from fullft.data.training import build_batches, open_data, unlikely
    from fullft.engine import geometry
    from fullft.tokenizer import load_tokenizer

    with worker_processes(workers) as executor:
        if executor is None:
            return  # this MPI rank has worked until rank 0 was done
        tokenizer = load_tokenizer(recipe.model)
        started = time.monotonic()
        sets, warnings = open_data(recipe, tokenizer, executor)
        batches, steps = build_batches(recipe, sets, geometry(recipe, recipe.train.sequence_parallel))
        warnings += unlikely(recipe, steps, batches)
        for line in [*batches.describe(steps), *(f"warning: {warning}" for warning in warnings)]:
            print(line)
        print(f"ready in {recipe.cache_folder} after {time.monotonic() - started:.1f} s")


def inspect(path: str, overrides: list[str], rows: int, html: Path | None) -> None:
    """Rows with their trained tokens, lengths, duplicates, leaks, trouble."""
    recipe = load_recipe(path, overrides)
    from fullft.data.inspect import collect, show
    from fullft.data.inspect_page import write_page
    from fullft.data.training import build_batches, open_data, unlikely
    from fullft.engine import geometry
    from fullft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    sets, warnings = open_data(recipe, tokenizer)
    batches, steps = build_batches(recipe, sets, geometry(recipe, recipe.train.sequence_parallel))
    view = collect(batches, steps, tokenizer, warnings + unlikely(recipe, steps, batches), rows)
    show(view)
    if html:
        write_page(view, html)
        print(f"\n{html}")


def report(run_dirs: list[Path], out: Path | None, blend: Path | None) -> None:
    """Write the page, and print verdict and table of each run."""
    from fullft.report.summary import table, write_comparison

    out = out or (run_dirs[0] / "report.html" if len(run_dirs) == 1 else Path("comparison.html"))
    for run_dir, found in zip(run_dirs, write_comparison(run_dirs, out, blend), strict=True):
        title = f"{run_dir}: " if len(run_dirs) > 1 else ""
        print(f"{title}{found['verdict']['sentence']}\n\n{table(run_dir)}\n")
    print(out)


def evaluate(path: str, overrides: list[str], name: str, base: str | None, out: Path | None) -> NoReturn:
    """Measure a model, on as many ranks as this was started."""
    from fullft.cluster import run_on_ranks

    def measure(me: Cluster) -> None:
        recipe = load_recipe(path, overrides)
        from fullft.retention import evaluate

        evaluate.evaluate(recipe, name, base, out or Path(f"{recipe.run_dir}-eval-{Path(name).absolute().name}"), me)

    run_on_ranks(measure, "nothing was evaluated")


def blend(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Write a blend to a folder, by this process alone."""
    if arguments.alpha is None:
        raise BadInput("give --alpha A for one blend, or --sweep to measure several")
    if given := [word for word in ("recipe", "out") if getattr(arguments, word)] + overrides:
        raise BadInput(f"{', '.join(given)}: of use with --sweep only")
    if len(arguments.models) < 2:
        raise BadInput("where to? fullft blend [BASE] TUNED OUT --alpha A")
    *models, out = arguments.models
    from fullft.retention.blend import blend_folders
    from fullft.retention.evaluate import base_and_tuned, model_of

    base, tuned, recipe = base_and_tuned(models)
    of_recipe, scales = recipe.model if recipe else None, arguments.layer_scale
    size = blend_folders(model_of(base), model_of(tuned), Path(out), arguments.alpha, scales, of_recipe)
    print(f"{base} + {arguments.alpha:g} × ({tuned} − {base}): {size / 1e9:.2f} GB in {out}")


def sweep(arguments: argparse.Namespace, overrides: list[str]) -> NoReturn:
    """Measure blends, on as many ranks as this was started."""
    from fullft.cluster import run_on_ranks

    def measure(me: Cluster) -> None:
        if arguments.alpha is not None:
            raise BadInput("give --alpha A for one blend, or --sweep to measure several, not both")
        from fullft.retention import sweep
        from fullft.retention.evaluate import base_and_tuned

        alphas = sweep.parse_alphas(arguments.sweep)
        base, tuned, of_run = base_and_tuned(arguments.models)
        if of_run is None and not (arguments.recipe and arguments.out):
            raise BadInput(f"{tuned} is not a run folder: give --recipe and --out")
        chosen = load_recipe(arguments.recipe or Path(tuned, "recipe.yaml"), overrides)
        sweep.sweep(chosen, base, tuned, alphas, arguments.layer_scale, arguments.out or Path(tuned), me)

    run_on_ranks(measure, "nothing was blended")


def submit(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Check recipe, model, data and cluster as training would, render the job script, and hand it to Slurm."""
    from fullft import submit as jobs

    nodes = jobs.counts(arguments.nodes)
    for name in ("gpus_per_node", "chain", "restarts"):
        if (value := getattr(arguments, name)) < (name != "restarts"):
            raise BadInput(f"--{name.replace('_', '-')}: {value} is too few")
    sweep = jobs.points(arguments.array)
    recipe = load_recipe(arguments.recipe, overrides)
    from fullft.engine import geometry
    from fullft.planner import hardware
    from fullft.preflight import preflight

    gpu = hardware.gpu(arguments.gpu) if arguments.gpu else None
    on_gpu = os.environ.get("DS_ACCELERATOR") != "cpu"
    for point in sweep:
        own = load_recipe(arguments.recipe, [*overrides, *point, f"run_dir={jobs.run_dir_of(recipe.run_dir, point)}"])
        ranks = arguments.gpus_per_node
        # With more nodes memory is less scarce.
        inputs = preflight(own, nodes[0] * ranks, gpu is not None or on_gpu, ranks, gpu=gpu)
        for more in nodes[1:]:
            geometry(own, more * ranks)
        for warning in inputs.warnings:
            print(f"warning  {warning}")
    job = jobs.Job(
        arguments.nodes, arguments.gpus_per_node, arguments.time, arguments.partition, arguments.account,
        arguments.cpus_per_task, arguments.network, arguments.container, tuple(arguments.mount),
        tuple(arguments.setup), arguments.chain, arguments.restarts, recipe.checkpoint.grace_seconds,
        tuple(arguments.sbatch),
    )  # fmt: skip
    folders = [jobs.run_dir_of(recipe.run_dir, point) for point in sweep] + [str(recipe.cache_folder)]
    if wrong := jobs.problems(job, [arguments.recipe, *folders, *recipe.local_paths]):
        raise BadInput(wrong)
    if on_gpu and not job.cpus_per_task:
        print("warning  without --cpus-per-task a rank may have one core for all its threads", file=sys.stderr)
    if gpu is None and on_gpu:
        print("warning  nothing is said of GPU memory without --gpu, e.g. --gpu h100-80gb", file=sys.stderr)
    text = jobs.script(job, Path(arguments.recipe), overrides, recipe.run_dir, sweep)
    if arguments.dry_run:
        print(text, end="")
        return
    file = jobs.write(text, recipe.run_dir)
    numbers = jobs.submit(file, arguments.chain)
    print(f"submitted  {', '.join(numbers)} by {file}")
    print(f"watch      squeue -j {','.join(numbers)}; tail -F {shlex.quote(str(file.parent))}/{numbers[0]}*.log")
    print(f"cancel     scancel {' '.join(numbers)}; it saves if that takes less than KillWait, else first:")
    print(f"           scancel --signal=USR1 --batch {numbers[0]}, which saves and puts it back into the queue")
    print(f"resume     sbatch {shlex.quote(str(file))}")


def export(run_dir: Path, out: Path, step: int | None, dtype: str | None, repository: str | None) -> int:
    """Export a checkpoint; the exit code tells whether the upload, if any, succeeded."""
    import transformers

    from fullft.export import export_checkpoint, push_to_hub, require_hub

    transformers.utils.logging.disable_progress_bar()
    if repository is not None:
        require_hub(repository)
    checkpoint, skipped = export_checkpoint(run_dir, out, step, dtype)
    for damaged in skipped:
        print(f"skipped checkpoint {damaged}")
    print(f"{checkpoint} exported to {out}")
    if repository is not None and not push_to_hub(out, repository):
        return EXIT_FAILED
    return EXIT_DONE


def send(run_dir: Path, workspace: bool) -> int:
    """Online, whatever mode the run was tracked in; the exit code tells whether W&B has taken everything."""
    import subprocess

    from fullft.lease import is_owned
    from fullft.wandb_run import END_SECONDS

    if not (run_dir / "metrics.jsonl").exists():
        raise BadInput(f"{run_dir} is not a run folder of fullft (it has no metrics.jsonl)")
    if is_owned(run_dir):
        raise BadInput(f"{run_dir}: the run is going on, and sends by itself")
    if workspace:
        from fullft.workspace import require

        require()
    (run_dir / "wandb").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "fullft.wandb_run", str(run_dir.absolute()), "send", str(END_SECONDS)]
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if workspace and not code:
        from fullft.workspace import save

        print(save(run_dir))
    return EXIT_FAILED if code else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
