"""The mesh of a layout of TPUs, which this machine does not have."""

import dataclasses

import numpy as np

from attnax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A device of a square of TPUs, with what JAX reads to find its neighbours."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


def test_devices_that_differ_in_the_last_axis_alone_are_neighbours():
    devices = [Tpu(index, (index % 16, index // 16, 0)) for index in range(256)]
    mesh = Layout(fsdp=128, tensor=2).mesh(devices)
    assert mesh.devices.shape == (1, 128, 1, 1, 2)
    pairs = mesh.devices.reshape(128, 2)
    assert {np.abs(np.subtract(left.coords, right.coords)).sum() for left, right in pairs} == {1}
