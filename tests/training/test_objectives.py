"""Objectives: each is the formula of its model, counts what it says, and refuses other batches in words."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import build

from attnax import Layout, Transformer, TransformerConfig, TransformerLM, VisionTransformer
from attnax.models import MaskedLM, SentenceEncoder, TransformerEncoder
from attnax.nn import Output
from attnax.training import (
    OptimizerConfig,
    Trainer,
    causal_lm,
    classification,
    find_documents,
    masked_lm,
    seq2seq,
)
from attnax.training.layer_losses import LOSS_WEIGHTS
from attnax.training.objectives import _choose as choose
from attnax.training.objectives import _replace as replace

MODEL = TransformerConfig(
    vocab_size=17, d_model=8, num_heads=2, num_layers=1, d_ff=12, max_len=11, dropout_rate=0.0, pos_emb_type="rope"
)
IMAGES = {"image_size": 8, "patch_size": 4, "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 12}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 17, (3, 8)).astype(np.uint16)
WEIGHTS = RNG.uniform(size=(3, 7)).astype("f")


def evaluated(objective, model, batch, key=None):
    """The loss of a batch in one program."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, batch, key):
        return objective(nnx.merge(graphdef, state), batch, None if key is None else nnx.Rngs(key))

    return run(state, batch, key)


