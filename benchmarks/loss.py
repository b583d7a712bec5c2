"""The loss in the head beside full logits and what torch and DeepSpeed have: time, peak memory, errors.

    python -m benchmarks.loss [--quick]

Every contender is a process of its own: hidden states [labels, hidden] and a head, forward and backward, fp32, one
thread; the median time of the rounds (CPU time is what a loaded machine leaves alone), and the growth of the resident
memory at its highest. Errors are those of the gradients, relative to fp64 over a smaller vocabulary, in fp32 and bf16.
At 128k of vocabulary and 16k labels full logits need more memory than this asks of a machine: what they would take is
counted by torch's memory tracker on tensors without storage, and so it is beside measured rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import goal, run, write

MIB = 2**20
HIDDEN = 64
METHODS = ("full", "fullft", "checkpointed", "torch", "torch-per-label", "deepspeed")
# Those that this torch lacks, and why.
MISSING: dict[str, str] = {}
if not (hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")):
    MISSING = dict.fromkeys(
        ("torch", "torch-per-label"), f"no F.linear_cross_entropy with options: torch {torch.__version__}"
    )
SIZES = ((32768, 2048), (131072, 1024))  # vocabulary, labels
LARGE = (131072, 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under five minutes on two cores: one round")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "ROUNDS"), help=argparse.SUPPRESS)
    parser.add_argument("--errors", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        method, rounds = arguments.one[0], int(arguments.one[1])
        sizes = [*SIZES, LARGE] if method == "fullft" else SIZES
        print(json.dumps([measure(method, *size, rounds if size != LARGE else 1) for size in sizes]))
        return
    if arguments.errors:
        print(json.dumps(errors()))
        return
    rounds, rows = 1 if arguments.quick else 3, []
    for method in METHODS:
        if method in MISSING:
            rows.append({"method": method, "not_measured": MISSING[method]})
        else:
            rows += in_process("--one", method, rounds)
        print(rows[-1], flush=True)
    large = next(row for row in rows if row.get("labels") == LARGE[1])
    found = in_process("--errors")
    before = counted("full", *LARGE)
    rows += [{"method": "full", "vocabulary": LARGE[0], "labels": LARGE[1], "counted_mib": before / MIB}]
    of = {(row["method"], row["vocabulary"]): row for row in rows if row.get("seconds") and row["labels"] != LARGE[1]}
    times = [of["fullft", v]["cpu_seconds"] / of["full", v]["cpu_seconds"] for v, _ in SIZES]
    share = large["peak_mib"] * MIB / before
    goals = [
        goal(f"128k vocabulary, 16k labels, hidden {HIDDEN}: peak, of full logits'", "≤ 0.2", share, share <= 0.2),
        goal("CPU time, of full logits'", "≤ 1.1", max(times), max(times) <= 1.1),
        goal("error of gradients in bf16, of full logits'", "≤ 1.1", found["fullft"]["bf16"] / found["full"]["bf16"],
             found["fullft"]["bf16"] <= 1.1 * found["full"]["bf16"]),
    ]  # fmt: skip
    write("loss", {"speed": rows, "errors": found}, goals, hidden=HIDDEN, load_average=os.getloadavg())


def in_process(*words: Any) -> Any:
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    environment["THP_MEM_ALLOC_ENABLE"] = "1"  # else half of the time is page faults
    done = run([sys.executable, "-m", "benchmarks.loss", *map(str, words)], **environment)
    return json.loads(done.output.strip().splitlines()[-1])


# The contenders: (hidden [labels, h], weight [v, h], targets) -> scalar, the mean of -ln p


def full(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def checkpointed(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from torch.utils.checkpoint import checkpoint

    from fullft.head import _BYTES_OF_LOGIT, WORKSPACE_BYTES

    size = max(1, WORKSPACE_BYTES["cpu"] // (_BYTES_OF_LOGIT * len(weight)))

    def of(rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(rows, weight).float(), own, reduction="sum")

    pairs = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.stack([checkpoint(of, *pair, use_reentrant=False) for pair in pairs]).sum() / len(targets)


def fullft(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from fullft.head import Transform, _Loss, _Terms
    from fullft.loss import LabelWeights

    weights = LabelWeights.of_step(len(targets), 0, 1.0, 0.0)
    terms = _Terms(targets, torch.zeros_like(targets, dtype=torch.bool), weights)
    return _Loss.apply(hidden, weight, None, terms, Transform(), None)[0]  # type: ignore[no-any-return, no-untyped-call]


def torch_fused(reduction: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    loss: torch.Tensor = F.linear_cross_entropy(  # type: ignore[attr-defined]
        hidden, weight, targets, reduction=reduction, options=options
    )
    return loss.float().mean()


def deepspeed(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy

    loss: torch.Tensor = chunked_cross_entropy(F.linear(hidden, weight), targets)
    return loss.float().mean()


CONTENDERS: dict[str, Callable[..., torch.Tensor]] = {
    "full": full, "fullft": fullft, "checkpointed": checkpointed, "torch": functools.partial(torch_fused, "mean"),
    "torch-per-label": functools.partial(torch_fused, "none"), "deepspeed": deepspeed,
}  # fmt: skip


def inputs(vocabulary: int, labels: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(labels, HIDDEN, requires_grad=True)
    weight = torch.empty(vocabulary, HIDDEN).normal_(0, 0.05).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (labels,))


def measure(method: str, vocabulary: int, labels: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    contender = CONTENDERS[method]
    contender(*inputs(64, 16)).backward()  # imports
    hidden, weight, targets = inputs(vocabulary, labels)
    seconds, cpu, peaks, loss = [], [], [], 0.0
    for _ in range(rounds):
        hidden.grad = weight.grad = None
        with Peak() as peak:
            started, cpu_started = time.perf_counter(), time.process_time()
            found = contender(hidden, weight, targets)
            found.backward()
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - cpu_started)
        peaks.append(peak.bytes)
        loss = found.item()
        del found
    return {
        "method": method, "vocabulary": vocabulary, "labels": labels, "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu), "peak_mib": statistics.median(peaks) / MIB,
        "counted_mib": counted(method, vocabulary, labels) / MIB if method in ("full", "fullft") else None,
        "loss": loss,
    }  # fmt: skip


def counted(method: str, vocabulary: int, labels: int) -> int:
    """Bytes of tensors alive at once beyond the inputs, without storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        tracker, given = MemTracker(), inputs(vocabulary, labels)
        tracker.track_external(*given)
        with tracker:
            CONTENDERS[method](*given).backward()
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    return int(peak["Total"]) - sum(one.untyped_storage().nbytes() for one in given)


