"""A process that joins the others, says who they are, and leaves."""

import jax

from attnax.distributed import connect, disconnect, gather

world = connect(seconds=30.0)
everyone = gather("indices", str(world.index), 30.0)
print(f"{world.source}: {world.index} of {world.count}, {everyone}, {jax.device_count()} devices", flush=True)
disconnect(30.0)
