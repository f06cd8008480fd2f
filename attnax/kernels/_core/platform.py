"""One operation with an implementation for each platform, chosen when a program is lowered.

`jax.lax.platform_dependent` chooses at the same time but traces every branch first: each compilation for a CPU would
pay for the GPU kernels. Here the function of a platform is called only when a program is lowered for that platform. The
derivatives of the operation are those of the default function.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

__all__ = ["abstract_device", "by_platform", "has_nvidia_gpu", "why_no_card", "why_no_triton"]

Branch = Callable[..., Any]


def by_platform(default: Branch, *arguments: Any, now: Collection[str] = (), **platforms: Branch) -> Any:
    """`default(*arguments)`, or the result of the function for the platform that the program is lowered for.

    Args:
        default: traced at once.
        arguments: pytrees of arrays.
        now: the platforms whose functions are traced at once too, so that JAX sees the operations in them.
        platforms: for each platform, by JAX's name ("cuda", "tpu"), a function with results of the same shapes and
            dtypes as `default`. The function must depend on arrays through `arguments` alone. "cudnn" goes before
            "cuda" if JAX can write cuDNN's kernels. In a program that XLA cuts over several TPUs "tpu" is called under
            the mesh of the arrays, with Auto axes: see `on_shards`.
    """
    leaves, structure = jax.tree.flatten(arguments)

    def on_leaves(branch: Branch, skip: int = 0) -> Branch:
        return lambda *leaves: branch(*jax.tree.unflatten(structure, leaves[skip:]))

    traced, shape = jax.make_jaxpr(on_leaves(default), return_shape=True)(*leaves)

    def flat(branch: Branch) -> Branch:
        run = on_leaves(branch, len(traced.consts))
        return lambda *leaves: jax.tree.leaves(run(*leaves))

    # Constants of `default` may be values of an enclosing transformation, so they are operands too. `make_jaxpr`
    # returns a ClosedJaxpr, from JAX 0.12 on a Jaxpr.
    jaxpr = type(traced)(traced.jaxpr.replace(constvars=(), invars=[*traced.jaxpr.constvars, *traced.jaxpr.invars]), ())
    operands = *traced.consts, *leaves
    branches = (jax.make_jaxpr(flat(run))(*operands) if name in now else flat(run) for name, run in platforms.items())
    results = _by_platform_p.bind(*operands, default=jaxpr, platforms=tuple(platforms), branches=tuple(branches))
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def has_nvidia_gpu() -> bool:
    """Whether this process computes on an NVIDIA GPU by default."""
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()


def why_no_triton() -> str | None:
    """The reason why this JAX cannot compile the kernels of `_gpu/kernels.py`, or None."""
    try:  # Pallas takes long to import, and is seldom needed
        import jax.experimental.pallas.triton as _backend  # noqa: F401
    except ImportError:
        return f"the Pallas kernels need Pallas' Triton backend, which JAX {jax.__version__} does not have"
    return None


def abstract_device() -> Any:
    """The device (`jax.sharding.AbstractDevice`) that the mesh of the program names, or None."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def why_no_card() -> str | None:
    """The reason why this JAX cannot lower kernels for the GPU of a program, or None. JAX before 0.11.1 always can."""
    device = abstract_device()
    if has_nvidia_gpu() or _lowers_kernels(device):
        return None
    which = "whose name it knows" if device is None else f"whose name it knows; got {device.device_kind!r}"
    return (
        f"JAX {jax.__version__} lowers kernels for a GPU only under a mesh with an AbstractDevice {which}; "
        "docs/understand/accelerators.md has an example"
    )


@functools.cache  # the answer depends on the installed JAX alone
def _lowers_kernels(device: Any) -> bool:
    from jax.experimental import pallas as pl  # Pallas takes long to import, and is seldom needed
    from jax.experimental.pallas import triton

    def copy(x: Any, out: Any) -> None:
        out[...] = x[...]

    def lowers() -> bool:
        shape = jax.ShapeDtypeStruct((1,), "float32")
        kernel = pl.pallas_call(copy, out_shape=shape, compiler_params=triton.CompilerParams(num_warps=1))
        named = {} if device is None else {"abstract_device": device}
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), **named)):
            try:
                jax.jit(kernel).trace(shape).lower(lowering_platforms=("cuda",))
            except RuntimeError:
                return False
        return True

    # Lowering fails inside of a shard_map. A new thread is outside of every shard_map.
    with warnings.catch_warnings(), ThreadPoolExecutor(1) as elsewhere:
        warnings.simplefilter("ignore", DeprecationWarning)  # of the backend; the kernel itself gives it again
        return elsewhere.submit(lowers).result()


