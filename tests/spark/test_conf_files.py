"""Spark's own code reads the files under conf/: properties, its registry of settings, pod templates, GPU addresses."""

from __future__ import annotations

import contextlib
import re

import pytest
from paths import ROOT

pytestmark = pytest.mark.spark

CONF = ROOT / "conf"
PROPERTIES = ("standalone", "yarn", "kubernetes")
# Objects whose making registers their settings.
REGISTRIES = (
    "org.apache.spark.internal.config.package$",
    "org.apache.spark.internal.config.Python$",
    "org.apache.spark.deploy.yarn.config.package$",
    "org.apache.spark.deploy.k8s.Config$",
)
# What Spark reads without an entry in its registry: by a pattern of names, or in SparkConf itself.
UNREGISTERED = {
    "spark.master": r"spark://\S+:\d+|yarn|k8s://\S+",
    "spark.executor.resource.gpu.amount": r"\d+",
    "spark.executor.resource.gpu.discoveryScript": r"\S+/gpu_discovery\.sh",
    "spark.executor.resource.gpu.vendor": r"nvidia\.com",
    "spark.task.resource.gpu.amount": r"\d+",
}


class Registry:
    """Spark's settings by name."""

    def __init__(self, jvm):
        self.jvm = jvm
        for name in REGISTRIES:
            jvm.java.lang.Class.forName(name)
        self.entries = scala_object(jvm.org.apache.spark.internal.config, "ConfigEntry")

    def find(self, key):
        return self.entries.findEntry(key)

    def parse(self, key, value):
        """Reads the value as Spark does; raises for what cannot be parsed or is not allowed."""
        properties = self.jvm.java.util.HashMap()
        properties.put(key, value)
        reader = self.jvm.org.apache.spark.internal.config.ConfigReader(properties)
        with contextlib.suppress(
            ValueError
        ):  # py4j cannot hand over a scala.BigDecimal that was parsed (spark.task.cpus)
            self.find(key).readFrom(reader)


def scala_object(package, name):
    return getattr(getattr(package, f"{name}$"), "MODULE$")


@pytest.fixture(scope="module")
def registry(spark):
    return Registry(spark._jvm)


def loaded(spark, path):
    """The properties as spark-submit reads them from a file."""
    read = spark._jvm.org.apache.spark.util.Utils.getPropertiesFromFile(str(path))
    return dict(spark._jvm.scala.collection.JavaConverters.mapAsJavaMap(read))


def with_gpus(tmp_path, name):
    """The file with its lines for GPUs taken in."""
    path = tmp_path / f"{name}.conf"
    path.write_text(re.sub(r"^#(?=spark\.)", "", (CONF / f"{name}.conf").read_text(encoding="utf-8"), flags=re.M))
    return path


@pytest.mark.parametrize("name", PROPERTIES)
def test_spark_knows_every_property_and_parses_its_value(spark, registry, tmp_path, name):
    conf = loaded(spark, with_gpus(tmp_path, name))
    assert len(conf) > 10
    for key, value in conf.items():
        if registry.find(key) is None:
            assert key in UNREGISTERED, f"{name}.conf: Spark knows no {key}"
            assert re.fullmatch(UNREGISTERED[key], value), f"{name}.conf: {key}={value}"
        else:
            registry.parse(key, value)


def test_the_registry_tells_unknown_names_and_bad_values(registry):
    from pyspark.errors import IllegalArgumentException

    assert registry.find("spark.executor.memoryOverHead") is None
    with pytest.raises(IllegalArgumentException, match="TYPE_MISMATCH"):
        registry.parse("spark.executor.memory", "much")
    with pytest.raises(IllegalArgumentException):
        registry.parse("spark.task.cpus", "many")


@pytest.mark.parametrize("name", PROPERTIES)
def test_our_tests_read_the_files_as_spark_does(spark, name):
    from conf_files import properties_of

    assert loaded(spark, CONF / f"{name}.conf") == properties_of(name)


@pytest.mark.parametrize("name", PROPERTIES)
def test_spark_takes_the_resources_together(spark, tmp_path, name):
    """Spark's own check that cores, task cpus and GPUs of an executor go together, and its count of slots."""
    from sparkdeep.spark.doctor.conf_values import slots_per_executor

    for path in (CONF / f"{name}.conf", with_gpus(tmp_path, name)):
        properties = loaded(spark, path)
        conf = spark._jvm.org.apache.spark.SparkConf(False)
        for key, value in properties.items():
            conf.set(key, value)
        profiles = scala_object(spark._jvm.org.apache.spark.resource, "ResourceProfile")
        profiles.clearDefaultProfile()
        try:
            assert profiles.getOrCreateDefaultProfile(conf).maxTasksPerExecutor(conf) == slots_per_executor(properties)
        finally:
            profiles.clearDefaultProfile()


@pytest.mark.parametrize("role", ["driver", "executor"])
def test_spark_reads_the_pod_templates_and_knows_every_field(spark, role):
    text = (CONF / "kubernetes" / f"{role}-pod.yaml").read_text(encoding="utf-8")
    jvm = spark._jvm
    pod_class = jvm.java.lang.Class.forName("io.fabric8.kubernetes.api.model.Pod")
    pod = jvm.io.fabric8.kubernetes.client.utils.KubernetesSerialization().unmarshal(text, pod_class)
    assert [container.getName() for container in pod.getSpec().getContainers()] == [role]
    limits = pod.getSpec().getContainers().get(0).getResources().getLimits()
    assert (dict(limits).get("nvidia.com/gpu") is not None) == (role == "executor")
    for part in (pod, pod.getSpec(), pod.getSpec().getContainers().get(0)):
        assert not dict(part.getAdditionalProperties()), "a field that Kubernetes does not have"


def test_spark_reads_what_gpu_discovery_prints(spark, tmp_path):
    from conf_files import PLAIN, TWO_MIG, discover

    for number, (output, addresses) in enumerate([(PLAIN, 2), (TWO_MIG, 2), ("", 0)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        parsed = spark._jvm.org.apache.spark.resource.ResourceInformation.parseJson(discover(folder, output).stdout)
        assert parsed.name() == "gpu"
        assert len(parsed.addresses()) == addresses
