"""State that passes from block to block: published users against plain loops, in every form of the layers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from own_blocks import PLAIN, HyperConnections, LayerEmbeddings, ValueResidual
from tiny import build

import attnax
from attnax import TransformerConfig, TransformerDecoder, TransformerLM, VisionTransformer
from attnax.nn import EncoderBlock, Output, Stack, with_scan_layers

CONFIG = TransformerConfig(
    vocab_size=11, d_model=8, num_heads=2, num_layers=3, d_ff=6, max_len=64, dropout_rate=0.0, norm_type="rms"
)
IDS = np.random.default_rng(0).integers(0, 11, (2, 5))
BLOCKS = pytest.mark.parametrize("block", PLAIN, ids=lambda block: block.__name__)


def lm(block, **fields):
    return build(lambda rngs: TransformerLM(rngs, dataclasses.replace(CONFIG, **fields), make_block=block))


def hidden_and_gradients(model, run):
    """The result of run(model), and the gradients of its squares, with the layers apart."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        hidden = run(nnx.merge(graphdef, params, rest))
        return jnp.square(hidden).sum(), hidden

    (_, hidden), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return hidden, nnx.state(with_scan_layers(nnx.merge(graphdef, grads, rest), False), nnx.Param)


def assert_close(one, two):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-4, rtol=2e-4)


@BLOCKS
def test_a_published_block_is_its_plain_loop_in_every_form_of_the_layers(block):
    model = lm(block)

    def plain(model):
        stream = model.decoder.embed(jnp.asarray(IDS))
        return model.decoder.norm(PLAIN[block](model.decoder.stack.layers(), stream, IDS))

    wanted = hidden_and_gradients(model, plain)
    unused = [leaf for leaf in jax.tree.leaves(wanted[1].decoder.stack) if float(jnp.abs(leaf).max()) == 0]
    assert len(unused) == (block is ValueResidual)  # the first layer mixes nothing
    for fields in ({}, {"scan_layers": True, "remat": "full"}):
        form = nnx.clone(model)
        if fields:
            form = with_scan_layers(model, True)
            form.decoder.stack.config = dataclasses.replace(form.decoder.stack.config, **fields)
        assert_close(hidden_and_gradients(form, lambda model: model.decoder(IDS)), wanted)


@pytest.mark.parametrize(
    ("block", "scan_layers"),
    [
        (ValueResidual, True),
        (HyperConnections, False),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in ((ValueResidual, False), (LayerEmbeddings, True))
        ),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in ((HyperConnections, True), (LayerEmbeddings, False))
        ),
    ],
)
def test_a_published_block_writes_with_pages_what_it_writes_without_a_cache(block, scan_layers):
    model = lm(block, pos_emb_type="rope", scan_layers=scan_layers)
    written = np.asarray(model.generate(IDS, max_new_tokens=4, cache="paged").tokens)
    text = np.concatenate([IDS, written], 1)
    np.testing.assert_array_equal(written, np.asarray(model(text))[:, 4:-1].argmax(-1))


@pytest.mark.parametrize("kind", ["contiguous", pytest.param("ring", marks=pytest.mark.thorough)])
def test_a_carry_begins_anew_in_every_step_with_every_kind_of_cache(kind):
    model = lm(ValueResidual, pos_emb_type="rope", scan_layers=kind == "ring")
    written = np.asarray(model.generate(IDS, max_new_tokens=3, cache=kind, prefill_chunk=2).tokens)
    text = np.concatenate([IDS, written], 1)
    np.testing.assert_array_equal(written, np.asarray(model(text))[:, 4:-1].argmax(-1))


class Counter(EncoderBlock):
    """Counts the blocks before it, and takes the first tokens into the carry."""

    def init_carry(self, x, input_ids):
        return {"count": 0, "ids": jnp.zeros((), jnp.int32) if input_ids is None else input_ids}

    def run(self, x, *, carry, **options):
        out = super().run(x, **options)
        return out._replace(carry=carry | {"count": carry["count"] + 1})


def test_a_model_with_a_carry_is_trained_by_nnx_jit_after_a_call():
    """The carry is made by a copy of the block, whose parameters refuse every change; the block's own must not."""
    model = lm(LayerEmbeddings, num_layers=1)
    before = np.asarray(model(IDS))

    @nnx.jit
    def step(model):
        table = model.decoder.stack.blocks[0].table
        table[...] = table[...] + 1.0
        return model(IDS)

    after = step(model)
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_allclose(model(IDS), after, atol=1e-5)


def alternating(rngs, config):
    return (Counter if config.attention_window else EncoderBlock)(rngs, config)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_blocks_without_a_carry_leave_it_as_it_is(scan_layers):
    config = dataclasses.replace(
        CONFIG, num_layers=5, layer_pattern=({}, {"attention_window": 3}), scan_layers=scan_layers
    )

    def run():
        decoder = TransformerDecoder(nnx.Rngs(0), config, make_block=alternating)
        return decoder.run(IDS).carry

    carry = jax.jit(run)()
    assert int(carry["count"]) == 2 and carry["count"].dtype == jnp.int32
    np.testing.assert_array_equal(carry["ids"], IDS)


def test_images_have_no_token_ids():
    sizes = {"image_size": 4, "patch_size": 2, "d_model": 8, "num_heads": 2, "num_layers": 2, "d_ff": 6}
    out = jax.eval_shape(
        lambda x: VisionTransformer(nnx.Rngs(0), **sizes, make_block=Counter).run(x), np.ones((1, 4, 4, 3), np.float32)
    )
    assert out.carry["ids"].shape == () and out.carry["count"].shape == ()


