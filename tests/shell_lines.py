"""The commands of this project on its pages: those in blocks, also in files for clusters, and those in sentences."""

import itertools
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^( *)(```+)(.*)\n((?:.*\n)*?)\1\2 *$", re.MULTILINE)
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\s*\n)[\s\S])+?)(?<!`)\1(?!`)")  # in one paragraph
SHELLS = ("", "bash", "sh", "console", "yaml")  # a block without a language is text, which may begin with a command
ASSIGNED = re.compile(r"^\s*(\w+)=(\"[^\"]*\"|[^\s\"$(]\S*)$", re.MULTILINE)
VARIABLE = re.compile(r"\\?\$\{?(\w+)\}?")
PLACEHOLDER = re.compile(r"<[^<>\n]+>")
STAND_IN = "1"  # a number, a path and a name
COUNTED = re.compile(r".*(?:ID|RANK)")  # variables that are counted from 0
ENDS = re.compile(r"[;&|]+|then|do|else")
OURS = r"(?:[\w./-]*/)?(?:attnax|python3?|make|pip)(?![\w.-])"
BEFORE = r"\$|exec|\w+=\S*"  # of a command
BEGINS = re.compile(rf"(?:^|{ENDS.pattern}|\"|\bsrun .*) *(?:(?:{BEFORE}) +)*{OURS} ")


@dataclass(frozen=True)
class Command:
    """The words of a command, and where they stand. `whole` is False in a sentence, which may leave words out."""

    page: str
    words: tuple[str, ...]
    whole: bool

    def __str__(self):
        return f"{self.page}: {shlex.join(self.words)}"


def pages():
    """(name, text) of README and others beside it, of the site's pages, and of the text in its notebooks.

    The changelog is left out: it also tells of commands that are gone.
    """
    beside = [path for path in sorted(ROOT.glob("*.md")) if path.name != "CHANGELOG.md"]
    for path in (*beside, *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "docs").rglob("*.rst"))):
        yield str(path.relative_to(ROOT)), path.read_text()
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        texts = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        yield str(path.relative_to(ROOT)), "\n\n".join(texts)


def commands(page, text):
    """The commands of a page, without the words before them; a line with a variable of several values is several."""
    variables = {}
    for block in FENCE.finditer(text):
        for name, value in ASSIGNED.findall(block[4]):
            variables.setdefault(name, []).append(value.strip('"'))
    for block in FENCE.finditer(text):
        if block[3].strip() in SHELLS:
            for line in block[4].replace("\\\n", " ").splitlines():
                yield from in_line(page, line, variables, whole=True)
    for span in SPAN.finditer(FENCE.sub("", text)):
        yield from in_line(page, " ".join(span[2].split()), variables, whole=False)


def in_line(page, line, variables, whole):
    if not BEGINS.search(line):
        return
    for variant in values(line, variables):
        reader = shlex.shlex(PLACEHOLDER.sub(STAND_IN, variant), posix=True, punctuation_chars=";&|")
        reader.whitespace_split = True
        try:
            words = list(reader)
        except ValueError as error:
            raise ValueError(f'{page}: {error} in "{line}". A block that is no command is ```text.') from error
        for is_end, found in itertools.groupby(words, lambda word: ENDS.fullmatch(word) is not None):
            if not is_end:
                yield from in_words(page, [word for word in found if word != "..."], variables, whole)


def in_words(page, words, variables, whole):
    words = list(itertools.dropwhile(re.compile(BEFORE).fullmatch, words))
    if words[:1] == ["srun"]:  # its own flags, and the command that each task runs
        words = list(itertools.dropwhile(lambda word: word.startswith("-"), words[1:]))
    if words[:2] == ["bash", "-c"]:
        yield from in_line(page, words[2], variables, whole)
    elif len(words) > 1 and re.fullmatch(OURS, words[0]):
        yield Command(page, tuple(words), whole)


def values(line, variables):
    """The line with each value of its variables; a variable that the page does not set has a stand-in."""
    names = sorted(set(VARIABLE.findall(line)))
    stand_ins = {name: ["0" if COUNTED.fullmatch(name) else STAND_IN] for name in names}
    for chosen in itertools.product(*(variables.get(name, stand_ins[name]) for name in names)):
        with_values = dict(zip(names, chosen, strict=True))
        replaced = VARIABLE.sub(lambda found, chosen=with_values: chosen[found[1]], line)
        yield from values(replaced, variables) if VARIABLE.search(replaced) else [replaced]
