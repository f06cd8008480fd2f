"""Score mods: each is its formula, alone, in every kernel and under differentiation; mods that are masks stay masks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from attnax import masks, memory_efficient_attention, standard_attention
from attnax.kernels.score_mods import (
    additive_bias_mod,
    alibi_mod,
    alibi_slopes,
    causal_mod,
    compose_score_mods,
    document_mask_mod,
    mask_mod_to_boolean_mask,
    mask_mod_to_score_mod,
    prefix_lm_mod,
    relative_bias_mod,
    relative_bucket,
    relative_table_mod,
    sliding_window_mod,
    soft_cap_mod,
)

BATCH, HEADS, KV_HEADS, LENGTH = 2, 6, 2, 13
FULL = BATCH, HEADS, LENGTH, LENGTH
tiles_of_4 = functools.partial(memory_efficient_attention, block_size=4)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


QUERY, KEY = normal(0, BATCH, HEADS, LENGTH, 5), normal(1, BATCH, KV_HEADS, LENGTH, 5)
VALUE, COTANGENT = normal(2, BATCH, KV_HEADS, LENGTH, 7), normal(3, BATCH, HEADS, LENGTH, 7)
BIAS, ROW_BIAS = normal(4, BATCH, HEADS, LENGTH, LENGTH), normal(5, HEADS, 1, LENGTH)
BUCKETS, DISTANCES = normal(6, 8, HEADS), normal(7, HEADS, 7)
PREFIXES, IDS = np.array([5, 2]), np.array([[0] * 5 + [1] * 8, [3, 1, 3, 1, 1, 1, 2, 2, 3, 0, 0, 0, 1]])
SLOPES = np.array([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def t5_bucket(distance, num_buckets, max_distance, bidirectional):
    """The formula as published in T5's code, in its float32."""
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = np.where(distance > 0, num_buckets, 0)
        distance = abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    exact = num_buckets // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    grown = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)).astype(int)
    return offset + np.where(distance < exact, distance, np.minimum(grown, num_buckets - 1))


def forbid(allowed):
    return lambda s, b, h, q, kv: np.where(allowed(b, h, q, kv), s, -np.inf)


# Name: (mod, the same in NumPy).
CHANGING = {
    "alibi": (alibi_mod(HEADS), lambda s, b, h, q, kv: s - SLOPES[h] * abs(q - kv)),
    "bias": (additive_bias_mod(BIAS), lambda s, b, h, q, kv: s + BIAS[b, h, q, kv]),
    "bias of heads and keys": (additive_bias_mod(ROW_BIAS), lambda s, b, h, q, kv: s + ROW_BIAS[h, 0, kv]),
    "soft cap": (soft_cap_mod(1.5), lambda s, b, h, q, kv: 1.5 * np.tanh(s / 1.5)),
    "T5": (
        relative_bias_mod(BUCKETS, max_distance=11),
        lambda s, b, h, q, kv: s + BUCKETS[t5_bucket(kv - q, 8, 11, True), h],
    ),
    "T5 decoder": (
        relative_bias_mod(BUCKETS, max_distance=11, bidirectional=False),
        lambda s, b, h, q, kv: s + BUCKETS[t5_bucket(kv - q, 8, 11, False), h],
    ),
    "table": (
        relative_table_mod(DISTANCES),
        lambda s, b, h, q, kv: s + DISTANCES[h, np.clip(q - kv, -3, 3) + 3],
    ),
    "cap, ALiBi and window": (
        compose_score_mods(soft_cap_mod(1.5), alibi_mod(HEADS), sliding_window_mod(5)),
        lambda s, b, h, q, kv: np.where(
            (q - kv >= 0) & (q - kv < 5), 1.5 * np.tanh(s / 1.5) - SLOPES[h] * abs(q - kv), -np.inf
        ),
    ),
}

