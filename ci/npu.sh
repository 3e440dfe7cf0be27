#!/usr/bin/env bash
# siirl on Ascend NPUs: install, doctor, validate, bench, train. Needs the driver and CANN (docker/Dockerfile.npu).
#
#   ci/npu.sh [RESULTS]     default ci-results
#
# Options are variables, and ASCEND_RT_VISIBLE_DEVICES chooses the devices:
#
#   TORCH_NPU=torch-npu==2.13.0   the extension of PyTorch, of the same release as TORCH
#   CANN_ENV=FILE                 sourced where ASCEND_HOME_PATH is not set
#   PYTHON=python3          makes the environment; 3.11 or newer
#   VENV=DIR                the environment; default .venv-ci-DEVICE
#   INSTALL=0               use VENV as it is
#   TORCH=torch==2.13.0     the PyTorch to install, TORCH_INDEX=URL where from: torch-npu
#                           refuses a build for CUDA, so on x86-64 name the index of PyTorch's CPU builds
#   LEVEL=smoke|full        of siirl validate; default full
#   SUITES="kernels train"  of siirl bench; default all
#   BASELINES=DIR           records that siirl bench compares with; default benchmarks/results
#   TOLERANCE=0.10          by how much a ratio or a time may grow
#   RECIPE=quickstart       trained at the end
#   WORKERS=N               of the training; default 2, or as many as there are devices where that is 1
#
# The exit status is that of the first step that failed: 3 the device is not usable, 4 a promise is broken or something
# became slower.
set -euo pipefail

CANN_ENV=${CANN_ENV:-/usr/local/Ascend/ascend-toolkit/set_env.sh}
if [ -z "${ASCEND_HOME_PATH:-}" ] && [ -f "$CANN_ENV" ]; then
    set +u # the script reads variables that nobody set
    # shellcheck source=/dev/null
    source "$CANN_ENV"
    set -u
fi

DEVICE=npu
PACKAGES=${TORCH_NPU:-torch-npu==2.13.0}
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_all
