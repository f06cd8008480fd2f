"""Tests the tests: random mutants of the code, each against the tests of its part of the package.

    python tests/mutants.py                 # `make mutants` installs cosmic-ray and runs this
    python tests/mutants.py --again         # survivors once more, after tests were added
    python tests/mutants.py --parts nn --count 50 --seed 1

cosmic-ray makes the mutants. Its own runner has one command and one time limit for all mutants, so each would run the
whole suite. Here each mutant runs the tests of its part: first the tests of `make test`, and if it survives them the
other tests. Mutations of our own remove things that no mutation of cosmic-ray removes: a keyword argument, a call whose
result is not used, a branch.

Survivors are listed. Not every survivor is a fault of the tests: some changes have no effect.

Hashes of lines draw a place in the code first, then one of its mutations, so a change elsewhere does not change the
sample. Each worker has a copy of the tree in build/mutants. Results are kept there, and a second run continues.
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from parso.python import tree

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutants"
QUICK = "not contract and not thorough"  # the tests of `make test`
REST = f"not ({QUICK})"
# By pytest's exit code: 0 passed, 1 failed, 2 and 4 import errors, 5 no test has these marks; below 0 a crash.
_OUTCOMES = {0: "survived", 1: "killed", 2: "killed", 4: "killed", 5: "survived", -6: "killed", -11: "killed"}


@dataclasses.dataclass(frozen=True)
class Part:
    """Files of the package, and their tests."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


PARTS = {
    "masks": Part(("masks/*.py",), ("test_masks.py", "kernels", "test_properties.py")),
    "caches": Part(("*cache/*.py", "int8_rows.py"), ("test_paged_cache.py", "kernels", "generation")),
    "kernels": Part(("kernels/**/*.py",), ("kernels", "test_masks.py", "test_paged_cache.py", "generation")),
    "nn": Part(("nn/*.py",), ("nn", "models", "generation")),
    "generation": Part(("generation/*.py",), ("generation", "models", "cli")),
    "training": Part(("training/*.py",), ("training", "cli")),
}


class TakesAway(Operator):
    """A mutation that replaces a node."""

    instead: str

    def is_target(self, node: Any) -> bool:
        raise NotImplementedError

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if self.is_target(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return tree.Name(self.instead, node.start_pos, node.get_first_leaf().prefix)

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class DropKeyword(TakesAway):
    """f(x, y=1) -> f(x)."""

    instead = "**{}"

    def is_target(self, node: Any) -> bool:
        return node.type == "argument" and node.children[1] == "="


class DropCall(TakesAway):
    """A call whose result is not used -> pass."""

    instead = "pass"

    def is_target(self, node: Any) -> bool:
        if node.type != "atom_expr" or node.parent.type not in ("simple_stmt", "suite"):
            return False
        return bool(node.children[-1].type == "trailer" and node.children[-1].children[0] == "(")


class _FixCondition(TakesAway):
    def is_target(self, node: Any) -> bool:
        parent = node.parent
        if parent is None:
            return False
        if parent.type == "ternary":
            return node is parent.children[2]
        return parent.type == "if_stmt" and parent.children[parent.children.index(node) - 1] in ("if", "elif")


class Never(_FixCondition):
    """if x -> if False."""

    instead = "False"


class Always(_FixCondition):
    """if x -> if True."""

    instead = "True"


def operators() -> dict[str, Operator]:
    """The operators of cosmic-ray that need no arguments, and our own."""
    names = [name for name in plugins.operator_names() if not plugins.get_operator(name).arguments()]
    theirs = {name.removeprefix("core/"): plugins.get_operator(name)() for name in names if not name.endswith("/NoOp")}
    return {**theirs, **{kind.__name__: kind() for kind in (DropKeyword, DropCall, Never, Always)}}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    part: str
    path: str  # of the file, from the root
    line: int
    operator: str
    key: str  # of the place and the change, in the results
    before: str  # the whole file
    after: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.operator}"

    def diff(self) -> str:
        """The lines that differ."""
        lines = difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), n=0, lineterm="")
        return "\n".join(line for line in lines if line[:3] not in ("---", "+++") and line[:2] != "@@")


