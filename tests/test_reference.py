"""`attnax.reference`: every option against loops in NumPy, and the fast kernels against `attnax.reference`."""

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


def make_params(seed=0, dtype=np.float32):
    """Parameters and tokens; each kind of token has a width of its own, and outputs are of order 1."""
    rng = np.random.default_rng(seed)
    weight = lambda fan_in, *shape: (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(dtype)
    return reference.AttentionParams(
        query=weight(WIDTHS["query"], WIDTHS["query"], HEADS, D_K),
        key=weight(WIDTHS["key"], WIDTHS["key"], HEADS, D_K),
        value=weight(WIDTHS["value"], WIDTHS["value"], HEADS, D_V),
        out=weight(HEADS * D_V, HEADS, D_V, WIDTHS["out"]),
    )


def make_tokens(*leading, seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    lengths = {"query": SEQ_Q, "key": SEQ_KV, "value": SEQ_KV}
    return [rng.standard_normal((*leading, length, WIDTHS[name])).astype(dtype) for name, length in lengths.items()]


def make_mask(batch):
    """A mask in which every query may attend a key."""
    return (np.random.default_rng(0).random((batch, SEQ_Q, SEQ_KV)) < 0.5) | (np.arange(SEQ_KV) == 2)


def by_kernel(kernel, params, query_tokens, key_tokens, value_tokens, mask):
    """Multi-head attention by a kernel."""
    query, key, value = (
        reference.split_heads(reference.project(tokens, weight))
        for tokens, weight in zip((query_tokens, key_tokens, value_tokens), params, strict=False)
    )
    return reference.merge_heads(kernel(query, key, value, mask=mask[:, None]), params.out)


@jax.jit
def by_all_kernels(params, tokens, mask):
    """For `attnax.reference` and each kernel: (the output, the gradients of the sum of its sines)."""

    def run(attend):
        out, pull = jax.vjp(lambda params, tokens: attend(params, *tokens, mask), params, tokens)
        return out, pull(jnp.cos(out))

    kernels = {name: partial(by_kernel, kernel) for name, kernel in KERNELS.items()}
    return {name: run(attend) for name, attend in {"page": reference.multi_head_attention, **kernels}.items()}


def test_kernels_have_the_values_and_gradients_of_the_reference():
    results = by_all_kernels(make_params(), make_tokens(2), make_mask(2))
    want, want_gradients = results.pop("page")
    assert results.keys() == KERNELS.keys()
    for name, (have, gradients) in results.items():
        np.testing.assert_allclose(have, want, atol=2e-6, err_msg=name)
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
            np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max(), err_msg=name)


def test_float64_parameters_are_computed_in_float64():
    params, tokens, mask = make_params(dtype=np.float64), make_tokens(2, dtype=np.float64), make_mask(2)
    with jax.enable_x64(True):
        have = jax.jit(reference.multi_head_attention)(params, *tokens, mask)
    assert have.dtype == np.float64
    query, key, value = (np.einsum("btd,dnk->bntk", x, weight) for x, weight in zip(tokens, params[:3], strict=True))
    heads, _ = oracle.attention(query, key, value, keep=mask[:, None])
    want = np.einsum("bntv,nvd->btd", heads, params.out)
    np.testing.assert_allclose(have, want, rtol=0, atol=1e-14 * np.abs(want).max())


def test_leading_axes_are_independent_of_each_other():
    params, tokens = make_params(), make_tokens(2, 3)
    attend = jax.jit(reference.multi_head_attention)
    first = [x[0] for x in tokens]
    whole, row = jax.jit(lambda *x: [reference.multi_head_attention(*part) for part in x])(
        (params, *tokens), (params, *first)
    )
    assert whole.shape == (2, 3, SEQ_Q, WIDTHS["out"]) and row.shape == whole.shape[1:]
    for index in np.ndindex(2, 3):
        alone = np.asarray(attend(params, *(x[index] for x in tokens)))
        assert alone.shape == whole.shape[2:]
        np.testing.assert_allclose(whole[index], alone, atol=1e-6 * np.abs(alone).max())
        if index[0] == 0:
            np.testing.assert_allclose(row[index[1]], alone, atol=1e-6 * np.abs(alone).max())


def test_any_activation_may_replace_the_softmax():
    params, tokens = make_params(), make_tokens()
    activations = {  # in JAX and in NumPy
        "sigmoid": (jax.nn.sigmoid, lambda scores: 1 / (1 + np.exp(-scores))),
        "relu": (jax.nn.relu, lambda scores: np.maximum(scores, 0)),
        "identity": (lambda scores: scores, lambda scores: scores),
    }
    attend = reference.multi_head_attention
    results = jax.jit(lambda *x: {name: attend(*x, activation=pair[0]) for name, pair in activations.items()})(
        params, *tokens
    )
    for name, (_, activation) in activations.items():
        want = 0
        for head in range(HEADS):
            query, key, value = (
                x.astype(np.float64) @ weight[:, head] for x, weight in zip(tokens, params[:3], strict=True)
            )
            want = want + activation(query @ key.T / np.sqrt(D_K)) @ value @ params.out[head]
        np.testing.assert_allclose(results[name], want, atol=2e-5 * np.abs(want).max(), err_msg=name)


def test_a_masked_key_has_no_effect():
    params, (query, key, value) = make_params(), make_tokens()
    mask = np.broadcast_to(np.arange(SEQ_KV) != 4, (SEQ_Q, SEQ_KV))
    fewer = [np.delete(x, 4, axis=0) for x in (key, value)]
    have, want = jax.jit(lambda *x: [reference.multi_head_attention(*arguments) for arguments in x])(
        (params, query, key, value, mask), (params, query, *fewer)
    )
    np.testing.assert_allclose(have, want, atol=1e-6 * np.abs(want).max())


@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_do_not_fit_are_errors_that_name_them():
    params, (query, key, value) = make_params(), make_tokens()
    attend = partial(jax.eval_shape, reference.multi_head_attention, params)
    with pytest.raises(ValueError, match=r"weigh: there must be one weight a value; got shapes \(3, 5, 7\) and"):
        attend(query, key, value[1:])
    with pytest.raises(ValueError, match="project: tokens and weight must agree in width"):
        attend(key, key, value)
    with pytest.raises(ValueError, match="merge_heads: there must be a row a head"):
        reference.merge_heads(np.ones((2, 5, 11)), params.out)


def test_annotations_are_checked_with_jaxtypings_import_hook():
    array = lambda *shape, dtype=np.float32: jax.ShapeDtypeStruct(shape, dtype)
    jax.eval_shape(reference.salience, array(3, 4), array(5, 4))
    with pytest.raises(jaxtyping.TypeCheckError):
        jax.eval_shape(reference.salience, array(3, 4), array(5, 3))
    jax.eval_shape(reference.weigh, array(3, 5), array(5, 2))
    with pytest.raises(jaxtyping.TypeCheckError):
        jax.eval_shape(reference.weigh, array(3, 5, dtype=np.int32), array(5, 2))
