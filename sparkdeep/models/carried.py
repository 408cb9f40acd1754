"""State beside the trained parameters, which rounds carry: buffers, extra state, frozen parameters that change, declared attributes."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from sparkdeep.errors import ConfigError, ProtocolError
from sparkdeep.models.keras import KerasNetwork
from sparkdeep.models.program import Program, other_modules
from sparkdeep.models.spectral import old_spectral_norm
from sparkdeep.tensors.parameters import variances_of
from sparkdeep.tensors.pooling import TREE, Pooling, Rule, check_rule
from sparkdeep.tensors.state_dicts import pack, unpack

__all__ = ["Carried", "declared_rule", "pooling_of", "prefixed_modules"]

_SAMPLE: Final = 1 << 12
"""Elements of a frozen parameter that are looked at after a round, for changes that torch does not count."""


def prefixed_modules(program: Program) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a program with the prefix of its names: the model's own, then those of the loss and the like, "loss:"."""
    own = {id(module) for module in program.model.modules()}
    for name, module in program.model.named_modules():
        yield f"{name}." if name else "", module
    for where, other in sorted(other_modules(program).items()):
        if where.startswith("metrics"):  # begun anew at each validation
            continue
        for name, module in other.named_modules():
            if id(module) not in own:
                own.add(id(module))
                yield f"{where}:{name}." if name else f"{where}:", module


def declared_rule(program: Program, name: str) -> Rule | None:
    """What `buffers=` says of a name: the first pattern that matches."""
    for pattern, rule in (program.buffers or {}).items():
        if fnmatch.fnmatchcase(name, pattern):
            return rule
    return None


