# Two commands: `make demo` runs the main job, `make test` runs everything that .ci/run runs.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0
WORKERS ?= 2

# One thread a process unless a recipe says otherwise, idle threads that do not spin, and no calls home.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1

.PHONY: demo test check install stubs clean

demo: install
	$(BIN)/wardround demo

test: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# The guard's contract in Python. Its compiler must be older than 1.76: newer ones write for protobuf 7, which flwr
# 1.41 does not take; it does not go into $(VENV). `make stubs PROTOC="python -m grpc_tools.protoc"`.
PROTOC ?= python3 -m grpc_tools.protoc
stubs:
	$(PROTOC) -I. --python_out=. --pyi_out=. --grpc_python_out=. common/guard_link/guard.proto

install: $(STAMP)

# Torch comes first and alone: what follows must find it there and leave it as it is.
$(STAMP): pyproject.toml constraints.txt
	@set -e; for candidate in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "using $$($$candidate --version) for $(VENV)"; $$candidate -m venv $(VENV); exit 0; \
	  fi; \
	done; \
	echo "Wardround needs Python 3.11 or newer with its venv module. Found none." >&2; \
	echo "Install it (Debian, Ubuntu: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; print("setuptools", *project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -r $(VENV)/requirements.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
