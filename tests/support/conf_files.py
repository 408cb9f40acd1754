"""The files under conf/ as tests read them, and its GPU discovery script with a made-up nvidia-smi."""

from __future__ import annotations

import os
import subprocess

from paths import ROOT

CONF = ROOT / "conf"
SCRIPT = CONF / "gpu_discovery.sh"


def properties_of(name, *, gpus=False):
    """The properties of a file; with `gpus`, also the lines that are commented out as '#spark...'."""
    found = {}
    for line in (CONF / f"{name}.conf").read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#") if gpus and line.startswith("#spark.") else line
        if not text.startswith("#") and text.strip():
            key, value = text.split(None, 1)
            assert key not in found, f"{name}.conf sets {key} twice"
            found[key] = value.strip()
    return found


PLAIN = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c1f0a4e-0001-0000-0000-000000000000)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-5c1f0a4e-0002-0000-0000-000000000000)
"""
ONE_MIG = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c1f0a4e-0001-0000-0000-000000000000)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaaaaaa-0001-5000-8000-000000000000)
"""
TWO_MIG = ONE_MIG + "  MIG 2g.10gb     Device  1: (UUID: MIG-bbbbbbbb-0002-5000-8000-000000000000)\n"
MIG_NAMES = ["MIG-aaaaaaaa-0001-5000-8000-000000000000", "MIG-bbbbbbbb-0002-5000-8000-000000000000"]


def discover(tmp_path, output=None, *, code=0, **environment):
    """Runs the script with a made-up nvidia-smi that prints `output`, or with none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "sed", "cat"):
        (folder / tool).symlink_to(f"/bin/{tool}")
    if output is not None:
        (tmp_path / "devices").write_text(output)
        tool = folder / "nvidia-smi"
        tool.write_text(f'#!/bin/bash\n[[ "$*" == -L ]] || exit 9\ncat "{tmp_path}/devices"\nexit {code}\n')
        tool.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    return subprocess.run(
        [str(SCRIPT)], env={**env, "PATH": str(folder), **environment}, capture_output=True, text=True, timeout=10
    )
