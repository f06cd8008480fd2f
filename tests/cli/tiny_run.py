"""The flags of a small run, and the message of a command that is refused."""

from attnax.cli import main

READY = [
    *("--d-model", "16", "--num-heads", "2", "--num-kv-heads", "1", "--d-ff", "24", "--num-layers", "1"),
    *("--max-len", "32", "--batch-size", "4", "--learning-rate", "0.03"),
    *("--steps", "12", "--checkpoint-every", "5"),
]
"""With a tokenizer that is there already."""

TINY = [*READY, "--vocab-size", "300"]


def refuse(capsys, *arguments):
    """The one line of a command that is refused."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("attnax: ")
    return lines[0]
