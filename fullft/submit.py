"""Training as a Slurm job: one script that can be read, in the run folder, and the commands around it.

The script starts one task per GPU and hands signals on to them. What a run says of its end stands in its folder, not in
the exit code, which srun does not carry (`--kill-on-bad-exit` turns any into 143): where the folder asks for it, the
job is put into the queue again, under the same number, and goes on from its newest checkpoint.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fullft import lease
from fullft.errors import BadInput

TRAIN = Path(__file__).parent.parent / "launch" / "train.py"
TRAIN_OF_IMAGE = "/opt/fullft/launch/train.py"  # docker/Dockerfile

# What NCCL has to be told on which network: (line of the script, why).
_NETWORKS: dict[str, list[tuple[str, str]]] = {
    "plain": [
        ("export NCCL_SOCKET_IFNAME=^lo,docker0,virbr0", "not over interfaces that exist on every node for itself"),
    ],
    "infiniband": [
        ("export NCCL_SOCKET_IFNAME=^lo,docker0,virbr0", "for the first contact; the data go over InfiniBand"),
        ("export NCCL_NET=IB", "fail rather than fall back to TCP, which is ten times slower, without a word"),
        ("export NCCL_IB_HCA=mlx5", "the adapters of this name, whatever their number"),
        ("export NCCL_IB_TIMEOUT=22", "4.096 µs · 2^22, 17 s: a link that flaps is waited for"),
    ],
    "aws-efa": [
        ("export NCCL_SOCKET_IFNAME=^lo,docker,veth", "for the first contact; the data go over EFA"),
        ("export FI_PROVIDER=efa", "libfabric's provider, else it takes TCP without a word"),
        ('export NCCL_NET="AWS Libfabric"', "the plugin aws-ofi-nccl must be there: fail rather than fall back"),
        ("export FI_EFA_USE_HUGE_PAGE=0", "huge pages run out under many processes, and fork fails then"),
    ],
    "gcp": [
        ('export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}"', "the next two add to it, and fail where it is not set"),
        ("gib=/usr/local/gib; [ -e $gib ] || gib=/var/lib/gib", ""),
        ("if [ -e $gib/scripts/set_nccl_env.sh ]; then  # A3 Ultra, A4: RDMA", ""),
        ("  . $gib/scripts/set_nccl_env.sh; export NCCL_NET=gIB", "fail rather than fall back to TCP"),
        ('  export LD_LIBRARY_PATH="$gib/lib64:$LD_LIBRARY_PATH"', "NCCL's plugin"),
        ("elif [ -e /var/lib/tcpxo/lib64/nccl-env-profile.sh ]; then  # A3 Mega: GPUDirect-TCPXO", ""),
        ("  export NCCL_LIB_DIR=/var/lib/tcpxo/lib64; . $NCCL_LIB_DIR/nccl-env-profile.sh", "where its libraries are"),
        ("  export NCCL_SOCKET_IFNAME=enp0s12 NCCL_FASTRAK_CTRL_DEV=enp0s12", "for the first contact"),
        ("  export NCCL_FASTRAK_IFNAME=enp6s0,enp7s0,enp13s0,enp14s0,enp134s0,enp135s0,enp141s0,enp142s0", "the data"),
        ("  export NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY=/dev/aperture_devices", "to be mounted into a container"),
        ('else echo "no NCCL plugin of Google on this node; --network plain goes over TCP" >&2; exit 1', ""),
        ("fi", ""),
    ],
    "azure": [
        ("export NCCL_SOCKET_IFNAME=eth0", "for the first contact; the data go over InfiniBand"),
        ("export NCCL_NET=IB", "fail rather than fall back to TCP, which is ten times slower, without a word"),
        ("export NCCL_IB_PCI_RELAXED_ORDERING=1", "these machines are virtual: writes in strict order are slow"),
        ("export CUDA_DEVICE_ORDER=PCI_BUS_ID", "GPUs are numbered as the topology file has them"),
        ('topology=/opt/microsoft/ndv5-topo.xml; if [ -e "$topology" ]; then export NCCL_TOPO_FILE="$topology"; fi',
         "which adapter is near which GPU; not seen from inside a virtual machine"),
    ],
}  # fmt: skip
NETWORKS = tuple(_NETWORKS)


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm. `nodes`: `4`, or `2-4`, as many of them as there are. `options`: further options of
    sbatch, as `--qos=high`."""

    nodes: str
    gpus_per_node: int
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    cpus_per_task: int | None = None
    network: str = "plain"
    container: str | None = None  # image for pyxis, or an .sif file for apptainer
    mounts: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()  # lines of shell before the ranks are started
    chain: int = 1
    restarts: int = 3
    grace_seconds: float = 300  # between the signal before the time limit and that limit
    options: tuple[str, ...] = ()