def silent_spans(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(begin, end) of code without effect on results: annotations, overloads, TYPE_CHECKING, asserts and `strict=`."""
    silent: list[Any] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            silent += [node.returns, *(argument.annotation for argument in every if argument is not None)]
            if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
                silent += [*node.decorator_list, node]
        elif isinstance(node, ast.AnnAssign):
            silent.append(node.annotation)
        elif (
            isinstance(node, ast.Assert)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            or (isinstance(node, ast.keyword) and node.arg == "strict")
        ):
            silent.append(node)
    # The @ of a decorator stands one column before its node.
    return [((x.lineno, x.col_offset - 1), (x.end_lineno, x.end_col_offset)) for x in silent if x is not None]


def places_of(part: str, seed: int) -> Iterator[tuple[str, tuple[str, str, int, list[tuple[str, int]]]]]:
    """The places of a part that can be changed: (hash to draw by, (part, path, line, changes))."""
    package, kinds = ROOT / "attnax", operators()
    for path in sorted({path for pattern in PARTS[part].files for path in package.glob(pattern)}):
        source, name = path.read_text(), str(path.relative_to(ROOT))
        silent, text = silent_spans(source), source.splitlines()
        nodes = list(ast_nodes(get_ast(source)))
        places: dict[Any, list[tuple[str, int]]] = collections.defaultdict(list)
        for kind, operator in kinds.items():
            spans = (span for node in nodes for span in operator.mutation_positions(node))
            for occurrence, (start, end) in enumerate(spans):
                if not any(first <= start < last for first, last in silent):
                    places[start, end].append((kind, occurrence))
        seen: collections.Counter[str] = collections.Counter()
        for (start, end), changes in sorted(places.items()):
            place = f"{seed} {name} {text[start[0] - 1].strip()} {start[1]} {end[1]}"
            seen[place] += 1
            yield _hash(f"{place} {seen[place]}"), (part, name, start[0], changes)


def draw(parts: list[str], seed: int, count: int) -> list[Mutant]:
    """One mutant for each of `count` places."""
    places = sorted(place for part in parts for place in places_of(part, seed))
    mutants: list[Mutant] = []
    for drawn, (part, name, line, changes) in places:
        kind, occurrence = changes[int(drawn, 16) % len(changes)]
        before = (ROOT / name).read_text()
        after = str(mutate_code(before, operators()[kind], occurrence))
        with contextlib.suppress(SyntaxError):  # a star that is not a product cannot be another operator
            ast.parse(after)
            mutants.append(Mutant(part, name, line, kind, f"{drawn} {kind}", before, after))
        if len(mutants) == count:
            break
    print(f"{len(mutants)} of {len(places)} places", flush=True)
    return mutants


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Worker:
    """A copy of the tree for mutants, and its tests."""

    def __init__(self, number: int) -> None:
        self.folder = WORK / f"worker-{number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        command = ["git", "ls-files", "-zco", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)

    def run(self, tests: list[str], marks: str, limit: float | None) -> tuple[str, float]:
        """The outcome of the tests, "survived", "killed" or "timed out", and seconds."""
        environment = os.environ | {
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            # Programs that a mutant does not change are compiled once for all mutants.
            "JAX_COMPILATION_CACHE_DIR": str(WORK / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", marks]
        command += tests
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, **quiet)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return "timed out", time.monotonic() - start
        if code not in _OUTCOMES:
            raise SystemExit(f"pytest ended with {code}: {' '.join(command)}")
        return _OUTCOMES[code], time.monotonic() - start

    def judge(self, mutant: Mutant, marks: str, limit: float) -> dict[str, Any]:
        """The outcome of a mutant in the tests with these marks."""
        path = self.folder / mutant.path
        path.write_text(mutant.after)
        try:
            files = files_of(mutant.part, Path(mutant.path).stem.strip("_"))
            outcome, seconds = self.run(files, marks, limit)
        finally:
            path.write_text(mutant.before)
        return {"outcome": outcome, "seconds": round(seconds, 1)}


def files_of(part: str, stem: str = "") -> list[str]:
    """The files of a part's tests; files with the stem in their name are first."""
    files: list[str] = []
    for test in PARTS[part].tests:
        path = ROOT / "tests" / test
        found = [path] if path.suffix else sorted(path.rglob("test_*.py"))
        files += [str(path.relative_to(ROOT)) for path in found]
    return sorted(files, key=lambda name: stem not in name)


class Results:
    """A file with a line for each result; the last line of a name counts."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, dict[str, dict[str, Any]]()
        if path.exists():
            for line in path.read_text().splitlines():
                self.found |= json.loads(line)

    def add(self, name: str, value: dict[str, Any]) -> None:
        self.found[name] = value
        with self.path.open("a") as file:
            file.write(json.dumps({name: value}) + "\n")


def share(workers: list[Worker], work: Callable[[Worker, Any], None], items: Iterable[Any]) -> None:
    """Does `work` for each item with a free worker."""
    free: queue.Queue[Worker] = queue.Queue()
    for worker in workers:
        free.put(worker)

    def one(item: Any) -> None:
        worker = free.get()
        try:
            work(worker, item)
        finally:
            free.put(worker)

    with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(one, items))


def judge_all(workers: list[Worker], mutants: list[Mutant], marks: str, results: Results) -> None:
    """Runs the tests with these marks on the mutants that have no result of them yet."""
    missing = [mutant for mutant in mutants if f"{mutant.key}: {marks}" not in results.found]
    parts = {mutant.part for mutant in missing if f"{mutant.part}: {marks}" not in results.found}

    def measure(worker: Worker, part: str) -> None:
        """Measures the tests of a part without a mutant; the first run compiles, as a run of a mutant may."""
        outcome, seconds = worker.run(files_of(part), marks, None)
        if outcome != "survived":
            raise SystemExit(f"The tests of {part} fail where nothing is broken: run them first.")
        print(f"{part}: {seconds:.0f} s", flush=True)
        results.add(f"{part}: {marks}", {"seconds": seconds})

    def judge(worker: Worker, mutant: Mutant) -> None:
        result = worker.judge(mutant, marks, 3 * results.found[f"{mutant.part}: {marks}"]["seconds"])
        results.add(f"{mutant.key}: {marks}", result)
        print(f"{result['outcome']:9} {result['seconds']:5.0f} s  {mutant}", flush=True)

    share(workers, measure, sorted(parts))
    share(workers, judge, missing)


def report(mutants: list[Mutant], results: Results) -> None:
    """Prints each survivor, and the counts of each part, of the mutants with a result."""
    outcomes: dict[Mutant, str] = {}
    for mutant in mutants:
        first, then = (results.found.get(f"{mutant.key}: {marks}", {}).get("outcome") for marks in (QUICK, REST))
        if first is not None:
            outcomes[mutant] = f"{then} late" if first == "survived" and then in ("killed", "timed out") else first
        if outcomes.get(mutant) == "survived":
            tested = "" if then else " (not by test-all yet)"
            print(f"\n{mutant}{tested}\n{mutant.diff()}")
    kinds = {"killed": "killed by make test", "killed late": "by test-all", "survived": "survived"}
    print(f"\n| | mutants | {' | '.join(kinds.values())} | timed out |\n|{'---|' * 6}")
    for name in (*PARTS, "all"):
        mine = [outcome for mutant, outcome in outcomes.items() if name in (mutant.part, "all")]
        counts = [mine.count(kind) for kind in kinds]
        print(f"| {name} | {len(mine)} | {' | '.join(map(str, counts))} | {len(mine) - sum(counts)} |")
    if any(counts):
        quick, whole = (f"{sum(counts[:end]) / sum(counts):.1%}" for end in (1, 2))
        print(f"\nkilled by make test: {quick}; by it or test-all: {whole} (time-outs apart)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only the tests of `make test`")
    parser.add_argument("--again", action="store_true", help="forget survivors, time-outs and the times of tests")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    mutants = draw(options.parts, options.seed, options.count)
    WORK.mkdir(parents=True, exist_ok=True)
    results = Results(WORK / "results.jsonl")
    if not options.report:
        if options.again:
            for name, value in list(results.found.items()):
                if value.get("outcome") != "killed":
                    del results.found[name]
        workers = [Worker(number) for number in range(options.workers)]
        judge_all(workers, mutants, QUICK, results)
        if not options.quick:
            left = [mutant for mutant in mutants if results.found[f"{mutant.key}: {QUICK}"]["outcome"] == "survived"]
            judge_all(workers, left, REST, results)
    report(mutants, results)


if __name__ == "__main__":
    main()
