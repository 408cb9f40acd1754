"""The doctor without Spark: properties that break a fit, what tasks saw, the report, and the command's arguments."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from sparkdeep.cli import main
from sparkdeep.errors import ConfigError
from sparkdeep.spark.doctor.conf_checks import KEYS, check_conf
from sparkdeep.spark.doctor.conf_values import MIB, Conf, expected_slots, memory_bytes, slots_per_executor
from sparkdeep.spark.doctor.executor_checks import LocalDir, Sight, check_sights, sight_from_json, sight_to_json
from sparkdeep.spark.doctor.findings import Finding, Report

GIB = 1 << 30
YARN = {
    "spark.master": "yarn",
    "spark.executor.instances": "4",
    "spark.executor.cores": "4",
    "spark.task.cpus": "2",
    "spark.executor.memory": "2g",
    "spark.executor.memoryOverhead": "4g",
    "spark.driver.host": "driver.example.com",
    "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "2s",
}
GPU = {
    "spark.executor.resource.gpu.amount": "2",
    "spark.task.resource.gpu.amount": "1",
    "spark.executor.resource.gpu.discoveryScript": "./gpu_discovery.sh",
}


def the(findings, name):
    (found,) = (finding for finding in findings if finding.name == name)
    return found


def test_good_properties_have_no_finding():
    for conf in (
        YARN,
        YARN | GPU,
        {"spark.master": "local[2]"},
        {"spark.master": "local[*]", "spark.driver.host": "x"},
    ):
        odd = [finding for finding in check_conf(conf) if finding.level != "ok"]
        assert not odd, "\n".join(map(str, odd))


@pytest.mark.parametrize(
    ("broken", "name", "level", "change"),
    [
        (
            {"spark.dynamicAllocation.enabled": "true"},
            "dynamic allocation",
            "fail",
            "spark.dynamicAllocation.enabled=false",
        ),
        ({"spark.dynamicAllocation.enabled": "TRUE "}, "dynamic allocation", "fail", "spark.executor.instances"),
        ({"spark.python.worker.killOnIdleTimeout": "true"}, "Python workers", "fail", "killOnIdleTimeout=false"),
        (
            {"spark.sql.execution.pyspark.udf.killOnIdleTimeout": "true"},
            "Python workers",
            "fail",
            "pyspark.udf.killOnIdleTimeout=false",
        ),
        ({"spark.python.worker.reuse": "false"}, "Python workers", "warn", "spark.python.worker.reuse=true"),
        ({"spark.executor.memoryOverhead": "900m"}, "memory overhead", "fail", "spark.executor.memoryOverhead=1792m"),
        ({"spark.executor.memoryOverhead": "1200"}, "memory overhead", "warn", "spark.executor.memoryOverhead=1792m"),
        ({"spark.executor.memoryOverhead": "much"}, "memory overhead", "fail", "correct the property"),
        ({"spark.executor.pyspark.memory": "2g"}, "Python memory limit", "warn", "unset spark.executor.pyspark.memory"),
        ({**GPU, "spark.executor.pyspark.memory": "2g"}, "Python memory limit", "fail", "unset"),
        ({"spark.task.cpus": "8"}, "cores", "fail", "spark.executor.cores=8"),
        ({"spark.task.cpus": "3"}, "cores", "warn", "a multiple of spark.task.cpus"),
        ({"spark.task.cpus": "0"}, "cores", "fail", "correct"),
        ({"spark.executor.cores": "four"}, "cores", "fail", "correct"),
        (
            {**GPU, "spark.executor.resource.gpu.amount": "0"},
            "GPU scheduling",
            "fail",
            "executor.resource.gpu.amount=1",
        ),
        ({**GPU, "spark.task.resource.gpu.amount": "2"}, "GPU scheduling", "fail", "task.resource.gpu.amount=1"),
        ({**GPU, "spark.task.resource.gpu.amount": "0"}, "GPU scheduling", "warn", "task.resource.gpu.amount=1"),
        ({**GPU, "spark.task.resource.gpu.amount": "0.1"}, "GPU scheduling", "warn", "of its own"),
        ({**GPU, "spark.executor.resource.gpu.amount": "4"}, "GPU scheduling", "warn", "spark.executor.cores=8"),
        (
            {key: value for key, value in GPU.items() if "Script" not in key},
            "GPU scheduling",
            "fail",
            "conf/gpu_discovery.sh",
        ),
        ({"spark.plugins": "com.nvidia.spark.SQLPlugin"}, "native engine", "warn", "spark.plugins"),
        ({"spark.plugins": "a.B,org.apache.gluten.GlutenPlugin"}, "native engine", "warn", "spark.plugins"),
        (
            {"spark.sql.extensions": "org.apache.comet.CometSparkSessionExtensions"},
            "native engine",
            "warn",
            "spark.sql.extensions",
        ),
        ({"spark.io.encryption.enabled": "true"}, "encryption", "fail", "encrypted_disks=True"),
        ({"spark.locality.wait.legacyResetOnTaskLaunch": "true"}, "barrier settings", "fail", "unset"),
        ({"spark.driver.host": "localhost"}, "driver address", "fail", "spark.driver.host"),
        ({"spark.driver.host": "127.0.1.1"}, "driver address", "fail", "spark.driver.host"),
        ({"spark.kubernetes.local.dirs.tmpfs": "true"}, "tmpfs", "warn", "memoryOverhead"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_broken_property_is_found_with_what_to_change(broken, name, level, change):
    findings = check_conf(YARN | broken)
    found = the(findings, name)
    assert found.level == level
    assert change in found.change
    assert the(check_conf(YARN), name).level == "ok"


@pytest.mark.parametrize("key", ["spark.network.crypto.enabled", "spark.ssl.enabled", "spark.ssl.rpc.enabled"])
def test_what_spark_encrypts_on_the_network_a_fit_encrypts_too(key):
    plain, encrypted = (the(check_conf(YARN | extra), "encryption") for extra in ({}, {key: "true"}))
    assert plain.level == encrypted.level == "ok"
    assert "tls=True" in plain.seen
    assert f"{key}=true: the coordinator's port speaks TLS 1.3 too" in encrypted.seen
    both = the(check_conf(YARN | {key: "true", "spark.io.encryption.enabled": "true"}), "encryption")
    assert both.level == "fail"


def test_the_default_interval_of_slot_checks_is_worth_a_word_on_clusters_only():
    key = "spark.scheduler.barrier.maxConcurrentTasksCheck.interval"
    without = {name: value for name, value in YARN.items() if name != key}
    assert the(check_conf(without), "barrier settings").change == f"set {key}=2s."
    assert the(check_conf({"spark.master": "local[2]"}), "barrier settings").level == "ok"


def test_memory_overhead_counts_as_spark_does():
    def seen(**changes):
        conf = {k: v for k, v in YARN.items() if k != "spark.executor.memoryOverhead"}
        return the(check_conf(conf | {k.replace("_", "."): v for k, v in changes.items()}), "memory overhead").seen

    assert seen().startswith("384 MiB beside the heap of 2,048 MiB, for 2 Python worker(s)")
    assert seen(spark_executor_memory="8g").startswith("819 MiB beside the heap of 8,192 MiB")
    assert seen(spark_executor_memoryOverheadFactor="0.4").startswith("819 MiB")
    assert seen(spark_kubernetes_memoryOverheadFactor="0.4").startswith("819 MiB")
    assert seen(spark_executor_minMemoryOverhead="1g").startswith("1,024 MiB")
    assert seen(spark_executor_pyspark_memory="1g").startswith("1,408 MiB")


def test_memory_overhead_uses_what_was_measured():
    conf = YARN | {"spark.executor.memoryOverhead": "1792m"}
    assert the(check_conf(conf, worker_bytes=350 * MIB), "memory overhead").level == "ok"
    found = the(check_conf(conf, worker_bytes=800 * MIB), "memory overhead")
    assert found.level == "fail"
    assert "each 800 MiB" in found.seen
    assert "spark.executor.memoryOverhead=3584m" in found.change


def test_a_loopback_driver_is_right_for_a_loopback_cluster():
    conf = YARN | {"spark.driver.host": "127.0.0.1"}
    assert the(check_conf(conf | {"spark.master": "spark://127.0.0.1:7077"}), "driver address").level == "ok"
    assert the(check_conf(conf | {"spark.master": "spark://master:7077"}), "driver address").level == "fail"


def test_what_connect_hides_is_unknown_and_not_judged_by_defaults():
    findings = check_conf({"spark.driver.host": "x", "spark.dynamicAllocation.enabled": "true"}, complete=False)
    assert the(findings, "dynamic allocation").level == "fail"
    hidden = the(findings, "Spark's settings")
    assert hidden.level == "unknown"
    assert "memory overhead" in hidden.seen
    assert "dynamic allocation" not in hidden.seen
    assert {"spark.executor.memoryOverheadFactor", "spark.dynamicAllocation.enabled"} < set(KEYS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4g", 4 * GIB), ("512m", 512 * MIB), ("512", 512), ("1GB", GIB), ("2 k", 2048), ("7b", 7), ("0", 0)],
)
def test_sizes(text, expected):
    assert memory_bytes("key", text) == expected


@pytest.mark.parametrize("text", ["", "g", "-1g", "1.5g", "1x"])
def test_a_size_that_is_none_is_named(text):
    with pytest.raises(ConfigError, match=r"spark\.some\.memory=.*must be a size"):
        memory_bytes("spark.some.memory", text)


def test_slots_by_cores_and_by_gpus():
    assert slots_per_executor(YARN) == 2
    assert slots_per_executor(YARN | GPU | {"spark.executor.resource.gpu.amount": "1"}) == 1
    # 1 / 0.1 tasks share a GPU: ten, and not nine by rounding.
    shared = GPU | {"spark.executor.cores": "40", "spark.task.cpus": "1", "spark.task.resource.gpu.amount": "0.1"}
    assert slots_per_executor(YARN | shared) == 20
    assert slots_per_executor(YARN | {"spark.task.cpus": "0.5"}) == 8
    assert expected_slots(YARN) == 8
    assert expected_slots({"spark.master": "local[4]"}) is None
    assert expected_slots({"spark.master": "yarn"}) is None
    standalone = {"spark.master": "spark://m:7077", "spark.executor.cores": "4", "spark.cores.max": "10"}
    assert expected_slots(standalone) == 8
    assert not Conf(standalone).contained


VERSIONS = {
    "python": "3.11",
    "torch": "2.13.0+cpu",
    "sparkdeep": "0.1.0",
    "numpy": "2.4",
    "pyarrow": "26",
    "pyspark": "4.3",
}


def sight(**changes):
    return Sight(
        **{
            "task": 0,
            "host": "a",
            "executor": "/tmp/x",
            "barrier": True,
            "cpus": 1,
            "versions": VERSIONS,
            "gpus": [],
            "cuda_devices": 0,
            "device": "cpu",
            "device_problem": "",
            "dial_s": 0.01,
            "dial_problem": "",
            "resident_bytes": 300 * MIB,
            "address_limit_bytes": None,
            "local_dirs": [LocalDir(path="/tmp/x", free_bytes=100 * GIB, kind="ext4")],
            **changes,
        }
    )


def test_a_sight_survives_its_journey():
    before = sight(address_limit_bytes=7, gpus=["0", "1"])
    assert sight_from_json(sight_to_json(before)) == before


def test_nothing_is_found_where_nothing_is_wrong():
    driver = VERSIONS | {"torch": "2.13.0+cu128"}  # another build of the same release
    findings = check_sights([sight(), sight(host="b", executor="/tmp/y")], driver)
    assert {finding.level for finding in findings} == {"ok"}
    assert "2 executor(s)" in the(findings, "versions").seen


@pytest.mark.parametrize(
    ("changes", "name", "level", "seen"),
    [
        (
            {"versions": VERSIONS | {"torch": "2.12.1"}},
            "versions",
            "fail",
            "torch 2.12.1 on b, 2.13.0+cpu on the driver",
        ),
        ({"versions": {"python": "3.11"}}, "versions", "fail", "torch missing on b"),
        ({"versions": VERSIONS | {"pyarrow": "14"}}, "versions", "warn", "pyarrow 14 on b, 26 on the driver"),
        ({"device": "", "device_problem": "two GPUs"}, "GPUs", "fail", "b: two GPUs"),
        ({"gpus": ["0"], "device": "cuda:0"}, "GPUs", "fail", "cuda:0 on b"),
        ({"gpus": ["1"], "device": "cuda:1", "cuda_devices": 1}, "GPUs", "fail", "sees 1 CUDA device(s)"),
        ({"cuda_devices": 8}, "GPUs", "warn", "torch sees 8 CUDA device(s) on b, but Spark gave the task none"),
        ({"gpus": ["1"], "device": "cuda:1", "cuda_devices": 2}, "GPUs", "ok", "b cuda:1"),
        ({"dial_s": None, "dial_problem": "no connection to d:1"}, "driver's port", "fail", "b: no connection to d:1"),
        ({"address_limit_bytes": 2 * GIB}, "address space", "warn", "RLIMIT_AS=2.0 GiB"),
        (
            {"local_dirs": [LocalDir(path="/s", free_bytes=20 * GIB, kind="tmpfs")]},
            "local directories",
            "warn",
            "on b it is memory",
        ),
        (
            {"local_dirs": [LocalDir(path="/s", free_bytes=5 * GIB, kind="xfs")]},
            "local directories",
            "warn",
            "5.0 GiB free",
        ),
        (
            {"local_dirs": [LocalDir(path="/s", free_bytes=MIB, kind="xfs")]},
            "local directories",
            "fail",
            "0.0 GiB free",
        ),
    ],
)
def test_one_bad_host_among_good_ones_is_named(changes, name, level, seen):
    findings = check_sights([sight(), sight(host="b", executor="/tmp/y", **changes)], VERSIONS)
    found = the(findings, name)
    assert found.level == level
    assert seen in found.seen
    assert bool(found.change) == (level != "ok")


def test_the_roomiest_directory_counts_since_a_shard_goes_there():
    dirs = [LocalDir(path="/a", free_bytes=MIB, kind="tmpfs"), LocalDir(path="/b", free_bytes=50 * GIB, kind="ext4")]
    assert the(check_sights([sight(local_dirs=dirs)], VERSIONS), "local directories").level == "ok"


def test_unknown_local_directories_are_unknown():
    assert the(check_sights([sight(local_dirs=[])], VERSIONS), "local directories").level == "unknown"


def test_tasks_that_did_not_dial_say_nothing_about_the_port():
    findings = check_sights([sight(dial_s=None)], VERSIONS)
    assert "driver's port" not in {finding.name for finding in findings}


def test_a_report_is_ok_unless_something_fails():
    def report(*levels):
        findings = tuple(Finding(name=f"n{i}", level=level, seen="s") for i, level in enumerate(levels))
        return Report(session="Spark x", findings=findings, seconds=1.25)

    assert report("ok", "warn", "unknown").ok
    assert not report("ok", "fail").ok
    assert [finding.name for finding in report("ok", "fail", "warn").of("fail", "warn")] == ["n1", "n2"]
    text = str(report("ok", "warn", "fail", "unknown"))
    assert text.splitlines()[0] == "sparkdeep doctor: Spark x"
    assert text.splitlines()[-1] == (
        "sparkdeep cannot train here: 1 ok, 1 to look at, 1 failed, 1 unknown; looked for 1.2 s."
    )
    assert str(report("ok")).endswith("sparkdeep can train here: 1 ok; looked for 1.2 s.")


def test_a_finding_prints_its_change_below_and_keeps_long_properties_whole():
    long = "spark.scheduler.barrier.maxConcurrentTasksCheck.interval=2s"
    lines = str(Finding(name="n", level="fail", seen="seen " * 40, change=f"{'set ' * 20}{long}")).splitlines()
    assert lines[0].startswith("FAIL  n: seen")
    assert max(map(len, lines)) <= 118
    assert any(line.startswith("      change: ") for line in lines)
    assert any(long in line for line in lines)


def test_findings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Finding(name="n", level="ok", seen="s").level = "fail"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["cure"],
        ["doctor", "--master"],
        ["doctor", "--conf", "novalue"],
        ["doctor", "--num-workers", "0"],
        ["doctor", "--timeout", "-1"],
        ["doctor", "--master", "local[2]", "--remote", "sc://host"],
        ["doctor", "--cluster", "x"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: sparkdeep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--coordinator-port", "99999"], "must be a port from 1 to 65535"),
        (["--properties-file", "no/such.conf"], "there is no such file"),
    ],
)
def test_wrong_values_end_with_2_before_a_session_starts(arguments, says, capsys):
    assert main(["doctor", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_help_needs_no_spark():
    code = "import sys; from sparkdeep.cli import main\ntry: main(['doctor', '--help'])\nfinally: assert 'pyspark' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "--properties-file" in ran.stdout
