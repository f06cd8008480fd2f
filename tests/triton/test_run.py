"""The GPU kernels as lowered, run by the interpreter: no access is wrong, and results are those of the definition.

A program is what a GPU is given but where it is split by platform and where it calls a kernel.
"""

import dataclasses
import re
from functools import partial
from typing import NamedTuple

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from _lowered import kernels_of, parse
from cases import contract_unless

from attnax import (
    cached_attention,
    compose_score_mods,
    flash_attention,
    init_kv_layer_cache,
    masks,
    pallas_flash_attention,
    standard_attention,
    update_kv_layer_cache,
)
from attnax.kernels import _call, _decode_call, _engines, _ring, ring, score_mods
from attnax.kernels._core.dropout import dropout_words, keep_weights
from attnax.kernels._core.tile_grid import TileGrid
from attnax.kernels._gpu import decode, kernels, launch
from attnax.kernels.paged import paged_attention
from attnax.paged_cache import allocate_rows, append_rows, init_paged_kv_cache


class Card:
    """Stands for a GPU: lowers each kernel for one, and runs what came out."""

    def __init__(self):
        self.ran = []
        self.edit = None  # (name, text) -> text, what is done to a module before it runs
        self.fault = None

    def run(self, name, kernel, call, grid, inputs, shapes):
        """In place of `kernels.run`."""
        leaves, structure = jax.tree.flatten(inputs)

        def lower(*leaves):
            return kernels.run(name, kernel, call, grid, jax.tree.unflatten(structure, leaves), shapes)

        (lowered,) = kernels_of(lower, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))
        name = name.removeprefix("attnax_")
        module = parse(lowered)
        if self.edit is not None:
            module = parse(lowered._replace(bytecode=self.edit(name, str(module)).encode()))
        results, names = jax.tree.flatten({key: jax.ShapeDtypeStruct(*shape) for key, shape in shapes.items()})
        self.ran.append(name)

        def on_card(*arrays):
            try:
                return interpreter.run(name, module, lowered.grid, arrays, results)
            except interpreter.KernelError as fault:
                self.fault = fault  # JAX raises another error
                raise

        return jax.tree.unflatten(names, jax.pure_callback(on_card, results, *leaves, vmap_method="sequential"))

    def __call__(self, function, *given):
        """`function(*given)` on the card."""
        try:
            return jax.block_until_ready(jax.jit(function)(*given))
        except jax.errors.JaxRuntimeError:
            if self.fault is None:
                raise
            raise self.fault from None


@pytest.fixture
def card(monkeypatch):
    """The engines run their kernels on it."""
    card = Card()
    for module in (_engines, _decode_call):
        monkeypatch.setattr(module, "by_platform", lambda _, *arguments, **of: of["cuda"](*arguments))
    # Without their own jit, which would remember programs for the CPU.
    monkeypatch.setattr(_call, "_attention", _call._attention_of)
    monkeypatch.setattr(_decode_call, "_attend", _decode_call._attend.__wrapped__)
    monkeypatch.setattr(launch, "run", card.run)
    for module in (_engines, decode):
        monkeypatch.setattr(module, "why_no_card", lambda: None)
    return card


def normal(*shape, seed=9):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape, np.float32))


def arrays(seq_q, seq_kv, kv_heads=2, dtype=jnp.float32):
    """query, key, value of 2 rows and 6 heads, and the cotangents of out and lse."""
    shapes = (6, seq_q, 20), (kv_heads, seq_kv, 20), (kv_heads, seq_kv, 24), (6, seq_q, 24)
    return *(normal(2, *shape, seed=n).astype(dtype) for n, shape in enumerate(shapes)), normal(2, 6, seq_q)


def everything(attend, query, key, value, d_out, d_lse, *learned):
    """out, lse and all gradients."""
    (out, lse), pull = jax.vjp(partial(attend, return_lse=True), query, key, value, *learned)
    return out, lse, *pull((d_out, d_lse))


tiled = partial(pallas_flash_attention, block_q=16, block_kv=16)
T, S = 37, 53
IDS = np.arange(T) // 9, np.arange(S) // 9
MASK = masks.documents(*IDS)
STARTS = np.array([[3], [21]])
LEFT_PADDING = masks.padding(np.arange(S) >= STARTS)
DROPOUT = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.3, "deterministic": False}


