from __future__ import annotations

import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest
from notebook_cells import DIVIDER, HEADER, read_cells
from paths import JOBS
from pyspark.ml.torch.distributor import TorchDistributor

from sparkdeep import TorchEstimator

pytestmark = pytest.mark.jobs

FOLDER = JOBS / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))

# From the sources of the peers: horovod/spark/torch/estimator.py and sparktorch/torch_distributed.py.
HOROVOD = [
    "num_proc",
    "model",
    "backend",
    "store",
    "optimizer",
    "loss",
    "loss_constructors",
    "metrics",
    "loss_weights",
    "sample_weight_col",
    "gradient_compression",
    "feature_cols",
    "input_shapes",
    "validation",
    "label_cols",
    "callbacks",
    "batch_size",
    "val_batch_size",
    "epochs",
    "verbose",
    "random_seed",
    "shuffle_buffer_size",
    "shuffle",
    "partitions_per_process",
    "run_id",
    "train_minibatch_fn",
    "train_steps_per_epoch",
    "validation_steps_per_epoch",
    "transformation_fn",
    "train_reader_num_workers",
    "val_reader_num_workers",
    "reader_pool_type",
    "label_shapes",
    "inmemory_cache_all",
    "use_gpu",
    "mp_start_method",
]
SPARKTORCH = [
    "inputCol",
    "labelCol",
    "torchObj",
    "iters",
    "predictionCol",
    "partitions",
    "acquireLock",
    "verbose",
    "partitionShuffles",
    "port",
    "useBarrier",
    "useVectorOut",
    "earlyStopPatience",
    "miniBatch",
    "validationPct",
    "mode",
    "device",
    "compileMode",
]


def run(path, spark):
    """Execute the Python cells in order, as a notebook does; returns their names and what they printed."""
    shown = []
    namespace = {
        "__name__": "__main__",
        "spark": spark,
        "display": lambda frame: shown.append(frame.limit(20).collect()),
    }
    printed = io.StringIO()
    for cell in read_cells(path):
        if cell.language == "python":
            # The line number stays the file's, so that a traceback points into the notebook.
            code = compile("\n" * (cell.line - 1) + cell.text, str(path), "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
    return namespace, printed.getvalue(), shown


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in what was printed:\n{text}"
    return float(found[1])


def first_column(name):
    """The backticked names in the first column of a notebook's tables."""
    text = "\n".join(cell.text for cell in read_cells(FOLDER / name) if cell.language == "md")
    return {
        word
        for row in re.findall(r"^\| (`.*?`) \|", text, flags=re.MULTILINE)
        for word in re.findall(r"`([\w.]+)", row)
    }


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # notebooks write to runs/


def test_the_quickstart_learns_the_digits_and_answers_sql(spark):
    names, printed, shown = run(FOLDER / "quickstart_digits.py", spark)
    assert number(r"accuracy ([\d.]+)", printed) >= 0.97
    assert sum(row["rows"] for row in shown[-1]) == names["test"].count()
    assert {row["digit"] for row in shown[-1]} <= set(range(10))


def test_the_tabular_pipeline_searches_saves_and_loads(spark):
    _, printed, _ = run(FOLDER / "tabular_pipeline.py", spark)
    assert number(r"rmse of the held-out rows ([\d.]+)", printed) < 70  # always saying the mean gives about 77
    assert "predicts the same: True" in printed
    assert not spark.catalog.tableExists("sparkdeep_patients")


def test_what_came_from_horovod_trains(spark):
    _, printed, _ = run(FOLDER / "migrate_from_horovod.py", spark)
    assert number(r"([\d.]+)% of the rows are told right", printed) > 95


def test_what_came_from_sparktorch_trains(spark):
    _, printed, _ = run(FOLDER / "migrate_from_sparktorch.py", spark)
    assert number(r"([\d.]+)% of the rows are told right", printed) > 95


def test_what_came_from_torchdistributor_trains(spark):
    _, printed, _ = run(FOLDER / "migrate_from_torchdistributor.py", spark)
    assert number(r"root mean square error ([\d.]+)", printed) < 0.2


def test_every_notebook_has_a_test_above():
    source = Path(__file__).read_text(encoding="utf-8")
    assert NOTEBOOKS
    assert not [path.name for path in NOTEBOOKS if f'"{path.name}", spark' not in source]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_in_the_source_format_and_begin_with_words(path):
    cells = read_cells(path)
    assert cells[0].language == "md"
    assert cells[0].text.startswith("# ")
    assert {cell.language for cell in cells} <= {"md", "pip", "python"}


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("migrate_from_horovod.py", HOROVOD),
        ("migrate_from_sparktorch.py", SPARKTORCH),
        (
            "migrate_from_torchdistributor.py",
            [
                name
                for name in inspect.signature(TorchDistributor.__init__).parameters
                if name not in ("self", "_ssl_conf")
            ],
        ),
    ],
)
def test_every_parameter_of_the_peer_is_in_the_table(name, theirs):
    assert not set(theirs) - first_column(name)


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS if path.name.startswith("migrate")])
def test_what_the_tables_name_of_ours_exists(name):
    text = "\n".join(cell.text for cell in read_cells(FOLDER / name) if cell.language == "md")
    rows = re.findall(r"^\| `[^|]*\| (.*?) \|$", text, flags=re.MULTILINE)
    assert rows
    estimator = {param for param in dir(TorchEstimator) if not param.startswith("_")}
    elsewhere = {"forward", "local", "lr", "model", "torch"}
    named = {word for row in rows for word in re.findall(r"`([a-z]\w+)(?=[`=])", row)}
    assert not named - estimator - elsewhere


def test_the_reader_refuses_what_is_no_notebook(tmp_path):
    (tmp_path / "a.py").write_text("print(1)\n")
    with pytest.raises(ValueError, match="the first line is not"):
        read_cells(tmp_path / "a.py")
    (tmp_path / "b.py").write_text(f"{HEADER}\nprint(1)\n# MAGIC %md\n")
    with pytest.raises(ValueError, match="either Python or magic"):
        read_cells(tmp_path / "b.py")


def test_the_reader_finds_cells_and_their_lines(tmp_path):
    (tmp_path / "a.py").write_text(f"{HEADER}\n# MAGIC %md\n# MAGIC # Words\n\n{DIVIDER}\n\nx = 1\n")
    cells = read_cells(tmp_path / "a.py")
    assert [(cell.language, cell.text.strip(), cell.line) for cell in cells] == [
        ("md", "# Words", 2),
        ("python", "x = 1", 6),
    ]
