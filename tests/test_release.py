"""What a release consists of: names and links of the project, workflows, distributions, advice to install packages."""

import functools
import io
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from check_dist import BESIDE, INFO, problems

import attnax
from attnax.errors import install_command

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
HEADING = re.compile(r"^## (.*)$", re.MULTILINE)
VERSION = re.compile(r"(\d+\.\d+\.\d+) \((unreleased|\d{4}-\d\d(?:-\d\d)?)\)")


@functools.cache
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@functools.cache
def workflow(name):
    return yaml.safe_load((GITHUB / "workflows" / name).read_text())


def steps(name):
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def test_the_version_is_written_in_one_place():
    assert "version" in project()["dynamic"]
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev0)?", attnax.__version__)


def test_the_changelog_has_a_heading_for_each_version_from_the_newest():
    first, *versions = HEADING.findall((ROOT / "CHANGELOG.md").read_text())
    assert first == "Unreleased"
    found = [VERSION.fullmatch(heading) for heading in versions]
    assert all(found), versions
    numbers = [tuple(map(int, each[1].split("."))) for each in found]
    assert len(numbers) > 1 and numbers == sorted(numbers, reverse=True)
    assert "unreleased" not in [each[2] for each in found[1:]]
    dated = [each[1] for each in found if each[2] != "unreleased"]
    assert (attnax.__version__.partition(".dev")[0] in dated) == (".dev" not in attnax.__version__)


def test_the_links_of_the_project_are_to_one_repository_and_to_its_files():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    home = project()["urls"]["Homepage"]
    assert citation["repository-code"] == home
    paths = []
    for name, url in project()["urls"].items():
        assert url == home or url.startswith(f"{home}/"), name
        paths += re.findall(r"/(?:blob|tree)/main/(.*)", url)
    assert len(paths) >= 2 and all((ROOT / path).exists() for path in paths)
    assert (ROOT / project()["readme"]).is_file() and all(
        (ROOT / name).is_file() for name in project()["license-files"]
    )


