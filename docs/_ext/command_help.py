"""The directive `command-help`: what `attnax COMMAND --help` prints, from the parser itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

COLUMNS = 92  # with the frame of a terminal, which is left out


def help_of(command: str) -> str:
    """The help of a command of `attnax`, without colours and frames, in lines of fewer than `COLUMNS` letters."""
    plain = {"COLUMNS": str(COLUMNS), "NO_COLOR": "1", "TERM": "dumb", "JAX_PLATFORMS": "cpu", "PYTHONUTF8": "1"}
    arguments = [sys.executable, "-m", "attnax", *command.split(), "--help"]
    run = subprocess.run(
        arguments, env=os.environ | plain, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    lines = [line for line in run.stdout.strip().splitlines() if not line.startswith("╰")]
    return "\n".join(re.sub(r"^╭─ (.*?) ─*╮$", r"\n\1", line).strip("│").rstrip() for line in lines)


class CommandHelp(SphinxDirective):
    """`command-help:: train` is the help of `attnax train`."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """A block of text."""
        text = help_of(self.arguments[0])
        block = nodes.literal_block(text, text, language="text", classes=["command-help"])
        return [block]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Adds the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
