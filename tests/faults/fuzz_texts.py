"""Targets that a user types: Spark properties, a job's TOML file and its overrides, ports, places."""

from __future__ import annotations

import contextlib
import json
import re
from functools import partial
from pathlib import Path

from fuzzing import Target
from mutating import NUMBERS, TEXTS, json_text, mutate_bytes, mutate_json, mutate_text
from paths import ROOT

from sparkdeep.errors import SparkdeepError
from sparkdeep.spark.doctor.conf_values import Conf, expected_slots, memory_bytes, slots_per_executor
from sparkdeep.spark.job.config import load_config, parse_config
from sparkdeep.stages.coordinator import parse_ports
from sparkdeep.storage.opening import open_store
from sparkdeep.storage.store import check_name

PROPERTIES = {
    "spark.master": "spark://h:7077",
    "spark.executor.cores": "4",
    "spark.task.cpus": "0.5",
    "spark.cores.max": "8",
    "spark.executor.instances": "2",
    "spark.task.resource.gpu.amount": "0.25",
    "spark.executor.resource.gpu.amount": "1",
    "spark.executor.memory": "4g",
    "spark.driver.maxResultSize": "1024",
    "spark.shuffle.service.enabled": "true",
}


def read_properties(conf):
    """Each property by each of the readers."""
    done = []
    readers = [slots_per_executor, expected_slots, lambda c: Conf(c).task_cpus()]
    readers += [lambda c, k=k: Conf(c).memory(k, "1g") for k in PROPERTIES]
    readers += [lambda c, k=k: Conf(c).number(k, "1") for k in PROPERTIES]
    readers += [lambda c, k=k: memory_bytes(k, c.get(k, "1")) for k in PROPERTIES]
    for reader in readers:
        try:
            done.append(reader(conf))
        except SparkdeepError:
            done.append(None)
    Conf(conf).true("spark.shuffle.service.enabled")
    if any(isinstance(one, int | float) and one < 0 for one in done):
        raise AssertionError(f"a negative amount was read: {done}")


def mutate_properties(rng, conf):
    """One or two values changed, to texts or to numbers near the ends of what a float holds."""
    conf = dict(conf)
    for _ in range(rng.choice((1, 2))):
        key = rng.choice(list(conf))
        small = ["1e308", "1e-308", "5e-324", "9" * 5000, "1_0", "0", "-0", "4G", "4 gb", "1.5g", "٣g", "K"]
        choices = [mutate_text(rng, conf[key]), str(rng.choice(NUMBERS)), rng.choice(small)]
        conf[key] = rng.choice(choices)
    if rng.random() < 0.3:
        conf["spark.master"] = rng.choice(("local", "local[2]", "yarn", "k8s://x", "local[*]", *TEXTS))
    return conf


def read_job(folder, given):
    """A job's file with its overrides."""
    path = folder / "job.toml"
    path.write_bytes(given["file"])
    load_config(path, given["set"])


TOML_VALUES = [
    *["0", "-1", "9" * 5000, "1e400", "nan", "inf", "[]", "{}", '""', "true", "2021-02-30", "1979-05-27T07:32:00Z"],
    *["[" * 500 + "]" * 500, "[" * 30_000, "{a=" * 500 + "1" + "}" * 500, "0x" + "f" * 9000, '"\\ud800"', "1_0", "'x"],
    '"' + "x" * 9000 + '"',
]
KEYS = ["fit.epochs", "data.seed", "#", "a.b", "", " ", "fit", ".".join("a" * 3000), "'a.b'", '"a"."b"', "[x]", "a\r"]


def mutate_job(rng, given):
    """A value of the file, a line, its bytes, or an override changed."""
    data, overrides = given["file"], list(given["set"])
    match rng.randrange(6):
        case 0:
            data = mutate_bytes(rng, data)
        case 1 | 2:
            lines = data.decode().splitlines()
            at = rng.choice([i for i, line in enumerate(lines) if "=" in line])
            lines[at] = f"{lines[at].partition('=')[0]}= {rng.choice(TOML_VALUES)}"
            data = "\n".join(lines).encode("utf-8", "surrogatepass")
        case 3:
            section = rng.choice(("spark", "pipeline", "data.options", "model.args", ".".join("a" * 4000), "fit"))
            data += f"\n[{section}]\n{rng.choice(KEYS[:4])} = {rng.choice(TOML_VALUES)}\n".encode()
        case 4:
            overrides.append(mutate_text(rng, rng.choice(("fit.epochs=5", "data.seed=1", "model.args.hidden=[1]"))))
        case _:
            overrides.append(f"{rng.choice(KEYS)}={rng.choice([*TOML_VALUES, 'word', '# x'])}")
    return {"file": data, "set": overrides}


