"""The digits example: scikit-learn's bundled images as a DataFrame, and a small convolutional network for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Net", "digits_dataframe"]

_SIDE = 8
_CLASSES = 10


class Net(nn.Module):
    """Two convolutions and two linear layers.

    Args:
        channels: of the first convolution; the second has twice as many.
        hidden: width of the linear layer before the last.
    """

    def __init__(self, *, channels: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * channels * (_SIDE // 2) ** 2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, _CLASSES),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Maps pixels (rows, 64) float32 to scores (rows, 10) float32."""
        scores: Tensor = self.layers(pixels.reshape(-1, 1, _SIDE, _SIDE).to(torch.float32))
        return scores


def digits_dataframe(session: Any) -> Any:
    """Returns the 1797 images: `pixels` array<float> of 64 values in 0..1, `label` bigint in 0..9."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # (1797, 64) float64, whole numbers in 0..16; (1797,) int64
    # Whole numbers on the way to the JVM: a fifth of the bytes of as many doubles.
    rows = [(image.astype(int).tolist(), int(label)) for image, label in zip(images, labels, strict=True)]
    whole = session.createDataFrame(rows, "pixels array<int>, label bigint")
    return whole.selectExpr("transform(pixels, p -> float(p / 16)) AS pixels", "label")
