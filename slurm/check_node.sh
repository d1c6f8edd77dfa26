#!/usr/bin/env bash
# One task a node, before the ranks: check_node.sh RECIPE PYTHON DEVICE RANKS. Says in one line what this node lacks.
set -u
recipe=$1 python=$2 device=$3 ranks=$4

lacks() {
    echo "slurm: error: node $SLURMD_NODENAME: $*" >&2
    exit 2
}

[[ -r $recipe ]] ||
    lacks "cannot read $recipe. The run's folder (output) has to be on a file system that all nodes share"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    lacks "$python is not there or older than 3.11. The environment has to be on a file system that all nodes share"
[[ $device == cpu ]] && exit 0
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
((gpus >= ranks)) || lacks "$ranks ranks and $gpus GPUs (nvidia-smi -L). Lower --ntasks-per-node and --gpus-per-node"
