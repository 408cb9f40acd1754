"""A table of numbers and categories: feature stages of Spark ML, a network for them, and a small table to try both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["Mlp", "diabetes_dataframe", "feature_pipeline"]


class Mlp(nn.Module):
    """A network of linear layers for one number a row.

    Args:
        inputs: width of the feature vector.
        hidden: width of each hidden layer.
        depth: how many of them.
        dropout: share of their outputs that are dropped in training.
        mean: added to the output, with `scale`: so that the network learns numbers around 0.
        scale: multiplies the output.
    """

    def __init__(
        self,
        *,
        inputs: int,
        hidden: int = 64,
        depth: int = 2,
        dropout: float = 0.0,
        mean: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for layer in range(depth):
            layers += [nn.Linear(inputs if layer == 0 else hidden, hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden if depth else inputs, 1))
        self.mean = mean
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (rows, inputs) float32 to (rows,) float32."""
        outputs: Tensor = self.layers(features)
        return self.mean + self.scale * outputs.squeeze(1)


def feature_pipeline(*, numeric: Sequence[str], categorical: Sequence[str] = (), output: str = "features") -> Any:
    """The usual stages for a table: gaps filled by the median, categories one-hot, numbers scaled, all in one vector.

    Args:
        numeric: columns of numbers; nulls and NaN count as gaps.
        categorical: columns of strings; a value that was not in the training rows becomes all zeros.
        output: the vector column.

    Returns:
        An unfitted pyspark.ml.Pipeline.
    """
    from pyspark.ml import Pipeline
    from pyspark.ml.feature import Imputer, OneHotEncoder, StandardScaler, StringIndexer, VectorAssembler

    filled = [f"{name}__filled" for name in numeric]
    coded = [f"{name}__code" for name in categorical]
    hot = [f"{name}__hot" for name in categorical]
    stages: list[Any] = [Imputer(inputCols=list(numeric), outputCols=filled, strategy="median")]
    if categorical:
        stages += [
            StringIndexer(inputCols=list(categorical), outputCols=coded, handleInvalid="keep"),
            OneHotEncoder(inputCols=coded, outputCols=hot),
        ]
    stages += [
        VectorAssembler(inputCols=filled, outputCol="numbers"),
        StandardScaler(inputCol="numbers", outputCol="scaled", withMean=True),
        VectorAssembler(inputCols=["scaled", *hot], outputCol=output),
    ]
    return Pipeline(stages=stages)


def diabetes_dataframe(session: Any) -> Any:
    """Returns scikit-learn's bundled table: 442 patients, ten measured columns, `progression` after one year (25 to 346).

    One column is made a category and some values of another are taken out, as tables from the world have them.
    """
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)  # data (442, 10) float64, target (442,) float64
    names = [str(name) for name in table.feature_names]
    rows = []
    for number, (values, target) in enumerate(zip(table.data.tolist(), table.target.tolist(), strict=True)):
        row: dict[str, Any] = dict(zip(names, values, strict=True))
        row["sex"] = "first" if row["sex"] == 1 else "second"
        row["bmi"] = None if number % 40 == 0 else row["bmi"]
        rows.append((*(row[name] for name in names), target))
    columns = ", ".join(f"{name} {'string' if name == 'sex' else 'double'}" for name in names)
    return session.createDataFrame(rows, f"{columns}, progression double")
