"""Training a language model on text: corpus, steps, checkpoints, run folders.

Names are loaded when first used, so that a run folder is read without the packages that training needs.
"""

from __future__ import annotations

from attnax.lazy import lazy_imports

with lazy_imports(globals()):
    from attnax.training.checkpoints import DamagedCheckpointError as DamagedCheckpointError
    from attnax.training.checkpoints import checkpoint_arrays as checkpoint_arrays
    from attnax.training.checkpoints import checkpoint_steps as checkpoint_steps
    from attnax.training.checkpoints import delete_checkpoints_after as delete_checkpoints_after
    from attnax.training.checkpoints import latest_checkpoint as latest_checkpoint
    from attnax.training.checkpoints import restore_checkpoint as restore_checkpoint
    from attnax.training.checkpoints import restore_items as restore_items
    from attnax.training.checkpoints import save_checkpoint as save_checkpoint
    from attnax.training.corpus import Corpus as Corpus
    from attnax.training.corpus import Document as Document
    from attnax.training.corpus import TokenStream as TokenStream
    from attnax.training.corpus import read_corpus as read_corpus
    from attnax.training.documents import find_documents as find_documents
    from attnax.training.feasible import require_memory as require_memory
    from attnax.training.feasible import require_traces as require_traces
    from attnax.training.mesh import make_mesh as make_mesh
    from attnax.training.objectives import Batch as Batch
    from attnax.training.objectives import Loss as Loss
    from attnax.training.objectives import Objective as Objective
    from attnax.training.objectives import causal_lm as causal_lm
    from attnax.training.objectives import classification as classification
    from attnax.training.objectives import masked_lm as masked_lm
    from attnax.training.objectives import seq2seq as seq2seq
    from attnax.training.optimizer import OptimizerConfig as OptimizerConfig
    from attnax.training.run_folder import LockedError as LockedError
    from attnax.training.run_folder import RunFolder as RunFolder
    from attnax.training.run_folder import write_whole as write_whole
    from attnax.training.run_model import open_run as open_run
    from attnax.training.run_options import RunOptions as RunOptions
    from attnax.training.state import DivergenceError as DivergenceError
    from attnax.training.state import Evaluation as Evaluation
    from attnax.training.state import Metrics as Metrics
    from attnax.training.state import TrainState as TrainState
    from attnax.training.trainer import Trainer as Trainer
