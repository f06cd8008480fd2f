"""Pictures are written without a display; their counts and colours are right."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import oracle
import pytest
from matplotlib.figure import Figure

from attnax import masks, visualize
from attnax.masks import MaskedScoreMod
from attnax.visualize import TileCounts, attention_weights, plot_attention, plot_mask, plot_training

ALIBI = lambda scores, b, h, q, kv: scores - 0.1 * (h + 1) * abs(q - kv)


def read_picture(path):
    """Pixels of a PNG file."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 200
    return pixels


def share(pixels, color):
    """The fraction of the picture in a colour."""
    wanted = np.array([int(color[index : index + 2], 16) for index in (1, 3, 5)])
    return (abs(255 * pixels - wanted).max(-1) < 3).mean()


@pytest.fixture
def undrawn(monkeypatch):
    """Draws no picture, for tests of the counts: drawing takes most of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


def test_a_causal_mask_in_four_by_four_tiles(tmp_path):
    counts = plot_mask(masks.causal(), seq_q=16, tile=(4, 4), path=tmp_path / "mask.png")
    assert counts == TileCounts(empty=6, partial=4, full=6)
    assert counts.skipped == 6 / 16
    pixels = read_picture(tmp_path / "mask.png")
    full, empty, partial, masked = (share(pixels, color) for color in ("#2d5d88", "#ececea", "#e59b2c", "#f9e4bf"))
    assert full == pytest.approx(empty, rel=0.1) and full > 0.1
    assert partial == pytest.approx(full * 4 / 6 * 10 / 16, rel=0.15)
    assert masked == pytest.approx(full * 4 / 6 * 6 / 16, rel=0.15)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("make", "keep"),
    [
        (masks.causal, lambda q, kv: kv <= q),
        (lambda: masks.sliding_window(17), lambda q, kv: (kv <= q) & (q - kv < 17)),
        (lambda: masks.documents(np.arange(101) // 23, np.arange(59) // 23), lambda q, kv: q // 23 == kv // 23),
        (lambda: ~masks.causal(), lambda q, kv: kv > q),
        (lambda: lambda b, h, q, kv: (q + kv) % 2 == 0, lambda q, kv: (q + kv) % 2 == 0),
        (lambda: np.indices((101, 59)).sum(0) < 31, lambda q, kv: q + kv < 31),
        (lambda: np.zeros((1, 1), bool), lambda q, kv: (q + kv) < 0),
    ],
    ids=["causal", "window", "documents", "not causal", "function", "array", "nothing"],
)
def test_tiles_are_counted_one_by_one(make, keep):
    counts = plot_mask(make(), seq_q=101, seq_kv=59, tile=(13, 7), path="undrawn")
    dense = np.broadcast_to(keep(*np.indices((101, 59))), (101, 59))
    tiles = [dense[q : q + 13, kv : kv + 7] for q in range(0, 101, 13) for kv in range(0, 59, 7)]
    full, empty = sum(tile.all() for tile in tiles), sum(not tile.any() for tile in tiles)
    assert counts == TileCounts(empty=empty, partial=len(tiles) - full - empty, full=full)


@pytest.mark.usefixtures("undrawn")
def test_row_and_head_can_be_chosen():
    mask = masks.padding(np.array([3, 11])) & (lambda b, h, q, kv: kv + h < 11)
    sizes = {"seq_q": 1, "seq_kv": 11, "batch_size": 2, "num_heads": 5, "tile": (1, 1), "path": "undrawn"}
    assert plot_mask(mask, **sizes) == TileCounts(8, 0, 3)
    assert plot_mask(mask, **sizes, batch=1) == TileCounts(0, 0, 11)
    assert plot_mask(mask, **sizes, batch=1, head=4) == TileCounts(4, 0, 7)


def test_a_score_mod_is_drawn_in_colours(tmp_path):
    counts = plot_mask(masks.causal(), ALIBI, seq_q=16, tile=(4, 4), path=tmp_path / "mask.png")
    assert counts == TileCounts(empty=6, partial=4, full=6)  # as without the mod
    pixels = read_picture(tmp_path / "mask.png")
    assert share(pixels, "#2d5d88") < 0.01
    assert share(pixels, "#440154") > 0.0003 and share(pixels, "#fde725") > 0.01  # both ends of viridis
    assert len(np.unique((255 * pixels).astype(int) @ [1 << 16, 1 << 8, 1])) > 25


@pytest.mark.usefixtures("undrawn")
def test_a_mod_that_carries_a_mask_saves_its_tiles():
    sizes = {"seq_q": 16, "tile": (4, 4), "path": "undrawn"}
    counts = plot_mask(masks.causal(), **sizes)
    assert counts.empty == 6
    assert plot_mask(score_mod=MaskedScoreMod(None, masks.causal()), **sizes) == counts
    assert plot_mask(score_mod=MaskedScoreMod(ALIBI, masks.causal()), **sizes) == counts


@pytest.mark.parametrize("low", [-np.inf, np.finfo(np.float32).min], ids=["-inf", "lowest"])
def test_a_mod_that_masks_by_its_scores_saves_no_tiles(tmp_path, low):
    mod = lambda scores, b, h, q, kv: jnp.where(kv <= q, scores, low)
    assert plot_mask(score_mod=mod, seq_q=16, tile=(4, 4), path=tmp_path / "mask.png") == TileCounts(0, 0, 16)
    assert share(read_picture(tmp_path / "mask.png"), "#f9e4bf") > 0.1


@pytest.mark.parametrize("mod", [lambda s, b, h, q, kv: s, lambda s, b, h, q, kv: s - np.inf], ids=["0", "-inf"])
def test_a_constant_score_mod_has_a_picture(tmp_path, mod):
    plot_mask(score_mod=mod, seq_q=16, path=tmp_path / "mask.png")
    read_picture(tmp_path / "mask.png")


@pytest.mark.parametrize(
    ("seq_q", "seq_kv"),
    [(1, 997), (1, 1), *(pytest.param(*sizes, marks=pytest.mark.thorough) for sizes in ((997, 1), (1499, 1499)))],
)
def test_long_and_flat_masks_have_pictures(tmp_path, seq_q, seq_kv):
    plot_mask(masks.causal(), seq_q=seq_q, seq_kv=seq_kv, path=tmp_path / "mask.png")
    read_picture(tmp_path / "mask.png")


def test_attention_weights_match_float64():
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, *sizes), np.float32) for sizes in ((6, 7, 5), (2, 11, 5), (2, 11, 5)))
    keep = (np.arange(7)[:, None] >= np.arange(11)) & (np.arange(7)[:, None] != 3)  # query 3 attends nothing

    @jax.jit
    def run(query, key):
        mask = masks.causal() & (lambda b, h, q, kv: q != 3)
        return attention_weights(query, key, mask=mask, score_mod=ALIBI, scale=0.7)

    grouped = value.repeat(3, axis=1)
    for dtype in (jnp.float32, jnp.bfloat16):
        arrays = query.astype(dtype), key.astype(dtype)
        weights = run(*arrays)
        assert weights.shape == (2, 6, 7, 11) and weights.dtype == jnp.float32
        weights = np.asarray(weights)
        np.testing.assert_allclose(weights.sum(-1), np.broadcast_to(np.arange(7) != 3, (2, 6, 7)), atol=1e-6)
        np.testing.assert_array_equal(weights * ~keep, 0)
        expected, _ = oracle.attention(*arrays, value, keep=keep, score_mod=ALIBI, scale=0.7)
        assert oracle.rms_error(weights @ grouped, expected) <= 1e-6


def test_attention_is_drawn_a_panel_a_head(tmp_path):
    weights = np.broadcast_to(np.eye(7, dtype=np.float32), (2, 5, 7, 7)).copy()
    weights[1] = 0.0
    plot_attention(weights, path=tmp_path / "weights.png")
    pixels = read_picture(tmp_path / "weights.png")
    assert share(pixels, "#fde725") > 0.02  # five diagonals
    assert share(pixels, "#440154") == pytest.approx(6 * share(pixels, "#fde725"), rel=0.3)
    plot_attention(weights, batch=1, path=tmp_path / "nothing.png")
    assert share(read_picture(tmp_path / "nothing.png"), "#fde725") < 0.01


def test_tokens_are_written_as_they_are(tmp_path):
    weights = np.random.default_rng(0).dirichlet(np.ones(5), (1, 2, 5)).astype(np.float32)
    tokens = ["a", "$x", "y$", "\n", "\\frac{"]
    plot_attention(weights, path=tmp_path / "plain.png")
    plot_attention(weights, path=tmp_path / "tokens.png", query_labels=tokens, key_labels=tokens)
    plain, labelled = (read_picture(tmp_path / name) for name in ("plain.png", "tokens.png"))
    assert plain.shape != labelled.shape or abs(plain - labelled).max() > 0.1


def test_no_display_is_needed():
    assert "pyplot" not in Path(visualize.__file__).read_text()


@pytest.mark.usefixtures("unchecked_shapes")
class TestErrors:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"mask": None}, "plot_mask: give a mask or a score_mod to draw"),
            ({"seq_q": 0}, "seq_q must be at least 1; got seq_q=0"),
            ({"seq_kv": -1}, "seq_kv must be at least 1; got seq_kv=-1"),
            ({"tile": (7, 0)}, r"tile must be at least 1; got tile=\(7, 0\)"),
            ({"batch": 1}, "batch must be below batch_size; got batch=1, batch_size=1"),
            ({"head": 5, "num_heads": 5}, "head must be below num_heads; got head=5, num_heads=5"),
            ({"head": -1}, "got head=-1"),
            ({"seq_q": 5003, "seq_kv": 5003}, "at most 16,777,216 pairs .*got seq_q=5003, seq_kv=5003"),
            ({"mask": masks.padding(np.array([3, 5]))}, "plot_mask: .*one length a batch row"),
            ({"mask": np.ones((7, 11), bool)}, r"plot_mask: .*must broadcast to .*\(1, 1, 13, 13\)"),
            ({"mask": np.ones((13, 13))}, "must be boolean"),
            ({"mask": lambda b, h, q, kv: q - kv}, "must return booleans"),
        ],
    )
    def test_plot_mask(self, tmp_path, change, words):
        options = {"mask": masks.causal(), "seq_q": 13, "path": tmp_path / "mask.png", **change}
        with pytest.raises(ValueError, match=words):
            plot_mask(**options)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("shape", "options", "words"),
        [
            ((2, 3, 5), {}, r"weights must be .*; got weights.shape=\(2, 3, 5\)"),
            ((1, 2, 0, 5), {}, r"each at least 1; got weights.shape=\(1, 2, 0, 5\)"),
            ((2, 3, 5, 7), {"batch": 2}, "batch must be a row of the weights, below 2; got batch=2"),
            ((1, 67, 2, 3), {}, "at most 64 heads"),
            ((1, 2, 1009, 1013), {}, "1,048,576 weights of a row"),
            ((1, 2, 3, 5), {"key_labels": ["a"] * 3}, r"key_labels must be 5 tokens; got len\(key_labels\)=3"),
            ((1, 2, 3, 5), {"query_labels": ["a"] * 5}, "query_labels must be 3 tokens"),
        ],
    )
    def test_plot_attention(self, tmp_path, shape, options, words):
        with pytest.raises(ValueError, match=words):
            plot_attention(np.zeros(shape, np.float32), path=tmp_path / "weights.png", **options)

    def test_attention_weights(self):
        with pytest.raises(ValueError, match="must be a multiple of the number of key heads; got 3 and 2"):
            jax.eval_shape(attention_weights, np.ones((1, 3, 5, 7)), np.ones((1, 2, 5, 7)))


def test_a_run_without_losses_cannot_be_drawn_and_skipped_updates_are_left_out(tmp_path):
    with pytest.raises(ValueError, match="plot_training: metrics must have a row with a loss; got 1 rows without"):
        plot_training([{"tokens": 3, "held_out_bits_per_byte": 1.0}], tmp_path / "loss.png")
    rows = [{"tokens": 3, "loss": 2.0}, {"tokens": 6, "loss": None}, {"tokens": 9, "loss": 1.0}]
    plot_training(rows, tmp_path / "loss.png")
    read_picture(tmp_path / "loss.png")
