# Two commands for a newcomer: `make demo` and `make test`. Both set everything up first.

PYTHON ?= python3
# Where pip's default torch brings gigabytes of CUDA that you do not want, name an index with CPU builds, as PyTorch's
# installation page gives it: make demo TORCH_INDEX=https://...
TORCH_INDEX ?=
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/demo.yaml
ON ?= runpod

.DEFAULT_GOAL := help
.PHONY: help demo stop test test-slow check format submit plan cloud manifests gke gke-down lock image-check sbom audit weights evaluate clean-venv

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes the first time)"
	@date +%s > .install-started
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@echo $$(( $$(date +%s) - $$(cat .install-started) )) > $@ && rm .install-started
	@echo "installed in $$(cat $@) s"

demo: $(VENV)/.ready ## a museum's pictures in, a generator out, on this machine; leaves the service up
	$(BIN)/python deploy/local/demo.py up --install-seconds $$(cat $(VENV)/.ready)

stop: ## end what `make demo` started
	@if [ -x $(BIN)/python ]; then $(BIN)/python deploy/local/demo.py stop; fi

test: $(VENV)/.ready ## unit and integration tests, under ten minutes, no network
	$(BIN)/pytest -q

test-slow: $(VENV)/.ready ## what takes longer: kills, full size, a browser
	$(BIN)/pytest -q -m slow

check: $(VENV)/.ready ## ruff, mypy strict, the import rules, every configuration
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/test_config.py

format: $(VENV)/.ready ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

submit: $(VENV)/.ready ## one stage on a running cluster: make submit STAGE=train CONFIG=configs/sd14.yaml ON=runpod
	$(BIN)/python -m deploy.submit $(STAGE) --config $(CONFIG) --on $(ON) $(ARGS)

plan: $(VENV)/.ready ## what a run will cost: make plan CONFIG=configs/sd14.yaml ON=runpod
	$(BIN)/python -m ray_jobs.plan --config $(CONFIG) --on $(ON) $(ARGS)

cloud: $(VENV)/.ready ## RunPod, rent to give back: make cloud CONFIG=configs/sd14.yaml
	$(BIN)/python -m deploy.once --config $(CONFIG) $(if $(KEEP),--keep) $(ARGS)

manifests: $(VENV)/.ready ## cluster.yaml, serve/runpod.yaml and deploy/gke from the settings of configs/sd14.yaml (or CONFIG=...)
	$(BIN)/python -m deploy.manifests --config $(if $(filter file,$(origin CONFIG)),configs/sd14.yaml,$(CONFIG))

gke: ## what deploy/gke says on GKE: cluster, node pools, bucket, bindings (needs gcloud, kubectl, helm)
	bash deploy/gke.sh

gke-down: ## delete all that `make gke` made but the bucket
	bash deploy/gke.sh down

lock: $(VENV)/.ready ## the image's libraries by hash (needs uv; LINKS names a folder with the CPU build of torch)
	uv pip compile pyproject.toml --extra adam8bit -c constraints.txt --generate-hashes --python-version 3.11 --no-header \
	  --no-annotate -q -o deploy/requirements-gpu.lock
	uv pip compile pyproject.toml -c constraints.txt --generate-hashes --python-version 3.11 --no-header --no-annotate \
	  $(if $(LINKS),--find-links $(LINKS)) -q -o deploy/requirements-cpu.lock

image-check: $(VENV)/.ready ## lint the Dockerfile, and run its install steps in a clean virtual environment
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/pytest -q -m image tests/deploy/test_image.py

sbom: $(VENV)/.ready ## a CycloneDX list of what the image holds (needs the network)
	$(BIN)/pip install --quiet cyclonedx-bom==7.5.0 && $(BIN)/cyclonedx-py requirements deploy/requirements-gpu.lock -o out/sbom.json

audit: $(VENV)/.ready ## known vulnerabilities in it (needs the network)
	$(BIN)/pip install --quiet pip-audit==2.10.1 && $(BIN)/pip-audit --require-hashes --disable-pip -r deploy/requirements-gpu.lock

weights: $(VENV)/.ready ## train the miniature models from nothing (hours on a CPU, resumable)
	$(BIN)/python -m momalisa.miniature.train --work out/miniature

evaluate: $(VENV)/.ready ## measure the miniature models
	$(BIN)/python -m momalisa.miniature.evaluate --sheet out/evaluation.png

clean-venv: ## forget the virtual environment
	rm -rf $(VENV)
