#!/usr/bin/env bash
# What srun runs for each task: rank.sh COMMAND... with SLURM's variables turned into torch's, and a log of its own.
#
# The command is a child and not exec'ed: its exit status is written down here, so that the job script can tell which
# rank failed first, and a rank that leaves when asked to does not make srun kill the others that are leaving, too.
set -u

# Ranks of this node. SLURM writes those of all nodes as 8(x2),4: two nodes of eight, then one of four.
ranks_here() {
    local part nodes left=$SLURM_NODEID
    for part in ${SLURM_STEP_TASKS_PER_NODE//,/ }; do
        nodes=1
        [[ $part != *x* ]] || { nodes=${part##*x} && nodes=${nodes%)}; }
        if ((left < nodes)); then
            echo "${part%%(*}"
            return
        fi
        left=$((left - nodes))
    done
}

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
LOCAL_WORLD_SIZE=$(ranks_here)
export LOCAL_WORLD_SIZE
name=$MEGAKD_LOGS/rank-$(printf %05d "$RANK")

trap : TERM USR1           # they are for the command, which gets them as well; this shell waits for it
if [[ $RANK == 0 ]]; then
    # tee would die of the same signals, and rank 0 of a pipe without a reader.
    "$@" 2>&1 | (trap '' TERM USR1; exec tee -a "$name.log")
    status=${PIPESTATUS[0]}
else
    "$@" >>"$name.log" 2>&1
    status=$?
fi
echo "$(date +%s%N) $status $(printf %05d "$RANK") $SLURMD_NODENAME" >"$name.status"
((status != 75)) || status=0
exit "$status"
