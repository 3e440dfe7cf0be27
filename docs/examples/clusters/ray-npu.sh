#!/usr/bin/env bash
# Before: `ray start --head --resources='{"NPU": 8}'` on one node, the same with --address=HEAD:6379 on the others.
set -euo pipefail

RECIPE=$1
RUN_DIR=$2 # on storage that all nodes share
: "${INTERFACE:=eth0}"

ray job submit --runtime-env-json \
    "{\"env_vars\": {\"HCCL_SOCKET_IFNAME\": \"=$INTERFACE\", \"GLOO_SOCKET_IFNAME\": \"$INTERFACE\"}}" \
    -- siirl train "$RECIPE" --launcher ray --device npu --workers 32 --run-dir "$RUN_DIR"
