"""The version of the package, for all that names it: pyproject.toml and flake.nix read this file."""

__version__ = "0.3.0"
