"""Training a language model on text: corpus, tokenizer, steps, checkpoints."""

from attnax.training.checkpoints import latest_checkpoint, restore_checkpoint, save_checkpoint
from attnax.training.corpus import Corpus, Document, TokenStream, read_corpus
from attnax.training.optimizer import OptimizerConfig
from attnax.training.tokenizer import DOCUMENT, Tokenizer, byte_tokenizer, train_bpe
from attnax.training.trainer import Metrics, Trainer, TrainState, find_documents

__all__ = [
    "DOCUMENT",
    "Corpus",
    "Document",
    "Metrics",
    "OptimizerConfig",
    "TokenStream",
    "Tokenizer",
    "TrainState",
    "Trainer",
    "byte_tokenizer",
    "find_documents",
    "latest_checkpoint",
    "read_corpus",
    "restore_checkpoint",
    "save_checkpoint",
    "train_bpe",
]
