"""Batched inference on executors: Arrow columns in, an Arrow column out, the model built once per Python worker."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import cloudpickle
import numpy as np
import pyarrow as pa
import torch
from pyspark import TaskContext
from torch import nn

from sparkdeep import seams
from sparkdeep.data.arrow import FieldValues, Ragged
from sparkdeep.data.batches import Batch, make_batch
from sparkdeep.data.columns import Faults, read_fields
from sparkdeep.data.schema import Schema
from sparkdeep.models.losses import forward
from sparkdeep.models.modes import Modes
from sparkdeep.models.packing import unpack_program
from sparkdeep.models.prediction import Prediction, check_rows, to_arrow
from sparkdeep.models.program import Program, other_modules, prepared
from sparkdeep.spark.session.placement import resolve_device
from sparkdeep.tensors.parameters import float_dtype_of, named_tensors
from sparkdeep.tensors.state_dicts import unpack_tensors

__all__ = ["ZERO_ROWS", "Scorer", "load_here", "prediction_udf", "zero_batch", "zero_output"]

ZERO_ROWS: Final = 3

_KEPT_MODELS: Final = 2
_READ_BYTES: Final = 1 << 20
_models: OrderedDict[str, _Loaded] = OrderedDict()


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model on its way to executors, as one broadcast value."""

    uid: str
    """Of this broadcast: a model that has changed since gets another."""
    program: bytes
    tensors: bytes
    """safetensors of the module's parameters and buffers."""
    schema: Schema
    prediction: bytes
    decode: bytes
    columns: tuple[str, ...]
    batch_size: int

    @staticmethod
    def run(shipped: Any, batches: Iterator[Any]) -> Iterator[pa.Array]:
        """Score Arrow columns: `shipped` is the broadcast; a batch is one array, or a tuple of them."""
        model = _load(shipped.value)
        seams.reach("transform")
        for arrays in batches:
            yield model.predict(arrays if isinstance(arrays, tuple) else (arrays,))


class _Loaded:
    """A model built in this Python worker."""

    def __init__(self, scorer: Scorer) -> None:
        context = TaskContext.get()
        gpus = context.resources().get("gpu") if context is not None else None
        torch.set_num_threads(context.cpus() if context is not None else 1)
        self.device = torch.device(
            resolve_device("auto", gpus.addresses if gpus else (), os.environ.get("CUDA_VISIBLE_DEVICES"))
        )
        self.program = unpack_program(scorer.program)
        values = unpack_tensors(scorer.tensors)
        with torch.no_grad():
            for name, tensor in named_tensors(self.program.model):
                tensor.copy_(values[name])
        self.module: nn.Module = self.program.model.to(self.device).eval()
        for module in other_modules(self.program).values():
            module.to(self.device).eval()
        self.schema = _of_features(scorer.schema)
        self.columns = list(scorer.columns)
        self.batch_size = scorer.batch_size
        self.read_rows = _rows_at_once(self.schema, self.batch_size)
        self.float_dtype = float_dtype_of(self.module)
        self.prediction: Prediction = cloudpickle.loads(scorer.prediction)
        self.decode: Any = cloudpickle.loads(scorer.decode)

    def predict(self, arrays: Sequence[pa.Array]) -> pa.Array:
        """One prediction per row."""
        whole = pa.RecordBatch.from_arrays(list(arrays), names=self.columns)
        parts = []
        for start in range(0, max(whole.num_rows, 1), self.read_rows):
            read = whole.slice(start, self.read_rows)
            faults = Faults()
            fields = read_fields(read, self.schema, faults, self.decode)
            faults.raise_if_any()
            for first in range(0, max(read.num_rows, 1), self.batch_size):
                rows = min(self.batch_size, read.num_rows - first)
                values = self.prediction.apply(self._forward(_rows_of(fields, first, first + rows)))
                check_rows(values, rows)
                parts.append(to_arrow(values))
        return pa.concat_arrays(parts)

    def _forward(self, fields: Any) -> Any:
        batch = make_batch(fields, self.schema, float_dtype=self.float_dtype, collate=self.program.collate)
        if self.device.type != "cpu":
            batch = batch.to(self.device)
        with torch.inference_mode():
            return forward(self.module, prepared(batch, self.program, augment=False).features)


def _of_features(schema: Schema) -> Schema:
    return replace(schema, fields=tuple(field for field in schema.fields if field.role == "features"))


