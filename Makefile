# The commands of a working day. A machine needs Python 3.11, git and make; `make setup` brings the rest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# To be set on the command line: make train MODEL=las ARGS="-P training.epochs=2". Assigned with `:=`, so that a
# variable of the same name in the caller's shell means nothing here.
MODEL := tds
ARGS :=
PORT := 5000
PYTHON :=

# These would lead Python, uv, pip or pytest away from the environment that is made here.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONOPTIMIZE PYTHONWARNINGS PYTHONSAFEPATH PYTHONUSERBASE
unexport VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV
unexport UV_PYTHON UV_SYSTEM_PYTHON UV_PROJECT_ENVIRONMENT PYTEST_ADDOPTS MYPYPATH

# A CUDA wheel has hundreds of megabytes, and a proxy may hold it back until it has read all of it.
export UV_HTTP_TIMEOUT := 600

# The environment comes first, but Python and uv are looked for outside it: they are what it is remade with.
outer_path := $(subst $(CURDIR)/.venv/bin:,,$(PATH))
export PATH := $(CURDIR)/.venv/bin:$(outer_path)

.PHONY: help setup train test test-resume lint pins ui clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 13

setup: .venv/bin/sonosco  ## make the environment, .venv

train: setup  ## train on the default corpus with `mlflow run`: MODEL=las, ARGS="-P training.epochs=2"
	@mlflow run . -P model=$(MODEL) --env-manager local $(ARGS)

# In the order of the files' names, by which those that take minutes do not come last.
test: setup .venv/requirements-dev.txt  ## run the quick tests: ARGS="tests/data -x"
	@OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow' $(ARGS)

test-resume: setup .venv/requirements-dev.txt  ## kill trainings in every way, and print a table of how they went on
	@OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile tests/resume -m 'slow or not slow' $(ARGS)

lint: .venv/requirements-dev.txt  ## check style and types
	@ruff check
	ruff format --check
	mypy src tools

pins: export PATH := $(outer_path)
pins:  ## resolve pyproject.toml into the pinned files: ARGS=--upgrade
	@$(find_python)
	$(find_uv)
	PATH="$$(dirname "$$uv"):$$PATH" "$$python" tools/pins.py $(ARGS)

ui: setup  ## compare runs in the browser: PORT=5000
	@mlflow ui --port $(PORT)

clean:  ## remove the environment and everything built; data and runs stay
	rm -rf .venv .uv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +

# The copy of the pins inside the environment is made last: without it, or when the pins are others, the environment
# is made again from nothing. With uv's cache that takes seconds, and no half-installed or outlived package remains.
.venv/requirements.txt: requirements.txt
	@if cmp --silent $< $@; then touch $@; exit; fi
	$(find_python)
	$(find_uv)
	rm -rf .venv
	"$$uv" venv --relocatable --prompt sonosco --python "$$python" .venv
	"$$uv" pip install --python .venv/bin/python --requirement $<
	cp $< $@

.venv/requirements-dev.txt: requirements-dev.txt .venv/requirements.txt
	@if cmp --silent $< $@; then touch $@; exit; fi
	$(find_python)
	$(find_uv)
	"$$uv" pip install --python .venv/bin/python --no-deps --reinstall --requirement $<
	cp $< $@

# They run this working tree's code, from any folder, wherever the tree has been moved or copied to. The stages of DVC
# look for `python` on PATH. DVC's own command refuses to begin with what a killed one has cut short; this one does not.
# Python in this environment imports that code, too: the .pth's path is relative to it.
.venv/bin/sonosco: .venv/requirements.txt Makefile
	@echo ../../../../src >.venv/lib/python3.11/site-packages/sonosco-mlflow.pth
	for command in dvc=sonosco_mlflow.tracking.dvc_command sonosco=sonosco_mlflow; do
	    launcher=.venv/bin/$${command%=*}
	    rm -f $$launcher
	    cat >$$launcher <<-EOF
		#!/bin/sh
		root=\$$(dirname -- "\$$(dirname -- "\$$(dirname -- "\$$(readlink -f -- "\$$0")")")")
		unset PYTHONHOME
		export PATH="\$$root/.venv/bin:\$$PATH" PYTHONPATH="\$$root/src"
		exec python -P -m $${command#*=} "\$$@"
		EOF
	    chmod +x $$launcher
	done

# Sets $python to an interpreter, past every shim; a shim that leads to another version, or to none, is passed over.
# pyenv's own come first: a plain `mlflow run .` has pyenv bring, or else compile, the patch release that launches it.
define find_python
export PATH='$(outer_path)'
if [[ -n '$(PYTHON)' ]]; then
    found=('$(PYTHON)')
else
    pyenv=$$(pyenv root 2>/dev/null) || pyenv=
    mapfile -t found < <(compgen -G "$$pyenv/versions/3.11.*/bin/python" || true; type -aP python3.11 python3)
fi
python=
for candidate in "$${found[@]}"; do
    python=$$("$$candidate" -c 'import sys; assert sys.version_info[:2] == (3, 11); print(sys._base_executable)' \
        2>/dev/null) && break
done
if [[ -z $$python ]]; then
    echo "Python 3.11 is needed. Looked at: $${found[*]:-nothing, there is no python3 on PATH}." >&2
    echo "Install it, or name it: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi
endef

# Sets $uv to one that works: the machine's, else the pinned one, installed into .uv by pip. Debian's Python may lack
# ensurepip (then there is no pip in a venv) or pip.
define find_uv
uv=$$(type -P uv) && "$$uv" --version >/dev/null 2>&1 || uv=$(CURDIR)/.uv/bin/uv
if ! "$$uv" --version >/dev/null 2>&1; then
    pin=$$(grep '^uv==' requirements.txt)
    rm -rf .uv
    if "$$python" -m venv .uv >/dev/null 2>&1; then
        .uv/bin/python -m pip install --quiet "$$pin"
    elif rm -rf .uv; "$$python" -m pip --version >/dev/null 2>&1; then
        "$$python" -m pip install --quiet --target .uv "$$pin"
    else
        echo "$$python has neither ensurepip nor pip, so uv cannot be installed with it." >&2
        echo "Install uv, or Debian's python3.11-venv, or pip for that Python; then run make again." >&2
        exit 1
    fi
fi
endef
