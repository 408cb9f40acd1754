"""A model folder: weights as safetensors, what they are as JSON, and, only if asked for, a pickle.

model.safetensors    parameters and persistent buffers; tied ones once
metadata.json        written last: format, reference, aliases, caller's metadata, length and SHA-256 of each file
model.pkl            only if the class has no name that could be resolved; read only with trust_pickle=True
"""

from __future__ import annotations

import inspect
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import cloudpickle
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparkdeep.errors import ConfigError, ModelLoadError
from sparkdeep.models.building import adopt
from sparkdeep.models.generators import forked
from sparkdeep.models.registry import ModelReference, import_factory, resolve
from sparkdeep.storage.manifest import (
    MAX_MANIFEST_BYTES,
    DamagedError,
    FileEntry,
    decode,
    encode,
    plain_json,
    read_bounded,
)
from sparkdeep.storage.store import JSON, Store
from sparkdeep.versions import stamp

__all__ = ["read_model", "read_reference", "write_model"]

FORMAT_VERSION = 2
MAX_HEADER_BYTES = 64 << 20
_SMALL_BYTES = 1 << 22

_WEIGHTS, _METADATA, _PICKLE = "model.safetensors", "metadata.json", "model.pkl"
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
)


def write_model(
    store: Store,
    module: nn.Module,
    *,
    reference: ModelReference | None,
    meta: Mapping[str, JSON],
    pickled: bytes | None = None,
) -> None:
    """Write `module` to the folder `store`, replacing a model that is there.

    Until this returns the folder holds no model that `read_model` accepts.

    Args:
        store: the folder.
        module: its state dict is stored with its dtypes; every entry must be a dense, initialized tensor.
        reference: how the module can be built again, or None.
        meta: the caller's own JSON values, returned by `read_model`.
        pickled: cloudpickle bytes of the module, or of a factory of it, for modules without a reference.

    Raises:
        ConfigError: an entry of the state dict or of `meta` cannot be stored; nothing was written.
        OSError: the store refused.
    """
    tensors, aliases = _stored_state(module)
    files: dict[str, bytes] = {_WEIGHTS: safetensors.torch.save(tensors)}
    if pickled is not None:
        files[_PICKLE] = pickled
    metadata = encode(
        {
            "format_version": FORMAT_VERSION,
            "reference": None if reference is None else reference.to_json(),
            "aliases": aliases,
            "meta": plain_json("meta", meta),
            "files": {name: FileEntry.of(data).to_json() for name, data in files.items()},
            **stamp(),
        }
    )
    store.delete(_METADATA)  # so that a crash leaves no mixture of two models
    store.delete(_PICKLE)
    for name, data in files.items():
        store.write(name, data)
    store.write(_METADATA, metadata)


