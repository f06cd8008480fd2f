"""Strict tests: annotated shapes and dtypes are checked, warnings are errors, and rank promotion is an error."""

import gc
import os
import signal
import sys
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import jaxtyping
import pytest
from hypothesis import settings

# Properties run on a few fixed examples. `--hypothesis-profile thorough` has ten times as many, and `nightly` a hundred
# times as many, which are new in each run.
settings.register_profile("few", max_examples=5, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", parent=settings.get_profile("few"), max_examples=50)
settings.register_profile("nightly", max_examples=500, deadline=None, database=None)
settings.load_profile("few")

# A shell ignores SIGINT for what runs in its background, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Programs and their traces are millions of objects that live to the end; collecting garbage took a fifth of the time.
gc.set_threshold(200_000, 50, 50)

jax.config.update("jax_numpy_rank_promotion", "raise")

# Before the first import of attnax: its annotated functions check shapes and dtypes from now on.
_hook = jaxtyping.install_import_hook("attnax", "beartype.beartype")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Skips what has not begun by ATTNAX_TESTS_UNTIL, in seconds since 1970; the report counts what was skipped."""
    if time.time() > float(os.environ.get("ATTNAX_TESTS_UNTIL", "inf")):
        pytest.skip("the time of this run is over (ATTNAX_TESTS_UNTIL)")


def pytest_runtest_teardown():
    """Forgets compiled programs before there are too many.

    Each program has memory maps. A process may have 65,530 of them; beyond that XLA ends the process.
    """
    if sys.platform == "linux":
        with open("/proc/self/maps", "rb") as maps:
            if maps.read().count(b"\n") > 30_000:
                jax.clear_caches()


@pytest.fixture
def unchecked_shapes():
    """Turns off the import hook's checks of shapes, so that wrong arguments reach the library's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def count_compilations():
    """A list that gets an entry for every program that XLA compiles."""
    compiled = []
    event = "/jax/core/compile/backend_compile_duration"

    def listen(name, _seconds, **_kwargs):
        if name == event:
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    jax.monitoring.unregister_event_duration_listener(listen)
