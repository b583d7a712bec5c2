#!/usr/bin/env bash
# Everything that needs one GPU: no network, one command, results in benchmarks/results (or $OUT) as JSON and gpu.md.
#
#     benchmarks/gpu.sh                     # 30 minutes at most, each part 10
#     SIZES="1b 8b" OUT=/tmp/out benchmarks/gpu.sh
#     DS_ACCELERATOR=cpu SIZES=tiny LENGTH=256 benchmarks/gpu.sh      # proves the parts without a GPU
#
# A part that fails or takes too long does not stop the next; what it has measured until then is kept, with its log.
#
#   PYTHON      interpreter (python3)             SIZES    models of benchmarks/models.py (the largest that fits, 1b)
#   TRL_PYTHON  interpreter that has TRL (PYTHON) LENGTH   tokens of a sequence (8192)
#   PARTS       some of: environment matmul tests whole_run step kernels
#   SECONDS_IN_ALL, SECONDS_OF_PART               (1800, 600)
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
parts=${PARTS:-environment matmul tests whole_run step kernels}
length=${LENGTH:-8192}
in_all=${SECONDS_IN_ALL:-1800}
of_part=${SECONDS_OF_PART:-600}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=disabled
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false PYTORCH_ALLOC_CONF=expandable_segments:True
export FULLFT_BENCHMARK_RESULTS="${OUT:-$PWD/benchmarks/results}"
results=$FULLFT_BENCHMARK_RESULTS
logs=$results/logs
mkdir -p "$logs"
: > "$results/parts.jsonl"
started=$SECONDS

# part NAME SECONDS COMMAND…: within its time and what is left of all; how it ended stands in parts.jsonl.
part() {
    local name=$1 limit=$2 left=$((in_all - (SECONDS - started))) began=$SECONDS code=0
    shift 2
    local command="${*//"$python"/python}"
    if ((left < 20)); then
        echo "== $name: not started, the time is over"
        echo "{\"part\": \"$name\", \"code\": null, \"seconds\": 0, \"command\": \"$command\"}" >> "$results/parts.jsonl"
        return
    fi
    ((limit > left)) && limit=$left
    echo "== $name (at most $limit s): $*"
    # The signal goes to all processes of the part: it writes what it has, and leaves no rank behind.
    timeout --kill-after=30 "$limit" "$@" > "$logs/$name.log" 2>&1 || code=$?
    if ((code == 0)); then tail -n 12 "$logs/$name.log"; else tail -n 30 "$logs/$name.log"; fi
    ((code == 124 || code == 137)) && echo "-- $name: took longer than $limit s"
    ((code == 0)) || echo "-- $name: exit code $code, see $logs/$name.log"
    echo "{\"part\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - began)), \"command\": \"$command\"}" \
        >> "$results/parts.jsonl"
}

wanted() { [[ " $parts " == *" $1 "* ]]; }

wanted environment && part environment "$((of_part < 60 ? of_part : 60))" "$python" -m benchmarks.environment
wanted matmul && part matmul "$((of_part < 120 ? of_part : 120))" "$python" -m benchmarks.matmul
fitting=$("$python" -m benchmarks.models --fitting | tr '\n' ' ')
sizes=${SIZES:-${fitting%% *}$([[ " $fitting" == *" 1b "* && $fitting != 1b* ]] && echo " 1b")}
echo "sizes: $sizes"
wanted tests && part tests "$((of_part < 300 ? of_part : 300))" \
    env FULLFT_TEST_GPU=1 "$python" -m pytest -m gpu -q -p no:cacheprovider tests
wanted whole_run && part whole_run "$((of_part < 300 ? of_part : 300))" \
    "$python" -m benchmarks.whole_run --size "${WHOLE_RUN_SIZE:-small}"
for size in $sizes; do
    wanted step && part "step-$size" "$of_part" \
        "$python" -m benchmarks.step --quick --size "$size" --length "$length" --trl-python "${TRL_PYTHON:-$python}"
done
# The last of the sizes, which starts fast: there are some twenty rows.
wanted kernels && part kernels "$of_part" "$python" -m benchmarks.kernels --quick --size "${sizes##* }" --length "$length"
"$python" -m benchmarks.gpu_table "$results" | tee "$results/gpu.md"
