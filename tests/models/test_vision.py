"""The vision transformer: which patch may change which token, positions on other grids, and every kind of block."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build

from attnax import AttentionType, VisionTransformerConfig
from attnax.models.vision import VisionTransformer, with_image_size
from attnax.nn import with_scan_layers
from attnax.nn.patches import GridPositionalEncoding, PatchEmbedding
from attnax.visualize import attention_weights

CONFIG = VisionTransformerConfig(
    image_size=(6, 10),
    patch_size=(3, 2),
    num_channels=2,
    num_classes=7,
    d_model=12,
    num_heads=3,
    num_layers=2,
    d_ff=20,
    num_register_tokens=2,
)
GRID, PREFIX = (2, 5), 3
PATCHES = GRID[0] * GRID[1]
LLM_STYLE = {"norm_type": "rms", "ff_activation": "swiglu", "num_kv_heads": 1, "use_bias": False}
VARIANTS = {
    "plain": {},
    "llm-style, memory efficient": {**LLM_STYLE, "attention_type": AttentionType.MEMORY_EFFICIENT},
    "standard, post-norm, mean": {"attention_type": AttentionType.STANDARD, "norm_placement": "post", "pool": "mean"},
    "pallas, sandwich, sinusoidal": {
        "attention_type": AttentionType.PALLAS_FLASH,
        "norm_placement": "sandwich",
        "pos_emb_type": "sinusoidal",
    },
    "linear, tokens": {"attention_type": AttentionType.LINEAR, "num_classes": None},
    "lite, no class token": {
        "attention_type": AttentionType.LITE,
        "use_cls_token": False,
        "pool": "mean",
        "pos_emb_type": "none",
    },
    "experts in every other of 3": {
        "num_layers": 3,
        "layer_pattern": ({"num_experts": 3, "top_k": 2}, {"parallel_residual": True}),
        "num_register_tokens": 0,
    },
    "remat, no registers, scaled": {
        "remat": "full",
        "num_register_tokens": 0,
        "residual_scale": 0.5,
        "attention_sinks": True,
    },
}
variants = pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=() if index < 2 else pytest.mark.thorough) for index, name in enumerate(VARIANTS)],
)


apply = nnx.jit(lambda module, x: module(x))
call = nnx.jit(VisionTransformer.__call__, static_argnames=("deterministic", "score_mod"))
weigh = nnx.jit(VisionTransformer.attention_weights, static_argnames=("layer", "score_mod"))


@nnx.jit
def call_each(models, *arguments):
    """The results of several models by name, from one program."""
    return {name: model(*arguments) for name, model in models.items()}


@cache
def built(config):
    return build(lambda rngs: VisionTransformer(rngs, config))


def make(**fields):
    return nnx.clone(built(dataclasses.replace(CONFIG, **fields)))


def make_images(batch=2, size=CONFIG.image_size, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *size, CONFIG.num_channels)).astype(np.float32)


def call_and_grads(model, images):
    """The result, and the gradient of a product with it in each parameter, from one program."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params):
        def loss(params):
            out = nnx.merge(graphdef, params, rest)(images)
            return (out * np.sin(np.arange(out.size)).reshape(out.shape)).sum(), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, out), grads = run(params)
    return np.asarray(out), jax.tree.map(np.asarray, grads)


def images_with_each_patch_changed():
    """Image p differs in patch p from the last one."""
    images = np.repeat(make_images(1), PATCHES + 1, axis=0)
    height, width = CONFIG.patch_size
    for patch in range(PATCHES):
        row, column = divmod(patch, GRID[1])
        images[patch, row * height, (column + 1) * width - 1, 1] += 1.0  # one pixel, in its corner
    return images


def moved_by_each_patch(out):
    """Row p says which outputs, along their second last axis (logits: one row), patch p moves.

    The smallest move is 9e-5. Rows of one product may be rounded differently, by the processor.
    """
    out = np.asarray(out).reshape(PATCHES + 1, -1, out.shape[-1])
    return (np.abs(out[:-1] - out[-1:]).max(-1) > 1e-5).tolist()


