"""A training goes on from its checkpoint on other devices: the same arrays, and the losses of one device."""

import jax
import numpy as np
import pytest
from small_training import SmallTraining

from attnax import Layout
from attnax.training import Checkpoints

LAYOUTS = ((None, 1), (Layout(fsdp=2, tensor=4), 8), (Layout(fsdp=2), 2))


@pytest.mark.contract
def test_a_training_goes_on_on_any_layout(tmp_path):
    """Two updates on each: order of the data and dropout do not depend on the devices."""
    alone, losses, want = SmallTraining(), [], []
    state = alone.init()
    for _ in range(2 * len(LAYOUTS)):
        state, loss = alone.step(state)
        want.append(float(loss))
    with Checkpoints(tmp_path) as saving:
        saved = alone.init()
        saving.save(0, saved)
        for number, (layout, count) in enumerate(LAYOUTS):
            training = alone if layout is None else SmallTraining(layout, jax.devices()[:count])
            done, state = saving.restore(training.likes)
            assert done == 2 * number
            for have, one, like in zip(*map(jax.tree.leaves, (state, saved, training.likes)), strict=True):
                assert np.asarray(have).tobytes() == np.asarray(one).tobytes()
                assert layout is None or (have.sharding == like.sharding and len(have.sharding.device_set) == count)
            for _ in range(2):
                state, loss = training.step(state)
                losses.append(float(loss))
            saving.save(done + 2, state)
            saved = jax.device_get(state)
    np.testing.assert_allclose(losses, want, atol=1e-5)
    assert any(len(x.sharding.spec) for x in jax.tree.leaves(SmallTraining(*LAYOUTS[1][:1]).likes["opt_state"]))
