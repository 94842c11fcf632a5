# Set up, try, test and check the project. `make help` lists the targets.

PYTHON ?= python3
PIP_FLAGS ?= --quiet

VENV := .venv
comma := ,
FLOOR_VENV := .venv-floor
SPACE_VENV := .venv-space
MAIN_VENV := .venv-main
SERVING_VENV := .venv-serving
QUANTISE_VENV := .venv-quantise
EVAL_VENV := .venv-eval
# The oldest transformers that pyproject.toml allows, and the oldest huggingface-hub: this transformers refuses 2.x.
FLOOR_TRANSFORMERS := 5.16.1
FLOOR_HUB := 1.31.0
PYTEST := -m pytest tests -q -n 2 --dist loadfile
# Two workers, a thread each: more would fight for two cores. A file stays on one worker, which makes its fixtures once.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-floor test-torchao test-deepspeed test-export test-space test-serving test-eval test-main quantise-vllm gpu sync-model lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.stamp ## make .venv with the exact versions of constraints.txt (PYTHON=... picks the interpreter)

demo: setup ## run the demo
	$(VENV)/bin/python -m modeling_llava_stf demo

test: setup ## run the fast tests
	$(VENV)/bin/python $(PYTEST)

test-floor: $(FLOOR_VENV)/.stamp ## run the fast tests on the oldest supported transformers
	$(FLOOR_VENV)/bin/python $(PYTEST) --ignore=tests/training # training needs a newer transformers

# llm-compressor 0.14 brings an older transformers than constraints.txt has.
quantise-vllm: ## make .venv-quantise, for examples/quantise_vllm.py
	$(PYTHON) -m venv $(QUANTISE_VENV)
	$(QUANTISE_VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt torch
	$(QUANTISE_VENV)/bin/python -m pip install $(PIP_FLAGS) torch==$$($(QUANTISE_VENV)/bin/python -c 'import torch; print(torch.__version__)') llmcompressor==0.14.0.1

MINUTES ?= 25

gpu: setup ## run what needs a CUDA device, in order of worth (MINUTES=25); the same command continues
	$(VENV)/bin/python -m benchmarks gpu --minutes $(MINUTES)

# torchao prints warnings at every start of transformers, so it is kept out of the environments.
test-torchao: setup ## run the tests of quantising, with torchao
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt --no-deps --upgrade --target .cache/torchao torchao
	PYTHONPATH=.cache/torchao $(VENV)/bin/python -m pytest tests/model/test_quantisation.py tests/conversion/test_quantise.py -q

# Its build for a CPU compiles at the first run, which takes a C++ compiler.
test-deepspeed: setup ## run the tests of training on two processes, with DeepSpeed
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps --upgrade --target .cache/deepspeed setuptools wheel ninja einops hjson msgpack py-cpuinfo nvidia-ml-py pydantic==2.14.4 pydantic-core==2.50.5 annotated-types typing-inspection
	PYTHONPATH=.cache/deepspeed $(VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation --upgrade --target .cache/deepspeed deepspeed==0.19.8
	PYTHONPATH=.cache/deepspeed $(VENV)/bin/python -m pytest tests/training/test_training_distributed.py -q

test-export: setup ## run the tests of exporting, with the ONNX packages
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps --upgrade --target .cache/export onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 onnx_ir ml_dtypes flatbuffers
	PYTHONPATH=.cache/export $(VENV)/bin/python -m pytest tests/model/test_export.py -q

# SCREENSHOT=FILE writes a picture of the page.
test-space: $(SPACE_VENV)/.stamp ## drive the page of examples/space in a headless browser (apt-get install chromium)
	PYTHONPATH=$(CURDIR) $(SPACE_VENV)/bin/python -m pytest tests/space -q --noconftest

# The tests train adapters in .venv, because training needs a newer transformers than vLLM allows.
test-serving: setup $(SERVING_VENV)/.stamp ## run the tests of serving, with vLLM's build for a CPU
	$(SERVING_VENV)/bin/python -m pytest tests/serving -q -m serving

test-eval: $(EVAL_VENV)/.stamp ## run the tests of evaluating, with lmms-eval
	$(EVAL_VENV)/bin/python -m pytest tests/eval -q -m evaluating

# pip says that pyproject.toml does not allow this version: that is the point.
test-main: $(FLOOR_VENV)/constraints.txt ## run the fast tests on transformers' main branch, of today
	$(PYTHON) -m venv --clear $(MAIN_VENV)
	$(MAIN_VENV)/bin/python -m pip install $(PIP_FLAGS) -c $< torch
	$(MAIN_VENV)/bin/python -m pip install $(PIP_FLAGS) -c $< -e ".[dev]"
	$(MAIN_VENV)/bin/python -m pip install $(PIP_FLAGS) --upgrade git+https://github.com/huggingface/transformers
	$(MAIN_VENV)/bin/python $(PYTEST) --ignore=tests/training

MODEL := examples/shapes/model

sync-model: setup ## copy the package's files and chat template into the small model, and render its card
	cp modeling_llava_stf/[a-z]*_llava_stf.py $(MODEL)
	cp conversion/checkpoints/chat_templates/vicuna_v1.jinja $(MODEL)/chat_template.jinja
	$(VENV)/bin/python -c 'from examples.shapes.recipe import render_card; render_card("$(MODEL)")'

lint: setup ## check style and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: setup ## rewrite the files in the project's style
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean: ## remove environments, caches and builds
	rm -rf .venv .venv-* build dist .cache .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,venv,constraints,extras,more requirements). torch goes first, so that no later step picks another build of it.
define install
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is older than Python 3.11: name another one with PYTHON=...")'
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install $(PIP_FLAGS) -c $(2) torch
$(1)/bin/python -m pip install $(PIP_FLAGS) -c $(2) -e ".[$(3)]" $(4)
$(1)/bin/python -m pip check
@touch $@
endef

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,dev$(comma)train$(comma)qlora)

