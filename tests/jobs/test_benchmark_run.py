"""The benchmark as a person runs it, in small: what it writes, not how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pyspark
import pytest
from paths import ROOT

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1100)]

SUBMIT = str(Path(pyspark.__file__).parent / "bin" / "spark-submit")
SECTIONS = ["exchange", "codecs", "coordinator_limit", "memory", "heap"]


def test_the_quick_run_writes_a_table_json_and_plots(tmp_path):
    environment = {
        **os.environ,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_CONF_DIR": str(ROOT / "conf"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [SUBMIT, "--conf", "spark.driver.host=127.0.0.1", "benchmarks/speed.py", "--quick", "--pairs", "2",
         "--only", ",".join(SECTIONS), "--output", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["options"] == {"quick": True, "pairs": 2}
    assert content["about"]["pyspark"] == pyspark.__version__
    sections = {section["name"]: section for section in content["sections"]}
    assert list(sections) == SECTIONS
    for section in sections.values():
        assert section["title"]
        assert section["notes"]
        for one in section["rows"]:
            assert one["name"]
            assert one["unit"]
            assert one["values"]
            assert all(value > 0 for value in one["values"])
            assert all(len(ratio) == len(one["values"]) for ratio in one["ratios"].values())
    by_name = {one["name"]: one for one in sections["exchange"]["rows"]}
    for size in (1, 40):
        for how in ("star", "ring"):
            row = by_name[f"{size} MB x 2, sparkdeep, {how}"]
            assert row["ratios"].keys() == {"gloo all_reduce", "broadcast + collect"}
            assert len(row["values"]) == 2
    # 2 replicas, parameters down and updates up: 4 P and the frames, counted and not timed.
    moved = next(one for one in sections["memory"]["rows"] if one["unit"] == "P, bytes")["values"]
    assert moved == pytest.approx([4.0], rel=1e-3)
    halves = [one["ratios"] for one in sections["codecs"]["rows"] if one["name"] == "bf16" and "MB" in one["unit"]]
    assert [one["identity"][0] for one in halves] == pytest.approx([0.5, 0.5], rel=1e-2)
    assert not sections["heap"]["rows"]
    text = (tmp_path / "benchmark.md").read_text()
    assert all(f"## {section['title']}" in text for section in sections.values())
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == (set(SECTIONS) - {"heap"} if find_spec("matplotlib") else set())


def printed(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def test_every_cable_is_capped_both_ways_and_nothing_is_left_when_it_fails_inside():
    from speed_parts.namespaces import DEVICE, address_of, capped_network, why_not

    if why_not():
        pytest.skip(why_not())
    before = printed("ip", "netns", "list")
    with pytest.raises(LookupError), capped_network(3, 70) as names:  # noqa: PT012 (what is inside is looked at)
        for node, name in enumerate(names):
            assert "tbf" in (own := printed("tc", "-n", name, "qdisc", "show", "dev", DEVICE))
            assert "rate 70Mbit" in own
            assert address_of(node) in printed("ip", "-n", name, "-4", "address", "show", "dev", DEVICE)
        switch = names[0].rpartition("-")[0] + "-switch"
        assert printed("tc", "-n", switch, "qdisc", "show").count("rate 70Mbit") == 3
        raise LookupError
    assert printed("ip", "netns", "list") == before
