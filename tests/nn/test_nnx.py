"""Every module and model under everything that Flax NNX does with modules, and which values depend on which in them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build

import attnax
from attnax import AttentionType, TransformerConfig, nn

SIZES = {"d_model": 12, "num_heads": 3, "d_ff": 10, "dropout_rate": 0.0}
CONFIG = TransformerConfig(vocab_size=23, num_layers=1, max_len=19, num_kv_heads=1, **SIZES)
VISION = {"image_size": (4, 6), "patch_size": 2, "num_channels": 1, "num_layers": 1, **SIZES}


def normal(*shape):
    return jax.device_put(np.random.default_rng(3).normal(size=shape).astype(np.float32))


IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
X, MIXTURE = normal(2, 5, 12), {"num_experts": 3, "top_k": 2}
MODULES = {  # how to make it, and the arguments of a call
    "MultiHeadAttention": (lambda rngs: nn.MultiHeadAttention(rngs, CONFIG), (X,)),
    "lite": (lambda rngs: nn.MultiHeadAttention(rngs, **SIZES, attention_type="lite"), (X,)),
    "sinks, qk-norm": (lambda rngs: nn.MultiHeadAttention(rngs, **SIZES, attention_sinks=True, qk_norm="head"), (X,)),
    "FeedForward": (lambda rngs: nn.FeedForward(rngs, 12, 10, ff_activation="swiglu"), (X,)),
    "MixtureOfExperts": (lambda rngs: nn.MixtureOfExperts(rngs, d_model=12, d_ff=10, **MIXTURE), (X,)),
    "EncoderBlock with experts": (lambda rngs: nn.EncoderBlock(rngs, **SIZES, **MIXTURE), (X,)),
    "DecoderBlock": (
        lambda rngs: _Bound(nn.DecoderBlock(rngs, norm_type="rms", norm_placement="sandwich", **SIZES)),
        (X, normal(2, 7, 12)),
    ),
    "TokenEmbedding": (lambda rngs: nn.TokenEmbedding(rngs, 23, 12), (IDS,)),
    "LearnedPositionalEmbedding": (lambda rngs: nn.LearnedPositionalEmbedding(rngs, num_positions=7, d_model=12), (X,)),
    "RMSNorm": (lambda rngs: nn.RMSNorm(12, rngs=rngs), (X,)),
    "encoder, relative positions": (
        lambda rngs: attnax.TransformerEncoder(rngs, dataclasses.replace(CONFIG, pos_emb_type="relative")),
        (IDS,),
    ),
    "language model, scanned, tied": (
        lambda rngs: attnax.TransformerLM(
            rngs, dataclasses.replace(CONFIG, scan_layers=True, num_layers=2, tie_embeddings=True, remat="full")
        ),
        (IDS,),
    ),
    "encoder-decoder": (lambda rngs: attnax.Transformer(rngs, encoder=CONFIG, decoder=CONFIG), (IDS, IDS[:, :3])),
    "encoder-decoder with one table": (
        lambda rngs: attnax.Transformer(
            rngs,
            encoder=CONFIG,
            decoder=dataclasses.replace(CONFIG, tie_embeddings=True, logit_scale=0.5),
            share_embeddings=True,
        ),
        (IDS, IDS[:, :3]),
    ),
    "vision": (lambda rngs: attnax.VisionTransformer(rngs, **VISION, num_classes=7), (normal(2, 4, 6, 1),)),
}


class _Bound(nnx.Module):
    """A decoder block called by position."""

    def __init__(self, block):
        self.block = block

    def __call__(self, x, encoded, **options):
        return self.block(x, encoder_output=encoded, **options)


def first(result):
    return result[0] if isinstance(result, tuple) else result


@functools.partial(nnx.jit, static_argnames="deterministic")
def call(model, *arguments, **options):
    return model(*arguments, **options)


TIERS = {  # all others are thorough
    "FeedForward": (),
    "language model, scanned, tied": (),
    "EncoderBlock with experts": pytest.mark.contract,
    "encoder-decoder": pytest.mark.contract,
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=TIERS.get(name, pytest.mark.thorough)) for name in MODULES])
def test_both_modes_give_the_same_values_and_gradients_everywhere(name):
    make, arguments = MODULES[name]
    results, programs = [], {}
    for graph in (True, False):
        with nnx.set_graph_mode(graph):
            graphdef, params, rest = nnx.split(build(make), nnx.Param, ...)

            def run(params, graphdef=graphdef, rest=rest):
                out = first(nnx.merge(graphdef, params, rest)(*arguments))
                return (out * np.cos(np.arange(out.size).reshape(out.shape))).sum(), out

            lowered = jax.jit(jax.value_and_grad(run, has_aux=True)).lower(params)
            text = lowered.as_text()
            if text not in programs:  # mostly both modes give the same program: it is compiled once
                programs[text] = lowered.compile()
            (_, out), grads = programs[text](params)
            results.append([np.asarray(leaf) for leaf in (out, *jax.tree.leaves(grads))])
            pure = nnx.to_pure_dict(nnx.state(nnx.merge(graphdef, params, rest)))
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(pure))
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.isfinite(one).all()
    assert sum((grad != 0).any() for grad in results[0][1:]) >= len(results[0]) - 2  # a key's bias may have none


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODULES)
def test_every_module_under_every_transformation(name):
    make, arguments = MODULES[name]
    module = build(make)
    expected = first(module(*arguments))
    compiled = nnx.jit(lambda module, *arguments: first(module(*arguments)))
    np.testing.assert_allclose(compiled(module, *arguments), expected, atol=1e-5)
    rows = [argument[:, None] for argument in arguments]  # each row of the batch by itself
    mapped = nnx.vmap(lambda module, *arguments: first(module(*arguments)), in_axes=(None, *[0] * len(rows)))
    np.testing.assert_allclose(mapped(module, *rows)[:, 0], expected, atol=1e-5)
    grads = nnx.grad(lambda module: (first(module(*arguments)) ** 2).sum())(module)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    if any(isinstance(layer, nn.Dropout) for _, layer in nnx.iter_modules(module)):
        view = nnx.view(module, deterministic=False, raise_if_not_found=False)
        np.testing.assert_allclose(first(view(*arguments)), expected, atol=1e-5)  # at rate 0 training changes nothing
        module.train()
        np.testing.assert_allclose(first(module(*arguments, rngs=nnx.Rngs(3))), expected, atol=1e-5)
        module.eval()
    np.testing.assert_allclose(first(module(*arguments)), expected, atol=1e-6)


def test_a_model_under_every_transformation():
    config = dataclasses.replace(CONFIG, dropout_rate=0.3)
    model = build(lambda rngs: attnax.TransformerLM(rngs, config))
    expected = np.asarray(call(model, IDS))

    @nnx.jit
    def mapped_and_grads(model):
        mapped = nnx.vmap(lambda model, ids: model(ids[None])[0], in_axes=(None, 0))(model, IDS)
        return mapped, nnx.grad(lambda model: model(IDS)[..., 3].sum())(model)

    mapped, grads = mapped_and_grads(model)
    np.testing.assert_allclose(mapped, expected, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))

    def draws(model, **options):
        return np.abs(np.asarray(call(model, IDS, **options)) - expected).max() > 1e-3

    assert not draws(model)
    assert draws(nnx.view(model, deterministic=False)) and not draws(model)
    model.train()
    assert draws(model) and not draws(model, deterministic=True)
    model.eval()
    assert not draws(model) and draws(model, deterministic=False, rngs=nnx.Rngs(7))


KINDS = [
    pytest.param(kind, marks={"flash": (), "linear": pytest.mark.contract}.get(kind, pytest.mark.thorough))
    for kind in AttentionType
]


def with_each_token_changed(ids, vocabulary=23):
    """Row i + 1 differs from row 0, and from the text, in token i."""
    length = ids.shape[1]
    return np.concatenate([ids, (ids.repeat(length, 0) + np.eye(length, dtype=int)) % vocabulary])


def moved(out):
    """(token, output): whether changing the token moves the output by more than a row's place in the batch may."""
    out = np.asarray(out)
    return np.abs(out[1:] - out[:1]).max(-1) > 1e-6


