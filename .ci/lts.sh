#!/usr/bin/env bash
# The second supported stack: Spark 3.5, pyarrow 14, numpy 1.26 and petastorm, in an environment of its own, .venv-lts;
# then the tests on it. Run it by `make test-lts`, after .ci/setup.sh has set Java and .venv; `build` as its argument
# only makes the environment. Setting: LTS_TIMEOUT_S (pip; default 900).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly budget_s=360
readonly started_s=$SECONDS
readonly lts_timeout_s="${LTS_TIMEOUT_S:-900}"
readonly lts_packages=(
    -e ".[digits,metrics,tls]" torch==2.13.0
    pytest pytest-timeout pytest-xdist hypothesis psutil scipy
    opencv-python-headless
    dill diskcache future packaging pyzmq six fsspec   # what petastorm needs
)
# petastorm 0.13 asks for setuptools below 70 and torch 2.13 for 77 or newer; it never imports setuptools, so it comes
# without its dependencies, which are listed above.
readonly lts_alone=(petastorm)

lts_fail() {
    printf '[lts] error: %s\n' "$*" >&2
    exit 1
}

# The environment, made again when what it is made from has changed. Behind it stands .venv: torch and others of the same
# versions are not installed twice. Python compiles what is imported: most of what lies there never is.
lts_venv() {
    local folder=.venv-lts stamp
    stamp="$(cat pyproject.toml .ci/constraints/lts.txt | cksum) ${lts_packages[*]} ${lts_alone[*]} ${PWD} over $(<.venv/.stamp)"
    if [[ -x "$folder/bin/python" && -f "$folder/.stamp" && "$(<"$folder/.stamp")" == "$stamp" ]]; then
        return 0
    fi
    rm -rf "$folder"
    .venv/bin/python -m venv --without-pip "$folder" || lts_fail ".venv has no working Python: run make test-lts, which makes it"
    printf '%s\n' "$PWD"/.venv/lib/python3.*/site-packages >"$(printf '%s' "$folder"/lib/python3.*/site-packages)/venv.pth"
    timeout "$lts_timeout_s" .venv/bin/python -m pip --python "$folder/bin/python" install -qq --disable-pip-version-check --no-compile \
        -c .ci/constraints/lts.txt "${lts_packages[@]}" >&2 ||
        lts_fail "pip could not install .ci/constraints/lts.txt within ${lts_timeout_s} s: its message is above"
    timeout "$lts_timeout_s" .venv/bin/python -m pip --python "$folder/bin/python" install -qq --disable-pip-version-check \
        --no-compile --no-deps \
        -c .ci/constraints/lts.txt "${lts_alone[@]}" >&2 ||
        lts_fail "pip could not install ${lts_alone[*]} within ${lts_timeout_s} s: its message is above"
    printf '%s' "$stamp" >"$folder/.stamp"
}

# timed NAME BUDGET_S COMMAND...: runs it and prints its time beside its budget on an idle machine.
timed() {
    local name="$1" budget="$2" begun_s=$SECONDS code=0
    shift 2
    printf '== %s (budget %d s)\n' "$name" "$budget"
    "$@" || code=$?
    printf '== %s: %s in %d s\n' "$name" "$([[ $code == 0 ]] && echo passed || echo "FAILED (exit $code)")" \
        $((SECONDS - begun_s))
    return "$code"
}

# lts_tests LIMIT_S PYTEST_ARGUMENTS...: with that environment's Python and Spark in driver and executors. A test that was
# skipped has shown nothing, so it fails the step; so does a selection without tests (pytest's exit 5).
lts_tests() {
    local folder="$PWD/.venv-lts" limit_s="$1" report code=0
    shift
    report="$(mktemp)"
    PATH="$folder/bin:$PATH" SPARK_HOME="$lts_spark_home" PYSPARK_PYTHON="$folder/bin/python" \
        PYSPARK_DRIVER_PYTHON="$folder/bin/python" SPARK_CONF_DIR="$PWD/conf" SPARK_LOCAL_IP=127.0.0.1 \
        timeout "$limit_s" "$folder/bin/python" -m pytest -q -o junit_family=xunit1 --junitxml="$report" "$@" || code=$?
    if [[ $code == 0 ]] && ! grep -q ' skipped="0"' "$report"; then
        printf 'skipped tests fail this step: they are listed above\n' >&2
        code=1
    fi
    rm -f "$report"
    return "$code"
}

timed "environment .venv-lts" 45 lts_venv
lts_spark_home="$(.venv-lts/bin/python -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("pyspark").origin).parent)')"
readonly lts_spark_home
if [[ "${1:-}" != build ]]; then
    # Without those that read the project's own text, and the one that trains for half a minute: versions do not matter to them.
    timed "tests without a JVM" 120 lts_tests 480 -n logical --maxprocesses 4 --dist worksteal \
        -m "not spark and not lts" tests/unit
    timed "tests on two workers" 60 lts_tests 240 -m lts tests/cluster/test_smoke.py
    timed "petastorm on local[2]" 120 lts_tests 480 -m lts tests/lts
fi
printf '== lts: passed in %d s of %d s\n' $((SECONDS - started_s)) "$budget_s"
