"""A feed-forward of many experts; each token goes through a few of them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from attnax.config import BlockConfig, resolve_config
from attnax.nn._routing import DOWN, UP, Experts, Routes, mix
from attnax.nn.dropout import Dropout, Jitter
from attnax.nn.feedforward import ACTIVATIONS, FeedForward
from attnax.nn.linear import make_initializer
from attnax.sharding import Axis, gather, per_token, sum_tokens
from attnax.typing import Array, ArrayLike, Bool, Float, Int

__all__ = ["MixtureOfExperts"]

_ROUTER: tuple[Axis, ...] = ("embed", None)


class MixtureOfExperts(nnx.Module):
    """sum_e w_e(x) expert_e(x) over the top_k experts that a router chooses for x; each expert is a feed-forward.

    A router scores the experts by the softmax or the sigmoid of logits = x @ router + router_bias; the weights are the
    top_k scores, with `router_renormalize` divided by their sum. `router` is a parameter (d_model, num_experts).
    No token is dropped: an expert takes all the tokens that choose it. The cost of a token follows top_k, not
    num_experts (`benchmarks/moe.py`). The shared experts are one dense feed-forward of num_shared_experts * d_ff that
    every token goes through, added with weight 1.

    Called as `MixtureOfExperts(rngs, config)` or `MixtureOfExperts(rngs, **fields)`.

    Args:
        rngs: for the initial weights and the stored streams of dropout and jitter.
        config: a BlockConfig with num_experts.
        **fields: instead of config: d_model, d_ff, num_experts, top_k, num_shared_experts, router_type,
            router_renormalize, router_jitter, ff_activation (by default "swiglu"), dropout_rate (by default 0), and
            further fields of BlockConfig. `use_bias=True` gives the experts biases, and the router none.

    Raises:
        ValueError: num_experts is missing, or fields do not fit together.

    The router computes in float32, or in float64 with dtype="float64". Differentiable once, in reverse mode.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from attnax.nn.moe import MixtureOfExperts
        >>> moe = MixtureOfExperts(nnx.Rngs(0), d_model=64, d_ff=128, num_experts=4, top_k=2)
        >>> out, aux = moe(jnp.ones((2, 5, 64)))
        >>> out.shape, sorted(aux)
        ((2, 5, 64), ['expert_load', 'load_balance_loss', 'router_entropy', 'router_z_loss'])

    References:
        N. Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017,
        https://arxiv.org/abs/1701.06538.
        W. Fedus et al., "Switch Transformers", 2021, https://arxiv.org/abs/2101.03961.
        B. Zoph et al., "ST-MoE", 2022, https://arxiv.org/abs/2202.08906.
        T. Gale et al., "MegaBlocks", 2022, https://arxiv.org/abs/2211.15841.
    """

    def __init__(self, rngs: nnx.Rngs, config: BlockConfig | None = None, **fields: Any):
        if config is None:
            # A layer alone needs no heads: one head fits any width.
            fields = {"num_heads": 1, "dropout_rate": 0.0, "ff_activation": "swiglu", **fields}
        self.config = config = resolve_config(BlockConfig, config, fields)
        if config.num_experts is None:
            raise ValueError(
                "MixtureOfExperts: num_experts must be given; got num_experts=None. "
                "Use FeedForward for one dense feed-forward."
            )
        experts, d_model, d_ff = config.num_experts, config.d_model, config.d_ff

        def matrices(axes: tuple[Axis, ...], scale: float = 1.0) -> nnx.Param[Array]:
            make = make_initializer(config.kernel_init, config.init_std, scale, batch_axis=(0,))
            shape = experts, *((d_model, d_ff) if axes == UP else (d_ff, d_model))
            return nnx.Param(make(rngs.params(), shape, config.param_dtype), axes=axes)

        def biases(features: int) -> Any:
            has_bias = config.has_bias("feed_forward")
            zeros = jnp.zeros((experts, features), config.param_dtype)
            return nnx.data(nnx.Param(zeros, axes=("experts", None)) if has_bias else None)

        gated = ACTIVATIONS[config.ff_activation][1]
        make_router = make_initializer(config.kernel_init, config.init_std)
        self.router = nnx.Param(make_router(rngs.params(), (d_model, experts), config.param_dtype), axes=_ROUTER)
        self.router_bias = nnx.data(None)
        if config.has_bias("router"):
            self.router_bias = nnx.Param(jnp.zeros((experts,), config.param_dtype))
        self.up, self.up_bias = matrices(UP), biases(d_ff)
        self.gate = nnx.data(matrices(UP) if gated else None)
        self.gate_bias = biases(d_ff) if gated else nnx.data(None)
        self.down, self.down_bias = matrices(DOWN, config.residual_init_scale), biases(d_model)
        self.jitter = Jitter(config.router_jitter, rngs=rngs)
        self.dropout = Dropout(config.dropout_rate, rngs=rngs)
        self.shared = nnx.data(None)
        if config.num_shared_experts:
            self.shared = FeedForward(rngs, dataclasses.replace(config, d_ff=config.num_shared_experts * d_ff))

    @jax.named_scope("mixture_of_experts")
    def __call__(
        self,
        x: Float[Array, "*L D"],
        *,
        padding_mask: Bool[ArrayLike, "*L"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "*L D"], dict[str, Float[Array, "..."]]]:
        """The outputs of the tokens' experts, and statistics of the routing.

        Args:
            x: (..., d_model).
            padding_mask: boolean (...), True for real tokens, by default all. Only the statistics depend on it.
            deterministic: no dropout and no jitter; None means the attribute that `train()` and `eval()` set, initially
                True.
            rngs: randomness of dropout and jitter, instead of the stored streams.

        Returns:
            (..., d_model), and float32 arrays over the real tokens of x, 0 if there are none. A token with
            NaN contaminates its own row and, if real, the first three arrays:
            `load_balance_loss`: num_experts * sum_e load_e * mean probability_e, 1 when balanced; to be added to a
            training loss with a weight of about 0.01 (Switch, equation 4).
            `router_z_loss`: mean of logsumexp(logits)^2, with a weight of about 0.001 (ST-MoE, equation 5).
            `router_entropy`: mean entropy of the probabilities, in nats.
            `expert_load`: (num_experts,), the part of the assignments that each expert received.
            Probabilities are the scores divided by their sum.

        Raises:
            ValueError: x is not of width d_model, padding_mask does not fit x, or dropout or jitter is on and has no
                randomness.
        """
        config = self.config
        if x.ndim == 0 or x.shape[-1] != config.d_model:
            raise ValueError(f"MixtureOfExperts: x must be (..., {config.d_model}); got x.shape={x.shape}.")
        real = None
        if padding_mask is not None:
            real = jnp.asarray(padding_mask)
            if real.shape != x.shape[:-1] or real.dtype != jnp.bool_:
                raise ValueError(
                    f"MixtureOfExperts: padding_mask must be boolean {x.shape[:-1]}, True for real tokens; "
                    f"got padding_mask.shape={real.shape}, dtype={real.dtype}."
                )
        logits = self._logits(x, deterministic, rngs)
        scores = jax.nn.log_softmax(logits) if config.router_type == "softmax" else jax.nn.log_sigmoid(logits)
        chosen, experts = per_token(partial(lax.top_k, k=config.top_k), scores)
        # The softmax of logarithms: sigmoids may be so small that their sum is 0.
        weights = jax.nn.softmax(chosen) if config.router_renormalize else jnp.exp(chosen)
        routes = Routes(experts, weights, self._kept((*experts.shape, config.d_ff), deterministic, rngs))
        out = mix(config, self._parameters(), x.astype(config.dtype), routes)
        if self.shared is not None:
            out = out + self.shared(x, deterministic=deterministic, rngs=rngs)
        return out, _statistics(logits, scores, experts, real)

    def _parameters(self) -> Experts:
        matrices = self.up, self.gate, self.down, self.up_bias, self.gate_bias, self.down_bias
        return Experts(*(None if x is None else x[...] for x in matrices))

    def _kept(self, shape: tuple[int, ...], deterministic: bool | None, rngs: nnx.Rngs | None) -> Array | None:
        """The hidden features of each token in each of its experts that dropout keeps; None without dropout."""
        key = self.dropout.key(deterministic, rngs)
        return None if key is None else jax.random.bernoulli(key, 1.0 - self.dropout.rate, shape)

    def _logits(
        self, tokens: Float[Array, "*L D"], deterministic: bool | None, rngs: nnx.Rngs | None
    ) -> Float[Array, "*L E"]:
        """x @ router + router_bias, in at least float32, with jitter of x in training."""
        # float32: bfloat16 rounds scores that lie close together to one number.
        dtype = jnp.float64 if self.config.dtype == "float64" else jnp.float32
        tokens = self.jitter(tokens.astype(dtype), deterministic=deterministic, rngs=rngs)
        # "highest": accelerators would multiply float32 in fewer bits.
        logits = jnp.matmul(tokens, gather(self.router[...].astype(dtype), *_ROUTER), precision="highest")
        if self.router_bias is None:
            return logits
        return logits + self.router_bias[...].astype(dtype).reshape((1,) * (logits.ndim - 1) + (-1,))


def _statistics(
    logits: Float[Array, "*L E"],
    scores: Float[Array, "*L E"],
    experts: Int[Array, "*L C"],
    real: Bool[Array, "*L"] | None,
) -> dict[str, Array]:
    """The statistics that `MixtureOfExperts` documents, over the real tokens; scores are logarithms."""
    real = jnp.ones(scores.shape[:-1], bool) if real is None else real
    count, load, probability, squares, entropy = sum_tokens(_sums, logits, scores, experts, real[..., None])
    count = jnp.maximum(count, 1).astype(scores.dtype)
    load = load.astype(scores.dtype) / jnp.maximum(load.sum(), 1).astype(scores.dtype)
    statistics = {
        "load_balance_loss": scores.shape[-1] * (load * (probability / count)).sum(),
        "router_z_loss": squares / count,
        "router_entropy": entropy / count,
        "expert_load": load,
    }
    return {name: value.astype(jnp.float32) for name, value in statistics.items()}


def _sums(logits: Array, scores: Array, experts: Array, real: Array) -> tuple[Array, ...]:
    """Over real tokens: their number, choices and probability by expert, squared logsumexp of the logits, entropy."""
    logits, scores, experts = (array.reshape(-1, array.shape[-1]) for array in (logits, scores, experts))
    real, num_experts = real.reshape(-1, 1), scores.shape[-1]
    # Selected, not multiplied by 0: padding may hold NaN. An out-of-range index is not counted.
    load = jnp.bincount(jnp.where(real, experts, num_experts).reshape(-1), length=num_experts)
    log_probability = jax.nn.log_softmax(scores)
    probability = jnp.exp(log_probability)
    squares = jnp.square(jax.nn.logsumexp(logits, -1, keepdims=True))
    entropy = -(probability * log_probability).sum(-1, keepdims=True)
    of_expert, squares, entropy = (jnp.where(real, x, 0).sum(0) for x in (probability, squares, entropy))
    return real.sum(), load, of_expert, squares[0], entropy[0]
