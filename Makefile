# `make demo`: set-up, samples of two models, training of all parts on handwritten digits,
# samples and their figures.
# `make test`: set-up and all tests. `make check`: style and the tests that are not slow.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# In the order of tests/conftest.py, which begins with the files that take longest; a worker more
# than two cores, since some tests wait.
PYTEST := $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test check lint clean

setup: $(VENV)/installed

$(VENV)/installed: export PIP_DISABLE_PIP_VERSION_CHECK = 1
$(VENV)/installed: export PIP_ROOT_USER_ACTION = ignore
$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d; name one with make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --quiet --requirement requirements.txt --editable '.[test]'
	touch $@

demo: setup
	rm -rf runs/demo
	$(BIN)/python -m nvg_jax.figures --workdir=docs/models/emoji_16 --figures=reuse --image=docs/control/emoji/house.png,docs/control/emoji/smiley_cat.png --classes="fluent heart,noto food-fruit,noto keycap" --out=runs/demo
	$(BIN)/python -m nvg_jax.sample --workdir=fashion_mnist --structure_map=circle_center --out=runs/demo/circles
	$(BIN)/python -m nvg_jax.train --config=configs/digits.py:demo --workdir=runs/demo
	$(BIN)/python -m nvg_jax.evaluate --workdir=runs/demo --num_samples=1000 --batch_size=250 --out=runs/demo

test: setup
	$(PYTEST)

check: lint
	$(PYTEST) -m 'not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .pytest_cache runs/demo