class TestDocumentedModels:
    def make(self, **fields):
        return nnx.eval_shape(lambda: VisionTransformer(nnx.Rngs(0), VisionTransformerConfig(**fields)))

    def out_shape(self, **fields):
        images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
        return nnx.eval_shape(lambda model, x: model(x), self.make(num_layers=1, **fields), images).shape

    def test_the_default_is_vit_base(self):
        one, two = (
            sum(
                leaf.size
                for leaf in jax.tree.leaves(nnx.state(self.make(num_classes=1000, num_layers=count), nnx.Param))
            )
            for count in (1, 2)
        )
        layers = VisionTransformerConfig().num_layers  # all alike
        assert (layers, one + (layers - 1) * (two - one)) == (12, 86_567_656)  # as published, ViT-B/16
        assert self.out_shape(num_classes=1000) == (2, 1000)

    def test_without_classes_it_returns_the_tokens(self):
        assert self.out_shape() == (2, 197, 768)

    def test_llm_style(self):
        fields = {"norm_type": "rms", "ff_activation": "swiglu", "num_kv_heads": 4}
        kind = AttentionType.MEMORY_EFFICIENT
        assert self.out_shape(**fields, num_classes=1000, attention_type=kind) == (2, 1000)


def test_patches_are_read_row_by_row():
    embed = build(lambda rngs: PatchEmbedding(rngs, image_size=(6, 10), patch_size=(3, 2), num_channels=2, d_model=5))
    assert (embed.grid_size, embed.num_patches) == (GRID, PATCHES)
    images = make_images()
    kernel = np.asarray(embed.projection.kernel[...]).reshape(3, 2, 2, 5)
    expected = np.zeros((2, PATCHES, 5)) + np.asarray(embed.projection.bias[...])
    for patch in range(PATCHES):
        row, column = divmod(patch, GRID[1])
        for y in range(3):
            for x in range(2):
                expected[:, patch] += images[:, 3 * row + y, 2 * column + x] @ kernel[y, x]
    np.testing.assert_allclose(apply(embed, images), expected, atol=1e-5)


def test_the_patch_kernel_is_that_of_a_convolution():
    embed = build(lambda rngs: PatchEmbedding(rngs, image_size=6, patch_size=3, num_channels=2, d_model=5))
    images = make_images(size=(6, 6))

    @nnx.jit
    def both(embed):
        kernel, shapes = embed.projection.kernel[...].reshape(3, 3, 2, 5), ("NHWC", "HWIO", "NHWC")
        convolved = jax.lax.conv_general_dilated(images, kernel, (3, 3), "VALID", dimension_numbers=shapes)
        return embed(images), convolved.reshape(2, 4, 5) + embed.projection.bias[...].reshape(1, 1, 5)

    np.testing.assert_allclose(*both(embed), atol=1e-5)


class TestDependence:
    @pytest.mark.parametrize(
        "kind", [pytest.param(kind, marks=() if kind == "flash" else pytest.mark.thorough) for kind in AttentionType]
    )
    def test_every_patch_moves_every_token(self, kind):
        out = call(make(num_classes=None, num_layers=1, attention_type=kind), images_with_each_patch_changed())
        assert moved_by_each_patch(out) == [[True] * (PREFIX + PATCHES)] * PATCHES

    def test_every_patch_moves_the_logits(self):
        models = {pool: make(pool=pool, num_layers=1) for pool in ("cls", "mean")}
        for pool, out in call_each(models, images_with_each_patch_changed()).items():
            assert moved_by_each_patch(out) == [[True]] * PATCHES, pool

    # A window of 1 lets each token see itself alone, which shows where everything stands.
    def test_patches_come_last_in_their_order(self):
        out = call(make(num_classes=None, attention_window=1, num_layers=1), images_with_each_patch_changed())
        assert moved_by_each_patch(out) == np.eye(PATCHES, PREFIX + PATCHES, PREFIX, dtype=bool).tolist()

    @pytest.mark.parametrize("pool", ["cls", "mean"])
    def test_the_head_reads_the_class_token_or_the_patches_only(self, pool):
        model = make(pool=pool, attention_window=1, num_layers=1)
        out, grads = call_and_grads(model, images_with_each_patch_changed())
        assert moved_by_each_patch(out) == [[pool == "mean"]] * PATCHES
        grads = nnx.to_pure_dict(grads)
        assert (grads["class_token"] != 0).any() == (pool == "cls")
        assert (grads["registers"] == 0).all()


