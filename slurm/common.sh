# shellcheck shell=bash
# What a job script does around `srun megakd run`: see `main` at the end. Sourced by the *.sbatch files.

readonly USAGE=2 INTERRUPTED=75          # exit statuses; INTERRUPTED is megakd's own (megakd/interruption.py)
readonly ENDED_BY_TERM=143 ENDED_BY_USR1=138

say() { echo "$(date +%H:%M:%S) slurm: $*"; }

# Ends the job with one line: what is wrong and what to do.
refuse() {
    echo "slurm: error: $*" >&2
    exit "$USAGE"
}

# ------------------------------------------------------------------------------------------------ what is asked for
recipe='' container='' dry_run=''
recipe_options=()      # for job.py: --overrides FILE and key.key=value
stage_options=()       # for megakd run: --stage NAME

parse_arguments() {
    while (($#)); do
        case $1 in
            --recipe | --overrides | --stage | --container)
                (($# > 1)) || refuse "$1 needs a value. See the head of the job script"
                case $1 in
                    --recipe) recipe=$2 ;;
                    --overrides) recipe_options+=(--overrides "$2") ;;
                    --stage) stage_options+=(--stage "$2") ;;
                    --container) container=$2 ;;
                esac
                shift 2 ;;
            --dry-run) dry_run=yes; shift ;;
            -* | '') refuse "'$1' is no option of this script (sbatch's own go before the script's name)" ;;
            *=*) recipe_options+=("$1"); shift ;;
            *) refuse "'$1' is neither an option nor key.key=value" ;;
        esac
    done
}

