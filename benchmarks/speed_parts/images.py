"""Handwritten digits as arrays, and a small convolutional network for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Convnet", "Images", "accuracy", "load_images"]

_TEST_SHARE: Final = 0.2


@final
@dataclass(frozen=True, kw_only=True)
class Images:
    """Square gray images, shuffled once, with a held-out fifth at the end."""

    name: str
    pixels: np.ndarray
    """(rows, side * side) float32 in 0..1."""
    labels: np.ndarray
    """(rows,) int64 in 0..9."""
    train_rows: int
    """Rows before the held-out ones; even."""

    @property
    def side(self) -> int:
        """Pixels a row."""
        return math.isqrt(self.pixels.shape[1])

    def tensors(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows start..stop as tensors."""
        return torch.from_numpy(self.pixels[start:stop]), torch.from_numpy(self.labels[start:stop])


def load_images(data: Path | None) -> Images:
    """MNIST's 10,000 from `data`/mnist10k.parquet (pixels 0..255), else scikit-learn's 1,797 of 8 x 8 (0..16)."""
    if data is not None:
        import pyarrow.parquet as pq

        table = pq.read_table(data / "mnist10k.parquet").combine_chunks()
        labels = table["label"].to_numpy()
        values = table["pixels"].chunk(0).values.to_numpy(zero_copy_only=False)
        name, pixels = "mnist10k", values.reshape(len(labels), -1).astype(np.float32) / 255
    else:
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        name, pixels = "scikit-learn's digits", values.astype(np.float32) / 16
    order = np.random.default_rng(0).permutation(len(labels))
    train_rows = 2 * int(len(labels) * (1 - _TEST_SHARE) / 2)
    return Images(name=name, pixels=pixels[order], labels=labels[order].astype(np.int64), train_rows=train_rows)


class Convnet(nn.Module):
    """Two convolutions, each halving the side, and a linear layer.

    Args:
        side: of the square images.
        channels: of the first convolution; the second has twice as many.
    """

    def __init__(self, side: int, channels: int = 16) -> None:
        super().__init__()
        self.side = side
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * channels * (side // 4) ** 2, 10),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Maps pixels (rows, side * side) float32 to scores (rows, 10) float32."""
        scores: Tensor = self.layers(pixels.reshape(-1, 1, self.side, self.side))
        return scores


def accuracy(output: Tensor, label: Tensor) -> Tensor:
    """Share of rows whose largest score is at the label."""
    return (output.argmax(1) == label).float().mean()
