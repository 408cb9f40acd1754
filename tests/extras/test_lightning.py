"""A Lightning module's training_step and configure_optimizers, unchanged."""

from __future__ import annotations

import copy
from functools import partial

import lightning
import numpy as np
import pytest
import torch
from foreign_models import (
    LitAsksTrainer,
    LitBuildsLate,
    LitByHand,
    LitClips,
    LitClosure,
    LitForgets,
    LitNet,
    LitOneCycle,
    LitPlateau,
    LitTwoOptimizers,
    blobs,
)
from plain_loop import epoch_batches
from torch import nn
from twin import deal, facts_of, run, schema_of, write_shards

from sparkdeep import ConfigError, TorchEstimator, TorchModel
from sparkdeep.data.order import steps_per_epoch
from sparkdeep.models.building import own_parts, ready
from sparkdeep.models.lightning_module import lightning_batch
from sparkdeep.models.program import Program

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("default")]

ROWS, BATCH, EPOCHS = 70, 16, 3


def program_of(module, facts, *, accumulate=1):
    step, optimizer = own_parts(module, loss=None, training_step=None, optimizer=None, weighted=False)
    program = Program(model=module, loss=None, training_step=step, optimizer=optimizer)
    steps = max(steps_per_epoch(one.rows["train"], batch_size=BATCH, accumulate_batches=accumulate) for one in facts)
    return ready(program, epochs=EPOCHS, steps_per_epoch=steps, batches_per_step=accumulate)


def fresh(cls=LitNet, **options):
    torch.manual_seed(0)
    return cls(**options)


class Visited(torch.utils.data.Dataset):
    """The batches that a replica visits, epoch after epoch."""

    def __init__(self, x, y, digest):
        self.x, self.y, self.digest, self.epoch = x, y, digest, 0

    def __len__(self):
        return len(epoch_batches(len(self.x), BATCH, digest=self.digest, epoch=0))

    def __getitem__(self, index):
        rows = epoch_batches(len(self.x), BATCH, digest=self.digest, epoch=self.epoch)[index]
        return torch.from_numpy(self.x[rows]), torch.from_numpy(self.y[rows])


class NextEpoch(lightning.Callback):
    def on_train_start(self, trainer, module):
        torch.manual_seed(0)  # where a replica's random stream starts

    def on_train_epoch_end(self, trainer, module):
        trainer.train_dataloader.dataset.epoch += 1


@pytest.mark.parametrize(
    ("cls", "interval", "accumulate"),
    [(LitNet, "epoch", 1), (LitNet, "step", 1), (LitOneCycle, "step", 1), (LitNet, "epoch", 2)],
)
def test_one_replica_equals_lightnings_own_trainer_bit_for_bit(tmp_path, cls, interval, accumulate):
    # Lightning divides each batch's loss by their number, a replica weights it by rows: the same for batches of one size.
    count = ROWS if accumulate == 1 else 4 * BATCH
    x, y = blobs(count)
    schema, parts = schema_of(x, y), deal(x, y, [count])
    facts = facts_of(write_shards(tmp_path / "for-its-digest", parts, schema))
    reference = fresh(cls, interval=interval)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        callbacks=[NextEpoch()],
        default_root_dir=tmp_path,
    )
    # Its own generator, as a loader draws a seed each epoch, from the stream that dropout draws from.
    loader = torch.utils.data.DataLoader(Visited(x, y, facts[0].digest), batch_size=None, generator=torch.Generator())
    trainer.fit(reference, loader)
    module = fresh(cls, interval=interval)
    start = copy.deepcopy(module)
    trained, records, _ = run(
        tmp_path,
        program_of(module, facts, accumulate=accumulate),
        parts,
        schema,
        epochs=EPOCHS,
        batch_size=BATCH,
        accumulate_batches=accumulate,
        sync_every=2,
    )
    for name, expected in reference.state_dict().items():
        assert torch.equal(trained.state_dict()[name], expected), name
    assert not torch.equal(start.head.weight, trained.head.weight)
    assert [record.logged["epoch"] for record in records] == [float(record.epoch - 1) for record in records]
    assert records[0].logged["batch"] == pytest.approx(0.5 if accumulate == 1 else 1.5)
    assert 0 <= records[0].logged["train_accuracy"] <= 1


def test_another_clock_is_another_training(tmp_path):
    x, y = blobs(ROWS)
    schema, parts = schema_of(x, y), deal(x, y, [ROWS])
    facts = facts_of(write_shards(tmp_path / "for-its-digest", parts, schema))
    heads = []
    for interval in ("epoch", "step"):
        program = program_of(fresh(interval=interval), facts)
        trained, _, _ = run(tmp_path, program, parts, schema, epochs=EPOCHS, batch_size=BATCH, sync_every=2)
        heads.append(trained.head.weight.detach())
    assert not torch.allclose(heads[0], heads[1])


