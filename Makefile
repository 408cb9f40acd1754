SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: train test test-algorithms test-jobs test-faults test-lts test-extras coverage mutants lint docs clean help

CONF ?= conf/digits.toml
ARGS ?=
COMMAND ?= bash .ci/run
SETUP := source .ci/setup.sh

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):  ## /make \1\t/p' Makefile

train:  ## set up, then train CONF (conf/digits.toml) with spark-submit; ARGS="--set fit.epochs=3"
	@$(SETUP)
	spark-submit --conf spark.driver.host=localhost jobs/train.py "$(CONF)" $(ARGS)

test:  ## set up, then format, lint, types and the three tiers of tests, each timed
	@$(SETUP)
	bash .ci/test.sh

test-jobs:  ## set up, then whole jobs, notebooks and searches on local[2], and Spark Connect
	@$(SETUP)
	bash .ci/test.sh jobs

test-algorithms:  ## set up, then the algorithms against their papers, and a small run of each preset
	@$(SETUP)
	bash .ci/test.sh algorithms

test-faults:  ## set up, then the fault matrix, fuzzing and eight rows on the real cluster
	@$(SETUP)
	bash .ci/test.sh faults

test-lts:  ## the same tests on Spark 3.5, pyarrow 14 and petastorm, in an environment of their own
	@$(SETUP)
	bash .ci/lts.sh

test-extras:  ## MLflow, TensorBoard, ONNX, transformers, Lightning, Keras, Airflow and a browser, in environments of their own
	@$(SETUP)
	bash .ci/extras.sh

coverage:  ## set up, then line and branch coverage of sparkdeep/ by COMMAND (all of .ci/run), added to what build/coverage has
	@$(SETUP)
	bash .ci/coverage.sh $(COMMAND)

mutants:  ## set up, then try whether tests notice changes of the heart, by what make coverage has seen; ARGS="--count 30"
	@$(SETUP)
	python benchmarks/mutants.py $(ARGS)

lint:  ## set up, then format, lint and types only
	@$(SETUP)
	bash .ci/test.sh lint

docs:  ## the documentation as a site, in site/; made by an environment of its own
	@python3 -m venv .venv-docs
	.venv-docs/bin/python - <<'END' | xargs -d '\n' .venv-docs/bin/python -m pip install -qq --disable-pip-version-check
	import tomllib
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")
	END
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

clean:  ## remove what the other commands made
	@rm -rf .venv .venv-* build dist site runs spark-warehouse metastore_db derby.log *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
