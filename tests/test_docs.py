"""The code of README and docs/ runs, lines have the values in the comments behind them, and links have targets."""

import ast
import contextlib
import io
import re
import tomllib
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
README, GETTING_STARTED = ROOT / "README.md", ROOT / "docs" / "start" / "getting-started.md"
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
HOME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
# How README names a file of the repository: PyPI shows it too, and a relative link would lead nowhere there.
IN_REPOSITORY = (f"{HOME}/blob/main/", f"{HOME.replace('//github.com/', '//raw.githubusercontent.com/')}/main/")
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *(page for page in SITE if PYTHON.search(page.read_text()))]


def statements(page):
    """(statement, the comment behind it or "") of the page's blocks, with line numbers of the page."""
    text = page.read_text()
    for block in PYTHON.finditer(text):
        source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        for statement in ast.parse(source, page).body:
            rest = source.splitlines()[statement.end_lineno - 1][statement.end_col_offset :]
            yield statement, rest.strip().removeprefix("# ")


def run(statement, page, namespace):
    """The text that a statement prints, or the value of an expression that prints nothing."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if not isinstance(statement, ast.Expr):
            exec(compile(ast.Module([statement], []), page, "exec"), namespace)
            return printed.getvalue().strip()
        value = eval(compile(ast.Expression(statement.value), page, "eval"), namespace)
    return printed.getvalue().strip() or repr(value)


def trace(page):
    """(line, comment, value) of the page's expressions, traced as in `jax.jit`: nothing is compiled.

    A statement that needs values is left out, and so are statements that use the names that it defines, and values that
    are tracers.
    """
    namespace, undefined, said = {"__name__": page.stem}, set(), []

    def trace_all():
        for statement, comment in statements(page):
            names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
            if undefined & {name.id for name in names}:
                continue
            try:
                gave = run(statement, page, namespace)
            except Exception as error:
                if "trace" not in str(error).lower():  # errors of JAX and Attnax about values name a tracer
                    raise
                undefined.update(name.id for name in names if isinstance(name.ctx, ast.Store))
            else:
                if comment and isinstance(statement, ast.Expr) and "Tracer" not in gave:
                    said.append((statement.lineno, comment, gave))

    jax.eval_shape(trace_all)
    return said


@pytest.mark.contract
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_and_gives_the_values_in_its_comments(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, said = {"__name__": page.stem}, []
    for statement, comment in statements(page):
        gave = run(statement, page, namespace)
        if isinstance(statement, ast.Expr) and comment:
            said.append((statement.lineno, comment, gave))
    assert said
    assert [(line, gave) for line, _, gave in said] == [(line, comment) for line, comment, _ in said]


@pytest.mark.parametrize(("page", "fewest"), [(README, 3), (GETTING_STARTED, 12)], ids=["README", "getting-started"])
def test_page_is_traced_with_the_shapes_in_its_comments(page, fewest):
    said = trace(page)
    assert len(said) >= fewest
    assert [(line, gave) for line, _, gave in said] == [(line, comment) for line, comment, _ in said]


def anchors(page):
    """The anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """The links of a page, as paths in the repository or from the page; those that lead elsewhere are left out."""
    for link in ("".join(found) for found in LINK.findall(CODE.sub("", page.read_text()))):
        start = next((address for address in IN_REPOSITORY if link.startswith(address)), None)
        if start is not None:
            yield link, ROOT, link.removeprefix(start)
        elif "://" not in link:
            yield link, page.parent, link


def test_links_lead_to_files_and_headings():
    broken, count = [], 0
    for page in (*sorted(ROOT.glob("*.md")), *SITE):
        for link, folder, place in links(page):
            path, _, anchor = place.partition("#")
            target = folder / path if path else page
            count += 1
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append((page.name, link))
    assert count > 50
    assert broken == []


def test_readmes_links_work_where_the_repository_is_not():
    text = CODE.sub("", README.read_text())
    found = list(links(README))
    assert len(found) > 20
    assert [link for link, _, place in found if link == place] == []
    used = set(re.findall(r"\]\[([^\]]+)\]", text))
    assert used == set(re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE))


def test_the_figures_of_readme_are_those_of_the_pages():
    rows = re.findall(r"^\| (.*) \| (\d+)(?: ms| tokens a second) \| (.*) \| .* \|$", README.read_text(), re.MULTILINE)
    pages = (ROOT / "docs" / "understand" / "performance.md").read_text().splitlines()
    for case, ours, others in rows:
        figures = [ours, *re.findall(r"(\d+)(?: ms|$)", others)]
        lines = [line for line in pages if all(re.search(rf"\b{figure}\b", line) for figure in figures)]
        assert len(figures) > 1 and lines, (case, figures)
    assert len(rows) >= 4
    case = re.search(r"with (\d+) tokens it takes \[([\d.]+) ms instead of ([\d.]+)\]", README.read_text())
    lines = (ROOT / "docs" / "understand" / "attention-cpu.md").read_text().splitlines()
    for name, figure in (("one line", case[2]), ("full", case[3])):
        assert any(line.startswith(f"| {name} | fwd | {case[1]} |") and f" / {figure} |" in line for line in lines)
