"""The hooks of MultiHeadAttention, each by a published user against its formula, with caches and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build

from attnax import (
    BlockConfig,
    DecoderBlock,
    EncoderBlock,
    MultiHeadAttention,
    TransformerLM,
    flash_attention,
    init_kv_layer_cache,
    init_linear_layer_cache,
    init_paged_kv_cache,
    init_ring_kv_cache,
    masks,
    nn,
)
from attnax.cache import EmptyCache
from attnax.pretrained import CheckpointError, save_pretrained

WIDTH, HEADS, KV_HEADS, SIZE, LENGTH = 12, 4, 2, 6, 7
SIZES = {"d_model": WIDTH, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": SIZE, "dropout_rate": 0.0}
X = jax.device_put(np.random.default_rng(1).normal(size=(2, LENGTH, WIDTH)).astype(np.float32))


def attention(**options):
    return build(lambda rngs: MultiHeadAttention(rngs, **(SIZES | options)))


def heads(layer, x, count):
    return layer(x).reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def joined(x):
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def dense(query, key, value, scale=SIZE**-0.5):
    """Causal attention of heads, as a formula."""
    key, value = (jnp.repeat(x, query.shape[1] // x.shape[1], axis=1) for x in (key, value))
    scores = jnp.einsum("bnth,bnsh->bnts", query, key) * scale
    scores = jnp.where(np.tri(*scores.shape[2:], dtype=bool)[None, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(scores), value)


def projected(attn, x):
    return heads(attn.query, x, HEADS), heads(attn.key, x, KV_HEADS), heads(attn.value, x, KV_HEADS)


CACHES = {
    "contiguous": lambda: init_kv_layer_cache(2, KV_HEADS, SIZE, 8),
    "ring": lambda: init_ring_kv_cache(2, KV_HEADS, SIZE, 8),
    "paged": lambda: init_paged_kv_cache(
        num_blocks=4, block_size=4, num_kv_heads=KV_HEADS, head_dim=SIZE, batch_size=2, max_blocks_per_seq=2
    ),
}


def in_pieces(run, cache, ends=(4, LENGTH)):
    """The outputs of `run(first, last, cache) -> (out, cache)`, whose first call reads an empty cache."""
    outs, start, cache = [], 0, EmptyCache(cache)
    for end in ends:
        out, cache = run(start, end, cache)
        outs.append(out)
        start = end
    return jnp.concatenate(outs, axis=1)


def piecewise(attn, cache):
    return in_pieces(lambda i, j, cache: attn(X[:, i:j], mask=masks.causal(), kv_cache=cache), cache)


@nnx.jit
def called_and_piecewise(attns, caches):
    """The outputs of each layer in one call, and in calls with each cache."""
    return {
        name: [attn(X, mask=masks.causal()), *(piecewise(attn, cache) for cache in caches.values())]
        for name, attn in attns.items()
    }


def made_caches(*kinds):
    return {kind: CACHES[kind]() for kind in kinds}


def assert_all_close(outs, want, name=""):
    for out in outs:
        np.testing.assert_allclose(out, want, atol=3e-6, err_msg=name)


def test_gated_attention_multiplies_the_heads_before_the_output_projection():
    """Qiu et al. 2025."""
    attns = {kind: attention(attention_gate=kind) for kind in ("head", "element")}
    attns["without bias"] = attention(attention_gate="element", use_bias=("out",))
    assert attns["without bias"].gate.bias is None
    for name, outs in called_and_piecewise(attns, made_caches("paged")).items():
        attn = attns[name]
        gate = jax.nn.sigmoid(attn.gate(X)).reshape(2, LENGTH, HEADS, -1).swapaxes(1, 2)
        assert gate.shape[3] == (1 if name == "head" else SIZE)
        assert_all_close(outs, attn.out(joined(dense(*projected(attn, X)) * gate)), name)


@pytest.mark.parametrize("kind", ["linear", "lite"])
def test_heads_without_a_softmax_are_gated_too(kind):
    attn = attention(attention_gate="head", attention_type=kind, num_kv_heads=HEADS)

    @nnx.jit
    def run(attn, cache):
        out = attn(X, mask=masks.causal())
        pieces = out if cache is None else piecewise(attn, cache)
        gate, out_layer = attn.gate, attn.out
        attn.gate, attn.out = nnx.data(None), nnx.data(_Same(HEADS * SIZE))
        bare = attn(X, mask=masks.causal()).reshape(2, LENGTH, HEADS, SIZE)
        return out, pieces, out_layer((bare * jax.nn.sigmoid(gate(X))[..., None]).reshape(2, LENGTH, -1))

    cache = init_linear_layer_cache(2, HEADS, SIZE) if kind == "linear" else None
    out, pieces, want = run(attn, cache)
    assert_all_close((out, pieces), want)


class _Same(nnx.Module):
    def __init__(self, features):
        self.in_features = features

    def __call__(self, x):
        return x


def test_families_without_a_gate_refuse_to_save_one(tmp_path):
    kind = {"norm_type": "rms", "pos_emb_type": "rope", "ff_activation": "swiglu", "use_bias": False}
    sizes = {"vocab_size": 11, "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 8, "max_len": 8}
    model = build(lambda rngs: TransformerLM(rngs, **sizes, **kind, attention_gate="head"))
    with pytest.raises(CheckpointError, match="attention_gate='head' has no place in it"):
        save_pretrained(model, tmp_path / "model", family="llama")


class Temperature(nnx.Module):
    """Unit queries times one learned number; keys are unit vectors too."""

    def __init__(self):
        self.scale = nnx.Param(jnp.full((1,), 3.0))

    def __call__(self, heads, x):
        return unit(heads) * self.scale[...][None, None, None]


def unit(heads, x=None):
    return heads / jnp.linalg.norm(heads, axis=-1, keepdims=True)


class Gain(nnx.Module):
    """Each token scales its own values."""

    def __init__(self, rngs):
        self.gain = nnx.Linear(WIDTH, KV_HEADS, rngs=rngs)

    def __call__(self, heads, x):
        return heads * jax.nn.sigmoid(self.gain(x)).swapaxes(1, 2)[..., None]


def test_learned_query_and_key_transforms():
    """Query-key normalisation (Henry et al. 2020), and the value temperature of Zhang et al. 2024, with gradients."""

    def make(rngs):
        hooks = {"query_fn": Temperature(), "key_fn": unit, "value_fn": Gain(rngs)}
        return MultiHeadAttention(rngs, **SIZES, use_rope=True, attention_scale=1.0, **hooks)

    attn = build(make)
    graphdef, params, rest = nnx.split(attn, nnx.Param, ...)

    def formula(attn):
        query, key, value = projected(attn, X)
        query, key = (attn.rope(x) for x in (unit(query) * attn.query_fn.scale[...][None, None, None], unit(key)))
        value = value * jax.nn.sigmoid(attn.value_fn.gain(X)).swapaxes(1, 2)[..., None]
        return attn.out(joined(dense(query, key, value, scale=1.0)))

    @jax.jit
    def gradients(params):
        def loss(params, run):
            return (run(nnx.merge(graphdef, params, rest)) ** 2).sum()

        return [jax.grad(loss)(params, run) for run in (lambda attn: attn(X, mask=masks.causal()), formula)]

    assert_all_close(called_and_piecewise({"": attn}, made_caches("contiguous"))[""], formula(attn))
    have, want = gradients(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), have, want)
    learned = want["query_fn"]["scale"], want["value_fn"]["gain"]["kernel"]
    assert all((np.asarray(x[...]) != 0).all() for x in learned)


def test_keys_of_a_context_are_transformed_by_the_context():
    seen = {}

    def key_fn(heads, x):
        seen["x"] = x.shape
        return -heads

    attn = attention(key_fn=key_fn, context_features=5)
    context = jax.device_put(np.ones((2, 3, 5), np.float32))
    plain = attention(context_features=5)
    keys, negative = plain.keys_values(context).keys, attn.keys_values(context).keys
    assert seen["x"] == (2, 3, 5)
    np.testing.assert_array_equal(negative, -keys)


def test_value_residual_mixes_the_values_of_the_first_layer():
    """Zhou et al. 2024, for one layer: the values are the mean of its own and those of the first layer."""
    attn, first = attention(), attention(value_fn=lambda heads, x: heads * 2.0)
    block = build(lambda rngs: EncoderBlock(rngs, **SIZES, d_ff=5))

    @nnx.jit
    def run(attn, first, block, caches):
        def mixing(i, j):
            values = first.values(X[:, i:j])
            return lambda own: (own + values) / 2

        def of_attention(i, j, cache):
            return attn(X[:, i:j], mask=masks.causal(), kv_cache=cache, mix_values=mixing(i, j))

        def of_block(i, j, cache):
            return block(X[:, i:j], mask=masks.causal(), self_attn_kv_cache=cache, mix_values=mixing(i, j))

        outs = [attn(X, mask=masks.causal(), mix_values=mixing(0, LENGTH))]
        outs += [in_pieces(of_attention, cache) for cache in caches.values()]
        out = block(X, mask=masks.causal(), mix_values=mixing(0, LENGTH))
        return outs, [out, in_pieces(of_block, caches["ring"])], block(X, mask=masks.causal())

    outs, of_block, without = run(attn, first, block, made_caches("contiguous", "ring"))
    query, key, value = projected(attn, X)
    mixed = (value + 2 * heads(first.value, X, KV_HEADS)) / 2
    assert_all_close(outs, attn.out(joined(dense(query, key, mixed))))
    assert_all_close(of_block, of_block[0])
    assert np.abs(of_block[0] - without).max() > 0.1
    with pytest.raises(
        ValueError, match=r"mix_values must return heads of the shape \(2, 2, 7, 6\).*got \(2, 2, 7, 1\)"
    ):
        jax.eval_shape(lambda: attn(X, mix_values=lambda values: values[..., :1]))


class Differential(nnx.Module):
    """Two maps of attention, the second one subtracted; a head's query and key are two halves."""

    takes_mask_objects = True  # of the kernel inside

    def __init__(self, rngs, value_dim):
        self.share = nnx.Param(jnp.full((1,), 0.8))
        self.norm = nnx.RMSNorm(value_dim, rngs=rngs)

    def __call__(self, query, key, value, **options):
        (query1, query2), (key1, key2) = (jnp.split(x, 2, axis=-1) for x in (query, key))
        out1, out2 = flash_attention(query1, key1, value, **options), flash_attention(query2, key2, value, **options)
        return self.norm(out1 - self.share[...][None, None, None] * out2) * 0.2


