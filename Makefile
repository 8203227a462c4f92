# One command per job; each makes or updates .venv first (.ci/setup.sh) and skips that when nothing changed.
# Options: BACKEND=cpu|gpu, PYTHON=/path/to/python, ARGS="more arguments for ppow demo or pytest", JOBS=processes of
# pytest (2, which share the cores; 0 where there is a GPU: its memory is for one).

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-vllm lint format lock clean distclean

BIN := .venv/bin
JOBS ?= $(shell nvidia-smi > /dev/null 2>&1 && echo 0 || echo 2)
export BACKEND PYTHON VLLM_CPU

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## make .venv
	@.ci/setup.sh

demo: setup ## the whole loop once: train a drafter, serve it, compare
	$(BIN)/ppow demo $(ARGS)

test: lint ## everything that must pass before a change lands
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-vllm: setup ## what VLLM_CPU=0.31.0 (say) must pass, in an environment of its own
	@test -n "$(VLLM_CPU)" || { echo "Name a version: make test-vllm VLLM_CPU=0.31.0" >&2; exit 2; }
	.venv-vllm-cpu-$(VLLM_CPU)/bin/python -m pytest tests/contracts tests/serving tests/e2e/test_in_process.py \
		tests/e2e/test_distribution.py --record-compatibility $(ARGS)

lint: setup ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd examples/benchmarks && ../../$(BIN)/mypy --config-file ../../pyproject.toml *.py

format: setup ## put the formatting right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: setup ## lock new versions into .ci/requirements/
	.ci/lock.sh

clean: ## remove what builds and tests leave behind
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv too
	rm -rf .venv .setup.lock