def counts(nodes: str) -> range:
    """`4` → 4; `2-4` → 2, 3, 4: how many nodes a job may get.

    Raises:
        BadInput: it is neither.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", nodes)
    numbers = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not numbers or not numbers[0]:
        raise BadInput(f"--nodes: {nodes} is no number of nodes, as 4, and no range of them, as 2-4")
    return numbers


def seconds(time: str) -> float | None:
    """Of a limit as Slurm reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. None: it is none of these, e.g. UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        return None
    days, *rest = (int(one) if one else 0 for one in found.groups())
    hours, minutes, left = rest if found[1] or found[4] else (0, *rest[:2])
    return 86400 * days + 3600 * hours + 60 * minutes + left


def problems(job: Job, paths: list[str]) -> list[str]:
    """What would go wrong on the nodes only. `paths`: local files and folders that the run uses."""
    found = []
    limit = seconds(job.time) if job.time else None
    if limit is not None and limit < job.grace_seconds + 120:
        found.append(
            f"--time: {job.time} is too short: the ranks are told to save {job.grace_seconds:g} s before it "
            "(checkpoint.grace_seconds), and would never get further"
        )
    mounts = [one.split(":") for one in job.mounts]  # those with another name in the container do not help
    seen = [Path.cwd(), *(Path(source).absolute() for source, *there in mounts if there[:1] in ([], [source]))]
    lacking = [one for one in paths if not any(Path(one).absolute().is_relative_to(folder) for folder in seen)]
    if job.container and lacking:
        found.append(f"--container: {', '.join(lacking)} is not seen in it; give --mount for it, or its folder")
    return found


def points(sweep: list[str]) -> list[list[str]]:
    """`key=a,b` and `key2=c,d` → the overrides of every combination; [[]] without any.

    Raises:
        BadInput: one is no list of values.
    """
    axes = []
    for one in sweep:
        key, equals, values = one.partition("=")
        if not key or not equals or not all(values.split(",")):
            raise BadInput(f"--array: {one} is not key.path=value,value,...")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [list(point) for point in itertools.product(*axes)]


def run_dir_of(run_dir: str, point: list[str]) -> str:
    """Of a point of a sweep: `runs/x` and `train.learning_rate=1e-5` → `runs/x-learning_rate=1e-5`."""
    names = (f"{key.rpartition('.')[2]}={value}" for key, value in (one.partition("=")[::2] for one in point))
    return "-".join([run_dir, *(re.sub(r"[^\w.=+-]", "_", name) for name in names)])


