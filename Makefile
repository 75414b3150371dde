# Everything a developer or CI runs. `make help` lists it.
SHELL := /bin/bash
GO ?= go
export CGO_ENABLED ?= 0
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
LAB := bin/forerun-lab
FUZZTIME ?= 60s
UNIT := ./api/... ./block/... ./control/... ./daemon/... ./data/... ./disk/... ./internal/... ./lab/...

.PHONY: help build setup test vet unit race e2e demo bench bench-boot bench-link bench-local bench-pair crash pair long fuzz clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | column -t -s $$'\t'

build: ## build bin/forerun and the lab's bin/forerun-lab
	$(GO) build -trimpath -o bin/forerun ./cmd/forerun
	$(GO) build -trimpath -o $(LAB) ./cmd/forerun-lab

setup: ## install the Debian packages that tests and lab need, if any is missing
	@scripts/setup.sh

test: setup build vet unit race e2e ## everything CI checks, under 15 minutes on 2 cores

vet: ## gofmt, go vet, staticcheck
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo 'gofmt the files above'; exit 1; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

unit: ## the unit tests and the house rules
	$(GO) test -timeout 10m . $(UNIT)

race: ## the unit tests under the race detector
	CGO_ENABLED=1 $(GO) test -race -short -timeout 10m $(UNIT)

e2e: build ## the daemons with real peers
	$(GO) test -timeout 10m ./cmd/...

demo: setup build ## the main job: a Debian guest moves while it runs
	$(LAB) demo

bench: bench-local bench-boot bench-link bench-pair ## all benchmarks

bench-boot: setup build ## time to ready and full copy, against qemu-nbd over the same link
	$(LAB) bench-boot

bench-link: setup build ## the link: fill, demand under it, bytes, processor time, each beside its peers; JSON lines, about 2 hours, QUICK=1 5 minutes
	$(LAB) bench-link $(if $(QUICK),--quick)

bench-local: setup build ## local reads and writes, against qemu-nbd and nbdkit
	$(LAB) bench-local

crash: setup build ## kill -9 of backend, frontend and cut-over at seeded moments
	$(LAB) crash --target backend --n 50
	$(LAB) crash --target frontend --n 50
	$(LAB) crash --target cutover --n 50

pair: setup build ## two frontends: killed under PostgreSQL, destroyed, aborted, cloned, moved back
	$(LAB) pair-pgbench
	$(LAB) pair-failover
	$(LAB) pair-both
	$(LAB) pair-backend
	$(LAB) pair-lost
	$(LAB) pair-boot
	$(LAB) pair-abort
	$(LAB) pair-clone
	$(LAB) pair-return

bench-pair: setup build ## replicated writes against their floor, write-back against QEMU's mirror
	$(LAB) bench-pair
	$(LAB) bench-writeback

sim: build ## 10,000 seeded simulations of a pair, about 10 minutes on 2 cores
	$(LAB) sim --seeds 10000

sim-nightly: build ## 1,000,000 of them, other seeds each day: about 12 hours on 2 cores
	$(LAB) sim --seeds 1000000 --from $$(( $$(date +%s) / 86400 * 1000000 ))

long: setup build ## the end-to-end tests with 1 GiB in 64 TiB and a link cut for a minute
	FORERUN_LONG=1 $(GO) test -count=1 -timeout 20m -v -run 'Huge|LinkCut' ./cmd/forerun

fuzz: ## every fuzz target for FUZZTIME
	scripts/fuzz.sh $(FUZZTIME)

clean: ## remove what was built
	rm -rf bin
