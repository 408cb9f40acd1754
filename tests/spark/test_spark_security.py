"""A whole fit over TLS: its bits, its port, its files, and its secrets, which nobody beside driver and replicas is told."""

from __future__ import annotations

import base64
import logging
import os
import stat
import subprocess
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from spark_models import estimator, same_bits, weights

from sparkdeep.errors import ConfigError, PreflightError
from sparkdeep.spark.fit import shard_source as shard_source_module
from sparkdeep.spark.fit import transports
from sparkdeep.spark.tasks import replica_tasks

pytestmark = pytest.mark.spark


def spellings(secret):
    """As bytes, hexadecimal, base64 at any offset, and as Python shows bytes."""
    found = {secret, secret.hex().encode(), secret.hex().upper().encode(), repr(secret)[2:-1].encode()}
    for shift in range(3):  # what stands before it in the same text moves its letters
        found.add(base64.b64encode(bytes(shift) + secret)[4:-4])
    return found


def tells(text, secrets):
    text = text if isinstance(text, bytes) else str(text).encode(errors="surrogateescape")
    return any(one in text for secret in secrets for one in spellings(secret))


def processes():
    """Arguments and environments of this process and all below it: the JVM, its Python workers and their children."""
    found = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            home = Path(f"/proc/{process.pid}")
            found.append(((home / "cmdline").read_bytes(), (home / "environ").read_bytes()))
        except OSError:  # it ended meanwhile
            continue
    return found


def spark_tells(spark, frames):
    """What Spark's own pages show of all jobs, and the plans of these frames."""
    jobs = spark.sparkContext._jsc.sc().statusStore().jobsList(None)
    of_jobs = [jobs.apply(i) for i in range(jobs.size())]
    shown = [f"{job.name()} {job.description()} {job.jobGroup()} {job.jobTags()}" for job in of_jobs]
    return shown + [frame._jdf.queryExecution().toString() for frame in frames]


def listening():
    return {tuple(c.laddr) for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def test_the_look_finds_a_secret_in_every_spelling():
    secret = bytes(range(200, 232))
    for text in (secret.hex(), repr(secret), base64.b64encode(b"ab" + secret + b"c").decode(), b"--" + secret):
        assert tells(text, [secret])
    assert not tells(bytes(range(32)).hex(), [secret])
    child = subprocess.Popen(["sleep", "30"], env={**os.environ, "LEAK": secret.hex()})
    try:
        assert any(tells(environment, [secret]) for _, environment in processes())
        assert not any(tells(arguments, [secret]) for arguments, _ in processes())
    finally:
        child.kill()
        child.wait(timeout=10)


def test_a_fit_over_tls_has_the_same_bits_one_port_private_files_and_no_secret_that_shows(
    spark, blobs, plain, tmp_path, monkeypatch, caplog
):
    made, keys, seen = [], [], []
    real_port, real_key = transports.Coordinator, ec.generate_private_key
    monkeypatch.setattr(transports, "Coordinator", lambda **given: made.append(real_port(**given)) or made[-1])
    monkeypatch.setattr(ec, "generate_private_key", lambda *given: keys.append(real_key(*given)) or keys[-1])
    told = spark.sparkContext.parallelize([0], 1).map(lambda _: os.environ["SPARK_LOCAL_DIRS"]).first()
    folders = [Path(folder) for folder in told.split(",")]
    checkpoints = tmp_path / "checkpoints"
    before = listening()
    frames = []
    real_job = replica_tasks.SparkJob.__init__
    monkeypatch.setattr(
        replica_tasks.SparkJob,
        "__init__",
        lambda job, spark, frame, **more: (frames.append(frame), real_job(job, spark, frame, **more))[1],
    )

    def look(record):
        ours = [path for folder in folders for path in folder.glob("sparkdeep-*")] + [checkpoints]
        files = [path for folder in ours for path in folder.rglob("*") if path.is_file()]
        modes = {f"{stat.S_IMODE(p.stat().st_mode):o} {stat.S_IMODE(p.parent.stat().st_mode):o}" for p in files}
        seen.append((processes(), listening() - before, modes, {p.suffix for p in files}))

    caplog.set_level(logging.DEBUG)
    model = estimator(
        tls=True, worker_process="spawn", callbacks=[look], checkpoint_dir=str(checkpoints), checkpoint_every=1
    ).fit(blobs)
    [port], [key] = made, keys
    assert same_bits(weights(plain), weights(model))
    assert port.address.certificate
    secrets = [
        port.token,
        key.private_numbers().private_value.to_bytes(32, "big"),
        key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    ]  # fmt: skip

    assert len(seen) == len(model.history) > 1
    for running, ports, modes, suffixes in seen:
        assert [b"sparkdeep.spark.tasks.child" in arguments for arguments, _ in running].count(True) == 2
        assert not [pair for pair in running if tells(pair[0], secrets) or tells(pair[1], secrets)]
        assert ports == {("127.0.0.1", port.address.port)}
        assert modes == {"600 700"}
        assert {".json", ".safetensors"} <= suffixes
    assert listening() == before

    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("py4j")]
    assert any("training rows on 2 replicas" in line for line in ours)
    assert not [line for line in ours if tells(line, secrets)]
    shown = spark_tells(spark, frames)
    assert any("sparkdeep fit: round" in line for line in shown)
    assert any("MapInArrow" in line for line in shown)
    assert not [line for line in shown if tells(line, secrets)]
    # py4j tells its own log, at DEBUG, every byte that goes to the JVM: Spark's task closure, and so the token. No key.
    assert not [record for record in caplog.records if tells(record.getMessage(), secrets[1:])]


@pytest.mark.parametrize("transport", ["socket", "spark"])
def test_where_spark_encrypts_disks_nothing_runs_until_somebody_answers_for_them(blobs, monkeypatch, transport):
    real = transports.access_to

    class Encrypting:
        def __init__(self, spark):
            self._access = real(spark)

        def conf(self, name, default=None):
            return "true" if name == "spark.io.encryption.enabled" else self._access.conf(name, default)

    def nothing_runs(*_given, **_more):
        raise AssertionError("rows were dealt")

    monkeypatch.setattr(transports, "access_to", Encrypting)
    monkeypatch.setattr(shard_source_module, "dealt", nothing_runs)
    with pytest.raises(PreflightError, match=r"spark.io.encryption.enabled=true.*encrypted_disks=True"):
        estimator(transport=transport).fit(blobs)
    with pytest.raises(AssertionError, match="rows were dealt"):
        estimator(transport=transport, encrypted_disks=True).fit(blobs)


def test_tls_on_request_is_refused_where_there_is_no_port(blobs):
    with pytest.raises(ConfigError, match="tls=True with transport='spark': no port is opened"):
        estimator(transport="spark", tls=True).fit(blobs)
