# Every target works as the first command in a fresh clone: it needs Python >= 3.11 and make,
# and makes the virtual environment .venv by itself. PYTHON=/path/to/python picks the interpreter.

PYTHON ?=
PYTEST_ARGS ?=
PAPER_ARGS ?=
# Processes for the tests, each with one thread; WORKERS=0 runs them in one process, for a debugger.
WORKERS ?= auto

PYTEST = -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Compiled at installation, where there is a C++ compiler.
COMPILED := $(addprefix skaipo/flows/_frozen/,_couplings.cpp _couplings.h)
# There while an installation is under way, and left behind by one that was interrupted.
UNFINISHED := $(VENV)/.unfinished
PIP_OPTIONS := --quiet --disable-pip-version-check --no-input
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_OPTIONS)

# There while the packages that build the documentation are installed, as pyproject.toml has them.
DOCS_STAMP := $(VENV)/.docs-installed
EXAMPLES ?= 1

# The oldest scikit-learn that pyproject.toml allows, with numpy and scipy of its time, and the
# newest of the three. All else, torch first of all, is as in constraints.txt.
MATRIX := .venv-matrix
OLDEST := 'scikit-learn==1.6.*' 'numpy<2.2' 'scipy<1.15'
NEWEST := scikit-learn numpy scipy
MATRIX_TESTS := $(wildcard tests/test_sklearn.py tests/test_contract.py tests/test_model_selection.py)

# The libraries whose operators and flows are taken as they are, in an environment of their own.
INTEROP := .venv-interop
INTEROP_TESTS := $(wildcard tests/test_interop_operators.py tests/test_every_operator.py \
    tests/test_foreign_flows.py)

.DEFAULT_GOAL := help
.PHONY: help install demo paper-small test test-reference test-matrix test-interop docs lint format clean distclean

help:
	@echo "make demo         run the demo"
	@echo "make paper-small  rerun the paper's experiments in small; PAPER_ARGS='--images 40' changes them"
	@echo "make test         run the tests; PYTEST_ARGS='-k flows' passes arguments to pytest"
	@echo "make test-reference  run them with the plain layers in place of the kernels"
	@echo "make test-matrix  run the tests of the scikit-learn contract with its oldest and newest version"
	@echo "make test-interop run the tests with operators and flows of other libraries (deepinv, FrEIA, nflows...)"
	@echo "make docs         build the documentation into docs/_build/html"
	@echo "make lint         check style and formatting"
	@echo "make format       fix what can be fixed of both"
	@echo "make install      only make the virtual environment, $(VENV)"
	@echo "make clean        remove caches and build outputs"
	@echo "make distclean    remove $(VENV), $(MATRIX) and $(INTEROP) as well"

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m skaipo demo

# No prior is trained: it takes that of the faces if there is one, else the digits' that ships.
paper-small: $(STAMP)
	$(BIN)/python benchmarks/paper.py --profile small $(PAPER_ARGS)

test: $(STAMP)
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

test-reference: $(STAMP)
	SKAIPO_KERNELS=reference $(BIN)/python $(PYTEST) $(PYTEST_ARGS)

# Both versions are tried, also when the first fails.
test-matrix: $(STAMP)
	@set -e; trap 'exit 130' INT TERM; \
	mkdir -p $(MATRIX); failed=; \
	grep -v -E '^(numpy|scipy|scikit-learn|narwhals)==' constraints.txt > $(MATRIX)/constraints.txt; \
	for name in oldest newest; do \
	    if [ $$name = oldest ]; then set -- $(OLDEST); else set -- $(NEWEST); fi; \
	    python=$(MATRIX)/$$name/bin/python; \
	    "$$python" -m pip --version >/dev/null 2>&1 || \
	        $(BIN)/python -m venv --clear $(MATRIX)/$$name; \
	    echo "Installing $$* into $(MATRIX)/$$name"; \
	    "$$python" -m pip install $(PIP_OPTIONS) -c constraints.txt torch; \
	    "$$python" -m pip install $(PIP_OPTIONS) --upgrade -c $(MATRIX)/constraints.txt \
	        -e '.[test]' "$$@"; \
	    "$$python" -c 'import numpy, scipy, sklearn; \
	        print("scikit-learn", sklearn.__version__, "numpy", numpy.__version__, \
	              "scipy", scipy.__version__)'; \
	    "$$python" $(PYTEST) $(MATRIX_TESTS) $(PYTEST_ARGS) || failed="$$failed $$name"; \
	done; \
	[ -z "$$failed" ] || { echo "The tests failed with:$$failed" >&2; exit 1; }

test-interop: $(STAMP)
	@set -e; trap 'exit 130' INT TERM; \
	python=$(INTEROP)/bin/python; \
	"$$python" -m pip --version >/dev/null 2>&1 || $(BIN)/python -m venv --clear $(INTEROP); \
	echo "Installing the interop libraries into $(INTEROP)"; \
	"$$python" -m pip install $(PIP_OPTIONS) -c constraints.txt torch; \
	"$$python" -m pip install $(PIP_OPTIONS) -c constraints.txt -e '.[test,interop]'; \
	"$$python" $(PYTEST) $(INTEROP_TESTS) $(PYTEST_ARGS)

# Warnings are errors. EXAMPLES=0 leaves out the examples, which take longest.
docs: $(DOCS_STAMP)
	EXAMPLES=$(EXAMPLES) $(BIN)/python -m sphinx -b html -W --keep-going docs docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html"

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# An environment that was half made is made again; one that works is kept. torch comes first and
# by itself, so that the constraint alone picks its build and nothing resolves it twice.
$(STAMP): pyproject.toml constraints.txt setup.py $(COMPILED)
	@set -e; trap 'exit 130' INT TERM; \
	suitable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	usable() { \
	    [ ! -e $(UNFINISHED) ] && "$(BIN)/python" -c "$$suitable" && \
	    { "$(BIN)/python" -m pip --version || "$(BIN)/python" -m ensurepip; }; \
	}; \
	if ! usable >/dev/null 2>&1; then \
	    found=; \
	    for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	        if "$$candidate" -c "$$suitable" >/dev/null 2>&1; then found=$$candidate; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "skaipo needs Python 3.11 or newer with its venv module, and found none" >&2; \
	        echo "(tried: $(or $(PYTHON),python3 python3.13 python3.12 python3.11))." >&2; \
	        echo "Install one (on Debian and Ubuntu: python3 and python3-venv)," >&2; \
	        echo "or name one: make PYTHON=/path/to/python3" >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$("$$found" --version)"; \
	    rm -rf $(VENV); mkdir $(VENV); : > $(UNFINISHED); \
	    "$$found" -m venv $(VENV); \
	fi; \
	: > $(UNFINISHED); \
	echo "Installing skaipo and what it needs into $(VENV) (once; some minutes)"; \
	{ $(PIP_INSTALL) -c constraints.txt torch && \
	  $(PIP_INSTALL) -c constraints.txt -e '.[test]'; \
	} || { rm -f $(UNFINISHED); echo "The installation failed; see above." >&2; exit 1; }; \
	rm -f $(UNFINISHED); \
	touch $@

$(DOCS_STAMP): $(STAMP)
	@echo "Installing what builds the documentation into $(VENV) (once)"
	@$(PIP_INSTALL) -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -rf docs/_build docs/auto_examples docs/generated docs/gen_modules docs/sg_execution_times.rst
	find . -path './$(VENV)*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(MATRIX) $(INTEROP)
