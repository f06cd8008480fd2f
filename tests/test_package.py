"""The package as people meet it: light to import, every name where it should be, documents that run."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import attnax

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    name for _, name, _ in pkgutil.walk_packages(attnax.__path__, "attnax.") if not name.endswith("__main__")
)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_is_light():
    code = """
import sys, time, jax
start = time.perf_counter()
import attnax
print(time.perf_counter() - start, any(name.split('.')[0] in ('flax', 'optax', 'orbax') for name in sys.modules))
"""
    seconds, heavy = run_python(code).split()
    assert float(seconds) < 0.2 and heavy == "False"


def test_kernels_masks_and_caches_need_no_flax_and_no_jaxtyping():
    code = """
import sys
for name in ('flax', 'jaxtyping', 'optax', 'orbax'):
    sys.modules[name] = None
import jax.numpy as jnp
from attnax import Sampler, init_kv_layer_cache, masks, standard_attention
import attnax.generation, attnax.reference
x = jnp.ones((1, 2, 3, 4))
print(standard_attention(x, x, x, mask=masks.causal()).shape)
"""
    assert run_python(code).strip() == "(1, 2, 3, 4)"


@pytest.mark.parametrize("name", attnax.__all__)
def test_every_public_name_exists(name):
    assert getattr(attnax, name) is not None
    assert name in dir(attnax)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        attnax.nothing


def test_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace = {"__name__": "readme"}
    for block in blocks:
        printed = re.findall(r"print\((.*?)\)  # (.*)", block)
        exec(compile(block, "README.md", "exec"), namespace)
        for expression, comment in printed:
            values = eval(f"({expression},)", namespace)
            assert " ".join(map(str, values)) == comment.strip()


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    # Without the type checks' wrappers doctest finds each docstring once, in the module that defines it.
    module = importlib.import_module(name)
    failures, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failures == 0


def test_there_are_examples_in_docstrings():
    finder = doctest.DocTestFinder()
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) >= 8


def test_the_makefile_has_readmes_commands():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    for target in ("train", "search", "test"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE) and f"make {target}" in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text()
