"""Two processes that save and restore together, and meet what a disk can do. Their first attempt is killed."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.multihost import multihost

from attnax.distributed import ProcessError, barrier, connect, disconnect
from attnax.errors import InputError
from attnax.launcher.pulse import PULSE
from attnax.training import Checkpoints, DamagedCheckpointError, manifest, restore_items, rounds, same_disk
from attnax.training import checkpoints as module

VALUES = {
    "cut": np.arange(6, dtype=np.float32).reshape(2, 3),
    "whole": np.arange(5, dtype=np.int32),
    "numpy": np.float32(7),
    "mine": np.arange(3, dtype=np.int8),
}


def place():
    """One array that is cut over the processes, one that both hold, one of NumPy, and one of each process alone."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"cut": jax.P("data"), "whole": jax.P()}
    placed = {
        name: jax.make_array_from_callback(VALUES[name].shape, jax.NamedSharding(mesh, spec), VALUES[name].__getitem__)
        for name, spec in specs.items()
    }
    return {"state": placed | {"numpy": VALUES["numpy"], "mine": jax.device_put(VALUES["mine"])}, "empty": ()}


def check_equal(items, likes):
    for name, like in likes["state"].items():
        found = items["state"][name]
        assert found.dtype == like.dtype and found.shape == like.shape
        if isinstance(like, jax.Array):
            assert found.sharding == like.sharding
        for shard in found.addressable_shards:
            assert np.asarray(shard.data).tobytes() == VALUES[name][shard.index].tobytes()


def say(name, *words):
    print(f"{name}:", *words, flush=True)


def meets(kind, call):
    """The words of the error that comes, with its kind."""
    try:
        call()
    except kind as error:
        return f"{type(error).__name__} {error}"
    raise AssertionError(f"no {kind.__name__}")


