"""Rotary positions: every scaling against its formula, exact far away, part of a head, wrong input in words."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnax.config import RopeScaling
from attnax.nn.rope import (
    RotaryEmbedding,
    rope_attention_factor,
    rope_cos_sin_from_positions,
    rope_cos_sin_table,
    rope_inv_freq,
)

SCALINGS = {
    "none": None,
    "linear": RopeScaling(kind="linear", factor=3.0),
    "ntk": RopeScaling(kind="ntk", factor=5.0),
    "yarn": RopeScaling(kind="yarn", factor=7.0, original_max_len=4099),
    "yarn, not truncated": RopeScaling(kind="yarn", factor=7.0, original_max_len=4099, truncate=False),
    "yarn, own betas": RopeScaling(kind="yarn", factor=2.5, original_max_len=1021, beta_fast=11.0, beta_slow=3.0),
    "yarn, own attention": RopeScaling(kind="yarn", factor=7.0, original_max_len=4099, attention_factor=1.3),
    "yarn, short": RopeScaling(kind="yarn", factor=2.0, original_max_len=5),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_max_len=8191),
    "llama3, own bounds": RopeScaling(
        kind="llama3", factor=3.0, original_max_len=1021, low_freq_factor=2.0, high_freq_factor=17.0
    ),
}
each_scaling = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
# A scaling is other numbers in one and the same program: `make test` compiles it for three, together.
some_scalings = pytest.mark.parametrize(
    "names",
    [("none", "yarn", "llama3"), pytest.param(tuple(SCALINGS), marks=pytest.mark.thorough)],
    ids=["some", "all"],
)


def normal(seed, *shape):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def llama3(frequency, scaling):
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_len / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_len / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = scaling.original_max_len / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def yarn(frequency, i, head_dim, base, scaling):
    def index(num_turns):
        wavelength = scaling.original_max_len / num_turns
        return head_dim / 2 * math.log(wavelength / (2 * math.pi), base)

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (i - low) / (high - low if high != low else 0.001)
    ramp = min(max(ramp, 0.0), 1.0)
    return ramp * frequency / scaling.factor + (1 - ramp) * frequency


def expected_frequencies(head_dim, base, scaling):
    """One frequency after the other, by wavelength, as the papers have them."""
    kind = "none" if scaling is None else scaling.kind
    if kind == "ntk":
        base = base * scaling.factor ** (head_dim / (head_dim - 2))
    change = {
        "none": lambda i, frequency: frequency,
        "linear": lambda i, frequency: frequency / scaling.factor,
        "ntk": lambda i, frequency: frequency,
        "yarn": lambda i, frequency: yarn(frequency, i, head_dim, base, scaling),
        "llama3": lambda i, frequency: llama3(frequency, scaling),
    }[kind]
    return np.array([change(i, 1.0 / base ** (2 * i / head_dim)) for i in range(head_dim // 2)])


def expected_cos_sin(position, head_dim, base, scaling):
    angles = np.float64(position) * expected_frequencies(head_dim, base, scaling)
    factor = 1.0
    if scaling is not None and scaling.kind == "yarn":
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return factor * np.cos(angles), factor * np.sin(angles)


@each_scaling
@pytest.mark.parametrize(("head_dim", "base"), [(26, 10007.0), (134, 500000.0)])
def test_frequencies_are_the_formula(scaling, head_dim, base):
    frequencies = rope_inv_freq(head_dim, base, scaling=scaling)
    assert frequencies.dtype == np.float64
    np.testing.assert_allclose(frequencies, expected_frequencies(head_dim, base, scaling), rtol=1e-12)


class TestValuesByHand:
    def test_linear_divides_every_frequency(self):
        scaling = RopeScaling(kind="linear", factor=4.0)
        np.testing.assert_allclose(rope_inv_freq(4, 100.0, scaling=scaling), [1 / 4, 1 / 40], rtol=1e-15)

    def test_linear_at_a_position_times_the_factor_is_unscaled_at_the_position(self):
        scaled = rope_cos_sin_table(31, 22, 10007.0, scaling=SCALINGS["linear"])
        for one, other in zip(scaled, rope_cos_sin_table(11, 22, 10007.0), strict=True):
            np.testing.assert_allclose(np.asarray(one)[::3], other, atol=1e-7)

    def test_ntk_keeps_the_first_frequency_and_divides_the_last(self):
        scaled, plain = rope_inv_freq(22, 10007.0, scaling=SCALINGS["ntk"]), rope_inv_freq(22, 10007.0)
        assert scaled[0] == plain[0] == 1.0
        np.testing.assert_allclose(scaled[-1], plain[-1] / 5, rtol=1e-12)
        # head_dim 4, base 100, factor 3: the base becomes 100 * 3 ** 2, its root is 30.
        np.testing.assert_allclose(
            rope_inv_freq(4, 100.0, scaling=RopeScaling(kind="ntk", factor=3.0)), [1, 1 / 30], rtol=1e-14
        )

    def test_llama_3_1_keeps_short_wavelengths_and_divides_long_ones(self):
        scaling = RopeScaling(kind="llama3", factor=8.0, original_max_len=8192)
        scaled, plain = rope_inv_freq(128, 500000.0, scaling=scaling), rope_inv_freq(128, 500000.0)
        wavelengths = 2 * np.pi / plain
        short, long = wavelengths < 2048, wavelengths > 8192
        assert (short.sum(), long.sum()) == (29, 29)
        np.testing.assert_array_equal(scaled[short], plain[short])
        np.testing.assert_array_equal(scaled[long], plain[long] / 8)
        between = scaled[~short & ~long]
        assert (between < plain[~short & ~long]).all() and (between > plain[~short & ~long] / 8).all()

    def test_yarn_between_whole_bounds(self):
        # head_dim 8, base 16: wavelength i is 2 pi * 2 ** i, which turns 2 ** (4 - i) times within 32 pi = 100.5.
        scaling = RopeScaling(kind="yarn", factor=10.0, original_max_len=101, beta_fast=16.0, beta_slow=2.1)
        # The bounds are 0.007 and 2.94, rounded outwards to 0 and 3: a third of the way down with each i.
        np.testing.assert_allclose(rope_inv_freq(8, 16.0, scaling=scaling), [1, 0.7 / 2, 0.4 / 4, 0.1 / 8], rtol=1e-14)

    def test_yarn_with_factor_1_changes_nothing(self):
        scaling = RopeScaling(kind="yarn", factor=1.0, original_max_len=1021)
        np.testing.assert_allclose(rope_inv_freq(26, 10007.0, scaling=scaling), rope_inv_freq(26, 10007.0), rtol=1e-15)
        assert rope_attention_factor(scaling) == 1.0

    def test_only_yarn_has_an_attention_factor(self):
        factors = {name: rope_attention_factor(scaling) for name, scaling in SCALINGS.items()}
        assert factors.pop("yarn") == factors.pop("yarn, not truncated") == pytest.approx(1.1945910149055313)
        assert factors.pop("yarn, own betas") == pytest.approx(0.1 * math.log(2.5) + 1)
        assert factors.pop("yarn, short") == pytest.approx(0.1 * math.log(2) + 1)
        assert factors.pop("yarn, own attention") == 1.3
        assert set(factors.values()) == {1.0}
        given = RopeScaling(kind="linear", factor=2.0, attention_factor=1.7)
        assert rope_attention_factor(given) == 1.0


def test_any_position_is_exact_to_1e_6():
    positions = np.array([0, 1, 251, 257, 65537, 131071, 131072, 2**31 - 1], np.int32)

    @jax.jit
    def look_up(positions):
        return {
            name: rope_cos_sin_from_positions(positions, 26, 10007.0, scaling=scaling)
            for name, scaling in SCALINGS.items()
        }

    for name, looked_up in look_up(positions).items():
        expected = expected_cos_sin(positions[:, None], 26, 10007.0, SCALINGS[name])
        for one, other in zip(looked_up, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6, err_msg=name)


@each_scaling
def test_table_is_exact_to_1e_6(scaling):
    table = rope_cos_sin_table(131101, 6, 10007.0, scaling=scaling)
    rows = slice(131072, None)
    expected = expected_cos_sin(np.arange(131101)[rows, None], 6, 10007.0, scaling)
    for one, other in zip(table, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one)[rows], other, rtol=0, atol=1e-6)


# One shape for the tests of the layer, so that they share compiled programs.
POSITIONS = np.array([[7, 0, 1009, 3, 50021], [2, 131071, 1, 0, 17]], np.int32)


def heads(seed, head_dim=11):
    return normal(seed, 2, 3, 5, head_dim)


@some_scalings
def test_rotation_is_the_product_of_complex_numbers(names):
    x = heads(1)
    rotaries = {name: RotaryEmbedding(11, base=10007.0, fraction=0.75, scaling=SCALINGS[name]) for name in names}
    rotated = jax.jit(lambda x: {name: rotary(x, POSITIONS) for name, rotary in rotaries.items()})(x)
    x = np.asarray(x)
    for name, turned in rotated.items():
        cos, sin = expected_cos_sin(POSITIONS[:, None, :, None], 8, 10007.0, SCALINGS[name])
        pairs = (x[..., :4] + 1j * x[..., 4:8]) * (cos + 1j * sin)
        expected = np.concatenate([pairs.real, pairs.imag, x[..., 8:]], axis=-1)
        np.testing.assert_allclose(turned, expected, atol=5e-6, err_msg=name)


@some_scalings
def test_default_concrete_and_traced_positions_agree(names):
    rotaries = {name: RotaryEmbedding(11, base=10007.0, fraction=0.75, scaling=SCALINGS[name]) for name in names}
    x, positions = heads(1), np.arange(5, dtype=np.int32)

    @jax.jit
    def run(x, traced):
        return {
            name: {
                "default": rotary(x),
                "concrete": rotary(x, positions),
                "each row its own": rotary(x, np.stack([positions] * 2)),
                "traced": rotary(x, traced),
            }
            for name, rotary in rotaries.items()
        }

    found = run(x, positions)
    found["yarn"]["not compiled"] = rotaries["yarn"](x)
    found["yarn"]["not compiled, concrete"] = rotaries["yarn"](x, positions)
    for name in names:
        expected = found[name].pop("default")
        for form, turned in found[name].items():
            np.testing.assert_allclose(turned, expected, atol=2e-6, err_msg=f"{name}, {form}")


@pytest.mark.parametrize(
    ("names", "dtypes"),
    [
        (("yarn",), (jnp.float32, jnp.bfloat16)),
        pytest.param(("none", "llama3"), (jnp.float32, jnp.bfloat16), marks=pytest.mark.thorough),
    ],
)
def test_fraction_turns_the_first_features_and_passes_the_rest(names, dtypes):
    sizes = {(8, 1.0): 8, (11, 0.75): 8, (11, 0.2): 2}
    cases = [(*size, name, dtype) for size in sizes for name in names for dtype in dtypes]
    arrays = {width: np.asarray(heads(1, width)) for width in (8, 11)}

    @jax.jit
    def run():
        results = []
        for head_dim, fraction, name, dtype in cases:
            x, rotated = arrays[head_dim].astype(dtype), sizes[head_dim, fraction]
            rotary, alone = (
                RotaryEmbedding(head_dim, fraction=fraction, scaling=SCALINGS[name]),
                RotaryEmbedding(rotated, scaling=SCALINGS[name]),
            )
            assert rotary.rotated_dim == rotated
            results.append((rotary(jnp.asarray(x), POSITIONS), alone(jnp.asarray(x[..., :rotated]), POSITIONS)))
        return results

    for case, (turned, alone) in zip(cases, run(), strict=True):
        head_dim, fraction, _, dtype = case
        rotated, turned = sizes[head_dim, fraction], np.asarray(turned)
        assert turned.dtype == dtype
        x = arrays[head_dim].astype(dtype)
        np.testing.assert_array_equal(turned[..., rotated:], x[..., rotated:], err_msg=str(case))
        np.testing.assert_array_equal(turned[..., :rotated], alone, err_msg=str(case))


@some_scalings
def test_products_depend_on_the_distance_only(names):
    rotaries = {name: RotaryEmbedding(11, fraction=0.75, scaling=SCALINGS[name]) for name in names}
    query, key = heads(1), heads(2)

    @jax.jit
    def rotate(start, distance):
        at = lambda position: jnp.full(5, position, jnp.int32)
        return {
            name: (rotary(query, at(start + distance)), rotary(key, at(start))) for name, rotary in rotaries.items()
        }

    def products(start, distance):
        return {
            name: np.einsum("BNTH,BNTH->BNT", *map(np.asarray, pair)) for name, pair in rotate(start, distance).items()
        }

    expected = products(0, 3)
    for start in (101, 131071):
        for name, product in products(start, 3).items():
            np.testing.assert_allclose(product, expected[name], atol=2e-5, err_msg=name)
    for name, product in products(0, 5).items():
        assert np.abs(product - expected[name]).max() > 1e-2, name


def test_equal_settings_are_equal_and_hash_alike():
    settings = {"max_positions": 17, "base": 101.0, "fraction": 0.75, "scaling": SCALINGS["yarn"]}
    rotary = RotaryEmbedding(8, **settings)
    same = RotaryEmbedding(8, **{**settings, "scaling": RopeScaling(kind="yarn", factor=7.0, original_max_len=4099)})
    assert rotary == same and hash(rotary) == hash(same)
    changes = {"max_positions": 19, "base": 103.0, "fraction": 0.5, "scaling": None, "dtype": jnp.bfloat16}
    for name, value in changes.items():
        other = RotaryEmbedding(8, **{**settings, name: value})
        assert rotary != other and hash(rotary) != hash(other), name
    assert rotary != RotaryEmbedding(16, **settings)


def test_same_settings_compile_once(count_compilations):
    turn = jax.jit(lambda rotary, x: rotary(x), static_argnums=0)
    x = normal(1, 1, 2, 3, 7)
    turn(RotaryEmbedding(7, fraction=0.6, scaling=SCALINGS["llama3"]), x)
    before = len(count_compilations)
    turn(RotaryEmbedding(7, fraction=0.6, scaling=SCALINGS["llama3"]), x)
    assert len(count_compilations) == before


class TestErrorsInWords:
    @pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, math.nan])
    def test_fraction_out_of_range(self, fraction):
        with pytest.raises(ValueError, match=f"fraction must be above 0 and at most 1; got fraction={fraction}"):
            RotaryEmbedding(8, fraction=fraction)

    @pytest.mark.parametrize(("head_dim", "fraction"), [(7, 1.0), (10, 0.5), (8, 0.1)])
    def test_odd_rotated_width(self, head_dim, fraction):
        words = (
            rf"int\(head_dim \* fraction\) must be even and at least 2; got head_dim={head_dim}, fraction={fraction}"
        )
        with pytest.raises(ValueError, match=words):
            RotaryEmbedding(head_dim, fraction=fraction)

    def test_odd_head_dim(self):
        with pytest.raises(ValueError, match="head_dim must be even and at least 2; got head_dim=5"):
            rope_inv_freq(5, scaling=SCALINGS["yarn"])

    def test_ntk_with_one_frequency(self):
        with pytest.raises(ValueError, match="ntk must have a second frequency to lower; got head_dim=2. Use linear"):
            RotaryEmbedding(4, fraction=0.5, scaling=SCALINGS["ntk"])

    @pytest.mark.usefixtures("unchecked_shapes")
    @pytest.mark.parametrize(
        ("shape", "positions", "words"),
        [
            ((1, 2, 3, 10), None, r"x must be of shape \(batch, heads, length, 8\); got x.shape=\(1, 2, 3, 10\)"),
            ((2, 3, 8), None, r"x must be of shape \(batch, heads, length, 8\); got x.shape=\(2, 3, 8\)"),
            ((1, 1, 2, 3, 8), None, r"x must be .*; got x.shape=\(1, 1, 2, 3, 8\)"),
            ((2, 2, 3, 8), np.zeros((2, 1, 3), int), r"position_ids must be integers of shape \(3,\) or \(1, 3\) or"),
            ((2, 2, 3, 8), np.zeros(4, int), r"position_ids must be .*; got position_ids.shape=\(4,\)"),
            ((2, 2, 3, 8), np.zeros(3), "position_ids must be integers .*, dtype=float"),
        ],
    )
    def test_other_shapes(self, shape, positions, words):
        with pytest.raises(ValueError, match=f"RotaryEmbedding: {words}"):
            RotaryEmbedding(8, fraction=0.5)(np.zeros(shape, np.float32), positions)

    def test_positions_past_the_last(self):
        rotary = RotaryEmbedding(8, 11, fraction=0.5, scaling=SCALINGS["linear"])
        with pytest.raises(ValueError, match="positions must be below 11; got position 11"):
            rotary(normal(1, 1, 1, 1, 8), jnp.array([11]))
        with pytest.raises(ValueError, match="positions must be below 11; got a sequence of 13"):
            rotary(normal(1, 1, 1, 13, 8))


@pytest.mark.parametrize("given", [False, True], ids=["in order", "given"])
def test_float64_is_turned_in_float64_and_float32_is_not(given):
    with jax.enable_x64(True):
        x = jax.device_put(np.random.default_rng(0).normal(size=(1, 1, 5, 6)))
        positions = np.array([0, 1, 255, 256, 4099]) if given else np.arange(5)
        rotary = RotaryEmbedding(6)
        turn = jax.jit(lambda x, positions: rotary(x, positions if given else None))
        angles = positions[:, None] * rope_inv_freq(6)
        first, second = np.split(np.asarray(x), 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        expected = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        turned = turn(x, positions)
        assert turned.dtype == jnp.float64
        np.testing.assert_allclose(turned, expected, atol=1e-12)
        assert turn(x.astype(jnp.float32), positions).dtype == jnp.float32
