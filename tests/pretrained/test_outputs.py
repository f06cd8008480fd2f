"""Published checkpoints give the results of transformers, which tests/parity/pretrained.py stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from golden_copies import (
    DIFFERENT,
    FOLDER,
    NAMES,
    check_outputs,
    config_of,
    load,
    load_float32,
    outputs_of,
    run,
    tensors_of,
)

from attnax.models import with_image_size
from attnax.nn import with_scan_layers
from attnax.pretrained import save_pretrained
from attnax.pretrained.families import FAMILIES


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DIFFERENT else pytest.mark.contract) for name in NAMES]
)
def test_outputs_are_the_same_with_padding_too(name):
    golden = outputs_of(name)
    check_outputs(run(load_float32(name), golden), golden)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.contract if name in DIFFERENT else pytest.mark.thorough)
        for name in NAMES
        if "tokens" in outputs_of(name)
    ],
)
def test_greedy_texts_of_padded_prompts_are_the_same(name):
    golden = outputs_of(name)
    model = nnx.jit(with_scan_layers, static_argnums=1)(load_float32(name), True)  # one layer compiles faster than all
    length = golden["tokens"].shape[1]
    if "target_ids" in golden:
        written = model.generate(golden["ids"], length, start_token=0, source_padding_mask=golden["real"])
    else:
        written = model.generate(golden["ids"], padding_mask=golden["real"], max_new_tokens=length)
    np.testing.assert_array_equal(written.tokens, golden["tokens"])
    np.testing.assert_allclose(written.log_probs, golden["log_probs"], atol=2e-4)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers", "vit"])
def test_positions_at_other_image_sizes_are_the_same(name):
    golden = {key: table for key, table in outputs_of(name).items() if key.startswith("positions_")}
    assert len(golden) == 3
    for key, table in golden.items():
        size = tuple(map(int, key.removeprefix("positions_").split("x")))
        np.testing.assert_allclose(with_image_size(load(name), size).positions.embedding[...], table, atol=2e-6)


@pytest.mark.contract
@pytest.mark.parametrize("name", [name for name in NAMES if (FOLDER / name / "gradients.safetensors").exists()])
def test_gradients_are_the_same(name, tmp_path):
    golden = outputs_of(name)
    graphdef, state = nnx.split(load(name))

    @jax.jit
    @jax.grad
    def gradients(state):
        target = [golden["target_ids"][:1]] if "target_ids" in golden else []
        return jnp.square(nnx.merge(graphdef, state)(golden["ids"][:1], *target)).mean()

    save_pretrained(nnx.merge(graphdef, gradients(state)), tmp_path)
    ours, theirs = tensors_of(tmp_path), safetensors.numpy.load_file(FOLDER / name / "gradients.safetensors")
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(value).max() for value in theirs.values())
    for tensor, value in theirs.items():  # the gradient of a key's bias is 0, or rounding noise
        np.testing.assert_allclose(ours[tensor], value, rtol=0, atol=2e-5 * max(np.abs(value).max(), 1e-2 * largest))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_every_family_has_a_golden(family):
    assert any(config_of(name)["architectures"] == [family.architecture] for name in NAMES)
