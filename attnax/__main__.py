"""`python -m attnax` is the `attnax` command."""

from attnax.cli import entry

entry()