class Peak:
    """Growth of resident memory, sampled every millisecond."""

    def __enter__(self) -> Peak:
        self._base, self.bytes, self._ended = _resident(), 0, False
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._ended:
            self.bytes = max(self.bytes, _resident() - self._base)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def errors() -> dict[str, dict[str, float]]:
    """Of each contender the larger of the relative errors of the two gradients, by dtype, in chunks."""
    from fullft import head

    head.WORKSPACE_BYTES["cpu"] = head._BYTES_OF_LOGIT * 2048 * 128  # 8 chunks
    hidden, weight, targets = inputs(2048, 1024)
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    F.cross_entropy(F.linear(*exact), targets).backward()
    methods = [method for method in METHODS if method not in MISSING]
    found: dict[str, dict[str, float]] = {method: {} for method in methods}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rounded = [one.detach().to(dtype).double().requires_grad_() for one in (hidden, weight)]
        F.cross_entropy(F.linear(*rounded), targets).backward()
        for method in methods:
            given = [one.detach().to(dtype).requires_grad_() for one in rounded]
            CONTENDERS[method](*given, targets).backward()
            off: list[float] = []
            for one, other in zip(given, rounded, strict=True):
                assert one.grad is not None
                assert other.grad is not None
                off.append(float((one.grad.double() - other.grad).norm() / other.grad.norm()))
            found[method][name] = max(off)
    return found


if __name__ == "__main__":
    main()
