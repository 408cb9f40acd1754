"""The example DAG, parsed by Airflow itself."""

from __future__ import annotations

import os
import subprocess

import pytest
from paths import ROOT

pytestmark = pytest.mark.airflow

FOLDER = ROOT / "jobs/airflow"


@pytest.fixture(scope="module")
def dag():
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(dag_folder=str(FOLDER))
    assert not bag.import_errors, bag.import_errors
    assert set(bag.dags) == {"sparkdeep_pipeline"}
    return bag.dags["sparkdeep_pipeline"]


def test_every_step_is_a_task_after_those_it_needs(dag):
    upstream = {task.task_id: task.upstream_task_ids for task in dag.tasks}
    assert upstream == {
        "extract": set(),
        "features": {"extract"},
        "train": {"features"},
        "evaluate": {"train"},
        "score": {"evaluate"},
        "publish": {"evaluate"},
    }
    assert [task.task_id for task in dag.topological_sort()][:4] == ["extract", "features", "train", "evaluate"]


def test_one_run_at_a_time_with_retries_and_a_time_limit(dag):
    assert dag.max_active_runs == 1
    assert not dag.catchup
    for task in dag.tasks:
        assert task.retries == 2
        assert task.execution_timeout.total_seconds() > 0


def test_the_commands_run_in_a_shell_as_they_stand(dag, tmp_path):
    """spark-submit is replaced by a script that shows its arguments: quoting, environment and folder are the shell's."""
    fake = tmp_path / "bin/spark-submit"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "[%s]" "$PWD" "$@"\n')
    fake.chmod(0o755)
    for task in dag.tasks:
        assert task.cwd == "{{ params.project }}"
        assert set(task.env) == {"CONFIG", "DAY"}
        environment = {
            **os.environ,
            "PATH": f"{fake.parent}:{os.environ['PATH']}",
            "CONFIG": "a b.toml",
            "DAY": "2026-01-02",
        }
        done = subprocess.run(
            ["bash", "-c", task.bash_command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        shown = [
            tmp_path,
            "jobs/pipeline.py",
            "a b.toml",
            "--step",
            task.task_id,
            "--set",
            "output.dir=runs/pipeline/2026-01-02",
        ]
        assert done.stdout == "".join(f"[{word}]" for word in shown)
