"""Runs the lowered GPU kernels without a GPU: Triton IR, as JAX hands it to a card, in NumPy.

Interpret mode of Pallas runs a kernel as ordinary JAX, before it is lowered. Here the module that a GPU would parse is
run, every program of the grid, one operation after the other. So what lowering makes of indices, strides, loops and
dtypes is run too, and memory is watched closer than a card does. A `KernelError` names the operation and the program
where

    an address is outside of its array, unless a mask forbids the access
    an element of a result is read that this program did not write
    two programs write one element, or one store writes two values to it
    a number is shifted by more bits than it has
    all programs have run, and nobody wrote an element of a result

What it can not see: races between the threads of a program, the rounding of a card's exp2 and of the sums of its tensor
cores, what Triton's compiler makes of the module, how fast that is. Numbers are those of IEEE in the dtype that the
module names; float32 is rounded to TF32 in products that allow it. What a masked load gives where it loads nothing is
NaN, or the greatest whole number. A card runs programs in any order, here they have one; none can depend on it, since
none reads what another one writes.

Each operation becomes a step once: a NumPy function and the places of its operands. What depends on constants alone is
computed then. `OPERATIONS` has the functions that need to know values only, `MAKERS` makes those that need to know the
operation. Triton's own interpreter, and what is built on it, run Python source, of which there is none here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

__all__ = ["KernelError", "run"]

_DTYPES = {"i1": "?", "i8": "i1", "i16": "i2", "i32": "i4", "i64": "i8", "f16": "f2", "f32": "f4", "f64": "f8"}
_DTYPES = {name: np.dtype(kind) for name, kind in (*_DTYPES.items(), ("bf16", ml_dtypes.bfloat16))}
_NOBODY = -1


class KernelError(Exception):
    """A kernel does what it must not."""


def run(name: str, module: Any, grid: tuple[int, ...], inputs: list[Any], results: list[Any]) -> list[np.ndarray]:
    """What the kernel writes.

    Args:
        name: of the kernel, for errors.
        module: a parsed module of one function, whose arguments are the inputs, then the results.
        grid: programs along x, y and z.
        inputs: arrays.
        results: shape and dtype of each.

    Raises:
        KernelError: see above.
        NotImplementedError: an operation is not known here.
    """
    arrays = [Buffer(f"input {n}", _as_signed(np.asarray(x))) for n, x in enumerate(inputs)]
    written = [Buffer(f"result {n}", _poison(x.shape, x.dtype), is_result=True) for n, x in enumerate(results)]
    machine = Machine(name, module, [*arrays, *written])
    with np.errstate(all="ignore"):
        body = machine.function()
        for number, place in enumerate(np.ndindex(*grid[::-1])):
            machine.launch(body, number, place[::-1])
    for buffer in written:
        missing = np.flatnonzero(buffer.writer == _NOBODY)
        if missing.size:
            raise KernelError(f"{name}: {missing.size} elements were written by nobody, as {buffer.place(missing[0])}")
    return [buffer.data.reshape(buffer.shape) for buffer in written]


def _poison(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What stands where nothing was written: NaN, or the greatest whole number."""
    dtype = np.dtype(dtype)
    return np.full(shape, np.iinfo(dtype).max if dtype.kind == "i" else dtype.kind == "b" or np.nan, dtype)


class Buffer:
    """An array in the memory of the card, and who wrote each of its elements if it is a result."""

    def __init__(self, name: str, array: np.ndarray, *, is_result: bool = False):
        self.name, self.shape, self.data = name, array.shape, array.ravel()
        self.writer = np.full(array.size, _NOBODY) if is_result else None

    def place(self, at: Any) -> str:
        """An element in words."""
        if not 0 <= at < self.data.size:
            return f"element {at} of {self.name}, which has {self.data.size}"
        return f"element {tuple(map(int, np.unravel_index(int(at), self.shape)))} of {self.name} {self.shape}"

    def check(self, what: str, wrong: np.ndarray, at: np.ndarray) -> None:
        """No element is wrong."""
        if wrong.any():
            raise KernelError(f"{what} {self.place(at[wrong].flat[0])}")


class Pointers(NamedTuple):
    """Addresses: elements of one buffer."""

    buffer: Buffer
    at: Any  # int64

    @property
    def dtype(self) -> np.dtype:
        """That of the elements."""
        return self.buffer.data.dtype