def test_what_the_module_logs_is_a_mean_over_rows_of_all_replicas(tmp_path):
    x, y = blobs(48)
    schema = schema_of(x, y)
    parts, held_out = deal(x, y, [32, 16]), deal(x, y, [32, 16])
    facts = facts_of(write_shards(tmp_path / "for-its-digest", parts, schema))
    program = program_of(fresh(), facts)
    trained, records, _ = run(
        tmp_path, program, parts, schema, validation=held_out, epochs=2, batch_size=BATCH, sync_every="epoch"
    )
    assert records[0].logged["batch"] == pytest.approx((16 * (0 + 1) + 16 * 0) / 48)
    with torch.no_grad():
        expected = (trained.eval()(torch.from_numpy(x)).argmax(1).numpy() == y).mean()
    assert records[-1].metrics["val_accuracy"] == pytest.approx(expected)
    assert records[-1].metrics["loss"] > 0


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (LitByHand, "automatic_optimization is False"),
        (LitTwoOptimizers, "gave 2 optimizers"),
        (LitPlateau, "follows a score"),
        (LitClosure, "needs a closure"),
        (LitClips, "overrides on_before_optimizer_step"),
        (LitBuildsLate, "overrides configure_model"),
    ],
)
def test_what_cannot_be_honored_is_refused_by_name(tmp_path, cls, said):
    x, y = blobs(20)
    facts = facts_of(write_shards(tmp_path, deal(x, y, [20]), schema_of(x, y)))
    with pytest.raises(ConfigError, match=said):
        program_of(cls(), facts)


def test_batches_have_the_form_that_a_data_loader_gives():
    from sparkdeep.data.batches import Batch

    x, y, w = torch.zeros(2, 3), torch.zeros(2), torch.ones(2)

    def of(features, labels, weights=None):
        return lightning_batch(Batch(features=features, labels=labels, weights=weights, rows=2))

    assert of(x, None) is x
    assert [part is given for part, given in zip(of(x, y), (x, y), strict=True)] == [True, True]
    assert len(of(x, y, w)) == 3
    assert of({"a": x}, {"b": y}).keys() == {"a", "b"}
    assert of({"a": x}, None, w).keys() == {"a", "weight"}
    assert isinstance(of({"a": x}, y)[0], dict)


def table(spark, rows):
    x, y = blobs(rows)
    return spark.createDataFrame(
        [(a.tolist(), int(b)) for a, b in zip(x, y, strict=True)], "features array<float>, label bigint"
    )


def estimator(**options):
    settings = {
        "model": LitNet,
        "feature_cols": "features",
        "label_cols": "label",
        "num_workers": 2,
        "batch_size": 16,
        "epochs": 3,
        "sync_every": 4,
        "progress": False,
        **options,
    }
    return TorchEstimator(**settings)


def test_fit_on_spark_trains_scores_saves_and_loads(spark, tmp_path):
    rows = table(spark, 300)
    model = estimator(model_args={"width": 24}, validation=0.2, prediction="argmax").fit(rows)
    assert isinstance(model.model, LitNet)
    assert model.model.hparams.width == 24
    accuracy = model.transform(rows).selectExpr("avg(double(label = prediction))").first()[0]
    assert accuracy > 0.95
    assert model.history[-1].metrics["val_accuracy"] > 0.9
    assert {"train_accuracy", "batch", "epoch"} <= model.history[-1].logged.keys()
    model.save(str(tmp_path / "model"))
    again = TorchModel.load(str(tmp_path / "model"))
    assert again.history[-1].logged == model.history[-1].logged
    first = [r.prediction for r in model.transform(rows).orderBy("features").collect()]
    assert first == [r.prediction for r in again.transform(rows).orderBy("features").collect()]


def test_refusals_on_spark_name_the_attribute(spark):
    rows = table(spark, 60)
    with pytest.raises(ConfigError, match=r"LitAsksTrainer\.training_step asked for self\.trainer\.save_checkpoint"):
        estimator(model=LitAsksTrainer).fit(rows)
    with pytest.raises(ConfigError, match=r"LitForgets\.training_step returned no loss"):
        estimator(model=LitForgets).fit(rows)
    with pytest.raises(ConfigError, match="both give a learning-rate scheduler"):
        estimator(lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1)).fit(rows)


def test_given_parts_come_before_the_modules_own(spark):
    rows = table(spark, 120)
    model = estimator(loss=nn.CrossEntropyLoss(), optimizer=partial(torch.optim.SGD, lr=0.05)).fit(rows)
    assert np.isfinite(model.history[-1].loss)
    assert model.history[-1].logged == {}


def test_a_rate_without_an_optimizer_is_refused():
    with pytest.raises(ConfigError, match="configure_optimizers makes has its own rate"):
        estimator(learning_rate=0.1)
    with pytest.raises(ConfigError, match="give optimizer="):
        estimator(model=nn.Linear(8, 3), loss=nn.CrossEntropyLoss())
