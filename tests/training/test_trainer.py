"""Updates: one program, accumulation is a large batch, a skipped one changes nothing, and a restart changes nothing."""

import dataclasses
import gc
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import build

from attnax import TransformerConfig, TransformerLM
from attnax.sharding import Layout
from attnax.training import Loss, OptimizerConfig, TokenStream, Trainer, causal_lm

MODEL = TransformerConfig(
    vocab_size=17, d_model=8, num_heads=2, num_layers=1, d_ff=12, max_len=7, dropout_rate=0.0, pos_emb_type="rope"
)
FAST = OptimizerConfig(steps=200, learning_rate=1e-2, warmup=0.0, max_grad_norm=0.01)


def check_close(left, right, atol=1e-6):
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, two, atol=atol)


def check_same(left, right):
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


def copy(tree):
    return jax.tree.map(np.array, tree)


def update_of(*rows):
    """The batch of an update over these microbatches."""
    return {"tokens": np.stack(rows)}


def make_batches(count, size=4):
    rng = np.random.default_rng(0)
    return [((rng.integers(0, 16, (size, 1)) + np.arange(8)) % 17).astype(np.int32) for _ in range(count)]


@pytest.fixture(scope="module")
def trainer():
    """An optimizer that learns fast, without warm-up; Adam's updates do not depend on the clipping."""
    return Trainer(MODEL, causal_lm(), FAST)


def test_it_learns(trainer):
    state, losses = trainer.init(), []
    for batch in make_batches(200):
        state, metrics = trainer.step(state, update_of(batch))
        losses.append(metrics.loss)
    assert losses[0] == pytest.approx(math.log(17), abs=0.5) and losses[-1] < 0.5


def test_an_update_is_what_optax_does_with_the_mean_cross_entropy(trainer):
    before, batch = trainer.init(), make_batches(1)[0]

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
    after, metrics = trainer.step(trainer.init(), update_of(batch))
    assert float(metrics.loss) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(norm), rel=1e-4)
    assert metrics.weight == 28 and metrics.aux == {}
    check_close(after.params, params)
    assert int(after.update) == 1 and after.ema == ()


SGD = {"optimizer": optax.sgd(1.0), "objective": causal_lm()}  # the change of the parameters is the gradient


def test_microbatches_of_unequal_weights_are_one_large_batch():
    """One microbatch has a single token that counts, another none."""
    tokens = np.concatenate(make_batches(3, size=2))
    weights = np.random.default_rng(1).uniform(size=(6, 7)).astype("f")
    weights[2:4], weights[4:6] = 0, 0
    weights[3, 2] = 0.7
    trainer = Trainer(MODEL, **SGD)
    start = copy(trainer.init().params)
    large, want = trainer.step(trainer.init(), {"tokens": tokens[None], "weights": weights[None]})
    parts = {"tokens": tokens.reshape(3, 2, 8), "weights": weights.reshape(3, 2, 7)}
    small, have = trainer.step(trainer.init(), parts)
    check_close(small.params, large.params)
    check_close(have, want)
    assert float(want.weight) == pytest.approx(weights.sum()) and float(want.grad_norm) > 0.1
    check_close(jax.tree.map(lambda x, y: x - y, small.params, start), jax.tree.map(jnp.subtract, large.params, start))


def test_an_update_without_any_weight_is_none(trainer):
    trainer = Trainer(MODEL, **SGD)
    batch = update_of(*make_batches(3, size=2))
    state, metrics = trainer.step(trainer.init(), batch | {"weights": np.zeros((3, 2, 7), "f")})
    check_same(state.params, trainer.init().params)
    assert metrics.loss == 0 and metrics.weight == 0 and metrics.is_finite


