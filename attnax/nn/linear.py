"""The linear layer of every projection."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnax.checks import wide_dtype
from attnax.config import BlockConfig, Initializer
from attnax.sharding import Axis, current_mesh, gather
from attnax.typing import Array, Float

__all__ = ["Linear", "Product", "ShapesOnly", "make_initializer", "wide_gradient"]


class Linear(nnx.Linear):
    """`nnx.Linear` over the last axis, as one product of two matrices, with the options of a config.

    Args:
        rngs: for the initial weights.
        config: for the initial weights, the dtypes and whether there is a bias.
        in_features: width of the input.
        out_features: width of the output.
        bias: the name of the layer in the config's `use_bias`.
        scale: of the initial weights, relative to the config's `kernel_init`.
        axes: the names of the kernel's axes in `attnax.sharding.RULES`.
        logits: the result is at least float32, not rounded to the config's dtype.

    With merged leading axes, XLA's CPU backend needs no transposed copy of the activations in the backward pass;
    `benchmarks/layout.py` measures the saved time.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        config: BlockConfig,
        in_features: int,
        out_features: int,
        *,
        bias: str,
        axes: tuple[Axis, Axis],
        scale: float = 1.0,
        logits: bool = False,
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=config.has_bias(bias),
            kernel_init=make_initializer(config.kernel_init, config.init_std, scale),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            preferred_element_type=wide_dtype(config.dtype) if logits else None,
            dot_general=Product(axes, is_tall=in_features > out_features),
            kernel_metadata={"axes": axes},
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*L I"]) -> Float[Array, "*L O"]:  # type: ignore[override]
        merged = x if current_mesh() is not None else x.reshape(-1, x.shape[-1])  # a layout may cut batch and length
        with jax.numpy_dtype_promotion("standard"):  # Flax adds a narrow bias to wide logits
            return super().__call__(merged).reshape(*x.shape[:-1], self.out_features)


@jax.custom_jvp
def wide_gradient(tall: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """The same matrix; its gradient is computed as a matrix (O, I), then transposed.

    A gradient (I, O) is a product of activations whose second factor has O columns. The transposed product has I
    columns. XLA's CPU backend computes it faster for some shapes with I > O (`benchmarks/layout.py` times one), but
    chooses the other by itself.
    """
    return tall


@wide_gradient.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return primals[0], jax.lax.optimization_barrier(tangents[0].T).T  # XLA would swap the factors without the barrier


@dataclasses.dataclass(frozen=True)
class Product:
    """`jax.lax.dot_general` with a kernel that is gathered, and for a tall one with `wide_gradient`."""

    axes: tuple[Axis, Axis]
    is_tall: bool

    def __call__(self, x: Array, kernel: Array, *arguments: Any, **options: Any) -> Array:
        kernel = gather(kernel, *self.axes)
        return product(x, wide_gradient(kernel) if self.is_tall else kernel, *arguments, **options)


def product(x: Array, kernel: Array, *arguments: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` over the last axis of x, which gets a row of zeros if it is one row in bfloat16.

    XLA's CPU backend is slow for one such row, and copies kernels to float32 before a loop. For two rows it does
    neither (`benchmarks/one_row.py`). The row is added where JAX's default backend is a CPU; under `jax.vmap` each
    mapped row gets one.
    """
    if x.shape[:-1] == (1,) and x.dtype == kernel.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jax.lax.dot_general(jnp.pad(x, ((0, 1), (0, 0))), kernel, *arguments, **options)[:1]
    return jax.lax.dot_general(x, kernel, *arguments, **options)


class ShapesOnly(nnx.Rngs):
    """No keys for the parameters of a model that is traced for its shapes.

    Random numbers would take half of the time to trace it. Equal layers of a `Stack` are made once and copied, which
    saves most of the rest.
    """

    def params(self) -> None:
        return None


def make_initializer(name: Initializer, std: float, scale: float = 1.0, batch_axis: tuple[int, ...] = ()) -> Any:
    """The initialiser that a config names, for a kernel (in, out), with its standard deviation times `scale`.

    The axes in `batch_axis` number independent kernels: (experts, in, out) with (0,). Without a key, the weights are 0.
    """
    draw = _make_draw(name, std, scale, batch_axis)

    def initialize(key: Array | None, shape: tuple[int, ...], dtype: Any, **options: Any) -> Array:
        return jnp.zeros(shape, dtype) if key is None else draw(key, shape, dtype, **options)

    return initialize


def _make_draw(name: Initializer, std: float, scale: float, batch_axis: tuple[int, ...]) -> Any:
    if name == "normal":
        return nnx.initializers.normal(std * scale)
    kinds: dict[str, tuple[float, Any, Any]] = {
        "lecun_normal": (1.0, "fan_in", "truncated_normal"),
        "he_normal": (2.0, "fan_in", "truncated_normal"),
        "xavier_normal": (1.0, "fan_avg", "truncated_normal"),
        "xavier_uniform": (1.0, "fan_avg", "uniform"),
    }
    variance, fan, distribution = kinds[name]
    return nnx.initializers.variance_scaling(variance * scale**2, fan, distribution, batch_axis=batch_axis)
