"""The counts of bytes and products, for calls that one can count by hand."""

from pathlib import Path

import pytest

from attnax import masks


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import tpu_traffic

    return tpu_traffic


TILE, VECTOR = 512 * 128 * 2, 512 * 4  # bytes of a tile of queries or keys in bfloat16, and of a number for each query
PRODUCT = 2 * 512 * 512 * 128


def test_two_tiles_of_causal_attention_are_counted_by_hand(traffic):
    forward, d_query, d_key_value = traffic.attnax_kernels(1024, masks.causal())
    assert [x.kernel for x in (forward, d_query, d_key_value)] == ["forward", "d_query", "d_key_value"]
    # Each of 8 heads visits the tiles (0, 0), (1, 0) and (1, 1). (0, 0) and (1, 0) have the same keys.
    assert forward.programs == d_query.programs == d_key_value.programs == 24
    assert [x.flops for x in (forward, d_query, d_key_value)] == [24 * n * PRODUCT for n in (2, 3, 4)]
    queries = 8 * 2
    # Two heads share keys; the second begins with keys 0 again.
    keys = 8 * 2
    assert forward.read == (queries + 2 * keys) * TILE
    assert forward.written == queries * (2 * TILE + VECTOR)  # out, its rounding error and the log-sum-exp
    assert d_query.read == (2 * queries + 2 * keys) * TILE + 2 * queries * VECTOR
    assert d_query.written == queries * TILE
    # Tiles of keys as rows, (0, 0), (0, 1) and (1, 1): at each, the two heads that share keys take turns.
    assert d_key_value.read == 4 * (2 * 2 * TILE) + 24 * (2 * TILE + 2 * VECTOR)
    assert d_key_value.written == 4 * 2 * 2 * TILE


def test_splash_visits_as_many_tiles(traffic):
    ours, splash = (count(1024, masks.causal()) for count in (traffic.attnax_kernels, traffic.splash_kernels))
    assert sorted(x.flops for x in ours) == sorted(x.flops for x in splash)
