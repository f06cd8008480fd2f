"""The interpreter's operations are those of MLIR where NumPy has others, or where two are easily confused."""

import interpreter
import jax
import ml_dtypes
import numpy as np
import pytest
from _lowered import Kernel, parse

X = np.array([1, -3, np.nan, 2, 0, np.nan, -np.inf, 7], np.float32)
Y = np.array([2, np.nan, 5, 2, -0.5, np.nan, 1, 3], np.float32)
M = np.array([7, -7, 7, -7, 1, -1, 2**31 - 1, -(2**31)], np.int32)
N = np.array([2, 2, -2, -2, 3, 3, 5, 3], np.int32)
NAN, U, V = np.isnan(X) | np.isnan(Y), M.view(np.uint32), N.view(np.uint32)

ADDRESSES = """
  %{x}0 = tt.splat %{x} : !tt.ptr<{of}> -> tensor<8x!tt.ptr<{of}>>
  %{x}s = tt.addptr %{x}0, %i : tensor<8x!tt.ptr<{of}>>, tensor<8xi32>"""
MODULE = """module {{ tt.func public @k(%x: !tt.ptr<{of}>, %y: !tt.ptr<{of}>, %z: !tt.ptr<{to}>) {{
  %i = tt.make_range {{start = 0 : i32, end = 8 : i32}} : tensor<8xi32>
  {addresses}
  %a = tt.load %xs : tensor<8x!tt.ptr<{of}>>
  %b = tt.load %ys : tensor<8x!tt.ptr<{of}>>
  {operations}
  tt.store %zs, %r : tensor<8x!tt.ptr<{to}>>
  tt.return
}} }}"""
NAMES = {np.float32: "f32", np.int32: "i32", ml_dtypes.bfloat16: "bf16"}


def compute(operations, x, y, dtype):
    """The result %r of operations on %a and %b, 8 elements each."""
    of, to = NAMES[x.dtype.type], NAMES[dtype]
    addresses = "".join(ADDRESSES.format(x=name, of=kind) for name, kind in zip("xyz", (of, of, to), strict=True))
    text = MODULE.format(of=of, to=to, addresses=addresses, operations=operations)
    module = parse(Kernel("k", text.encode(), (1, 1, 1), 4, 1, (), ()))
    return interpreter.run("k", module, (1, 1, 1), [x, y], [jax.ShapeDtypeStruct((8,), dtype)])[0]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("arith.maxnumf", np.fmax(X, Y)),
        ("arith.maximumf", np.maximum(X, Y)),
        ("arith.divsi", np.trunc(M / N)),
        ("arith.remsi", M - np.trunc(M / N) * N),
        ("arith.divui", U // V),
        ("arith.remui", U % V),
        ("arith.addi", (M.astype(np.int64) + N)),
        ("arith.minui", np.minimum(U, V)),
        ("arith.cmpf one,", (X != Y) & ~NAN),
        ("arith.cmpf une,", (X != Y) | NAN),
        ("arith.cmpf olt,", (X < Y) & ~NAN),
        ("arith.cmpf uge,", (X >= Y) | NAN),
        ("arith.cmpf ord,", ~NAN),
        ("arith.cmpi slt,", M < N),
        ("arith.cmpi ult,", U < V),
    ],
)
def test_what_two_numbers_give(name, want):
    x, y = (X, Y) if name.split()[0].endswith("f") else (M, N)
    of, result, dtype = NAMES[x.dtype.type], "r", x.dtype.type
    if "cmp" in name:
        result, dtype = "c", np.int32
    operations = f"%{result} = {name} %a, %b : tensor<8x{of}>"
    if "cmp" in name:
        operations += "\n %r = arith.extui %c : tensor<8xi1> to tensor<8xi32>"
    have = compute(operations, x, y, dtype)
    np.testing.assert_array_equal(have, np.asarray(want).astype(dtype))


