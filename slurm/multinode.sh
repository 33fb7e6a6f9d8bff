#!/usr/bin/env bash
# Fine-tunes on all nodes of a Slurm job, and goes on by itself after a time limit, a preemption or a lost node:
#
#     sbatch slurm/multinode.sh
#     sbatch --nodes 4 slurm/multinode.sh configs/x.json --training.max_steps 100
#
# Options of sbatch come before the script, those of the run after it. slurm/README.md says more.
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -uo pipefail

# ---- your site: what makes `python` the one that has dora_dist, on every node ------------------------------------
# module load cuda
# source ~/venvs/dora/bin/activate
python=(python)
[ -z "${CONTAINER:-}" ] || python=(apptainer exec --nv "$CONTAINER" python) # CONTAINER=dora_dist.sif sbatch …
# ------------------------------------------------------------------------------------------------------------------

DEFAULT_CONFIG=${DEFAULT_CONFIG:-configs/llama7b_dora.json}
MAX_RESTARTS=${MAX_RESTARTS:-5} # restarts in a row without a new checkpoint, before the job gives up

main() {
    [ -n "${SLURM_JOB_ID:-}" ] || fail 2 "not inside a Slurm job; start it with: sbatch slurm/multinode.sh"
    stopping='' srun=''
    trap ask_to_stop USR1 TERM

    local config=$DEFAULT_CONFIG newest
    if [[ -n ${1:-} && $1 != --* ]]; then
        config=$1
        shift
    fi
    logs=logs/$SLURM_JOB_ID
    mkdir -p "$logs" || fail 2 "the ranks' logs have no place"
    newest=$(newest_checkpoint "$config" "$@") || fail 2 "nothing was started"
    count_restarts "$newest"
    [ -z "$newest" ] || set -- "$@" --checkpoint.resume auto
    run_ranks train --config "$config" "$@"
    conclude
}

# The newest checkpoint of this run. None on a first start that is told where to go on from.
newest_checkpoint() {
    "${python[@]}" - "$@" <<'END'
import os, sys
from pathlib import Path
from dora_dist.checkpoint import run_folder
from dora_dist.config import RunConfig
from dora_dist.runtime.errors import UserError

try:
    config = RunConfig.load(sys.argv[1], [word for word in sys.argv[2:] if word != "--resume"]).checkpoint
except UserError as error:
    sys.exit(f"error: {error}")
if config.resume in (None, "auto") or "SLURM_RESTART_COUNT" in os.environ:
    print(run_folder.newest_checkpoint(Path(config.run_dir)) or "")
END
}

# Counted where a start begins: Slurm starts a job again without asking this script when a node fails.
count_restarts() {
    local count=-1 before=''
    [ -z "${SLURM_RESTART_COUNT:-}" ] || [ ! -f "$logs/restarts" ] || { read -r count && read -r before; } <"$logs/restarts"
    [ "$before" = "$1" ] || count=-1
    count=$((count + 1))
    printf '%s\n' "$count" "$1" >"$logs/restarts"
    [ "$count" -le "$MAX_RESTARTS" ] || fail 1 "MAX_RESTARTS: $MAX_RESTARTS restarts brought no new checkpoint"
    say "start $((${SLURM_RESTART_COUNT:-0} + 1)), from ${1:-the beginning}, on $SLURM_JOB_NODELIST"
}

# Starts the ranks and waits for them; sets `status` to srun's exit code. Each rank's own is in a file of its own.
run_ranks() {
    local layout=(${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}) ranks gpus cpus
    gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    if [ -z "${SLURM_NTASKS:-}" ]; then # sbatch was not told how many ranks
        ranks=$(ranks_per_node "$gpus") || fail 2 "cannot find out how many ranks fit a node; give sbatch --ntasks-per-node"
        cpus=$((SLURM_CPUS_ON_NODE / ranks))
        layout=(--ntasks-per-node="$ranks" --ntasks=$((ranks * SLURM_JOB_NUM_NODES)) --cpus-per-task="$cpus")
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    fi
    export PYTHONUNBUFFERED=1 # what a rank said before it was killed is in its log
    # A whole node's GPUs are the job's, but a step of it has to ask for them.
    [ -z "$gpus" ] || layout+=(--gpus-per-node="$gpus")
    rm -f "$logs"/exit-*
    status=75
    [ -z "$stopping" ] || return
    say "srun ${layout[*]}; the ranks' logs: $logs/NODE-RANK.log"
    # srun kills all ranks when one fails. One that has saved and stopped (75) did not: others may still be saving.
    # shellcheck disable=SC2016
    srun --mpi=none "${layout[@]}" --kill-on-bad-exit=1 --output="$logs/%N-%t.log" --open-mode=append bash -c '
        trap : USR1 TERM
        "$@"
        code=$?
        echo $code >"$0/exit-$SLURM_PROCID"
        exit $((code == 75 ? 0 : code))' "$logs" "${python[@]}" -m dora_dist "$@" &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do # a trapped signal ends `wait`, not srun
        wait "$srun"
        status=$?
    done
}

# One rank per GPU; on a node without, one per socket. $1: what Slurm says of GPUs, such as "4" or "a100:4".
ranks_per_node() {
    local ranks=${1##*:}
    [ -n "$ranks" ] || ranks=$("${python[@]}" -c 'import torch; print(torch.accelerator.device_count())') || return
    [ "$ranks" != 0 ] || ranks=$(scontrol show node "$SLURMD_NODENAME" | grep -oP ' Sockets=\K\d+') || return
    echo "$ranks"
}

# Slurm announces the end of this start (--signal, preemption). srun passes signals on to the ranks.
ask_to_stop() {
    say "asked to stop by Slurm; passed on to the ranks"
    stopping=yes
    [ -z "$srun" ] || kill -USR1 "$srun" 2>/dev/null
}

# The ranks' exit codes: 0 done; 75 stopped after saving; 76 another rank was lost; above 128 killed by a signal. Any
# other would be the same next time. srun's own counts too: it speaks for ranks that could not leave theirs.
conclude() {
    local file rank code again=''
    for file in "$logs"/exit-* srun; do
        rank=${file##*/exit-}
        if [ "$file" = srun ]; then code=$status; elif [ -f "$file" ]; then code=$(<"$file"); else continue; fi
        if [ "$code" -eq 75 ] || [ "$code" -eq 76 ] || [ "$code" -gt 128 ]; then
            again+=" $rank:$code"
        elif [ "$code" -ne 0 ]; then
            [ "$rank" = srun ] || tail -n 20 "$logs"/*-"$rank.log"
            fail "$code" "exit code $code of rank $rank; the ranks' logs are in $logs"
        fi
    done
    [ -n "$again" ] || { say "done" && exit 0; }
    requeue "exit codes of ranks$again"
}

# A job that is being cancelled would come back to life. One that lost a node is requeued by Slurm itself.
requeue() {
    local state
    state=$(scontrol show job "$SLURM_JOB_ID")
    case $state in
        *JobState=RUNNING* | *Reason=TimeLimit*) ;;
        *) fail 75 "$1; Slurm is ending the job, so it is not requeued from here" ;;
    esac
    say "$1: requeued"
    scontrol requeue "$SLURM_JOB_ID" || fail 75 "the job could not be requeued; submit it again to go on"
    trap - USR1 TERM
    exec sleep 600 # Slurm ends it now
}

say() { echo "[$(date '+%F %T')] $*"; }

fail() {
    say "error: $2" >&2
    exit "$1"
}

main "$@"