$(FLOOR_VENV)/.stamp: pyproject.toml $(FLOOR_VENV)/constraints.txt
	$(call install,$(FLOOR_VENV),$(FLOOR_VENV)/constraints.txt,dev,transformers==$(FLOOR_TRANSFORMERS) huggingface-hub==$(FLOOR_HUB))

$(SERVING_VENV)/.stamp: constraints-serving.txt
	$(PYTHON) -m venv $(SERVING_VENV)
	$(SERVING_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r $<
	@touch $@

# torch brings what its build needs; the package itself brings the entry point by which lmms-eval finds it.
$(EVAL_VENV)/.stamp: pyproject.toml constraints-eval.txt
	$(PYTHON) -m venv $(EVAL_VENV)
	$(EVAL_VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints-eval.txt torch
	$(EVAL_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r constraints-eval.txt
	$(EVAL_VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps -e .
	@touch $@

$(FLOOR_VENV)/constraints.txt: constraints.txt
	@mkdir -p $(@D)
	grep -v -e '^transformers==' -e '^huggingface-hub==' $< > $@

# The package is not installed: a Space has only its requirements.
$(SPACE_VENV)/.stamp: examples/space/requirements.txt constraints.txt
	$(PYTHON) -m venv $(SPACE_VENV)
	grep -v '^pillow==' constraints.txt > $(SPACE_VENV)/constraints.txt
	$(SPACE_VENV)/bin/python -m pip install $(PIP_FLAGS) -c $(SPACE_VENV)/constraints.txt torch
	$(SPACE_VENV)/bin/python -m pip install $(PIP_FLAGS) -c $(SPACE_VENV)/constraints.txt -r $< playwright==1.65.2 pytest
	$(SPACE_VENV)/bin/python -m pip check
	@touch $@
