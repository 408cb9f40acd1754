"""State beside the trained parameters, of all replicas, becomes one: a rule for each name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, cast, final, get_args

import torch
from torch import Tensor

from sparkdeep.errors import ConfigError, UserCodeError
from sparkdeep.tensors.mean import reduced_weights
from sparkdeep.tensors.state_dicts import pack, unpack

__all__ = ["Elementwise", "Pooling", "Rule", "check_rule"]

_Word: TypeAlias = Literal["mean", "ema", "sum", "max", "min", "first", "local"]
Rule: TypeAlias = "_Word | Callable[[list[Tensor], list[float]], Tensor]"
"""How a state becomes one: a word, or a function of the replicas' tensors, each of its state's shape, and their weights."""
Elementwise: TypeAlias = Callable[[Tensor, Sequence[float]], Tensor]
"""(replicas, ...) in float64 and the replicas' weights -> (...)."""

_WORDS: Final = get_args(_Word)
TREE: Final = "_extra_state"
"""How names end whose tensor holds a packed tree, and not numbers."""


def check_rule(name: str, rule: object) -> None:
    """Refuse what is no rule.

    Raises:
        ConfigError: with the rules that there are.
    """
    if not callable(rule) and rule not in _WORDS:
        raise ConfigError(
            f"buffers={{{name!r}: {rule!r}}}: a rule is one of {', '.join(map(repr, _WORDS))}, or a function of (tensors, weights)."
        )


def _mean(values: Tensor, weights: Sequence[float]) -> Tensor:
    result = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        result += weight * value
    return result / sum(weights)


