#!/usr/bin/env bash
# Runs on every node of the cluster when it starts (init_scripts in cluster.json). Copy it and the wheel to the volume below.
set -euo pipefail

readonly folder=/Volumes/main/default/sparkdeep

# --no-deps: Spark, torch, numpy and pyarrow are the runtime's own, and pip must not put others in front of them.
/databricks/python/bin/pip install --no-deps safetensors==0.8.0 "$folder/sparkdeep-0.1.0-py3-none-any.whl"
# A module that the runtime lacks is named now, not by the first fit.
/databricks/python/bin/python -c 'import cloudpickle, jinja2, numpy, pyarrow, safetensors, torch, tqdm, sparkdeep'
