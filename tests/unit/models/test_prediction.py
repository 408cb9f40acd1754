from __future__ import annotations

import functools

import pyarrow as pa
import pytest
import torch

from sparkdeep.errors import ConfigError
from sparkdeep.models.prediction import Prediction, check_choice, scores_for, to_arrow

OUTPUT = torch.tensor([[1.0, 3.0, 2.0], [0.5, -1.0, 0.0]])


@pytest.mark.parametrize(
    ("choice", "output", "sql", "values"),
    [
        (None, OUTPUT, "array<float>", OUTPUT.tolist()),
        (None, OUTPUT.double(), "array<double>", OUTPUT.tolist()),
        (None, OUTPUT.bfloat16(), "array<float>", OUTPUT.tolist()),
        (None, torch.tensor([[1.5], [2.5]]), "float", [1.5, 2.5]),
        (None, torch.tensor([1.5, 2.5]), "float", [1.5, 2.5]),
        (None, torch.tensor([7, 8], dtype=torch.int32), "bigint", [7, 8]),
        (None, torch.tensor([True, False]), "boolean", [True, False]),
        (None, OUTPUT.reshape(2, 3, 1), "array<array<float>>", OUTPUT.reshape(2, 3, 1).tolist()),
        ("argmax", OUTPUT, "bigint", [1, 0]),
        ("argmax", torch.tensor([[0.1], [-0.1]]), "bigint", [1, 0]),
        ("probability", torch.zeros(2, 4), "array<float>", [[0.25] * 4] * 2),
        ("probability", torch.zeros(2, 1), "float", [0.5, 0.5]),
        (lambda pair: pair[1], (None, torch.tensor([4, 5])), "bigint", [4, 5]),
    ],
)
def test_an_output_becomes_a_column_of_the_named_type_with_its_numbers(choice, output, sql, values):
    prediction = Prediction.of(choice, output)
    assert prediction.sql_type == sql
    array = to_arrow(prediction.apply(output))
    assert array.to_pylist() == values
    kinds = {"float": pa.float32(), "double": pa.float64(), "bigint": pa.int64(), "boolean": pa.bool_()}
    expected = kinds[sql.replace("array<", "").replace(">", "")]
    for _ in range(sql.count("array<")):
        expected = pa.list_(expected)
    assert array.type == expected


def test_no_rows_make_an_empty_column_of_the_same_type():
    full, empty = to_arrow(OUTPUT), to_arrow(OUTPUT[:0])
    assert (len(empty), empty.type) == (0, full.type)
    assert pa.concat_arrays([empty, full]).to_pylist() == OUTPUT.tolist()


@pytest.mark.parametrize("output", [(OUTPUT,), "text", torch.tensor(1.0), None])
def test_an_output_that_is_no_tensor_of_rows_is_refused(output):
    with pytest.raises(ConfigError, match=r"output is .*one row per input row. Pass prediction=lambda"):
        Prediction.of(None, output)


def test_an_output_whose_first_dimension_is_not_the_row_is_refused_with_both_numbers():
    steps_first = torch.zeros(5, 2, 3)
    with pytest.raises(ConfigError, match=r"has 5 values for 2 input rows.*output\.transpose\(0, 1\)"):
        Prediction.of(None, steps_first, rows=2)
    assert Prediction.of(lambda output: output.transpose(0, 1), steps_first, rows=2).sql_type == "array<array<float>>"
    with pytest.raises(ConfigError, match=r"has 1 values for 2 input rows"):
        Prediction.of("argmax", torch.zeros(1, 3), rows=2)


def test_a_choice_that_means_nothing_is_refused():
    for choice in (None, "argmax", "probability", len):
        check_choice(choice)
    for choice in ("softmax", 3):
        with pytest.raises(ConfigError, match=r"prediction=.*'argmax', 'probability' or a callable"):
            check_choice(choice)


# --- what classifiers write beside the class

BOTH = ("probability", "raw_prediction")


def written(output, choice=None, vectors=BOTH):
    prediction = Prediction.of(choice, output, rows=len(output), vectors=vectors)
    return prediction, to_arrow(prediction.apply(output))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("choice", [None, "argmax", lambda output: output])
def test_a_classifier_writes_the_class_as_a_double_and_torchs_softmax(dtype, choice):
    output = OUTPUT.to(dtype)
    prediction, array = written(output, choice)
    assert (
        prediction.sql_type == "struct<prediction: double, probability: array<double>, raw_prediction: array<double>>"
    )
    vector = pa.list_(pa.float64())
    assert array.type == pa.struct({"prediction": pa.float64(), "probability": vector, "raw_prediction": vector})
    assert array.to_pylist() == [
        {
            "prediction": float(row.argmax()),
            "probability": row.softmax(0).double().tolist(),
            "raw_prediction": row.tolist(),
        }
        for row in output
    ]


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_logit_stands_for_two_classes(shape):
    logit = torch.tensor([2.0, -0.5, 0.0, 30.0], dtype=torch.float64)
    _, array = written(logit.reshape(shape))
    p = 1 / (1 + (-logit).exp())
    assert array.field("prediction").to_pylist() == [1.0, 0.0, 0.0, 1.0]
    assert array.field("raw_prediction").to_pylist() == [[-z, z] for z in logit.tolist()]
    expected = torch.stack([1 - p, p], 1)
    torch.testing.assert_close(torch.tensor(array.field("probability").to_pylist()).double(), expected)


