"""Imports only go down: each file of the package imports from its own layer or below."""

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "attnax"
LAYERS = {
    "checks": 0,
    "config": 0,
    "config_fields": 0,
    "errors": 0,
    "pytrees": 0,
    "typing": 0,
    "reference": 0,
    "int8_rows": 0,
    "lazy": 0,
    "version": 0,
    "masks": 1,
    "cache": 1,
    "sharding": 1,
    "launcher": 1,
    "world": 1,
    "distributed": 1,
    "paged_cache": 1,
    "kernels": 2,
    "nn": 3,
    "generation": 3,
    "models": 4,
    "pretrained": 5,
    "text": 5,
    "training": 5,
    "visualize": 5,
    "cli": 6,
    "__main__": 7,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
NO_FLAX = {part for part, layer in LAYERS.items() if layer <= LAYERS["kernels"]} | {"generation"}
# The places of `kernels/`, from the bottom up. Every other file there is public and at the top.
# Score mods are data, and engines know some of them.
PLACES = ("_core", "score_mods"), ("_xla", "_gpu", "_tpu"), ("_engines", "_ring", "_call", "_decode_call")


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def imports(path):
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names += [f"{node.module}.{name.name}" for name in node.names]
    return names


def test_imports_go_down():
    for path in FILES:
        layer = LAYERS[part_of(path)]
        for name in imports(path):
            if name.startswith("attnax."):
                other = name.split(".")[1]
                assert other in LAYERS, f"{path}, {name}: import from the module that defines it"
                assert LAYERS[other] <= layer, f"{path} imports {name}"


def place_of(part):
    """The height of a file or folder of `kernels/` in `PLACES`."""
    return next((height for height, places in enumerate(PLACES) if part in places), len(PLACES))


def test_kernels_go_from_calls_to_engines_to_their_core():
    for path in (PACKAGE / "kernels").rglob("*.py"):
        mine = path.relative_to(PACKAGE / "kernels").parts[0].removesuffix(".py")
        for name in imports(path):
            if name.startswith("attnax.kernels."):
                other = name.split(".")[2]
                assert place_of(other) <= place_of(mine), f"{path} imports {name}"
                is_engine = other in PLACES[1]
                assert not (is_engine and mine not in (other, *PLACES[2])), f"{path} imports an engine, {name}"


def test_private_modules_of_kernels_are_imported_by_kernels_only():
    for path in FILES:
        private = [name for name in imports(path) if name.startswith("attnax.kernels._")]
        assert not private or part_of(path) == "kernels", f"{path} imports {private[0]}"


def test_heavy_packages_stay_in_their_place():
    for path in FILES:
        roots, part = {name.split(".")[0] for name in imports(path)}, part_of(path)
        assert "flax" not in roots or part not in NO_FLAX, path
        assert "jaxtyping" not in roots or part == "typing", path
        assert "matplotlib" not in roots or part == "visualize", path
        assert not roots & {"torch", "transformers", "safetensors"}, path
