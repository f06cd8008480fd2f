"""Published ideas about attention, each in a few lines of Attnax, and what they cost.

The table takes 14 minutes 37 seconds of processor time on an Intel Xeon of 2.0 GHz with AVX-512, on which
`digits.py` takes 4 minutes 45 seconds.

    python examples/attention_gallery.py                # a table: lines, exactness, tiles, where each idea runs
    python examples/attention_gallery.py --write docs/guides   # the page gallery.md and its pictures

Each idea is a function, and its source is what the page shows. `attend` is the kernel. Options such as `mask` go to it,
so that most of the functions are themselves attention functions for layers and models.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gallery_ideas import AS_BLOCK, AS_KERNEL, AS_KERNEL_WITH_NUMBERS, AS_MODEL, IDEAS, idea, in_block, in_layer
from gallery_page import make_page
from jax import lax

from attnax import (
    EncoderBlock,
    TransformerLM,
    cached_attention,
    flash_attention,
    init_kv_layer_cache,
    masks,
    merge_attention,
    standard_attention,
)
from attnax.kernels.score_mods import additive_bias_mod, compose_score_mods
from attnax.models.transformer import TokenHead
from attnax.nn import Output, RotaryEmbedding, attend, first_layers

QKV = {"query": "BNTH", "key": "BKTH", "value": "BKTV"}


def random_links(count):
    """Which blocks attend which by chance, one other for each."""
    links = np.eye(count, dtype=bool)
    links[np.arange(count), np.random.default_rng(0).permutation(count)] = True
    return jnp.asarray(links)


def in_cache(arrays):
    """The arguments of `tree_attention`: the keys and values of the text are in a cache."""
    key, value = arrays.pop("text_key"), arrays.pop("text_value")
    rows, heads, length, head_dim = key.shape
    cache = init_kv_layer_cache(rows, heads, head_dim, length, key.dtype, value_head_dim=value.shape[3])
    return arrays | {"text": cache.append({"keys": key, "values": value}, np.arange(length))[1]}


@idea(
    "Differential attention",
    "T. Ye et al., 2024",
    "2410.05258",
    takes=dict(query="2BNTH", key="2BKTH", value="BKTV", weight="N"),
)
def differential_attention(query, key, value, weight, attend=flash_attention, **options):
    """The difference of two softmaxes over the same values: what both attend, as noise, cancels.

    Queries and keys come in pairs (2, B, N, T, H); `weight` is the paper's lambda of each head.
    """
    first, second = (attend(q, k, value, **options) for q, k in zip(query, key, strict=True))
    return first - weight[None, :, None, None] * second


@idea(
    "Attention sinks", "G. Xiao et al., 2023", "2309.17453", place=AS_KERNEL_WITH_NUMBERS, takes=dict(**QKV, sink="N")
)
def sink_attention(query, key, value, sink, attend=flash_attention, **options):
    """A learned score of each head that takes a share of the softmax and has no value.

    The log-sum-exp of the kernel is enough: the rest of the weight is a sigmoid of its distance to the sink.
    """
    out, lse = attend(query, key, value, return_lse=True, **options)
    return out * jax.nn.sigmoid(lse - sink[None, :, None])[..., None]


@idea(
    "Sigmoid attention",
    "J. Ramapuram et al., 2024",
    "2409.04431",
    place=AS_KERNEL_WITH_NUMBERS,
    takes=dict(**QKV, bias="N"),
)
def sigmoid_attention(query, key, value, bias, attend=flash_attention, score_mod=None, **options):
    """The weight of a key is sigmoid(score + bias), whatever the other keys are.

    A score mod gives the logarithm of the weight, and exp(lse) takes the softmax's division back.
    """
    mod = compose_score_mods(score_mod, lambda scores, b, h, q, kv: jax.nn.log_sigmoid(scores + bias[h]))
    out, lse = attend(query, key, value, score_mod=mod, return_lse=True, **options)
    return out * jnp.exp(lse)[..., None]


@idea("Softpick", "Z. M. K. Zuhri et al., 2025", "2504.20966", place=AS_KERNEL, takes=QKV)
def softpick(query, key, value, attend=flash_attention, score_mod=None, **options):
    """relu(exp(s) - 1) / (sum |exp(s) - 1| + eps): keys with a negative score get the weight 0, and no sink arises."""
    size = lambda s: jnp.maximum(s, 0) + jnp.log(-jnp.expm1(-abs(s)))  # log |exp(s) - 1|
    picked = compose_score_mods(score_mod, lambda s, b, h, q, kv: jnp.where(s > 0, size(s), -jnp.inf))
    out, above = attend(query, key, value, score_mod=picked, return_lse=True, **options)
    mod = compose_score_mods(score_mod, lambda s, b, h, q, kv: size(s))
    _, below = attend(query, key, value, score_mod=mod, return_lse=True, **options)
    return out * jnp.exp(above - jnp.logaddexp(below, math.log(1e-6)))[..., None]


@idea("Stick-breaking attention", "S. Tan et al., 2024", "2410.17980", takes=QKV)
def stick_breaking_attention(query, key, value, attend=standard_attention):
    """Going back from a query, each key breaks the part sigmoid(score) off what is left of a stick.

    What is left depends on the keys between, so a score mod mixes pairs, which only `standard_attention` computes.
    """

    def mod(scores, b, h, q, kv):
        left = jnp.where(kv < q, jax.nn.log_sigmoid(-scores), 0)
        return jax.nn.log_sigmoid(scores) + lax.cumsum(left, axis=3, reverse=True) - left

    before = lambda b, h, q, kv: kv < q
    out, lse = attend(query, key, value, mask=before, score_mod=mod, return_lse=True)
    return out * jnp.exp(lse)[..., None]


@idea(
    "Talking heads",
    "N. Shazeer et al., 2020",
    "2003.02436",
    takes=dict(query="BNTH", key="BNTH", value="BNTV", before="NN", after="NN"),
)
def talking_heads(query, key, value, before, after, attend=standard_attention, **options):
    """A matrix mixes the scores of the heads before the softmax, another one their weights after it."""
    mix = lambda scores, b, h, q, kv: jnp.einsum("BNTS,NM->BMTS", scores, before)
    unit = jnp.broadcast_to(jnp.eye(key.shape[2], dtype=value.dtype), (*key.shape[:3], key.shape[2]))
    weights = attend(query, key, unit, score_mod=mix, **options)
    return jnp.einsum("BNTS,NM,BMSV->BMTV", weights, after, value)


@idea("Forgetting Transformer", "Z. Lin et al., 2025", "2503.02130", takes=dict(**QKV, gate="BNT"))
def forgetting_attention(query, key, value, gate, attend=flash_attention, **options):
    """Each token forgets a part of all tokens before it: scores fall by the logarithms of the gates between."""
    total = jnp.cumsum(jax.nn.log_sigmoid(gate), axis=-1)
    mod = lambda scores, b, h, q, kv: scores + total[b, h, q] - total[b, h, kv]
    return attend(query, key, value, score_mod=mod, **options)


@idea(
    "Contextual position encoding (CoPE)",
    "O. Golovneva et al., 2024",
    "2405.18719",
    takes=dict(query="BNTH", key="BNTH", value="BNTV", table="HP"),
)
def contextual_positions(query, key, value, table, attend=flash_attention):
    """The distance of a key is the number of keys on the way whose gate is open, and it need not be whole.

    `table` holds an embedding of each whole distance. The bias of all pairs is an array.
    """
    scores = jnp.einsum("BNTH,BNSH->BNTS", query, key) * query.shape[-1] ** -0.5
    gates = jnp.tril(jax.nn.sigmoid(scores))
    distance = jnp.minimum(lax.cumsum(gates, axis=3, reverse=True), table.shape[1] - 1)
    low = jnp.floor(distance)
    at = jnp.einsum("BNTH,HP->BNTP", query, table)
    near, far = (jnp.take_along_axis(at, x.astype(int), axis=3) for x in (low, jnp.ceil(distance)))
    bias = additive_bias_mod(near + (distance - low) * (far - near))
    return attend(query, key, value, mask=masks.causal(), score_mod=bias)


@idea(
    "Data-adaptive positions (DAPE)",
    "C. Zheng et al., 2024",
    "2405.14722",
    takes=dict(query="BNTH", key="BNTH", value="BNTV", slopes="N", inner="MF", outer="FN"),
)
def adaptive_positions(query, key, value, slopes, inner, outer, attend=standard_attention, **options):
    """A small network of all heads' scores and biases adds to the bias of each head."""

    def mod(scores, b, h, q, kv):
        bias = jnp.broadcast_to(-slopes[h] * abs(q - kv), scores.shape)
        hidden = jnp.einsum("BMTS,MF->BFTS", jnp.concatenate([scores, bias], axis=1), inner)
        return scores + bias + jnp.einsum("BFTS,FN->BNTS", jax.nn.leaky_relu(hidden), outer)

    return attend(query, key, value, score_mod=mod, **options)


