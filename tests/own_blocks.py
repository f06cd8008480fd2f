"""Blocks with state of their own from three papers, as a user writes them, and their plain definitions."""

import jax
import jax.numpy as jnp
from flax import nnx

from attnax import MultiHeadAttention
from attnax.nn import EncoderBlock, FeedForward, Output, create_norm


class ValueResidual(EncoderBlock):
    """Each layer after the first mixes its values with those of the first (Z. Zhou et al., 2024, arXiv 2410.17897)."""

    def __init__(self, rngs, config):
        super().__init__(rngs, config)
        self.shares = nnx.Param(jnp.full((2,), 0.5, config.param_dtype))

    def init_carry(self, x, input_ids):
        values = self.attention.keys_values(self.around_attention.norm_in(x)).values
        return {"first": values, "layer": 0}

    def run(self, x, *, carry, **options):
        first, own = self.shares[...]

        def mix(values):
            return jnp.where(carry["layer"] == 0, values, first * carry["first"] + own * values)

        out = super().run(x, mix_values=mix, **options)
        return out._replace(carry=carry | {"layer": carry["layer"] + 1})


class HyperConnections(nnx.Module):
    """Several streams in place of one, with learned connections (D. Zhu et al., 2024, arXiv 2409.19606; static)."""

    def __init__(self, rngs, config, num_streams=2):
        self.attention, self.feed_forward = MultiHeadAttention(rngs, config), FeedForward(rngs, config)
        self.norms = nnx.List([create_norm("rms", config.d_model, rngs=rngs) for _ in range(2)])
        self.reads = nnx.Param(jnp.zeros((2, num_streams)).at[:, 0].set(1.0))
        self.mixes = nnx.Param(jnp.tile(jnp.eye(num_streams), (2, 1, 1)))
        self.writes = nnx.Param(jnp.ones((2, num_streams)))

    def init_carry(self, x, input_ids):
        return jnp.repeat(x[:, :, None], self.reads.shape[1], axis=2)

    def connect(self, index, streams, sublayer):
        out, extra = sublayer(self.norms[index](jnp.einsum("BTnD,n->BTD", streams, self.reads[index])))
        mixed = jnp.einsum("BTnD,nm->BTmD", streams, self.mixes[index])
        return mixed + jnp.einsum("BTD,m->BTmD", out, self.writes[index]), extra

    def run(self, x, *, carry, mask, position_ids, cache=None, deterministic=None, rngs=None, **options):
        mode = {"deterministic": deterministic, "rngs": rngs}
        options |= {"mask": mask, "position_ids_q": position_ids, "kv_cache": cache, **mode}
        carry, cache = self.connect(0, carry, lambda x: self.attention.run(x, **options))
        carry, _ = self.connect(1, carry, lambda x: (self.feed_forward(x, **mode), None))
        return Output(carry.sum(2), cache, {}, carry=carry)


class LayerEmbeddings(EncoderBlock):
    """A table of token embeddings for each layer, as in Gemma 3n."""

    def __init__(self, rngs, config):
        super().__init__(rngs, config)
        self.table = nnx.Param(jnp.zeros((config.vocab_size, config.d_model), config.param_dtype))

    def init_carry(self, x, input_ids):
        return input_ids

    def run(self, x, *, carry, **options):
        return super().run(x + self.table[carry], **options)


def attend(attention, x, mix=lambda values: values):
    """Causal attention by its definition, (B, T, D)."""
    batch, length, _ = x.shape
    heads = [
        layer(x).reshape(batch, length, attention.config.num_heads, -1)
        for layer in (attention.query, attention.key, attention.value)
    ]
    query, key, value = heads[0], heads[1], mix(heads[2])
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool)[None, None], scores, -jnp.inf))
    return attention.out(jnp.einsum("BNTS,BSNH->BTNH", weights, value).reshape(batch, length, -1))


def feed(block, x):
    return x + block.feed_forward(block.around_feed_forward.norm_in(x))


def plain_value_residual(blocks, x, input_ids):
    first = None
    for block in blocks:
        normed = block.around_attention.norm_in(x)
        if first is None:
            first = block.attention.value(normed).reshape(*x.shape[:2], block.attention.config.num_heads, -1)
            attended = attend(block.attention, normed)
        else:
            one, own = block.shares[...]
            mixed = [first, one, own]
            attended = attend(block.attention, normed, lambda v, mixed=mixed: mixed[1] * mixed[0] + mixed[2] * v)
        x = feed(block, x + attended)
    return x


def plain_hyper_connections(blocks, x, input_ids):
    streams = [x, x]
    for block in blocks:
        for index, sublayer in enumerate((lambda x, block=block: attend(block.attention, x), block.feed_forward)):
            read, mix, write = block.reads[index], block.mixes[index], block.writes[index]
            out = sublayer(block.norms[index](read[0] * streams[0] + read[1] * streams[1]))
            streams = [mix[0, m] * streams[0] + mix[1, m] * streams[1] + write[m] * out for m in range(2)]
    return streams[0] + streams[1]


def plain_layer_embeddings(blocks, x, input_ids):
    for block in blocks:
        x = x + block.table[...][input_ids]
        x = feed(block, x + attend(block.attention, block.around_attention.norm_in(x)))
    return x


PLAIN = {
    ValueResidual: plain_value_residual,
    HyperConnections: plain_hyper_connections,
    LayerEmbeddings: plain_layer_embeddings,
}
