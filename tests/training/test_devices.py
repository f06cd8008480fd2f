"""Which rows of a batch a process gives."""

import jax
import pytest

from attnax import Layout, TransformerConfig
from attnax.training import OptimizerConfig, Trainer, causal_lm
from attnax.training.devices import Devices, part_of


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{0}, {1}, {2}], [(0, 3), (1, 3), (2, 3)]),
        ([{0, 1}, {2, 3}], [(0, 2), (1, 2)]),
        ([{2, 3}, {0, 1}], [(1, 2), (0, 2)]),  # devices may be in another order
        ([{0}, {0}, {1}, {1}], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor goes over two processes
        ([{0}, {0}], [(0, 1), (0, 1)]),
    ],
)
def test_the_part_of_a_process_follows_from_the_rows_of_its_devices(rows, parts):
    held = dict(enumerate(rows))
    assert [part_of(process, held) for process in held] == parts


@pytest.mark.parametrize("rows", [[{0, 1}, {1, 2}], [{0, 2}, {1, 3}], [{0, 1}, {2}], [{0, 1}, {0, 2}, {1, 2}]])
def test_every_process_refuses_rows_that_are_no_part(rows):
    held = dict(enumerate(rows))
    for process in held:
        with pytest.raises(ValueError, match=r"each process must hold one part .* got rows \[.*\] of \d in process \d"):
            part_of(process, held)


def test_processes_without_a_layout_would_each_train_their_own(monkeypatch):
    model = TransformerConfig(vocab_size=7, d_model=8, num_heads=2, num_layers=1, d_ff=16)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"2 processes must have a layout.* Take Layout\(\)."):
        Trainer(model, causal_lm(), OptimizerConfig(steps=1))


def test_devices_of_one_process_alone_are_refused_beside_others(monkeypatch):
    mesh = Layout().mesh()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"devices must be some of each of the 2 processes; got those of \[0\]"):
        Devices(mesh)
