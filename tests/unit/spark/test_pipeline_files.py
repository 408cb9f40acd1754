"""What schedulers are given says the same as jobs/pipeline.py: its steps, their order, its options."""

from __future__ import annotations

import ast
import json
import sys

import pytest
from paths import ROOT

from sparkdeep.spark.job.config import load_config
from sparkdeep.spark.job.run import Job

sys.path.append(str(ROOT / "jobs"))

import pipeline


@pytest.fixture
def needs(tmp_path):
    config = load_config(ROOT / "conf/pipeline.toml", [f"output.dir='{tmp_path}'"])
    steps = pipeline.steps_of(Job(config=config))
    return {name: list(steps.needs(name)) for name in steps.names}


def test_the_parser_offers_the_steps(needs):
    import argparse

    parser = argparse.ArgumentParser()
    pipeline.options(parser)
    assert all(parser.parse_args(["--step", name]).step == name for name in needs)
    with pytest.raises(SystemExit):
        parser.parse_args(["--step", "deploy"])


def test_the_databricks_job_runs_every_step_after_those_it_needs(needs):
    job = json.loads((ROOT / "conf/databricks/job.json").read_text())
    told = {task["task_key"]: [one["task_key"] for one in task.get("depends_on", [])] for task in job["tasks"]}
    assert told == needs
    clusters = {one["job_cluster_key"]: one["new_cluster"] for one in job["job_clusters"]}
    parameters = {f"{{{{job.parameters.{one['name']}}}}}" for one in job["parameters"]}
    for task in job["tasks"]:
        cluster = clusters[task["job_cluster_key"]]
        assert "num_workers" in cluster, "a fixed number of workers: barrier stages know no autoscaling"
        dedicated = json.loads((ROOT / "conf/databricks/cluster.json").read_text())
        for setting in ("spark_conf", "init_scripts", "data_security_mode", "runtime_engine"):
            assert cluster[setting] == dedicated[setting]
        run = task["spark_python_task"]
        assert (ROOT / run["python_file"]).is_file()
        assert run["parameters"][1:3] == ["--step", task["task_key"]]
        named = {word for text in run["parameters"] for word in parameters if word in text}
        assert named == parameters


def test_the_airflow_dag_names_the_same_steps(needs):
    tree = ast.parse((ROOT / "jobs/airflow/sparkdeep_pipeline.py").read_text())
    [told] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "NEEDS"
    ]
    assert told == needs


def test_changed_settings_touch_the_steps_that_use_them(tmp_path):
    def prints(*overrides):
        config = load_config(ROOT / "conf/pipeline.toml", [f"output.dir='{tmp_path}'", *overrides])
        steps = pipeline.steps_of(Job(config=config))
        return {name: steps.fingerprint(name) for name in steps.names}

    def changed(*overrides):
        after = prints(*overrides)
        return [name for name, value in prints().items() if after[name] != value]

    assert changed() == []
    assert changed("data.seed=1") == ["extract", "features", "train", "evaluate", "score", "publish"]
    assert changed("fit.epochs=3") == ["train", "evaluate", "score", "publish"]
    assert changed("pipeline.gate.rmse=1.0") == ["evaluate", "score", "publish"]
    assert changed("pipeline.score='x'") == ["score"]
    assert changed("pipeline.publish='x'") == ["publish"]
    assert changed("spark.master='local[4]'") == []
