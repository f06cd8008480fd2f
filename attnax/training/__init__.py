"""Training a language model on text: corpus, steps, checkpoints, run folders.

Names are loaded when first used, so that a run folder is read without the packages that training needs.
"""

from __future__ import annotations

from attnax.lazy import lazy_imports

with lazy_imports(globals()):
    from attnax.training.batches import Batches as Batches
    from attnax.training.batches import Rows as Rows
    from attnax.training.checkpoints import DamagedCheckpointError as DamagedCheckpointError
    from attnax.training.checkpoints import checkpoint_arrays as checkpoint_arrays
    from attnax.training.checkpoints import checkpoint_steps as checkpoint_steps
    from attnax.training.checkpoints import delete_checkpoints_after as delete_checkpoints_after
    from attnax.training.checkpoints import latest_checkpoint as latest_checkpoint
    from attnax.training.checkpoints import restore_checkpoint as restore_checkpoint
    from attnax.training.checkpoints import restore_items as restore_items
    from attnax.training.checkpoints import save_checkpoint as save_checkpoint
    from attnax.training.corpus import Corpus as Corpus
    from attnax.training.corpus import read_corpus as read_corpus
    from attnax.training.feasible import require_memory as require_memory
    from attnax.training.feasible import require_traces as require_traces
    from attnax.training.images import ImageFolder as ImageFolder
    from attnax.training.images import image_folder as image_folder
    from attnax.training.optimizer import OptimizerConfig as OptimizerConfig
    from attnax.training.rows import TextRows as TextRows
    from attnax.training.run_folder import LockedError as LockedError
    from attnax.training.run_folder import RunFolder as RunFolder
    from attnax.training.run_folder import write_whole as write_whole
    from attnax.training.run_model import open_run as open_run
    from attnax.training.run_options import RunOptions as RunOptions
    from attnax.training.store import Store as Store
    from attnax.training.store import open_store as open_store
    from attnax.training.store_writer import make_store as make_store
    from attnax.training.stream import TokenStream as TokenStream
    from attnax.training.text_files import Document as Document
    from attnax.training.trainer import DivergenceError as DivergenceError
    from attnax.training.trainer import Metrics as Metrics
    from attnax.training.trainer import Trainer as Trainer
    from attnax.training.trainer import TrainState as TrainState
    from attnax.training.trainer import find_documents as find_documents
    from attnax.training.trainer import make_mesh as make_mesh
