"""The tables of the housing example, what is made of their columns, and a network for numbers that span magnitudes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparkdeep import register

__all__ = ["Regressor", "Table", "diabetes", "houses", "in_units"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows with a number to predict."""

    rows: Any
    """A DataFrame with the columns below."""
    target: str
    """What is predicted, positive."""
    unit: str
    numeric: tuple[str, ...]
    """Columns of numbers, perhaps with gaps."""
    categorical: tuple[str, ...]
    """Columns of strings."""
    derived: Mapping[str, str]
    """Further columns of numbers, as SQL expressions over the others."""


class Regressor(nn.Module):
    """Linear layers with SiLU between them, for one number a row; the width of the features is seen with the first rows.

    Args:
        hidden: width of each hidden layer.
        depth: how many of them.
        mean: of the targets; the network learns what is left.
    """

    def __init__(self, *, hidden: int = 192, depth: int = 3, mean: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LazyLinear(hidden), nn.SiLU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(hidden, hidden), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, 1))
        self.mean = mean

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (rows, inputs) float32 to logarithms (rows,) float32."""
        outputs: Tensor = self.layers(features)
        return self.mean + outputs.squeeze(1)


@register
def in_units(logarithms: Tensor) -> Tensor:
    """Maps predicted logarithms (rows,) to numbers in the target's unit."""
    return torch.exp(logarithms)


def houses(session: Any, folder: str) -> Table:
    """California's districts of 1990: housing.csv in `folder`, 20,640 rows, `total_bedrooms` with gaps."""
    path = Path(folder).resolve() / "housing.csv"
    rows = session.read.csv(path.as_uri() if path.exists() else f"{folder}/housing.csv", header=True, inferSchema=True)
    counts = ("total_rooms", "total_bedrooms", "population", "households", "median_income")
    return Table(
        rows=rows,
        target="median_house_value",
        unit="dollars",
        numeric=("longitude", "latitude", "housing_median_age", "median_income"),
        categorical=("ocean_proximity",),
        derived={
            **{f"log_{name}": f"ln({name})" for name in counts},  # they span four magnitudes
            "log_rooms_each": "ln(total_rooms / households)",
            "log_bedrooms_share": "ln(total_bedrooms / total_rooms)",
            "log_people_each": "ln(population / households)",
            # The coast runs from north-west to south-east, and prices fall with the distance from three cities.
            "northeast": "longitude + latitude",
            "log_to_san_francisco": "ln(0.1 + hypot(longitude + 122.42, latitude - 37.77))",
            "log_to_los_angeles": "ln(0.1 + hypot(longitude + 118.24, latitude - 34.05))",
            "log_to_san_diego": "ln(0.1 + hypot(longitude + 117.16, latitude - 32.72))",
        },
    )


def diabetes(session: Any) -> Table:
    """scikit-learn's bundled patients: 442 rows, a category, a column with gaps."""
    from tabular import diabetes_dataframe

    numeric = ("age", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
    return Table(
        rows=diabetes_dataframe(session),
        target="progression",
        unit="points",
        numeric=numeric,
        categorical=("sex",),
        derived={"log_bmi": "ln(bmi)", "log_s3": "ln(s3)"},
    )
