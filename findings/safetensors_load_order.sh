#!/usr/bin/env bash
# safetensors 0.8.0, numpy 2.4: the dict that load() makes of bytes is in another order at each call.
#
# Expected: the order in which the tensors lie in the file (save() sorts them by the size of their dtype and by name), the same at
#   every call, as load_file() gives it: dicts keep their order, and a file has one.
# Seen: load(save(tensors)) lists six names in an order that differs from call to call in one process; load_file() keeps one order.
# Why it matters: sums over load(...).values(), messages that name the first few tensors, and "first" rules differ from run to run.
# Source: safetensors/src/tensor.rs of the safetensors repository, SafeTensors::tensors(): it walks a HashMap from name to place, whose
#   order is random in Rust, and load() makes its dict in that order; load_file() asks for the names in the order of the file.
# Run it: bash findings/safetensors_load_order.sh (some 20 s and 25 MB for the packages). It fails once the order is kept.
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --disable-pip-version-check --target "$folder/packages" safetensors==0.8.0 numpy==2.4.0
cat >"$folder/run.py" <<'PYTHON'
import os
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, load_file, save

data = save({f"layer.{i}": np.zeros(1, np.float32) for i in range(6)})
path = os.path.join(sys.argv[1], "file.safetensors")
with open(path, "wb") as file:
    file.write(data)
in_memory = {tuple(load(data)) for _ in range(20)}
from_file = {tuple(load_file(path)) for _ in range(20)}
print(f"safetensors {safetensors.__version__}: load() gave {len(in_memory)} orders in 20 calls, load_file() {len(from_file)}")
for order in sorted(in_memory)[:3]:
    print("  load():     ", *order)
for order in from_file:
    print("  load_file():", *order)
sys.exit(0 if len(in_memory) > 1 and len(from_file) == 1 else 1)
PYTHON
PYTHONPATH="$folder/packages" python3 "$folder/run.py" "$folder" || {
    echo "the behaviour has changed: load() keeps one order" >&2
    exit 1
}
