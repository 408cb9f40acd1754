#!/usr/bin/env bash
# The gate, in the environment that .ci/setup.sh made: format, lint, types, then the tests by tier, each timed.
# .ci/test.sh lint: the first three only; .ci/test.sh algorithms, faults, jobs: the further tiers.
set -euo pipefail

readonly budget_s=480
started_s=$SECONDS

# step NAME BUDGET_S COMMAND...: runs it, prints its time beside its budget on an idle machine, and fails when it fails
# or takes four times as long: a busy machine is no defect, a hang is. It is interrupted then, so that pytest can tell
# where it was. What pytest tells last of a tier that failed is written by tests/support/run_alone.py.
step() {
    local name="$1" budget="$2" begun_s=$SECONDS code=0
    shift 2
    printf '== %s (budget %d s)\n' "$name" "$budget"
    timeout --signal=INT --kill-after=60 $((4 * budget)) "$@" || code=$?
    printf '== %s: %s in %d s\n' "$name" "$([[ $code == 0 ]] && echo passed || echo "FAILED (exit $code)")" \
        $((SECONDS - begun_s))
    return "$code"
}

# Tests without a JVM take turns on all cores; those on Spark, which compute nearly all the time, have them to themselves.
readonly on_all_cores=(-n logical --maxprocesses 4 --dist worksteal)

# tier NAME BUDGET_S PYTEST_ARGUMENTS...: one tier of tests; one that selects nothing (pytest's exit 5) fails.
tier() {
    local name="$1" budget="$2"
    shift 2
    step "$name" "$budget" python -m pytest -q "$@"
}

if [[ "${1:-}" == jobs ]]; then
    tier "jobs, notebooks and searches on local[2]" 720 -m jobs tests/jobs tests/spark
    tier "Spark Connect" 180 -m connect tests/connect
    exit 0
fi
if [[ "${1:-}" == algorithms ]]; then
    tier "identities, and a small run of each preset" 120 "${on_all_cores[@]}" tests/algorithms
    tier "algorithms on local[2]" 120 -m algorithms tests/spark
    tier "a portion that lags, on two workers" 60 -m algorithms tests/cluster
    exit 0
fi
if [[ "${1:-}" == faults ]]; then
    tier "faults on threads and processes, and fuzzing" 150 "${on_all_cores[@]}" -m "not cluster and not slow_fault" tests/faults
    tier "faults on two workers" 240 -m "cluster and not slow_fault" tests/faults
    printf '== faults: passed in %d s of %d s\n' $((SECONDS - started_s)) 480
    exit 0
fi
step "format" 60 ruff format --check .
step "lint" 60 ruff check .
step "types" 60 mypy
if [[ "${1:-}" != lint ]]; then
    tier "tests without a JVM" 150 "${on_all_cores[@]}" -m "not spark" tests/unit tests/repository tests/benchmarks
    tier "tests on local[2]" 200 -m "spark and not jobs and not algorithms" tests/spark tests/repository/test_readme.py
    tier "tests on two workers" 100 -m "cluster and not algorithms" tests/cluster
fi
printf '== gate: passed in %d s of %d s\n' $((SECONDS - started_s)) "$budget_s"
