#!/usr/bin/env bash
# Packages that stand beside ours, each set in an environment of its own: .venv-extras (transformers, Lightning, Keras,
# MLflow, TensorBoard, ONNX, boto3, Chromium through Selenium), .venv-airflow (Apache Airflow, which cannot live with them) and
# .venv-oracles (optax and Flower, whose algorithms ours are compared with).
# Run it by `make test-extras`, after .ci/setup.sh has set Java and .venv; `build` as its argument only makes the
# environments. Settings: EXTRAS_TIMEOUT_S (pip and apt-get, each; default 900).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly budget_s=410
readonly started_s=$SECONDS
readonly extras_timeout_s="${EXTRAS_TIMEOUT_S:-900}"
readonly extras_packages=(
    -e ".[digits,metrics,s3]" torch==2.13.0
    pytest pytest-timeout hypothesis psutil scipy
    transformers lightning keras
    mlflow tensorboard
    onnx onnxscript onnxruntime
    opencv-python-headless pillow jinja2 selenium kubernetes-validate
    moto flask flask-cors xmltodict py-partiql-parser   # an S3 server; of moto[server] only what S3 needs
)
readonly airflow_packages=(apache-airflow-core apache-airflow-providers-standard pytest pytest-timeout)
readonly oracle_packages=(optax flwr)   # asked by tests/extras/test_foreign_algorithms.py, in a process of their own

extras_fail() {
    printf '[extras] error: %s\n' "$*" >&2
    exit 1
}

# extras_venv FOLDER BASE CONSTRAINTS PACKAGES...: the environment, made again when what it is made from has changed. With
# `over` as its base it has behind it what .venv has: torch, Spark and others of the same versions are not installed twice;
# with `alone` it has nothing but its own. Python compiles what is imported: most of what lies there never is.
extras_venv() {
    local folder="$1" base="$2" constraints="$3" stamp
    shift 3
    stamp="$(cat pyproject.toml "$constraints" | cksum) $* ${PWD} $base $(<.venv/.stamp)"
    if [[ -x "$folder/bin/python" && -f "$folder/.stamp" && "$(<"$folder/.stamp")" == "$stamp" ]]; then
        return 0
    fi
    rm -rf "$folder"
    .venv/bin/python -m venv --without-pip "$folder" ||
        extras_fail ".venv has no working Python: run make test-extras, which makes it"
    if [[ "$base" == over ]]; then
        printf '%s\n' "$PWD"/.venv/lib/python3.*/site-packages >"$(printf '%s' "$folder"/lib/python3.*/site-packages)/venv.pth"
    fi
    timeout "$extras_timeout_s" .venv/bin/python -P -m pip --python "$folder/bin/python" install -qq \
        --disable-pip-version-check --no-compile \
        -c "$constraints" "$@" >&2 ||
        extras_fail "pip could not install $constraints within ${extras_timeout_s} s: its message is above"
    printf '%s' "$stamp" >"$folder/.stamp"
}

# A browser of the system and the driver that fits it: they are no Python packages.
extras_chromium() {
    local log
    if command -v chromium >/dev/null 2>&1 && command -v chromedriver >/dev/null 2>&1; then
        return 0
    fi
    if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null 2>&1; then
        extras_fail "no chromium and chromedriver on PATH: install them (Debian: apt-get install chromium chromium-driver)"
    fi
    log="$(timeout "$extras_timeout_s" apt-get update -qq 2>&1)" || extras_fail "apt-get update: $log"
    log="$(DEBIAN_FRONTEND=noninteractive timeout "$extras_timeout_s" \
        apt-get install -y -qq --no-install-recommends chromium chromium-driver 2>&1)" ||
        extras_fail "apt-get install chromium chromium-driver: $log"
}

# timed NAME BUDGET_S COMMAND...: runs it and prints its time beside its budget.
timed() {
    local name="$1" budget="$2" begun_s=$SECONDS code=0
    shift 2
    printf '== %s (budget %d s)\n' "$name" "$budget"
    "$@" || code=$?
    printf '== %s: %s in %d s\n' "$name" "$([[ $code == 0 ]] && echo passed || echo "FAILED (exit $code)")" \
        $((SECONDS - begun_s))
    return "$code"
}

# extras_tests FOLDER LIMIT_S PYTEST_ARGUMENTS...: with that environment's Python in driver and executors. A test that was
# skipped has shown nothing, so it fails the step; so does a selection without tests (pytest's exit 5).
extras_tests() {
    local folder="$PWD/$1" limit_s="$2" scratch code=0
    shift 2
    scratch="$(mktemp -d)"
    env -u SPARK_HOME PATH="$folder/bin:$PATH" PYSPARK_PYTHON="$folder/bin/python" \
        PYSPARK_DRIVER_PYTHON="$folder/bin/python" SPARK_CONF_DIR="$PWD/conf" SPARK_LOCAL_IP=127.0.0.1 \
        AIRFLOW_HOME="$scratch/airflow" HF_HUB_OFFLINE=1 \
        timeout "$limit_s" "$folder/bin/python" -m pytest -q -o junit_family=xunit1 --junitxml="$scratch/report.xml" "$@" || code=$?
    if [[ $code == 0 ]] && ! grep -q ' skipped="0"' "$scratch/report.xml"; then
        printf 'skipped tests fail this step: they are listed above\n' >&2
        code=1
    fi
    rm -rf "$scratch"
    return "$code"
}

# all_at_once: the environments and the browser; each is the work of one core.
all_at_once() {
    local job code=0 jobs=()
    extras_venv .venv-extras over .ci/constraints/extras.txt "${extras_packages[@]}" & jobs+=($!)
    {
        extras_venv .venv-airflow alone .ci/constraints/airflow.txt "${airflow_packages[@]}"
        extras_venv .venv-oracles alone .ci/constraints/oracles.txt "${oracle_packages[@]}"
    } & jobs+=($!)
    extras_chromium & jobs+=($!)
    for job in "${jobs[@]}"; do
        wait "$job" || code=$?
    done
    return "$code"
}

timed "environments .venv-extras, .venv-airflow and .venv-oracles, and Chromium" 120 all_at_once
if [[ "${1:-}" != build ]]; then
    timed "tests with the packages beside ours" 180 extras_tests .venv-extras 700 -m extras tests/extras
    # Airflow's Python has neither torch nor Spark: the fixtures of tests/conftest.py stay outside.
    timed "tests with Airflow" 30 extras_tests .venv-airflow 120 -m airflow -W default --confcutdir=tests/airflow tests/airflow
fi
printf '== extras: passed in %d s of %d s\n' $((SECONDS - started_s)) "$budget_s"