def _rows_at_once(schema: Schema, batch_size: int) -> int:
    """How many rows are read from Arrow at once: whole batches of the model, as many as fit the processor's caches.

    For narrow rows that saves a call per column for every batch. Rows of unknown size are read batch by batch.
    """
    num_bytes = 0
    for field in schema.fields:
        if field.ragged or field.shape is None or field.dtype == "decoded":
            return batch_size
        num_bytes += int(np.prod(field.shape, dtype=np.int64)) * np.dtype(field.dtype).itemsize
    return max(_READ_BYTES // max(num_bytes, 1) // batch_size, 1) * batch_size


def _rows_of(fields: Mapping[str, FieldValues], start: int, stop: int) -> Mapping[str, FieldValues]:
    """Views of some rows; ragged fields are read batch by batch, and so are whole."""
    return {name: value if isinstance(value, Ragged) else value[start:stop] for name, value in fields.items()}


def _load(scorer: Scorer) -> _Loaded:
    """The model in this worker, built at most once for each broadcast."""
    name = scorer.uid
    if name not in _models:
        _models[name] = _Loaded(scorer)
        while len(_models) > _KEPT_MODELS:
            _models.popitem(last=False)
    _models.move_to_end(name)
    return _models[name]


def load_here(scorer: Scorer) -> _Loaded:
    """The model in this process, outside of any task: with the process's own number of threads."""
    threads = torch.get_num_threads()
    try:
        return _Loaded(scorer)
    finally:
        torch.set_num_threads(threads)


def prediction_udf(function: Callable[[Iterator[Any]], Iterator[pa.Array]], sql: str) -> Any:
    """The prediction as a UDF of the feature columns: an Arrow UDF where Spark has them (4.1), a pandas UDF before."""
    try:
        from pyspark.sql.functions import ArrowUDFType, arrow_udf
    except ImportError:
        return _pandas_udf(function, sql)

    def predict(batches: Any) -> Any:
        return function(batches)

    with warnings.catch_warnings():
        # Type hints are preferred, but the right ones depend on the number of columns; the type says it directly.
        warnings.simplefilter("ignore")
        return arrow_udf(predict, sql, ArrowUDFType.SCALAR_ITER)


def _pandas_udf(function: Callable[[Iterator[Any]], Iterator[pa.Array]], sql: str) -> Any:
    from pyspark.sql.functions import PandasUDFType, pandas_udf

    def predict(batches: Any) -> Any:
        def arrays() -> Iterator[tuple[pa.Array, ...]]:
            for series in batches:
                yield tuple(map(_from_pandas, series if isinstance(series, tuple) else (series,)))

        yield from map(_to_pandas, function(arrays()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as for the Arrow UDF
        return pandas_udf(predict, sql, PandasUDFType.SCALAR_ITER)


def _from_pandas(column: Any) -> pa.Array:
    if hasattr(column, "columns"):  # a struct, such as a Spark ML vector
        return pa.RecordBatch.from_pandas(column, preserve_index=False).to_struct_array()
    return pa.Array.from_pandas(column)


def _to_pandas(array: pa.Array) -> Any:
    if not pa.types.is_struct(array.type):
        return array.to_pandas()
    return pa.RecordBatch.from_struct_array(array).to_pandas()


def zero_batch(program: Program, schema: Schema, float_dtype: torch.dtype, *, ragged_length: int = 1) -> Batch:
    """ZERO_ROWS rows of zeros, as a batch that `preprocess` has not seen yet; ragged rows have `ragged_length` values."""
    rows = ZERO_ROWS
    kept = _of_features(schema)
    fields: dict[str, Any] = {}
    for field in kept.fields:
        if field.ragged:
            fields[field.name] = Ragged(np.zeros(rows * ragged_length, field.dtype), np.full(rows, ragged_length))
        else:
            fields[field.name] = np.zeros((rows, *(field.shape or ())), field.dtype)
    return make_batch(fields, kept, float_dtype=float_dtype, collate=program.collate)


def zero_output(program: Program, schema: Schema, float_dtype: torch.dtype) -> Any:
    """The output for rows of zeros: its shape and dtype, without asking for a row of data."""
    with Modes(program).scoring(), torch.inference_mode():
        batch = prepared(zero_batch(program, schema, float_dtype), program, augment=False)
        return forward(program.model, batch.features)
