"""Damaged files raise nothing but CheckpointError."""

import copy
import json
import shutil

import numpy as np
import pytest
from golden_copies import FOLDER, NAMES, config_of
from tiny import SEED

from attnax.pretrained import CheckpointError, load_pretrained
from attnax.pretrained.families import FAMILIES


def odd_value(rng):
    values = [
        None,
        True,
        -1,
        0,
        1,
        3,
        2**31,
        2**63,
        10**400,
        1.5,
        1e308,
        "",
        "silu",
        "é",
        [],
        [[]],
        {},
        {"rope_type": 3},
    ]
    return copy.deepcopy(values[rng.integers(len(values))])


def few_and_many(few, many):
    """A few of the mutations run in `make test`, all of them in `make ci`."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.contract)])


@few_and_many(12, 300)
@pytest.mark.parametrize("name", NAMES)
def test_of_mutated_configs_only_our_own_exception_comes_out(name, count):
    rng = np.random.default_rng(SEED)
    config = config_of(name)
    family = next(family for family in FAMILIES if [family.architecture] == config["architectures"])
    refused = 0
    for _ in range(count):
        mutated = copy.deepcopy(config)
        for _ in range(rng.integers(1, 3)):
            holders = [mutated, *(value for value in mutated.values() if isinstance(value, dict) and value)]
            holder = holders[rng.integers(len(holders))]
            key = list(holder)[rng.integers(len(holder))]
            if rng.integers(4):
                holder[key] = odd_value(rng)
            else:
                del holder[key]
        try:
            family.read_config(mutated, "config.json")
        except CheckpointError:
            refused += 1
    assert refused > count / 6


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 10),
        *(pytest.param(name, 40, marks=pytest.mark.contract) for name in ("gpt2", "t5_variant", "gemma3", "qwen3_moe")),
    ],
)
def test_of_models_that_mutated_configs_describe_only_our_own_exception_comes_out(name, count, tmp_path):
    """The config stays valid JSON, and the files are compared with it."""
    rng = np.random.default_rng(2)
    config = config_of(name)
    refused = 0
    for _ in range(count):
        mutated = {key: value for key, value in config.items() if rng.integers(12)}
        key = list(config)[rng.integers(len(config))]
        mutated[key] = odd_value(rng)
        try:
            shutil.copytree(FOLDER / name, tmp_path, dirs_exist_ok=True)
            (tmp_path / "config.json").write_text(json.dumps(mutated))
            load_pretrained(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > count / 4


@few_and_many(20, 80)
def test_of_mutated_folders_only_our_own_exception_comes_out(tmp_path, count):
    """All files of a sharded checkpoint, read by `load_pretrained`."""
    rng = np.random.default_rng(1 + SEED)
    shutil.copytree(FOLDER / "llama3", tmp_path, dirs_exist_ok=True)
    files = [path for path in sorted(tmp_path.iterdir()) if path.suffix in (".json", ".safetensors")]
    refused = 0
    for _ in range(count):
        path = files[rng.integers(len(files))]
        content = path.read_bytes()
        place = int(rng.integers(min(len(content), 3000)))
        path.write_bytes(content[:place] + rng.bytes(rng.integers(3)) + content[place + int(rng.integers(3)) :])
        try:
            load_pretrained(tmp_path)
        except CheckpointError:
            refused += 1
        path.write_bytes(content)
    assert refused > count / 2