@functools.cache
def models_of(kind):
    """Encoder, language model, and encoder-decoder, of one layer each."""
    config = dataclasses.replace(CONFIG, attention_type=kind)
    return (
        build(lambda rngs: attnax.TransformerEncoder(rngs, config)),
        build(lambda rngs: attnax.TransformerLM(rngs, config)),
        build(lambda rngs: attnax.Transformer(rngs, encoder=config, decoder=config)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_depend_on_those_that_they_may_attend(kind):
    source, target = with_each_token_changed(IDS[:1]), with_each_token_changed(np.array([[1, 2, 3]]))
    changes, target_changes = len(source), len(target)

    @nnx.jit
    def run(models):
        encoder, lm, both = models
        sources = np.concatenate([source, source[:1].repeat(target_changes, 0)])
        targets = np.concatenate([target[:1].repeat(changes, 0), target])
        return encoder(source), lm(source), both(sources, targets)

    encoded, logits, both = run(models_of(kind))
    assert moved(encoded).all()
    np.testing.assert_array_equal(moved(logits), np.triu(np.ones((5, 5), bool)))
    assert moved(both[:changes]).all()
    np.testing.assert_array_equal(moved(both[changes:]), np.triu(np.ones((3, 3), bool)))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_there(kind):
    """A padded row gives the result of its text alone, in encoder and language model and on both sides."""
    text = np.where(np.arange(5) < 3, np.roll(IDS[:1], -1, 1), 0)
    real = np.array([[False, True, True, True, False], [True, True, True, False, False]])

    @nnx.jit
    def run(models):
        padded = [model(np.concatenate([IDS[:1], text]), padding_mask=real) for model in models]
        return padded, [model(IDS[:1, 1:4]) for model in models]

    for (both_sides, right), alone in zip(*run(models_of(kind)[:2]), strict=True):
        np.testing.assert_allclose(both_sides[1:4], alone[0], atol=1e-5)
        np.testing.assert_allclose(right[:3], alone[0], atol=1e-5)


class TestEncoderDecoder:
    config = dataclasses.replace(CONFIG, pos_emb_type="rope", d_model=18, vocab_size=11)

    @classmethod
    @functools.cache
    def model(cls):
        return build(lambda rngs: attnax.Transformer(rngs, encoder=CONFIG, decoder=cls.config))

    real = np.array([[False, False, True, True, True], [True] * 5])

    def test_source_padding_is_not_there(self):
        targets = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
        padded = self.logits(IDS, targets, source=self.real)
        np.testing.assert_allclose(padded[:1], call(self.model(), IDS[:1, 2:], targets[:1]), atol=1e-5)
        np.testing.assert_allclose(padded[1], self.logits(IDS, targets)[1], atol=1e-5)

    def test_target_padding_is_not_there(self):
        targets, real = np.array([[9, 1, 2, 3], [1, 2, 3, 9]]), np.array([[False] + [True] * 3, [True] * 3 + [False]])
        source = IDS[:1].repeat(2, 0)
        padded, alone = self.logits(source, targets, target=real), self.logits(source, targets[::-1])
        np.testing.assert_allclose(padded[0, 1:], alone[0, :3], atol=1e-5)
        np.testing.assert_allclose(padded[1, :3], alone[0, :3], atol=1e-5)

    def logits(self, ids, targets, source=None, target=None):
        """Of a call with both masks, where None is all real: one program for many tests."""
        source, target = (np.ones(x.shape, bool) if y is None else y for x, y in ((ids, source), (targets, target)))
        masks = {"source_padding_mask": source[:, None, None, :], "target_padding_mask": target}  # both forms
        return np.asarray(call(self.model(), ids, targets, **masks))

    @pytest.mark.contract
    def test_both_forms_of_a_padding_mask_are_taken(self):
        one, two = (
            self.model().generate(IDS, max_length=4, start_token=1, source_padding_mask=mask).tokens
            for mask in (self.real, self.real[:, None, None, :])
        )
        np.testing.assert_array_equal(one, two)

    def test_halves_with_different_experts_keep_their_statistics_apart(self):
        encoder, decoder = (dataclasses.replace(CONFIG, num_experts=count, top_k=1) for count in (4, 3))
        model = build(lambda rngs: attnax.Transformer(rngs, encoder=encoder, decoder=decoder))
        out = jax.eval_shape(model.run, IDS, IDS)
        assert [load.shape for load in out.aux["expert_load"]] == [(4,), (3,)]

    def test_a_shared_table_is_the_table_of_both_halves_and_of_the_head(self):
        decoder = dataclasses.replace(CONFIG, tie_embeddings=True, logit_scale=0.25)
        make = lambda rngs: attnax.Transformer(rngs, encoder=CONFIG, decoder=decoder, share_embeddings=True)
        plain = dataclasses.replace(decoder, logit_scale=1.0)
        shared = build(make)
        apart = build(lambda rngs: attnax.Transformer(rngs, encoder=CONFIG, decoder=plain), seed=2)
        params = nnx.to_pure_dict(nnx.state(shared, nnx.Param))
        assert "embed" not in params["decoder"]
        params["decoder"]["embed"] = {"tokens": params["encoder"]["embed"]["tokens"]}
        nnx.update(apart, params)
        logits = call(shared, IDS, IDS[:, :3])
        np.testing.assert_allclose(logits, 0.25 * np.asarray(call(apart, IDS, IDS[:, :3])), atol=1e-6)
        assert shared.config == attnax.EncoderDecoderConfig(encoder=CONFIG, decoder=decoder, share_embeddings=True)
        again = build(lambda rngs: attnax.Transformer(rngs, shared.config))
        np.testing.assert_array_equal(call(again, IDS, IDS[:, :3]), logits)

    @pytest.mark.contract
    def test_log_probs_are_normalised(self):
        log_probs = nnx.jit(attnax.Transformer.log_probs)(self.model(), IDS, IDS[:, :2])
        np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1.0, atol=1e-5)

    def test_generation_is_that_of_the_whole_model_token_by_token(self):
        generation = self.model().generate(IDS, max_length=4, start_token=1, source_padding_mask=self.real)
        target = np.concatenate([np.ones((2, 1), int), generation.tokens], axis=1)
        logits = self.logits(IDS, target[:, :-1], source=self.real)
        np.testing.assert_array_equal(logits.argmax(-1), generation.tokens)
        log_probs = logits.max(-1) - np.log(np.exp(logits).sum(-1))
        np.testing.assert_allclose(log_probs, generation.log_probs, atol=1e-5)

    @pytest.mark.contract
    def test_a_second_generation_compiles_nothing(self, count_compilations):
        model = self.model()
        model.generate(IDS, max_length=3, start_token=1, end_token=2, temperature=0.7, key=jax.random.key(1))
        before = len(count_compilations)
        out = model.generate(IDS, max_length=3, start_token=2, end_token=5, temperature=0.9, key=jax.random.key(2))
        assert len(count_compilations) == before and out.tokens.shape == (2, 3)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"start_token": 11}, "token ids must be at least 0 and below 11; got 11"),
            ({"max_length": 0}, "max_new_tokens must be at least 1"),
            ({"temperature": 0.5}, "sampling needs a key"),
            ({"temperature": 0.5, "sampler": attnax.Sampler()}, "give temperature or sampler, not both"),
            ({"source_padding_mask": np.ones((2, 4), bool)}, "padding_mask must be boolean"),
        ],
    )
    @pytest.mark.usefixtures("unchecked_shapes")
    def test_wrong_generation_is_refused_in_words(self, options, words):
        with pytest.raises(ValueError, match=words):
            self.model().generate(IDS, **({"max_length": 3, "start_token": 1} | options))
        with pytest.raises(ValueError, match="token ids must be at least 0 and below 23; got 23"):
            self.model().generate(np.full((1, 3), 23), 3, 1)

    @pytest.mark.usefixtures("unchecked_shapes")
    def test_wrong_configs_and_contexts_are_refused_in_words(self):
        with pytest.raises(ValueError, match="decoder must be a TransformerConfig; got BlockConfig"):
            attnax.Transformer(nnx.Rngs(0), encoder=CONFIG, decoder=attnax.BlockConfig())
        narrow = dataclasses.replace(CONFIG, d_model=6)
        with pytest.raises(ValueError, match="with share_embeddings .* must have one d_model; got 12 and 6"):
            attnax.EncoderDecoderConfig(encoder=CONFIG, decoder=narrow, share_embeddings=True)
        with pytest.raises(ValueError, match="got own_tokens=True, tokens given"):
            decoder = build(lambda rngs: attnax.TransformerDecoder(rngs, CONFIG))
            decoder.run(IDS, token_embedding=decoder.embed.tokens)
        with pytest.raises(ValueError, match="got own_tokens=False, tokens missing"):
            build(lambda rngs: attnax.TransformerDecoder(rngs, CONFIG, own_tokens=False))(IDS)
        only, decoder = decoder, build(lambda rngs: attnax.TransformerDecoder(rngs, CONFIG, cross_attention=True))
        with pytest.raises(ValueError, match="encoder_output is needed with cross_attention"):
            decoder(IDS)
        encoded = normal(2, 7, 12)
        contexts = decoder.keys_values(encoded)
        for wrong in (contexts * 2, contexts[0], [encoded]):
            with pytest.raises(ValueError, match="one KeysValues a layer"):
                decoder(IDS, encoder_output=wrong)
        with pytest.raises(ValueError, match="encoder_position_ids given"):
            decoder(IDS, encoder_output=contexts, encoder_position_ids=np.arange(7))
        with pytest.raises(ValueError, match="cross_mask and encoder_position_ids are for cross-attention"):
            only(IDS, cross_mask=attnax.masks.causal())
        with pytest.raises(ValueError, match="cross_attention=False, encoder_output given"):
            only(IDS, encoder_output=X)