def job_cases(file):
    """Files and overrides that a parser of TOML takes, or chokes on."""
    deep = ".".join("a" * 4000)
    texts = [b"a = " + b"9" * 5000, b"a = " + b"[" * 30_000, f"[{deep}]\nx = 1".encode(), b"a = 0x" + b"f" * 9000]
    overrides = ["#=1", f"{deep}=1", "a=" + "[" * 30_000, "fit.epochs=0x" + "f" * 9000]
    return [*({"file": text, "set": []} for text in texts), *({"file": file, "set": [one]} for one in overrides)]


def read_document(data):
    """A document that TOML gave, whatever types stand in it."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(document, dict):
        parse_config(document, Path("job.toml"))


def document():
    """As `conf/digits.toml`, with the sections that it lacks."""
    return {
        "data": {"source": "parquet", "path": "x", "options": {"a": 1}, "columns": ["a"], "test": 0.2, "seed": 0},
        "model": {"factory": "a:b", "args": {"n": 1}},
        "loss": {"name": "a:b"},
        "optimizer": {"name": "a:b", "args": {"lr": 0.1}},
        "fit": {"epochs": 1},
        "metrics": ["accuracy"],
        "output": {"dir": "runs"},
        "pipeline": {"features": {"name": "a:b"}, "gate": {"accuracy": 0.5}, "publish": "p", "score": "s"},
        "spark": {"master": "local", "spark.a": 1, "spark": {"b": True}},
    }


def mutate_document(rng, data):
    """JSON stands for TOML here, as only types matter."""
    return json_text(mutate_json(rng, json.loads(data)))


# What pyarrow would look up in a network or start a JVM for is not asked: no port outside this machine is dialed.
_REMOTE = re.compile(r"\s*(s3|s3a|gs|gcs|hdfs|viewfs|abfs|abfss|wasb|wasbs|http|https|az)\s*:", re.IGNORECASE)


def read_place(uri):
    """A folder's URI, and a name in it."""
    if not _REMOTE.match(uri):
        open_store(uri)
    with contextlib.suppress(SparkdeepError):
        check_name(uri)


def read_ports(text):
    """A port, or a range of them, as text and as what a program might give."""
    parse_ports(text)


PORT_VALUES = [*NUMBERS, *TEXTS, None, True, (1, 2), (2, 1), [1, "2"], (1,), {"a": 1}, ("1", "2"), (10**400, 1)]


def mutate_ports(rng, text):
    """Texts, and values of other types."""
    return rng.choice(PORT_VALUES) if rng.random() < 0.3 else mutate_text(rng, text)


def targets(folder):
    """Those of this file."""
    # Each property is read or refused by itself, so that no whole is refused.
    odd = [{**PROPERTIES, "spark.task.cpus": "5e-324"}, {**PROPERTIES, "spark.executor.memory": "9" * 5000}]
    odd += [{**PROPERTIES, "spark.task.resource.gpu.amount": "5e-324", "spark.executor.cores": "1e308"}]
    gate = {**document(), "pipeline": {"gate": {"accuracy": 10**400}}}
    jobs = [{"file": path.read_bytes(), "set": ["fit.epochs=5"]} for path in sorted((ROOT / "conf").glob("*.toml"))]
    return [
        Target(name="spark-properties", seeds=[PROPERTIES, *odd], mutate=mutate_properties, read=read_properties),
        Target(
            name="job-file",
            seeds=jobs,
            cases=job_cases(jobs[0]["file"]),
            mutate=mutate_job,
            read=partial(read_job, folder),
        ),
        Target(
            name="job-document",
            seeds=[json.dumps(document()).encode()],
            cases=[json_text(gate)],
            mutate=mutate_document,
            read=read_document,
        ),
        Target(
            name="ports",
            seeds=["7077", "7077-7090", "\x1d090"],
            cases=["9" * 5000, 10**400],
            mutate=mutate_ports,
            read=read_ports,
        ),
        Target(
            name="places",
            seeds=["file:///tmp/x", "/tmp/x", "x/y", "file:/tmp/a%20b"],
            cases=["mock:\udcff", "", "\0", "file:x"],
            mutate=mutate_text,
            read=read_place,
        ),
    ]
