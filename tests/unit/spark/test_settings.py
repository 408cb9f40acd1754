"""The settings of a fit: what they refuse together, how a log names them, and what tells two fits apart."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from dataclasses import replace
from functools import partial

import psutil
import pytest
import torch
from torch import nn

from sparkdeep import EarlyStopping
from sparkdeep.errors import ConfigError, PreflightError
from sparkdeep.optim.aggregators import Median
from sparkdeep.spark.fit import transports
from sparkdeep.spark.fit.settings import FitSettings, described, digest_of
from sparkdeep.tracking.records import ReplicaRecord, RoundRecord

IDENTITY = {"shards": [["abc", {"train": 5}]]}


def settings(**options):
    values = {
        "model": nn.Identity,
        "loss": nn.MSELoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "feature_cols": ["x"],
        "label_cols": "y",
        **options,
    }
    return FitSettings.of(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": None}, "give optimizer="),
        ({"loss": None}, "give loss=.*or training_step="),
        ({"label_cols": None}, "give label_cols="),
        ({"metrics": {"f": max}}, "validation rows"),
        ({"early_stopping": EarlyStopping(monitor="f"), "validation": 0.1}, "monitors 'f'; known: \\['loss'\\]"),
        ({"callbacks": ["print"]}, "callbacks hold 'print'"),
        ({"worker_process": "fork"}, "'auto', 'spawn' or 'reuse'"),
        ({"resume": "yes"}, "resume='yes'"),
        ({"prediction_col": "y"}, "prediction_col='y' is a column that training reads"),
        ({"probability_col": "prediction"}, "probability_col='prediction' is written by another"),
        ({"raw_prediction_col": ""}, "raw_prediction_col=''"),
        ({"coordinator_port": "x"}, "x"),
        ({"tls": "on"}, r"tls='on': must be 'auto', True or False"),
        ({"encrypted_disks": "yes"}, "encrypted_disks='yes'"),
    ],
)
def test_settings_that_cannot_be_meant_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        settings(**options)


def test_a_loss_is_not_needed_with_a_step_of_ones_own():
    assert settings(loss=None, label_cols=None, training_step=max).training_step is max


def test_a_description_is_json_and_names_what_was_given():
    told = described(settings(early_stopping=2, validation=0.1, learning_rate=0.5, callbacks=[print]))
    assert json.loads(json.dumps(told)) == told
    assert told["model"] == "torch.nn.modules.linear:Identity"
    assert told["optimizer"][2] == {"lr": 0.5}
    assert told["early_stopping"]["patience"] == 2
    assert told["epochs"] == 1


def test_a_description_shows_no_password():
    secret = {"checkpoint_dir": "s3://key:hidden@bucket/run", "exchange_dir": "s3://key:hidden@bucket/x"}
    told = described(settings(**secret, shard_dir="/mnt/shards"))
    assert "hidden" not in json.dumps(told)
    assert (told["checkpoint_dir"], told["shard_dir"]) == ("s3://***@bucket/run", "/mnt/shards")


def test_what_changes_the_result_changes_the_digest_and_nothing_else_does():
    base = digest_of(settings(), IDENTITY)
    assert len(base) == 16
    assert base == digest_of(settings(), IDENTITY)
    passing = {
        "checkpoint_dir": "a",
        "callbacks": [print],
        "progress": False,
        "max_stage_s": 5.0,
        "keep_checkpoints": 1,
    }
    assert digest_of(replace(settings(**passing), search=True), IDENTITY) == base
    changes = [
        {"epochs": 2},
        {"sync_every": 3},
        {"learning_rate": 0.2},
        {"batch_size": 16},
        {"model_args": {"p": 0.5}},
        {"loss": nn.L1Loss()},
        {"validation": 0.2},
        {"seed": 1},
        {"loss": lambda output, label: (output - label).abs().mean()},
        {"loss": lambda output, label: (output - label).square().mean()},
        {"preprocess": partial(scaled, lambda x: x / 2)},
        {"preprocess": partial(scaled, lambda x: x / 3)},
    ]
    digests = [digest_of(settings(**change), IDENTITY) for change in changes]
    assert len({base, *digests}) == 1 + len(changes)
    assert digest_of(settings(), {"shards": [["other", {"train": 5}]]}) != base


def scaled(scale, x):
    return scale(x)


class Access:
    def __init__(self, **conf):
        self._conf = conf

    def conf(self, name, default=None):
        return self._conf.get(name.removeprefix("spark.").replace(".", "_"), default)


@pytest.mark.parametrize("guard", ["authenticate", "network_crypto_enabled", "ssl_enabled"])
def test_a_ring_is_refused_where_spark_guards_its_connections_unless_it_is_allowed_by_name(monkeypatch, guard):
    monkeypatch.setattr(transports, "is_connect", lambda _spark: False)
    monkeypatch.setattr(transports, "access_to", lambda _spark: Access(**{guard: "true"}))
    with pytest.raises(PreflightError, match=r"aggregation='ring' with spark\..*=true: .*plain_ring=True"):
        transports.guarded(settings(aggregation="ring"), None)
    assert transports.guarded(settings(), None).run.aggregation == "star"
    allowed = settings(aggregation="ring", plain_ring=True)
    assert transports.guarded(allowed, None).run.aggregation == "ring"
    monkeypatch.setattr(transports, "access_to", lambda _spark: Access(**{guard: "false"}))
    assert transports.guarded(settings(), None).run.aggregation == "auto"


def session_with(monkeypatch, **conf):
    monkeypatch.setattr(transports, "is_connect", lambda _spark: False)
    monkeypatch.setattr(transports, "access_to", lambda _spark: Access(**conf))


@pytest.mark.parametrize(
    "encrypting", ["ssl_enabled", "ssl_rpc_enabled", "network_crypto_enabled", "authenticate_enableSaslEncryption"]
)
def test_the_port_speaks_tls_wherever_spark_encrypts_and_on_request(monkeypatch, caplog, encrypting):
    session_with(monkeypatch)
    assert transports.guarded(settings(), None).tls is False
    assert transports.guarded(settings(tls=True), None).tls is True
    session_with(monkeypatch, authenticate="true")  # proves who one is, and hides nothing
    assert transports.guarded(settings(), None).tls is False
    session_with(monkeypatch, **{encrypting: "True"})
    assert transports.guarded(settings(), None).tls is True
    assert not caplog.records
    assert transports.guarded(settings(tls=False), None).tls is False
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "tls=False with spark." in record.getMessage()


def test_tls_without_its_package_is_refused_before_anything_runs(monkeypatch):
    session_with(monkeypatch)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"pip install 'sparkdeep\[tls\]'"):
        transports.guarded(settings(tls=True), None)
    assert transports.guarded(settings(), None).tls is False


def test_a_ring_would_go_round_tls_and_is_refused_with_it(monkeypatch):
    session_with(monkeypatch)
    with pytest.raises(PreflightError, match=r"aggregation='ring' with tls=True: .*plain_ring=True"):
        transports.guarded(settings(aggregation="ring", tls=True), None)
    assert transports.guarded(settings(tls=True), None).run.aggregation == "star"
    assert transports.guarded(settings(tls=True, plain_ring=True), None).run.aggregation == "auto"


@pytest.mark.parametrize("transport", ["socket", "spark"])
def test_where_spark_encrypts_disks_shards_in_the_clear_are_refused_unless_the_disks_are(monkeypatch, transport):
    session_with(monkeypatch, io_encryption_enabled="true")
    with pytest.raises(PreflightError, match=r"spark.io.encryption.enabled=true.*encrypted_disks=True"):
        transports.guarded(settings(transport=transport), None)
    assert transports.guarded(settings(transport=transport, encrypted_disks=True), None).encrypted_disks
    session_with(monkeypatch, io_encryption_enabled="false")
    assert transports.guarded(settings(transport=transport), None).transport == transport


def test_spark_connect_sessions_tell_of_encrypted_disks_too(monkeypatch):
    session_with(monkeypatch, io_encryption_enabled="true")
    monkeypatch.setattr(transports, "is_connect", lambda _spark: True)
    with pytest.raises(PreflightError, match="encrypted_disks=True"):
        transports.guarded(settings(), None)


@pytest.mark.parametrize(
    ("conf", "listens", "advertised"),
    [
        ({"driver_host": "127.0.0.1"}, "127.0.0.1", "127.0.0.1"),
        ({"driver_host": "127.0.0.2"}, "127.0.0.2", "127.0.0.2"),
        ({"driver_host": "driver.example", "driver_bindAddress": "127.0.0.3"}, "127.0.0.3", "driver.example"),
        ({}, "127.0.0.1", "localhost"),
    ],
)
def test_the_coordinator_listens_on_the_drivers_bind_address_and_nowhere_else(monkeypatch, conf, listens, advertised):
    session_with(monkeypatch, **conf)
    with contextlib.ExitStack() as stack:
        coordinator = transports.stages_of(object(), settings(), None, stack).coordinator
        port = coordinator.address.port
        assert coordinator.address.host == advertised
        mine = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert [(one.ip, one.port) for one in mine if one.port == port] == [(listens, port)]
        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        others = {one.laddr for one in listening if one.pid != os.getpid()}
        for host in {f"127.0.0.{i}" for i in range(1, 6)} - {listens}:  # all of them are this machine's
            with socket.socket() as sock:
                assert sock.connect_ex((host, port)) != 0 or (host, port) in others
        with socket.create_connection((listens, port), timeout=2.0):
            pass
    with socket.socket() as sock:
        assert sock.connect_ex((listens, port)) != 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"aggregation": "ring"}, "no connection stays open"),
        ({"overlap": 1}, "a round ends before the next"),
        ({"down_codec": "int8"}, "built anew for each round"),
        ({"tls": True}, "no port is opened"),
        ({"aggregator": Median()}, "each round is a job of its own that all replicas end together"),
    ],
)
def test_what_needs_an_open_connection_is_refused_where_every_round_is_a_job(monkeypatch, options, reason):
    monkeypatch.setattr(transports, "is_connect", lambda _spark: False)
    with pytest.raises(ConfigError, match=f"with transport='spark': .*{reason}"):
        transports.chosen(settings(transport="spark", **options), None)
    assert transports.chosen(settings(transport="spark", codec="int8"), None) == "spark"


def test_records_of_rounds_without_a_replica_are_refused_where_every_round_is_a_job(monkeypatch):
    monkeypatch.setattr(transports, "is_connect", lambda _spark: False)
    parts = [
        ReplicaRecord(
            replica=i, host="h", rows=4, weight=4, steps=1, compute_seconds=1.0, input_seconds=0.0, dropped=dropped
        )
        for i, dropped in enumerate(["", "late"])
    ]
    record = RoundRecord(round=1, epoch=1, rows=4, loss=0.5, replicas=parts)
    with pytest.raises(
        ConfigError, match="replay='records of rounds that went on without a replica' with transport='spark'"
    ):
        transports.chosen(settings(transport="spark", replay=[record]), None)
    whole = replace(record, replicas=[replace(part, dropped="") for part in parts])
    assert transports.chosen(settings(transport="spark", replay=[whole]), None) == "spark"


def test_a_key_is_refused_where_no_replica_keeps_rows():
    gradients = {"work": "gradient", "sync_every": "epoch", "portions": 4, "outer_optimizer": torch.optim.LBFGS}
    with pytest.raises(ConfigError, match=r"deal_key='user' with portions=4: no replica keeps rows"):
        transports.chosen(settings(deal_key="user", **gradients), None)
    assert transports.chosen(settings(**gradients), None) == "stateless"