class TestSkippedUpdates:
    def test_the_state_stays_bitwise_and_the_update_is_counted(self):
        """NaN comes from a weight of one microbatch of two."""
        trainer = Trainer(MODEL, causal_lm(), FAST, ema=0.9)
        batch = update_of(*make_batches(2)) | {"weights": np.ones((2, 4, 7), "f")}
        state, _ = trainer.step(trainer.init(), batch)
        before, bad = copy(state), batch["weights"].copy()
        bad[1, 2, 3] = np.nan
        state, metrics = trainer.step(state, batch | {"weights": bad})
        assert metrics.is_skipped and not metrics.is_finite and np.isnan(metrics.loss)
        want = dataclasses.replace(before, update=np.int32(2), skipped=np.int32(1))
        check_same(state, want)
        state, metrics = trainer.step(state, batch)
        assert metrics.is_finite and not metrics.is_skipped and int(state.skipped) == 1
        assert (state.ema["decoder"]["norm"]["scale"] != before.ema["decoder"]["norm"]["scale"]).any()

    def test_parameters_that_would_overflow_in_float16_are_left(self):
        model = dataclasses.replace(MODEL, param_dtype="float16")
        trainer = Trainer(model, causal_lm(), OptimizerConfig(warmup=0.0, learning_rate=1e6))
        state, metrics = trainer.step(trainer.init(), update_of(make_batches(1)[0]))
        assert np.isfinite(metrics.loss) and metrics.is_skipped and not metrics.is_finite and int(state.skipped) == 1
        check_same(state.params, trainer.init().params)

    def test_an_update_that_overflows_in_float32_is_said(self):
        trainer = Trainer(MODEL, causal_lm(), OptimizerConfig(warmup=0.0, learning_rate=3e38, weight_decay=1e9))
        _, metrics = trainer.step(trainer.init(), update_of(make_batches(1)[0]))
        assert not metrics.is_skipped and not metrics.is_finite


def test_parameters_of_float16_learn():
    """Adam's moments are in float32: in float16 its epsilon is 0, and an update could be 0 / 0."""
    model = dataclasses.replace(MODEL, param_dtype="float16")
    trainer = Trainer(model, causal_lm(), OptimizerConfig(steps=50, warmup=0.0, learning_rate=1e-2))
    state, losses = trainer.init(), []
    for batch in make_batches(20):
        state, metrics = trainer.step(state, update_of(batch))
        assert metrics.is_finite
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.5
    assert all(leaf.dtype == np.float16 for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_sums_loss_and_average_of_a_bfloat16_computation_are_in_float32(param_dtype):
    model = dataclasses.replace(MODEL, dtype="bfloat16", param_dtype=param_dtype)
    trainer = Trainer(model, causal_lm(), FAST, ema=0.9)
    traced = trainer.trace_step(update_of(*make_batches(2)))
    state, metrics = jax.tree.map(lambda x: str(x.dtype), traced.out_info)
    assert {metrics.loss, metrics.weight, metrics.grad_norm, *jax.tree.leaves(state.ema)} == {"float32"}
    assert set(jax.tree.leaves(state.params)) == {param_dtype}
    assert set(jax.tree.leaves(state.opt_state)) == {"float32", "int32"}
    (scan,) = (each for each in traced.jaxpr.eqns if each.primitive.name == "scan")
    assert len(scan.outvars) == len(jax.tree.leaves(state.params)) + 2  # gradients, losses and weights
    assert {str(x.aval.dtype) for x in scan.outvars} == {"float32"}


def test_the_average_follows_the_parameters():
    """Its decay is 2/11, 3/12, 0.3, 0.3 after the updates 1 to 4, and a skipped update is none."""
    trainer = Trainer(MODEL, causal_lm(), FAST, ema=0.3)
    batch = update_of(make_batches(1)[0]) | {"weights": np.ones((1, 4, 7), "f")}
    state = trainer.init()
    want, check = copy(state.params), lambda x: x["decoder"]["embed"]["tokens"]["embedding"]
    check_same(state.ema, want)
    for number in range(5):
        bad = number == 2
        weights = {"weights": batch["weights"] * (np.nan if bad else 1)}
        state, _ = trainer.step(state, batch | weights)
        made = number + 1 - (number > 2)
        decay = 1.0 if bad else min(0.3, (1 + made - 1) / (10 + made - 1))
        want = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, want, copy(state.params))
        np.testing.assert_allclose(check(state.ema), check(want), atol=1e-6)
    assert trainer.evaluate(state.ema, [{"tokens": batch["tokens"][0]}]).loss > 0


