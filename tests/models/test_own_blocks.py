"""What a user puts into a model works in every model, in training, in folders and in copies, or is refused by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from own_blocks import ValueResidual
from tiny import build

from attnax import (
    MultiHeadAttention,
    Transformer,
    TransformerConfig,
    TransformerDecoder,
    TransformerEncoder,
    TransformerLM,
    VisionTransformer,
    linear_attention,
    memory_efficient_attention,
    standard_attention,
)
from attnax.cli import main
from attnax.errors import InputError
from attnax.models import MaskedLM
from attnax.models.transformer import TokenHead
from attnax.nn import DecoderBlock, EncoderBlock, first_layers, with_scan_layers
from attnax.pretrained import CheckpointError, save_pretrained
from attnax.text import byte_tokenizer
from attnax.training import (
    Corpus,
    Document,
    OptimizerConfig,
    RunFolder,
    RunOptions,
    Trainer,
    causal_lm,
    delete_checkpoints_after,
    open_run,
    save_checkpoint,
)
from attnax.training.layer_losses import sum_of_layer_losses

CONFIG = TransformerConfig(vocab_size=11, d_model=8, num_heads=2, num_layers=2, d_ff=6, max_len=64, dropout_rate=0.0)
IDS = np.random.default_rng(0).integers(0, 11, (2, 5))
IMAGE = {"image_size": 4, "patch_size": 2, "d_model": 8, "num_heads": 2, "num_layers": 2, "d_ff": 6}


def halved(query, key, value, **options):
    return 0.5 * standard_attention(query, key, value, **options)


class Doubled(EncoderBlock):
    def run(self, x, **options):
        out = super().run(x, **options)
        return out._replace(hidden=2 * out.hidden, aux=out.aux | {"size_loss": jnp.square(out.hidden).mean()})


class DoubledDecoder(DecoderBlock):
    def run(self, x, **options):
        out = super().run(x, **options)
        return out._replace(hidden=2 * out.hidden)


def with_halves(rngs, config):
    return EncoderBlock(rngs, config, attention_fn=halved)


MODELS = {
    TransformerEncoder: lambda **parts: TransformerEncoder(nnx.Rngs(0), CONFIG, **parts),
    TransformerDecoder: lambda **parts: TransformerDecoder(nnx.Rngs(0), CONFIG, **parts),
    TransformerLM: lambda **parts: TransformerLM(nnx.Rngs(0), CONFIG, **parts),
    MaskedLM: lambda **parts: MaskedLM(nnx.Rngs(0), CONFIG, **parts),
    VisionTransformer: lambda **parts: VisionTransformer(nnx.Rngs(0), **IMAGE, **parts),
}


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_model_takes_a_block_and_an_attention_function(kind):
    make = MODELS[kind]

    def run():
        stack = getattr(made := make(make_block=Doubled), "decoder", getattr(made, "encoder", made)).stack
        assert [type(block) for block in stack.layers()] == [Doubled, Doubled]
        made = make(attention_fn=halved)
        stack = getattr(made, "decoder", getattr(made, "encoder", made)).stack
        assert [block.attention.attention_fn for block in stack.layers()] == [halved, halved]
        with pytest.raises(
            ValueError, match=r"Doubled and attention_fn=.*halved. Hand the attention_fn to the block in"
        ):
            make(make_block=Doubled, attention_fn=halved)
        for wrong, words in (
            (
                stack.layers()[0],
                "which makes one for each layer; got an object of EncoderBlock",
            ),
            (lambda rngs: Doubled(rngs, CONFIG), "-> block; got .*lambda>, for which too many positional arguments"),
        ):
            with pytest.raises(ValueError, match=words):
                make(make_block=wrong)
        own = MultiHeadAttention(nnx.Rngs(0), num_heads=1, in_features=2)
        with pytest.raises(ValueError, match=r"would share its arrays.*make_block=lambda rngs, config: EncoderBlock\("):
            make(attention_fn=own)

    jax.eval_shape(run)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("make_block", "make_block must be a class or a function .* got an object of int"),
        ("attention_fn", "attention_fn must be a function.*got attention_fn=3"),
    ],
)
def test_a_part_that_is_no_function_is_refused(part, words):
    with pytest.raises(ValueError, match=f"TransformerDecoder: {words}"):
        TransformerLM(nnx.Rngs(0), CONFIG, **{part: 3})


def test_both_halves_of_a_transformer_take_blocks():
    parts = {"make_encoder_block": Doubled, "make_decoder_block": DoubledDecoder}
    model = build(lambda rngs: Transformer(rngs, CONFIG, CONFIG, **parts))
    plain = build(lambda rngs: Transformer(rngs, CONFIG, CONFIG))
    nnx.update(plain, nnx.state(model))
    wanted = plain.encoder.embed(jnp.asarray(IDS))
    for block in plain.encoder.stack.layers():
        wanted = 2 * block(wanted)
    wanted = plain.encoder.norm(wanted)
    np.testing.assert_allclose(model.encoder(IDS), wanted, atol=1e-5)
    written = np.asarray(model.generate(IDS, max_length=3, start_token=1).tokens)
    text = np.concatenate([np.ones((2, 1), int), written], 1)
    np.testing.assert_array_equal(written, np.asarray(model(IDS, text))[:, :-1].argmax(-1))

    def run():
        made = Transformer(nnx.Rngs(0), CONFIG, CONFIG, attention_fn=halved)
        for half in (made.encoder, made.decoder):
            assert {block.attention.attention_fn for block in half.stack.layers()} == {halved}
        assert made.decoder.stack.layers()[0].cross_attention.attention_fn is not halved
        made = Transformer(nnx.Rngs(0), CONFIG, CONFIG, make_decoder_block=Doubled)
        with pytest.raises(ValueError, match="keys_values, which generate calls.*got Doubled without it"):
            made.generate(IDS, max_length=3, start_token=1)

    jax.eval_shape(run)


@pytest.mark.parametrize("parts", [{"make_block": with_halves}, {"attention_fn": halved}], ids=", ".join)
def test_an_attention_function_is_used_in_every_form_and_every_copy(parts):
    model = build(lambda rngs: TransformerLM(rngs, CONFIG, **parts))
    plain = build(lambda rngs: TransformerLM(rngs, CONFIG))
    nnx.update(plain, nnx.state(model))
    for block in plain.decoder.stack.blocks:
        kernel, bias = block.attention.out.kernel, block.attention.out.bias
        kernel[...], bias[...] = 0.5 * kernel[...], bias[...]
    wanted = plain(IDS)
    scanned = with_scan_layers(model, True)
    for form in (model, scanned, with_scan_layers(scanned, False), nnx.clone(model), nnx.merge(*nnx.split(scanned))):
        np.testing.assert_allclose(form(IDS), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "cache", ["paged", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("contiguous", "ring"))]
)
def test_an_attention_function_and_a_block_write_with_every_kind_of_cache(cache):
    def make_block(rngs, config):
        return Doubled(rngs, config, attention_fn=halved)

    config = dataclasses.replace(CONFIG, pos_emb_type="rope", scan_layers=True, remat="full")
    model = build(lambda rngs: TransformerLM(rngs, config, make_block=make_block))
    written = np.asarray(model.generate(IDS, max_new_tokens=4, cache=cache).tokens)
    text = np.concatenate([IDS, written], 1)
    np.testing.assert_array_equal(written, np.asarray(model(text))[:, 4:-1].argmax(-1))


def test_a_loss_of_a_block_is_added_to_the_loss_of_the_trainer():
    trainer = Trainer(lambda rngs: TransformerLM(rngs, CONFIG, make_block=Doubled), causal_lm(), OptimizerConfig())
    _, metrics = trainer.step(trainer.init(), {"tokens": np.asarray(IDS)[None]})
    model = trainer.merge(trainer.init().params)
    out = model.run(IDS[:, :-1])
    entropy = optax.softmax_cross_entropy_with_integer_labels(out.logits, IDS[:, 1:]).mean()
    np.testing.assert_allclose(metrics.loss, entropy + out.aux["size_loss"], rtol=1e-5)
    assert float(out.aux["size_loss"]) > 0.1
    with pytest.raises(ValueError, match=r"floating scalar; got my_loss of float32\[3\]. Take its mean"):
        sum_of_layer_losses("test", {"my_loss": jnp.zeros(3)}, {})
    assert sum_of_layer_losses("test", {"expert_load": (jnp.zeros(3),), "my_number": 3.0}, {}) == 0.0


class Counting(EncoderBlock):
    def __init__(self, rngs, config):
        super().__init__(rngs, config)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def run(self, x, **options):
        self.calls[...] += 1
        return super().run(x, **options)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_trainer_refuses_a_block_whose_writes_it_would_lose(scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    trainer = Trainer(lambda rngs: TransformerLM(rngs, config, make_block=Counting), causal_lm(), OptimizerConfig())
    with pytest.raises(ValueError, match=r"would be lost; got a change of decoder.stack.\w+.0.calls. Pass state on in"):
        trainer.trace_step({"tokens": np.asarray(IDS)[None]})


def test_layers_that_are_one_block_stay_one_or_are_refused():
    """As in the Universal Transformer and ALBERT."""

    def sharing():
        made = []

        def make_block(rngs, config):
            made.append(made[0] if made else EncoderBlock(rngs, config))
            return made[0]

        return make_block

    model = build(lambda rngs: TransformerLM(rngs, CONFIG, make_block=sharing()))
    block, x = model.decoder.stack.blocks[0], model.decoder.embed(jnp.asarray(IDS))
    for _ in range(2):
        x = block(x, mask=model.decoder.self_mask)
    np.testing.assert_allclose(model.decoder(IDS), model.decoder.norm(x), atol=1e-5)
    assert len(jax.tree.leaves(nnx.state(model.decoder.stack, nnx.Param))) == len(jax.tree.leaves(nnx.state(block)))
    with pytest.raises(ValueError, match="got layers 0 and 1 that share .*Take scan_layers=False"):
        with_scan_layers(model, True)


class MultiToken(TransformerLM):
    """Predicts the next tokens by heads of their own (F. Gloeckle et al., 2024, arXiv 2404.19737)."""

    def __init__(self, rngs, config, num_heads=2, **parts):
        super().__init__(rngs, config, **parts)
        self.further = nnx.List([TokenHead(rngs, config) for _ in range(num_heads)])

    def losses(self, ids):
        hidden = self.run(ids).hidden
        for ahead, head in enumerate((self.head, *self.further), 1):
            logits = head(hidden[:, :-ahead], self.decoder.embed.tokens)
            yield optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, ahead:]).mean()


def test_several_heads_of_tokens_train_and_write():
    model = build(lambda rngs: MultiToken(rngs, dataclasses.replace(CONFIG, pos_emb_type="rope")))
    text = jnp.tile(jnp.arange(6), (2, 3))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    adam = optax.adam(3e-2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda params: sum(nnx.merge(graphdef, params, rest).losses(text)))(params)
        updates, state = adam.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = adam.init(params), []
    for _ in range(60):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    model = nnx.merge(graphdef, params, rest)
    written = model.generate(text[:, :4], max_new_tokens=4, cache="paged").tokens
    np.testing.assert_array_equal(written, [[4, 5, 0, 1]] * 2)
    hidden = model.run(text).hidden
    third = model.further[1](hidden, model.decoder.embed.tokens)
    np.testing.assert_array_equal(third[:, 6:12].argmax(-1), text[:, 9:15])


@pytest.mark.parametrize("scan_layers", [False, True])
def test_first_layers_are_a_model_that_drafts_for_the_whole_one(scan_layers):
    config = dataclasses.replace(CONFIG, num_layers=3, scan_layers=scan_layers, pos_emb_type="rope")
    model = build(lambda rngs: TransformerLM(rngs, config, make_block=ValueResidual))
    short = first_layers(model, 1)
    fresh = nnx.eval_shape(
        lambda: TransformerLM(nnx.Rngs(0), dataclasses.replace(config, num_layers=1), make_block=ValueResidual)
    )
    assert nnx.graphdef(short) == nnx.graphdef(fresh) and short.config == fresh.config
    x = model.decoder.embed(jnp.asarray(IDS))
    assert short.decoder.embed.tokens.embedding[...] is model.decoder.embed.tokens.embedding[...]
    first = model.decoder.stack.layers()[0]
    carry = first.init_carry(x, None)
    mask = model.decoder.self_mask
    wanted = model.logits(model.decoder.norm(first.run(x, carry=carry, mask=mask).hidden))
    np.testing.assert_allclose(short(IDS), wanted, atol=1e-5)
    drafted = model.generate(IDS, max_new_tokens=5, draft=short, num_draft_tokens=2)
    np.testing.assert_array_equal(drafted.tokens, model.generate(IDS, max_new_tokens=5).tokens)


def test_first_layers_handle_periods_and_refuse_what_is_not_there():
    pattern = {"layer_pattern": ({"attention_window": 3}, {}), "num_layers": 5, "scan_layers": True}

    def run():
        model = TransformerLM(nnx.Rngs(0), dataclasses.replace(CONFIG, **pattern))
        for count, blocks in ((5, 1), (4, 0), (3, 1), (1, 1)):
            short = first_layers(model, count)
            assert len(short.decoder.stack.blocks) == blocks and short(IDS).shape == (2, 5, 11)
            windows = [block.attention.config.attention_window for block in short.decoder.stack.layers()]
            assert windows == [3, None, 3, None, 3][:count]
        for count in (0, 6):
            with pytest.raises(ValueError, match=f"at least 1 and at most the 5 of the model; got num_layers={count}"):
                first_layers(model, count)
        with pytest.raises(ValueError, match="one stack of layers; got Transformer with 2. Give a part"):
            first_layers(Transformer(nnx.Rngs(0), CONFIG, CONFIG), 1)

    jax.eval_shape(run)


@pytest.fixture
def make_run(tmp_path):
    """Makes the folder of a run whose model has these parts, with a checkpoint."""

    def make(**parts):
        config = dataclasses.replace(CONFIG, vocab_size=byte_tokenizer().vocab_size)
        trainer = Trainer(lambda rngs: TransformerLM(rngs, config, **parts), causal_lm(), OptimizerConfig())
        text = (Document("a.txt", b"some text"),)
        options = RunOptions(model=config, tokenizer="bytes", optimizer=trainer.optimizer)
        run = RunFolder.create(tmp_path / "run", options, Corpus(text, text, 0), byte_tokenizer(), parts)
        params = trainer.init().params
        save_checkpoint(run.checkpoints, 1, {"params": params}, owner=run.owner)
        return run.path, trainer.merge(params)

    return make


def test_a_run_is_opened_with_its_parts_and_not_without(make_run, capsys):
    path, model = make_run(make_block=Doubled)
    opened = open_run(path, make_block=Doubled).model
    np.testing.assert_array_equal(opened(IDS), model(IDS))
    part = f"make_block={Doubled.__module__}.Doubled"
    for parts, words in (
        ({}, rf"made with {part}, which is code.*open_run\(path, make_block=Doubled\)"),
        ({"make_block": ValueResidual}, f"made with {part}; got make_block=own_blocks.ValueResidual"),
        ({"make_block": Doubled, "attention_fn": halved}, "made without attention_fn; got attention_fn=.*halved"),
    ):
        with pytest.raises(InputError, match=words):
            open_run(path, **parts)
    for command in (("generate", str(path)), ("train", "--resume", str(path))):
        assert main(list(command)) == 2
        assert part in capsys.readouterr().err
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"made with     {part}, which is not in the folder" in printed
    assert "decoder.stack.blocks.{0..1}.attention.query.kernel" in printed
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert f"parameters    {count:,}:" in printed
    delete_checkpoints_after(path / "checkpoints", 0)
    assert main(["inspect", str(path)]) == 0
    assert "parameters    known from the first checkpoint on" in capsys.readouterr().out


def test_a_run_without_parts_refuses_one(make_run):
    path, _ = make_run()
    with pytest.raises(InputError, match="made without attention_fn; got attention_fn=.*halved. Leave it out"):
        open_run(str(path), attention_fn=halved)


class WithConstants(EncoderBlock):
    """Has a variable and an array that are no parameters."""

    def __init__(self, rngs, config, draw=False):
        super().__init__(rngs, config)
        self.factor = nnx.Variable(jax.random.normal(rngs.params(), (1,)) if draw else jnp.full((1,), 3.0))
        self.signs = nnx.data(np.array([-1.0, 1.0] * (config.d_model // 2), np.float32))

    def run(self, x, **options):
        return super().run(x * self.factor[...][None, None] * self.signs[None, None], **options)


def test_constants_of_a_block_are_made_again(make_run):
    path, model = make_run(make_block=WithConstants)
    np.testing.assert_array_equal(open_run(path, make_block=WithConstants).model(IDS), model(IDS))


def test_random_numbers_that_a_checkpoint_does_not_keep_are_refused(make_run):
    random = functools.partial(WithConstants, draw=True)
    path, _ = make_run(make_block=random)
    with pytest.raises(InputError, match=r"random numbers that are no parameters, .*'factor'.*: a checkpoint"):
        open_run(path, make_block=random)
    with pytest.raises(
        InputError, match=r"made with make_block=functools.partial\(\w+.WithConstants, draw=True\); got"
    ):
        open_run(path, make_block=WithConstants)


LLAMA = {"norm_type": "rms", "pos_emb_type": "rope", "ff_activation": "swiglu", "use_bias": False}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"make_block": Doubled}, r"decoder.stack.blocks.0 must be of Attnax, since config.json .*got .*Doubled"),
        ({"attention_fn": halved}, r"blocks.0.attention.attention_fn must be of Attnax.*got .*halved"),
        ({"attention_fn": linear_attention}, r"attention_fn must be .*flash_attention; got .*linear_attention"),
        (lambda block: setattr(block, "parallel", True), "blocks.1.parallel must be .*False; got True"),
        (
            lambda block: setattr(block.attention, "config", dataclasses.replace(block.attention.config, top_k=1)),
            "blocks.1.attention.config.top_k must be .*2; got 1",
        ),
        (lambda block: setattr(block.attention, "rope", halved), r"blocks.1.attention.rope must be of .*got .*halved"),
        (lambda block: setattr(block.attention, "rope", None), r"blocks.1.attention.rope must be .*got None"),
        (
            lambda block: setattr(block, "feed_forward", nnx.Linear(8, 8, rngs=nnx.Rngs(0))),
            "feed_forward must be .*Lin",
        ),
        (lambda block: setattr(block.attention, "key_norm", nnx.RMSNorm(4, rngs=nnx.Rngs(0))), "key_norm"),
        (lambda block: setattr(block.attention, "query_fn", halved), r"query_fn must be of Attnax.*got .*halved"),
        (lambda block: setattr(block.around_attention, "scale", 0.5), r"around_attention.scale must be .*1.0; got 0.5"),
        (lambda block: setattr(block, "scale", jnp.tanh), r"blocks.1.scale must be .*None; got .*tanh"),
    ],
)
def test_a_checkpoint_that_would_lose_a_part_of_a_user_is_not_written(change, words, tmp_path):
    parts = change if isinstance(change, dict) else {}

    def run():
        model = TransformerLM(nnx.Rngs(0), dataclasses.replace(CONFIG, **LLAMA), **parts)
        if not parts:
            change(model.decoder.stack.blocks[1])
        with pytest.raises(CheckpointError, match=words):
            save_pretrained(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    jax.eval_shape(run)


def test_a_checkpoint_is_written_whichever_exact_kernel_the_model_has(tmp_path):
    model = build(
        lambda rngs: TransformerLM(rngs, dataclasses.replace(CONFIG, **LLAMA), attention_fn=standard_attention)
    )
    model.decoder.stack.blocks[1].attention.attention_fn = memory_efficient_attention
    save_pretrained(model, tmp_path / "new")
    assert (tmp_path / "new" / "config.json").exists()