def test_an_unknown_token_is_no_other_tokens_vector_under_jit():
    ids = IDS.copy()
    ids[0, 3], ids[1, 4] = 23, -1
    logits = np.asarray(call(models_of("flash")[1], ids))
    assert np.isnan(logits[0, 3:]).all() and np.isnan(logits[1, 4]).all()
    assert np.isfinite(logits[0, :3]).all() and np.isfinite(logits[1, :4]).all()


def test_an_encoder_reads_both_ways_over_its_cache():
    caches = attnax.init_decoder_kv_caches_from_config(CONFIG, batch_size=2, max_len=9)

    @nnx.jit
    def run(encoder, caches):
        _, caches = encoder(IDS[:, :3], layer_kv_caches=caches)
        return encoder(IDS[:, 3:], layer_kv_caches=caches)[0], encoder(IDS)

    late, whole = run(models_of("flash")[0], caches)
    np.testing.assert_allclose(late, np.asarray(whole)[:, 3:], atol=1e-5)  # one layer: later tokens see all of it


def test_modules_are_made_with_keywords_and_without_a_dropout_stream():
    """As `nnx.bridge` and many users write it; without a stream, dropout asks for one in the call."""
    config = dataclasses.replace(CONFIG, dropout_rate=0.3)
    model = build(lambda rngs: attnax.TransformerEncoder(rngs=nnx.Rngs(params=rngs.params()), config=config))
    assert nnx.eval_shape(call, model, IDS).shape == (2, 5, 12)
    assert np.isfinite(call(model, IDS, deterministic=False, rngs=nnx.Rngs(dropout=2))).all()
    with pytest.raises(ValueError, match="dropout needs randomness"):
        nnx.eval_shape(lambda model: model(IDS, deterministic=False), model)