class RotatedHalves:
    """RoPE of each half; no arrays."""

    def __init__(self, size):
        self.rope = nn.RotaryEmbedding(size)

    def __call__(self, heads, position_ids):
        return jnp.concatenate([self.rope(half, position_ids) for half in jnp.split(heads, 2, axis=-1)], axis=-1)


def differential(rngs):
    sizes = SIZES | {"head_dim": 8, "value_head_dim": SIZE}
    function = Differential(rngs, SIZE)
    return MultiHeadAttention(rngs, **sizes, attention_fn=function, rope=RotatedHalves(4))


def test_differential_transformer_is_an_attention_function_that_holds_its_parameters():
    """Ye et al. 2024: with every kind of cache, in a block, and with gradients."""
    attn = build(differential)
    graphdef, params, rest = nnx.split(attn, nnx.Param, ...)

    def formula(attn):
        query, key, value = projected(attn, X)
        query, key = attn.rope(query, None), attn.rope(key, None)
        out1, out2 = (dense(query[..., half], key[..., half], value, 4**-0.5) for half in (slice(4), slice(4, 8)))
        function = attn.attention_fn
        return attn.out(joined(function.norm(out1 - function.share[...][None, None, None] * out2) * 0.2))

    @jax.jit
    def gradients(params):
        def loss(params, run):
            return (run(nnx.merge(graphdef, params, rest)) ** 2).sum()

        return [jax.grad(loss)(params, run) for run in (lambda attn: attn(X, mask=masks.causal()), formula)]

    sizes = {"num_kv_heads": KV_HEADS, "head_dim": 8, "batch_size": 2}
    paged = init_paged_kv_cache(num_blocks=4, block_size=4, max_blocks_per_seq=2, value_dim=SIZE, **sizes)
    caches = {
        "ring": init_ring_kv_cache(2, KV_HEADS, 8, 8, value_head_dim=SIZE),
        "paged": paged,
    }
    assert_all_close(called_and_piecewise({"": attn}, caches)[""], formula(attn))
    have, want = gradients(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), have, want)
    assert np.abs(np.asarray(want["attention_fn"]["share"][...])).min() > 1e-4
    block = build(lambda rngs: EncoderBlock(rngs, **SIZES, d_ff=5, attention=differential(rngs)))
    out, cache = block(X, mask=masks.causal(), self_attn_kv_cache=EmptyCache(caches["ring"]))
    assert out.shape == X.shape and int(cache.next_positions()[0]) == LENGTH