# Name: (mod, the mask that it is, the same in NumPy).
MASKING = {
    "causal": (causal_mod, masks.causal, lambda b, h, q, kv: kv <= q),
    "window": (
        lambda: sliding_window_mod(5),
        lambda: masks.sliding_window(5),
        lambda b, h, q, kv: (kv <= q) & (q < kv + 5),
    ),
    "window of both sides": (
        lambda: sliding_window_mod(3, causal=False),
        lambda: masks.sliding_window(3, causal=False),
        lambda b, h, q, kv: abs(q - kv) < 3,
    ),
    "prefix": (
        lambda: prefix_lm_mod(PREFIXES),
        lambda: masks.prefix(PREFIXES),
        lambda b, h, q, kv: (kv <= q) | (kv < PREFIXES[b]),
    ),
    "documents": (
        lambda: document_mask_mod(IDS),
        lambda: masks.documents(IDS),
        lambda b, h, q, kv: IDS[b, q] == IDS[b, kv],
    ),
    "function": (
        lambda: mask_mod_to_score_mod(lambda b, h, q, kv: (q + kv + h) % 3 > 0),
        lambda: lambda b, h, q, kv: (q + kv + h) % 3 > 0,
        lambda b, h, q, kv: (q + kv + h) % 3 > 0,
    ),
    "array": (lambda: mask_mod_to_score_mod(BIAS > 0), lambda: BIAS > 0, lambda b, h, q, kv: BIAS[b, h, q, kv] > 0),
}
ALL = CHANGING | {name: (make(), forbid(allowed)) for name, (make, _, allowed) in MASKING.items()}


GRADIENTS_IN_MAKE_TEST = ("T5 decoder", "cap, ALiBi and window")


@functools.cache
def value_and_gradients(kernel, name):
    """(out, gradients of query, key, value and the mod's floating leaves) of the mod of that name."""

    def loss(query, key, value, mod):
        out = kernel(query, key, value, score_mod=mod)
        return (out * COTANGENT).sum(), out

    run = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True, allow_int=True))
    gradients, out = run(QUERY, KEY, VALUE, CHANGING[name][0])
    return out, [np.asarray(x) for x in jax.tree.leaves(gradients) if jnp.issubdtype(x.dtype, jnp.floating)]


@functools.cache
def every_result():
    """The result of each mod for scores, from one program."""
    run = lambda scores: {name: mod(scores, *masks.index_grid(*FULL)) for name, (mod, _) in ALL.items()}
    return jax.jit(run)(normal(8, *FULL))


@pytest.mark.parametrize("name", ALL)
def test_a_mod_is_its_formula(name):
    expected = ALL[name][1](normal(8, *FULL), *np.indices(FULL))
    np.testing.assert_allclose(every_result()[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        pytest.param(
            kernel,
            name,
            id=f"{name}-{kernel_name}",
            marks=[pytest.mark.thorough]
            if kernel is standard_attention
            else []
            if name in (*GRADIENTS_IN_MAKE_TEST, "prefix")
            else [pytest.mark.contract],
        )
        for kernel_name, kernel in (("standard", standard_attention), ("tiles of 4", tiles_of_4))
        for name in ALL
    ],
)
def test_attention_with_a_mod_is_attention_with_its_formula(kernel, name):
    mod, formula = ALL[name]
    expected, _ = oracle.attention(QUERY, KEY, VALUE, score_mod=formula)
    if name in CHANGING:
        out = value_and_gradients(kernel, name)[0]
    else:
        out = jax.jit(functools.partial(kernel, score_mod=mod))(QUERY, KEY, VALUE)
    assert oracle.rms_error(out, expected) < 1e-6


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in GRADIENTS_IN_MAKE_TEST else pytest.mark.contract) for name in CHANGING],
)
def test_gradients_in_tiles_are_those_of_the_definition(name):
    actual, expected = (value_and_gradients(kernel, name)[1] for kernel in (tiles_of_4, standard_attention))
    assert len(actual) == len(expected) > 3
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert np.abs(y).max() > 0.01
        assert oracle.rms_error(x, y) < (2e-6 if i < 3 else 1e-5)  # gradients of the mod are sums over all pairs


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("prefix", "function") else pytest.mark.contract) for name in MASKING],
)
def test_a_mask_as_score_mod_is_the_same_program_as_a_mask(name, count_compilations):
    make_mod, make_mask, allowed = MASKING[name]
    expected = np.asarray(tiles_of_4(QUERY, KEY, VALUE, mask=make_mask()))
    exact, _ = oracle.attention(QUERY, KEY, VALUE, keep=allowed(*np.indices(FULL)))
    assert oracle.rms_error(expected, exact) < 1e-6
    del count_compilations[:]
    have = tiles_of_4(QUERY, KEY, VALUE, score_mod=make_mod())
    assert not count_compilations
    np.testing.assert_array_equal(have, expected)