class Savers:
    """What one of the two processes does."""

    def __init__(self, world, folder):
        self.is_first, self.folder, self.items = world.index == 0, folder, place()

    @contextlib.contextmanager
    def broken_in(self, process, place, name, error):
        """One process meets an error."""

        def fail(*_, **__):
            raise error

        original = getattr(place, name)
        if self.is_first == (process == 0):
            setattr(place, name, fail)
        yield
        setattr(place, name, original)

    def names(self):
        barrier("before names", 30)
        found = sorted(path.name for path in self.folder.iterdir())
        barrier("after names", 30)
        return found

    def keeps(self):
        with Checkpoints(self.folder, keep_last=2, keep_best=1) as saving:
            assert saving.restore(self.items) is None
            for update, metric in ((1, 0.5), (2, 0.1), (3, 0.7), (4, 0.6)):
                saving.save(update, self.items, metric=metric)
                saving.check()
        say("pulse", Path(os.environ[PULSE]).read_text())
        say("kept", self.names())
        step, items = Checkpoints(self.folder).restore(self.items)
        assert step == 4
        check_equal(items, self.items)
        say("devices", manifest.Manifest.read(self.folder, 4).num_devices)

    def reads_alone(self):
        """Process 0 reads while the other one is elsewhere."""
        if self.is_first:
            likes = {"state": VALUES}
            step, items = restore_items(self.folder, likes)
            assert step == 4
            for name, want in VALUES.items():
                assert np.asarray(items["state"][name]).tobytes() == want.tobytes()
        barrier("process 0 has read", 30)
        say("alone", "process 0 has read")

    def reads_of_one(self, alone):
        step, items = restore_items(alone, self.items)
        assert step == 1
        check_equal(items, self.items)
        say("resharded", step)

    def refuses(self):
        with Checkpoints(self.folder) as saving:
            saving.restore(self.items)
            say("refused", meets(ValueError, lambda: saving.save(4, self.items)))
            say("refused", meets(InputError, lambda: saving.restore(self.items, step=9)))
            say("refused", meets(InputError, lambda: Checkpoints(self.folder, owner="x").restore(self.items)))
            with self.broken_in(0, module, "mark", PermissionError(errno.EACCES, "Permission denied", "the mark")):
                say("refused", meets(PermissionError, lambda: saving.save(5, self.items)))
            with self.broken_in(1, module, "_check_items", TypeError("a bug")):
                say("bug", meets((ProcessError, TypeError), lambda: saving.save(5, self.items)))

    def damaged(self):
        path = next((self.folder / "4").rglob("manifest.ocdbt"))
        content = path.read_bytes()
        barrier("read", 30)
        if self.is_first:
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        barrier("changed", 30)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step, items = restore_items(self.folder, self.items)
        check_equal(items, self.items)
        say("damaged", step, [str(warning.message) for warning in caught])
        say("asked", meets(DamagedCheckpointError, lambda: restore_items(self.folder, self.items, step=4)))
        barrier("both have seen it", 30)
        if self.is_first:
            path.write_bytes(content)
        barrier("mended", 30)

    def fails(self):
        """The disk of process 1 is full, first for Orbax and then for `fsync`; the next save succeeds."""
        full = OSError(errno.ENOSPC, "No space left on device", "a file")
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        with Checkpoints(self.folder, keep_last=3) as saving:
            if not self.is_first:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
            saving.save(5, self.items)
            say("full", meets(OSError, saving.wait))
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            say("left", self.names())
            for process in (1, 0):
                with self.broken_in(process, manifest, "_hash_and_sync", full):
                    saving.save(5, self.items)
                    say("full", meets(OSError, lambda: self.goes_on(saving)))
            with self.broken_in(0, manifest, "write_durable", full):
                saving.save(5, self.items)
                say("full", meets(OSError, saving.wait))
            saving.check()
            saving.save(6, self.items)
        say("left", self.names())

    def waits_for_orbax(self):
        """Process 0 fails where Orbax's own barriers are: they have a limit, which is 1 s here."""
        multihost._DEFAULT_BARRIER_TIMEOUT = 1
        full = OSError(errno.ENOSPC, "No space left on device", "a folder")
        with Checkpoints(self.folder, keep_last=3) as saving:
            with self.broken_in(0, ocp.AsyncCheckpointer, "save", full):
                saving.save(7, self.items)
            say("orbax", meets(OSError, saving.wait))
            rounds._PATIENCE = 0.2
            with self.broken_in(0, ocp.AsyncCheckpointer, "save", full):
                saving.save(7, self.items)
            say("late", meets((OSError, ProcessError), saving.wait))
            rounds._PATIENCE, multihost._DEFAULT_BARRIER_TIMEOUT = 300.0, 300

    def goes_on(self, saving):
        for update in range(10_000):
            barrier(f"update {update}", 30)
            saving.check()
            time.sleep(0.01)

    def not_shared(self):
        """Each process has a disk of its own, whose folder has the same name."""
        here, own = Path.cwd(), self.folder.parent / f"disk{int(not self.is_first)}"
        own.mkdir()
        os.chdir(own)
        same_disk._LATE = 0.2
        with Checkpoints(Path("local")) as saving:
            say("apart", meets(InputError, lambda: saving.save(1, self.items)))
        if self.is_first:
            shutil.copytree(self.folder, "copy")
        say("apart", meets(InputError, lambda: Checkpoints(Path("copy")).restore(self.items)))
        os.chdir(here)

    def dies(self):
        """Process 1 is killed when the files of a save are there."""
        with Checkpoints(self.folder) as saving:
            saving.save(7, self.items)
            saving.wait()
            if not self.is_first:
                manifest._hash_and_sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
            saving.save(8, self.items)
            saving.wait()

    def goes_on_after_death(self):
        say("remains", self.names())
        step, items = Checkpoints(self.folder).restore(self.items)
        check_equal(items, self.items)
        say("found", step, self.names())


if __name__ == "__main__":
    savers = Savers(connect(seconds=60), Path(sys.argv[1]) / "checkpoints")
    if os.environ["ATTNAX_ATTEMPT"] == "1":
        savers.keeps()
        savers.reads_alone()
        savers.reads_of_one(Path(sys.argv[1]) / "alone")
        savers.refuses()
        savers.damaged()
        savers.fails()
        savers.waits_for_orbax()
        savers.not_shared()
        savers.dies()
    savers.goes_on_after_death()
    disconnect()
