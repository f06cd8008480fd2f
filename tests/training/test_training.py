"""Training: every token counts once, accumulation is a large batch."""

import dataclasses
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import build

from attnax import TransformerConfig, TransformerLM
from attnax.sharding import Layout
from attnax.training import (
    OptimizerConfig,
    TokenStream,
    Trainer,
    find_documents,
)
from attnax.training.loss import weighted_cross_entropy
from attnax.training.optimizer import _is_hidden as is_hidden

MODEL = TransformerConfig(
    vocab_size=17, d_model=8, num_heads=2, num_layers=1, d_ff=12, max_len=7, dropout_rate=0.0, pos_emb_type="rope"
)


def leaves_close(left, right, atol=1e-6):
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, two, atol=atol)


def losses_of(trainer, params, tokens):
    """The loss of each token after the first, (B, T)."""
    shape = tokens.shape[0], tokens.shape[1] - 1
    one_at_a_time = np.eye(math.prod(shape), dtype=np.float32).reshape(-1, *shape)
    loss = jax.jit(jax.vmap(lambda params, tokens, weights: trainer._loss(params, tokens, weights)[0], (None, None, 0)))
    return np.asarray(loss(params, tokens, one_at_a_time)).reshape(shape)


class TestLoss:
    rng = np.random.default_rng(0)
    head = {"table": rng.normal(size=(5, 3)).astype("f"), "bias": rng.normal(size=5).astype("f")}
    hidden = rng.normal(size=(2, 7, 3)).astype("f")
    targets = rng.integers(0, 5, (2, 7), dtype=np.int32)
    weights = np.where(np.arange(14) == 8, 0.0, rng.uniform(size=14)).astype("f").reshape(2, 7)

    @pytest.fixture(autouse=True)
    def small_chunks(self, monkeypatch):
        monkeypatch.setattr("attnax.training.loss._TOKENS", 4)  # 4 chunks of 2 tokens a row; the last has one padded
        monkeypatch.setattr("attnax.training.loss._LOGITS", 4)

    @staticmethod
    def logits_of(head, hidden):
        return 2.0 * jnp.tanh(hidden @ head["table"].T + head["bias"][None, None])

    def whole(self, head, hidden):
        losses = optax.softmax_cross_entropy_with_integer_labels(self.logits_of(head, hidden), self.targets)
        return 3.0 * (losses * self.weights).sum()

    def in_chunks(self, head, hidden):
        targets, weights = jax.device_put((self.targets, self.weights))
        return 3.0 * weighted_cross_entropy(self.logits_of, head, jnp.asarray(hidden), targets, weights)

    def results(self, function, head, hidden):
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(head, hidden)

    def test_value_and_gradients_are_those_of_the_whole(self):
        have, want = (self.results(function, self.head, self.hidden) for function in (self.in_chunks, self.whole))
        leaves_close(have, want, atol=5e-6)
        np.testing.assert_allclose(jax.jit(self.in_chunks)(self.head, self.hidden), want[0], rtol=1e-6)

    def test_a_token_of_weight_0_adds_nothing_even_if_it_is_nan(self):
        spoiled = self.hidden.copy()
        spoiled[1, 1] = np.nan
        have = self.results(self.in_chunks, self.head, spoiled)
        leaves_close(have, self.results(self.in_chunks, self.head, self.hidden), atol=0)
        assert not have[1][1][1, 1].any()

    def test_it_has_the_dtype_of_the_logits(self):
        with jax.enable_x64():
            wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (self.head, self.hidden))
            have = self.results(self.in_chunks, *wide)
            assert {x.dtype for x in jax.tree.leaves(have)} == {np.dtype("float64")}
            leaves_close(have, self.results(self.whole, *wide), atol=1e-12)

    def test_a_cut_batch_stays_where_it_is(self):
        """Also on a mesh with Explicit axes; no device gathers the rows of another."""
        mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
        want = self.results(self.in_chunks, self.head, self.hidden)
        with jax.set_mesh(mesh):
            cut = jax.device_put(self.hidden, jax.P("rows"))
            placed = jax.device_put((self.targets, self.weights), jax.P("rows"))

            def in_chunks(head, hidden):
                return 3.0 * weighted_cross_entropy(self.logits_of, head, hidden, *placed)

            program = jax.jit(jax.value_and_grad(in_chunks, argnums=(0, 1))).lower(self.head, cut).compile()
            leaves_close(program(self.head, cut), want)
        assert "all-gather" not in program.as_text()