def script(job: Job, config: Path, overrides: list[str], run_dir: str, sweep: list[list[str]]) -> str:
    """The job script. It runs in the folder of now, to which its paths and those of the recipe are relative, wherever
    it is submitted by hand."""
    folder = Path(run_dir) / "slurm"
    name = re.sub(r"[^\w.-]", "_", Path(run_dir).name)
    # srun starts one task a node by itself; asked for one, Slurm (22.05) takes the fewest nodes of a range.
    tasks = None if "-" in job.nodes and job.gpus_per_node == 1 else job.gpus_per_node
    directives = {
        "job-name": name, "chdir": _quoted(str(Path.cwd())), "nodes": job.nodes, "ntasks-per-node": tasks,
        "gpus-per-node": job.gpus_per_node, "cpus-per-task": job.cpus_per_task, "time": job.time,
        "partition": job.partition, "account": job.account,
        "output": _quoted(str(folder).replace("%", "%%") + ("/%A_%a.log" if len(sweep) > 1 else "/%j.log")),
        "open-mode": "append",
        "signal": f"B:USR1@{math.ceil(job.grace_seconds)}", "array": f"0-{len(sweep) - 1}" if len(sweep) > 1 else None,
    }  # fmt: skip
    lines = ["#!/bin/bash", *(f"#SBATCH --{key}={value}" for key, value in directives.items() if value is not None)]
    lines += [f"#SBATCH --{'no-requeue' if job.chain > 1 else 'requeue'}"]
    lines += [f"#SBATCH {one}" for one in job.options]
    lines += [
        "",
        "# Rendered by `fullft submit`; may be changed and submitted by hand: sbatch "
        + shlex.quote(f"{folder / FILE}"),
    ]
    lines += [*_point_lines(run_dir, overrides, sweep), "", *_environment(job), "", *_start(job, config), ""]
    return "\n".join([*lines, _END_CHAINED if job.chain > 1 else _END.replace("RESTARTS", str(job.restarts))])


FILE = "train.sbatch"


def _quoted(value: str) -> str:
    """For an #SBATCH line, where a quote within quotes must be escaped."""
    return value if re.fullmatch(r"[\w%/.,:=+-]*", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _point_lines(run_dir: str, overrides: list[str], sweep: list[list[str]]) -> list[str]:
    """Run folder and overrides as shell variables; of a sweep by the number in the array."""

    def assigned(point: list[str]) -> str:
        own = run_dir_of(run_dir, point)
        words = [*overrides, *point, *([f"run_dir={own}"] if point else [])]
        return f"run={shlex.quote(own)}; overrides=({shlex.join(words)})"

    if len(sweep) == 1:
        return [assigned(sweep[0])]
    cases = [f"  {number}) {assigned(point)} ;;" for number, point in enumerate(sweep)]
    return ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]


def _environment(job: Job) -> list[str]:
    lines = [
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1); export MASTER_ADDR',
        f"# Network: {job.network}",
        *(f"{line}  # {why}" if why else line for line, why in _NETWORKS[job.network]),
    ]
    return lines + list(job.setup)


def _start(job: Job, config: Path) -> list[str]:
    options = [
        "--kill-on-bad-exit=1",  # a failed rank ends the others, which would wait for it
        "--wait=0",  # ranks that end first wait for those that still write
    ]
    if job.cpus_per_task:
        options += [f"--cpus-per-task={job.cpus_per_task}", "--cpu-bind=cores"]  # not inherited since Slurm 22.05
    command = [sys.executable, str(TRAIN)]
    if job.container:
        command = ["python", TRAIN_OF_IMAGE]
        if Path("launch/train.py").exists():  # a checkout: all of its code, not its launch/ with the image's fullft/
            command = ["env", 'PYTHONPATH="$PWD"', "python", "launch/train.py"]
        binds = ",".join(('"$PWD"', *map(shlex.quote, job.mounts)))
        if job.container.endswith(".sif"):
            command = ["apptainer", "exec", "--nv", "--bind", binds, "--pwd", '"$PWD"', job.container, *command]
        else:
            mounts = ",".join(('"$PWD:$PWD"', *map(shlex.quote, job.mounts)))
            options += [f"--container-image={shlex.quote(job.container)}", f"--container-mounts={mounts}"]
            options += ['--container-workdir="$PWD"']
    words = [one if '"' in one else shlex.quote(one) for one in command]
    return [
        # Not before: modules, conda and the scripts of clouds use variables that are not set.
        'set -u; changed() { stat -c %y "$run/$1" 2> /dev/null; }',
        "marker=$(changed REQUEUE); state=$(changed state.json)",
        f"srun {' '.join(options)} \\",
        f'  {" ".join(words)} --config {shlex.quote(str(config))} "${{overrides[@]}}" &',
        "ranks=$!",
    ]


