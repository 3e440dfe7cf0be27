#!/usr/bin/env bash
# siirl on NVIDIA GPUs: install, doctor, validate, bench, train. Needs the driver; PyTorch brings the rest of CUDA.
#
#   ci/cuda.sh [RESULTS]    default ci-results
#
# Options are variables, and CUDA_VISIBLE_DEVICES chooses the devices:
#
#   PYTHON=python3          makes the environment; 3.11 or newer
#   VENV=DIR                the environment; default .venv-ci-DEVICE
#   INSTALL=0               use VENV as it is
#   TORCH=torch==2.13.0     the PyTorch to install, TORCH_INDEX=URL where from
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

DEVICE=cuda
EXTRAS=${EXTRAS:-bench,cuda}
# shellcheck source=ci/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_all
