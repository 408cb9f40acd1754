"""A pickle read as data: its opcodes build plain values and inert records, and nothing is imported or called.

`pickletools` only names the opcodes of a stream. What they would make is built here, on a stack of our own: a global
stays a name, and a call stays a record of the callable's name and its arguments.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from sparkdeep.errors import DataError

__all__ = ["Global", "Made", "read_pickle"]

MAX_BYTES: Final = 16 << 20
MAX_OPCODES: Final = 1_000_000
MAX_MARKS: Final = 200  # open at the same time
MAX_MEMO: Final = 1 << 20  # largest key that a memo entry may have


@dataclass(frozen=True)
class Global:
    """The name of a class or function, which is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class Made:
    """What a call would have made: the callable's name, its arguments, and what was set on the result."""

    function: Global
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)


class _Mark:
    pass


def read_pickle(data: bytes, *, allowed: Callable[[Global], bool], where: str) -> Any:
    """Return the object that a pickle describes, as plain values, `Global` names and `Made` records.

    Args:
        data: the pickle, protocol 0 to 5.
        allowed: whether a global may occur at all; called for each occurrence.
        where: what the bytes are, for messages.

    Raises:
        DataError: a global is not allowed, an opcode is none that plain data needs, the stream is damaged, or it is
            larger or deeper than any schema. Nothing of it was run.
    """
    if len(data) > MAX_BYTES:
        raise DataError(
            f"{where} is a pickle of {len(data)} bytes, and at most {MAX_BYTES} are read: no schema is that large; "
            "write the metadata again with petastorm-generate-metadata"
        )
    machine = _Machine(allowed, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old streams hold backslashes that today's Python warns about
            for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
                if count > MAX_OPCODES:
                    raise DataError(
                        f"{where} has more than {MAX_OPCODES} opcodes, and no schema needs so many; {_KEPT}"
                    )
                machine.step(opcode.name, argument)
    except DataError:
        raise
    except (ValueError, OverflowError, IndexError, EOFError) as error:
        raise DataError(
            f"{where} is a damaged pickle ({str(error)[:200]}): {_KEPT}; write the metadata again"
        ) from None
    return machine.result()


_KEPT: Final = "nothing of it was run"
_PUSHES: Final = frozenset(
    [
        *["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"],
        *["STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"],
        *["UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"],
    ]
)
_CONSTANTS: Final[dict[str, Any]] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUTS: Final = frozenset(["PUT", "BINPUT", "LONG_BINPUT"])
_GETS: Final = frozenset(["GET", "BINGET", "LONG_BINGET"])
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    def __init__(self, allowed: Callable[[Global], bool], where: str) -> None:
        self._allowed = allowed
        self._where = where
        self._stack: list[Any] = []
        self._marks = 0
        self._memo: dict[int, Any] = {}
        self._stopped = False

    def result(self) -> Any:
        if not self._stopped or len(self._stack) != 1 or isinstance(self._stack[0], _Mark):
            raise self._damaged("it does not end with one object")
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSHES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _PUTS:
            self._remember(argument)
        elif name == "MEMOIZE":
            self._remember(len(self._memo))
        elif name in _GETS:
            if argument not in self._memo:
                raise self._damaged(f"memo entry {argument} is used before it is set")
            self._stack.append(self._memo[argument])
        elif name in _TUPLES:
            count = _TUPLES[name]
            self._stack.append(tuple(reversed([self._pop() for _ in range(count)])))
        elif name in _STEPS:
            _STEPS[name](self, argument)
        else:
            raise DataError(
                f"{self._where} holds the pickle opcode {name}, which no schema of petastorm needs: it is refused, and "
                f"{_KEPT}; do not trust this dataset, or write its metadata again with petastorm-generate-metadata"
            )

    def named(self, module: Any, name: Any) -> Global:
        if type(module) is not str or type(name) is not str:
            raise self._damaged("a global has no name")
        found = Global(module, name)
        if not self._allowed(found):
            raise DataError(
                f"{self._where} names {str(found)[:200]!r}, which is none of the classes that describe a petastorm "
                f"schema: it is refused, and {_KEPT}. Do not trust a dataset that should not hold it; if it is a "
                "codec of your own, write the dataset again with petastorm's codecs, or read the stored columns with "
                "spark.read.parquet"
            )
        return found

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self._where} is a damaged pickle ({why}): {_KEPT}; write the metadata again")

    def _pop(self) -> Any:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            raise self._damaged("the stack is empty")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _remember(self, key: int) -> None:
        if not 0 <= key <= MAX_MEMO:
            raise self._damaged(f"memo entry {key} is out of bounds")
        self._memo[key] = self._top()

    def _since_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if isinstance(self._stack[at], _Mark):
                values = self._stack[at + 1 :]
                del self._stack[at:]
                self._marks -= 1
                return values
        raise self._damaged("a mark is missing")

    def pass_by(self, _: Any) -> None:
        """Skipped: a protocol version or a frame's length adds nothing to the values."""

    def mark(self, _: Any) -> None:
        self._marks += 1
        if self._marks > MAX_MARKS:
            raise self._damaged(f"more than {MAX_MARKS} values are open at once")
        self._stack.append(_Mark())

    def stop(self, _: Any) -> None:
        self._stopped = True

    def pop(self, _: Any) -> None:
        if self._stack and isinstance(self._stack[-1], _Mark):
            self._marks -= 1
            self._stack.pop()
        else:
            self._pop()

    def pop_mark(self, _: Any) -> None:
        self._since_mark()

    def duplicate(self, _: Any) -> None:
        self._stack.append(self._top())

    def new_list(self, _: Any) -> None:
        self._stack.append([])

    def new_dict(self, _: Any) -> None:
        self._stack.append({})

    def list_of(self, _: Any) -> None:
        self._stack.append(self._since_mark())

    def tuple_of(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def dict_of(self, _: Any) -> None:
        values = self._since_mark()
        self._stack.append({})
        self._set(values)

    def append(self, _: Any) -> None:
        self._extend([self._pop()])

    def appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def set_items(self, _: Any) -> None:
        self._set(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise self._damaged("something is appended to what is no list")
        target.extend(values)

    def _set(self, values: list[Any]) -> None:
        target = self._top()
        if len(values) % 2 or not isinstance(target, dict | Made):
            raise self._damaged("items are set on what is no mapping")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Keys of a schema are names; a tuple could be nested so deeply that hashing it ends the process.
            if type(key) not in (str, int, bytes, bool):
                raise self._damaged(f"a key is a {type(key).__name__}")
            if isinstance(target, dict):
                target[key] = value
            else:
                target.items.append((key, value))

    def global_(self, argument: Any) -> None:
        self._stack.append(self.named(*str(argument).split(" ", 1)))

    def stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._stack.append(self.named(module, name))

    def call(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        self._make(function, arguments)

    def call_with_names(self, _: Any) -> None:
        names, arguments, function = self._pop(), self._pop(), self._pop()
        if names != {}:
            raise self._damaged("a call has arguments by name")
        self._make(function, arguments)

    def instance(self, argument: Any) -> None:
        arguments = tuple(self._since_mark())
        self._make(self.named(*str(argument).split(" ", 1)), arguments)

    def object_(self, _: Any) -> None:
        values = self._since_mark()
        if not values:
            raise self._damaged("an object has no class")
        self._make(values[0], tuple(values[1:]))

    def build(self, _: Any) -> None:
        state = self._pop()
        target = self._top()
        if not isinstance(target, Made):
            raise self._damaged("a state is set on what is no object")
        target.state = state

    def _make(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise self._damaged("a call has no name or no arguments")
        self._stack.append(Made(function, arguments))


_STEPS: Final[dict[str, Callable[[_Machine, Any], None]]] = {
    "PROTO": _Machine.pass_by,
    "FRAME": _Machine.pass_by,
    "MARK": _Machine.mark,
    "STOP": _Machine.stop,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    "EMPTY_LIST": _Machine.new_list,
    "EMPTY_DICT": _Machine.new_dict,
    "LIST": _Machine.list_of,
    "TUPLE": _Machine.tuple_of,
    "DICT": _Machine.dict_of,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_names,
    "INST": _Machine.instance,
    "OBJ": _Machine.object_,
    "BUILD": _Machine.build,
}