class Drawing(EncoderBlock):
    """Draws from a random key that passes from block to block."""

    def init_carry(self, x, input_ids):
        return jax.random.key(0)

    def run(self, x, *, carry, **options):
        own, rest = jax.random.split(carry)
        return super().run(x + jax.random.normal(own, x.shape), **options)._replace(carry=rest)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_random_key_is_a_carry(scan_layers):
    config = dataclasses.replace(CONFIG, num_layers=2, scan_layers=scan_layers)

    def run():
        carry = TransformerDecoder(nnx.Rngs(0), config, make_block=Drawing).run(IDS).carry
        assert jnp.issubdtype(carry.dtype, jax.dtypes.prng_key)

    jax.eval_shape(run)


class Broken(EncoderBlock):
    """Breaks the protocol in the way that the tests set."""

    carry = 0.0
    result = staticmethod(lambda out: out)

    def init_carry(self, x, input_ids):
        return self.carry

    def run(self, x, *, carry, **options):
        return self.result(super().run(x, **options))


class NoOptions(EncoderBlock):
    def run(self, x, mask):
        return super().run(x, mask=mask)


class HandsOn(LayerEmbeddings):
    def run(self, x, **options):
        return EncoderBlock.run(self, x, **options)


class NoRun(nnx.Module):
    pass


class Unasked(EncoderBlock):
    def run(self, x, **options):
        return super().run(x, **options)._replace(carry=1.0)


class Writes(EncoderBlock):
    def __init__(self, rngs, config):
        super().__init__(rngs, config)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def init_carry(self, x, input_ids):
        self.calls[...] += 1


def broken(made=0.0, /, **changes):
    def result(out):
        return out._replace(**{name: change(out) for name, change in changes.items()})

    return type("Broken", (Broken,), {"carry": made, "result": staticmethod(result)})


@pytest.mark.parametrize(
    ("make_block", "words"),
    [
        (lambda rngs, config: NoRun(), r"an nnx.Module with run\(x, \*\*options\).*got NoRun without run"),
        (lambda rngs, config: None, "make_block must return a block.*got NoneType"),
        (HandsOn, "EncoderBlock: a class with init_carry keeps the carry to itself.*Write run.self, x, ., carry"),
        (NoOptions, "must take x and every option.*got NoOptions.run, for which got an unexpected keyword"),
        (broken(hidden=lambda out: out.hidden[:, 1:]), r"shape.*float32\[2, 5, 8\]; got float32\[2, 4, 8\] from Bro"),
        (broken(hidden=lambda out: out.hidden.astype("bfloat16")), r"the dtype of the stream.*got bfloat16\[2, 5, 8\]"),
        (broken(hidden=lambda out: None), "Output.hidden of a block must be an array; got NoneType from Broken.run"),
        (broken(aux=lambda out: None), "Output.aux of a block must be a dictionary, {} for none; got NoneType from B"),
        (broken(carry=lambda out: (out.hidden,)), r"keep the structure of the carry.*got .* from Broken.run"),
        (
            broken({"a": np.float32(0), "b": jnp.zeros(3)}, carry=lambda out: {"a": 0.0, "b": jnp.zeros(4)}),
            r"got \['b'\] of float32\[3\] before, and float32\[4\] from Broken.run",
        ),
        (broken(carry=lambda out: 0), r"got the carry of float32\[\] before, and int32\[\] from Broken.run"),
        (broken("text"), "Broken.init_carry: the carry must be a pytree of arrays"),
        (Unasked, "got a carry from Unasked.run, which has none. Define init_carry"),
        (Writes, "Writes.init_carry: it must leave the block as it is"),
    ],
)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_block_that_breaks_the_protocol_is_named(make_block, words, scan_layers):
    config = dataclasses.replace(CONFIG, num_layers=2, scan_layers=scan_layers)

    def run():
        with pytest.raises(ValueError, match=words):
            TransformerDecoder(nnx.Rngs(0), config, make_block=make_block)(IDS)

    jax.eval_shape(run)


def test_a_block_that_returns_no_output_or_loses_its_cache_is_named():
    def refuse(result, words):
        kind = type("Broken", (Broken,), {"result": staticmethod(result)})
        decoder = TransformerDecoder(nnx.Rngs(0), CONFIG, make_block=kind)
        caches = attnax.init_decoder_kv_caches_from_config(CONFIG, batch_size=2)
        with pytest.raises(ValueError, match=words):
            decoder(IDS, layer_kv_caches=caches)

    def run():
        refuse(lambda out: out.hidden, r"must return an attnax.nn.Output; got \w*Tracer from Broken.run")
        refuse(lambda out: Output(out.hidden, None, {}), "gets a cache must return the new one; got caches=None from B")

    jax.eval_shape(run)


def test_blocks_that_differ_by_their_depth_are_made_one_by_one_and_not_scanned_in_silence():
    def make_block(depths):
        def make(rngs, config):
            block = LayerEmbeddings(rngs, config)
            block.depth = next(depths)
            return block

        return make

    stack = nnx.eval_shape(lambda: Stack(attnax.nn.linear.ShapesOnly(0), CONFIG, make_block(itertools.count())))
    assert [block.depth for block in stack.blocks] == [0, 1, 2]
    scan = dataclasses.replace(CONFIG, scan_layers=True)
    with pytest.raises(ValueError, match="got LayerEmbeddingss? that differ in depth: 0 and 1. Keep what differs in"):
        nnx.eval_shape(lambda: Stack(nnx.Rngs(0), scan, make_block(itertools.count())))
    nnx.eval_shape(lambda: Stack(nnx.Rngs(0), scan, make_block(itertools.repeat(1))))