class Latent(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024): all heads read one latent of a token, and a rotated key."""

    def __init__(self, rngs, width, num_heads, latent, rotated):
        def linear(d_in, d_out):
            return nnx.Linear(d_in, d_out, use_bias=False, rngs=rngs)

        self.num_heads, self.rope = num_heads, nn.RotaryEmbedding(rotated)
        self.latent, self.rotated_key = linear(width, latent), linear(width, rotated)
        self.query, self.rotated_query = linear(width, num_heads * latent), linear(width, num_heads * rotated)
        self.out = linear(num_heads * latent, width)

    def run(self, x, *, mask=None, score_mod=None, position_ids_q=None, kv_cache=None, **mode):
        latent, count = heads(self.latent, x, 1), self.num_heads
        rotated = (self.rope(heads(layer, x, n), position_ids_q)
                   for layer, n in ((self.rotated_query, count), (self.rotated_key, 1)))  # fmt: skip
        query, key = (jnp.concatenate(pair, axis=-1)
                      for pair in zip((heads(self.query, x, count), latent), rotated, strict=True))  # fmt: skip
        options = {"mask": mask, "score_mod": score_mod, "position_ids": position_ids_q, "kv_cache": kv_cache}
        out, cache = nn.attend(query, key, latent, **options)
        return self.out(joined(out)), cache


def latent_model():
    sizes = {"vocab_size": 11, "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 8, "max_len": 32}
    caches = {"num_kv_heads": 1, "head_dim": 6, "value_head_dim": 4}  # what `generate` makes
    model = build(lambda rngs: TransformerLM(rngs, **sizes, **caches, pos_emb_type="none", dropout_rate=0.0))
    config = model.config.layer(0)
    model.decoder.stack.blocks[0] = build(lambda rngs: EncoderBlock(rngs, config, attention=Latent(rngs, 8, 2, 4, 2)))
    return model


@pytest.mark.parametrize("kind", ["contiguous", "ring", "paged"])
def test_an_attention_of_ones_own_with_run_alone_generates_with_any_cache(kind):
    model, prompt = latent_model(), np.array([[3, 5, 8], [0, 2, 9]])
    real = np.array([[True] * 3, [False, True, True]])
    written = model.generate(prompt, max_new_tokens=4, cache=kind, padding_mask=real)
    ids = np.concatenate([prompt, written.tokens], axis=1)
    logits = nnx.jit(lambda model, real: model(ids, padding_mask=real))(
        model, np.pad(real, ((0, 0), (0, 4)), constant_values=True)
    )
    np.testing.assert_array_equal(written.tokens, np.argmax(logits, -1)[:, 2:-1])


class Dropping(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, heads, x):
        return self.dropout(heads)


def test_a_hook_may_have_state():
    attn = MultiHeadAttention(nnx.Rngs(0), **SIZES, query_fn=Dropping())
    count = attn.query_fn.dropout.rngs.count
    assert count[...] == 0  # though the layer has looked for hidden arrays
    jax.eval_shape(lambda: nnx.clone(attn)(jnp.ones((1, 3, attn.config.d_model))))
    attn(jax.device_put(np.ones((1, 1, attn.config.d_model), np.float32)))
    assert count[...] == 1


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", ["attention_fn", "score_mod", "rope", "query_fn", "key_fn", "value_fn"])
def test_hooks_that_are_no_functions_are_refused(name):
    def run():
        with pytest.raises(ValueError, match=rf"{name} must be a function, or an object with __call__; got {name}=3"):
            MultiHeadAttention(nnx.Rngs(0), **SIZES, **{name: 3})
        with pytest.raises(ValueError, match=f"{name} must be .*Make an object of the class."):
            MultiHeadAttention(nnx.Rngs(0), **SIZES, **{name: Dropping})

    jax.eval_shape(run)


def test_attend_reads_a_mask_of_arrays_by_position_with_a_cache():
    x = jax.device_put(np.random.default_rng(0).normal(size=(2, 2, 5, SIZE)).astype(np.float32))
    triangle = jnp.tri(5, dtype=bool)[None, None]
    whole, _ = nn.attend(x, x, x, mask=triangle)
    cache, parts = init_ring_kv_cache(2, 2, SIZE, 5), []
    for part in (x[:, :, :3], x[:, :, 3:]):
        out, cache = nn.attend(part, part, part, mask=triangle, kv_cache=cache)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, 2), whole, atol=1e-6)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_call_of_attend_that_does_not_fit_is_refused():
    x = jax.device_put(np.ones((2, 2, 3, SIZE), np.float32))
    cache = CACHES["contiguous"]()
    with pytest.raises(ValueError, match="attend: kv_cache must be a cache of one layer.*got tuple"):
        nn.attend(x, x, x, kv_cache=())
    with pytest.raises(ValueError, match="attend: with a cache keys must be those of the queries' tokens; got 2 keys"):
        nn.attend(x, x[:, :, :2], x[:, :, :2], kv_cache=cache)
    with pytest.raises(ValueError, match="attend: query and key must have the same head_dim"):
        nn.attend(x, x[..., :2], x)


ARRAY = jax.device_put(np.ones(SIZE, np.float32))


@pytest.mark.parametrize("name", ["query_fn", "key_fn", "value_fn"])
def test_transforms_that_hide_arrays_or_change_the_shape_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must not hide arrays"):
        attention(**{name: lambda heads, x: heads * ARRAY[None, None, None]})
    attn = attention(**{name: lambda heads, x: heads[:, :1]})
    with pytest.raises(ValueError, match=rf"{name} must return heads of the shape \(2, . *, 7, 6\) that it gets; got"):
        jax.eval_shape(lambda: attn(X))


@pytest.mark.parametrize("block", [EncoderBlock, DecoderBlock])
def test_a_block_takes_its_attention_or_the_parts_of_one(block):
    config = BlockConfig(**SIZES, d_ff=5)

    def make(**options):
        return nnx.eval_shape(lambda: block(nnx.Rngs(0), config, **options))

    attn = nnx.eval_shape(lambda: MultiHeadAttention(nnx.Rngs(0), **SIZES, attention_gate="head"))
    assert nnx.state(make(attention=attn).attention)["gate"]
    for options, name in (
        ({"attention_fn": flash_attention}, "attention_fn"),
        ({"score_mod": masks.causal()}, "score_mod"),
    ):
        with pytest.raises(ValueError, match=f"{block.__name__}: attention has a function .* got it with {name}"):
            make(attention=attn, **options)
    with pytest.raises(ValueError, match=f"{block.__name__}: attention must be an nnx.Module with run"):
        make(attention=nnx.eval_shape(lambda: nnx.RMSNorm(3, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("block", [EncoderBlock, DecoderBlock])
def test_hooks_of_attention_are_no_arguments_of_a_block(block):
    words = r"attention=MultiHeadAttention\(rngs, config, value_fn=...\); got value_fn"
    with pytest.raises(ValueError, match=words):
        block(nnx.Rngs(0), BlockConfig(d_model=4, num_heads=1, d_ff=4), value_fn=lambda heads, x: heads)
