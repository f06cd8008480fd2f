"""Errors that more than one layer raises, and the advice in them."""

import shlex
from pathlib import Path

from attnax.version import __version__


class InputError(ValueError):
    """A path, a flag or a checkpoint that a person gave cannot be used; the message says why and what to do."""


def install_command(extra: str) -> str:
    """What to type for the packages of an extra, such as `pip install -e '/home/me/attnax[train]'` for a clone.

    Outside of a clone the command names this version: the package index may have another one, whose extras differ. pip
    does not ask the index for a version that is installed.
    """
    clone = Path(__file__).parent.parent
    project = clone / "pyproject.toml"
    if project.is_file() and 'name = "attnax"' in project.read_text("utf-8"):
        return f"pip install -e {shlex.quote(f'{clone}[{extra}]')}"
    return f"pip install 'attnax[{extra}]=={__version__}'"
