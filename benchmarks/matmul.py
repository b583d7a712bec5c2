"""The rate of a large matrix product here, FLOP/s: what a step can reach at most.

    python -m benchmarks.matmul

The best of some shapes (M = tokens, N and K of a layer of 8 B parameters), each for a second: bf16 on a GPU; fp32 on
one core of a CPU, by CPU time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

from benchmarks.common import write

SECONDS = 1.0


def rate() -> dict[str, float]:
    """FLOP/s of each shape `M x K x N`, in this process: the median over repetitions."""
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    shapes = [(8192, 4096, 4096), (8192, 4096, 14336), (8192, 8192, 8192)] if gpu else [(1024, 512, 1408), (1024,) * 3]
    if not gpu:
        torch.set_num_threads(1)
    found = {}
    for m, k, n in shapes:
        where = {"device": "cuda" if gpu else "cpu", "dtype": torch.bfloat16 if gpu else torch.float32}
        a, b = torch.randn(m, k, **where), torch.randn(n, k, **where)
        clock = time.perf_counter if gpu else time.process_time  # other load takes nothing from CPU time
        times, until = [], time.perf_counter() + SECONDS
        while time.perf_counter() < until or len(times) < 4:
            started = clock()
            for _ in range(10 if gpu else 1):  # else the launch would be measured too
                a @ b.T
            if gpu:
                torch.cuda.synchronize()
            times.append((clock() - started) / (10 if gpu else 1))
        found[f"{m}x{k}x{n}"] = 2 * m * k * n / statistics.median(times[1:])
    return found


def best(ranks: int = 1, cpu: bool = False) -> float:
    """FLOP/s of one rank, with as many at once as there will be, each in a process of its own (memory is theirs)."""
    program = "import json; from benchmarks.matmul import rate; print('RATE', json.dumps(rate()))"
    environment = os.environ | ({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if cpu else {})
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    rates = [json.loads(line[5:]) for text in outputs for line in text.splitlines() if line.startswith("RATE ")]
    if len(rates) != ranks:
        raise RuntimeError("the matrix product could not be measured")
    return min(max(one.values()) for one in rates)


if __name__ == "__main__":
    rates = rate()
    for shape, flops in rates.items():
        print(f"{shape:20} {flops / 1e12:8.3f} TFLOP/s")
    write("matmul", {"flops_per_second": rates}, [])
