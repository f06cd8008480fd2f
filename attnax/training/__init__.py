"""Training a language model on text: corpus, steps, checkpoints, run folders.

Names are loaded when first used, so that a run folder is read without the packages that training needs.
"""

from __future__ import annotations

from attnax.lazy import lazy_imports

with lazy_imports(globals()):
    from attnax.training.batches import Batches as Batches
    from attnax.training.batches import Rows as Rows
    from attnax.training.checkpoints import Checkpoints as Checkpoints
    from attnax.training.corpus import Corpus as Corpus
    from attnax.training.corpus import read_corpus as read_corpus
    from attnax.training.documents import find_documents as find_documents
    from attnax.training.feasible import memory_of_device as memory_of_device
    from attnax.training.feasible import require_memory as require_memory
    from attnax.training.feasible import require_traces as require_traces
    from attnax.training.flops import PEAK_FLOPS as PEAK_FLOPS
    from attnax.training.flops import Flops as Flops
    from attnax.training.flops import update_flops as update_flops
    from attnax.training.images import ImageFolder as ImageFolder
    from attnax.training.images import image_folder as image_folder
    from attnax.training.manifest import DamagedCheckpointError as DamagedCheckpointError
    from attnax.training.mesh import make_mesh as make_mesh
    from attnax.training.objectives import Batch as Batch
    from attnax.training.objectives import Loss as Loss
    from attnax.training.objectives import Objective as Objective
    from attnax.training.objectives import causal_lm as causal_lm
    from attnax.training.objectives import classification as classification
    from attnax.training.objectives import masked_lm as masked_lm
    from attnax.training.objectives import seq2seq as seq2seq
    from attnax.training.optimizer import OptimizerConfig as OptimizerConfig
    from attnax.training.plan import Memory as Memory
    from attnax.training.plan import Plan as Plan
    from attnax.training.plan import plan_training as plan_training
    from attnax.training.restore import best_checkpoint as best_checkpoint
    from attnax.training.restore import checkpoint_arrays as checkpoint_arrays
    from attnax.training.restore import checkpoint_steps as checkpoint_steps
    from attnax.training.restore import latest_checkpoint as latest_checkpoint
    from attnax.training.restore import restore_items as restore_items
    from attnax.training.rows import TextRows as TextRows
    from attnax.training.run_folder import LockedError as LockedError
    from attnax.training.run_folder import RunFolder as RunFolder
    from attnax.training.run_model import open_run as open_run
    from attnax.training.run_options import RunOptions as RunOptions
    from attnax.training.state import DivergenceError as DivergenceError
    from attnax.training.state import Evaluation as Evaluation
    from attnax.training.state import Metrics as Metrics
    from attnax.training.state import TrainState as TrainState
    from attnax.training.store import Store as Store
    from attnax.training.store import open_store as open_store
    from attnax.training.store_writer import make_store as make_store
    from attnax.training.stream import TokenStream as TokenStream
    from attnax.training.text_files import Document as Document
    from attnax.training.trainer import Trainer as Trainer