def scattered(b, h, q, kv):
    return (q * 3 + kv * (h + 1) + b) % 7 < 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A call whose results the oracle knows."""

    keep: object = lambda b, h, q, kv: kv >= 0
    mask: object = None
    seq_q: int = T
    seq_kv: int = S
    kv_heads: int = 2
    dtype: object = jnp.float32
    dropout: bool = False


def causal(b, h, q, kv):
    return kv <= q


def padding(b, h, q, kv):
    return kv >= STARTS[b, 0]


CASES = {
    "whole tiles": Case(seq_q=32, seq_kv=48),
    "odd lengths": Case(),
    "shorter than a tile": Case(seq_q=5, seq_kv=11),
    "one query": Case(seq_q=1, seq_kv=19, kv_heads=1),
    "more queries than keys": Case(seq_q=53, seq_kv=21, kv_heads=6),
    "bfloat16": Case(dtype=jnp.bfloat16),
    "causal": Case(causal, masks.causal()),
    "causal, whole tiles, bfloat16": Case(causal, masks.causal(), 48, 48, dtype=jnp.bfloat16),
    "window": Case(lambda b, h, q, kv: (kv <= q) & (kv > q - 11), masks.sliding_window(11)),
    "documents": Case(lambda b, h, q, kv: IDS[0][q] == IDS[1][kv], MASK),
    "function": Case(scattered, scattered),
    # Full tiles come after partial ones, but not in a tile that is not whole: where both hold a query its sums differ.
    "left padding": Case(padding, LEFT_PADDING),
    "nothing allowed": Case(lambda b, h, q, kv: kv < 0, np.zeros((1, 1), bool)),
    "dropout": Case(dropout=True),
    "function & dropout, float16": Case(scattered, scattered, dropout=True, dtype=jnp.float16),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.contract
def test_results_and_gradients_are_those_of_the_definition(card, name):
    case = CASES[name]
    given = arrays(case.seq_q, case.seq_kv, case.kv_heads, case.dtype)
    full = 2, 6, case.seq_q, case.seq_kv
    options = {"mask": case.mask, **(DROPOUT if case.dropout else {})}
    have = card(partial(everything, partial(tiled, **options)), *given)
    known = {"keep": np.broadcast_to(case.keep(*np.indices(full, sparse=True)), full)}
    if case.dropout:
        kept = keep_weights(dropout_words(DROPOUT["dropout_rng"]), 0.3, *masks.index_grid(*full))
        known |= {"keep_weights": np.asarray(kept), "dropout_rate": 0.3}
    *given, d_lse = given
    want = *oracle.attention(*given[:3], **known), *oracle.gradients(*given, d_lse=d_lse, **known)
    check(have, want, case.dtype)
    assert card.ran == ["forward", "d_query", "d_key_value"]


@pytest.mark.contract
def test_each_hop_of_a_ring_gives_its_share(card, monkeypatch):
    """Two devices, as a mapped axis, each with a piece from the front and one from the back."""
    monkeypatch.setattr(ring, "attend_ring", _ring._ring_of)
    query, key, value, d_out, d_lse = (x[:1] for x in arrays(52, 84))
    table = normal(200)
    orders = {length: ring.zigzag_order(length, 2) for length in (52, 84)}

    def attend(attention, query, key, value, table, **options):
        mod = lambda s, b, h, q, kv: s + table[q - kv + 100]
        options |= {"mask": masks.sliding_window(29), "score_mod": mod, **DROPOUT}
        return attention(query, key, value, **options)

    def cut(x):
        x = x[:, :, orders[x.shape[2]]]
        return jnp.stack(jnp.split(x, 2, axis=2))

    def whole(x, length):
        return np.concatenate([*x], axis=2)[:, :, np.argsort(orders[length])]

    shards = partial(everything, partial(attend, partial(ring.ring_attention, axis_name="seq", zigzag=True)))
    run = jax.vmap(lambda *given: shards(*given, table), axis_name="seq")
    *have, d_table = card(run, *map(cut, (query, key, value, d_out, d_lse)))
    have = [*(whole(x, length) for x, length in zip(have, (52, 52, 52, 84, 84), strict=True)), d_table.sum(0)]
    check(
        have, jax.jit(partial(everything, partial(attend, standard_attention)))(query, key, value, d_out, d_lse, table)
    )
    assert card.ran == ["forward"] * 2 + ["d_query", "d_key_value", "d_table"] * 2


ROUNDING = {jnp.float32: 5e-6, jnp.float16: 1e-3, jnp.bfloat16: 8e-3}  # of the root mean square


def check(have, want, dtype=jnp.float32):
    """Equal but for rounding."""
    for n, (x, y) in enumerate(zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True)):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        for special in (np.isnan, np.isneginf):
            assert (special(x) == special(y)).all(), f"result {n} differs in what is no number"
        x, y = (np.where(np.isfinite(y), z, 0) for z in (x, y))
        error = oracle.rms_error(x, y)
        assert error <= ROUNDING[dtype], f"result {n} differs by {error}"


def under(mod):
    """Attention under a mod that captures an array."""

    def attend(attention, query, key, value, captured, **options):
        return attention(query, key, value, score_mod=mod(captured), **options)

    return attend


def spread(x, b, h, q, kv):
    """Every kind of read: by head, by query, by key, by pair."""
    return x[h, q] * x[h, kv] + x[b, (q + kv) % 5]


t5 = partial(score_mods.relative_bias_mod, max_distance=20)
bias, at_index = score_mods.additive_bias_mod, lambda x: lambda s, b, h, q, kv: s + spread(x, b, h, q, kv)
LEARNED = {  # name: (array, score mod of it, mask, the kernels that this takes beside the usual three)
    "soft cap": (jax.device_put(np.float32(1.7)), score_mods.soft_cap_mod, masks.causal(), []),
    "ALiBi": (normal(6), score_mods.Alibi, None, []),
    "T5": (normal(8, 6), t5, None, ["d_table"]),
    "T5 & a bias of pairs": (
        (normal(8, 6), normal(1, 6, T, S, seed=5)),
        lambda x: compose_score_mods(t5(x[0]), bias(x[1])),
        LEFT_PADDING,
        ["d_table", "d_pairs"],
    ),
    "table by distance": (normal(6, 17), score_mods.relative_table_mod, masks.causal(), ["d_table"]),
    "bias of pairs": (normal(T, S), bias, scattered, ["d_pairs"]),
    "keys first": (normal(S, 6, T), lambda x: lambda s, b, h, q, kv: s + x[kv, h, q], masks.causal(), ["d_pairs"]),
    "bias of queries": (normal(6, T, 1), bias, None, []),
    "bias of keys": (normal(2, 1, 1, S), bias, masks.causal(), []),
    "several reads": (normal(6, S), at_index, scattered, ["d_table"]),
}


@pytest.mark.parametrize("name", [contract_unless(name == "T5 & a bias of pairs", name) for name in LEARNED])
def test_what_a_mod_captures_gets_the_gradient_of_the_definition(card, name):
    captured, mod, mask, more = LEARNED[name]
    given = *arrays(T, S), captured
    have = card(partial(everything, partial(under(mod), tiled, mask=mask)), *given)
    want = jax.jit(partial(everything, partial(under(mod), standard_attention, mask=mask)))(*given)
    check(have, want)
    assert card.ran == ["forward", "d_query", "d_key_value", *more]


@pytest.mark.contract
def test_a_scale_gets_its_gradient_when_the_engine_is_chosen_by_platform(card):
    given = *arrays(T, S), jax.device_put(np.float32(0.3))
    attend = lambda attention, query, key, value, scale, **options: attention(
        query, key, value, scale=scale, mask=masks.causal(), score_mod=score_mods.alibi_mod(6), **options
    )
    have = card(partial(everything, partial(attend, flash_attention)), *given)
    check(have, jax.jit(partial(everything, partial(attend, standard_attention)))(*given))
    assert card.ran == ["forward", "d_query", "d_key_value"]


@pytest.mark.contract
def test_poison_reaches_only_who_attends_it(card):
    query, key, value, d_out, d_lse = arrays(T, S)
    keep = np.broadcast_to((IDS[0][:, None] == IDS[1]), (2, 6, T, S))
    given = query.at[1, 5, 0, 0].set(np.inf), key.at[0, 1, 21, 3].set(np.nan), value, d_out, d_lse
    out, lse, d_query, d_key, d_value = map(np.array, card(partial(everything, partial(tiled, mask=MASK)), *given))
    want = oracle.attention(query, key, value, keep=keep)
    want = *want, *oracle.gradients(query, key, value, d_out, keep=keep, d_lse=d_lse)
    # The key's document of 3 heads; one query, and through it the keys of its document.
    hurt = np.zeros((2, 6, T), bool)
    hurt[0, 3:, IDS[0] == 2] = hurt[1, 5, 0] = True
    for x, y in zip((out, lse, d_query), want, strict=False):
        assert np.isnan(x[hurt]).all()
        x[hurt] = y[hurt]
    for x, y in zip((d_key, d_value), want[3:], strict=True):
        for row, document in ((0, 2), (1, 0)):
            spoilt = IDS[1] == document
            assert np.isnan(x[row, 1, spoilt]).all()
            x[row, 1, spoilt] = y[row, 1, spoilt]
    check((out, lse, d_query, d_key, d_value), want)


@pytest.mark.contract
def test_what_runs_is_what_a_program_for_a_gpu_holds(card, monkeypatch):
    ran, given = [], arrays(T, S)
    attend = partial(everything, partial(tiled, mask=CASES["left padding"].mask))
    card.edit = lambda name, text: ran.append(text) or text
    jax.jit(attend).trace(*given)
    monkeypatch.undo()
    assert ran == [str(parse(kernel)) for kernel in kernels_of(attend, *given)]


DECODED = {  # name: (mask, score mod, who attends whom)
    "everything": (None, None, lambda b, h, q, kv: kv >= 0),
    "window & ALiBi": (masks.causal() & masks.sliding_window(50), score_mods.alibi_mod(6), None),
    "function": (lambda b, h, q, kv: (q + kv + b) % 3 > 0, None, lambda b, h, q, kv: (q + kv + b) % 3 > 0),
}


@pytest.mark.parametrize("name", [contract_unless(name == "window & ALiBi", name) for name in DECODED])
@pytest.mark.parametrize("stored", [contract_unless(stored == "paged", stored) for stored in ("paged", "contiguous")])
def test_decoding_equals_the_definition(card, stored, name):
    mask, mod, keep = DECODED[name]
    seq_q, second = (3, 70) if stored == "contiguous" else (19, 33)
    query, keys, values = normal(2, 6, seq_q, 16), normal(2, 2, 70, 16, seed=1), normal(2, 2, 70, 16, seed=2)
    lengths = np.array([70, second])

    def attend(query, keys, values):
        options = {"mask": mask, "score_mod": mod, "scale": 0.25}
        if stored == "contiguous":
            cache = update_kv_layer_cache(init_kv_layer_cache(2, 2, 16, max_len=101), keys, values)
            return cached_attention(query, cache, np.arange(70 - seq_q, 70), **options)
        sizes = {"num_blocks": 17, "block_size": 16, "max_blocks_per_seq": 6}
        cache = init_paged_kv_cache(num_kv_heads=2, head_dim=16, batch_size=2, **sizes)
        return paged_attention(query, append_rows(allocate_rows(cache, lengths), keys, values, lengths), **options)

    have = card(attend, query, keys, values)
    b, h, q, kv = np.indices((2, 6, seq_q, 70), sparse=True)
    q = q + lengths[:, None, None, None] - seq_q
    if keep is None:
        keep = lambda b, h, q, kv: (kv <= q) & (kv > q - 50)
        slopes = np.asarray(mod.slopes, np.float64)
        mod = lambda s, b, h, q, kv: s - slopes[h] * abs(q + lengths[b] - seq_q - kv)
    keep = keep(b, h, q, kv) & (kv < lengths[:, None, None, None])
    want, _ = oracle.attention(query, keys, values, keep=np.broadcast_to(keep, (2, 6, seq_q, 70)), score_mod=mod)
    check([have], [want])
    assert card.ran == ["decode"]


def run_causal(card, seq_q=T, seq_kv=S, keep=causal, backward=False):
    """Attention on the card, and by the oracle."""
    *given, d_lse = arrays(seq_q, seq_kv)
    full = 2, 6, seq_q, seq_kv
    known = {"keep": np.broadcast_to(keep(*np.indices(full, sparse=True)), full)}
    attend = partial(tiled, mask=masks.causal() if keep is causal else None)
    want = oracle.attention(*given[:3], **known)
    if backward:
        want = *want, *oracle.gradients(*given, d_lse=d_lse, **known)
        return card(partial(everything, attend), *given, d_lse), want
    return card(partial(attend, return_lse=True), *given[:3]), want


class Edit(NamedTuple):
    """A change of a kernel's module."""

    pattern: str
    replacement: str
    kernel: str = "forward"
    count: int = 0

    def __call__(self, name, text):
        if name != self.kernel:
            return text
        text, found = re.subn(self.pattern, self.replacement, text, count=self.count)
        assert found, f"{self.pattern} is nowhere in the module"
        return text