@final
@dataclass(frozen=True, kw_only=True)
class Pooling:
    """The rules of a run.

    Args:
        rules: name -> rule; without one real and complex numbers take the mean, whole numbers and booleans the maximum.
        variance_of: names of running variances -> the running mean they belong to: they are those of the joined rows.
        elementwise: what takes the place of the mean, as an aggregator has it; None: the mean.
    """

    rules: Mapping[str, Rule] = field(default_factory=dict)
    variance_of: Mapping[str, str] = field(default_factory=dict)
    elementwise: Elementwise | None = None
    known: frozenset[str] = frozenset()
    """Names that need no rule of their own: those of BatchNorm and its kin."""

    def unknown(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
        """Names of state that a round has changed, and of which nothing says what it becomes."""
        ruled = self.known | self.rules.keys() | self.variance_of.keys() | set(self.variance_of.values())
        return [
            name for name, value in sorted(after.items()) if name not in ruled and not _same(before.get(name), value)
        ]

    def pool(
        self, replicas: Sequence[Mapping[str, Tensor]], weights: Sequence[float], start: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """One state from those of the replicas whose weight is positive.

        Computed in float64, and rounded once to the state's dtype; of a lone replica nothing is computed.

        Args:
            replicas: name -> tensor, of each.
            weights: one a replica, >= 0, not all 0.
            start: what the round began with.

        Raises:
            ConfigError: the replicas' tensors have different shapes, and the rule does not choose one.
            UserCodeError: a rule that is a function raised.
        """
        counted = [(b, w) for b, w in zip(replicas, reduced_weights(weights), strict=True) if w > 0]
        names = dict.fromkeys(name for own, _ in counted for name in own)
        return {name: self._pooled(name, counted, start) for name in names}

    def _pooled(
        self, name: str, counted: Sequence[tuple[Mapping[str, Tensor], float]], start: Mapping[str, Tensor]
    ) -> Tensor:
        having = [(own, weight) for own, weight in counted if name in own]
        values, weights = [own[name] for own, _ in having], [weight for _, weight in having]
        if len(values) == 1:
            return values[0]
        rule = self.rules.get(name)
        if rule in {"first", "local"}:
            return values[0]
        if name.endswith(TREE) and rule is None:
            return _pooled_tree(values, weights)
        if len({(value.shape, value.dtype) for value in values}) > 1:
            shapes = [tuple(value.shape) for value in values[:4]]
            raise ConfigError(
                f"the buffer {name!r} has the shapes {shapes} on the replicas, which cannot be averaged. Say what it becomes: "
                f"buffers={{{name!r}: 'first'}}, or a function of (tensors, weights)."
            )
        if callable(rule):
            return _called(name, rule, values, weights)
        return self._by_word(name, rule, values, weights, having, start.get(name))

    def _by_word(
        self,
        name: str,
        word: str | None,
        values: list[Tensor],
        weights: list[float],
        having: Sequence[tuple[Mapping[str, Tensor], float]],
        start: Tensor | None,
    ) -> Tensor:
        first = values[0]
        real = first.is_floating_point() or first.is_complex()
        if word == "sum":
            return _summed(values, start)
        if word in {"max", "min"} or (word is None and not real):
            stacked = torch.stack([_wide(value) for value in values])
            return (stacked.amin(0) if word == "min" else stacked.amax(0)).to(first.dtype)
        wide = torch.complex128 if first.is_complex() else torch.float64
        elementwise = None if first.is_complex() else self.elementwise
        if name in self.variance_of and elementwise is None and word is None:
            means = torch.stack([own[self.variance_of[name]].to(wide) for own, _ in having])
            apart = (means - _mean(means, weights)).square()
            values = [value.to(wide) + distance for value, distance in zip(values, apart, strict=True)]
        pooled = (elementwise or _mean)(torch.stack([value.to(wide) for value in values]), weights)
        if not real:
            pooled = pooled.round()
        return pooled.to(first.dtype)


def _same(before: Tensor | None, after: Tensor) -> bool:
    if before is None or before.shape != after.shape or before.dtype != after.dtype:
        return False
    return torch.allclose(before, after, rtol=0.0, atol=0.0, equal_nan=True)  # NaN that stays is no change


def _wide(value: Tensor) -> Tensor:
    """Whole numbers in a dtype that torch can compare: it cannot all unsigned ones."""
    return value if value.is_floating_point() or value.dtype in {torch.int64, torch.uint64} else value.to(torch.int64)


def _summed(values: Sequence[Tensor], start: Tensor | None) -> Tensor:
    """What the round began with, and what each replica added to it."""
    first = values[0]
    wide = torch.float64 if first.is_floating_point() else torch.complex128 if first.is_complex() else torch.int64
    begun = torch.zeros_like(first, dtype=wide) if start is None or start.shape != first.shape else start.to(wide)
    total = begun.clone()
    for value in values:
        total += value.to(wide) - begun
    return total.to(first.dtype)


def _called(
    name: str, rule: Callable[[list[Tensor], list[float]], Tensor], values: list[Tensor], weights: list[float]
) -> Tensor:
    try:
        pooled = rule(values, weights)
    except Exception as error:
        raise UserCodeError(
            f"the rule of buffers={{{name!r}: ...}} raised {type(error).__name__}: {error} for {len(values)} tensors of shape "
            f"{tuple(values[0].shape)}"
        ) from error
    if not isinstance(pooled, Tensor):
        raise ConfigError(
            f"the rule of buffers={{{name!r}: ...}} gave a {type(pooled).__name__}; it must give a tensor."
        )
    return pooled.detach().to("cpu", values[0].dtype)


def _pooled_tree(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Extra state, leaf by leaf: numbers and tensors by the rules without a name, anything else the first replica's."""
    trees = [unpack(bytes(value.numpy())) for value in values]
    return torch.frombuffer(bytearray(pack(_leaf(trees, weights))), dtype=torch.uint8)


def _leaf(trees: Sequence[object], weights: Sequence[float]) -> object:
    first = trees[0]
    if isinstance(first, dict) and all(isinstance(t, dict) and t.keys() == first.keys() for t in trees):
        return {key: _leaf([cast("dict[object, object]", t)[key] for t in trees], weights) for key in first}
    if isinstance(first, list | tuple) and all(isinstance(t, type(first)) and len(t) == len(first) for t in trees):
        return type(first)(_leaf(list(own), weights) for own in zip(*cast("list[list[object]]", trees), strict=True))
    if isinstance(first, bool) or not all(type(t) is type(first) for t in trees):
        return first
    if isinstance(first, int | float):
        numbers = [
            torch.tensor(cast("float", t), dtype=torch.float64 if isinstance(first, float) else torch.int64)
            for t in trees
        ]
        return _alike(numbers, weights).item()
    same = isinstance(first, Tensor) and len({(t.shape, t.dtype) for t in cast("list[Tensor]", trees)}) == 1
    return _alike(cast("list[Tensor]", list(trees)), weights) if same else first


def _alike(values: list[Tensor], weights: Sequence[float]) -> Tensor:
    return Pooling().pool([{"": value} for value in values], weights, {})[""]