class TestPositions:
    def test_the_order_of_patches_matters_where_they_have_positions(self):
        knows = {"learned": True, "sinusoidal": True, "none": False}
        images = make_images(1)
        upside_down = images.reshape(1, 2, 3, 10, 2)[:, ::-1].reshape(images.shape)  # its two rows of patches swapped
        models = {kind: make(pos_emb_type=kind, num_classes=None, num_layers=1) for kind in knows}
        for kind, out in call_each(models, np.concatenate([images, upside_down])).items():
            class_token, swapped = np.asarray(out)[:, 0]
            assert (np.abs(class_token - swapped).max() > 1e-4) == knows[kind], kind

    def test_learned_ones_are_of_the_class_token_and_the_patches(self):
        model, images = make(num_classes=None), make_images(1)
        embed = nnx.jit(lambda model: model._embed(images, deterministic=True))
        table = model.positions.embedding
        assert table.shape == (1 + PATCHES, 12)
        before = np.asarray(embed(model))
        table[...] = jax.device_put(np.asarray(table[...]) + np.arange(1, 12, dtype=np.float32)[:, None])
        moved = (np.asarray(embed(model)) - before)[0, :, 0]
        np.testing.assert_allclose(moved, [1, 0, 0, *range(2, 12)], atol=1e-5)

    def test_they_start_small(self):
        config = dataclasses.replace(CONFIG, d_model=300)
        table = np.asarray(jax.jit(lambda: VisionTransformer(nnx.Rngs(1), config).positions.embedding[...])())
        assert 0.018 < table.std() < 0.022 and abs(table.mean()) < 0.002

    def test_sinusoids_are_of_row_and_column(self):
        zeros = np.zeros((1, PATCHES, 12), np.float32)
        table = np.asarray(apply(GridPositionalEncoding(GRID, 12), zeros)).reshape(*GRID, 12)
        assert (table[:, :1, :6] == table[:, :, :6]).all() and (table[:1, :, 6:] == table[:, :, 6:]).all()
        np.testing.assert_allclose(table[1, 3, [0, 1, 6, 7]], np.sin([1, 1 + np.pi / 2, 3, 3 + np.pi / 2]), atol=1e-6)


