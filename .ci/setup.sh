#!/usr/bin/env bash
# Prepares a checkout to run: .venv with the pinned packages, and a Java that Spark can use.
# Source it from the repository's root: it exports what Spark reads, and ends the shell with one line on failure.
# Settings: PYTHON=<interpreter> for .venv; JAVA_HOME; SETUP_TIMEOUT_S (pip and apt-get, each; default 1800).

# torch's default wheel for Linux brings the CUDA libraries; where that is too much, point pip at an index of CPU builds
# (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) before the first run.

readonly setup_timeout_s="${SETUP_TIMEOUT_S:-1800}"
readonly spark_version_range="Java 17 or newer with the module jdk.incubator.vector"

setup_say() { printf '[setup] %s\n' "$*" >&2; }

setup_fail() {
    printf '[setup] error: %s\n' "$*" >&2
    exit 1
}

setup_find_python() {
    local candidate
    # A version manager's shim may exist for a version that is not installed: running it is the only proof.
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        # The real path, because an activated .venv, about to be replaced, may be first on PATH.
        if "$candidate" -c 'import os, sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13): sys.exit(1)
print(os.path.realpath(sys.executable))' 2>/dev/null; then
            return 0
        fi
    done
    return 1
}

setup_venv() {
    local python stamp log
    stamp="$(cat pyproject.toml .ci/constraints/main.txt | cksum) ${PWD}"
    if [[ -x .venv/bin/python && -f .venv/.stamp && "$(<.venv/.stamp)" == "$stamp" ]]; then
        return 0
    fi
    python="$(setup_find_python)" ||
        setup_fail "no Python 3.11, 3.12 or 3.13 on PATH: install one, or name it with PYTHON=/path/to/python3"
    rm -rf .venv
    if ! log="$("$python" -m venv .venv 2>&1)"; then
        rm -rf .venv
        setup_fail "$python -m venv failed (on Debian and Ubuntu install python3-venv): ${log##*$'\n'}"
    fi
    setup_say "installing the pinned packages into .venv with $("$python" --version) (minutes the first time)"
    if ! timeout "$setup_timeout_s" .venv/bin/python -m pip install -qq --disable-pip-version-check \
        -c .ci/constraints/main.txt -e ".[dev,digits,metrics]" >&2; then
        setup_fail "pip could not install .ci/constraints/main.txt within ${setup_timeout_s} s: its message is above"
    fi
    printf '%s' "$stamp" >.venv/.stamp
}

# pyspark 4 starts its JVM with --add-modules=jdk.incubator.vector, which a trimmed runtime may lack.
setup_java_works() {
    local version
    [[ -x "$1/bin/java" ]] || return 1
    version="$("$1/bin/java" -version 2>&1)" || return 1
    [[ "$version" =~ version\ \"([0-9]+) && "${BASH_REMATCH[1]}" -ge 17 ]] || return 1
    [[ "$("$1/bin/java" --list-modules 2>/dev/null)" == *jdk.incubator.vector@* ]]
}

setup_find_java() {
    local candidate on_path=""
    if command -v java >/dev/null 2>&1; then
        on_path="$(readlink -f "$(command -v java)")"
        on_path="${on_path%/bin/java}"
    fi
    for candidate in "${JAVA_HOME:-}" "$on_path" /usr/lib/jvm/*; do
        if [[ -n "$candidate" ]] && setup_java_works "$candidate"; then
            printf '%s' "$candidate"
            return 0
        fi
    done
    return 1
}

setup_install_java() {
    local package
    if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null 2>&1; then
        setup_fail "no $spark_version_range: install a JDK or JRE 17 (Debian: openjdk-17-jre-headless) or set JAVA_HOME"
    fi
    setup_say "installing a Java runtime with apt-get"
    timeout "$setup_timeout_s" apt-get update -qq >&2 || setup_fail "apt-get update failed: its message is above"
    for package in openjdk-17-jre-headless default-jre-headless; do
        # A package that this release does not have is the reason to try the next one.
        if DEBIAN_FRONTEND=noninteractive timeout "$setup_timeout_s" \
            apt-get install -y -qq --no-install-recommends "$package" >/dev/null 2>&1; then
            return 0
        fi
    done
    setup_fail "apt-get has neither openjdk-17-jre-headless nor default-jre-headless: install $spark_version_range"
}

setup_java() {
    local found
    if ! found="$(setup_find_java)"; then
        setup_install_java
        found="$(setup_find_java)" || setup_fail "no $spark_version_range after apt-get: set JAVA_HOME to one"
    fi
    export JAVA_HOME="$found"
}

setup_venv
setup_java
# SPARK_HOME spares Spark's scripts their own search, which breaks in a path with spaces.
SPARK_HOME="$(.venv/bin/python -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("pyspark").origin).parent)')"
export SPARK_HOME
export SPARK_CONF_DIR="$PWD/conf"
export SPARK_LOCAL_IP=127.0.0.1
export PYSPARK_PYTHON="$PWD/.venv/bin/python"
export PYSPARK_DRIVER_PYTHON="$PYSPARK_PYTHON"
export PATH="$PWD/.venv/bin:$JAVA_HOME/bin:$PATH"