class Step(NamedTuple):
    """An operation that is ready to run."""

    function: Callable[..., Any]
    operands: list[int]  # where their values are
    results: list[int]
    dtypes: list[np.dtype]  # of the results
    operation: Any


class Machine:
    """The steps of a module, and the values of the program that is running."""

    def __init__(self, name: str, module: Any, buffers: list[Buffer]):
        self.name, self.module, self.buffers = name, module, buffers
        self.values: list[Any] = []
        self.known: set[int] = set()  # values that all programs share
        self.where: dict[Any, int] = {}
        self.number, self.place = 0, (0, 0, 0)
        self.operation: Any = None  # the one that runs

    def function(self) -> Callable[[], Any]:
        """The module's only function, of one program, on the buffers."""
        (function,) = self.module.body.operations
        (block,) = function.regions[0].blocks
        for argument, buffer in zip(block.arguments, self.buffers, strict=True):
            _, dtype = _type(argument.type)
            if dtype != buffer.data.dtype:
                raise ValueError(f"{self.name}: {buffer.name} has dtype {buffer.data.dtype}, the kernel wants {dtype}")
            self.learn(self.slot(argument), Pointers(buffer, np.int64(0)))
        return self.block(block, arguments=())

    def launch(self, body: Callable[[], Any], number: int, place: tuple[int, ...]) -> None:
        """One program of the grid."""
        self.number, self.place = number, place
        try:
            body()
        except Exception as error:
            where = f"{self.name}, program {place}: {str(self.operation).strip().splitlines()[0][:160]}"
            if isinstance(error, KernelError):
                raise KernelError(f"{where}: {error}") from None
            error.add_note(where)
            raise

    def slot(self, value: Any) -> int:
        """Where a value of the module is kept."""
        if value not in self.where:
            self.where[value] = len(self.values)
            self.values.append(None)
        return self.where[value]

    def learn(self, slot: int, value: Any) -> None:
        """A value that all programs share."""
        self.values[slot] = value
        self.known.add(slot)

    def block(self, block: Any, arguments: Any = None) -> Callable[..., tuple[Any, ...]]:
        """A block as a function of its arguments, which gives what its last operation names."""
        slots = [self.slot(x) for x in (block.arguments if arguments is None else arguments)]
        *operations, last = (operation.operation for operation in block.operations)
        steps = [step for operation in operations if (step := self.step(operation)) is not None]
        yielded, values = [self.slot(x) for x in last.operands], self.values

        def run(*given: Any) -> tuple[Any, ...]:
            for slot, x in zip(slots, given, strict=True):
                values[slot] = x
            for step in steps:
                self.operation = step.operation
                store(step, step.function(*[values[n] for n in step.operands]))
            return tuple(values[n] for n in yielded)

        def store(step: Step, found: Any) -> None:
            found = (found,) if len(step.results) == 1 else found
            for slot, dtype, x in zip(step.results, step.dtypes, found, strict=True):
                if x.dtype != dtype:
                    raise TypeError(f"the interpreter computed {x.dtype}, not {dtype}")
                values[slot] = x

        return run

    def step(self, operation: Any) -> Step | None:
        """An operation as a step; None where there is nothing to do when the programs run."""
        name = operation.name
        # Pallas reads what it overwrites and forgets it; compilers drop such a load.
        if name == "tt.load" and not any(True for _ in operation.results[0].uses):
            return None
        if name in _NOT_FOR_BITS and str(operation.operands[0].type).endswith(("i1", "i1>")):
            raise NotImplementedError(f"{self.name}: {name} of i1")
        if name in OPERATIONS:
            function = OPERATIONS[name]
        elif name in MAKERS:
            function = MAKERS[name](self, operation)
        else:
            raise NotImplementedError(f"{self.name}: {name}; the interpreter does not know it")
        operands, results = ([self.slot(x) for x in values] for values in (operation.operands, operation.results))
        if name not in _MEMORY and self.known.issuperset(operands) and len(results) == 1 and not len(operation.regions):
            self.learn(results[0], function(*[self.values[n] for n in operands]))
            return None
        return Step(function, operands, results, [_type(x.type)[1] for x in operation.results], operation)