def test_a_step_is_lowered_for_the_devices_of_a_layout_which_may_be_some():
    optimizer = OptimizerConfig(batch_size=2)
    trainer = Trainer(MODEL, optimizer, layout=Layout(), devices=jax.devices()[:2])
    assert "mhlo.num_partitions = 2 " in trainer.lower_step(5).as_text()
    with pytest.raises(ValueError, match="devices are those of a layout; got 2 devices and layout=None"):
        Trainer(MODEL, optimizer, devices=jax.devices()[:2])


def test_a_step_holds_no_logits_of_all_tokens():
    trainer = Trainer(dataclasses.replace(MODEL, vocab_size=4093), OptimizerConfig())
    program = jax.jit(trainer._step).lower(trainer.init(), np.zeros((179, 8), np.int32)).as_text()
    assert set(re.findall(r"<([\dx]*?)x?4093x", program)) == {"8", "179x3", "537", ""}  # 1253 tokens are 3 chunks


@pytest.fixture(scope="module")
def trainer():
    """An optimizer that learns fast, without warm-up; Adam's updates do not depend on the clipping."""
    return Trainer(MODEL, OptimizerConfig(steps=200, learning_rate=1e-2, warmup=0.0, max_grad_norm=0.01))


class TestTrainer:
    def batches(self, count, size=4):
        rng = np.random.default_rng(0)
        return [((rng.integers(0, 16, (size, 1)) + np.arange(8)) % 17).astype(np.int32) for _ in range(count)]

    def test_one_row_without_a_batch_is_refused(self, trainer, unchecked_shapes):
        with pytest.raises(ValueError, match=r"tokens must be \(batch, T\); got tokens.shape=\(6,\)"):
            jax.eval_shape(lambda: trainer.step(trainer.init(), np.zeros(6, np.int32)))

    def test_it_learns(self, trainer):
        state, losses = trainer.init(), []
        for batch in self.batches(200):
            state, metrics = trainer.step(state, batch)
            losses.append(float(metrics.loss))
        assert losses[0] == pytest.approx(math.log(17), abs=0.5) and losses[-1] < 0.5

    def test_a_step_is_what_optax_does_with_the_mean_cross_entropy(self, trainer):
        before, batch = trainer.init(), self.batches(1)[0]

        def loss(params):
            logits = trainer.merge(params)(batch[:, :-1])
            targets = jax.nn.one_hot(batch[:, 1:], 17)
            return -(jax.nn.log_softmax(logits) * targets).sum(-1).mean()

        @jax.jit
        def step(params):
            value, grads = jax.value_and_grad(loss)(params)
            optimizer = trainer.optimizer.build()
            updates, _ = optimizer.update(grads, optimizer.init(params), params)
            return value, optax.tree.norm(grads), optax.apply_updates(params, updates)

        value, norm, params = step(before.params)
        after, metrics = trainer.step(trainer.init(), batch)
        assert float(metrics.loss) == pytest.approx(float(value), rel=1e-5)
        assert float(metrics.grad_norm) == pytest.approx(float(norm), rel=1e-4)
        leaves_close(after.params, params)
        assert int(after.passes) == 1

    def test_accumulated_batches_are_one_large_batch(self, trainer):
        (batch,) = self.batches(1)
        parts = batch[:2], batch[2:]
        small = Trainer(MODEL, dataclasses.replace(trainer.optimizer, accumulate=2))
        state = small.init()
        start = jax.tree.map(np.asarray, state.params)
        state, _ = small.step(state, parts[0])
        leaves_close(state.params, start, atol=0)
        state, metrics = small.step(state, parts[1])
        large, expected = trainer.step(trainer.init(), batch)
        leaves_close(state.params, large.params, atol=1e-5)
        assert float(metrics.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-5)  # a mean, not a sum

    def test_updates_that_are_not_finite_are_skipped_and_counted(self, trainer):
        """NaN may be in any pass of an update. The next update differs from one without it only in its dropout."""
        good, bad = trainer.init(), trainer.init()
        first, second = self.batches(2)
        bad = dataclasses.replace(bad, params=jax.tree.map(lambda x: x * np.nan, bad.params))
        _, metrics = trainer.step(bad, first)
        assert metrics.is_skipped and not metrics.is_finite and np.isnan(metrics.loss)
        small = Trainer(MODEL, dataclasses.replace(trainer.optimizer, accumulate=2))
        want, metrics = small.step(small.step(small.init(), first)[0], second)
        assert metrics.is_finite and not metrics.is_skipped
        state = small.init()
        state, metrics = small.step(dataclasses.replace(state, sums=(jnp.array(False), state.sums[1])), first)
        assert not metrics.is_skipped and not metrics.is_finite
        state, metrics = small.step(state, second)
        assert metrics.is_skipped and int(state.skipped) == 1
        leaves_close(state.params, small.init().params, atol=0)
        state, metrics = small.step(small.step(state, first)[0], second)
        assert metrics.is_finite and not metrics.is_skipped and int(state.skipped) == 1
        leaves_close(state.params, want.params, atol=0)
        leaves_close(state.opt_state, want.opt_state, atol=0)
        _, metrics = trainer.step(good, first)
        assert metrics.is_finite and not metrics.is_skipped

    def test_parameters_that_would_overflow_in_float16_are_left(self):
        model = dataclasses.replace(MODEL, param_dtype="float16")
        trainer = Trainer(model, OptimizerConfig(warmup=0.0, learning_rate=1e6))
        state, metrics = trainer.step(trainer.init(), self.batches(1)[0])
        assert np.isfinite(metrics.loss) and metrics.is_skipped and not metrics.is_finite and int(state.skipped) == 1
        leaves_close(state.params, trainer.init().params, atol=0)

    def test_parameters_of_float16_learn(self):
        """Adam's moments are in float32: in float16 its epsilon is 0, and an update could be 0 / 0."""
        model = dataclasses.replace(MODEL, param_dtype="float16")
        trainer = Trainer(model, OptimizerConfig(steps=50, warmup=0.0, learning_rate=1e-2))
        state, losses = trainer.init(), []
        for batch in self.batches(20):
            state, metrics = trainer.step(state, batch)
            assert metrics.is_finite
            losses.append(float(metrics.loss))
        assert losses[-1] < losses[0] - 0.5
        assert all(leaf.dtype == np.float16 for leaf in jax.tree.leaves(state.params))

    def test_an_update_that_overflows_in_float32_is_said(self):
        trainer = Trainer(MODEL, OptimizerConfig(warmup=0.0, learning_rate=3e38, weight_decay=1e9))
        _, metrics = trainer.step(trainer.init(), self.batches(1)[0])
        assert not metrics.is_skipped and not metrics.is_finite

    def test_packed_documents_are_scored_as_each_is_alone(self):
        """A row of three documents equals three rows of one document, with learned positions and a mask."""
        model = dataclasses.replace(MODEL, pos_emb_type="learned")
        trainer = Trainer(model, OptimizerConfig(), document_token=0)
        params = trainer.init().params
        row, places = np.array([[5, 6, 0, 7, 0, 9, 3, 4]], np.int32), ((0, 2), (2, 4), (4, 7))
        losses = losses_of(trainer, params, row)[0]
        alone = np.zeros((4, 8), np.int32)  # later documents change nothing in a document
        for one, (start, end) in zip(alone, places, strict=False):
            one[: end + 1 - start] = row[0, start : end + 1]
        alone[3] = row
        *documents, unpacked = losses_of(Trainer(model, OptimizerConfig()), params, alone)
        for document, (start, end) in zip(documents, places, strict=True):
            np.testing.assert_allclose(losses[start:end], document[: end - start], atol=1e-5)
        assert (np.abs(unpacked - losses)[3:] > 1e-4).any()

    @pytest.mark.usefixtures("unchecked_shapes")
    @pytest.mark.parametrize("shape", [(3,), (1, 2, 3)])
    def test_documents_are_found_in_rows_or_it_is_refused_in_words(self, shape):
        words = r"find_documents: tokens must be integers of shape \(batch, length\); got tokens.shape="
        with pytest.raises(ValueError, match=words):
            find_documents(np.zeros(shape, int), 0)

    def test_losses_of_a_mixture_count_by_their_weights(self, monkeypatch):
        monkeypatch.setattr(
            "attnax.training.trainer.TransformerLM",
            lambda rngs, config, **parts: build(lambda rngs: TransformerLM(rngs, config, **parts)),
        )
        weights = {"load_balance_loss": 0.02, "router_z_loss": 0.003}
        trainer = Trainer(dataclasses.replace(MODEL, num_experts=3, top_k=1), OptimizerConfig(**weights))
        (batch,), state = self.batches(1), trainer.init()
        mean = np.full((batch.shape[0], batch.shape[1] - 1), 1 / batch[:, 1:].size, np.float32)
        loss, aux = jax.jit(trainer._loss)(state.params, batch, mean)
        weighed = [weight * float(aux[name]) for name, weight in weights.items()]
        _, metrics = trainer.step(state, batch)
        assert float(metrics.loss) - float(loss) == pytest.approx(sum(weighed), abs=1e-6)
        assert min(weighed) > 1e-4

    def test_statistics_of_packed_documents_are_those_of_each_beside_padding(self):
        model = dataclasses.replace(MODEL, num_experts=3, top_k=1)
        trainer = Trainer(model, OptimizerConfig(), document_token=0)
        params = trainer.init().params
        row = np.array([[5, 6, 0, 7, 0, 9, 3, 4]], np.int32)  # the last token is predicted and not read
        documents = np.array([[5, 6, 8], [0, 7, 8], [0, 9, 3]], np.int32)
        real = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 1]], bool)
        apart = jax.jit(lambda params: trainer.merge(params).run(documents, padding_mask=real).aux)(params)
        leaves_close(jax.jit(trainer._loss)(params, row, np.ones((1, 7), "f"))[1], apart, atol=2e-6)

    def test_weight_decay_spares_vectors_and_the_schedule_warms_up_and_decays(self):
        config = OptimizerConfig(steps=100, learning_rate=1.0, warmup=0.1, final_learning_rate=0.2, weight_decay=0.5)
        rates = jax.jit(jax.vmap(config.schedule()))(np.array([0, 5, 10, 55, 100])).tolist()
        assert rates == pytest.approx([0, 0.5, 1.0, 0.6, 0.2], abs=1e-6)
        optimizer = config.build()
        params = {
            "matrix": np.ones((2, 2), "f"),
            "vector": np.ones(2, "f"),
            "up_bias": np.ones((3, 2), "f"),
            "scale": np.ones((3, 2), "f"),
            "sinks": np.ones((3, 2), "f"),
            "periods": {"shares": np.ones((3, 2), "f")},
        }

        @jax.jit
        def two_steps(params):  # the first update has learning rate 0
            zeros, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
            _, state = optimizer.update(zeros, state, params)
            return optimizer.update(zeros, state, params)[0]

        updates = jax.tree.map(np.asarray, two_steps(params))
        assert (updates.pop("matrix") < 0).all()
        assert (updates.pop("periods")["shares"] == 0).all()  # one vector for each layer
        assert all((update == 0).all() for update in updates.values())  # also where layers or experts are stacked

    def test_muon_gives_hidden_matrices_orthogonal_updates_of_the_size_of_adams_and_the_rest_adams(self):
        """Also matrices that are stacked by layer and expert; every singular value of an update is nearly the same."""
        shapes = {"embed": {"embedding": (7, 4)}, "head": {"kernel": (4, 7)}, "up_bias": (3, 4)}
        hidden = {"kernel": (6, 4), "stack": {"down": (2, 3, 4, 8)}}
        rng, rate = np.random.default_rng(0), 0.01
        leaves, structure = jax.tree.flatten(shapes | hidden, is_leaf=lambda x: isinstance(x, tuple))
        params, gradients = (structure.unflatten(rng.standard_normal(x, np.float32) for x in leaves) for _ in range(2))

        def update(algorithm, **change):
            fields = {"weight_decay": 0.0, "warmup": 0.0, "learning_rate": rate} | change
            optimizer = OptimizerConfig(algorithm=algorithm, **fields).build()
            return jax.jit(lambda x, p: optimizer.update(x, optimizer.init(p), p)[0])(gradients, params)

        muon, adamw, decayed = update("muon"), update("adamw", weight_decay=0.5), update("muon", weight_decay=0.5)
        change = -rate * 0.5 * params["kernel"]
        np.testing.assert_allclose(decayed["kernel"], muon["kernel"] + change, atol=1e-6)
        for x in jax.tree.leaves({name: muon[name] for name in hidden}):
            singular = np.linalg.svd(np.asarray(x), compute_uv=False)
            assert singular.max() < 1.8 * singular.min()
            assert np.sqrt(np.mean(np.square(x))) == pytest.approx(0.2 * rate, rel=0.3)
        leaves_close(*({name: x[name] for name in shapes} for x in (decayed, adamw)), atol=1e-8)

    def test_muon_takes_the_matrices_of_the_layers_of_every_model(self):
        layers = {"num_layers": 1, "num_experts": 2, "top_k": 1, "scan_layers": True, "pos_emb_type": "relative"}
        model = dataclasses.replace(MODEL, tie_embeddings=False, **layers)
        params = nnx.eval_shape(lambda: nnx.state(TransformerLM(nnx.Rngs(0), model), nnx.Param))
        paths = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params))
        taken = {path[-1].key if path[-1].key != "kernel" else path[-2].key for path, x in paths if is_hidden(path, x)}
        assert taken == {"query", "key", "value", "out", "up", "down"}

    def test_a_configuration_is_a_value(self):
        assert {OptimizerConfig(): "default"}[OptimizerConfig(steps=1000)] == "default"
        with pytest.raises(dataclasses.FrozenInstanceError):
            OptimizerConfig().steps = 3

    def test_bits_are_those_of_the_chain_rule(self, trainer):
        """Text shorter than a window: the sum of the log-probabilities of one forward pass."""
        params, tokens = trainer.init().params, np.arange(6, dtype=np.uint16)
        read = jax.jit(lambda params, ids: trainer.merge(params).log_probs(ids))
        log_probs = np.asarray(read(params, tokens[None, :-1].astype(np.int32)))[0]
        expected = -sum(float(log_probs[index, index + 1]) for index in range(5)) / math.log(2)
        assert trainer.bits(params, TokenStream(tokens, 7)) == pytest.approx(expected, rel=1e-5)

    def test_bits_of_long_text_do_not_depend_on_the_batching(self, trainer):
        stream = TokenStream((np.arange(60) ** 2 % 17).astype(np.uint16), 7)
        params = trainer.init().params
        assert trainer.bits(params, stream, batch_size=3) == pytest.approx(trainer.bits(params, stream), rel=1e-5)
        assert 59 * 2 < trainer.bits(params, stream) < 59 * 8

    def test_dropout_is_on_in_training_and_off_in_scoring(self, trainer):
        dropping = Trainer(dataclasses.replace(MODEL, dropout_rate=0.5), OptimizerConfig())
        batch = self.batches(1)[0]
        _, dropped = dropping.step(dropping.init(), batch)
        _, exact = trainer.step(trainer.init(), batch)
        assert abs(float(dropped.loss) - float(exact.loss)) > 1e-4
        leaves_close(dropping.init().params, trainer.init().params, atol=0)
        stream = TokenStream(batch[0].astype(np.uint16), 7)
        assert dropping.bits(dropping.init().params, stream) == pytest.approx(
            float(trainer.bits(trainer.init().params, stream))
        )

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"steps": 0}, "steps must be at least 1; got steps=0"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"learning_rate": 0.0}, "learning_rate must be above 0 and finite"),
            ({"learning_rate": float("nan")}, "learning_rate must be above 0 and finite"),
            ({"warmup": 1.0}, "warmup must be at least 0 and below 1"),
            ({"final_learning_rate": 1.5}, "final_learning_rate must be between 0 and 1"),
            ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
            ({"beta2": 1.0}, "beta2 must be between 0 and 1"),
        ],
    )
    def test_wrong_options_are_refused_in_words(self, fields, words):
        with pytest.raises(ValueError, match=words):
            OptimizerConfig(**fields)

    def test_an_unknown_algorithm_is_refused_in_words(self):
        with pytest.raises(ValueError, match="algorithm must be 'adamw' or 'muon'; got algorithm='sgd'"):
            OptimizerConfig.__post_init__(types.SimpleNamespace(algorithm="sgd"))  # tests check annotations first
