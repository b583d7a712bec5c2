"""Train. Started on every rank by `deepspeed`, `srun`, `mpirun` or `torchrun`:

deepspeed launch/train.py --config launch/recipes/quickstart.yaml train.learning_rate=1e-5
"""

import argparse
import contextlib
import os
import socket
import sys
import traceback

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from fullft import cluster, lease, signals
from fullft.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_GATE,
    EXIT_REQUEUE,
    BadInput,
    LeaseLost,
    Preempted,
    RetentionStopped,
    TrainingStopped,
)
from fullft.recipe import Recipe, load_recipe
from fullft.state import leave_failure, remove_marker


def main() -> int:
    parser = argparse.ArgumentParser(description="Full-parameter fine-tuning under DeepSpeed ZeRO-3.")
    parser.add_argument("--config", required=True, metavar="RECIPE.yaml")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_intermixed_args()

    me = recipe = None
    try:
        me = cluster.discover()
        recipe = load_recipe(arguments.config, arguments.overrides)
        signals.listen(recipe, me)
        # Heavy imports after the cheap checks, so that a typing error is told in a second.
        import transformers

        transformers.utils.logging.disable_progress_bar()
        from fullft.checkpoint import require_one_run
        from fullft.export import push_to_hub
        from fullft.preflight import check_run_folder, preflight
        from fullft.tokenizer import files
        from fullft.trainer import train

        # Where each node has a run folder of its own, that of rank 0 says it, later.
        code: int | None = None if recipe.checkpoint.use_node_local_storage else ended(me, recipe)
        if code is not None:
            return code
        inputs = preflight(recipe, me.world_size, ranks_per_node=me.ranks_per_node)
        files(recipe.model, weights=True)  # downloads, before any rank can wait in a collective
        cluster.join(me, recipe.train.timeout_minutes)
        cluster.require_same_code()
        signals.enter("loading")
        local = recipe.checkpoint.use_node_local_storage
        lease.take_together(recipe.run_folder, recipe.checkpoint.lease_seconds, local)
        require_one_run(recipe.run_folder)
        cluster.on_all(lambda: check_run_folder(recipe))  # once more: till now another job may have had it
        code = cluster.on_all(lambda: ended(me, recipe))
        if code is not None:
            signals.enter("over")
            cluster.leave()
            return code
        train(recipe, me, inputs)
        cluster.leave()
        if me.is_main and recipe.export.push_to_hub:  # after the last collective: the others may go, it takes minutes
            push_to_hub(recipe.run_folder / "export", recipe.export.push_to_hub)
        return EXIT_DONE
    except BadInput as error:
        tell_others(me, recipe, error)
        mark_failed(me, recipe, error)
        lease.release()
        cluster.exit_bad_input(error, me)
    except Preempted:
        with contextlib.suppress(RuntimeError):  # a rank whose grace period was over has gone
            cluster.leave()  # the first rank to exit takes the others with it, so all must be ready
        return EXIT_REQUEUE
    except RetentionStopped:
        with contextlib.suppress(RuntimeError):
            cluster.leave()
        return EXIT_GATE
    except TrainingStopped as error:  # on all ranks; said already, and in state.json
        tell_others(me, recipe, error)
    except BaseException as error:
        if signals.left_for_requeue():  # by a rank whose grace period was over; without it no collective ends
            return EXIT_REQUEUE
        print(f"fullft: failed on {me}", file=sys.stderr)
        traceback.print_exc()
        tell_others(me, recipe, error)
        mark_failed(me, recipe, error)
    return EXIT_FAILED


def ended(me: cluster.Cluster, recipe: Recipe) -> int | None:
    """The exit code of a run that is done, or was stopped by its gate, as rank 0 says; None if it is to be trained."""
    from fullft.preflight import finished, stopped_by_gate
    from fullft.report.summary import table

    if finished(recipe):
        if me.is_main:
            remove_marker(recipe.run_folder)
            print(f"{recipe.run_dir} is done already; nothing to do\n{table(recipe.run_folder)}")
        return EXIT_DONE
    if why := stopped_by_gate(recipe):
        if me.is_main:
            print(f"fullft: this run was stopped by retention.gate at {why}", file=sys.stderr, flush=True)
        return EXIT_GATE
    return None


def tell_others(me: cluster.Cluster | None, recipe: Recipe | None, error: BaseException) -> None:
    """Why this rank ends: the others may hang without it, and must not take the launcher's signal for a preemption."""
    if me is not None and recipe is not None:
        reason = f"rank {me.rank} on {socket.gethostname()} failed: {type(error).__name__}: {error}"
        with contextlib.suppress(OSError, LeaseLost):
            leave_failure(recipe.run_folder, me.rank, reason)


def mark_failed(me: cluster.Cluster | None, recipe: Recipe | None, error: BaseException) -> None:
    """state.json must not go on saying `running`; only for a run that this process had started."""
    if me is not None and me.is_main and recipe is not None and "fullft.ends" in sys.modules:
        sys.modules["fullft.ends"].mark_failed(recipe.run_folder, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    exit_code = main()
    lease.release()
    cluster.exit_now(exit_code)
