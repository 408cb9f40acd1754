"""A Keras 3 model on the torch backend as a torch module: stable names, Keras's own state as buffers, train and eval."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, final

from torch import Tensor, nn

from sparkdeep.errors import ConfigError
from sparkdeep.models.generators import forked

__all__ = ["KerasNetwork", "choose_keras_backend", "is_keras"]


def is_keras(value: Any) -> bool:
    """Whether `value` is a Keras layer or model, without importing Keras."""
    return "keras" in sys.modules and any(
        base.__name__ == "Layer" and base.__module__.split(".")[0] == "keras" for base in type(value).__mro__
    )


@final
class KerasNetwork(nn.Module):
    """A Keras model whose variables are this module's parameters (trained) and buffers (moving averages, seeds).

    Keras names its variables anew with every copy, and follows its own `training` argument and not `train()`: here
    they are numbered, and `training` is this module's.

    Attributes:
        network: the Keras model itself; its variables share this module's memory.
    """

    network: Any
    _variables: dict[str, Any]

    def __init__(self, network: Any) -> None:
        super().__init__()
        # Held where torch does not look: as a child, its variables would be found a second time, under Keras's names.
        self.__dict__["network"] = network
        self.__dict__["_variables"] = _named_variables(network)
        for name, variable in self._variables.items():
            value = variable.value
            if value.requires_grad:
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value.detach())
        self._link()

    @classmethod
    def of(cls, network: Any) -> KerasNetwork:
        """The wrapper of a model as the user built it.

        Raises:
            ConfigError: Keras runs on another backend, the model has no variables yet, or cannot be built again.
        """
        name = type(network).__name__
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"{name} is a Keras model on another backend than torch. Set KERAS_BACKEND=torch in the environment before "
                "keras is imported."
            )
        if not network.built:
            raise ConfigError(
                f"{name} is not built yet and so has no variables: start it with keras.Input(shape), or call it on a batch once."
            )
        return cls(network)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output; dropout and moving averages follow `train()` or `eval()`; named inputs by name."""
        if not kwargs:
            return self.network(*args, training=self.training)
        tensors = getattr(self.network, "inputs", None)
        if tensors is None:  # a subclassed model: named arguments of call()
            return self.network(*args, **kwargs, training=self.training)
        structure = getattr(self.network, "_inputs_struct", None)
        names = list(structure) if isinstance(structure, dict) else [tensor.name for tensor in tensors]
        if set(kwargs) != set(names):
            raise ConfigError(f"feature_cols names the inputs {sorted(kwargs)}; the Keras model's are {sorted(names)}.")
        given = [kwargs[name] for name in names]
        inputs = kwargs if isinstance(structure, dict) else given[0] if len(given) == 1 else given
        return self.network(inputs, training=self.training)

    def variance_of(self) -> dict[str, str]:
        """Names of moving variances -> the moving mean that each belongs to, so that they can be pooled exactly."""
        names = {variable.path: name for name, variable in self._variables.items()}
        ending = "/moving_variance"
        return {
            name: names[mean]
            for path, name in names.items()
            if path.endswith(ending) and (mean := path.removesuffix(ending) + "/moving_mean") in names
        }

    def _link(self) -> None:
        for name, variable in self._variables.items():
            value: Any = self._parameters.get(name)
            variable._value = self._buffers[name] if value is None else value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KerasNetwork:
        super()._apply(fn, recurse)
        self._link()  # a buffer that moved to another device is another tensor
        return self

    def __reduce__(self) -> Any:
        config = import_module("keras").saving.serialize_keras_object(self.network)
        config.pop("compile_config", None)
        trained = [name for name, _ in self.named_parameters()]
        rebuilt = import_module("sparkdeep.keras_network")._rebuilt  # by the name that pickles hold
        return rebuilt, (config, _own_classes(self.network), trained, self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> KerasNetwork:
        build, arguments = self.__reduce__()
        copied: KerasNetwork = build(*arguments)
        self.check_rebuilt(copied)
        copied.load_state_dict(self.state_dict())
        memo[id(self)] = copied
        return copied

    def check_rebuilt(self, other: KerasNetwork) -> None:
        """Refuse a network that is another one once it is built again from its configuration.

        Raises:
            ConfigError: with the numbers of variables.
        """
        here, there = self.state_dict(), other.state_dict()
        if [(n, t.shape) for n, t in here.items()] != [(n, t.shape) for n, t in there.items()]:
            raise ConfigError(
                f"{type(self.network).__name__} cannot be built again from its get_config(): {len(here)} variables became "
                f"{len(there)}, or others. Return every argument of its layers from get_config()."
            )


def _named_variables(network: Any) -> dict[str, Any]:
    """Variables by number and own name: their paths change with every copy, their order does not."""
    return {f"{index}/{variable.name}": variable for index, variable in enumerate(network.variables)}


def _own_classes(network: Any) -> dict[str, type]:
    """Classes that Keras does not bring along, by name."""
    classes = {type(part) for part in (network, *network._flatten_layers(include_self=False, recursive=True))}
    return {cls.__name__: cls for cls in classes if cls.__module__.split(".")[0] != "keras"}


def _rebuilt(config: Any, classes: dict[str, type], trained: list[str], training: bool) -> KerasNetwork:
    choose_keras_backend("torch")
    with forked():
        network = import_module("keras").saving.deserialize_keras_object(config, custom_objects=classes)
    for name, variable in _named_variables(network).items():
        variable.value.requires_grad_(name in trained)
    return KerasNetwork(network).train(training)


def choose_keras_backend(backend: str) -> None:
    """Have Keras use `backend` in this process; Keras decides that when it is first imported.

    Raises:
        ConfigError: it was imported already, with another one.
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = backend
        return
    given = sys.modules["keras"].backend.backend()
    if given != backend:
        raise ConfigError(
            f"Keras was imported with the backend {given!r} in this process, and the model needs {backend!r}: set "
            f"KERAS_BACKEND={backend} before keras is imported, on executors by spark.executorEnv.KERAS_BACKEND={backend}."
        )


_rebuilt.__module__ = "sparkdeep.keras_network"
