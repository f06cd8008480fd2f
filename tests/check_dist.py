"""Checks the distributions of a release: their names, the files in them, and that a tag is the version's.

python tests/check_dist.py dist [v0.3.0]
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
INFO = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
BESIDE = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")
MADE = ("PKG-INFO", "attnax.egg-info/", "setup.cfg")  # by setuptools


def package_files():
    """The files of the package that git tracks, as paths in the repository."""
    listed = subprocess.run(["git", "ls-files", "attnax"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def problems(folder, version, package, tag="", changelog=""):
    """What is wrong with the distributions in a folder, a line each.

    Args:
        folder: with the source distribution and the wheel, and nothing else.
        version: that they must have.
        package: the paths of the package's files.
        tag: of the release, or "".
        changelog: the text of CHANGELOG.md, which must have a heading with a date for a release.
    """
    sdist, wheel = f"attnax-{version}.tar.gz", f"attnax-{version}-py3-none-any.whl"
    there = {path.name for path in folder.iterdir()}
    if there != {sdist, wheel}:
        yield f"{folder} must hold {sdist} and {wheel} only; it holds {', '.join(sorted(there)) or 'nothing'}."
        return
    with tarfile.open(folder / sdist) as file:
        inside = {name.name.partition("/")[2] for name in file.getmembers() if name.isfile()}
    yield from differences(sdist, {name for name in inside if not name.startswith(MADE)}, package | set(BESIDE))
    with zipfile.ZipFile(folder / wheel) as file:
        inside = set(file.namelist())
    yield from differences(wheel, inside, package | {f"attnax-{version}.dist-info/{name}" for name in INFO})
    if tag and tag != f"v{version}":
        yield f"the tag of version {version} must be v{version}; got {tag}. Set __version__ in attnax/version.py."
    if tag and not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changelog, re.MULTILINE):
        yield f"CHANGELOG.md must have a heading '## {version} (YYYY-MM-DD)' for the release."


def differences(archive, inside, expected):
    for name in sorted(inside - expected):
        yield f"{archive} holds {name}, which is no part of the package, or not in git."
    for name in sorted(expected - inside):
        yield f"{archive} lacks {name}."


def main(folder, tag=""):
    """Prints the problems; returns the exit code."""
    version = re.search(r'^__version__ = "(.*)"$', (ROOT / "attnax" / "version.py").read_text(), re.MULTILINE)[1]
    found = list(problems(Path(folder), version, package_files(), tag, (ROOT / "CHANGELOG.md").read_text()))
    print("\n".join(found) or f"attnax {version}: the distributions hold the package and nothing else.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
