"""Training a language model on text: corpus, steps, checkpoints, run folders.

Names are loaded when first used, so that a run folder is read without the packages that training needs.
"""

from __future__ import annotations

from attnax.lazy import lazy_imports

with lazy_imports(globals()):
    from attnax.training.checkpoints import Checkpoints as Checkpoints
    from attnax.training.corpus import Corpus as Corpus
    from attnax.training.corpus import Document as Document
    from attnax.training.corpus import TokenStream as TokenStream
    from attnax.training.corpus import read_corpus as read_corpus
    from attnax.training.feasible import require_memory as require_memory
    from attnax.training.feasible import require_traces as require_traces
    from attnax.training.manifest import DamagedCheckpointError as DamagedCheckpointError
    from attnax.training.optimizer import OptimizerConfig as OptimizerConfig
    from attnax.training.restore import best_checkpoint as best_checkpoint
    from attnax.training.restore import checkpoint_arrays as checkpoint_arrays
    from attnax.training.restore import checkpoint_steps as checkpoint_steps
    from attnax.training.restore import latest_checkpoint as latest_checkpoint
    from attnax.training.restore import restore_items as restore_items
    from attnax.training.run_folder import LockedError as LockedError
    from attnax.training.run_folder import RunFolder as RunFolder
    from attnax.training.run_folder import write_whole as write_whole
    from attnax.training.run_model import open_run as open_run
    from attnax.training.run_options import RunOptions as RunOptions
    from attnax.training.trainer import DivergenceError as DivergenceError
    from attnax.training.trainer import Metrics as Metrics
    from attnax.training.trainer import Trainer as Trainer
    from attnax.training.trainer import TrainState as TrainState
    from attnax.training.trainer import find_documents as find_documents
    from attnax.training.trainer import make_mesh as make_mesh
