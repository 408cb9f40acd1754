"""The cluster files under conf/ against the schemas of those who read them: Kubernetes and Databricks."""

from __future__ import annotations

import dataclasses
import json

import pytest
from paths import ROOT

pytestmark = pytest.mark.extras

CONF = ROOT / "conf"
TEMPLATES = sorted((CONF / "kubernetes").glob("*.yaml"))
# Of 2025, and of 2026.
KUBERNETES = ("1.33", "1.37")


def pod(path):
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_pod_templates_follow_the_kubernetes_schema(path, version):
    import kubernetes_validate

    template = pod(path)
    (container,) = template["spec"]["containers"]
    container["image"] = "filled in by Spark"
    kubernetes_validate.validate(template, version, strict=True)


@pytest.mark.parametrize("change", [{"restartpolicy": "Never"}, {"restartPolicy": 1}, {"tolerations": {}}], ids=str)
def test_the_schema_refuses_a_wrong_template(change):
    import kubernetes_validate

    template = pod(TEMPLATES[1])
    template["spec"] |= change
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(template, KUBERNETES[0], strict=True)


def test_there_are_two_templates_and_the_executor_asks_for_a_gpu():
    assert [path.name for path in TEMPLATES] == ["driver-pod.yaml", "executor-pod.yaml"]
    assert pod(TEMPLATES[1])["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_databricks_knows_every_field_and_value_of_the_cluster():
    from databricks.sdk.service.compute import ClusterSpec

    cluster = json.loads((CONF / "databricks" / "cluster.json").read_text(encoding="utf-8"))
    assert cluster.keys() <= {field.name for field in dataclasses.fields(ClusterSpec)}
    # An unknown value of an enumeration, or an unknown field below, is lost on the way there and back.
    assert ClusterSpec.from_dict(cluster).as_dict() == cluster
    assert ClusterSpec.from_dict({**cluster, "data_security_mode": "SINGLE"}).as_dict() != cluster