def test_a_mask_of_pairs_is_the_array_of_allowed_pairs():
    sizes = {"batch": BATCH, "num_heads": HEADS, "seq_q": LENGTH, "seq_kv": LENGTH}
    run = lambda: {name: mask_mod_to_boolean_mask(make(), **sizes) for name, (_, make, _) in MASKING.items()}
    for name, dense in jax.jit(run)().items():
        np.testing.assert_array_equal(dense, np.broadcast_to(MASKING[name][2](*np.indices(FULL)), FULL), err_msg=name)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 12, 16])
def test_alibi_slopes_are_the_papers(num_heads):
    def of_power_of_two(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    lower = 2 ** math.floor(math.log2(num_heads))
    expected = of_power_of_two(lower) + of_power_of_two(2 * lower)[0::2][: num_heads - lower]
    slopes = alibi_slopes(num_heads)
    assert slopes.dtype == jnp.float32
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (32, 20), (64, 1000), (128, 128), (16, 64), (17, 53), (5, 7), (4, 11)]
)
def test_relative_buckets_are_those_of_t5(num_buckets, max_distance, bidirectional):
    distance = np.arange(-1503, 1504)
    if bidirectional and max_distance <= num_buckets // 4:
        with pytest.raises(ValueError, match="max_distance"):
            relative_bucket(distance, num_buckets=num_buckets, max_distance=max_distance, bidirectional=True)
        return
    actual = relative_bucket(distance, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional)
    np.testing.assert_array_equal(actual, t5_bucket(distance, num_buckets, max_distance, bidirectional))


def test_buckets_may_be_denser_than_distances():
    # 8 growing buckets between 8 and 11: some contain no whole distance and stay empty.
    distance = np.arange(-31, 1)
    actual = relative_bucket(distance, num_buckets=16, max_distance=11, bidirectional=False)
    np.testing.assert_array_equal(actual, t5_bucket(distance, 16, 11, False))


def test_a_single_mod_composed_is_itself():
    for mod in (lambda s, b, h, q, kv: s, causal_mod(), compose_score_mods(soft_cap_mod(3.0), causal_mod())):
        assert compose_score_mods(None, mod) is mod
        assert compose_score_mods(mod, None) is mod


def test_composed_mods_apply_in_order_and_skip_none():
    add, double = lambda s, b, h, q, kv: s + 1.0, lambda s, b, h, q, kv: s * 2.0
    assert compose_score_mods() is compose_score_mods(None, None) is None
    assert compose_score_mods(None, add) is add
    mods = {
        4.0: compose_score_mods(add, double),
        3.0: compose_score_mods(double, None, add),
        7.0: compose_score_mods(compose_score_mods(add, add), compose_score_mods(double, add)),
    }
    results = jax.jit(lambda scores: {value: mod(scores, 0, 0, 0, 0) for value, mod in mods.items()})(np.float32(1.0))
    assert all(result == value for value, result in results.items())


CAUSAL = np.tri(LENGTH, dtype=bool)


@pytest.mark.parametrize("place", [0, 1, pytest.param(2, marks=pytest.mark.contract)])
@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(standard_attention, id="standard"),
        pytest.param(tiles_of_4, id="tiles of 4", marks=pytest.mark.contract),
    ],
)
def test_no_mod_unmasks_what_a_mask_forbids(place, kernel):
    parts = [lambda s, b, h, q, kv: 0.0 * q + jnp.zeros_like(s), alibi_mod(HEADS)]
    parts.insert(place, causal_mod())
    distances = lambda s, b, h, q, kv: -SLOPES[h] * abs(q - kv)
    expected, _ = oracle.attention(QUERY, KEY, VALUE, keep=CAUSAL, score_mod=distances)
    run = functools.partial(kernel, score_mod=compose_score_mods(*parts))
    np.testing.assert_allclose(jax.jit(run)(QUERY, KEY, VALUE), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "masked", [-np.inf, pytest.param(np.finfo(np.float32).min, marks=pytest.mark.contract)], ids=["-inf", "lowest"]
)
def test_a_soft_cap_does_not_unmask_what_a_plain_function_forbids(masked):
    plain = lambda s, b, h, q, kv: jnp.where(kv <= q, s, masked)
    actual = tiles_of_4(QUERY, KEY, VALUE, score_mod=compose_score_mods(plain, soft_cap_mod(1.5)))
    capped = lambda s, b, h, q, kv: 1.5 * np.tanh(s / 1.5)
    expected, _ = oracle.attention(QUERY, KEY, VALUE, keep=CAUSAL, score_mod=capped)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_masks_within_composed_mods_are_found():
    mod = compose_score_mods(compose_score_mods(causal_mod(), alibi_mod(HEADS)), sliding_window_mod(3, causal=False))
    mask, rest = masks.resolve_masks("test", masks.padding(np.array([13, 7])), mod, FULL)
    assert jax.tree.structure(rest) == jax.tree.structure(alibi_mod(HEADS))
    tiles = [(0, (4, 4), (5, 12)), (0, (9, 12), (0, 6)), (1, (7, 7), (7, 7)), (1, (6, 6), (5, 6))]
    bounds = jax.jit(lambda: [mask.tile(b, 0, q, kv) for b, q, kv in tiles])()
    assert [[bool(x) for x in both] for both in bounds] == [
        [False, False],
        [False, False],
        [False, False],
        [True, True],
    ]


