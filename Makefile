# Two commands: `make serve` and `make test`. Everything lives in .venv; a second run installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# The exact torch that was tested. Where the default index would bring CUDA libraries that you do not want, say
# make serve TORCH="torch==2.13.0 --index-url <your CPU index>".
TORCH ?= torch==2.13.0

# Tests run side by side on so many cores.
WORKERS ?= 2

.PHONY: help serve install test test-slow test-containers check format reference docs bench bench-peers soak gpu-check clean

help:
	@echo "make serve      install, fetch the default model, serve on 127.0.0.1:8000"
	@echo "make test       install what tests need, run the fast suite (make test-slow: the rest)"
	@echo "make test-containers   build the image, run it, docker compose up; on Debian 12, as root, without Docker"
	@echo "make check      format, lint, types, import layers"
	@echo "make reference  write the generated pages and pictures of docs/ anew"
	@echo "make docs       build docs/ as a site, into build/site"
	@echo "make bench      the benchmarks of this machine, last line JSON each (make bench-peers: beside other servers; make soak: ten minutes of load)"
	@echo "make gpu-check  on a GPU: is it right, how fast is it; needs nothing installed but torch and triton"

serve: $(VENV)/.server
	@exec $(BIN)/keypast serve

install: $(VENV)/.server

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow --timeout=900

# Podman, a base image and Prometheus' out of Debian's packages; twenty minutes and 10 GB the first time.
CONTAINERS_DIR ?= /var/tmp/keypast-containers
test-containers: $(VENV)/.dev
	tests/containers/setup.sh $(CONTAINERS_DIR)
	CONTAINERS_DIR=$(CONTAINERS_DIR) $(BIN)/python -m pytest -m containers tests/containers

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What of docs/ is written by programs.
reference: $(VENV)/.server
	$(BIN)/python -m tools.write

# The site, into build/site; any warning fails it. The theme's advertisement for its successor is none.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.server
	$(BIN)/python -m benchmarks.engine_step
	$(BIN)/python -m benchmarks.http_step

# Ten minutes and more: nothing fails, leaks or drifts under four fifths of the highest load.
soak: $(VENV)/.dev
	$(BIN)/python -m benchmarks.soak --save

# Other servers of the same model, built into .peers once (ten minutes or more), then everything side by side.
bench-peers: $(VENV)/.dev
	benchmarks/peers/setup.sh .peers $(BIN)/python
	$(BIN)/python -m benchmarks.vs_llama --llama-server .peers/llama/bin/llama-server --weights .peers --save
	$(BIN)/python -m benchmarks.vs_openvino --python .peers/ov/bin/python --model .peers/ovmodel --save
	$(BIN)/python -m benchmarks.vs_transformers --save
	$(BIN)/python -m benchmarks.sessions --llama-server .peers/llama/bin/llama-server --weights .peers --save
	$(BIN)/python -m benchmarks.raw_layer --peer-huge-pages --save
	$(BIN)/python -m benchmarks.http_load --save
	$(BIN)/python -m benchmarks.vs_pytriton --python .peers/pytriton/bin/python --save
	$(BIN)/python -m benchmarks.growth --llama-server .peers/llama/bin/llama-server --weights .peers --save

# Runs from the source tree with the Python that has torch, triton, numpy and safetensors: .venv's if there is one.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_check --save

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis

$(BIN)/pip:
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The one long download is shown where somebody looks on.
$(VENV)/.torch: constraints.txt | $(BIN)/pip
	@echo "installing torch (once; about 200 MB for the CPU)"
	@$(if $(MAKE_TERMOUT),$(subst --quiet,,$(PIP)),$(PIP)) install -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.server: pyproject.toml constraints.txt $(wildcard engine/kernels/*.cpp engine/kernels/*.h) | $(VENV)/.torch
	@echo "installing keypast[server]"
	@$(PIP) install -c constraints.txt -e '.[server]'
	@echo "building the CPU kernels (once; some 20 s)"
	@$(BIN)/python -m engine.kernels.build || echo "WARNING: no native kernels; attention will run on the slow path"
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing what the site needs"
	@$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/.dev: $(VENV)/.server
	@echo "installing what tests and checks need"
	@$(PIP) install -c constraints.txt -e '.[server,loadtest,otel,dev]'
	@touch $@