def read_model(
    store: Store,
    *,
    model: nn.Module | Callable[..., Any] | str | None = None,
    allow_modules: Sequence[str] = (),
    trust_pickle: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the module again and fill it from the folder `store`; returns it and the caller's metadata.

    The module comes from `model` if given; else from the stored reference, as far as `registry.resolve` allows; else,
    with `trust_pickle`, from the stored pickle. The stored arguments are passed to a class or function that takes
    them. The result is on the CPU, in evaluation mode, with the dtypes that were stored.

    Args:
        store: the folder.
        model: an nn.Module subclass, a factory, "package.module:factory", or an instance, which is filled in place.
        allow_modules: modules and packages whose code a stored name may import and call.
        trust_pickle: run the folder's pickle, which can do anything that you can.

    Raises:
        ModelLoadError: a file is missing or damaged, the rules refuse, or the tensors do not fit the module.
        OSError: the store could not be read.
    """
    try:
        return _read_model(store, model, allow_modules, trust_pickle)
    except DamagedError as exc:
        raise ModelLoadError(
            f"{store.uri} is no intact saved model: {exc}; save it again, or restore the folder from a copy"
        ) from exc


def read_reference(store: Store) -> ModelReference | None:
    """How the model in the folder `store`, already read, can be built again; a copy of it should say the same."""
    stored = decode(read_bounded(store, _METADATA, MAX_MANIFEST_BYTES)).get("reference")
    return None if stored is None else ModelReference.from_json(stored)


def _read_model(store: Store, model: Any, allow_modules: Sequence[str], trust_pickle: bool) -> tuple[nn.Module, Any]:
    try:
        body = decode(read_bounded(store, _METADATA, MAX_MANIFEST_BYTES))
    except DamagedError as exc:
        raise DamagedError(f"{_METADATA}: {exc}") from exc
    if body.get("format_version") != FORMAT_VERSION:
        raise ModelLoadError(
            f"{store.uri} has format {str(body.get('format_version'))[:40]}; this sparkdeep reads format "
            f"{FORMAT_VERSION}. Load it with the version that wrote it: {str(body.get('versions'))[:200]}"
        )
    files, aliases, meta = (body.get(key) for key in ("files", "aliases", "meta"))
    if not isinstance(files, dict) or not isinstance(aliases, dict) or not isinstance(meta, dict):
        raise DamagedError(f"{_METADATA}: files, aliases and meta must be JSON objects")
    state = _read_weights(FileEntry.from_json(_WEIGHTS, files.get(_WEIGHTS)).read(store, _WEIGHTS))
    for alias, kept in aliases.items():
        if not isinstance(kept, str) or kept not in state or alias in state:
            raise DamagedError(f"{_METADATA}: alias {alias[:100]!r} of {str(kept)[:100]!r} does not fit {_WEIGHTS}")
        state[alias] = state[kept]
    stored = body.get("reference")
    reference = None if stored is None else ModelReference.from_json(stored)

    def unpickle() -> Any:
        data = FileEntry.from_json(_PICKLE, files.get(_PICKLE)).read(store, _PICKLE)
        # The one place where a file's own code runs: only after the caller has written trust_pickle=True.
        return cloudpickle.loads(data)

    source = _source(store, model, reference, allow_modules, unpickle if trust_pickle and _PICKLE in files else None)
    module: nn.Module = adopt(_build(source, reference, sum(value.nbytes for value in state.values())))
    _fill(module, state)
    return module.cpu().eval(), meta


def _source(
    store: Store,
    model: Any,
    reference: ModelReference | None,
    allow_modules: Sequence[str],
    unpickle: Callable[[], Any] | None,
) -> Any:
    """Return the module or factory to use, by the order that `read_model` gives."""
    if model is not None:
        return import_factory(model) if isinstance(model, str) else model
    if reference is None:
        if unpickle is None:
            raise ModelLoadError(
                f"{store.uri} does not name its model's class: load with model=Net (the class, a factory or an "
                "instance), or, if it holds model.pkl and you trust whoever wrote it, with trust_pickle=True"
            )
        return unpickle()
    try:
        arguments = [*reference.args, *reference.kwargs.values()]
        return resolve(reference.name, allow_modules=allow_modules, arguments=arguments)
    except ModelLoadError:
        if unpickle is None:
            raise
        return unpickle()


def _build(source: Any, reference: ModelReference | None, stored_bytes: int) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    if not callable(source):
        raise ModelLoadError(f"model is {type(source).__name__}: give an nn.Module subclass, a factory or an instance")
    args, kwargs = ((), {}) if reference is None else (reference.args, reference.kwargs)
    name = getattr(source, "__qualname__", type(source).__name__)
    try:
        inspect.signature(source).bind(*args, **kwargs)
    except (TypeError, ValueError):  # the caller's factory is a different one, and needs no stored arguments
        args, kwargs = (), {}
    if args or kwargs:
        _refuse_larger(source, args, kwargs, stored_bytes)
    try:
        with forked():  # loading a model must not change the caller's random numbers
            module = source(*args, **kwargs)
    except Exception as exc:
        shown = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
        raise ModelLoadError(
            f"{name}({shown[:200]}) raised {type(exc).__name__}: {exc}; load with model=, giving a factory that needs "
            "no arguments, or an instance"
        ) from exc
    if not isinstance(module, nn.Module):
        raise ModelLoadError(f"{name} returned {type(module).__name__}, not an nn.Module; load with model=Net")
    return module


def _refuse_larger(source: Callable[..., Any], args: Any, kwargs: Any, stored_bytes: int) -> None:
    """Refuse stored arguments that ask for a far larger module than the stored tensors fill, before it takes memory."""
    sizes = [abs(value) for value in [*args, *kwargs.values()] if type(value) is int and value]
    if math.prod(sizes) <= max(stored_bytes, _SMALL_BYTES):
        return
    try:
        with forked(), torch.device("meta"):
            tensors = [*source(*args, **kwargs).state_dict().values()]
    except Exception:  # noqa: BLE001 - what cannot be made without memory is judged when it is made with it
        return
    needed = sum(value.nbytes for value in tensors if isinstance(value, Tensor) and not is_lazy(value))
    if needed > 4 * stored_bytes + _SMALL_BYTES:
        raise ModelLoadError(
            f"the stored arguments {str(kwargs or args)[:200]} make a module of {needed} bytes, but {stored_bytes} are stored: "
            "they are damaged; load with model=, giving the class and arguments that were trained"
        )


def _stored_state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store, contiguous on the CPU, and alias -> kept name for those that are one tensor."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, value in module.state_dict().items():
        _check_storable(name, value)
        place = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
        kept = names.setdefault(place, name) if value.numel() else name
        if kept == name:
            # A copy, as two entries may overlap in memory, which the format cannot express.
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        else:
            aliases[name] = kept
    return tensors, aliases


def _check_storable(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        what = f"a {type(value).__name__}, not a tensor"
    elif is_lazy(value):
        what = "not initialized yet (run a batch through the lazy module first)"
    elif value.is_meta or value.layout != torch.strided or value.is_quantized or value.dtype not in _DTYPES:
        what = f"a {value.layout} {value.dtype} tensor on {value.device}, which the format does not hold"
    else:
        return
    raise ConfigError(
        f"the state dict's entry {name!r} is {what}; only dense tensors are saved, so let get_extra_state return a "
        "tensor, or keep the value out of the state dict"
    )


def _read_weights(data: bytes) -> dict[str, Tensor]:
    # Checked here as well, so that the limit holds whatever limit the library has.
    header_bytes = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else -1
    if not 0 <= header_bytes <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise DamagedError(f"{_WEIGHTS} is no safetensors file: its header is said to have {header_bytes} bytes")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as exc:
        raise DamagedError(f"{_WEIGHTS} is no safetensors file: {type(exc).__name__}: {exc}") from exc


def _fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load `state` strictly, in the stored dtypes; ties and lazy modules stay what they are."""
    own = module.state_dict(keep_vars=True)
    faults = [f"missing {_some(own.keys() - state.keys())}"] if own.keys() - state.keys() else []
    faults += [f"unexpected {_some(state.keys() - own.keys())}"] if state.keys() - own.keys() else []
    pairs = [(name, own[name], state[name]) for name in own.keys() & state.keys() if isinstance(own[name], Tensor)]
    shapes = [
        f"{name} is {tuple(given.shape)} in the file and {tuple(tensor.shape)} in the module"
        for name, tensor, given in pairs
        if not is_lazy(tensor) and tensor.shape != given.shape
    ]
    faults += [f"shapes: {_some(shapes)}"] if shapes else []
    if faults:
        raise ModelLoadError(
            f"the stored tensors do not fit {type(module).__name__}: {'; '.join(faults)}. Load with model=, giving "
            "the class and arguments that were trained"
        )
    for _, tensor, given in pairs:
        if tensor.dtype != given.dtype:
            # load_state_dict would round to the module's dtype; assign=True would untie tied parameters.
            tensor.data = tensor.data.to(given.dtype)
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as exc:
        raise ModelLoadError(f"the stored tensors do not fit {type(module).__name__}: {exc}") from exc


def _some(names: Iterable[str], limit: int = 10) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")
