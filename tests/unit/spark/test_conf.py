"""The files under conf/ that clusters read: loaded, consistent, and without a finding of our own doctor."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest
from conf_files import CONF, MIG_NAMES, ONE_MIG, PLAIN, SCRIPT, TWO_MIG, discover, properties_of

from sparkdeep.spark.doctor.conf_checks import check_conf
from sparkdeep.spark.doctor.conf_values import Conf, expected_slots, slots_per_executor

PROPERTIES = ("standalone", "yarn", "kubernetes")


@pytest.mark.parametrize("gpus", [False, True], ids=["as it is", "with its lines for GPUs"])
@pytest.mark.parametrize("name", PROPERTIES)
def test_our_doctor_finds_nothing_to_change(name, gpus):
    conf = properties_of(name, gpus=gpus)
    odd = [finding for finding in check_conf(conf) if finding.level != "ok"]
    assert not odd, "\n".join(map(str, odd))


@pytest.mark.parametrize(
    ("name", "per_executor", "slots"), [("standalone", 2, 8), ("yarn", 2, 8), ("kubernetes", 1, 4)]
)
def test_slots_are_what_the_comments_say(name, per_executor, slots):
    conf = properties_of(name)
    assert slots_per_executor(conf) == per_executor
    assert expected_slots(conf) == slots
    words = {4: "four", 8: "eight"}
    assert f"up to {words[slots]} replicas" in (CONF / f"{name}.conf").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PROPERTIES)
def test_with_gpus_every_slot_has_one_and_none_is_idle(name):
    conf = Conf(properties_of(name, gpus=True))
    gpus = conf.number("spark.executor.resource.gpu.amount", "0")
    assert gpus == conf.slots() * conf.number("spark.task.resource.gpu.amount", "0") > 0


def test_kubernetes_names_files_that_are_there():
    conf = properties_of("kubernetes")
    for role in ("driver", "executor"):
        assert (CONF.parent / conf[f"spark.kubernetes.{role}.podTemplateFile"]).is_file()
    assert conf["spark.executor.resource.gpu.discoveryScript"].endswith("conf/gpu_discovery.sh")
    pod = (CONF / "kubernetes" / "executor-pod.yaml").read_text(encoding="utf-8")
    wanted = f"{conf['spark.executor.resource.gpu.vendor']}/gpu: {conf['spark.executor.resource.gpu.amount']}"
    assert wanted in pod


# The fields of Databricks' POST /api/2.1/clusters/create that the file uses.
CLUSTER_FIELDS = {
    "cluster_name": str,
    "spark_version": str,
    "runtime_engine": str,
    "data_security_mode": str,
    "node_type_id": str,
    "driver_node_type_id": str,
    "num_workers": int,
    "autotermination_minutes": int,
    "spark_conf": dict,
    "init_scripts": list,
    "custom_tags": dict,
}


def test_databricks_cluster_is_fixed_dedicated_and_lts():
    cluster = json.loads((CONF / "databricks" / "cluster.json").read_text(encoding="utf-8"))
    assert {name: type(value) for name, value in cluster.items()} == CLUSTER_FIELDS
    assert re.fullmatch(r"17\.3\.x-(cpu|gpu)-ml-scala2\.13", cluster["spark_version"]), (
        "an LTS runtime for machine learning"
    )
    assert cluster["data_security_mode"] == "SINGLE_USER", "the standard mode has no SparkContext and no GPUs"
    assert cluster["runtime_engine"] == "STANDARD", "Photon"
    assert "autoscale" not in cluster
    assert cluster["num_workers"] >= 1
    conf = cluster["spark_conf"]
    assert all(isinstance(value, str) for value in conf.values())
    assert conf["spark.dynamicAllocation.enabled"] == "false"
    odd = [f for f in check_conf({**conf, "spark.master": "spark://driver:7077"}) if f.level != "ok"]
    assert not odd, "\n".join(map(str, odd))


def test_databricks_init_script_installs_pinned_packages_and_none_of_the_runtime():
    cluster = json.loads((CONF / "databricks" / "cluster.json").read_text(encoding="utf-8"))
    script = (CONF / "databricks" / "install.sh").read_text(encoding="utf-8")
    (destination,) = (one["volumes"]["destination"] for one in cluster["init_scripts"])
    folder = re.search(r"^readonly folder=(\S+)$", script, re.M)[1]
    assert destination == f"{folder}/install.sh"
    (command,) = re.findall(r"^\S*pip install (.*)$", script, re.M)
    assert command.split()[0] == "--no-deps"
    pins = (CONF.parent / ".ci/constraints/main.txt").read_text(encoding="utf-8").splitlines()
    for package in command.split()[1:]:
        assert package in pins or package.endswith('-py3-none-any.whl"'), package
    from sparkdeep import __version__

    assert f"sparkdeep-{__version__}-py3-none-any.whl" in command
    subprocess.run(["bash", "-n", str(CONF / "databricks" / "install.sh")], check=True, timeout=10)


@pytest.mark.parametrize(
    ("output", "environment", "addresses"),
    [
        (PLAIN, {}, ["0", "1"]),
        (ONE_MIG, {}, ["0"]),
        (TWO_MIG, {}, MIG_NAMES),
        ("", {}, []),
        (PLAIN, {"CUDA_VISIBLE_DEVICES": "1"}, ["1"]),
        (PLAIN, {"CUDA_VISIBLE_DEVICES": "1, 0"}, ["1", "0"]),
        (TWO_MIG, {"CUDA_VISIBLE_DEVICES": MIG_NAMES[1]}, [MIG_NAMES[1]]),
        (PLAIN, {"CUDA_VISIBLE_DEVICES": ""}, []),
        (PLAIN, {"CUDA_VISIBLE_DEVICES": "-1"}, []),
    ],
    ids=["two", "one MIG", "two MIG", "driver without", "one visible", "reordered", "MIG visible", "empty", "-1"],
)
def test_gpu_discovery_prints_what_spark_reads(tmp_path, output, environment, addresses):
    ran = discover(tmp_path, output, **environment)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"name": "gpu", "addresses": addresses}
    assert ran.stdout.count("\n") == 1


@pytest.mark.parametrize("output", [PLAIN, ONE_MIG], ids=["plain", "one MIG"])
def test_a_replica_finds_the_device_of_each_address(tmp_path, output):
    from sparkdeep.spark.session.placement import resolve_device

    addresses = json.loads(discover(tmp_path, output).stdout)["addresses"]
    assert [resolve_device("auto", [a], None) for a in addresses] == [f"cuda:{i}" for i in range(len(addresses))]


def test_gpu_discovery_without_nvidia_smi_says_so_and_finds_none(tmp_path):
    ran = discover(tmp_path)
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["addresses"] == []
    assert "nvidia-smi is not on PATH" in ran.stderr


def test_gpu_discovery_fails_with_a_broken_driver(tmp_path):
    ran = discover(tmp_path, "NVIDIA-SMI has failed\n", code=9)
    assert ran.returncode == 9
    assert ran.stdout == ""


@pytest.mark.parametrize("script", [SCRIPT, CONF / "databricks" / "install.sh"], ids=lambda path: path.name)
def test_scripts_are_executable(script):
    assert os.access(script, os.X_OK)
