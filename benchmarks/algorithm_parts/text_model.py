"""A small GPT over characters: pre-norm blocks, learned positions, causal attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "next_token_loss"]


class Block(nn.Module):
    """Attention and a perceptron, each on a normalized copy of the stream and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Maps (rows, positions, width) to the same."""
        rows, positions, width = stream.shape
        parts = self.qkv(self.norm_1(stream)).view(rows, positions, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (rows, heads, positions, width / heads)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.out(seen.transpose(1, 2).reshape(rows, positions, width))
        added: Tensor = stream + self.down(F.gelu(self.up(self.norm_2(stream))))
        return added


class GPT(nn.Module):
    """Scores of the next character at every position.

    Args:
        vocabulary: characters.
        context: positions at most.
        width: of the stream.
        layers: blocks.
        heads: of attention; divides `width`.
    """

    def __init__(self, *, vocabulary: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # The writers into the stream are scaled down, as in GPT-2, so that its size does not grow with depth.
                into_stream = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if into_stream else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (rows, positions) integer to scores (rows, positions, vocabulary) float32."""
        stream = self.characters(tokens.long()) + self.positions[: tokens.shape[1]]
        scores: Tensor = self.head(self.norm(self.blocks(stream)))
        return scores


def next_token_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of (rows, positions, vocabulary) at (rows, positions), in nats a character."""
    return F.cross_entropy(scores.flatten(0, 1), targets.long().flatten())