@pytest.mark.thorough
class TestOtherImageSizes:
    @pytest.mark.parametrize("fields", [{}, {"scan_layers": True}, {"use_cls_token": False, "pool": "mean"}], ids=str)
    def test_the_same_size_changes_nothing(self, fields):
        model = make(**fields)
        same = with_image_size(model, CONFIG.image_size)
        assert nnx.graphdef(same) == nnx.graphdef(model)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(same), nnx.state(model))

    @pytest.mark.parametrize("size", [(9, 14), (3, 22), (6, 12)], ids=str)
    @pytest.mark.parametrize("fields", [{}, {"use_cls_token": False, "pool": "mean", "num_layers": 1}], ids=str)
    def test_constant_positions_stay_constant(self, fields, size):
        model = make(**fields)
        first = int(model.config.use_cls_token)
        table = model.positions.embedding
        table[...] = jnp.asarray(np.concatenate([table[:first], np.tile(np.arange(12.0), (PATCHES, 1))]), jnp.float32)
        resized = with_image_size(model, size).positions.embedding
        assert resized.shape == (first + size[0] // 3 * size[1] // 2, 12)
        np.testing.assert_array_equal(resized[:first], table[:first])
        np.testing.assert_allclose(
            resized[first:], jnp.broadcast_to(jnp.arange(12.0), resized[first:].shape), rtol=1e-5
        )

    def test_linear_positions_stay_linear_inside_the_grid(self):
        model = make(image_size=(15, 10), position_antialias=True)  # 5 x 5 patches; the other cubic bends them a little
        table = model.positions.embedding
        table[...] = table[...].at[1:].set(jnp.repeat(jnp.arange(5.0), 5)[:, None])  # the row
        rows = with_image_size(model, (30, 10)).positions.embedding[1:].reshape(10, 5, 12)
        np.testing.assert_allclose(rows[3:7, 2, 0], (np.arange(3, 7) + 0.5) / 2 - 0.5, atol=1e-5)

    @pytest.mark.parametrize("kind", ["learned", "sinusoidal", "none"])
    def test_the_copy_is_the_model_that_the_config_makes(self, kind):
        model = make(pos_emb_type=kind, scan_layers=True)
        before = jax.tree.map(np.asarray, nnx.state(model))
        larger = with_image_size(model, (9, 14))
        made = make(pos_emb_type=kind, scan_layers=True, image_size=(9, 14))
        assert nnx.graphdef(larger) == nnx.graphdef(made)
        assert jax.tree.map(jnp.shape, nnx.state(larger)) == jax.tree.map(jnp.shape, nnx.state(made))
        assert call(larger, make_images(size=(9, 14))).shape == (2, 7)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
        assert model.config == dataclasses.replace(CONFIG, pos_emb_type=kind, scan_layers=True)

    def test_positions_keep_their_dtype(self):
        larger = with_image_size(make(param_dtype="bfloat16"), (9, 14))
        assert larger.positions.embedding.dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def results():
    """Result and gradients of each variant, in graph mode and with a loop over the layers, computed once."""
    known = {}

    def of(variant):
        if variant not in known:
            config = dataclasses.replace(CONFIG, **VARIANTS[variant])
            known[variant] = call_and_grads(VisionTransformer(nnx.Rngs(1), config), make_images())
        return known[variant]

    return of


@variants
@pytest.mark.thorough
def test_every_parameter_takes_part(results, variant):
    out, grads = results(variant)
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    tokens = PATCHES + config.num_register_tokens + config.use_cls_token
    assert out.shape == ((2, tokens, 12) if config.num_classes is None else (2, 7))
    assert np.isfinite(out).all() and all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
    idle = [jax.tree_util.keystr(path) for path, grad in jax.tree.leaves_with_path(grads) if not (grad != 0).any()]
    # The bias of LITE's gate moves all logits of a softmax: its gradient is 0, but for rounding errors.
    assert [name for name in idle if not name.endswith("['gate']['bias'].value")] == []


@variants
@pytest.mark.thorough
def test_scanned_layers_in_tree_mode_give_the_same(results, variant):
    out, grads = results(variant)
    with nnx.set_graph_mode(False):
        model = VisionTransformer(nnx.Rngs(1), dataclasses.replace(CONFIG, **VARIANTS[variant], scan_layers=True))
        scanned_out, scanned_grads = call_and_grads(model, make_images())
    np.testing.assert_allclose(scanned_out, out, atol=1e-5)
    total = partial(jax.tree.reduce, lambda sum_, grad: sum_ + np.square(grad).sum(), initializer=0.0)
    np.testing.assert_allclose(total(scanned_grads), total(grads), rtol=1e-4)


def test_losses_of_experts_come_out_of_run():
    run = nnx.jit(VisionTransformer.run)
    out = run(make(**VARIANTS["experts in every other of 3"] | {"num_layers": 1}), make_images())
    assert out.caches is None and out.aux["load_balance_loss"] > 0
    assert nnx.eval_shape(VisionTransformer.run, make(num_layers=1), make_images()).aux == {}


@pytest.mark.contract
def test_bfloat16_gives_float32_logits_close_to_those_of_float32():
    models = {dtype: make(dtype=dtype, num_layers=1) for dtype in ("bfloat16", "float32")}
    out = call_each(models, make_images())
    assert out["bfloat16"].dtype == jnp.float32
    np.testing.assert_allclose(out["bfloat16"], out["float32"], atol=5e-2)
    tokens = make(dtype="bfloat16", num_classes=None, num_layers=1)
    assert nnx.eval_shape(call, tokens, make_images()).dtype == jnp.bfloat16


def test_dropout_draws_from_the_given_rngs():
    model, images = make(dropout_rate=0.3, num_layers=1), make_images()
    one, two, other = (
        np.asarray(call(model, images, deterministic=False, rngs=nnx.Rngs(dropout=seed))) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert not np.allclose(one, other)
    rngs = nnx.Rngs(dropout=1)
    jax.eval_shape(lambda images: model(images, rngs=rngs), images)  # a draw would change a stream outside, and raise
    assert int(rngs.dropout.count[...]) == 0  # off by itself


def test_a_score_mod_sees_token_indices():
    model = make(num_classes=None, num_layers=1)
    hide = lambda scores, b, h, q, kv: jnp.where((q < PREFIX) & (kv >= PREFIX), -jnp.inf, scores)
    one, other = np.asarray(call(model, make_images(2), score_mod=hide))
    np.testing.assert_allclose(one[:PREFIX], other[:PREFIX], atol=1e-6)
    assert np.asarray(weigh(model, make_images(1), score_mod=hide))[..., :PREFIX, PREFIX:].max() == 0


class TestAttentionWeights:
    @pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "branch"])
    @pytest.mark.thorough
    def test_they_are_those_of_the_call(self, placement):
        model, images = make(norm_placement=placement), make_images()
        seen = []
        for block in model.stack.blocks:
            attend = block.attention.attention_fn

            def remember(query, key, *args, attend=attend, **options):
                seen.append(attention_weights(query, key))
                return attend(query, key, *args, **options)

            block.attention.attention_fn = remember
        model(images)
        for layer, expected in enumerate(list(seen)):
            weights = weigh(make(norm_placement=placement), images, layer)
            assert weights.shape == (2, 3, PREFIX + PATCHES, PREFIX + PATCHES)
            np.testing.assert_allclose(weights, expected, atol=1e-5)
        np.testing.assert_allclose(weigh(make(norm_placement=placement), images), weights, atol=1e-6)

    def test_scanned_layers_have_them_too(self):
        model, images = make(), make_images()

        @nnx.jit
        def both(model, scanned):
            plain = [model.attention_weights(images, layer) for layer in (0, 1)]
            return plain, [scanned.attention_weights(images, layer) for layer in (-2, -1)]

        for layer, pair in enumerate(zip(*both(model, with_scan_layers(model, True)), strict=True)):
            np.testing.assert_allclose(*pair, atol=1e-6, err_msg=f"layer {layer}")

    @pytest.mark.parametrize("layer", [2, -3])
    def test_another_layer_is_refused(self, layer):
        with pytest.raises(ValueError, match=f"layer must be the index of one of 2 layers; got layer={layer}"):
            make().attention_weights(make_images(), layer)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (
            np.zeros((6, 10, 2), np.float32),
            r"images must be \(batch, height, width, channels\) .* got images.shape=\(6, 10, 2\)",
        ),
        (
            np.zeros((1, 10, 6, 2), np.float32),
            r"image_size=\(6, 10\), num_channels=2; got images.shape=\(1, 10, 6, 2\)",
        ),
        (np.zeros((1, 2, 6, 10), np.float32), "Resize the images, or the model by `with_image_size`"),
        (np.zeros((1, 6, 10, 2), np.uint8), r"got images.dtype=uint8. Scale them first"),
        (np.zeros((1, 6, 10, 2), bool), "images must be floating; got images.dtype=bool"),
    ],
)
def test_wrong_images_are_refused_in_words(images, words):
    model = make()
    for call in (model, model.run, model.attention_weights):
        with pytest.raises(ValueError, match=words):
            call(images)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make(image_size=7), "image_size must be a multiple of patch_size"),
        (lambda: with_image_size(make(), 7), "image_size must be a multiple of patch_size"),
        (
            lambda: VisionTransformerConfig(image_size=(224, 216)),
            r"image_size must be a multiple of patch_size; got image_size=\(224, 216\), patch_size=\(16, 16\)",
        ),
        (
            lambda: VisionTransformerConfig(use_cls_token=False),
            "pool must be 'mean' without use_cls_token; got pool='cls', use_cls_token=False",
        ),
        (lambda: make(pos_emb_type="rope"), "pos_emb_type of an image must be learned, sinusoidal or none"),
        (lambda: make(pos_emb_type="sinusoidal", d_model=18), "d_model must be a multiple of 4.*got d_model=18"),
        (lambda: VisionTransformer(nnx.Rngs(0), patchsize=4), "Did you mean patch_size?"),
        (
            lambda: PatchEmbedding(nnx.Rngs(0), image_size=(6, 7), patch_size=3, num_channels=2, d_model=5),
            r"PatchEmbedding: image_size must be a multiple of patch_size; got image_size=\(6, 7\), patch_size=3",
        ),
        (
            lambda: PatchEmbedding(nnx.Rngs(0), image_size=6, patch_size=0, num_channels=2, d_model=5),
            "patch_size must be a whole number, at least 1, or a pair of them; got patch_size=0",
        ),
    ],
)
def test_wrong_models_are_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