def test_the_citation_names_the_project_as_its_package_does():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"]
    assert citation["title"].lower() == project()["name"]
    assert (citation["abstract"], citation["license"]) == (project()["description"], project()["license"])
    assert (citation["authors"], citation["keywords"]) == (project()["authors"], project()["keywords"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_only_call_targets_of_the_makefile(path):
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    matrix = {
        target
        for job in workflow(path.name)["jobs"].values()
        for name, values in job.get("strategy", {}).get("matrix", {}).items()
        for target in (values if name == "target" else [v["target"] for v in values if isinstance(v, dict)])
    }
    for command in (step["run"] for step in steps(path.name) if "run" in step):
        make, *words = re.sub(r"\$\{\{.*?\}\}", "MATRIX", command).split()
        named = {word for word in words if "=" not in word}
        assert make == "make" and named
        if "MATRIX" in named:
            named = named - {"MATRIX"} | {target for line in matrix for target in line.split()}
        assert named <= targets, command


def test_workflows_use_one_version_of_each_action():
    used = {step["uses"] for path in WORKFLOWS for step in steps(path.name) if "uses" in step}
    assert len({use.partition("@")[0] for use in used}) == len(used) and all("@" in use for use in used)


def test_a_tag_is_checked_and_installed_on_every_python_before_it_is_published():
    release = workflow("release.yml")
    jobs, build = release["jobs"], steps("release.yml")
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    assert {"RELEASE_TAG": "${{ github.ref_name }}"} in [step.get("env") for step in build]
    minors = {name[-4:] for name in project()["classifiers"] if re.search(r":: 3\.\d+$", name)}
    assert set(jobs["installed"]["strategy"]["matrix"]["python"]) == minors
    assert jobs["installed"]["needs"] == "build" and jobs["publish"]["needs"] == ["build", "installed"]
    assert jobs["publish"]["environment"]["name"] == "pypi"
    # Only the job that publishes can ask for an identity, and it runs no code of the repository.
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    assert (release["permissions"], jobs["publish"]["permissions"]) == ({"contents": "read"}, {"id-token": "write"})
    assert all("run" not in step and "checkout" not in step["uses"] for step in jobs["publish"]["steps"])


def test_forms_ask_for_what_they_require():
    forms = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert form["name"] and form["description"]
        asked = [part for part in form["body"] if part["type"] != "markdown"]
        assert len({part["id"] for part in asked}) == len(asked) > 0
        assert all(part["attributes"]["label"] for part in asked)
        assert any(part.get("validations", {}).get("required") for part in asked)


def write(folder, version="1.2.0", package=("attnax/__init__.py", "attnax/py.typed"), sdist=(), wheel=()):
    """Distributions of empty files."""
    with tarfile.open(folder / f"attnax-{version}.tar.gz", "w:gz") as file:
        for name in (*package, *BESIDE, "PKG-INFO", "setup.cfg", "attnax.egg-info/SOURCES.txt", *sdist):
            file.addfile(tarfile.TarInfo(f"attnax-{version}/{name}"), io.BytesIO())
    with zipfile.ZipFile(folder / f"attnax-{version}-py3-none-any.whl", "w") as file:
        for name in (*package, *(f"attnax-{version}.dist-info/{name}" for name in INFO), *wheel):
            file.writestr(name, "")


def test_distributions_of_the_package_and_nothing_else_have_no_problem(tmp_path):
    write(tmp_path)
    changelog = "## Unreleased\n\n## 1.2.0 (2030-01-02)\n"
    package = {"attnax/__init__.py", "attnax/py.typed"}
    assert list(problems(tmp_path, "1.2.0", package, "v1.2.0", changelog)) == []
    assert list(problems(tmp_path, "1.2.0", package)) == []


@pytest.mark.parametrize(
    ("written", "asked", "words"),
    [
        ({"wheel": ["tests/test_x.py"]}, {}, "whl holds tests/test_x.py, which is no part of the package"),
        ({"sdist": ["tests/test_x.py"]}, {}, "tar.gz holds tests/test_x.py, which is no part of the package"),
        ({"package": ["attnax/__init__.py"]}, {}, "whl lacks attnax/py.typed."),
        (
            {"version": "1.1.0"},
            {},
            "and attnax-1.2.0-py3-none-any.whl only; it holds attnax-1.1.0",
        ),
        ({}, {"tag": "v1.3.0"}, "the tag of version 1.2.0 must be v1.2.0; got v1.3.0."),
        ({}, {"tag": "v1.2.0", "changelog": "## 1.2.0 (unreleased)"}, "must have a heading '## 1.2.0 (YYYY-MM-DD)'"),
    ],
)
def test_a_problem_of_distributions_is_named(tmp_path, written, asked, words):
    write(tmp_path, **written)
    found = list(problems(tmp_path, "1.2.0", {"attnax/__init__.py", "attnax/py.typed"}, **asked))
    assert any(words in problem for problem in found), found


def test_in_a_clone_the_advice_is_to_install_the_clone():
    assert install_command("train") == f"pip install -e '{ROOT}[train]'"


def test_outside_of_a_clone_the_advice_names_the_version(tmp_path):
    # The package on PyPI may be another release; pip does not look for a version that is installed.
    (tmp_path / "attnax").mkdir()
    for name in ("__init__", "errors", "lazy", "version"):
        shutil.copy(ROOT / "attnax" / f"{name}.py", tmp_path / "attnax")
    (tmp_path / "pyproject.toml").write_text('name = "other"')
    code = "from attnax.errors import install_command; print(install_command('train'))"
    command = [sys.executable, "-S", "-c", code]  # -S: not the installed package
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={})
    assert done.stdout == f"pip install 'attnax[train]=={attnax.__version__}'\n"


def test_a_test_that_begins_too_late_is_skipped(monkeypatch, pytestconfig):
    begin = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py")).pytest_runtest_setup
    monkeypatch.setenv("ATTNAX_TESTS_UNTIL", str(time.time() + 600))
    begin()
    monkeypatch.setenv("ATTNAX_TESTS_UNTIL", str(time.time() - 1))
    with pytest.raises(pytest.skip.Exception, match="time of this run is over"):
        begin()
