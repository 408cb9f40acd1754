#!/usr/bin/env bash
# The gate, in the environment that .ci/setup.sh made: format, lint, types, then the tests by tier, each timed.
set -euo pipefail

readonly budget_s=720
started_s=$SECONDS

# step NAME BUDGET_S COMMAND...: runs it, prints its time beside its budget on an idle machine, and fails when it fails
# or takes four times as long: a busy machine is no defect, a hang is.
step() {
    local name="$1" budget="$2" begun_s=$SECONDS code=0
    shift 2
    printf '== %s (budget %d s)\n' "$name" "$budget"
    timeout $((4 * budget)) "$@" || code=$?
    printf '== %s: %s in %d s\n' "$name" "$([[ $code == 0 ]] && echo passed || echo "FAILED (exit $code)")" \
        $((SECONDS - begun_s))
    return "$code"
}

# tier NAME BUDGET_S MARKER: one tier of tests; a marker that selects nothing yet (pytest's exit 5) passes, and says so.
tier() {
    local code=0
    step "$1" "$2" python -m pytest -q -m "$3" || code=$?
    if [[ $code == 5 ]]; then
        printf '== %s: no test has this marker\n' "$1"
        return 0
    fi
    return "$code"
}

step "format" 60 ruff format --check .
step "lint" 60 ruff check .
step "types" 60 mypy
if [[ "${1:-}" != lint ]]; then
    tier "tests without a JVM" 120 "not spark and not cluster"
    tier "tests on local[2]" 300 "spark and not cluster"
    tier "tests on two workers" 240 "cluster"
fi
printf '== gate: passed in %d s of %d s\n' $((SECONDS - started_s)) "$budget_s"
