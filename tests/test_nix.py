"""flake.nix, evaluated by Nix with a stand-in for nixpkgs; nothing is built."""

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
NEEDS_NIX = pytest.mark.skipif(
    shutil.which("nix-instantiate") is None,
    reason="there is no nix-instantiate; on Debian and Ubuntu: apt-get install nix-bin",
)
# The functions of nixpkgs' library that flake.nix uses, and packages that are their names. `buildPythonPackage` and the
# like return what they are given.
STAND_IN = """
let
  flake = import ./flake.nix;
  outputs = flake.outputs { self = throw "with-pkgs must not depend on its own flake"; };
  pkgs.lib = {
    hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
    splitString = separator: text: builtins.filter builtins.isString (builtins.split separator text);
    findFirst = test: default: list:
      let found = builtins.filter test list; in if found == [ ] then default else builtins.head found;
  };
  pypkgs = {
    buildPythonPackage = arguments: arguments // { src = toString arguments.src; };
  } // builtins.listToAttrs (map (name: { inherit name; value = name; }) (builtins.fromJSON ''NAMES''));
in
{
  inputs = builtins.attrNames (flake.inputs or { });
  outputs = builtins.attrNames outputs;
  lib = builtins.attrNames outputs.lib;
  package = outputs.lib.with-pkgs pkgs pypkgs;
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


@functools.cache
def evaluated():
    """The flake's outputs, evaluated with packages of Python that pyproject.toml names and no others."""
    names = json.dumps(sorted(needed() | {"setuptools"}))
    command = ["nix-instantiate", "--store", "dummy://", "--eval", "--strict", "--json"]
    done = subprocess.run(
        [*command, "--expr", STAND_IN.replace("NAMES", names)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@NEEDS_NIX
def test_the_flake_has_no_inputs_and_one_function_for_any_python():
    flake = evaluated()
    assert (flake["inputs"], flake["outputs"], flake["lib"]) == ([], ["lib"], ["with-pkgs"])


@NEEDS_NIX
def test_with_pkgs_gives_the_package_of_this_folder_and_version():
    package = evaluated()["package"]
    assert package["pname"] == project()["project"]["name"]
    assert package["version"] == attnax.__version__
    assert package["src"] == str(ROOT)
    assert package["pyproject"] is True


@NEEDS_NIX
def test_with_pkgs_has_the_dependencies_of_pyproject():
    package = evaluated()["package"]
    assert set(package["dependencies"]) == needed()
    assert {normal(name) for name in package["pythonRelaxDeps"]} == needed()
    build = {normal(requirement) for requirement in project()["build-system"]["requires"]}
    assert set(package["build-system"]) == build
