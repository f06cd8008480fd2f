"""`attnax.reference`: every option of the page against loops in NumPy, and the fast kernels against the page."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import oracle
import pytest

from attnax import flash_attention, memory_efficient_attention, pallas_flash_attention, reference, standard_attention

KERNELS = {
    "standard": standard_attention,
    "memory_efficient": partial(memory_efficient_attention, block_size=4),
    "flash": flash_attention,
    "pallas_flash": partial(pallas_flash_attention, block_q=4, block_kv=8),
}
HEADS, SEQ_Q, SEQ_KV, D_K, D_V = 3, 5, 7, 2, 11
WIDTHS = {"query": 13, "key": 17, "value": 19, "out": 23}


def make_params(seed=0, dtype=jnp.float32):
    """Each kind of token has a width of its own."""
    shapes = reference.AttentionParams(
        query=(WIDTHS["query"], HEADS, D_K),
        key=(WIDTHS["key"], HEADS, D_K),
        value=(WIDTHS["value"], HEADS, D_V),
        out=(HEADS, D_V, WIDTHS["out"]),
    )
    keys = jax.random.split(jax.random.key(seed), 4)
    return reference.AttentionParams(
        *(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    )


def make_tokens(*leading, seed=1, dtype=jnp.float32):
    lengths = {"query": SEQ_Q, "key": SEQ_KV, "value": SEQ_KV}
    return [
        jax.random.normal(jax.random.key(seed + i), (*leading, length, WIDTHS[name]), dtype)
        for i, (name, length) in enumerate(lengths.items())
    ]


def make_mask(batch):
    """Every query may attend something."""
    return (np.random.default_rng(0).random((batch, SEQ_Q, SEQ_KV)) < 0.5) | (np.arange(SEQ_KV) == 2)


def by_kernel(kernel, params, query_tokens, key_tokens, value_tokens, mask):
    """Multi-head attention with a kernel in the middle."""
    query, key, value = (
        reference.split_heads(reference.project(tokens, weight))
        for tokens, weight in zip((query_tokens, key_tokens, value_tokens), params, strict=False)
    )
    return reference.merge_heads(kernel(query, key, value, mask=mask[:, None]), params.out)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compute_what_the_page_says(name):
    params, tokens, mask = make_params(), make_tokens(2), jnp.asarray(make_mask(2))
    want = reference.multi_head_attention(params, *tokens, mask)
    np.testing.assert_allclose(by_kernel(KERNELS[name], params, *tokens, mask), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_have_the_gradients_of_the_page(name):
    params, tokens, mask = make_params(), make_tokens(2), jnp.asarray(make_mask(2))

    def gradients(attend):
        return jax.grad(lambda params, tokens: jnp.sin(attend(params, *tokens, mask)).sum(), (0, 1))(params, tokens)

    have, want = gradients(partial(by_kernel, KERNELS[name])), gradients(reference.multi_head_attention)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_float64_parameters_are_computed_in_float64():
    with jax.enable_x64(True):
        params, tokens = make_params(dtype=jnp.float64), make_tokens(2, dtype=jnp.float64)
        mask = make_mask(2)
        have = reference.multi_head_attention(params, *tokens, jnp.asarray(mask))
        assert have.dtype == jnp.float64
        query, key, value = (
            np.einsum("btd,dnk->bntk", x, weight) for x, weight in zip(tokens, params[:3], strict=True)
        )
        heads, _ = oracle.attention(query, key, value, keep=mask[:, None])
        np.testing.assert_allclose(have, np.einsum("bntv,nvd->btd", heads, params.out), rtol=1e-12)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_leading_axes_are_independent_of_each_other(leading):
    params, tokens = make_params(), make_tokens(*leading)
    out = reference.multi_head_attention(params, *tokens)
    assert out.shape == (*leading, SEQ_Q, WIDTHS["out"])
    for index in np.ndindex(*leading):
        alone = reference.multi_head_attention(params, *(x[index] for x in tokens))
        np.testing.assert_allclose(out[index], alone, atol=1e-6 * np.abs(alone).max())


@pytest.mark.parametrize(
    "activation", [jax.nn.sigmoid, jax.nn.relu, lambda scores: scores], ids=["sigmoid", "relu", "identity"]
)
def test_any_activation_may_stand_for_softmax(activation):
    params, tokens = make_params(), make_tokens()
    have = reference.multi_head_attention(params, *tokens, activation=activation)
    want = 0
    for head in range(HEADS):
        query, key, value = (
            np.asarray(x, np.float64) @ np.asarray(weight[:, head])
            for x, weight in zip(tokens, params[:3], strict=True)
        )
        weights = np.asarray(activation(jnp.asarray(query @ key.T / np.sqrt(D_K), jnp.float32)))
        want = want + weights @ value @ np.asarray(params.out[head])
    np.testing.assert_allclose(have, want, atol=2e-5 * np.abs(want).max())


def test_a_masked_key_is_a_key_that_is_not_there():
    params, (query, key, value) = make_params(), make_tokens()
    mask = jnp.broadcast_to(jnp.arange(SEQ_KV) != 4, (SEQ_Q, SEQ_KV))
    have = reference.multi_head_attention(params, query, key, value, mask)
    key, value = (jnp.delete(x, 4, axis=0) for x in (key, value))
    want = reference.multi_head_attention(params, query, key, value)
    np.testing.assert_allclose(have, want, atol=1e-6 * np.abs(want).max())


@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_do_not_fit_are_refused_in_words():
    params, (query, key, value) = make_params(), make_tokens()
    with pytest.raises(ValueError, match=r"weigh: there must be one weight a value; got shapes \(3, 5, 7\) and"):
        reference.multi_head_attention(params, query, key, value[1:])
    with pytest.raises(ValueError, match="project: tokens and weight must agree in width"):
        reference.multi_head_attention(params, key, key, value)
    with pytest.raises(ValueError, match="merge_heads: there must be a row a head"):
        reference.merge_heads(jnp.ones((2, 5, 11)), params.out)


def test_annotations_are_checked_where_jaxtyping_is_asked_to():
    with pytest.raises(jaxtyping.TypeCheckError):
        reference.salience(jnp.ones((3, 4)), jnp.ones((5, 3)))
    with pytest.raises(jaxtyping.TypeCheckError):
        reference.weigh(jnp.ones((3, 5), int), jnp.ones((5, 2)))
