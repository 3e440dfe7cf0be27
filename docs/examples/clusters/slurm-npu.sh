#!/usr/bin/env bash
#SBATCH --job-name=siirl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gres=npu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -euo pipefail

RECIPE=$1
RUN_DIR=$2 # on storage that all nodes share
export HCCL_SOCKET_IFNAME="=${INTERFACE:=eth0}" GLOO_SOCKET_IFNAME=$INTERFACE

RESUME=()
if [ -d "$RUN_DIR/checkpoints" ]; then RESUME=(--resume); fi
srun --kill-on-bad-exit=1 \
    siirl train "$RECIPE" --launcher env --device npu --run-dir "$RUN_DIR" "${RESUME[@]}"
