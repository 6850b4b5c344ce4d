PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
# rho, alpha and the second weight decay were chosen on seeds 100 to 105: docs/choosing.md, "Measured".
DEMO := looksam compare sgd sgd:weight_decay=0.08 sam:rho=0.4 sam-5:rho=0.4 looksam-5:rho=0.1,alpha=0.7 \
        --data digits --label-noise 0.4 --seeds 4 --epochs 50 --warmup 5 --out runs/demo --overwrite

BIN := .venv/bin
CSRC := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
NATIVE := $(CSRC) $(wildcard looksam_kernels/build/*.py)
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install --no-warn-conflicts -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test nightly bench bench-check docs lint format dist-check release-check clean
.PHONY: gpu gpu-first gpu-second

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/lab ## train a small network with SGD, SAM, SAM-5 and LookSAM-5 on noisy labels and compare them
	@echo '== $(DEMO)'
	@$(BIN)/$(DEMO)

test: .venv/installed ## run the tests; PYTEST_ARGS='-k lamb -x' passes options on
	@$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

nightly: ## make test over more cases, random ones among them: every GPU architecture, Triton's whole matrix, new sequences
	@LOOKSAM_NIGHTLY=1 $(MAKE) --no-print-directory test

bench: .venv/installed ## measure every op and step beside its peers; BENCH_ARGS=--quick passes options on
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-check: .venv/installed ## compare the ratios of now with the committed results of this kind of machine; two minutes, quiet
	@$(BIN)/python -m benchmarks.check $(CHECK_ARGS)

docs: .venv-docs/installed ## build the documentation into site/; LOOKSAM_REPOSITORY_URL puts a link at its top
	@PATH="$(CURDIR)/.venv-docs/bin:$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo '== site/index.html'

lint: .venv/installed ## check style (ruff, clang-format), types (mypy) and import arrows (import-linter)
	@echo '== ruff'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo '== clang-format'
	@$(BIN)/clang-format --dry-run --Werror $(CSRC)
	@echo '== mypy'
	@$(BIN)/mypy
	@echo '== import-linter'
	@$(BIN)/lint-imports --no-logo

dist-check: .venv/installed ## build sdist and wheel without a network, and look into them
	@$(BIN)/python -m pytest -q tests/packaging/test_artefacts.py

release-check: .venv/installed ## install the artefacts into fresh environments and use them there; CHECK_ARGS='--torch 2.13.0' picks one
	@$(BIN)/python -m tests.packaging.release $(CHECK_ARGS)

format: .venv/installed ## rewrite the Python and C++ files in the project's style
	@$(BIN)/clang-format -i $(CSRC)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# On a machine with an NVIDIA GPU, nvcc and a CUDA torch, which GPU_PYTHON has. Nothing is installed: what a part lacks is named,
# and the part left out. GPU_ARGS='--only triton' passes options on; --rehearse runs it all without a GPU.
GPU_PYTHON ?= python3
GPU_ARGS ?=
GPU_RUN = @PYTHONPATH=python:.:$$PYTHONPATH $(GPU_PYTHON) -m tests.gpu

gpu: ## on a GPU: gpu-first, then gpu-second; logs in build/gpu, and in $OUT where that is set
	$(GPU_RUN) first second $(GPU_ARGS)

gpu-first: ## within ten minutes: build, smoke test, native tests, benchmark, Triton tests
	$(GPU_RUN) first $(GPU_ARGS)

gpu-second: ## within ten minutes: compute-sanitizer on every kernel, then profiles of the hot ones
	$(GPU_RUN) second $(GPU_ARGS)

clean: ## remove the environment, builds and caches; results under runs/ stay
	rm -rf .venv .venv-docs site build dist *.egg-info python/*.egg-info .benchmarks .hypothesis
	rm -f looksam_kernels/*.so looksam_kernels/native_build.txt
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find looksam_kernels python tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Order-only where it is used: bin/python is a link to the system's Python, whose age says nothing.
.venv/bin/pip:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "'$(PYTHON)' is not there. Python 3.10 or newer is needed; make PYTHON=/path/to/python3 names one."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "'$(PYTHON)' is $$($(PYTHON) --version 2>&1). Python 3.10 or newer is needed; make PYTHON=/path/to/python3 names one."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' has no venv module. On Debian and Ubuntu: apt install python3-venv."; exit 1; }
	@echo "== .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# The project is built against the torch in .venv: build isolation would fetch a second one and ignores the constraints.
.venv/lab: pyproject.toml constraints.txt setup.py $(NATIVE) | .venv/bin/pip
	@echo '== torch and build tools into .venv (torch is a large download)'
	@$(PIP) torch 'setuptools>=77' setuptools-scm wheel ninja
	@echo '== looksam-kernels, compiled where a C++ compiler is there, with what its lab needs'
	@$(PIP) --no-build-isolation --editable '.[lab]'
	@touch $@

.venv/installed: .venv/lab
	@echo '== what tests, lint and the documentation need; timm, a peer in the tests, without its torchvision'
	@LOOKSAM_NATIVE=0 $(PIP) --no-build-isolation --editable '.[test,dev,docs]'
	@$(PIP) --no-deps timm
	@touch $@

# An environment of its own: the pages are made from the sources' text, without torch and without the package.
.venv-docs/installed: pyproject.toml constraints.txt
	@echo '== documentation tools into .venv-docs'
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip -qq --disable-pip-version-check install -c constraints.txt \
	  $$(sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
	@touch $@