# The value of an #SBATCH line of the job script: what sbatch would take.
header() { sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$2" | head -n 1; }

find_python() {
    if [[ -n ${MEGAKD_PYTHON:-} ]]; then
        python=$MEGAKD_PYTHON
    elif [[ -z $container && -x $1/.venv/bin/python ]]; then
        python=$1/.venv/bin/python
    else
        python=python3
    fi
    if [[ -z $container ]] && ! command -v "$python" >/dev/null; then
        refuse "MEGAKD_PYTHON = '$python': there is no such program. Name the python of an environment with megakd"
    fi
}

# ------------------------------------------------------------------------------------------------------- srun lines
# `srun_line NODES RANKS_PER_NODE COMMAND...` sets `line`, so that what is shown and what is run cannot differ.
srun_line() {
    local nodes=$1 each=$2
    shift 2
    # --distribution: neighbouring ranks share a node, as tensor groups are neighbours; a cluster may have set `cyclic`.
    # --mpi=none: ranks meet by torch's own store; a cluster's default of pmix would start what nobody uses.
    line=(srun "--nodes=$nodes" "--ntasks=$((nodes * each))" "--ntasks-per-node=$each" --distribution=block --mpi=none)
    # Since SLURM 22.05 srun does not take this from sbatch any more.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || line+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    # A rank that fails ends the others, which would wait for it in a collective.
    line+=(--kill-on-bad-exit=1 --wait=120 --export=ALL)
    [[ -z $container ]] ||
        line+=("--container-image=$container" "--container-mounts=$mounts" "--container-workdir=$PWD")
    line+=("$@")
}

show_line() {
    printf '%q ' "${line[@]}"
    echo
}

# ------------------------------------------------------------------------------------------------- the job's place
# Where rank 0 listens: this script runs on the job's first node, which has rank 0.
set_rendezvous() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The address that SLURM itself uses for the node: a node's name need not resolve everywhere.
    MASTER_ADDR=$(scontrol --oneliner show node "$first" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
    MASTER_PORT=$("$port_python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    [[ -n $MASTER_ADDR && -n $MASTER_PORT ]] ||
        refuse "found no address for rank 0 on node '$first' (scontrol show node)"
    export MASTER_ADDR MASTER_PORT
}

# Settings of the network; what is set in the submitting shell stands. docs/cluster.md says more.
set_network() {
    # Says which network NCCL has taken and why it fails; INFO for all of it.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Left to NCCL and UCX, as a wrong value is worse than none. Set them in the submitting shell where your site says:
    #   NCCL_IB_HCA=mlx5_0,mlx5_1,...     InfiniBand adapters of the compute network, where storage has its own
    #   NCCL_SOCKET_IFNAME=ib0            interface of NCCL's start-up (and of all traffic without InfiniBand)
    #   GLOO_SOCKET_IFNAME=ib0            the same for gloo (device: cpu)
    #   NCCL_IB_GID_INDEX=3               RoCE: which entry of the adapter's address table is RoCE v2
    #   UCX_NET_DEVICES=mlx5_0:1,...      UCX_TLS=rc,cuda_copy,cuda_ipc: only where NCCL goes through a UCX plugin
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
}

# The job's folder below the run's: resolved recipe, plan, code, logs. A job that starts again finds them, and goes on
# with the code and the recipe that it began with.
make_job_folder() {
    local root=$1
    job_folder=$("${job_py[@]}" --keep "$SLURM_JOB_ID") || exit "$USAGE"
    if [[ ! -d $job_folder/code ]]; then
        rm -rf "$job_folder/code.partial"
        mkdir "$job_folder/code.partial" && cp -a "$root/megakd" "$root/slurm" "$job_folder/code.partial/" &&
            { git -C "$root" describe --always --dirty 2>/dev/null || echo "no git repository"; } \
                >"$job_folder/code.partial/COMMIT" &&
            mv "$job_folder/code.partial" "$job_folder/code" || refuse "cannot copy the code to $job_folder"
    fi
    logs=$job_folder/start-${SLURM_RESTART_COUNT:-0}
    mkdir -p "$logs" || refuse "cannot make $logs"
    export MEGAKD_LOGS=$logs PYTHONPATH=$job_folder/code${PYTHONPATH:+:$PYTHONPATH}
}

# One task a node looks whether the node can do it, before the ranks load anything.
check_nodes() {
    local device=cpu each=$1
    ! grep -q '^device: cuda' "$job_folder/recipe.yaml" || device=cuda
    srun_line "$SLURM_NNODES" 1 bash "$job_folder/code/slurm/check_node.sh" "$job_folder/recipe.yaml" "$python" \
        "$device" "$each"
    "${line[@]}" && return
    ! is_preempted || leave_interrupted preempted
    refuse "a node cannot take part: see the line above. Mend it, or leave the node out (sbatch --exclude)"
}

# ----------------------------------------------------------------------------------------------------- how it ended
# What a run has to show: its finished stages and newest checkpoints.
progress() { find "$job_folder/../../stages" \( -name manifest.json -o -name checkpoint.json \) 2>/dev/null | sort; }

# A field of what SLURM knows of this job. A busy controller may not answer at once, and a job's fate hangs on it.
job_field() {
    local pause shown=''
    for pause in 1 5 10; do
        shown=$(scontrol --oneliner show job "$SLURM_JOB_ID") && [[ -n $shown ]] && break
        sleep "$pause"
    done
    tr ' ' '\n' <<<"$shown" | sed -n "s/^$1=//p"
}

# A rank that was not killed together with its shell has left `rank-<rank>.status`: time, exit status, rank, node.
statuses() { cat "$logs"/*.status 2>/dev/null | sort -n; }

# srun's own status is no proof: it is 0, too, where SLURM killed the step at the end of the job's time.
all_are_done() { (($(statuses | awk '$2 == 0' | wc -l) == ranks)); }

# Those that left when asked to, or that were signalled before they could hear it.
left_when_asked() { statuses | awk -v list=" $INTERRUPTED $ENDED_BY_TERM $ENDED_BY_USR1 " 'index(list, " " $2 " ")'; }

# First come, first to blame.
failed_by_themselves() {
    statuses | awk -v list=" 0 $INTERRUPTED $ENDED_BY_TERM $ENDED_BY_USR1 " '!index(list, " " $2 " ")'
}

# The last line that says something, of a rank's log.
last_line_of() {
    [[ -s $1 ]] || return
    grep -E '(error|Error|Exception)[:(]' "$1" | tail -n 1 | grep . || grep . "$1" | tail -n 1
}

# One line: which rank, where, how; what it said last; what to do.
tell_failure() {
    local status=$1 code rank node how said next
    read -r _ code rank node < <(failed_by_themselves)
    if [[ -z ${code:-} ]]; then
        echo "slurm: job $SLURM_JOB_ID failed: srun ended with status $status and no rank says why; a node may be" \
            "lost (see srun's lines above, sinfo -R). Submit the same command to go on. Logs: $logs" >&2
        return
    fi
    said=$(last_line_of "$logs/rank-$rank.log")
    # A mistake in recipe or data is found by all ranks and told by rank 0 alone.
    ((code != USAGE)) || [[ -n $said ]] || said=$(last_line_of "$logs/rank-00000.log")
    how="ended with exit status $code" next="submit the same command: it goes on from the newest checkpoint"
    if ((code == 137)); then
        next="if nobody has killed it, the node was out of memory (sacct -j $SLURM_JOB_ID -o MaxRSS); $next"
    elif ((code < 128)); then
        next="mend that and $next"
    fi
    ((code <= 128)) || how="was ended by signal $((code - 128)) ($(kill -l $((code - 128))))"
    echo "slurm: job $SLURM_JOB_ID failed: rank $((10#$rank)) on $node $how; its log says: ${said:-nothing}. Next:" \
        "$next. Logs: $logs" >&2
}

# Whether SLURM leaves it to this script to queue the job again: while it runs, and when its time is up. Not when it
# has been cancelled, as that would bring it back, nor when SLURM does it after a preemption.
is_ours_to_queue() { [[ $(job_field JobState) == RUNNING || $(job_field Reason) == TimeLimit ]]; }

queued=''
queue_again() {
    [[ -z $queued ]] || return
    say "$1; job $SLURM_JOB_ID goes into the queue again"
    if scontrol requeue "$SLURM_JOB_ID"; then queued=yes; else say "that failed: submit the same command to go on"; fi
}

# SLURM tells this script when it ends a job, KillWait before it kills everything. The ranks may use that time to
# save; a stage that is no training will not end in it, and what was done before it is worth another start.
on_term() {
    say "SLURM ends this start of job $SLURM_JOB_ID: $(job_field JobState), reason $(job_field Reason)"
    if [[ $(job_field Reason) == TimeLimit && $(progress) != "$progress_before" ]]; then
        queue_again "its time is up"
    fi
}

# After an interruption: into the queue again, unless that is SLURM's to do or the time was for nothing.
leave_interrupted() {
    local why=$1
    if ! is_ours_to_queue; then
        say "interrupted. What job $SLURM_JOB_ID has done stands: the same command goes on from there"
        exit "$INTERRUPTED"
    fi
    if [[ $why != preempted && $(progress) == "$progress_before" ]]; then
        echo "slurm: job $SLURM_JOB_ID stops: this start has brought no new checkpoint and no finished stage, and" \
            "the next would not either. Give it more time (sbatch --time), or make the stage's work smaller." \
            "Logs: $logs" >&2
        exit 1
    fi
    queue_again "$why"
    exit "$INTERRUPTED"
}

is_preempted() {
    local when
    when=$(job_field PreemptTime)
    [[ -n $when && $when != None ]]
}

finish() {
    local status=$1
    if all_are_done; then
        say "job $SLURM_JOB_ID is done"
        exit 0
    # Where SLURM has ended or preempted the job, it does not matter how its ranks took it: one may complain of another
    # that is gone already, or of a program that it has started.
    elif is_preempted; then
        leave_interrupted preempted
    elif [[ $(job_field JobState) != RUNNING ]]; then
        leave_interrupted "its time is up"
    elif [[ -n $(left_when_asked) && -z $(failed_by_themselves) ]]; then
        leave_interrupted "interrupted before its time was up"
    fi
    tell_failure "$status"
    exit 1
}

# ------------------------------------------------------------------------------------------------------------- main
# main ROOT SCRIPT ARGUMENTS...: the job script's work, in the order in which it is done.
main() {
    local root=$1 script=$2 nodes each status=0 running
    shift 2
    parse_arguments "$@"
    recipe=${recipe:-$root/slurm/adpa_70b_to_7b.yaml}
    nodes=${SLURM_NNODES:-$(header nodes "$script")}
    each=${SLURM_NTASKS_PER_NODE:-$(header ntasks-per-node "$script")}
    ranks=$((nodes * each))
    find_python "$root"
    mounts=$root:$root,$PWD:$PWD${MEGAKD_MOUNTS:+,$MEGAKD_MOUNTS}
    port_python=$(command -v python3 || echo "$python")
    job_py=(env "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}" "$python" "$root/slurm/job.py" "$recipe" --nodes "$nodes"
        --ranks-per-node "$each" "${stage_options[@]}" "${recipe_options[@]}")
    if [[ -n $container && -n ${SLURM_JOB_ID:-} ]]; then
        # The recipe is read where megakd is installed.
        srun_line 1 1 "${job_py[@]}"
        job_py=("${line[@]}")
    fi
    if [[ -n $dry_run ]]; then
        "${job_py[@]}" || exit "$USAGE"
        srun_line "$nodes" "$each" bash slurm/rank.sh "$python" -u -m megakd.cli run '<resolved recipe>' \
            "${stage_options[@]}"
        show_line
        exit 0
    fi
    [[ -n ${SLURM_JOB_ID:-} ]] || refuse "this is no job of SLURM. Submit it with sbatch, or add --dry-run"
    make_job_folder "$root"
    progress_before=$(progress)
    trap on_term TERM
    trap : USR1
    set_rendezvous
    set_network
    check_nodes "$each"
    srun_line "$nodes" "$each" bash "$job_folder/code/slurm/rank.sh" "$python" -u -m megakd.cli run \
        "$job_folder/recipe.yaml" "${stage_options[@]}"
    say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST;" \
        "rank 0 at $MASTER_ADDR:$MASTER_PORT; logs in $logs"
    show_line
    "${line[@]}" &
    running=$!
    # A trapped signal ends `wait`, not srun.
    while :; do
        wait "$running"
        status=$?
        kill -0 "$running" 2>/dev/null || break
    done
    finish "$status"
}
