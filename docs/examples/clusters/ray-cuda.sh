#!/usr/bin/env bash
# Before: `ray start --head` on one node, `ray start --address=HEAD:6379` on the others.
set -euo pipefail

RECIPE=$1
RUN_DIR=$2 # on storage that all nodes share
: "${INTERFACE:=eth0}"

ray job submit --runtime-env-json \
    "{\"env_vars\": {\"NCCL_SOCKET_IFNAME\": \"$INTERFACE\", \"GLOO_SOCKET_IFNAME\": \"$INTERFACE\"}}" \
    -- siirl train "$RECIPE" --launcher ray --device cuda --workers 32 --run-dir "$RUN_DIR"