def test_narrow_numbers_are_rounded_to_the_nearest_even_one():
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3e38, 3.4e38, 1e-40, 0, np.nan], np.float32)
    have = compute("%r = arith.truncf %a : tensor<8xf32> to tensor<8xbf16>", x, x, ml_dtypes.bfloat16)
    want = [1, 1 + 2**-6, -1, 3e38, np.inf, 1e-40, 0, np.nan]
    np.testing.assert_array_equal(have.astype("f4"), np.array(want).astype(have.dtype).astype("f4"))


@pytest.mark.parametrize(("combine", "want"), [("arith.maxnumf", 7), ("arith.maximumf", np.nan)])
def test_a_reduction_does_as_its_region_with_what_is_no_number(combine, want):
    operations = f"""
    %c = "tt.reduce"(%a) <{{axis = 0 : i32}}> ({{
    ^bb0(%p: f32, %q: f32):
      %s = {combine} %p, %q : f32
      tt.reduce.return %s : f32
    }}) : (tensor<8xf32>) -> f32
    %r = tt.splat %c : f32 -> tensor<8xf32>"""
    np.testing.assert_array_equal(compute(operations, X, Y, np.float32), np.full(8, want, np.float32))


def test_loops_and_branches_run_as_often_as_they_say():
    operations = """
    %zero = arith.constant 0 : i32
    %one = arith.constant 1 : i32
    %five = arith.constant 5 : i32
    %sum = scf.for %n = %zero to %five step %one iter_args(%t = %zero) -> (i32) : i32 {
      %u = arith.addi %t, %n : i32
      scf.yield %u : i32
    }
    %double = scf.while (%t = %one) : (i32) -> i32 {
      %more = arith.cmpi slt, %t, %sum : i32
      scf.condition(%more) %t : i32
    } do {
    ^bb0(%t: i32):
      %u = arith.addi %t, %t : i32
      scf.yield %u : i32
    }
    %less = arith.cmpi slt, %double, %sum : i32
    %both = scf.if %less -> (i32) {
      scf.yield %zero : i32
    } else {
      %u = arith.addi %sum, %double : i32
      scf.yield %u : i32
    }
    %r = tt.splat %both : i32 -> tensor<8xi32>"""
    np.testing.assert_array_equal(compute(operations, M, N, np.int32), np.full(8, 10 + 16))


MASKED = """
    %limit = arith.constant dense<{limit}> : tensor<8xi32>
    %m = arith.cmpi slt, %i, %limit : tensor<8xi32>
    %far = tt.addptr %xs, %i : tensor<8x!tt.ptr<i32>>, tensor<8xi32>
    %r = tt.load %far, %m, %b : tensor<8x!tt.ptr<i32>>"""


def test_a_mask_forbids_an_access():
    np.testing.assert_array_equal(compute(MASKED.format(limit=4), M, N, np.int32), [*M[::2], *N[4:]])
    with pytest.raises(
        interpreter.KernelError,
        match=r"k, program \(0, 0, 0\): %\d+ = tt.load .*: reads element 8 of input 0, which has 8",
    ):
        compute(MASKED.format(limit=5), M, N, np.int32)


@pytest.mark.parametrize(
    ("operations", "words"),
    [
        ("%r = arith.shli %a, %b : tensor<8xi32>", "shifts int32 out of its bits"),
        ("tt.store %xs, %b : tensor<8x!tt.ptr<i32>>\n %r = arith.addi %a, %a : tensor<8xi32>", "writes to input 0"),
        ("%r = tt.load %zs : tensor<8x!tt.ptr<i32>>", r"did not write, element \(0,\) of result 0"),
        (
            "%o = tt.splat %z : !tt.ptr<i32> -> tensor<8x!tt.ptr<i32>>\n tt.store %o, %a : tensor<8x!tt.ptr<i32>>\n"
            "%r = arith.addi %a, %a : tensor<8xi32>",
            "writes two values to element",
        ),
    ],
)
def test_what_no_kernel_may_do(operations, words):
    with pytest.raises(interpreter.KernelError, match=words):
        compute(operations, M, N, np.int32)


def test_an_operation_that_it_does_not_know_is_named():
    with pytest.raises(NotImplementedError, match=r"k: math.erf; the interpreter does not know it"):
        compute("%r = math.erf %a : tensor<8xf32>", X, Y, np.float32)
