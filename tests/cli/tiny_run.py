"""The flags of a run that is small."""

TINY = [
    *("--d-model", "16", "--num-heads", "2", "--num-kv-heads", "1", "--d-ff", "24", "--num-layers", "1"),
    *("--max-len", "32", "--vocab-size", "300", "--batch-size", "4", "--learning-rate", "0.03"),
    *("--steps", "12", "--checkpoint-every", "5"),
]