def test_mods_without_arrays_are_equal_when_rebuilt():
    for make in (
        causal_mod,
        lambda: sliding_window_mod(8),
        lambda: sliding_window_mod(8, causal=False),
        lambda: soft_cap_mod(50.0),
        lambda: compose_score_mods(soft_cap_mod(2), sliding_window_mod(3)),
    ):
        assert make() == make() and hash(make()) == hash(make())
    assert sliding_window_mod(8) != sliding_window_mod(9) != soft_cap_mod(9)


REBUILT = {
    "window": lambda: sliding_window_mod(8),
    "ALiBi": lambda: alibi_mod(HEADS),
    "composed": lambda: compose_score_mods(relative_table_mod(DISTANCES), prefix_lm_mod(PREFIXES), soft_cap_mod(30.0)),
    "function": lambda: compose_score_mods(lambda s, b, h, q, kv: s * DEVICE_SLOPES[h], causal_mod()),
}
DEVICE_SLOPES = alibi_slopes(HEADS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "composed" else pytest.mark.contract) for name in REBUILT]
)
def test_rebuilt_mods_compile_nothing_new(name, count_compilations):
    def run(mod):
        return tiles_of_4(QUERY, KEY, VALUE, score_mod=mod)

    # Outside of jit, and as its argument, which a plain function cannot be.
    for call in (run, jax.jit(run)) if name != "function" else (run,):
        expected = call(REBUILT[name]())
        del count_compilations[:]
        np.testing.assert_array_equal(call(REBUILT[name]()), expected)
        assert not count_compilations


def test_windows_and_caps_may_be_traced(count_compilations):
    def loss(cap, window, kernel):
        mod = compose_score_mods(soft_cap_mod(cap), sliding_window_mod(window))
        return (kernel(QUERY, KEY, VALUE, score_mod=mod) * COTANGENT).sum()

    run = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    for cap, window in [(1.5, 5), (0.7, 2)]:
        actual = [np.asarray(x) for x in run(cap, window, tiles_of_4)]
        assert not (window == 2 and count_compilations)
        np.testing.assert_allclose(actual, run(cap, window, standard_attention), rtol=2e-5)
        del count_compilations[:]


AT = np.array([[4, 5, 6], [9, 11, 12]]), np.array([0, 1, 12, 3, 4, 6, 5])


@functools.cache
def every_result_at_positions():
    def run(scores):
        grid = masks.index_grid(*scores.shape)
        return {name: masks.at_positions(mod, *AT)(scores, *grid) for name, (mod, _) in CHANGING.items()}

    return jax.jit(run)(normal(9, BATCH, HEADS, 3, 7))


@pytest.mark.parametrize("name", CHANGING)
def test_a_mod_at_positions_is_its_part_of_the_whole(name):
    scores = normal(9, BATCH, HEADS, 3, 7)
    queries, keys = AT
    b, h, q, kv = np.indices(scores.shape)
    expected = CHANGING[name][1](scores, b, h, queries[b, q], keys[kv])
    np.testing.assert_allclose(every_result_at_positions()[name], expected, rtol=1e-6, atol=1e-6)


