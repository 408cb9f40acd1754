"""The six steps of jobs/pipeline.py as an Airflow DAG (Airflow 3): one task a step, one folder a day.

Put this file into Airflow's DAG folder and set the DAG's params: `project` is a checkout of the project on the machine that
submits, `config` the TOML file in it. A task that is retried goes on where it broke off, because each step says itself
what is done; clearing a task runs it and those after it, and the steps that are done with the same settings return at
once.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, Param

NEEDS = {
    "extract": [],
    "features": ["extract"],
    "train": ["features"],
    "evaluate": ["train"],
    "score": ["evaluate"],
    "publish": ["evaluate"],
}

# Params reach the shell as environment variables and never as text of the command.
COMMAND = 'spark-submit jobs/pipeline.py "$CONFIG" --step {step} --set "output.dir=runs/pipeline/$DAY"'

with DAG(
    dag_id="sparkdeep_pipeline",
    description="extract, features, train, evaluate against a gate, score, publish",
    schedule="@daily",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,  # one run at a time: training takes all slots of its cluster
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5), "execution_timeout": timedelta(hours=6)},
    params={
        "project": Param("/opt/sparkdeep", type="string", description="checkout on the submitting machine"),
        "config": Param("conf/pipeline.toml", type="string", description="the pipeline's TOML file, relative to it"),
    },
    tags=["sparkdeep"],
    doc_md=__doc__,
) as dag:
    tasks = {
        step: BashOperator(
            task_id=step,
            bash_command=COMMAND.format(step=step),
            cwd="{{ params.project }}",
            env={"CONFIG": "{{ params.config }}", "DAY": "{{ ds }}"},
            append_env=True,
        )
        for step in NEEDS
    }
    for step, needs in NEEDS.items():
        for need in needs:
            tasks[need] >> tasks[step]
