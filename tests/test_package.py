"""The package for its users: a light import, every public name, and docstrings whose examples run."""

import builtins
import doctest
import importlib
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import pytest

import attnax
import attnax.cache
import attnax.paged_cache
from attnax.lazy import lazy_imports

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path for path in (ROOT / "attnax").rglob("*.py") if ">>> " in path.read_text())


def import_file(path):
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def needs_values(message):
    """Whether a message is about a traced array, which has no values."""
    return "trace" in str(message).lower()


def test_importing_is_light_and_kernels_masks_and_caches_need_no_flax_and_no_jaxtyping():
    code = """
import sys, time
start = time.process_time()
import jax
between = time.process_time()
import attnax
of_jax = (time.process_time() - between) / (between - start)
print(of_jax, any(name.split('.')[0] in ('flax', 'optax', 'orbax') for name in sys.modules))
for name in ('flax', 'jaxtyping', 'optax', 'orbax'):
    assert name not in sys.modules
    sys.modules[name] = None
from attnax import Sampler, init_kv_layer_cache, masks, standard_attention
import attnax.generation, attnax.reference
x = jax.ShapeDtypeStruct((1, 2, 3, 4), 'float32')
print(jax.eval_shape(lambda x: standard_attention(x, x, x, mask=masks.causal()), x).shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    light, shape = run.stdout.splitlines()
    of_jax, heavy = light.split()
    assert float(of_jax) < 0.1 and heavy == "False"  # of the time that importing JAX takes; about a hundredth
    assert shape == "(1, 2, 3, 4)"


def test_every_public_name_exists():
    names = attnax.__all__
    assert len(names) > 50 and len(set(names)) == len(names)
    assert [name for name in names if getattr(attnax, name) is None] == []
    assert set(names) <= set(dir(attnax))


def test_the_package_has_the_classes_and_functions_of_attention_and_its_caches():
    used_with_their_package = {"EmptyCache", "InSlots", "LayerCache", "StoredTokens", "check_rows", "forget"}
    used_with_their_package |= {"ScalarCache", "ScalarSlots", "init_scalar_cache"}
    used_with_their_package |= {"CacheCall", "StoresTokens", "Chunk", "Reading", "SlotChunks", "Source", "TokenArrays"}
    used_with_their_package |= {"nan_where_lost", "RowsOfText", "StackedCaches", "cache_kinds", "stack_caches"}
    used_with_their_package |= {"grow", "slots_in_use"}
    used_with_their_package |= {"NnxAttention", "attention_weights", "select_rows"}
    left_out = set()
    for package in (attnax.cache, attnax.kernels, attnax.paged_cache):
        public = {name: each for name, each in vars(package).items() if not name.startswith("_")}
        left_out |= {name for name, each in public.items() if isinstance(each, type | types.FunctionType)}
    assert left_out - set(attnax.__all__) == used_with_their_package


def test_threads_that_make_lazy_packages_at_the_same_time_leave_no_hook():
    original, may_leave = builtins.__import__, threading.Event()
    scopes = [{"__name__": "first"}, {"__name__": "second"}]

    def make(scope, entered, wait_for):
        with lazy_imports(scope):
            entered.set()
            wait_for.wait(0.1)
            exec("from math import pi", scope)

    # The first block would end before the second one does, if they could overlap.
    inside = threading.Event(), threading.Event()
    threads = [
        threading.Thread(target=make, args=(scopes[0], inside[0], inside[1])),
        threading.Thread(target=make, args=(scopes[1], inside[1], may_leave)),
    ]
    threads[0].start()
    inside[0].wait()
    threads[1].start()
    threads[0].join()
    may_leave.set()
    threads[1].join()
    assert builtins.__import__ is original
    assert all("pi" not in scope and scope["__getattr__"]("pi") > 3 for scope in scopes)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        attnax.nothing


@pytest.mark.contract
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_in_docstrings_run(path):
    # doctest finds each docstring once, in the module that defines it.
    failures, tried = doctest.testmod(import_file(path), optionflags=doctest.ELLIPSIS)
    assert failures == 0 and tried > 0


def test_examples_in_docstrings_are_traced_with_their_shapes():
    # Nothing is compiled: an example that needs values runs up to that line.
    finder, runner = doctest.DocTestFinder(), doctest.DebugRunner(optionflags=doctest.ELLIPSIS)
    examples = [test for path in EXAMPLES for test in finder.find(import_file(path)) if test.examples]
    whole, failed = [], {}

    def run(test):
        try:
            runner.run(test)
            whole.append(test.name)
        except doctest.UnexpectedException as error:
            if not needs_values(error.exc_info[1]):
                failed[test.name] = error.exc_info[1]
        except doctest.DocTestFailure as error:
            if not needs_values(error.got):
                failed[test.name] = error.got

    for test in examples:
        jax.eval_shape(lambda test=test: run(test))
    assert failed == {}
    assert len(whole) >= 25, whole


def test_the_makefile_has_readmes_commands():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    for target in ("train", "search", "test"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE) and f"make {target}" in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text()