def test_only_the_vectors_that_were_asked_for_are_written():
    prediction, array = written(OUTPUT, vectors=("raw_prediction",))
    assert prediction.sql_type == "struct<prediction: double, raw_prediction: array<double>>"
    assert [array.type.field(i).name for i in range(2)] == ["prediction", "raw_prediction"]
    assert len(to_arrow(prediction.apply(OUTPUT[:0]))) == 0


def test_a_callable_picks_the_scores_of_an_output_with_several_parts():
    prediction = Prediction.of(lambda pair: pair[1], (None, OUTPUT), rows=2, vectors=BOTH)
    assert to_arrow(prediction.apply((None, OUTPUT))).field("prediction").to_pylist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (OUTPUT.reshape(2, 3, 1), r"shape \(2, 3, 1\) and dtype float32"),
        (OUTPUT.long(), r"shape \(2, 3\) and dtype int64"),
        (OUTPUT > 0, r"dtype bool"),
        (torch.zeros(2, 0), r"shape \(2, 0\)"),
    ],
)
def test_an_output_that_cannot_be_scores_of_classes_is_refused_with_its_shape(output, why):
    with pytest.raises(ConfigError, match=why + r".*scores of the classes before softmax.*prediction=lambda"):
        Prediction.of(None, output, rows=2, vectors=BOTH)
    with pytest.raises(ConfigError, match=r"has 2 values for 3 input rows"):
        Prediction.of(None, OUTPUT, rows=3, vectors=BOTH)


def test_probability_as_the_prediction_contradicts_a_column_of_its_own():
    with pytest.raises(ConfigError, match=r"prediction='probability' with probability_col.*then holds the class"):
        Prediction.of("probability", OUTPUT, vectors=("probability",))


# -- outputs that are probabilities already ------------------------------------------------------------------------------

SIGMOIDS = torch.tensor([[0.1], [0.4], [0.6], [0.9]])
SOFTMAXES = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]])


def test_outputs_after_a_sigmoid_are_taken_as_probabilities_where_the_loss_says_so():
    known = scores_for(torch.nn.BCELoss())
    assert Prediction.of("argmax", SIGMOIDS, scores=known).apply(SIGMOIDS).tolist() == [0, 0, 1, 1]
    assert Prediction.of("probability", SIGMOIDS, scores=known).apply(SIGMOIDS).tolist() == SIGMOIDS.flatten().tolist()
    both = Prediction.of(None, SIGMOIDS, vectors=BOTH, scores=known).apply(SIGMOIDS)
    assert both["prediction"].tolist() == [0, 0, 1, 1]
    expected = torch.cat([1 - SIGMOIDS, SIGMOIDS], 1)
    torch.testing.assert_close(both["probability"], expected)
    logits = Prediction.of("argmax", SIGMOIDS, scores=scores_for(torch.nn.BCEWithLogitsLoss())).apply(SIGMOIDS)
    assert logits.tolist() == [1, 1, 1, 1], "as logits all are positive"


def test_rows_that_add_up_to_one_are_probabilities():
    assert torch.equal(Prediction.of("probability", SOFTMAXES).apply(SOFTMAXES), SOFTMAXES)
    both = Prediction.of(None, SOFTMAXES, vectors=BOTH).apply(SOFTMAXES)
    torch.testing.assert_close(both["probability"], SOFTMAXES)
    assert not torch.equal(Prediction.of("probability", 2 * SOFTMAXES).apply(2 * SOFTMAXES), 2 * SOFTMAXES)


@pytest.mark.parametrize(("choice", "vectors"), [("argmax", ()), ("probability", ()), (None, BOTH)])
def test_what_could_be_either_is_refused_with_the_remedy(choice, vectors):
    with pytest.raises(ConfigError, match=r"could be probabilities or logits.*nn\.BCELoss\(\)"):
        Prediction.of(choice, SIGMOIDS, vectors=vectors)
    Prediction.of(choice, SIGMOIDS - 0.5, vectors=vectors)
    Prediction.of(None, SIGMOIDS)


@pytest.mark.parametrize(
    ("loss", "known"),
    [
        (torch.nn.BCELoss(), "probability"),
        (functools.partial(torch.nn.functional.binary_cross_entropy, reduction="mean"), "probability"),
        (torch.nn.BCEWithLogitsLoss(), "logits"),
        (torch.nn.functional.cross_entropy, "logits"),
        (torch.nn.NLLLoss(), "logits"),
        (torch.nn.MSELoss(), None),
        (lambda o, y: o.mean(), None),
        (None, None),
    ],
)
def test_the_loss_tells_what_the_outputs_are(loss, known):
    assert scores_for(loss) == known


def test_a_complex_output_is_refused_and_not_cut():
    with pytest.raises(ConfigError, match=r"dtype complex64, and a column holds real numbers"):
        Prediction.of(None, torch.ones(2, dtype=torch.complex64))
