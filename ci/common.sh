# What ci/cpu.sh, ci/cuda.sh and ci/npu.sh share; they set DEVICE and their defaults and source this file.
# shellcheck shell=bash

RESULTS=${1:-ci-results}
mkdir -p "$RESULTS"
RESULTS=$(cd "$RESULTS" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

VENV=${VENV:-.venv-ci-$DEVICE}
PYTHON=${PYTHON:-python3}
INSTALL=${INSTALL:-1}
TORCH=${TORCH:-torch==2.13.0}
TORCH_INDEX=${TORCH_INDEX:-}
EXTRAS=${EXTRAS:-bench}
LEVEL=${LEVEL:-full}
SUITES=${SUITES:-}
BASELINES=${BASELINES:-benchmarks/results}
TOLERANCE=${TOLERANCE:-0.10}
RECIPE=${RECIPE:-quickstart}
WORKERS=${WORKERS:-}

: >"$RESULTS/summary.txt"
first_failure=0

# step NAME COMMAND...: run it with its output in NAME.log too. Later steps run all the same; the first failure's exit
# status is the script's.
step() {
    local name=$1 began=$SECONDS status=0
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$RESULTS/$name.log" || status=$?
    printf '%-10s exit %3d  %5d s\n' "$name" "$status" "$((SECONDS - began))" | tee -a "$RESULTS/summary.txt"
    if [ "$first_failure" = 0 ]; then first_failure=$status; fi
    return 0
}

# Without these two nothing that follows means anything.
need() {
    step "$@"
    if [ "$first_failure" != 0 ]; then finish; fi
}

finish() {
    echo "== results in $RESULTS"
    cat "$RESULTS/summary.txt"
    exit "$first_failure"
}

install() {
    if [ ! -x "$VENV/bin/python" ]; then "$PYTHON" -m venv "$VENV"; fi
    local pip=("$VENV/bin/python" -m pip --disable-pip-version-check install --quiet)
    # PyTorch comes first and is named again beside siirl, so that no dependency replaces this build of it.
    "${pip[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" &&
        "${pip[@]}" --editable ".[$EXTRAS]" "$TORCH" ${PACKAGES:+$PACKAGES}
}

# The usable devices of this kind by `siirl doctor`; 3 when there is none.
doctor() {
    "$VENV/bin/siirl" doctor --json >"$RESULTS/doctor.json" &&
        "$VENV/bin/python" -c '
import json, sys
found = json.load(open(sys.argv[1]))["devices"].get(sys.argv[2], {"available": False, "reason": "no such back end"})
print(sys.argv[2] + ":", found["reason"], *found.get("fixes", []), sep="\n  ")
if not found["available"]:
    sys.exit(3)
print(found["count"], file=open(sys.argv[3], "w"))
' "$RESULTS/doctor.json" "$DEVICE" "$RESULTS/count.txt"
}

run_all() {
    if [ "$INSTALL" = 1 ]; then need install install; fi
    need doctor doctor
    # A device of its own for each worker, where the device is not the host; two show that they agree.
    if [ -z "$WORKERS" ]; then
        WORKERS=$(cat "$RESULTS/count.txt")
        if [ "$DEVICE" = cpu ] || [ "$WORKERS" -gt 2 ]; then WORKERS=2; fi
    fi
    local siirl=$VENV/bin/siirl
    step validate "$siirl" validate --device "$DEVICE" --level "$LEVEL" --report "$RESULTS/validate"
    local compare=()
    if [ -d "$BASELINES" ]; then compare=(--compare "$BASELINES" --tolerance "$TOLERANCE"); fi
    # shellcheck disable=SC2086  # SUITES is a list
    step bench "$siirl" bench $SUITES --device "$DEVICE" --json "$RESULTS/bench.json" "${compare[@]}"
    rm -rf "$RESULTS/run"
    step train "$siirl" train "$RECIPE" --device "$DEVICE" --workers "$WORKERS" --run-dir "$RESULTS/run"
    finish
}
