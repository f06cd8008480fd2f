"""The commands on the pages are right: their flags, targets, files and extras exist. None of the commands runs."""

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest
from shell_lines import ROOT, STAND_IN, Command, commands, pages

from attnax.cli.command import _parse
from attnax.errors import InputError

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][\w-]*):(?!=)", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"\$\$?[({]?([A-Z_]+)|^ifndef ([A-Z_]+)", MAKEFILE, re.MULTILINE))
VARIABLES = {name for names in VARIABLES for name in names}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
OF_THE_REPOSITORY = ("examples/", "benchmarks/", "tests/", "docs/")
NEEDED = {  # the words without which a command cannot be parsed, and which a sentence leaves out
    "generate": (STAND_IN,),
    "inspect": (STAND_IN,),
    "tokenize": (STAND_IN, "--out", STAND_IN),
    "launch": ("--processes", STAND_IN),
}


def fault(command):
    """What is wrong with a command, or None; also if it is none of this project's."""
    program, *words = command.words
    match Path(program).name, words:
        case "attnax", _:
            return fault_of_attnax(words, command.whole)
        case "make", _:
            return fault_of_make(words)
        case "pip", ["install", *_]:
            return fault_of_pip(words)
        case "python" | "python3", ["-m", "attnax", *rest]:
            return fault_of_attnax(rest, command.whole)
        case "python" | "python3", ["-m", "pytest", *rest]:
            return missing(word for word in rest if not word.startswith("-"))
        case "python" | "python3", [script, *rest] if script.startswith(OF_THE_REPOSITORY):
            return missing([script]) or fault_of_flags(script, rest)
    return None


def fault_of_attnax(words, whole):
    words = ["train" if word == "COMMAND" else word for word in words if word != "--help"]
    if not words:
        return None
    command = words[0]
    if "--" in words:
        split = words.index("--")
        words, program = words[:split], words[split + 1 :]
        trained = program[1:] if program[:1] == ["attnax"] else program
        wrong = (
            fault_of_attnax(trained, whole) if trained[:1] == ["train"] else fault(Command("", tuple(program), whole))
        )
        if wrong:
            return wrong
    program = ["--", "train", "--out", STAND_IN] if command == "launch" else []
    ways = [[*words, *program]]
    if not whole:
        needed = [command, *NEEDED.get(command, ()), *words[1:]]
        ways += [[*needed, *program], [*words, STAND_IN, *program], [*needed, STAND_IN, *program]]
    refusals = []
    for way in ways:
        refusals.append(refusal(tuple(way)))
        if refusals[-1] is None:
            return None
    return "; ".join(refusals)


@functools.cache
def refusal(words):
    try:
        _parse(list(words)).check()
    except InputError as error:
        return str(error)
    return None


def fault_of_make(words):
    for word in words:
        name, sets, _ = word.partition("=")
        if name not in (VARIABLES if sets else TARGETS):
            return f"Makefile has no {'variable' if sets else 'target'} {name}"
    return None


def fault_of_pip(words):
    asked = [found[1].split(",") for word in words if (found := re.fullmatch(r"(?:\.|.*attnax.*)\[(.*)\]", word))]
    unknown = [extra for extras in asked for extra in extras if extra not in EXTRAS]
    return f"pyproject.toml has no extra {unknown[0]}" if unknown else None


def missing(paths):
    gone = [path for path in paths if not (ROOT / path).exists()]
    return f"no file {gone[0]}" if gone else None


def fault_of_flags(script, words):
    """A flag is added to a parser in the script or in a file beside it that it imports, or a parameter of `main`."""
    flags, files = [], [ROOT / script]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(ast.Attribute(attr="add_argument"), [ast.Constant(flag), *_]):
                    flags.append(re.escape(flag))
                case ast.Call(ast.Attribute(attr="add_argument"), [ast.JoinedStr(parts) as flag, *_]):
                    given = [part.value if isinstance(part, ast.Constant) else None for part in parts]
                    if not "".join(filter(None, given)).strip("-"):
                        return f"{file.name} has a flag that may be any: {ast.unparse(flag)}"
                    flags.append("".join(".+" if text is None else re.escape(text) for text in given))
                case ast.FunctionDef("main", arguments):
                    names = (argument.arg for argument in (*arguments.args, *arguments.kwonlyargs))
                    flags += ["--" + name.replace("_", "-") for name in names]
                case ast.ImportFrom(str(module)) if file == files[0]:
                    files += [path for path in [file.parent / f"{module}.py"] if path.exists()]
    known = re.compile("|".join(flags))
    wrong = [word for word in words if word.startswith("--") and not known.fullmatch(word.partition("=")[0])]
    return f"{script} has no {wrong[0]}" if wrong else None


def test_commands_of_pages_are_right():
    found = {command for page, text in pages() for command in commands(page, text)}
    programs = [Path(command.words[0]).name for command in found]
    least = {"attnax": 61, "make": 61, "pip": 16}
    assert {name: count for name in least if (count := programs.count(name)) < least[name]} == {}
    assert {str(command): wrong for command in found if (wrong := fault(command))} == {}


BLOCK, SENTENCE = "```\n{}\n```\n", "Type `{}` here."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BLOCK.format("attnax train --stepz 5  # comment"), "--stepz"),
        (BLOCK.format("attnax train --steps \\\n    --pack"), "--steps"),
        (BLOCK.format("attnax train \\\n    --stepz 5"), "--stepz"),
        (
            BLOCK.format("cd attnax && JAX_PROCESS_ID=0 .venv/bin/attnax generate runs/000 --temprature 1"),
            "--temprature",
        ),
        (BLOCK.format("python -m attnax inspect --layout fsdp=4"), "FOLDER"),
        (BLOCK.format("$ attnax writes runs/000"), "there is no command 'writes'"),
        (BLOCK.format("attnax train --layout fsdq=4"), "fsdq"),
        (BLOCK.format("attnax launch --processes 2 -- train --outt runs/a"), "--outt"),
        (BLOCK.format("attnax launch --processez 2 -- train --out runs/a"), "Missing"),
        (BLOCK.format("attnax launch --processes 2 -- attnax train --stepz 5 --out runs/a"), "--stepz"),
        (BLOCK.format("attnax launch --processes 2 -- python examples/digit.py"), "no file examples/digit.py"),
        (
            BLOCK.format('if test; then\n  flags="--resume a"\nelse\n  flags="--dota b"\nfi\nattnax train $flags'),
            "--dota",
        ),
        (BLOCK.format('srun -n=2 bash -c "exec attnax launch --node \\$ID -- train"'), "--processes"),
        ("```yaml\nrun: |\n  exec attnax train --out $run --fsdp 2\n```\n", "--fsdp"),
        (SENTENCE.format("attnax generate --beem 4"), "--beem"),
        (SENTENCE.format("attnax train --layout\nfsdq=4"), "fsdq"),
        (SENTENCE.format("make tests"), "no target tests"),
        (SENTENCE.format("make bench KINDS=avx2"), "no variable KINDS"),
        (SENTENCE.format('pip install -e ".[train,image]"'), "no extra image"),
        (SENTENCE.format("python -m pytest tests/layers/"), "no file tests/layers/"),
        (SENTENCE.format("python examples/digits.py --epoch 3"), "no --epoch"),
        (SENTENCE.format("python3 benchmarks/gpu.py --tile"), "no --tile"),
    ],
)
def test_a_wrong_command_is_found(text, words):
    faults = [wrong for command in commands("page.md", text) if (wrong := fault(command))]
    assert len(faults) == 1
    assert words in faults[0]