def change(name, other):
    """Changes a method of `Kernel`, or a function of `_gpu/kernels.py`, to `other(original)`."""

    def apply(monkeypatch):
        owner = next(owner for owner in (kernels.Kernel, TileGrid, kernels) if hasattr(owner, name))
        monkeypatch.setattr(owner, name, other(getattr(owner, name)))

    return apply


def with_tiles(by):
    """Visits more tiles than there are, or fewer."""
    return lambda visit: (
        lambda of, tiles, where, count, full, *rest: visit(of, tiles, where, count + by, full + by, *rest)
    )


def adding(write):
    """Adds to what is there."""
    return lambda self, ref, where, x, own: write(self, ref, where, x + ref[where], own)


def unscaled(scores):
    def run(self, *given, **how):
        return scores(dataclasses.replace(self, inputs=self.inputs._replace(scale=[np.float32(1)])), *given, **how)

    return run


OUTSIDE, TWICE, UNWRITTEN, NOWHERE, VALUES = (
    "(reads|writes) element .*, which has",
    "writes what another program wrote",
    "reads what this program did not write",
    "written by nobody",
    "differs",
)
ALL = {"keep": lambda b, h, q, kv: kv >= 0}
PLAIN = {"seq_q": 32, "seq_kv": 48, **ALL}
BACKWARD = {"backward": True}
FAULTS = {  # name: (fault, how the call differs from a causal forward pass of odd lengths, what is noticed)
    "a stride of keys": (Edit("arith.constant 3392 :", "arith.constant 3456 :"), {}, VALUES),
    "a stride that leads out": (Edit("arith.constant 3392 :", "arith.constant 3456 :"), ALL, OUTSIDE),
    "a stride of results": (Edit("arith.constant 1184 :", "arith.constant 1152 :"), {}, TWICE),
    "a store without its mask": (Edit(r"(tt.store %\w+, %\w+), %\w+ :", r"\1 :"), {}, TWICE),
    "each program at the first tile": (Edit("tt.get_program_id x", "arith.constant 0"), {}, TWICE),
    "a store missing": (Edit("tt.store .*", "", count=1), {}, NOWHERE),
    "products of TF32": (Edit(r"(tt.dot \S+ \S+ \S+)", r"\1, inputPrecision = tf32"), {}, VALUES),
    "a tile too many": (change("_visit", with_tiles(1)), PLAIN, OUTSIDE),
    "a tile too few": (change("_visit", with_tiles(-1)), PLAIN, VALUES),
    "no mask": (change("keep", lambda _: lambda self, place: None), {}, VALUES),
    "no scale": (change("scores", unscaled), {}, VALUES),
    "the last tile past the end": (
        change("kv_first", lambda _: lambda self, j: j * self.block_kv),
        ALL,
        OUTSIDE,
    ),
    "another head's keys": (
        change("keys", lambda keys: lambda self, place, **how: keys(self, place._replace(h=place.h % 2 * 3), **how)),
        {},
        VALUES,
    ),
    "keys counted from one": (
        change("index", lambda index: lambda self, place: (*(x := index(self, place))[:3], x[3] + 1)),
        {},
        VALUES,
    ),
    "sums that nobody began": (change("write", adding), {}, UNWRITTEN),
    "gradients without delta": (
        change(
            "queries", lambda of: lambda self, place, **how: (x := of(self, place, **how))._replace(delta=x.delta * 0)
        ),
        BACKWARD,
        VALUES,
    ),
}


@pytest.mark.parametrize(
    "name", [contract_unless(name in ("a store without its mask", "a tile too many"), name) for name in FAULTS]
)
def test_a_fault_is_noticed(card, monkeypatch, name):
    fault, options, words = FAULTS[name]
    if isinstance(fault, Edit):
        card.edit = fault
    else:
        fault(monkeypatch)
    with pytest.raises(AssertionError if words == VALUES else interpreter.KernelError, match=words):
        check(*run_causal(card, **options))