_by_platform_p = Primitive("attnax_by_platform")
_by_platform_p.multiple_results = True


def _run(*arguments: Any, **params: Any) -> Any:
    with jax.disable_jit(False):  # without jit this function would call itself
        return jax.jit(partial(_by_platform_p.bind, **params))(*arguments)


def _avals(*_: Any, default: Any, **__: Any) -> Any:
    return default.out_avals, default.effects


def _function(branch: Any) -> Branch:
    """The branch as a function, even if the branch was traced."""
    function: Branch = branch if callable(branch) else jaxpr_as_fun(branch)
    return function


def _lower(*names: str) -> Any:
    """The lowering to the function of the first platform in `names` that has one, else to the default."""

    def run(*arguments: Any, default: Any, platforms: tuple[str, ...], branches: tuple[Any, ...]) -> Any:
        given = dict(zip(platforms, branches, strict=True))
        return _function(next((given[name] for name in names if name in given), default))(*arguments)

    return mlir.lower_fun(run, multiple_results=True)


def _lower_for_cuda(context: Any, *arguments: Any, platforms: Any, branches: Any, **params: Any) -> Any:
    """Lowers to cuDNN's function, unless JAX would have to partition kernels that JAX has not traced."""
    module = context.module_context
    names: tuple[str, ...] = ("cudnn", "cuda")
    if callable(dict(zip(platforms, branches, strict=True)).get("cudnn")):
        if _is_partitioned(module.axis_context):
            names = ("cuda",)
        elif hasattr(module.axis_context, "device_assignment"):
            # JAX reads only the number of devices.
            alone = dataclasses.replace(module.axis_context, device_assignment=(None,))
            context = context.replace(module_context=module.replace(axis_context=alone))
    return _lower(*names)(context, *arguments, platforms=platforms, branches=branches, **params)


def _lower_for_tpu(context: Any, *arguments: Any, **params: Any) -> Any:
    """Lowers to the function for TPU. JAX does not partition TPU kernels, so the function gets the mesh to do it."""
    axes = context.module_context.axis_context
    if not _is_partitioned(axes):
        return _lower("tpu")(context, *arguments, **params)
    meshes = {x.sharding.mesh for x in context.avals_in if x.sharding.mesh.size > 1}
    if hasattr(axes, "mesh") or len(meshes) != 1 or set(*(x.axis_types for x in meshes)) != {AxisType.Auto}:
        return _lower()(context, *arguments, **params)
    with jax.sharding.use_abstract_mesh(meshes.pop()):
        return _lower("tpu")(context, *arguments, **params)


def _is_partitioned(axes: Any) -> bool:
    """Whether arrays of the program may be cut over devices by XLA; a `shard_map` over all mesh axes has cut them."""
    if hasattr(axes, "mesh"):  # of a shard_map
        return set(axes.manual_axes) != set(axes.mesh.axis_names)
    return getattr(axes, "num_devices", 1) > 1


def _batch(arguments: Any, axes: Any, *, default: Any, branches: tuple[Any, ...], **params: Any) -> tuple[Any, Any]:
    def mapped(branch: Any) -> Branch:
        return jax.vmap(_function(branch), axes)

    def traced(branch: Any) -> Any:
        return jax.make_jaxpr(mapped(branch))(*arguments)

    batched = tuple(mapped(branch) if callable(branch) else traced(branch) for branch in branches)
    results = _by_platform_p.bind(*arguments, default=traced(default), branches=batched, **params)
    return results, [0] * len(results)


def _jvp(primals: Any, tangents: Any, *, default: Any, **_: Any) -> Any:
    known = [not isinstance(tangent, ad.Zero) for tangent in tangents]

    def run(*moving: Any) -> Any:
        rest = iter(moving)
        return jaxpr_as_fun(default)(*(next(rest) if moves else x for x, moves in zip(primals, known, strict=True)))

    at, along = ([x for x, moves in zip(values, known, strict=True) if moves] for values in (primals, tangents))
    return jax.jvp(run, at, along)


_by_platform_p.def_impl(_run)
_by_platform_p.def_effectful_abstract_eval(_avals)
mlir.register_lowering(_by_platform_p, _lower())
mlir.register_lowering(_by_platform_p, _lower_for_cuda, platform="cuda")
mlir.register_lowering(_by_platform_p, _lower_for_tpu, platform="tpu")
batching.primitive_batchers[_by_platform_p] = _batch
ad.primitive_jvps[_by_platform_p] = _jvp
