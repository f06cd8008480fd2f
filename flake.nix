{
  description = "Attention as a function, and the transformers built on it, for JAX and Flax NNX";

  # No inputs: package set and Python come from the flake that uses this one.
  outputs =
    { self }:
    {
      # with-pkgs pkgs pypkgs: the package, to stand among those of `python.withPackages (pypkgs: [ ... ])`.
      lib.with-pkgs =
        pkgs: pypkgs:
        let
          isVersion = pkgs.lib.hasPrefix "__version__ = ";
          lines = pkgs.lib.splitString "\n" (builtins.readFile ./attnax/version.py);
          version = builtins.head (
            builtins.match "__version__ = \"(.*)\"" (pkgs.lib.findFirst isVersion "" lines)
          );
        in
        pypkgs.buildPythonPackage {
          pname = "attnax";
          inherit version;
          src = ./.;
          pyproject = true;
          build-system = [ pypkgs.setuptools ];
          dependencies = [
            pypkgs.flax
            pypkgs.jax
            pypkgs.ml-dtypes
            pypkgs.numpy
          ];
          # pyproject.toml caps jax and flax at releases that work together; nixpkgs has such a pair of its own.
          pythonRelaxDeps = [
            "flax"
            "jax"
            "ml_dtypes"
            "numpy"
          ];
          # The tests need more packages than the library: `make test`.
          doCheck = false;
          pythonImportsCheck = [
            "attnax"
            "attnax.kernels"
            "attnax.reference"
          ];
        };
    };
}