@idea(
    "Mixture of block attention (MoBA)",
    "E. Lu et al., 2025",
    "2502.13189",
    takes=dict(query="BNTH", key="BNTH", value="BNTV"),
    gets=lambda length: {"block": length // 8},
)
def block_attention(query, key, value, block, top=3, attend=flash_attention):
    """Each query attends its own block of keys, and the `top - 1` blocks before whose mean key suits it best."""
    means = key.reshape(*key.shape[:2], -1, block, key.shape[3]).mean(3)
    scores = jnp.einsum("BNTH,BNCH->BNTC", query, means)
    ahead = jnp.arange(means.shape[2])[None] - jnp.arange(query.shape[2])[:, None] // block
    scores = jnp.where((ahead < 0)[None, None], scores, jnp.where(ahead == 0, jnp.inf, -jnp.inf)[None, None])
    chosen = scores >= lax.top_k(scores, top)[0][..., -1:]
    mask = masks.causal() & (lambda b, h, q, kv: chosen[b, h, q, kv // block])
    return attend(query, key, value, mask=mask)


@idea(
    "Native sparse attention (NSA)",
    "J. Yuan et al., 2025",
    "2502.11089",
    takes=dict(**QKV, pool="L", gates="3BNT"),
    gets=lambda length: {"window": length // 4, "top": 3},
)
def native_sparse_attention(query, key, value, pool, gates, top, window, attend=flash_attention):
    """Three branches with gates: summaries of blocks, the blocks with the best summaries, and a window.

    `pool` has the weights of a block's summary. Heads that share keys choose their blocks together.
    """
    (batch, groups, length, _), block = key.shape, pool.shape[0]
    summary = lambda x: jnp.einsum("BKCLH,L->BKCH", x.reshape(batch, groups, -1, block, x.shape[3]), pool)
    ended = lambda b, h, q, kv: kv < (q + 1) // block
    coarse = attend(query, summary(key), summary(value), mask=ended)

    blocks = jnp.arange(length // block)
    unit = jnp.broadcast_to(jnp.eye(len(blocks), dtype=value.dtype), (batch, groups, len(blocks), len(blocks)))
    weights = attend(query, summary(key), unit, mask=ended)
    weights = weights.reshape(batch, groups, -1, length, len(blocks)).sum(2)
    own = jnp.arange(length)[:, None] // block == blocks[None]
    weights = jnp.where(own[None, None], jnp.inf, weights)
    chosen = weights >= lax.top_k(weights, top)[0][..., -1:]
    best = lambda b, h, q, kv: chosen[b, h * groups // query.shape[1], q, kv // block]
    fine = attend(query, key, value, mask=masks.causal() & best)
    near = attend(query, key, value, mask=masks.causal() & masks.sliding_window(window))
    return (jax.nn.sigmoid(gates)[..., None] * jnp.stack([coarse, fine, near])).sum(0)


@idea(
    "Packed documents with prefixes",
    "C. Raffel et al., 2019; M. M. Krell et al., 2021",
    "2107.02027",
    takes=QKV,
    gets=lambda length: {"cu_seqlens": np.array([0, 3, 5, 7]) * length // 8, "is_prefix": jnp.arange(length) % 23 < 9},
)
def packed_prefixes(query, key, value, cu_seqlens, is_prefix, attend=flash_attention):
    """Several documents in a row; in each, all tokens attend its prefix tokens, and those before themselves."""
    documents = masks.documents(masks.document_ids(cu_seqlens, query.shape[2]))
    to_prefix = lambda b, h, q, kv: is_prefix[kv]
    return attend(query, key, value, mask=documents & (masks.causal() | to_prefix))


@idea(
    "BigBird",
    "M. Zaheer et al., 2020",
    "2007.14062",
    takes=QKV,
    gets=lambda length: {"links": random_links(8), "block": length // 8, "window": length // 16, "hubs": length // 32},
)
def big_bird(query, key, value, links, block, window, hubs, attend=flash_attention):
    """A window, a few tokens that attend and are attended by all, and random blocks of keys for each block."""
    to_all = lambda b, h, q, kv: (q < hubs) | links[q // block, kv // block]
    mask = masks.sliding_window(window, causal=False) | masks.first(hubs) | to_all
    return attend(query, key, value, mask=mask)


@idea(
    "Neighbourhood attention",
    "A. Hassani et al., 2022",
    "2204.07143",
    takes=QKV,
    gets=lambda length: {"width": 16, "size": 5},
)
def neighbourhood_attention(query, key, value, width, size, attend=flash_attention):
    """Each pixel of an image attends the `size` x `size` pixels around it, as many at the edges."""
    height = query.shape[2] // width
    near = lambda q, kv, end: abs(jnp.clip(q, size // 2, end - 1 - size // 2) - kv) <= size // 2
    mask = lambda b, h, q, kv: near(q // width, kv // width, height) & near(q % width, kv % width, width)
    return attend(query, key, value, mask=mask)


@idea(
    "A prefix that all rows share",
    "J. Juravsky et al. (Hydragen), 2024",
    "2402.05099",
    takes=dict(query="BNTH", prefix_key="1KPH", prefix_value="1KPV", key="BKTH", value="BKTV"),
)
def shared_prefix_attention(query, prefix_key, prefix_value, key, value, attend=flash_attention):
    """The prefix is attended once, by the queries of all rows as one long row; then two parts become one softmax."""
    (batch, heads, length, _), options = query.shape, {"return_lse": True}
    rows = query.swapaxes(0, 1).reshape(1, heads, batch * length, -1)
    out, lse = attend(rows, prefix_key, prefix_value, **options)
    of_rows = lambda x: x.reshape(heads, batch, length, *x.shape[3:]).swapaxes(0, 1)
    own = attend(query, key, value, mask=masks.causal(), **options)
    return merge_attention([(of_rows(out), of_rows(lse)), own])[0]


@idea(
    "A tree of drafts",
    "X. Miao et al. (SpecInfer), 2023",
    "2305.09781",
    takes=dict(query="BNTH", text_key="BKPH", text_value="BKPV", key="BKTH", value="BKTV"),
    prepares=in_cache,
    gets=lambda length: {"parents": (np.arange(length) - 1) // 3},
)
def tree_attention(query, text, key, value, parents, attend=flash_attention):
    """All drafts are verified in one call: each attends the text in a cache, its ancestors and itself.

    `parents` has the index of each draft's parent, -1 for the first. Positions follow the depth in the tree.
    """
    ancestors = np.eye(len(parents), dtype=bool)
    for draft in range(1, len(parents)):
        ancestors[draft] |= ancestors[parents[draft]]
    positions = text.next_positions()[:, None] + ancestors.sum(1)[None] - 1
    behind = cached_attention(query, text, positions, return_lse=True)
    drafts = attend(query, key, value, mask=ancestors, return_lse=True)
    return merge_attention([behind, drafts])[0]


@idea(
    "Multi-head latent attention (MLA)",
    "DeepSeek-AI, 2024",
    "2405.04434",
    place=in_block(num_kv_heads=1, head_dim=12, value_head_dim=8),
)
class LatentAttention(nnx.Module):
    """All heads read one latent of each token and one rotated key: a cache stores these, and the latent as the value.

    The query projection holds that of the keys, the output projection that of the values.
    """

    def __init__(self, rngs, config):
        latent, rotated = config.value_head_size, config.head_size - config.value_head_size
        sizes = {"query": config.num_heads * latent, "turned_query": config.num_heads * rotated}
        for name, size in (sizes | {"latent": latent, "turned_key": rotated}).items():
            setattr(self, name, nnx.Linear(config.d_model, size, use_bias=False, rngs=rngs, param_dtype=config.dtype))
        self.out = nnx.Linear(sizes["query"], config.d_model, use_bias=False, rngs=rngs, param_dtype=config.dtype)
        self.num_heads, self.rope = config.num_heads, RotaryEmbedding(rotated)

    def run(self, x, *, mask=None, score_mod=None, position_ids_q=None, kv_cache=None, **mode):
        heads = lambda layer, count: layer(x).reshape(*x.shape[:2], count, -1).swapaxes(1, 2)
        turned = lambda layer, count: self.rope(heads(layer, count), position_ids_q)
        query = [heads(self.query, self.num_heads), turned(self.turned_query, self.num_heads)]
        latent, options = heads(self.latent, 1), {"mask": mask, "score_mod": score_mod}
        query, key = (jnp.concatenate(x, axis=3) for x in (query, [latent, turned(self.turned_key, 1)]))
        out, cache = attend(query, key, latent, position_ids=position_ids_q, kv_cache=kv_cache, **options)
        return self.out(out.swapaxes(1, 2).reshape(*x.shape[:2], -1)), cache


@idea("Gated attention", "Z. Qiu et al., 2025", "2505.06708", place=AS_MODEL)
def gated_attention(rngs, config):
    """A sigmoid of the input gates each element of the heads, before the output projection."""
    return TransformerLM(rngs, replace(config, attention_gate="element"))


@idea("Forgetting Transformer in a model", "Z. Lin et al., 2025", "2503.02130", place=in_layer("token_scalars"))
class ForgetGate(nnx.Module):
    """The gates of each token enter the scores as running sums, which have slots of their own in a cache."""

    cumulative = True

    def __init__(self, rngs, config):
        self.gate = nnx.Linear(config.d_model, config.num_heads, rngs=rngs, param_dtype=config.dtype)

    def __call__(self, x):
        return jax.nn.log_sigmoid(self.gate(x)).swapaxes(1, 2)

    def mod(self, scores, b, h, q, kv, of_query, of_key):
        return scores + of_query - of_key


@idea("Differential transformer", "T. Ye et al., 2024", "2410.05258", place=in_layer("attention_fn"))
class DifferentialHeads(nnx.Module):
    """Each head is two halves with a map of attention each; the difference of the maps is normed."""

    takes_mask_objects = True

    def __init__(self, rngs, config):
        self.share = nnx.Param(jnp.full((config.num_heads,), 0.8, config.dtype))
        self.norm = nnx.RMSNorm(config.value_head_size, rngs=rngs, param_dtype=config.dtype)

    def __call__(self, query, key, value, **options):
        pairs = (jnp.stack(jnp.split(x, 2, axis=3)) for x in (query, key))
        return 0.2 * self.norm(differential_attention(*pairs, value, self.share[...], **options))


@idea("Value residual", "Z. Zhou et al., 2024", "2410.17897", place=AS_BLOCK)
class ValueResidual(EncoderBlock):
    """Later layers mix the values of the first layer into their own; the carry of the stack brings them."""

    def __init__(self, rngs, config):
        super().__init__(rngs, config)
        self.shares = nnx.Param(jnp.full((2,), 0.5, config.dtype))

    def init_carry(self, x, input_ids):
        return {"first": self.attention.values(self.around_attention.norm_in(x)), "layer": 0}

    def run(self, x, *, carry, **options):
        first, own = self.shares[...]
        mix = lambda values: jnp.where(carry["layer"] == 0, values, first * carry["first"] + own * values)
        out = super().run(x, mix_values=mix, **options)
        return out._replace(carry=carry | {"layer": carry["layer"] + 1})


@idea("Hyper-connections", "D. Zhu et al., 2024", "2409.19606", place=AS_BLOCK)
class HyperConnections(EncoderBlock):
    """Two streams in place of one: each sublayer reads a mixture of them, and writes to a mixture of them."""

    def __init__(self, rngs, config):
        super().__init__(rngs, config)
        self.reads, self.writes = (nnx.Param(jnp.ones((2, 2), config.dtype)) for _ in range(2))
        self.mixes = nnx.Param(jnp.ones((2, 2, 2), config.dtype))

    def init_carry(self, x, input_ids):
        return jnp.stack([x, x])

    def run(self, x, *, carry, mask, position_ids, cache=None, **options):
        attend = lambda x: self.attention.run(x, mask=mask, position_ids_q=position_ids, kv_cache=cache, **options)
        around = self.around_attention, self.around_feed_forward
        for n, sublayer in enumerate((attend, lambda x: (self.feed_forward(x), None))):
            branch, extra = around[n].branch(jnp.einsum("nBTD,n->BTD", carry, self.reads[n]), sublayer)
            carry = (
                jnp.einsum("nBTD,nm->mBTD", carry, self.mixes[n]) + branch[None] * self.writes[n][:, None, None, None]
            )
            cache = cache if n else extra
        return Output(carry.sum(0), cache, {}, carry=carry)


@idea("Embeddings a layer", "Google (Gemma 3n), 2025", "https://ai.google.dev/gemma/docs/gemma-3n", place=AS_BLOCK)
class LayerEmbeddings(EncoderBlock):
    """Each layer looks the tokens up in a table of its own."""

    def __init__(self, rngs, config):
        super().__init__(rngs, config)
        self.table = nnx.Param(jnp.zeros((config.vocab_size, config.d_model), config.dtype))

    def init_carry(self, x, input_ids):
        return input_ids

    def run(self, x, *, carry, **options):
        return super().run(x + self.table[carry], **options)


@idea("Early exit", "M. Elhoushi et al. (LayerSkip), 2024", "2404.16710", place=AS_MODEL)
def early_exit(rngs, config):
    """The first layers with the last norm and the head: a model of its own, and a draft for the whole one."""
    return first_layers(TransformerLM(rngs, config), 1)


@idea(
    "Several heads of tokens",
    "F. Gloeckle et al., 2024",
    "2404.19737",
    place=AS_MODEL,
    result=lambda model, ids: jnp.stack([*model.losses(ids)]),
)
class SeveralTokens(TransformerLM):
    """Further heads predict the tokens behind the next one; `generate` uses the first head."""

    def __init__(self, rngs, config, **parts):
        super().__init__(rngs, config, **parts)
        self.further = nnx.List([TokenHead(rngs, config) for _ in range(2)])

    def losses(self, ids):
        hidden = self.run(ids).hidden
        for ahead, head in enumerate((self.head, *self.further), 1):
            log_probs = jax.nn.log_softmax(head(hidden[:, :-ahead], self.decoder.embed.tokens))
            yield -jnp.take_along_axis(log_probs, ids[:, ahead:, None], axis=2).mean()


def main(arguments=None):
    """Prints the table, and returns the ideas with what was measured."""
    return make_page(IDEAS, __doc__, arguments)


if __name__ == "__main__":
    main()
