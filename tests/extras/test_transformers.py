"""transformers models built from a config: their own loss, their logits, tied weights; nothing is downloaded."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from foreign_models import LENGTH, WORDS, counting, last_words, sentences, tiny_bert, tiny_gpt2
from plain_loop import epoch_batches
from torch import nn
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy
from twin import deal, facts_of, run, schema_of, write_shards

from sparkdeep import ConfigError, TorchEstimator, TorchModel
from sparkdeep.models.building import OwnLoss, own_parts
from sparkdeep.models.program import Program

pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("default")]

ADAM = partial(torch.optim.AdamW, lr=5e-3)
ROWS, BATCH, EPOCHS = 50, 16, 2


def program_of(module):
    step, optimizer = own_parts(module, loss=None, training_step=None, optimizer=ADAM, weighted=False)
    assert isinstance(step, OwnLoss)
    return Program(model=module, loss=None, training_step=step, optimizer=optimizer)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_one_replica_equals_the_loop_of_the_models_documentation(tmp_path, kind):
    """`model(input_ids, labels=labels).loss.backward()`, with dropout, bit for bit."""
    if kind == "bert":
        x, _, y = sentences(ROWS)
        make = tiny_bert
    else:
        x = y = counting(ROWS)
        make = tiny_gpt2
    schema, parts = schema_of(x, y), deal(x, y, [ROWS])
    (facts,) = facts_of(write_shards(tmp_path / "for-its-digest", parts, schema))
    reference = make().train()
    optimizer = ADAM(reference.parameters())
    torch.manual_seed(0)  # where a replica's random stream starts
    for epoch in range(EPOCHS):
        for rows in epoch_batches(ROWS, BATCH, digest=facts.digest, epoch=epoch):
            optimizer.zero_grad()
            reference(torch.from_numpy(x[rows]), labels=torch.from_numpy(y[rows])).loss.backward()
            optimizer.step()
    trained, _, _ = run(tmp_path, program_of(make()), parts, schema, epochs=EPOCHS, batch_size=BATCH, sync_every=3)
    states = trained.state_dict(), reference.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert not torch.equal(next(iter(make().parameters())), next(iter(trained.parameters())))
    if kind == "gpt2":
        assert trained.lm_head.weight is trained.transformer.wte.weight, "tied weights stay tied"


def test_two_replicas_with_the_same_rows_are_as_one(tmp_path):
    """Also of the tied weight, which is in the mean once."""
    x = counting(8)
    schema = schema_of(x, x)
    sgd = {"epochs": 1, "batch_size": 8, "sync_every": 1}
    flats = []
    for parts in (deal(x, x, [8]), [{"features": x, "label": x}] * 2):
        module = tiny_gpt2(dropout=0.0)
        program = Program(model=module, loss=None, training_step=OwnLoss(), optimizer=partial(torch.optim.SGD, lr=0.1))
        trained, _, _ = run(tmp_path, program, parts, schema, **sgd)
        flats.append(torch.cat([p.detach().reshape(-1) for p in trained.parameters()]))
    torch.testing.assert_close(flats[0], flats[1], rtol=1e-5, atol=1e-7)
    start = torch.cat([p.detach().reshape(-1) for p in tiny_gpt2(dropout=0.0).parameters()])
    assert (flats[0] - start).abs().max() > 1e-3


def reviews(spark, rows):
    return spark.createDataFrame(
        [(i.tolist(), m.tolist(), int(y)) for i, m, y in zip(*sentences(rows), strict=True)],
        "input_ids array<bigint>, attention_mask array<bigint>, label bigint",
    )


def estimator(model, **options):
    settings = {
        "model": model,
        "optimizer": ADAM,
        "feature_cols": {"input_ids": "input_ids", "attention_mask": "attention_mask"},
        "label_cols": "label",
        "num_workers": 2,
        "batch_size": 16,
        "epochs": 3,
        "sync_every": 4,
        "progress": False,
        **options,
    }
    return TorchEstimator(**settings)


def right(model, rows):
    return model.transform(rows).selectExpr("avg(double(label = prediction))").first()[0]


def test_bert_trains_by_its_own_loss_scores_saves_and_loads(spark, tmp_path):
    rows = reviews(spark, 240)
    metrics = {
        "accuracy": lambda output, label: (output.logits.argmax(1) == label).float().mean(),
        "torchmetrics": MulticlassAccuracy(2, average="micro"),
    }
    model = estimator(tiny_bert(), prediction="argmax", validation=0.2, metrics=metrics).fit(rows)
    assert right(model, rows) > 0.95
    scores = model.history[-1].metrics
    assert scores["accuracy"] == pytest.approx(scores["torchmetrics"], abs=1e-6)
    model.save(str(tmp_path / "model"))
    again = TorchModel.load(str(tmp_path / "model"), model=tiny_bert(seed=1))
    assert [r.prediction for r in again.transform(rows).collect()] == [
        r.prediction for r in model.transform(rows).collect()
    ]


def test_bert_trains_by_a_torch_loss_with_weights_of_rows(spark):
    rows = reviews(spark, 240).selectExpr("*", "if(label = 0, 1.0, 2.0) AS weight")
    model = estimator(
        tiny_bert(),
        loss=nn.CrossEntropyLoss(),
        weight_col="weight",
        prediction=lambda out: out.logits.softmax(-1)[:, 1],
    ).fit(rows)
    scored = model.transform(rows).selectExpr("avg(double(label = int(prediction > 0.5)))").first()[0]
    assert scored > 0.95
    with pytest.raises(ConfigError, match=r"weight_col with the loss that BertForSequenceClassification computes"):
        estimator(tiny_bert(), weight_col="weight").fit(rows)


def test_gpt2_learns_a_language_from_its_own_words(spark):
    words = counting(240)
    rows = spark.createDataFrame([(w.tolist(),) for w in words], "input_ids array<bigint>")
    model = estimator(
        tiny_gpt2(dropout=0.0),
        feature_cols={"input_ids": "input_ids"},
        label_cols={"labels": "input_ids"},
        epochs=12,
        optimizer=partial(torch.optim.AdamW, lr=2e-2),
        prediction=last_words,
    ).fit(rows)
    assert model.model.lm_head.weight is model.model.transformer.wte.weight
    scored = model.transform(rows).collect()
    given = np.array([row.input_ids for row in scored])
    following = np.array([row.prediction for row in scored])
    assert following.shape == (240, LENGTH)
    assert (following == (given + 1) % WORDS).mean() > 0.9


def test_what_cannot_be_meant_is_refused_with_a_remedy(spark):
    words = spark.createDataFrame([(w.tolist(), 1) for w in counting(40)], "input_ids array<bigint>, label bigint")
    language = {"feature_cols": "input_ids", "label_cols": {"labels": "input_ids"}}
    with pytest.raises(ConfigError, match=r"prediction='argmax' of logits of shape \(7, 6, 40\)"):
        estimator(tiny_gpt2(), prediction="argmax", **language).fit(words)
    with pytest.raises(ConfigError, match=r"computed no loss of its own from labels \[\]"):
        estimator(tiny_gpt2(), feature_cols="input_ids", label_cols=None).fit(words)
    with pytest.raises(ConfigError, match="give loss="):
        estimator(nn.Linear(LENGTH, 2))


def test_torchmetrics_are_given_logits():
    from sparkdeep.models.losses import logits_of

    output = tiny_bert()(torch.ones(3, LENGTH, dtype=torch.int64))
    assert logits_of(output) is output.logits
    assert logits_of(output.logits) is output.logits
    assert logits_of(dict(output)) is output.logits
    other = {"scores": output.logits}
    assert logits_of(other) is other
    assert BinaryAccuracy()(logits_of(output).argmax(1), torch.zeros(3)).ndim == 0
