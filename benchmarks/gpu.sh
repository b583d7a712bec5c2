#!/usr/bin/env bash
# Everything that needs one GPU: no network, results in benchmarks/results (or $OUT) as JSON, gpu.md and one log.
#
#     benchmarks/gpu.sh                                     # all parts: 30 minutes at most, each 10
#     OUT=/tmp/out benchmarks/gpu.sh environment kernels    # these; a later call adds to the same OUT
#     OUT=/tmp/out benchmarks/gpu.sh step-1b step-8b
#     DS_ACCELERATOR=cpu SIZES=tiny LENGTH=256 benchmarks/gpu.sh      # proves the parts without a GPU
#
# `python -m benchmarks.environment --carry`, where there is network, says how to fetch the packages.
#
# Parts: environment matmul tests whole_run account planner step kernels; step is step-SIZE for each of SIZES, kernels is
# kernels-SWITCH for each of attention, checkpointing, kernels, precision, mlp_tiles and deepspeed. One that fails or takes
# too long does not stop the next; what it has measured until then is kept. gpu.md is made anew after each, from all
# parts that OUT has.
#
#   PYTHON      interpreter (python3)             SIZES         models of benchmarks/models.py (the largest that fits, 1b)
#   TRL_PYTHON  interpreter that has TRL (PYTHON) KERNELS_SIZE  model of kernels (0.5b, tiny on a CPU)
#   LENGTH      tokens of a sequence (8192)       WHOLE_RUN_SIZE  (small)
#   SECONDS_IN_ALL, SECONDS_OF_PART (1800, 600)   of this call: 550 where a command gets 10 minutes
set -uo pipefail
mkdir -p "${OUT:-.}"
results=${OUT:+$(cd "$OUT" && pwd)}
cd "$(dirname "$0")/.."
results=${results:-$PWD/benchmarks/results}

python=${PYTHON:-python3}
length=${LENGTH:-8192}
in_all=${SECONDS_IN_ALL:-1800}
of_part=${SECONDS_OF_PART:-600}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=disabled
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false PYTORCH_ALLOC_CONF=expandable_segments:True PYTHONUNBUFFERED=1
export FULLFT_BENCHMARK_RESULTS="$results"
log=$results/gpu.log
kernels_size=${KERNELS_SIZE:-0.5b} quick=()
[[ ${DS_ACCELERATOR:-} == cpu ]] && kernels_size=${KERNELS_SIZE:-tiny} quick=(--quick)
started=$SECONDS

# part NAME SECONDS COMMAND…: within its time and what is left of all; parts.jsonl tells how it ended, and its results.
part() {
    local name=$1 limit=$2 left=$((in_all - (SECONDS - started))) began=$SECONDS code=0 own files
    shift 2
    ((limit > of_part)) && limit=$of_part
    ((limit > left)) && limit=$left
    own=$(mktemp)
    if ((left < 20)); then
        code=null
        echo "== $name: not started, the time is over" | tee -a "$log"
    else
        echo "== $name (at most $limit s): $*" | tee -a "$log"
        # The signal goes to all processes of the part: it writes what it has, and leaves no rank behind.
        timeout --kill-after=30 "$limit" "$@" > "$own" 2>&1 || code=$?
        cat "$own" >> "$log"
        tail -n $((code == 0 ? 12 : 30)) "$own"
        ((code == 0)) || echo "-- $name: exit code $code, see $log"
        ((code == 124 || code == 137)) && echo "-- $name: took longer than $limit s"
    fi
    # A part says which files it has written, each on a line.
    files=$(grep -Fx -f <(printf '%s\n' "$results"/*.json) "$own" | sort -u | sed 's|.*/\(.*\)|"\1"|' | paste -sd,)
    rm "$own"
    echo "{\"part\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - began))," \
        "\"command\": \"${*//"$python"/python}\", \"results\": [$files]}" >> "$results/parts.jsonl"
    "$python" -m benchmarks.gpu_table "$results" > "$results/gpu.md.part" && mv "$results/gpu.md.part" "$results/gpu.md"
}

# The largest model that fits, and 1b.
sizes() {
    local fitting
    fitting=$("$python" -m benchmarks.models --fitting | tr '\n' ' ')
    echo "${SIZES:-${fitting%% *}$([[ " $fitting" == *" 1b "* && $fitting != 1b* ]] && echo " 1b")}"
}

run() {
    case $1 in
        environment) part environment 60 "$python" -m benchmarks.environment ;;
        matmul) part matmul 120 "$python" -m benchmarks.matmul ;;
        tests) part tests 300 env FULLFT_TEST_GPU=1 "$python" -m pytest -m gpu -q -p no:cacheprovider tests ;;
        account) part account 120 "$python" -m benchmarks.account "${quick[@]}" ;;
        whole_run) part whole_run 300 "$python" -m benchmarks.whole_run --size "${WHOLE_RUN_SIZE:-small}" ;;
        planner) part planner 600 "$python" -m benchmarks.planner --seconds 480 "${quick[@]}" ;;
        step) for size in $(sizes); do run "step-$size"; done ;;
        step-*) part "$1" 600 "$python" -m benchmarks.step --quick --size "${1#step-}" --length "$length" \
            --trl-python "${TRL_PYTHON:-$python}" ;;
        kernels) for switch in attention checkpointing kernels precision mlp_tiles deepspeed; do run "kernels-$switch"; done ;;
        kernels-*) part "$1" 300 "$python" -m benchmarks.kernels --quick --length "$length" --size "$kernels_size" \
            --only "${1#kernels-}" ;;
    esac
}

all="environment matmul tests whole_run account planner step kernels"
(($#)) || set -- $all
for name in "$@"; do
    [[ " $all " == *" $name "* || $name == step-?* || $name == kernels-?* ]] && continue
    echo "no part is named $name; see the beginning of $0" >&2
    exit 2
done
mkdir -p "$results"
for name in "$@"; do run "$name"; done
cat "$results/gpu.md"
