"""A run that the first version began is gone on with, and given to no other run."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from first_version import EXPECTED, FOLDER, written
from torch import nn
from twin import deal, facts_of, flat, local_coordinator, make_fit, schema_of, write_shards

from sparkdeep import TrimmedMean
from sparkdeep.algorithms import fedyogi
from sparkdeep.errors import CheckpointError
from sparkdeep.models.program import Program
from sparkdeep.rounds.identity import run_identity
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.spark.fit.settings import FitSettings, digest_of
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore

X, Y = np.array(written.ROWS, dtype=np.float32), np.array(written.LABELS)
DEALT, SCHEMA = deal(X, Y, [12, 12]), schema_of(X, Y)


def program():
    return Program(model=written.network(), loss=nn.CrossEntropyLoss(), optimizer=partial(torch.optim.SGD, lr=0.3))


def identity_of(tmp_path, options):
    (tmp_path / "identity").mkdir()
    return run_identity(
        program(),
        LocalSettings(batch_size=options["batch_size"], drift_correction=options["drift_correction"]),
        RunSettings(num_workers=2, aggregator=options["aggregator"], sync_every=options["sync_every"]),
        facts_of(write_shards(tmp_path / "identity", DEALT, SCHEMA)),
        schema=SCHEMA.to_json(),
        outer_optimizer=options["outer_optimizer"],
        warm_start=None,
    )


@pytest.fixture
def resumed(tmp_path):
    """Goes on in a copy of the folder, with the options of then but for the given ones; returns the fit."""
    shutil.copytree(FOLDER / "checkpoint", tmp_path / "checkpoint")
    coordinator = local_coordinator()

    def run(**changes):
        options = {**written.options(), **changes}
        checkpoints = CheckpointDirectory(LocalStore(tmp_path / "checkpoint"), identity=identity_of(tmp_path, options))
        fit = make_fit(tmp_path, program(), DEALT, SCHEMA, coordinator=coordinator, checkpoints=checkpoints, **options)
        for _ in fit.rounds():
            pass
        fit.load_result()
        return fit

    yield run
    coordinator.close()


def test_its_checkpoint_is_gone_on_with(resumed):
    fit = resumed()
    assert fit.resumed_from == 3
    assert [record.round for record in fit.state.records] == [1, 2, 3, 4, 5, 6]
    assert flat(fit.program.model).tolist() == pytest.approx(EXPECTED["checkpoint"], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"aggregator": TrimmedMean(0.3)}, "algorithm: .*sparkdeep:TrimmedMean"),
        ({"outer_optimizer": fedyogi(lr=0.2, betas=(0.8, 0.9)).settings["outer_optimizer"]}, "sparkdeep:FedYogi"),
    ],
)
def test_another_run_is_refused_as_ever(resumed, changes, named):
    with pytest.raises(CheckpointError, match=named):
        resumed(**changes)


def test_the_folder_of_a_search_has_the_name_that_it_had(tmp_path):
    """A setting that is added changes it, so that searches start over: then record it anew, and say so to users."""
    settings = FitSettings.of({**written.settings(), "feature_cols": "x", "num_workers": 2})
    assert digest_of(settings, {**identity_of(tmp_path, written.options()), "shards": []}) == EXPECTED["digest"]