class TestRestarts:
    """A run that goes on from a copy of its state, after any update, ends with the same bits."""

    @pytest.mark.parametrize(
        ("options", "updates"),
        [
            ({"moment_dtype": "bfloat16"}, 5),
            pytest.param({"algorithm": "muon"}, 24, marks=pytest.mark.thorough),
            pytest.param({"algorithm": "adafactor"}, 24, marks=pytest.mark.thorough),
            pytest.param({"algorithm": "lion"}, 24, marks=pytest.mark.thorough),
        ],
    )
    def test_go_on_bitwise(self, options, updates):
        model = dataclasses.replace(MODEL, dropout_rate=0.3, attention_dropout_rate=0.2)
        optimizer = OptimizerConfig(steps=updates, learning_rate=1e-2, **options)
        trainer = Trainer(model, causal_lm(), optimizer, ema=0.9, seed=5)
        batches = [update_of(*pair) for pair in np.stack(make_batches(2 * updates, size=2)).reshape(updates, 2, 2, 8)]
        state, saved, rows = trainer.init(), [], []
        for batch in batches:
            saved.append(copy(state))
            state, metrics = trainer.step(state, batch)
            rows.append(copy(metrics))
        for cut in range(1, updates):
            again = jax.tree.map(jnp.asarray, saved[cut])
            for number in range(cut, updates):
                again, metrics = trainer.step(again, batches[number])
                check_same(metrics, rows[number])
            check_same(again, state)

    def test_the_draws_of_an_update_depend_on_its_number_and_on_the_microbatch(self):
        def objective(model, batch, rngs):
            draw = jnp.zeros(()) if rngs is None else jax.random.uniform(rngs())
            return Loss((model.kernel[...] * batch["x"]).sum(), jnp.float32(1), {"draw": draw})

        trainer = Trainer(lambda rngs: nnx.Linear(2, 3, rngs=rngs), objective, optax.sgd(0.0), seed=3)
        state, draws = trainer.init(), []
        for _ in range(2):
            state, metrics = trainer.step(state, {"x": np.ones((2, 2, 3), "f")})
            draws.append(float(metrics.aux["draw"]))
        key = jax.random.key(3)

        def want(update):
            keys = [jax.random.fold_in(jax.random.fold_in(key, update), i) for i in range(2)]
            return np.mean([float(jax.random.uniform(nnx.Rngs(key)())) for key in keys])

        assert draws == pytest.approx([want(0), want(1)], rel=1e-6)


class Classifier(nnx.Module):
    """A module of Flax alone, with dropout that draws from a stream of its own."""

    def __init__(self, rngs, rate=0.5):
        self.first, self.second = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.first(x))))


def squares(model, batch, rngs):
    del rngs  # the module's own streams are seeded
    error = jnp.square(model(batch["x"]) - batch["y"]).mean(axis=1)
    return Loss(error.sum(), jnp.float32(error.size), {"worst": error.max()})


def test_a_module_of_flax_with_dropout_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 16, 3)).astype("f")
    batch = {"x": x, "y": np.stack([x[..., 0], x[..., 1]], axis=-1)}
    trainer = Trainer(lambda rngs: Classifier(rngs, 0.1), squares, optax.adam(3e-2))
    state, losses = trainer.init(), []
    for _ in range(60):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.4 * losses[0] and trainer.config is None
    one = {name: array[0] for name, array in batch.items()}
    first, second = (trainer.evaluate(state.params, [one, one]) for _ in range(2))
    assert first == second and first.weight == 32
    frozen = Trainer(Classifier, squares, optax.sgd(0.0))  # dropout draws anew in each update
    state, drawn = frozen.init(), []
    for _ in range(3):
        state, metrics = frozen.step(state, batch)
        drawn.append(float(metrics.loss))
    assert len(set(drawn)) == 3


def test_a_transformation_that_reads_the_value_of_the_loss_gets_it():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    trainer = Trainer(lambda rngs: nnx.Linear(3, 2, rngs=rngs), squares, optax.chain(optax.sgd(0.0), plateau))
    state, batch = trainer.init(), {"x": np.ones((1, 4, 3), "f"), "y": np.ones((1, 4, 2), "f")}
    for _ in range(3):  # the loss stays
        state, _ = trainer.step(state, batch)
    assert float(state.opt_state[1].scale) < 1


