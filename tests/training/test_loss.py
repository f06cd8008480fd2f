"""The cross-entropy that holds a few logits at a time: its value, its gradients, its memory, its devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnax import Layout, TransformerConfig
from attnax.training import OptimizerConfig, Trainer, causal_lm
from attnax.training.loss import logits_of_chunk, weighted_cross_entropy
from attnax.training.plan import plan_training


def check_close(left, right, atol=1e-6):
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, two, atol=atol)


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
        check_close(have, want, atol=5e-6)
        np.testing.assert_allclose(jax.jit(self.in_chunks)(self.head, self.hidden), want[0], rtol=1e-6)

    def test_a_token_of_weight_0_adds_nothing_even_if_it_is_nan(self):
        spoiled = self.hidden.copy()
        spoiled[1, 1] = np.nan
        have = self.results(self.in_chunks, self.head, spoiled)
        check_close(have, self.results(self.in_chunks, self.head, self.hidden), atol=0)
        assert not have[1][1][1, 1].any()

    def test_it_has_the_dtype_of_the_logits(self):
        with jax.enable_x64():
            wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (self.head, self.hidden))
            have = self.results(self.in_chunks, *wide)
            assert {x.dtype for x in jax.tree.leaves(have)} == {np.dtype("float64")}
            check_close(have, self.results(self.whole, *wide), atol=1e-12)

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
            check_close(program(self.head, cut), want)
        assert "all-gather" not in program.as_text()

    def test_tensor_alone_cuts_the_vocabulary(self):
        """No other axis of the layout cuts anything, so that every device has all tokens."""
        mesh = Layout(fsdp=1, tensor=2).mesh(jax.devices()[:2])
        head = {"table": np.concatenate([self.head["table"]] * 2), "bias": np.arange(10, dtype="f")}
        want = self.results(self.in_chunks, head, self.hidden)
        with jax.set_mesh(mesh):
            cut = {"table": jax.device_put(head["table"], jax.P("tensor")), "bias": head["bias"]}
            check_close(self.results(self.in_chunks, cut, self.hidden), want)


def test_a_step_holds_no_logits_of_all_tokens():
    model = TransformerConfig(vocab_size=4093, d_model=8, num_heads=2, num_layers=1, d_ff=12, max_len=7)
    batch = {"tokens": jax.ShapeDtypeStruct((1, 179, 8), jnp.int32)}
    program = Trainer(model, causal_lm(), OptimizerConfig()).lower_step(batch).as_text()
    assert set(re.findall(r"<([\dx]*?)x?4093x", program)) == {"8", "179x3", "537", ""}  # 1253 tokens are 3 chunks


def scans_of(jaxpr):
    """The lengths of all loops, and the shapes of what they compute."""
    for eqn in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
        inner = [each for each in inner if hasattr(each, "eqns")]
        if eqn.primitive.name == "scan":
            yield eqn.params["length"], [x.aval.shape for each in inner[0].eqns for x in each.outvars]
        for each in inner:
            yield from scans_of(each)


@pytest.mark.parametrize(
    ("rows", "length", "vocabulary", "chunks", "tokens"),
    [
        (1024, 128, 4096, 128, 1024),  # a chunk would have 512 tokens, but has one of each row
        (1024, 16, 50257, 16, 1024),
        (3, 257, 4096, 2, 387),  # 2 chunks of 129 tokens of a row; the last has one of padding
        (5, 700, 8192, 14, 250),  # 250 tokens of at most 256
    ],
)
def test_chunks_hold_tokens_of_all_rows_and_none_is_padding_alone(rows, length, vocabulary, chunks, tokens):
    def loss(table, hidden, targets, weights):
        return weighted_cross_entropy(lambda table, x: x @ table, table, hidden, targets, weights)

    shapes = (2, vocabulary), (rows, length, 2), (rows, length), (rows, length)
    dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    traced = jax.make_jaxpr(loss)(*map(jax.ShapeDtypeStruct, shapes, dtypes))
    ((number, computed),) = scans_of(traced.jaxpr)
    assert number == chunks and (rows, tokens // rows, vocabulary) in computed
    assert logits_of_chunk(rows, length, vocabulary) == tokens * vocabulary
    assert (chunks - 1) * tokens < rows * length <= chunks * tokens


def test_the_memory_that_is_said_has_a_token_of_each_row():
    model = TransformerConfig(vocab_size=50257, d_model=8, num_heads=2, num_layers=1, d_ff=12, max_len=16)
    hidden = 1024 * 16 * 8 * 4
    memory = plan_training(model, OptimizerConfig(batch_size=1024)).memory
    assert memory.activations == hidden + 4 * 1024 * 50257


@pytest.mark.contract
def test_a_loss_of_4096_tokens_and_32_thousand_words_needs_80_megabytes():
    """The logits of all of them are 524 MB."""
    rows, width, vocabulary = (8, 512), 64, 32_000

    def logits_of(head, hidden):
        return jnp.einsum("BTD,VD->BTV", hidden, head)

    def loss(*arguments):
        return weighted_cross_entropy(logits_of, *arguments)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((vocabulary, width), (*rows, width), rows)]
    arguments = *shapes[:2], jax.ShapeDtypeStruct(rows, jnp.int32), shapes[2]
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < 80e6