@final
class Carried:
    """Reads the state of a replica's program, and writes it.

    Frozen parameters are carried from the first round on in which they change, as a teacher's do that follows the trained ones.
    Extra state (`get_extra_state`) travels as a packed tree of tensors, numbers and strings.

    Args:
        program: its modules stay the same; buffers may come, go and change their shapes.
    """

    def __init__(self, program: Program) -> None:
        self._modules = list(prefixed_modules(program))
        self._extra = [
            (prefix, m) for prefix, m in self._modules if type(m).get_extra_state is not nn.Module.get_extra_state
        ]
        self._attributes = [
            (f"{prefix}{key}", module, key)
            for prefix, module in (self._modules if program.buffers else [])
            for key, value in vars(module).items()
            if isinstance(value, Tensor | int | float) and not key.startswith("_") and key != "training"
            if declared_rule(program, f"{prefix}{key}") not in {None, "local"}
        ]
        frozen = {
            id(p): (f"{prefix}{key}", p)
            for prefix, m in reversed(self._modules)
            for key, p in m._parameters.items()
            if p is not None and not p.requires_grad
        }
        self._frozen = dict(frozen.values())
        self._moving: set[str] = set()
        self._given: Mapping[str, Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        self.settle()

    def settle(self) -> None:
        """The frozen parameters are what a round begins with."""
        self._marks = {name: _mark(parameter) for name, parameter in self._frozen.items()}

    def _buffers(self) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        seen = set()
        for prefix, module in self._modules:
            for key, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    yield f"{prefix}{key}", module, key, buffer

    def read(self) -> dict[str, Tensor]:
        """Copies of all that is carried, on the CPU and contiguous, by name.

        Raises:
            ConfigError: extra state holds what cannot travel without pickle, or a buffer is sparse.
        """
        state = {name: _kept(name, buffer) for name, _, _, buffer in self._buffers()}
        for name, parameter in self._frozen.items():
            if name in self._moving or _mark(parameter) != self._marks[name]:
                self._moving.add(name)
                state[name] = _kept(name, parameter)
        for prefix, module in self._extra:
            state[f"{prefix}{TREE}"] = _packed(prefix, module)
        for name, module, key in self._attributes:
            value = vars(module)[key]
            state[name] = _kept(name, value if isinstance(value, Tensor) else _number(value))
        return state

    @torch.no_grad()
    def write(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `read` gave; buffers that it has not are None afterwards.

        Raises:
            ConfigError: a module does not take its extra state.
            ProtocolError: a BatchNorm's statistics are missing, or of another shape.
        """
        own = {name: (module, key, buffer) for name, module, key, buffer in self._buffers()}
        empty = {
            f"{prefix}{key}": (m, key) for prefix, m in self._modules for key, b in m._buffers.items() if b is None
        }
        for name, (module, key, buffer) in own.items():
            alike = name in state and (buffer.shape, buffer.dtype) == (state[name].shape, state[name].dtype)
            if alike:
                buffer.copy_(state[name])
            elif isinstance(module, _NormBase):  # whose buffers neither come and go nor change their shape
                shape = tuple(state[name].shape) if name in state else None
                raise ProtocolError(f"the buffer {name!r} came as {shape}; the model's is {tuple(buffer.shape)}.")
            elif name not in state:
                module._buffers[key] = None
            else:
                module._buffers[key] = state[name].to(buffer.device, copy=True)
        for name, (module, key) in empty.items():
            if name in state:
                module._buffers[key] = state[name].clone()
        for name, parameter in self._frozen.items():
            if name in state:
                self._moving.add(name)
                parameter.copy_(state[name])
        self.settle()
        for prefix, module in self._extra:
            if f"{prefix}{TREE}" in state:
                _give(prefix, module, state[f"{prefix}{TREE}"])
        for name, module, key in self._attributes:
            if name in state:
                before = vars(module)[key]
                vars(module)[key] = (
                    state[name].to(before.device, copy=True) if isinstance(before, Tensor) else state[name].item()
                )
        self._given = state
        self._versions = {name: (id(buffer), buffer._version) for name, _, _, buffer in self._buffers()}

    def spoiled(self) -> bool:
        """Whether a buffer has become NaN or infinite since it was written; one that was so before is meant to be."""
        for name, _, _, buffer in self._buffers():
            changed = self._versions.get(name) != (id(buffer), buffer._version)
            if changed and not _finite(buffer) and (name not in self._given or _finite(self._given[name])):
                return True
        return False


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(tensor).all())


def _mark(parameter: Tensor) -> tuple[int, float, float]:
    """What differs once a parameter was written to: torch's count of in-place changes, and sums over some of its elements."""
    flat = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // _SAMPLE)]
    if flat.is_floating_point() or flat.is_complex():
        flat = torch.view_as_real(flat) if flat.is_complex() else flat
        wide = flat.double()
        return parameter._version, float(wide.sum()), float(wide.square().sum())
    return parameter._version, float(flat.double().sum()), 0.0


def _kept(name: str, tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConfigError(
            f"{name!r} is a tensor of layout {tensor.layout}, which rounds do not carry: keep its dense form, or its indices and values."
        )
    return tensor.detach().resolve_conj().resolve_neg().to("cpu", copy=True).contiguous()


def _number(value: float) -> Tensor:
    kind = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float64
    return torch.tensor(value, dtype=kind)


def _packed(prefix: str, module: nn.Module) -> Tensor:
    try:
        data = pack(module.get_extra_state())
    except TypeError as error:
        raise ConfigError(
            f"get_extra_state() of {prefix.rstrip('.') or 'the model'} ({type(module).__name__}): {error} Replicas send no pickle."
        ) from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _give(prefix: str, module: nn.Module, data: Tensor) -> None:
    try:
        module.set_extra_state(unpack(bytes(data.numpy())))
    except RuntimeError as error:
        raise ConfigError(
            f"set_extra_state() of {prefix.rstrip('.') or 'the model'} ({type(module).__name__}) failed: {error}. A module with "
            "get_extra_state() needs it."
        ) from error


# -- the rules of torch's own modules ------------------------------------------------------------------------------------


def _known_rules(module: nn.Module) -> dict[str, Rule]:
    """What is known of the buffers of a module of torch's: name -> rule."""
    names = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.")}
    rules: dict[str, Rule] = {}
    moving = names & {"MovingAverageMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"}  # which take the mean
    if names & {"MinMaxObserver", "PerChannelMinMaxObserver"} and not moving:
        rules = {"min_val": "min", "max_val": "max"}
    if "FakeQuantizeBase" in names:
        rules |= dict.fromkeys(("scale", "zero_point", "fake_quant_enabled", "observer_enabled"), "first")
    if isinstance(module, _SpectralNorm):
        rules |= {"_u": "first", "_v": "first"}
    for hook in old_spectral_norm(module):
        rules |= {f"{hook.name}_u": "first", f"{hook.name}_v": "first"}
    return rules


def pooling_of(program: Program) -> Pooling:
    """The rules of a program's state: those that were declared, then those of torch's own modules.

    Raises:
        ConfigError: one that was declared is no rule.
    """
    rules: dict[str, Rule] = {}
    variance_of: dict[str, str] = {}
    for pattern, rule in (program.buffers or {}).items():
        check_rule(pattern, rule)
    for prefix, module in prefixed_modules(program):
        rules |= {f"{prefix}{key}": rule for key, rule in _known_rules(module).items()}
        if not prefix or prefix.endswith(":"):
            variance_of |= {f"{prefix}{var}": f"{prefix}{mean}" for var, mean in variances_of(module).items()}
        for key in [*module._buffers, *vars(module), *module._parameters, TREE]:
            declared = declared_rule(program, f"{prefix}{key}")
            if declared is not None:
                rules[f"{prefix}{key}"] = declared
    known = {f"{prefix}{key}" for prefix, module in prefixed_modules(program) for key in _pooled_by_torch(module)}
    return Pooling(rules=rules, variance_of=variance_of, known=frozenset(known))


def _pooled_by_torch(module: nn.Module) -> list[str]:
    return list(module._buffers) if isinstance(module, _NormBase | KerasNetwork) else []