@pytest.mark.parametrize("make", [optax.contrib.prodigy, optax.contrib.dog])
def test_a_transformation_may_keep_the_first_parameters(make):
    """A step gives the state away: no array of it may be there twice."""
    trainer = Trainer(lambda rngs: nnx.Linear(3, 2, rngs=rngs), squares, make(), ema=0.9)
    state, batch = trainer.init(), {"x": np.ones((1, 4, 3), "f"), "y": np.ones((1, 4, 2), "f")}
    first = copy(state.params)
    for _ in range(2):
        state, metrics = trainer.step(state, batch)
        assert metrics.is_finite
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state)]
    assert any(np.array_equal(leaf, first["kernel"]) for leaf in leaves)


def test_parameters_may_be_one_array_that_the_user_keeps():
    kept = jnp.ones((3, 3))

    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Param(kept), nnx.Param(kept)

        def __call__(self, x):
            return x @ self.first[...] @ self.second[...]

    trainer = Trainer(Twice, squares, optax.sgd(0.1))
    batch = {"x": np.ones((1, 4, 3), "f"), "y": np.zeros((1, 4, 3), "f")}
    losses = [float(trainer.step(trainer.init(), batch)[1].loss) for _ in range(2)]
    assert losses == [81.0, 81.0] and (kept == 1).all()


@pytest.mark.parametrize("optimizer", [FAST, optax.adam(1e-3)])
def test_moments_are_made_wide_once(optimizer, monkeypatch):
    made, original = [], optax.with_extra_args_support
    monkeypatch.setattr(optax, "with_extra_args_support", lambda given: made.append(given) or original(given))
    Trainer(lambda rngs: nnx.Linear(3, 2, rngs=rngs), squares, optimizer)
    assert len(made) == 1


@pytest.mark.parametrize(("module", "calls"), [(lambda rngs: nnx.Linear(3, 2, rngs=rngs), 2), (Classifier, 3)])
def test_a_module_is_made_as_often_as_is_said(module, calls):
    """For the shapes, for streams of random numbers, and in each `init`."""
    made = []
    trainer = Trainer(lambda rngs: made.append(rngs) or module(rngs), squares, optax.sgd(0.0))
    trainer.init()
    assert len(made) == calls
    trainer.init()
    assert len(made) == calls + 1