@functools.cache
def _type_of(text: str) -> tuple[tuple[int, ...], np.dtype]:
    match = re.fullmatch(r"(?:tensor<((?:\d+x)*))?(?:!tt\.ptr<)?(\w+)(?:, \d+)?>*", text)
    if match is None or match[2] not in _DTYPES:
        raise NotImplementedError(f"the type {text}; the interpreter does not know it")
    return tuple(map(int, (match[1] or "").split("x")[:-1])), _DTYPES[match[2]]


def _type(type_: Any) -> tuple[tuple[int, ...], np.dtype]:
    """The shape of a value, () for a scalar, and the dtype of its elements, or of what they point to."""
    return _type_of(str(type_))


def _load(machine: Machine, _: Any) -> Callable[..., Any]:
    def load(pointers: Pointers, mask: Any = None, other: Any = None) -> Any:
        buffer, at = _accessed(pointers, mask, "reads")
        if buffer.writer is not None:
            wrong = (buffer.writer[at] != machine.number) & (True if mask is None else mask)
            buffer.check("reads what this program did not write,", np.asarray(wrong), np.asarray(at))
        value = buffer.data[at]
        if mask is None:
            return value
        return np.where(mask, value, _poison((), value.dtype) if other is None else other)

    return load


def _store(machine: Machine, _: Any) -> Callable[..., tuple[()]]:
    def store(pointers: Pointers, value: Any, mask: Any = None) -> tuple[()]:
        buffer, at = _accessed(pointers, mask, "writes")
        at, value = np.asarray(at), np.asarray(value)
        if mask is not None:
            at, value = at[mask], value[mask]
        if buffer.writer is None:
            raise KernelError(f"writes to {buffer.name}")
        others = (buffer.writer[at] != _NOBODY) & (buffer.writer[at] != machine.number)
        buffer.check("writes what another program wrote,", others, at)
        buffer.data[at], buffer.writer[at] = value, machine.number
        kept = buffer.data[at]
        buffer.check("writes two values to", (kept != value) & ~((kept != kept) & (value != value)), at)  # noqa: PLR0124
        return ()

    return store


def _accessed(pointers: Pointers, mask: Any, what: str) -> tuple[Buffer, Any]:
    """The buffer and which of its elements, all inside of it; element 0 where the mask forbids the access."""
    buffer, at = pointers
    outside = (at < 0) | (at >= buffer.data.size)
    if mask is not None:
        outside, at = outside & mask, np.where(mask, at, 0)
    buffer.check(what, np.asarray(outside), np.asarray(at))
    return buffer, at