@pytest.mark.parametrize(
    "text",
    [
        BLOCK.format("attnax train --data <your folder> --steps $STEPS --out ${FOLDER}"),
        BLOCK.format("attnax launch --nodes $SLURM_NNODES --node \\$ID --processes 1 -- train --out a"),
        BLOCK.format("It's the text of a program, whose users make attempts."),
        SENTENCE.format("attnax generate --stop"),
        SENTENCE.format("attnax COMMAND --help"),
        SENTENCE.format("attnax launch ... -- train ..."),
        SENTENCE.format("attnax.masks"),
        SENTENCE.format("pip install 'jax[cuda13]'"),
        SENTENCE.format("make ... PYTHON=python3.11"),
    ],
)
def test_stand_ins_and_other_code_are_no_faults(text):
    assert [wrong for command in commands("page.md", text) if (wrong := fault(command))] == []


def test_a_line_that_no_shell_reads_is_told_with_its_page():
    with pytest.raises(ValueError, match=r"page\.md: No closing quotation in \"make sure that it's open\"\. A block"):
        list(commands("page.md", BLOCK.format("make sure that it's open")))


@pytest.mark.parametrize(
    ("flag", "word", "wrong"),
    [
        ('f"--no-{name}"', "--no-cache", None),
        ('f"--no-{name}"', "--cache", "flags.py has no --cache"),
        ('f"--{name}"', "--cache", "flags.py has a flag that may be any: f'--{name}'"),
        ('f"--{first}-{second}"', "--cache", "flags.py has a flag that may be any: f'--{first}-{second}'"),
    ],
)
def test_a_flag_made_of_parts_has_a_part_of_its_own(tmp_path, flag, word, wrong):
    script = tmp_path / "flags.py"
    script.write_text(f"parser.add_argument({flag})\n")
    found = fault_of_flags(str(script), [word])
    assert found == wrong or found.removeprefix(f"{tmp_path}/") == wrong
