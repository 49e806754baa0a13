.PHONY: check docs lint test

check: lint docs test

lint:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	python docs/tools/check_site.py build/docs

test:
	pytest