_WAIT = """\
# Time is nearly up, or the job is to end: the ranks finish their step, save it, and leave a marker in the run folder.
warned='' ended=''
trap 'warned=1; kill -USR1 "$ranks"' USR1
trap '[ "$warned" ] || ended=1; kill -TERM "$ranks"' TERM
wait "$ranks"; code=$?
while kill -0 "$ranks" 2> /dev/null; do wait "$ranks"; code=$?; done  # a signal has ended the waiting, not the ranks

status=$(sed -n 's/.*"status": *"\\([a-z]*\\)".*/\\1/p' "$run/state.json" 2> /dev/null | head -n 1)
echo "run $run: ${status:-not started}, exit code of srun $code"
if [ "$status" = done ]; then exit 0; fi
"""
_END = (
    _WAIT
    + """\
[ "$(changed state.json)" != "$state" ] || status=''  # of an earlier job

again() {
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}  # not the whole array
  # Cancelled, and not preempted: Slurm has ended it already.
  if [ "$ended" ] && ! scontrol --oneliner show job "$job" | grep -q JobState=RUNNING; then exit 1; fi
  scontrol requeue "$job" && sleep 60
}
may_fail() {  # so often in a row without a further checkpoint, since it was submitted
  saved=$(ls "$run/checkpoints" 2> /dev/null | sed -n 's/^step-0*\\([0-9]*\\)$/\\1/p' | tail -n 1); saved=${saved:-0}
  failures=0; at=0
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then read -r failures at 2> /dev/null < "$run/slurm/failures"; fi
  if [ "$saved" -gt "$at" ]; then failures=0; fi
  mkdir -p "$run/slurm" && echo "$((failures + 1)) $saved" > "$run/slurm/failures"
  [ "$failures" -lt RESTARTS ]
}
if [ -e "$run/REQUEUE" ] && [ "$(changed REQUEUE)" != "$marker" ]; then
  again
elif { [[ "$status:$code" =~ ^failed:|^running:(13[0-9]|14[0-3])$ ]] || [ -e "$run/REQUEUE" ]; } && may_fail; then
  # A lost GPU or a broken link, ranks that were killed and could say nothing, or that could not start again; it goes on
  # from the newest checkpoint. A run that can't go on says `stopped`.
  again
fi
exit $((code > 0 ? code : 1))
"""
)
_END_CHAINED = (
    _WAIT
    + """\
# The next job of the chain goes on, and ends at once if there is nothing left to do.
exit $((code > 0 ? code : 1))
"""
)


def write(text: str, run_dir: str) -> Path:
    """Write the script into the run folder, beside which its logs go."""
    file = Path(run_dir) / "slurm" / FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lease.write(file, text)
    except OSError as error:
        raise BadInput(f"run_dir: {file} cannot be written: {error}") from None
    return file


def submit(file: Path, chain: int) -> list[str]:
    """Hand the script to sbatch, `chain` times, each after the one before; returns the numbers of the jobs.

    Raises:
        BadInput: there is no sbatch, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise BadInput("there is no sbatch here: run this on a login node of the cluster, or give --dry-run")
    jobs: list[str] = []
    for _ in range(chain):
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        done = subprocess.run(
            ["sbatch", "--parsable", *after, str(file)], capture_output=True, text=True, check=False
        )  # fmt: skip
        if done.returncode:
            told = f" (jobs {', '.join(jobs)} of the chain are submitted)" if jobs else ""
            raise BadInput(f"sbatch refuses {file}: {done.stderr.strip() or done.stdout.strip()}{told}")
        jobs.append(done.stdout.strip().partition(";")[0])
    return jobs
