# `make check` is all that a change has to pass; CI runs the same.
.PHONY: check lint types contract test fast whole format

check: lint types test

lint:
	ruff format --check .
	ruff check .

types:
	mypy

contract: # which package may import which; part of `test`
	pytest tests/test_architecture.py

test:
	pytest

fast: # leaves out what takes more than 20 seconds
	pytest -m "not slow"

whole: # every kind and mix x family x linearisation, of which `test` takes a part
	pytest -m whole

format:
	ruff format .
	ruff check --fix .