def _on_elements(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same for values and for pointers."""
    return lambda x: Pointers(x.buffer, change(x.at)) if isinstance(x, Pointers) else change(x)


def _to_shape(broadcast: bool) -> Callable[..., Callable[[Any], Any]]:
    def make(_: Machine, operation: Any) -> Callable[[Any], Any]:
        shape, _ = _type(operation.results[0].type)
        return _on_elements(lambda x: np.broadcast_to(x, shape) if broadcast else np.reshape(x, shape))

    return make


def _cast(_: Machine, operation: Any) -> Callable[[Any], Any]:
    dtype = _type(operation.results[0].type)[1]
    is_signed = operation.name in ("arith.extsi", "arith.sitofp")

    def cast(x: Any) -> Any:
        x = np.asarray(x)
        if x.dtype.kind == "b":
            x = x.astype(np.int8) * np.int8(-1 if is_signed else 1)
        elif operation.name in ("arith.extui", "arith.uitofp"):
            x = _as_unsigned(x)
        # A whole number is cut to its last bits, of which i1 has one.
        return (x & 1).astype(bool) if dtype.kind == "b" else x.astype(dtype)

    return cast


def _bitcast(_: Machine, operation: Any) -> Callable[[Any], Any]:
    dtype = _type(operation.results[0].type)[1]
    return lambda x: np.asarray(x).view(dtype)


def _constant(_: Machine, operation: Any) -> Callable[[], Any]:
    shape, dtype = _type(operation.results[0].type)
    value = operation.attributes["value"]
    value = value.get_splat_value().value if shape else value.value
    return lambda: np.full(shape, value, dtype)[()]


def _for(machine: Machine, operation: Any) -> Callable[..., tuple[Any, ...]]:
    body = machine.block(operation.regions[0].blocks[0])

    def loop(first: Any, last: Any, step: Any, *state: Any) -> tuple[Any, ...]:
        for n in range(int(first), int(last), int(step)):
            state = body(first.dtype.type(n), *state)
        return state

    return _single(operation, loop)


def _while(machine: Machine, operation: Any) -> Callable[..., tuple[Any, ...]]:
    before, after = (machine.block(region.blocks[0]) for region in operation.regions)

    def loop(*state: Any) -> tuple[Any, ...]:
        goes_on, *values = before(*state)
        while goes_on:
            goes_on, *values = before(*after(*values))
        return tuple(values)

    return _single(operation, loop)


def _if(machine: Machine, operation: Any) -> Callable[[Any], tuple[Any, ...]]:
    branches = [machine.block(region.blocks[0]) if len(region.blocks) else tuple for region in operation.regions]
    return _single(operation, lambda condition: branches[0 if condition else 1]())


def _reduce(machine: Machine, operation: Any) -> Callable[..., Any]:
    """Halves meet halves, as threads do; the region takes whole arrays where it names scalars."""
    axis, combine = operation.attributes["axis"].value, machine.block(operation.regions[0].blocks[0])

    def reduce(*arrays: Any) -> Any:
        arrays = tuple(np.moveaxis(x, axis, 0) for x in arrays)
        while (size := len(arrays[0])) > 1:
            arrays = combine(*(x[: size // 2] for x in arrays), *(x[size // 2 :] for x in arrays))
        return tuple(x[0] for x in arrays)

    return _single(operation, reduce)


def _single(operation: Any, function: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """A tuple of one result is that result."""
    return (lambda *given: function(*given)[0]) if len(operation.results) == 1 else function


def _dot(_: Machine, operation: Any) -> Callable[..., Any]:
    is_tf32 = operation.attributes["inputPrecision"].value == 0

    def dot(left: Any, right: Any, total: Any) -> Any:
        rounds = is_tf32 and left.dtype == np.float32
        left, right = (_to_tf32(x) if rounds else x.astype(total.dtype) for x in (left, right))
        return left @ right + total

    return dot


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """With 10 of the 23 bits of the mantissa."""
    return ((x.view(np.int32) + 0x1000) & ~0x1FFF).view(np.float32)


def _compare_whole(machine: Machine, operation: Any) -> Callable[..., Any]:
    predicate = operation.attributes["predicate"].value
    if 2 <= predicate < 6 and str(operation.operands[0].type).endswith(("i1", "i1>")):
        raise NotImplementedError(f"{machine.name}: a signed comparison of i1")
    signed = np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal
    return signed[predicate] if predicate < 6 else _unsigned(signed[predicate - 4])


def _compare_floating(machine: Machine, operation: Any) -> Callable[..., Any]:
    predicate = operation.attributes["predicate"].value
    either_is_nan = lambda x, y: np.isnan(x) | np.isnan(y)
    if predicate in (0, 15):
        raise NotImplementedError(f"{machine.name}: arith.cmpf {predicate}; the interpreter does not know it")
    if predicate in (7, 14):  # ord, uno
        return either_is_nan if predicate == 14 else lambda x, y: ~either_is_nan(x, y)
    relations = np.equal, np.greater, np.greater_equal, np.less, np.less_equal, np.not_equal
    holds = relations[(predicate - 1) % 7]
    if predicate < 7:
        return lambda x, y: holds(x, y) & ~either_is_nan(x, y)
    return lambda x, y: holds(x, y) | either_is_nan(x, y)


def _extern(machine: Machine, operation: Any) -> Callable[..., Any]:
    symbol = operation.attributes["symbol"].value
    name = re.fullmatch(r"__nv_(\w+?)f?", symbol)
    if name is None or name[1] not in _FUNCTIONS:
        raise NotImplementedError(f"{machine.name}: {symbol}; the interpreter does not know it")
    return _FUNCTIONS[name[1]]


def _as_signed(x: np.ndarray) -> np.ndarray:
    """The module's whole numbers have no sign; its operations say how they take them."""
    return x.view(np.dtype(f"i{x.itemsize}")) if x.dtype.kind == "u" else x


def _as_unsigned(x: Any) -> Any:
    return np.asarray(x).view(np.dtype(f"u{x.dtype}"))


def _unsigned(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*given: Any) -> Any:
        found = function(*map(_as_unsigned, given))
        return found if found.dtype.kind == "b" else np.asarray(found).view(given[0].dtype)

    return apply


def _shift(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(x: Any, by: Any) -> Any:
        if np.any((by < 0) | (by >= 8 * x.dtype.itemsize)):
            raise KernelError(f"shifts {x.dtype} out of its bits")
        return function(x, by)

    return apply


def _divide(x: Any, y: Any) -> Any:
    """Towards zero, where NumPy goes down."""
    return (x - np.fmod(x, y)) // y


# By the name in `math`, and in NVIDIA's library without its prefix and the f of float32.
_AS_IN_NUMPY = ("cbrt", "ceil", "cos", "cosh", "exp", "exp2", "expm1", "floor", "log", "log1p", "log2", "sin", "sinh")
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in (*_AS_IN_NUMPY, "sqrt", "tan", "tanh")},
    **{f"a{name}": getattr(np, f"arc{name}") for name in ("cos", "cosh", "sin", "sinh", "tan", "tan2", "tanh")},
    **dict.fromkeys(("abs", "absf", "absi", "fabs"), np.abs),
    **dict.fromkeys(("pow", "powf"), np.power),
    **dict.fromkeys(("powi", "fpowi"), lambda x, n: np.power(x, n.astype(x.dtype))),
    **dict.fromkeys(("popc", "ctpop"), lambda x: np.bitwise_count(_as_unsigned(x)).astype(x.dtype)),
    "rsqrt": lambda x: 1 / np.sqrt(x),
}

