"""Two processes that train nothing: each attempt of the launcher tries another thing of `attnax.distributed`."""

import os
import signal
import sys
import time

import jax
import numpy as np

from attnax.distributed import ProcessError, StopRequests, barrier, connect, disconnect, gather, is_main, leave


def computes(world):
    """The sum over the devices of both processes, in one program."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.NamedSharding(mesh, jax.P("data"))
    mine = np.arange(3, dtype=np.float32) + 3 * world.index
    total = jax.jit(lambda x: x.sum())(jax.make_array_from_process_local_data(cut, mine))
    print("sum", float(total), "of", gather("names", f"process {world.index}", 30), "main", is_main())
    print("again", gather("names", str(world.index), 30))


def fails(world):
    """Process 1 has a bug; the other one waits for it, and must not wait long."""
    if world.index == 1:
        raise RuntimeError("a bug")
    barrier("never", 60)  # its error would name it


def misses(world):
    """Process 1 is stopped; the barrier of the other one has a limit."""
    if world.index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        barrier("after the update", 1)
    except ProcessError as error:
        print("error", error)
        leave(1)


def hides_the_signal(world):
    """A Python handler of SIGTERM would hide it from JAX."""
    with StopRequests() as requests:
        signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            requests.agree_to_stop(1)
        except ProcessError as error:
            print("error", error)
    barrier("both have seen it", 30)
    leave(1)


def stops(world):
    """Ctrl-C in one process; both stop after the same update."""
    with StopRequests() as requests:
        for update in range(1, 10_000):
            time.sleep(0.01)
            if update == 3 and world.index == 1:
                os.kill(os.getpid(), signal.SIGINT)
            if requests.agree_to_stop(update):
                break
    print("stopped after", update)
    disconnect()
    sys.exit(requests.code)


ATTEMPTS = (fails, misses, hides_the_signal, stops)

if __name__ == "__main__":
    world = connect(seconds=60)
    computes(world)
    ATTEMPTS[int(os.environ["ATTNAX_ATTEMPT"]) - 1](world)