def called(model, *arguments, **options):
    """The result of a model in one program."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graphdef, state)(*arguments, **options))(state)


def entropies(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(targets).astype(int))


class TestCausalLM:
    lm = build(lambda rngs: TransformerLM(rngs, MODEL))

    def test_it_is_the_weighted_cross_entropy_of_the_logits(self):
        loss = evaluated(causal_lm(), self.lm, {"tokens": TOKENS, "weights": WEIGHTS})
        want = (WEIGHTS * entropies(called(self.lm, TOKENS[:, :-1].astype(np.int32)), TOKENS[:, 1:])).sum()
        assert float(loss.sum) == pytest.approx(float(want), rel=1e-5)
        assert float(loss.weight) == pytest.approx(WEIGHTS.sum()) and loss.aux == {}

    def test_a_model_of_ones_own_gives_the_logits_of_all_tokens(self):
        class Doubled(TransformerLM):
            def run(self, input_ids, **options):
                out = super().run(input_ids, **options)
                return out._replace(logits=2 * out.logits)

        model = build(lambda rngs: Doubled(rngs, MODEL))
        loss = evaluated(causal_lm(), model, {"tokens": TOKENS})
        logits = 2 * called(self.lm, TOKENS[:, :-1].astype(np.int32))
        assert float(loss.sum) == pytest.approx(float(entropies(logits, TOKENS[:, 1:]).sum()), rel=1e-5)

    def test_a_run_without_logits_is_refused(self):
        class Bare(nnx.Module):
            def run(self, tokens, **options):
                return Output(tokens, None, {})

        with pytest.raises(ValueError, match="must return an attnax.nn.Output with logits; got Output from Bare.run"):
            causal_lm()(Bare(), {"tokens": TOKENS}, None)

    def test_packed_documents_are_scored_as_each_is_alone(self):
        """A row of three documents equals three rows of one document, with learned positions and a mask."""
        model = build(lambda rngs: TransformerLM(rngs, dataclasses.replace(MODEL, pos_emb_type="learned")))
        row, places = np.array([[5, 6, 0, 7, 0, 9, 3, 4]], np.int32), ((0, 2), (2, 4), (4, 7))

        def losses(document_token, rows):
            """The loss of each token after the first, (B, 7)."""
            objective, size = causal_lm(document_token=document_token), rows[:, 1:].size
            each = np.eye(size, dtype=np.float32).reshape(size, *rows[:, 1:].shape)
            graphdef, state = nnx.split(model)

            def one(state, rows, weights):
                return objective(nnx.merge(graphdef, state), {"tokens": rows, "weights": weights}, None).sum

            found = jax.jit(jax.vmap(one, (None, None, 0)))(state, rows, each)
            return np.asarray(found).reshape(rows[:, 1:].shape)

        packed = losses(0, row)[0]
        alone = np.zeros((4, 8), np.int32)  # later documents change nothing in a document
        for one, (start, end) in zip(alone, places, strict=False):
            one[: end + 1 - start] = row[0, start : end + 1]
        alone[3] = row
        *documents, unpacked = losses(None, alone)
        for document, (start, end) in zip(documents, places, strict=True):
            np.testing.assert_allclose(packed[start:end], document[: end - start], atol=1e-5)
        assert (np.abs(unpacked - packed)[3:] > 1e-4).any()

    @pytest.mark.usefixtures("unchecked_shapes")
    @pytest.mark.parametrize("shape", [(3,), (1, 2, 3)])
    def test_documents_are_found_in_rows_or_it_is_refused_in_words(self, shape):
        words = r"find_documents: tokens must be integers of shape \(batch, length\); got tokens.shape="
        with pytest.raises(ValueError, match=words):
            find_documents(np.zeros(shape, int), 0)

    def test_losses_of_a_mixture_count_by_their_weights_in_training_alone(self):
        model = build(lambda rngs: TransformerLM(rngs, dataclasses.replace(MODEL, num_experts=3, top_k=1)))
        weights, batch = {"load_balance_loss": 0.02, "router_z_loss": 0.003}, {"tokens": TOKENS, "weights": WEIGHTS}
        objective = causal_lm(loss_weights=weights)
        plain, trained = (evaluated(objective, model, batch, key) for key in (None, jax.random.key(0)))
        weighed = [weight * float(plain.aux[name]) for name, weight in weights.items()]
        assert min(weighed) > 1e-4 and {*LOSS_WEIGHTS, "router_entropy"} <= set(plain.aux)
        more = float(trained.sum - plain.sum) / float(plain.weight)
        assert more == pytest.approx(sum(weighed), abs=1e-5)

    def test_statistics_of_packed_documents_are_those_of_each_beside_padding(self):
        model = build(lambda rngs: TransformerLM(rngs, dataclasses.replace(MODEL, num_experts=3, top_k=1)))
        row = np.array([[5, 6, 0, 7, 0, 9, 3, 4]], np.int32)  # the last token is predicted and not read
        documents = np.array([[5, 6, 8], [0, 7, 8], [0, 9, 3]], np.int32)
        real = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 1]], bool)
        apart = jax.jit(lambda: model.run(documents, padding_mask=real).aux)()
        packed = evaluated(causal_lm(document_token=0), model, {"tokens": row}).aux
        for name, value in packed.items():
            np.testing.assert_allclose(value, apart[name], atol=2e-6)


class TestSeq2Seq:
    source = np.where(np.arange(5) < [[5], [3], [1]], RNG.integers(3, 17, (3, 5)), 0)
    target = np.where(np.arange(8) < [[8], [4], [6]], RNG.integers(3, 17, (3, 8)), 2)

    @pytest.mark.parametrize("share_embeddings", [False, pytest.param(True, marks=pytest.mark.contract)])
    def test_it_is_teacher_forcing_without_padding(self, share_embeddings):
        model = build(lambda rngs: Transformer(rngs, MODEL, MODEL, share_embeddings=share_embeddings))
        objective = seq2seq(source_padding=0, target_padding=2)
        batch = {"source": self.source, "target": self.target, "weights": WEIGHTS}
        loss, read = evaluated(objective, model, batch), self.target[:, :-1]
        masks = {"source_padding_mask": self.source != 0, "target_padding_mask": read != 2}
        losses = entropies(called(model, self.source, read, **masks), self.target[:, 1:])
        weights = np.where(self.target[:, 1:] != 2, WEIGHTS, 0)
        assert float(loss.sum) == pytest.approx(float((weights * losses).sum()), rel=1e-5)
        assert float(loss.weight) == pytest.approx(weights.sum())
        if not share_embeddings:  # without padding every target counts
            whole = evaluated(seq2seq(), model, {"source": self.source, "target": self.target})
            assert float(whole.weight) == 21


class TestMaskedLM:
    tokens = np.where(np.arange(100) < [[100], [40], [3]], np.arange(100) % 13 + 2, 0)
    may = (tokens != 0) & (tokens != 5)
    options = {"mask_token": 1, "padding_token": 0, "special_tokens": [5]}

    def test_a_share_of_the_tokens_that_may_is_chosen_in_each_row(self):
        places, weights = map(np.asarray, jax.jit(choose, static_argnums=2)(jax.random.key(0), self.may, 0.15))
        wanted = [max(1, round(0.15 * count)) for count in self.may.sum(axis=1)]
        assert weights.sum(axis=1).tolist() == wanted
        for row, (chosen, weight) in enumerate(zip(places, weights, strict=True)):
            chosen = chosen[weight > 0]
            assert len(set(chosen)) == len(chosen) and self.may[row, chosen].all()
        nothing = jax.jit(choose, static_argnums=2)(jax.random.key(0), np.zeros((1, 9), bool), 0.15)[1]
        assert not nothing.any()

    def test_eighty_percent_are_masked_and_ten_are_random(self):
        tokens, places = np.full((40, 500), 7, np.int32), np.tile(np.arange(400), (40, 1))
        chosen = places < 300  # the rest fills the row
        new = jax.jit(replace, static_argnums=(4, 5))(jax.random.key(0), tokens, places, chosen, 1, 17)
        assert (new[:, 300:] == 7).all() and new.dtype == tokens.dtype
        shares = [float((new[:, :300] == kind).mean()) for kind in range(17)]
        np.testing.assert_allclose(shares.pop(7), 0.1 + 0.1 / 17, atol=0.01)
        np.testing.assert_allclose(shares.pop(1), 0.8 + 0.1 / 17, atol=0.01)
        np.testing.assert_allclose(shares, 0.1 / 17, atol=0.003)

    def test_the_loss_is_that_of_the_chosen_tokens(self):
        """The head sees them alone; a draw without rngs is always the same."""
        model = build(lambda rngs: MaskedLM(rngs, dataclasses.replace(MODEL, max_len=100)))
        loss = evaluated(masked_lm(**self.options), model, {"tokens": self.tokens})

        @jax.jit
        def reference():
            first, second = jax.random.split(jax.random.key(0))
            places, weights = choose(first, jnp.asarray(self.may), 0.15)
            read = replace(second, jnp.asarray(self.tokens), places, weights > 0, 1, 17)
            losses = entropies(model(read, padding_mask=self.tokens != 0), self.tokens)
            return (weights * jnp.take_along_axis(losses, places, axis=1)).sum(), weights.sum()

        np.testing.assert_allclose(loss[:2], reference(), rtol=1e-5)

    def test_wrong_arguments_are_refused(self):
        with pytest.raises(ValueError, match=r"share must be between 0 and 1; got share=1.5"):
            masked_lm(mask_token=1, share=1.5)
        with pytest.raises(ValueError, match=r"must be a MaskedLM; got TransformerLM. Give the Trainer lambda rngs"):
            masked_lm(mask_token=1)(TestCausalLM.lm, {"tokens": TOKENS}, None)


class TestClassification:
    vit = build(lambda rngs: VisionTransformer(rngs, **IMAGES, num_classes=3, dropout_rate=0.0))
    images = RNG.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    labels = np.array([0, 2, 1, 2], np.uint8)

    @pytest.mark.parametrize("as_bytes", [True, pytest.param(False, marks=pytest.mark.contract)])
    def test_it_is_the_weighted_cross_entropy_of_the_logits(self, as_bytes):
        weights = np.array([1.0, 0.0, 2.0, 0.5], np.float32)
        numbers = self.images.astype("f") / 255
        batch = {"images": self.images if as_bytes else numbers, "labels": self.labels, "weights": weights}
        loss, logits = evaluated(classification(), self.vit, batch), called(self.vit, numbers)
        assert float(loss.sum) == pytest.approx(float((weights * entropies(logits, self.labels)).sum()), rel=1e-5)
        right = np.asarray(logits).argmax(-1) == self.labels
        assert float(loss.weight) == 3.5 and float(loss.aux["accuracy"]) == pytest.approx((right * weights).sum() / 3.5)

    def test_texts_are_read_by_any_module_that_gives_logits(self):
        class Texts(nnx.Module):
            def __init__(self, rngs):
                self.encoder = SentenceEncoder(TransformerEncoder(rngs, MODEL), normalize=False)
                self.head = nnx.Linear(8, 3, rngs=rngs)

            def __call__(self, tokens, padding_mask):
                return self.head(self.encoder(tokens, padding_mask=padding_mask))

        tokens = np.where(np.arange(7) < [[7], [3]], TOKENS[:2, :7], 0)
        model = build(Texts)
        loss = evaluated(classification(padding_token=0), model, {"tokens": tokens, "labels": self.labels[:2]})
        logits = called(model, tokens.astype(int), tokens != 0)
        assert float(loss.sum) == pytest.approx(float(entropies(logits, self.labels[:2]).sum()), rel=1e-5)

    def test_a_model_without_classes_is_refused(self):
        model = build(lambda rngs: VisionTransformer(rngs, **IMAGES))
        with pytest.raises(ValueError, match=r"must return logits of shape \(4, number of classes\); got None"):
            jax.eval_shape(lambda: classification()(model, {"images": self.images, "labels": self.labels}, None))


@pytest.mark.parametrize(
    ("objective", "batch", "words"),
    [
        (causal_lm(), {"ids": TOKENS}, r"causal_lm: a batch must hold tokens, and may hold weights; got \['ids'\]"),
        (causal_lm(), {"tokens": TOKENS, "weight": WEIGHTS}, r"got \['tokens', 'weight'\]"),
        (
            causal_lm(),
            {"tokens": WEIGHTS},
            r"must be integers of shape \(B, length\); got tokens=float32\[3, 7\]",
        ),
        (
            causal_lm(),
            {"tokens": TOKENS, "weights": WEIGHTS[:, 1:]},
            r"the \[3, 7\] targets; got weights.shape=\(3, 6",
        ),
        (seq2seq(), {"source": TOKENS}, "seq2seq: a batch must hold source and target"),
        (masked_lm(mask_token=1), {"tokens": TOKENS, "weights": WEIGHTS}, "masked_lm: a batch must hold tokens; got"),
        (classification(), {"images": WEIGHTS}, "classification: a batch must hold images and labels, and may hold"),
        (
            classification(),
            {"tokens": TOKENS, "labels": TOKENS},
            r"labels must be integers of shape \(B,\); got",
        ),
    ],
)
def test_other_batches_are_refused_in_words(objective, batch, words):
    with pytest.raises(ValueError, match=words):
        objective(None, batch, None)


@pytest.mark.parametrize("make", [causal_lm, seq2seq, classification, lambda **o: masked_lm(mask_token=1, **o)])
def test_weights_of_other_things_are_refused(make):
    for weights in ({"load_balance": 1.0}, {"my_loss": -1.0}, {"my_loss": float("inf")}):
        with pytest.raises(ValueError, match="loss_weights are of losses, whose names end in _loss"):
            make(loss_weights=weights)


def data_of(name):
    rng = np.random.default_rng(1)
    if name == "images":
        return {"images": rng.integers(0, 256, (2, 8, 8, 8, 3)).astype(np.uint8), "labels": rng.integers(0, 3, (2, 8))}
    if name == "seq2seq":
        source = rng.integers(2, 16, (2, 8, 6))
        return {"source": source, "target": np.concatenate([np.ones((2, 8, 1), int), source[..., ::-1]], axis=-1)}
    return {"tokens": rng.integers(2, 16, (2, 8, 10))}


SIZES = dataclasses.replace(MODEL, vocab_size=16)
TASKS = {
    "masked": (lambda rngs: MaskedLM(rngs, SIZES), masked_lm(mask_token=1, share=0.4)),
    "seq2seq": (lambda rngs: Transformer(rngs, SIZES, SIZES), seq2seq()),
    "images": (
        lambda rngs: VisionTransformer(rngs, **IMAGES, num_classes=3, num_register_tokens=1, dropout_rate=0.1),
        classification(),
    ),
}
IN_CI = {("masked", "fsdp=4,tensor=2"), ("seq2seq", "fsdp=4,tensor=2")}


@pytest.mark.parametrize(
    ("task", "layout"),
    [
        pytest.param(task, layout, marks=pytest.mark.contract if (task, layout) in IN_CI else pytest.mark.thorough)
        for task in TASKS
        for layout in ("fsdp=4,tensor=2", "data=8")
    ],
)
def test_every_objective_trains_on_a_layout_as_on_one_device(task, layout):
    make, objective = TASKS[task]
    batch, losses = data_of(task), []
    for each in (None, Layout.parse(layout)):
        trainer = Trainer(make, objective, OptimizerConfig(steps=5, batch_size=8, warmup=0.0), layout=each)
        state, found = trainer.init(), []
        for _ in range(3):
            state, metrics = trainer.step(state, batch)
            found.append(float(metrics.loss))
        losses.append([*found, trainer.evaluate(state.params, [jax.tree.map(lambda x: x[0], batch)]).loss])
    np.testing.assert_allclose(losses[1], losses[0], rtol=3e-6)
    assert losses[0][2] != losses[0][0]
