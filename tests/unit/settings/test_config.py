"""Settings are checked when they are made, and each refusal names value, rule and remedy."""

from __future__ import annotations

import dataclasses
import math

import pytest

from sparkdeep.checks import known, refuse_unknown, spelled
from sparkdeep.errors import ConfigError
from sparkdeep.optim.aggregators import Aggregator, TrimmedMean
from sparkdeep.optim.asynchronous import Asynchronous
from sparkdeep.optim.drift import DriftCorrection
from sparkdeep.settings.run import EarlyStopping, LocalSettings, RunSettings, from_mapping


def test_defaults_are_valid_and_frozen():
    for cls in (LocalSettings, RunSettings, EarlyStopping):
        made = cls()
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.seed = 3


def test_an_unknown_name_is_refused_with_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"unknown RunSettings setting 'sync_evry'. Did you mean 'sync_every'\?"):
        from_mapping(RunSettings, {"sync_evry": 3})
    with pytest.raises(ConfigError) as caught:
        refuse_unknown(["zzz"], ["alpha", "beta"], "option")
    assert str(caught.value) == "unknown option 'zzz'. Known: alpha, beta."
    refuse_unknown(["beta"], ["alpha", "beta"], "option")


def test_values_by_name_make_the_settings():
    assert from_mapping(RunSettings, {"epochs": 3, "sync_every": "epoch"}) == RunSettings(epochs=3, sync_every="epoch")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, r"batch_size=0: must be a whole number of at least 1"),
        ({"batch_size": 2.0}, r"batch_size=2\.0: must be a whole number"),
        ({"batch_size": True}, r"batch_size=True: must be a whole number"),
        ({"accumulate_batches": -1}, r"accumulate_batches=-1"),
        ({"seed": -1}, r"seed=-1: must be a whole number of at least 0"),
        ({"clip_grad_norm": 0}, r"clip_grad_norm=0: must be a positive number"),
        ({"clip_grad_norm": math.nan}, r"clip_grad_norm=nan"),
        ({"clip_grad_norm": math.inf}, r"clip_grad_norm=inf"),
        ({"clip_grad_norm": "1"}, r"clip_grad_norm='1'"),
        ({"precision": "fp16"}, r"precision='fp16': must be one of None, 'bf16'"),
        ({"inner_state": "mean"}, r"inner_state='mean': must be one of 'keep', 'average', 'reset'"),
        ({"window_rows": 10, "block_rows": 20}, r"window_rows=10 is smaller than block_rows=20.*Raise window_rows"),
    ],
    ids=str,
)
def test_local_settings_that_cannot_be_meant_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        LocalSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_workers": 0}, r"num_workers=0: must be a whole number of at least 1"),
        ({"epochs": 0}, r"epochs=0"),
        ({"epochs": "3"}, r"epochs='3'"),
        ({"sync_every": "epochs"}, r"sync_every='epochs': must be 'epoch' or a whole number of at least 1"),
        ({"sync_every": 0}, r"sync_every=0"),
        ({"sync_every": None}, r"sync_every=None"),
        ({"validate_every": "auto"}, r"validate_every='auto'"),
        ({"rounds_per_stage": "epoch"}, r"rounds_per_stage='epoch': must be 'auto' or a whole number"),
        ({"checkpoint_every": 0}, r"checkpoint_every=0"),
        ({"max_retries": -1}, r"max_retries=-1: must be a whole number of at least 0"),
        ({"max_stage_s": 0}, r"max_stage_s=0: must be a positive number"),
        ({"stall_timeout_s": -3.0}, r"stall_timeout_s=-3\.0"),
        ({"replica_state": "disk"}, r"replica_state='disk': must be one of 'local', 'durable'"),
    ],
    ids=str,
)
def test_run_settings_that_cannot_be_meant_are_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        RunSettings(**settings)


@pytest.mark.parametrize("word", ["a whole number", "b whole number"])
def test_the_words_of_a_refusal_are_no_values(word):
    for name in ("sync_every", "validate_every", "rounds_per_stage"):
        with pytest.raises(ConfigError, match=name):
            RunSettings(**{name: word})


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"patience": 0}, r"early_stopping\.patience=0"),
        ({"mode": "least"}, r"early_stopping\.mode='least': must be one of 'min', 'max'"),
        ({"min_delta": -0.1}, r"early_stopping\.min_delta=-0\.1: must be a number that is not negative"),
        ({"min_delta": math.nan}, r"early_stopping\.min_delta=nan"),
    ],
)
def test_early_stopping_that_cannot_be_meant_is_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        EarlyStopping(**settings)


@pytest.mark.parametrize(
    ("rule", "value", "best", "improves"),
    [
        (EarlyStopping(), 1.0, None, True),
        (EarlyStopping(), 1.0, 1.0, False),
        (EarlyStopping(), 0.9, 1.0, True),
        (EarlyStopping(min_delta=0.2), 0.9, 1.0, False),
        (EarlyStopping(mode="max"), 1.1, 1.0, True),
        (EarlyStopping(mode="max"), 0.9, 1.0, False),
        (EarlyStopping(mode="max", min_delta=0.2), 1.1, 1.0, False),
        (EarlyStopping(), math.nan, None, False),
        (EarlyStopping(mode="max"), math.nan, 1.0, False),
    ],
)
def test_what_counts_as_better(rule, value, best, improves):
    assert rule.improves(value, best) is improves


def test_what_may_be_given_is_read_from_the_classes_that_are_there():
    assert list(known(Aggregator)) == ["NormClip", "Median", "TrimmedMean", "RadialDirectional"]
    assert known(Asynchronous) == {"Asynchronous": Asynchronous}
    assert spelled(DriftCorrection) == ["FedProx(mu)", "Scaffold()"]

    @dataclasses.dataclass(frozen=True)
    class Median(Aggregator):
        def combine(self, changes, weights):
            return iter(())

    assert known(Aggregator)["Median"] is not Median, "a user's class of the same name is theirs"
    assert RunSettings(aggregator=Median()).aggregator == Median()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"aggregator": "Median"},
            r"aggregator='Median': must be NormClip\(\), Median\(\), .*, or 'mean'. Did you mean Median\(\)\?",
        ),
        ({"aggregator": TrimmedMean}, r"Did you mean TrimmedMean\(share\)\?"),
        ({"aggregator": None}, r"aggregator=None: must be .*, or 'mean'.$"),
        ({"schedule": "AdaCom"}, r"Did you mean AdaComm\(every\)\?"),
        ({"asynchronous": True}, r"asynchronous=True: must be Asynchronous\(n_fetch, n_push, max_staleness\), or None"),
    ],
    ids=str,
)
def test_what_is_of_another_kind_is_refused_with_the_nearest_known_one(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        RunSettings(**settings)
