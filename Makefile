# Each target sets up what it needs first: see tools/setup_env.py. PYTHON: the Python to set up with, or to use if it
# has torch. ARGS: passed on to what the target runs.
PYTHON ?= python3
ARGS ?=
SETUP := "$(PYTHON)" tools/setup_env.py
SOURCES = $(shell find torch_ep/csrc test -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# One process on a GPU host: see test/conftest.py. Each file stays in one process, since its tests share what is slow to
# make, and files keep the order of test/conftest.py.
SIDE_BY_SIDE = -n auto --dist loadfile --no-loadscope-reorder
QUICK = $(addprefix api/test_,reference.py errors.py autograd.py groups.py routing.py calls.py) compile/test_opcheck.py

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: help demo decode test test-quick test-integrations test-gpu sanitize lint docs bench

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo 'ARGS="..." goes to the command, as in: make demo ARGS="--steps 100 --ranks 4" or make demo ARGS=--help'

demo: ## train a small MoE language model on the Python standard library; results in runs/moe
	@python=$$($(SETUP) demo) && exec "$$python" examples/train_moe.py $(ARGS)

decode: ## continue prompts with the model that `make demo` trained; results in runs/decode
	@python=$$($(SETUP) demo) && exec "$$python" examples/decode_moe.py $(ARGS)

test: ## run the tests, a process on each core
	@python=$$($(SETUP) test) && exec "$$python" -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-quick: ## run the tests to repeat after every change: results, errors, gradients, groups
	@python=$$($(SETUP) test) && exec "$$python" -m pytest $(SIDE_BY_SIDE) $(addprefix test/,$(QUICK)) $(ARGS)

test-integrations: ## install other frameworks, and run the tests with them on the CPU
	@python=$$($(SETUP) test integrations) && exec "$$python" -m pytest test/integrations $(ARGS)

test-gpu: ## run the tests that need a GPU, on a host that has one or several
	@python=$$($(SETUP) test) && exec "$$python" -m pytest -m gpu -rs $(ARGS)

sanitize: ## run reference tests and fuzzers with AddressSanitizer and UndefinedBehaviorSanitizer, on a CPU
	@python=$$($(SETUP) --no-extension test) && exec "$$python" tools/sanitize.py $(ARGS)

lint: ## check style and types: ruff, clang-format, mypy
	@python=$$($(SETUP) --no-extension lint) || exit; \
	status=0; \
	"$$python" -m ruff check . || status=1; \
	"$$python" -m ruff format --check . || status=1; \
	"$$("$$python" -c 'import clang_format; print(clang_format.get_executable("clang-format"))')" \
		--dry-run -Werror $(SOURCES) || status=1; \
	"$$python" -m mypy torch_ep || status=1; \
	exit $$status

docs: ## build these pages and the API reference as a website in build/docs; a broken link is an error
	@python=$$($(SETUP) docs) && "$$python" docs/diagrams.py > /dev/null && \
		"$$python" -m sphinx -W --keep-going -q -d build/doctrees $(ARGS) docs build/docs && echo build/docs/index.html

bench: ## measure dispatch and combine against hand-written exchanges
	@python=$$($(SETUP) demo) && exec "$$python" benchmarks/bench.py $(ARGS)
