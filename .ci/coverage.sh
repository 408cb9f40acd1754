#!/usr/bin/env bash
# Line and branch coverage of sparkdeep/ by what a command runs, with the executors and all other processes that it starts:
# .ci/coverage.sh COMMAND..., for instance bash .ci/run. What several commands cover adds up in build/coverage; remove the folder to
# begin anew. Prints the files that are not covered whole, and the sum. Tests take about a third longer under it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder="$PWD/build/coverage"
mkdir -p "$folder"
python -m pip install -q --disable-pip-version-check "coverage>=7.10" >&2
cat >"$folder/settings" <<SETTINGS
[run]
branch = true
parallel = true
concurrency = multiprocessing, thread
patch = _exit, fork
sigterm = true
source_dirs = $PWD/sparkdeep
data_file = $folder/data
dynamic_context = test_function

[report]
exclude_also = if TYPE_CHECKING:
skip_covered = true
SETTINGS
# Every Python that has this environment's packages begins to count when it starts.
started="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sparkdeep-coverage.pth"
trap 'rm -f "$started"' EXIT
printf 'import os; os.environ.get("COVERAGE_PROCESS_START") and __import__("coverage").process_startup()\n' >"$started"

code=0
COVERAGE_PROCESS_START="$folder/settings" "$@" || code=$?
rm -f "$folder/combined"
python -m coverage combine --keep -q --rcfile="$folder/settings" --data-file="$folder/combined" "$folder"/data.*
python -m coverage report --rcfile="$folder/settings" --data-file="$folder/combined"
exit "$code"
