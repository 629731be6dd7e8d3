# make quickstart   set up .venv and run the main job     make test   set up .venv and run all checks
# make setup GPU=1  for a machine with a CUDA GPU (onnxruntime-gpu instead of onnxruntime)

PY := .venv/bin/python
JOBS ?= 2
RUNTIME := $(if $(GPU),gpu,cpu)
EXTRAS := $(RUNTIME),demo,openvino,trt-rtx,dev
FIND_LINKS := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))

.PHONY: quickstart setup demo browser test lint bench clean

quickstart: setup
	$(PY) scripts/distill.py

demo: setup
	$(PY) demo/app.py

# Debian's Chromium, which the demo's browser tests drive; without it they are skipped.
browser:
	test -x /usr/bin/chromium || { apt-get update -qq && apt-get install -y -qq chromium; }

setup: .venv/ready-$(RUNTIME)

# uv installs in seconds what takes pip a minute; where uv cannot be had, pip does the same work.
.venv/ready-$(RUNTIME): pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	rm -f .venv/ready-*
	( .venv/bin/pip install --quiet uv && \
	  .venv/bin/uv pip install --quiet --python $(PY) $(FIND_LINKS) -c constraints.txt -e '.[$(EXTRAS)]' ) || \
	  .venv/bin/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

test: setup lint
	$(PY) -m pytest -n $(JOBS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright

bench: setup
	for script in benchmarks/*.py; do echo "== $$script"; $(PY) $$script || exit 1; done

clean:
	rm -rf .venv runs