def test_a_bias_past_its_end_is_nan_and_not_another_bias():
    mod = masks.at_positions(additive_bias_mod(BIAS), np.array([12, 13]), np.array([12, 13, 14]))
    run = jax.jit(lambda scores: mod(scores, *masks.index_grid(BATCH, HEADS, 2, 3)))
    scores = np.asarray(run(np.zeros((BATCH, HEADS, 2, 3), np.float32)))
    np.testing.assert_array_equal(scores[:, :, 0, 0], BIAS[:, :, 12, 12])
    assert np.isnan(scores).sum() == 5 * BATCH * HEADS


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: alibi_mod(0), "alibi_mod: num_heads must be at least 1; got num_heads=0"),
        (lambda: alibi_slopes(-3), "alibi_slopes: num_heads must be at least 1; got num_heads=-3"),
        (lambda: additive_bias_mod(BIAS[None]), r"got bias.shape=\(1, 2, 6, 13, 13\), dtype=float32"),
        (lambda: additive_bias_mod(BIAS > 0), "bias must be floating .* dtype=bool. Pass a boolean array as a mask"),
        (lambda: soft_cap_mod(0.0), "soft_cap_mod: cap must be one number above 0; got cap=0.0"),
        (lambda: soft_cap_mod(-1), "got cap=-1"),
        (lambda: soft_cap_mod(math.nan), "got cap=nan"),
        (lambda: soft_cap_mod(np.ones(2)), "cap must be one number"),
        (lambda: relative_bucket(3, num_buckets=3), "num_buckets must be at least 4 with bidirectional=True"),
        (lambda: relative_bucket(3, max_distance=8), "max_distance must be above the 8 distances"),
        (lambda: relative_bias_mod(BUCKETS[0]), r"relative_bias_mod: table must be .*\(num_buckets, num_heads\)"),
        (lambda: relative_bias_mod(BUCKETS, max_distance=2), "relative_bias_mod: max_distance must be above the 2"),
        (lambda: relative_table_mod(BUCKETS), r"odd number of distances.*got table.shape=\(8, 6\)"),
        (lambda: relative_table_mod(IDS), "table must be floating, of shape .*dtype=int"),
        (lambda: sliding_window_mod(0), "window_size must be a whole number, at least 1; got window_size=0"),
        (lambda: document_mask_mod(BIAS[0, 0]), "ids must be integers"),
        (lambda: mask_mod_to_score_mod(BIAS), "must be boolean"),
        (
            lambda: compose_score_mods(lambda s, *_: s[:, :1], lambda s, *_: s + 1.0)(jnp.zeros((4, 5)), 0, 0, 0, 0),
            r"must return scores of the shape that it is given; got \(4, 1\) for \(4, 5\)",
        ),
        (
            lambda: mask_mod_to_boolean_mask(BIAS > 0, batch=2, num_heads=6, seq_q=13, seq_kv=12),
            r"mask_mod_to_boolean_mask: mask must broadcast to .*=\(2, 6, 13, 12\); got mask.shape=\(2, 6, 13, 13\)",
        ),
    ],
)
def test_wrong_input_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


AT_POSITIONS = functools.partial(masks.at_positions, q_positions=np.arange(13), kv_positions=np.arange(13))


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(standard_attention, marks=pytest.mark.contract, id="standard"),
        pytest.param(tiles_of_4, id="tiles of 4"),
    ],
)
@pytest.mark.parametrize(
    ("mod", "words"),
    [
        (alibi_mod(4), r"alibi_mod must be made for the query's 6 heads; got slopes.shape=\(4,\)"),
        (relative_bias_mod(BUCKETS.T), r"relative_bias_mod must be .* 6 heads; got table.shape=\(6, 8\)"),
        (relative_table_mod(DISTANCES[:5]), r"relative_table_mod must be .* 6 heads; got table.shape=\(5, 7\)"),
        (additive_bias_mod(BIAS[..., :7]), r"bias must broadcast to .*=\(2, 6, 13, 13\); got .*\(2, 6, 13, 7\)"),
        (compose_score_mods(soft_cap_mod(3), alibi_mod(4), causal_mod()), "alibi_mod must be made for"),
        (AT_POSITIONS(alibi_mod(4)), "alibi_mod must be made for"),
        (
            AT_POSITIONS(compose_score_mods(additive_bias_mod(BIAS[:, :3]), soft_cap_mod(3))),
            r"bias must broadcast to .*=\(2, 6, any, any\)",
        ),
        (masks.at_positions(soft_cap_mod(3), np.arange(12), np.arange(13)), r"q_positions must be .*\(13,\)"),
        (document_mask_mod(IDS[:, :12]), "documents need one id a token"),
        (prefix_lm_mod(np.arange(3)), "needs one length a batch row"),
    ],
)
def test_mods_that_do_not_fit_are_refused_before_any_compute(kernel, mod, words):
    with pytest.raises(ValueError, match=words):
        kernel(QUERY, KEY, VALUE, score_mod=mod)
