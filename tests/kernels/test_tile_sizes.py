"""The tiles of the GPU kernels: any card holds the usual ones, a known card gets larger ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from _lowered import gpu_mesh, kernels_of

from attnax import pallas_flash_attention
from attnax.cache import TokenArrays
from attnax.kernels._core.decode import DecodeInputs
from attnax.kernels._gpu import decode
from attnax.kernels._gpu.prepare import choose_kernel_tiles
from attnax.kernels._gpu.tile_sizes import (
    LARGER,
    TILES,
    Footprint,
    Tile,
    choose,
    running_card,
    shared_memory,
)
from attnax.kernels.score_mods import additive_bias_mod

KNOWN = [80, 90, 100]


def on(name):
    """The context in which programs for a card of this name are traced."""
    return jax.sharding.use_abstract_mesh(gpu_mesh(name=name))


@pytest.mark.parametrize("key", TILES, ids=str)
def test_the_tile_of_an_unknown_card_fits_all_cards(key):
    kind, bits, size = key
    assert choose(kind, size, bits) == choose(kind, size - 1, bits) == choose(kind, size, bits, 86) == TILES[key]
    assert Footprint(kind, TILES[key], size, size, bits).fits()


@pytest.mark.parametrize("card", KNOWN)
@pytest.mark.parametrize("key", LARGER, ids=str)
def test_a_known_card_has_the_larger_tile_that_it_holds(key, card):
    kind, bits, size = key
    assert choose(kind, size, bits, card) == LARGER[key] != TILES[key]
    assert Footprint(kind, LARGER[key], size, size, bits).fits(card)


@pytest.mark.parametrize("card", [86, *KNOWN])
@pytest.mark.parametrize("kind", ["forward", "backward", "decode"])
def test_larger_sizes_take_no_less_shared_memory(kind, card):
    sizes = (16, 64), (32, 128), (1, 3), (64, 256), (32, 128), (16, 32)

    def need(block_q, block_kv, stages, head_dim, value_dim, bits):
        return Footprint(kind, Tile(block_q, block_kv, 8, stages), head_dim, value_dim, bits).bytes_on(card)

    for choice in list(itertools.product(*sizes))[::5]:
        for axis, (small, large) in enumerate(sizes):
            if choice[axis] == small:
                assert need(*choice) <= need(*choice[:axis], large, *choice[axis + 1 :])


@pytest.mark.parametrize(
    "name, card",
    [
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA H100 80GB HBM3", 90),
        ("NVIDIA B200", 100),
        ("NVIDIA H20", 90),
        ("Tesla T4", 75),
        ("NVIDIA A10", 0),
        ("NVIDIA GeForce RTX 4090", 0),
    ],
)
def test_the_mesh_of_a_program_names_its_card(name, card):
    assert running_card() == 0
    with on(name):
        assert running_card() == card
        query = jax.ShapeDtypeStruct((1, 2, 512, 256), jnp.bfloat16)
        tiles = choose_kernel_tiles(query, query, None)
    assert tiles.plain == (choose("forward", 256, 16, card), choose("backward", 256, 16, card))


def test_an_unknown_card_has_the_least_shared_memory():
    assert shared_memory(0) == shared_memory(86) == min(map(shared_memory, range(80, 130))) == 99 * 1024
    assert [shared_memory(card) // 1024 for card in KNOWN] == [163, 227, 227]


def test_pages_that_no_card_holds_are_left_to_the_chunks():
    def paged(page):
        pages = jnp.zeros((1, 1, page, 128), jnp.bfloat16)
        tokens = TokenArrays(pages, pages, jnp.zeros((1, page), jnp.int32), jnp.zeros((1, 1), jnp.int32))
        query, positions = jnp.zeros((1, 4, 1, 128), jnp.bfloat16), jnp.zeros((1, 1), jnp.int32)
        return decode.decode_tile(DecodeInputs(query, jnp.float32(1), positions, tokens))

    assert paged(16).block_kv == 16
    assert paged(128).block_kv == 128
    assert paged(256) is None
    with on("NVIDIA H100 80GB HBM3"):
        assert paged(256).block_kv == 256
        assert paged(1024) is None


def test_reads_for_each_pair_leave_room_for_fewer_stages():
    plain = Footprint("forward", TILES["forward", 16, 64], 64, 64)
    assert plain.fitted() == plain
    with_pairs = plain._replace(pair_bytes=4)
    fewer = with_pairs.fitted()
    assert 1 <= fewer.tile.num_stages < plain.tile.num_stages
    assert fewer.fits()
    assert with_pairs.fitted(90) == with_pairs


def test_a_bias_for_each_pair_is_compiled_with_fewer_stages():
    query = jax.ShapeDtypeStruct((1, 2, 512, 64), jnp.bfloat16)
    bias = additive_bias_mod(jnp.zeros((1, 1, 512, 512)))

    def stages(name, score_mod):
        attend = functools.partial(pallas_flash_attention, score_mod=score_mod)
        (kernel,) = kernels_of(attend, query, query, query, mesh=gpu_mesh(name=name))
        return kernel.num_stages

    assert stages("NVIDIA A10", bias) < stages("NVIDIA A10", None) == stages("NVIDIA H100 80GB HBM3", bias)
