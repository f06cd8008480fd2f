"""2 to the power of a score, in about the time in which a CPU reads and writes the scores.

XLA computes `jnp.exp2` on a CPU as exp(x ln 2): it takes twice as long, and rounding x ln 2 leaves a relative error of
3e-7 (rms) for |x| <= 30, where `exp2` has 5e-8.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from attnax.typing import Array

__all__ = ["exp2"]

_COEFFICIENTS = (
    0.0001535336188616,
    0.0013398874422244,
    0.0096184373578285,
    0.0555033247110014,
    0.2402264791362649,
    0.6931472028550821,
    1.0,
)
"""Of the polynomial of degree 6 for 2^f, |f| <= 1/2, whose largest relative error is least, 2e-9; 2^0 is exactly 1."""


@jax.custom_jvp
def exp2(x: Array) -> Array:
    """2^x, elementwise, for x < 128, as scores less their maximum or log-sum-exp are; 0 below -126.5, NaN for NaN."""
    if x.dtype != jnp.float32:
        return jnp.exp2(x)
    x = lax.max(x, lax.full_like(x, -127.0))
    whole = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    rest = x - whole
    power: Array | float = _COEFFICIENTS[0]
    for coefficient in _COEFFICIENTS[1:]:
        power = power * rest + coefficient
    # The bits of 2^whole: a float32 keeps its exponent plus 127, and all bits of the number 0 are 0.
    return power * lax.bitcast_convert_type((whole.astype(jnp.int32) + 127) << 23, jnp.float32)


@exp2.defjvp
def _exp2_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    power = exp2(*primals)
    return power, power * jnp.asarray(0.6931471805599453, power.dtype) * tangents[0]