OPERATIONS: dict[str, Callable[..., Any]] = {
    "tt.addptr": lambda pointers, by: Pointers(pointers.buffer, pointers.at + by),
    "arith.addf": np.add,
    "arith.subf": np.subtract,
    "arith.mulf": np.multiply,
    "arith.divf": np.divide,
    "arith.remf": np.fmod,
    "arith.negf": np.negative,
    "arith.maxnumf": np.fmax,  # the number, if the other one is NaN
    "arith.minnumf": np.fmin,
    "arith.maximumf": np.maximum,  # NaN, if one is
    "arith.minimumf": np.minimum,
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.divsi": _divide,
    "arith.remsi": np.fmod,
    "arith.divui": _unsigned(np.floor_divide),
    "arith.remui": _unsigned(np.remainder),
    "arith.maxsi": np.maximum,
    "arith.minsi": np.minimum,
    "arith.maxui": _unsigned(np.maximum),
    "arith.minui": _unsigned(np.minimum),
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.shli": _shift(np.left_shift),
    "arith.shrsi": _shift(np.right_shift),
    "arith.shrui": _shift(_unsigned(np.right_shift)),
    "arith.select": np.where,
    **{f"math.{name}": function for name, function in _FUNCTIONS.items()},
}

_CASTS = ("extf", "truncf", "extsi", "extui", "trunci", "sitofp", "uitofp", "fptosi", "fptoui")
MAKERS: dict[str, Callable[[Machine, Any], Callable[..., Any]]] = {
    "tt.get_program_id": lambda machine, op: lambda: np.int32(machine.place[op.attributes["axis"].value]),
    "tt.load": _load,
    "tt.store": _store,
    "tt.make_range": lambda _, op: lambda: np.arange(*(op.attributes[x].value for x in ("start", "end")), dtype="i4"),
    "tt.splat": _to_shape(True),
    "tt.broadcast": _to_shape(True),
    "tt.expand_dims": _to_shape(False),
    "tt.reshape": _to_shape(False),
    "tt.trans": lambda _, op: _on_elements(lambda x, order=list(op.attributes["order"]): np.transpose(x, order)),
    "tt.reduce": _reduce,
    "tt.dot": _dot,
    "tt.extern_elementwise": _extern,
    "tt.bitcast": _bitcast,
    "arith.bitcast": _bitcast,
    "arith.constant": _constant,
    "arith.cmpi": _compare_whole,
    "arith.cmpf": _compare_floating,
    **dict.fromkeys((f"arith.{kind}" for kind in _CASTS), _cast),
    "scf.for": _for,
    "scf.while": _while,
    "scf.if": _if,
}
_MEMORY = {"tt.load", "tt.store", "tt.get_program_id"}  # and what differs from program to program
_NOT_FOR_BITS = {f"arith.{x}" for x in ("addi", "subi", "divsi", "remsi", "maxsi", "minsi", "shli", "shrsi")}