class TestScores:
    def test_evaluation_is_the_mean_over_all_batches_by_their_weights(self, trainer):
        params, (one, two) = trainer.init().params, make_batches(2)
        weights = np.random.default_rng(0).uniform(size=(2, 4, 7)).astype("f")
        batches = [{"tokens": tokens, "weights": each} for tokens, each in zip((one, two), weights, strict=True)]
        both = {"tokens": np.concatenate([one, two]), "weights": np.concatenate(weights)}
        scored, whole = trainer.evaluate(params, iter(batches)), trainer.evaluate(params, [both])
        assert scored.loss == pytest.approx(whole.loss, rel=1e-6)
        assert scored.weight == pytest.approx(weights.sum(), rel=1e-6)
        with pytest.raises(ValueError, match="batches must hold a batch; got none"):
            trainer.evaluate(params, [])

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
        dropping = Trainer(dataclasses.replace(MODEL, dropout_rate=0.5), causal_lm(), OptimizerConfig())
        batch = make_batches(1)[0]
        _, dropped = dropping.step(dropping.init(), update_of(batch))
        _, exact = trainer.step(trainer.init(), update_of(batch))
        assert abs(float(dropped.loss) - float(exact.loss)) > 1e-4
        check_same(dropping.init().params, trainer.init().params)
        stream = TokenStream(batch[0].astype(np.uint16), 7)
        assert dropping.bits(dropping.init().params, stream) == pytest.approx(
            float(trainer.bits(trainer.init().params, stream))
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("batch", "words"),
        [
            ({"tokens": np.zeros(6, int)}, r"must be \(accumulate, B, ...\).*got batch\['tokens'\].shape=\(6,\)"),
            (
                {"tokens": np.zeros((1, 2, 6), int), "weights": np.zeros((2, 1, 5))},
                r"got batch\['weights'\].shape=\(2, 1, 5\) beside batch\['tokens'\].shape=\(1, 2, 6\)\.",
            ),
            ({"tokens": np.zeros((0, 2, 6), int)}, "none of them 0"),
            ({}, "a batch must hold arrays"),
            ({"x": [[[1.0, 2.0]]]}, r"must be \(accumulate, B, ...\).*got batch\['x'\]\[0\]\[0\]\[0\]=1.0\."),
            ({"x": np.zeros((1, 2)), "y": "text"}, r"got batch\['y'\]='text'"),
        ],
    )
    def test_batches_of_other_shapes(self, trainer, batch, words, unchecked_shapes):
        with pytest.raises(ValueError, match=f"Trainer.step: .*{words}"):
            trainer.step(None, batch)

    def test_batches_without_an_axis_of_microbatches_in_words_of_the_objective(self, trainer):
        with pytest.raises(ValueError, match=r"tokens must be integers of shape \(B, length\); got tokens=int32\[6\]"):
            trainer.trace_step({"tokens": np.zeros((2, 6), np.int32)})

    def test_a_module_in_place_of_a_function_that_makes_one(self, unchecked_shapes):
        with pytest.raises(ValueError, match="or a function of nnx.Rngs that makes a module; got TransformerLM"):
            Trainer(build(lambda rngs: TransformerLM(rngs, MODEL)), causal_lm(), FAST)

    def test_a_state_in_place_of_its_parameters(self, trainer, unchecked_shapes):
        for call in (trainer.merge, lambda state: trainer.evaluate(state, [{}])):
            with pytest.raises(
                ValueError, match="params must be those of the model; got a TrainState. Give state.params"
            ):
                call(trainer.shapes)

    def test_one_batch_in_place_of_several(self, trainer, unchecked_shapes):
        with pytest.raises(ValueError, match=r"batches must be an iterable of batches; got one batch. Give \[batch\]"):
            trainer.evaluate(trainer.shapes.params, {"tokens": np.zeros((2, 6), np.int32)})

    def test_an_objective_that_was_not_called(self, unchecked_shapes):
        with pytest.raises(
            ValueError, match=r"of \(model, batch, rngs\); got causal_lm: .*called first: causal_lm\(\)"
        ):
            Trainer(MODEL, causal_lm, FAST)

    @pytest.mark.parametrize("ema", [0.0, 1.0, -1.0])
    def test_an_average_without_a_share(self, ema):
        with pytest.raises(ValueError, match=f"ema must be between 0 and 1, or None; got ema={ema}"):
            Trainer(MODEL, causal_lm(), FAST, ema=ema)

    def test_an_objective_without_a_loss(self):
        trainer = Trainer(lambda rngs: nnx.Linear(2, 3, rngs=rngs), lambda *_: 3.0, optax.sgd(1.0))
        with pytest.raises(ValueError, match="an objective must return a Loss of two scalars and aux; got 3.0"):
            trainer.trace_step({"x": np.zeros((1, 1))})


def test_a_step_is_lowered_for_the_devices_of_a_layout_which_may_be_some():
    trainer = Trainer(MODEL, causal_lm(), OptimizerConfig(batch_size=2), layout=Layout(), devices=jax.devices()[:2])
    shape = {"tokens": jax.ShapeDtypeStruct((1, 2, 5), jnp.int32)}
    assert "mhlo.num_partitions = 2 " in trainer.lower_step(shape).as_text()
    with pytest.raises(ValueError, match="devices are those of a layout; got 2 devices and layout=None"):
        Trainer(MODEL, causal_lm(), FAST, devices=jax.devices()[:2])


def resident_megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.thorough
def test_a_thousand_updates_compile_nothing_and_need_no_more_memory(count_compilations):
    model = dataclasses.replace(MODEL, dropout_rate=0.1)
    trainer = Trainer(model, causal_lm(), dataclasses.replace(FAST, steps=3000), ema=0.99)
    batches, state, seen = make_batches(64), trainer.init(), []
    for number in range(3001):
        state, metrics = trainer.step(state, update_of(batches[number % 64], batches[(number + 1) % 64]))
        if number % 100 == 0:
            float(metrics.loss)
            gc.collect()
            if number == 1000:
                count_compilations.clear()
            if number >= 1000:
                seen.append(resident_megabytes())
    assert not count_compilations
    slope = np.polyfit(np.arange(len(seen)) / 10, seen, 1)[0]  # megabytes in 1,000 updates
    assert slope < 1
