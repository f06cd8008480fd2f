"""flake.nix and the flake of docs/nix.md, evaluated by Nix with a stand-in for nixpkgs; nothing is built."""

import functools
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import attnax

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "nix.md"
NEEDS_NIX = pytest.mark.skipif(
    shutil.which("nix-instantiate") is None,
    reason="there is no nix-instantiate; on Debian and Ubuntu: apt-get install nix-bin",
)
# The functions of nixpkgs that flake.nix and docs/nix.md use, and packages that are their names. Functions that build
# return what they are given.
NIXPKGS = """
{ system }:
let
  pypkgs = {
    buildPythonPackage = arguments: arguments // { src = toString arguments.src; };
  } // builtins.listToAttrs (map (name: { inherit name; value = name; }) (builtins.fromJSON ''NAMES''));
in
{
  lib = {
    hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
    splitString = separator: text: builtins.filter builtins.isString (builtins.split separator text);
    findFirst = test: default: list:
      let found = builtins.filter test list; in if found == [ ] then default else builtins.head found;
  };
  mkShell = arguments: arguments;
  python312 = { inherit pypkgs; withPackages = choose: choose pypkgs; };
}
"""
EVALUATE = """
{ page, nixpkgs }:
let
  pkgs = import nixpkgs { system = "any"; };
  flake = import ./flake.nix;
  outputs = flake.outputs { self = throw "with-pkgs must not depend on its own flake"; };
in
{
  inputs = builtins.attrNames (flake.inputs or { });
  outputs = builtins.attrNames outputs;
  lib = builtins.attrNames outputs.lib;
  package = outputs.lib.with-pkgs pkgs pkgs.python312.pypkgs;
  shell = (import page).outputs {
    inherit nixpkgs;
    attnax = outputs;
    flake-utils.lib.eachDefaultSystem = for: for "any";
    self = throw "the flake of the page does not need itself";
  };
}
"""


def normal(name):
    """A package's name as nixpkgs and PyPI compare names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


@functools.cache
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def needed():
    return {normal(requirement) for requirement in project()["project"]["dependencies"]}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """What the flakes give, with packages of Python that pyproject.toml names and no others."""
    folder = tmp_path_factory.mktemp("nix")
    (folder / "nixpkgs.nix").write_text(NIXPKGS.replace("NAMES", json.dumps(sorted(needed() | {"setuptools"}))))
    (folder / "page.nix").write_text(re.search(r"^```nix\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)[1])
    command = ["nix-instantiate", "--store", "dummy://", "--eval", "--strict", "--json", "--expr", EVALUATE]
    paths = ["--arg", "page", str(folder / "page.nix"), "--arg", "nixpkgs", str(folder / "nixpkgs.nix")]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@NEEDS_NIX
def test_the_flake_has_no_inputs_and_one_function_for_any_python(evaluated):
    assert (evaluated["inputs"], evaluated["outputs"], evaluated["lib"]) == ([], ["lib"], ["with-pkgs"])


@NEEDS_NIX
def test_with_pkgs_gives_the_package_of_this_folder_and_version(evaluated):
    package = evaluated["package"]
    assert package["pname"] == project()["project"]["name"]
    assert package["version"] == attnax.__version__
    assert package["src"] == str(ROOT)
    assert package["pyproject"] is True


@NEEDS_NIX
def test_with_pkgs_has_the_dependencies_of_pyproject(evaluated):
    package = evaluated["package"]
    assert set(package["dependencies"]) == needed()
    assert {normal(name) for name in package["pythonRelaxDeps"]} == needed()
    build = {normal(requirement) for requirement in project()["build-system"]["requires"]}
    assert set(package["build-system"]) == build


@NEEDS_NIX
def test_the_flake_of_the_page_has_the_package_in_its_shell(evaluated):
    assert evaluated["shell"]["devShells"]["default"]["packages"] == [[evaluated["package"]]]
