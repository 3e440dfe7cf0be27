#!/usr/bin/env bash
# siirl on Acme accelerators. SIIRL is a checkout of siirl; options are those of its ci/cpu.sh.
set -euo pipefail

DEVICE=${DEVICE:-acme}
PACKAGES=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=ci/common.sh
source "${SIIRL:?names no checkout of siirl}/ci/common.sh"
run_all
