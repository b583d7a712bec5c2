#!/bin/bash
# What a container does; its exit code is that of the run.
#
#   train [--hostfile FILE] --config RECIPE.yaml [key=value …]     as a rank of srun, as a node of a Kubernetes job, over
#                                                                  the hosts of FILE (or $HOSTFILE), else on this node
#   sshd                                                           a node that others start ranks on
#   health                                                         for HEALTHCHECK
#   COMMAND …                                                      any program, or a verb of fullft
#
# Launchers do not carry the end of a run: DeepSpeed's returns 0 when its pdsh was killed, torchrun 1 whatever its ranks
# return, and both kill ranks that are still saving. So signals go to the ranks themselves, ranks that a launcher has
# left are waited for, and state.json of the run folder says how it ended.
set -uo pipefail

train=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/launch/train.py
hosts=() # of the hostfile; empty: this node alone
ranks='' # pattern of the command line of the run's ranks, but not of their launchers
signalled='' interrupted=''
grace=${FULLFT_GRACE_SECONDS:-330} # checkpoint.grace_seconds and a little more
patience=${FULLFT_WAIT_SECONDS:-300}

say() { echo "fullft: $*" >&2; }

# A command on each node of the run; succeeds where it does on one of them.
on_nodes() {
  local host code=1
  if [ ${#hosts[@]} = 0 ]; then
    bash -c "$1"
    return
  fi
  for host in "${hosts[@]}"; do ssh -n -o BatchMode=yes -o ConnectTimeout=5 "$host" "$1" && code=0; done
  return $code
}

# The run folder of --config and overrides. Exit code 2 and all problems where the recipe is wrong, or not that of a run
# which is done: when the launcher has ended, "done" in the folder means this recipe.
run_folder() {
  python -c '
import argparse, contextlib, sys
from fullft.errors import EXIT_BAD_INPUT, BadInput
from fullft.recipe import load_recipe
from fullft.state import status
parser = argparse.ArgumentParser(prog="train")
parser.add_argument("--config", required=True)
parser.add_argument("overrides", nargs="*")
given = parser.parse_intermixed_args()
try:
    recipe = load_recipe(given.config, given.overrides)
    if status(recipe.run_folder) == "done":
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed may log when it is imported
            from fullft.preflight import check_run_folder
        check_run_folder(recipe)
    print(recipe.run_folder.resolve())
except BadInput as error:
    sys.stderr.write(error.report())
    sys.exit(EXIT_BAD_INPUT)
' "$@"
}

state() { cat "$folder/state.json" "$folder/REQUEUE" 2> /dev/null; }

forward() { # SIGNAL
  interrupted=1 signalled=1
  say "SIG$1: handed on to the ranks"
  on_nodes "pkill -$1 -f '$ranks'" || kill -TERM "$launcher" 2> /dev/null # there are none yet
}

wait_for_launcher() { # sets $code
  while
    interrupted=''
    wait "$launcher"
    code=$?
    [ -n "$interrupted" ] # a signal has ended the waiting, not the launcher
  do :; done
}

# Ranks that outlive their launcher notice, save and end; those that do not are killed.
wait_for_ranks() {
  local deadline=$((SECONDS + grace))
  while on_nodes "pgrep -f '$ranks' > /dev/null"; do
    if ((SECONDS >= deadline)); then
      say "ranks were still there $grace s after their launcher had ended: killed"
      on_nodes "pkill -KILL -f '$ranks'"
      return
    fi
    sleep 1
  done
}

# The exit code of the run; docs/interruptions.md. $1: the launcher's, $2: what the folder said before the start.
exit_code() {
  local now status
  now=$(state)
  status=$(sed -n 's/.*"status": *"\([a-z]*\)".*/\1/p' <<< "$now" | head -n 1)
  say "run $folder: ${status:-not started}, exit code of the launcher $1"
  if [ "$status" = "done" ]; then return 0; fi # perhaps before: then nothing was left to do
  if [ "$now" = "$2" ] && [ -n "$signalled" ]; then return 85; fi
  # The start has not come so far as to say anything, or its ranks were killed, or this node does not see it yet.
  if [ -n "${has_code:-}" ] && [ "$1" = 0 ]; then return 0; fi # with node-local run folders only one node's says so
  if [ "$now" = "$2" ] || [ "$status" = running ]; then return $(($1 == 0 || $1 > 128 ? 1 : $1)); fi
  if [ -e "$folder/REQUEUE" ]; then return 85; fi
  if [ "$status" = stopped ] && grep -q '"gate"' <<< "$now"; then return 75; fi
  return $(($1 == 2 ? 2 : 1)) # 2: what only a start shows, as data that has changed since
}

# torchrun, but with the exit code of the rank that failed first: a node of a Kubernetes job ends with it.
torchrun_with_code() {
  exec python -c '
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except ChildFailedError as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(max(1, error.get_first_failure()[1].exitcode))
' "$@"
}

wait_for_hosts() {
  local host
  for host in "${hosts[@]}"; do
    until ssh -n -o BatchMode=yes -o ConnectTimeout=5 "$host" true 2> /dev/null; do
      if ((SECONDS >= patience)); then
        say "$host of $1 cannot be reached by ssh after $patience s: is its container running, with the same keys?"
        exit 1
      fi
      sleep 1
    done
  done
}

gpus() { nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true; }

train() {
  local hostfile=${HOSTFILE:-} before nodes node per_node
  if [ "${1:-}" = --hostfile ]; then
    hostfile=${2:-}
    shift 2
  fi
  if [ -n "${SLURM_STEP_NUM_TASKS:-}" ]; then exec python "$train" "$@"; fi # srun forwards signals, and knows the nodes
  folder=$(run_folder "$@") || exit $?
  before=$(state)
  ranks="^[^ ]*python[^ ]* (-u )?$train .*$(sed 's/[^A-Za-z0-9_/-]/[&]/g' <<< "$*")"

  # PyTorchJob sets PET_…, or MASTER_ADDR with WORLD_SIZE and RANK of nodes; a JobSet is to set NNODES and NODE_RANK.
  nodes=${PET_NNODES:-${NNODES:-${WORLD_SIZE:-}}}
  node=${PET_NODE_RANK:-${NODE_RANK:-${RANK:-0}}}
  per_node=${GPUS_PER_NODE:-${PET_NPROC_PER_NODE:-auto}}
  if [[ ! $per_node =~ ^[1-9][0-9]*$ ]]; then per_node=$(gpus); fi # auto, gpu
  if [ -n "$hostfile" ]; then
    mapfile -t hosts < <(sed 's/#.*//' "$hostfile" | awk 'NF { print $1 }')
    if [ ${#hosts[@]} = 0 ]; then
      say "$hostfile: no host in it; a line is \`NAME slots=GPUS\`"
      exit 2
    fi
    if [ -n "${SSH_KEYS:-}" ]; then start_sshd; fi # this node is one of them
    wait_for_hosts "$hostfile"
    # --force_multi: one host that is not this one would be run here
    deepspeed --hostfile "$hostfile" --force_multi "$train" "$@" &
  elif [ -n "${PET_MASTER_ADDR:-${MASTER_ADDR:-}}" ] && [ -n "$nodes" ]; then
    unset RANK WORLD_SIZE LOCAL_RANK
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # an elastic PyTorchJob: ranks that are started again meet anew
    has_code=1
    torchrun_with_code --nnodes "$nodes" --node-rank "$node" \
      --nproc-per-node "$((per_node ? per_node : 1))" --master-addr "${PET_MASTER_ADDR:-$MASTER_ADDR}" \
      --master-port "${PET_MASTER_PORT:-${MASTER_PORT:-29500}}" "$train" "$@" &
  else
    deepspeed ${GPUS_PER_NODE:+--num_gpus "$GPUS_PER_NODE"} --master_port "${MASTER_PORT:-29500}" "$train" "$@" &
  fi
  launcher=$!
  trap 'forward TERM' TERM INT
  trap 'forward USR1' USR1
  wait_for_launcher
  wait_for_ranks
  exit_code "$code" "$before"
  exit $?
}

# Keys of all nodes: those in $SSH_KEYS, a folder that they share; the first node makes them.
start_sshd() {
  local keys=${SSH_KEYS:-/ssh} new
  new=$keys/new-$(hostname)-$$
  mkdir -p ~/.ssh && chmod 700 ~/.ssh
  if [ ! -e "$keys/id_ed25519" ]; then
    ssh-keygen -q -t ed25519 -N '' -C fullft -f "$new"
    ln "$new" "$keys/id_ed25519" 2> /dev/null # fails where another node was first
    rm -f "$new" "$new.pub"
  fi
  if ! install -m 600 "$keys/id_ed25519" ~/.ssh/id_ed25519; then
    say "no ssh key: mount a folder that all nodes share and uid $(id -u) may write, or that has id_ed25519, at $keys"
    exit 1
  fi
  ssh-keygen -y -f ~/.ssh/id_ed25519 > ~/.ssh/authorized_keys
  if [ ! -e ~/.ssh/host_key ]; then ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/host_key; fi
  (umask 077 && env | grep -Ev '^(PWD|OLDPWD|SHLVL|_|HOSTNAME|HOME|TERM)=' > ~/.ssh/environment)
  /usr/sbin/sshd -D -e -f "$(dirname "$train")/../docker/sshd_config" &
  sshd=$!
}

serve() {
  ranks="^[^ ]*python[^ ]* (-u )?$train "
  start_sshd
  launcher=$sshd
  # The end of this node is the end of the run: its ranks tell the others.
  trap 'interrupted=1; pkill -TERM -f "$ranks"; wait_for_ranks; kill "$sshd"' TERM INT
  trap 'interrupted=1; pkill -USR1 -f "$ranks"' USR1
  wait_for_launcher
  exit $((code > 128 ? 0 : code))
}

health() {
  if [ "${FULLFT_VARIANT:-gpu}" = gpu ] && [ "$(gpus)" = 0 ]; then
    say "nvidia-smi sees no GPU: start the container with --gpus all"
    exit 1
  fi
  if pgrep -x sshd > /dev/null; then ssh -n localhost true; fi
}

case "${1:---help}" in
  train) train "${@:2}" ;;
  sshd) serve ;;
  health) health ;;
  *) if [ -n "$(type -P "$1")" ]; then exec "$@"; else exec fullft "$@"; fi ;;
esac
