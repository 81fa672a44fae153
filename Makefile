# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-avx2 check docs node models results search avx2 lengths protocol compensated registers ladder ablation audits prices diffusion readme gpu gpu-wheels clean

demo: $(VENV)/.demo
	$(BIN)/vitfold demo -o out/demo

test: $(VENV)/.dev check
	$(BIN)/python -m pytest -n auto

# The tests on a processor that looks as if it ended at AVX2, where integer products of 8-bit weights saturate; Linux on x86-64.
test-avx2: $(VENV)/.dev out/avx2.so
	LD_PRELOAD=$(CURDIR)/out/avx2.so VITFOLD_CACHE=$(CURDIR)/out/avx2-cache $(BIN)/python -m pytest -n auto

out/avx2.so: tests/processors/avx2.c
	mkdir -p out
	cc -O2 -shared -fPIC -o $@ $< -ldl

check: $(VENV)/.dev
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else "vitfold needs Python 3.10 to 3.13; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# pip's output is shown: the first installation downloads PyTorch and takes minutes.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[optimize]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[all,dev]'
	touch $@ $(VENV)/.demo

# What the tests of `vitfold export --format web` need beside Chromium and Node, 450 MB; without it they are skipped.
node:
	npm install --no-save --no-package-lock --no-audit --no-fund --ignore-scripts onnxruntime-web onnxruntime-node sharp

# A site of docs/ in out/docs; a link that leads nowhere is an error.
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs out/docs
	@echo "out/docs/index.html"

# The measurements behind the README, about 30 minutes on an idle machine, the ladder some hours more. CIFAR10_VAL and
# CIFAR10_TRAIN: class folders of test and training images; PHOTOS: any folder of photos, for end-to-end times and calibration.
CIFAR10_VAL ?= assets/demo/images
CIFAR10_TRAIN ?= assets/demo/images
PHOTOS ?= assets/demo/images
WORK := out/results
comma := ,
VITB := timm:vit_base_patch16_224 --weights random
PEERS := torch,torch-compile,onnxruntime
INT8 := --quant w8a8 --method minmax --calibration-size 16 --images $(PHOTOS) --keep-slower --overwrite
# Processors that multiply bfloat16 have more rows: OpenVINO takes it by itself there.
BF16 := $(shell grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null && echo -bf16)
OV := $(if $(BF16),openvino openvino-bf16,openvino)
BF16PEERS := $(if $(BF16),$(comma)torch-bf16$(comma)openvino-bf16$(comma)nncf-bf16)
RUNGS := $(foreach r,0 8,$(WORK)/r$(r).fold) $(if $(BF16),$(WORK)/r0-bf16.fold) \
	$(foreach k,w8a8 w8a8-ov $(if $(BF16),w8a8-ov-bf16),$(foreach r,0 8,$(WORK)/r$(r)-$(k).fold))
INT8PEERS := --peers torch,torch-compile,onnxruntime,onnxruntime-int8,openvino,nncf$(BF16PEERS) \
	--baseline torch --calibration-images $(PHOTOS) --calibration-size 32
BENCH := $(BIN)/vitfold bench --images $(PHOTOS) --limit 1

results: $(VENV)/.dev
	mkdir -p results $(WORK)
	$(BIN)/vitfold demo -o $(WORK)/demo --seconds 6 --json-output results/demo.json
	for r in 0 1 2 3 4; do $(BIN)/vitfold optimize demo --merge $$r -o $(WORK)/demo/r$$r.fold --overwrite; done
	for r in 0 1 2 3 4; do $(BIN)/vitfold evaluate $(WORK)/demo/r$$r.fold --images $(CIFAR10_VAL) --json > results/cifar10-r$$r.json; done
	for r in 2 3; do $(BIN)/vitfold optimize demo --merge $$r --quant w8a8 --images $(CIFAR10_TRAIN) --keep-slower --overwrite -o $(WORK)/r$$r-w8a8.fold; \
		$(BIN)/vitfold evaluate $(WORK)/r$$r-w8a8.fold --images $(CIFAR10_VAL) --json > results/cifar10-r$$r-w8a8.json; done
	printf '[quant]\nweights = 8\nactivations = 8\noutputs = false\n' > $(WORK)/products.toml
	printf '[quant]\nweights = 8\nactivations = 8\n' > $(WORK)/codes.toml
	for f in products codes; do $(BIN)/vitfold optimize demo --recipe $(WORK)/$$f.toml --target integer --images $(CIFAR10_TRAIN) --keep-slower --overwrite -o $(WORK)/$$f.fold; \
		$(BIN)/vitfold evaluate $(WORK)/$$f.fold --images $(CIFAR10_VAL) --json > results/integer-$$f.json; done
	for r in 0 8 16; do $(BIN)/vitfold optimize $(VITB) --merge $$r -o $(WORK)/r$$r.fold --overwrite; done
	$(BENCH) $(WORK)/r0.fold $(WORK)/r8.fold $(WORK)/r16.fold --peers $(PEERS) --baseline onnxruntime --trials 15 --seconds 10 -o results/vit-b16-batch1.json
	$(BENCH) $(WORK)/r0.fold $(WORK)/r8.fold $(WORK)/r16.fold --peers $(PEERS) --baseline onnxruntime --trials 6 --seconds 12 --batch 8 -o results/vit-b16-batch8.json
	for c in gather=gather_elements gather=one_hot scatter_add=scatter_elements linear_bias=add; do \
		$(BIN)/vitfold optimize $(VITB) --merge 8 --target cpu:$$c -o $(WORK)/$$c.fold --overwrite; done
	$(BENCH) $(WORK)/r8.fold $(WORK)/gather=gather_elements.fold $(WORK)/gather=one_hot.fold $(WORK)/scatter_add=scatter_elements.fold \
		$(WORK)/linear_bias=add.fold --trials 15 --seconds 8 -o results/merge-lowerings.json
	for c in gather=gather_nd gather=gather_elements gather=one_hot scatter_add=scatter_elements; do \
		$(BIN)/vitfold optimize $(VITB) --merge 8 --target openvino$(BF16):$$c -o $(WORK)/ov-$$c.fold --overwrite; done
	$(BENCH) $(foreach c,gather=gather_elements gather=gather_nd gather=one_hot scatter_add=scatter_elements,$(WORK)/ov-$(c).fold) \
		--batch 8 --trials 9 --seconds 2 -o results/merge-lowerings-openvino.json
	for a in fused decomposed; do for r in 0 4; do $(BIN)/vitfold optimize demo --merge $$r --quant w8a8 --images $(CIFAR10_TRAIN) --keep-slower \
		--target cpu-vnni:attention=$$a --overwrite -o $(WORK)/r$$r-$$a.fold; done; done
	$(BIN)/vitfold bench $(foreach r,0 4,$(WORK)/r$(r)-decomposed.fold $(WORK)/r$(r)-fused.fold) --images $(CIFAR10_VAL) --limit 500 \
		--baseline r0-decomposed --trials 25 --seconds 5 -o results/attention-cifar10.json
	for r in 0 8; do \
		$(BIN)/vitfold optimize $(VITB) $(INT8) --merge $$r -o $(WORK)/r$$r-w8a8.fold; \
		for t in $(OV); do $(BIN)/vitfold optimize $(VITB) $(INT8) --merge $$r --target $$t -o $(WORK)/r$$r-w8a8-ov$${t#openvino}.fold; done; done
	$(if $(BF16),$(BIN)/vitfold optimize $(VITB) --target openvino-bf16 --overwrite -o $(WORK)/r0-bf16.fold)
	$(BENCH) $(RUNGS) $(INT8PEERS) --trials 10 --seconds 3 -o results/vit-b16-int8-batch1.json
	$(BENCH) $(RUNGS) $(INT8PEERS) --trials 5 --seconds 6 --batch 8 -o results/vit-b16-int8-batch8.json

# The search of docs/sweeps.md, its winner beside constant r, and about the same share of tokens on ViT-B/16 beside peers, in merges that lead to
# multiples of 16, on all threads and on one, and what limits that.
# An hour on an idle machine, most of it the search and six calibrations.
SEARCH := $(WORK)/search
SHARE := 5,0,0,0,0,64,0,32,0,0,0,0
search: $(VENV)/.dev
	mkdir -p $(SEARCH)
	cd $(SEARCH) && $(CURDIR)/$(BIN)/vitfold optimize demo --max-drop 1.0 --images $(abspath $(CIFAR10_VAL)) --calibration-images $(abspath $(CIFAR10_TRAIN)) \
		-o demo.fold --overwrite --json > $(CURDIR)/results/search$(BF16)-cifar10.json
	rm -rf $(SEARCH)/found.fold && cp -r $(SEARCH)/demo.fold $(SEARCH)/found.fold
	for r in 0 1 2 3 4; do $(BIN)/vitfold optimize demo --merge $$r --quant w8a8 --target openvino --images $(CIFAR10_TRAIN) --keep-slower --overwrite \
		-o $(SEARCH)/r$$r-w8a8-ov.fold; done
	$(BIN)/vitfold optimize demo --merge 3 --quant w8a8 --images $(CIFAR10_TRAIN) --keep-slower --overwrite -o $(SEARCH)/r3-w8a8.fold
	cd $(SEARCH) && $(CURDIR)/$(BIN)/vitfold bench found.fold r3-w8a8.fold r0-w8a8-ov.fold r1-w8a8-ov.fold \
		r2-w8a8-ov.fold r3-w8a8-ov.fold r4-w8a8-ov.fold --images $(abspath $(CIFAR10_VAL)) \
		--limit 5000 --baseline r0-w8a8-ov --trials 15 --seconds 6 -o $(CURDIR)/results/search-winner.json
	$(BIN)/vitfold optimize $(VITB) $(INT8) --merge $(SHARE) -o $(SEARCH)/found-w8a8.fold
	for t in $(OV); do for m in found=$(SHARE) align=align r0=0; do \
		$(BIN)/vitfold optimize $(VITB) $(INT8) --merge $${m#*=} --target $$t -o $(SEARCH)/$${m%%=*}-w8a8-ov$${t#openvino}.fold; done; done
	$(if $(BF16),$(BIN)/vitfold optimize $(VITB) --merge $(SHARE) --target openvino-bf16 --overwrite -o $(SEARCH)/found-bf16.fold)
	$(BENCH) $(foreach k,w8a8 w8a8-ov $(if $(BF16),bf16 w8a8-ov-bf16),$(SEARCH)/found-$(k).fold) \
		$(foreach t,$(OV),$(SEARCH)/align-w8a8-ov$(t:openvino%=%).fold) $(SEARCH)/r0-w8a8-ov$(lastword $(OV:openvino%=%)).fold --calibration-images $(PHOTOS) --calibration-size 32 \
		--peers torch,onnxruntime-int8,nncf$(BF16PEERS) --trials 15 --seconds 3 -o results/vit-b16-found-batch1.json
	$(BIN)/vitfold optimize $(VITB) $(INT8) -o $(SEARCH)/r0-w8a8.fold
	$(BENCH) $(foreach b,r0-w8a8 found-w8a8 found-w8a8-ov r0-w8a8-ov$(BF16) $(if $(BF16),found-w8a8-ov-bf16),$(SEARCH)/$(b).fold) \
		--calibration-images $(PHOTOS) --calibration-size 32 --peers torch,onnxruntime,onnxruntime-int8,openvino,nncf$(BF16PEERS) \
		--baseline torch --threads 1 --trials 10 --seconds 3 -o results/vit-b16-found-threads1.json
	$(BIN)/vitfold profile $(SEARCH)/found-w8a8.fold -o results/profile-vit-b16-found.json

# ViT-B/16 and its peers on a processor that looks as if it ended at AVX2: a quarter of an hour.
AVX2 := LD_PRELOAD=$(CURDIR)/out/avx2.so VITFOLD_CACHE=$(CURDIR)/out/avx2-cache
avx2: $(VENV)/.dev out/avx2.so
	mkdir -p $(WORK)/avx2
	for m in r0=0 r8=8 found=$(SHARE) old=0,0,0,0,0,42,36,30,0,0,0,0; do $(AVX2) $(BIN)/vitfold optimize $(VITB) $(INT8) --merge $${m#*=} -o $(WORK)/avx2/$${m%%=*}-w8a8.fold; done
	for r in 0 8; do $(AVX2) $(BIN)/vitfold optimize $(VITB) --merge $$r --overwrite -o $(WORK)/avx2/r$$r.fold; done
	$(AVX2) $(BENCH) $(foreach b,r0 r8 r0-w8a8 r8-w8a8 found-w8a8 old-w8a8,$(WORK)/avx2/$(b).fold) --calibration-images $(PHOTOS) --calibration-size 32 \
		--peers torch,onnxruntime,onnxruntime-optimizer,onnxruntime-int8,openvino,nncf --baseline torch --trials 15 --seconds 4 -o results/vit-b16-avx2-batch1.json

# Which numbers of tokens kernels like, on one thread, the last on a processor that looks as if it ended at AVX2; and on every core those about the
# models' own numbers, which odd ones are. Twenty minutes on an idle machine.
LENGTHS := demo --images assets/demo/images --lengths 34:60 --quant w8a8
OWN := --quant w8a8 --rounds 4
lengths: $(VENV)/.dev out/avx2.so
	for t in cpu-vnni openvino; do taskset -c 0 $(BIN)/vitfold lengths $(LENGTHS) --target $$t -o results/lengths-demo-$$t.json; done
	LD_PRELOAD=$(CURDIR)/out/avx2.so taskset -c 0 $(BIN)/vitfold lengths $(LENGTHS) --target cpu-avx2 -o results/lengths-demo-cpu-avx2.json
	for t in cpu-vnni $(OV); do $(BIN)/vitfold lengths demo --images assets/demo/images --lengths 48,56,60,62,63,64,65 $(OWN) --target $$t \
		-o results/lengths-own-demo-$$t.json; done
	for t in $(OV); do $(BIN)/vitfold lengths $(VITB) --images assets/demo/images --lengths 128,144,160,176,192,193,196,197 $(OWN) --target $$t \
		-o results/lengths-own-vit-b16-$$t.json; done

# The source report's tables 4.4, 4.7 and 4.8 on the demo's model: its protocol, at a batch and as many calls as a CPU takes; goes on where it stopped.
PROTOCOL := --images $(CIFAR10_VAL) --calibration-images $(CIFAR10_TRAIN) --batch 16 --iterations 20
protocol: $(VENV)/.dev
	for t in 4-4 4-7 4-8; do $(BIN)/vitfold sweep demo --plan recipes/sweeps/report-table-$$t.toml $(PROTOCOL) --merge $$([ $$t = 4-8 ] && echo 0,3 || echo 0,1,2,3,4) \
		$$([ $$t = 4-7 ] && echo --quant w8a8) -o $(WORK)/table-$$t --json > results/table-$$t-cifar10.json; done

# Merging as it is beside weights refitted to it; half an hour.
compensated: $(VENV)/.dev
	$(BIN)/vitfold sweep demo --plan recipes/sweeps/compensated.toml --images $(CIFAR10_VAL) --calibration-images $(CIFAR10_TRAIN) -o $(WORK)/compensated --json > results/compensated-cifar10.json

# What a cached row of registers costs in time, of ViT-B/16 on one thread. Ten minutes on an idle machine.
registers: $(VENV)/.dev
	mkdir -p $(WORK)/registers
	$(BIN)/vitfold optimize $(VITB) $(INT8) -o $(WORK)/registers/none-w8a8.fold
	for t in 1 4; do $(BIN)/vitfold optimize $(VITB) --recipe recipes/overhead/prefix-tau$$t.toml --images $(PHOTOS) --keep-slower --overwrite \
		-o $(WORK)/registers/prefix-tau$$t-w8a8.fold; done
	cd $(WORK)/registers && $(CURDIR)/$(BIN)/vitfold bench none-w8a8.fold prefix-tau1-w8a8.fold prefix-tau4-w8a8.fold --threads 1 \
		--images $(abspath $(PHOTOS)) --limit 1 --trials 41 --seconds 40 -o $(CURDIR)/results/registers-overhead-vit-b16.json

# Accuracy of every method at every bit width over three calibration seeds; goes on where it stopped.
ladder: $(VENV)/.dev
	$(BIN)/vitfold ladder demo --images $(CIFAR10_VAL) --calibration-images $(CIFAR10_TRAIN) -o results/ladder-cifar10.json

# Prefix, deletion and both, by the methods of RegCache's own tables, on towers with planted sinks; goes on where it stopped.
ABLATE := --methods ptq4vit,repq,noisy --quant w8a8,w6a6 --registers none,prefix,delete,regcache --seeds 0 --both "" --calibration-size 16
ablation: $(VENV)/.dev
	for f in siglip clip; do test -d planted-$$f || $(BIN)/python examples/planted_sinks.py $$f planted-$$f; \
		$(BIN)/vitfold ladder hf:./planted-$$f $(ABLATE) --images $(PHOTOS) --limit 60 --calibration-images $(PHOTOS) -o results/ablation-planted-$$f.json; done

# What NVIDIA's compiler makes of ViT-B/16 in every form of docs/nvidia.md, and where merging pays; no GPU needed, an hour or so.
# Kernels do not depend on ranges, so calibration is short.
A := $(WORK)/audits
B384 := timm:vit_base_patch16_384 --weights random
MINMAX := --method minmax --calibration-size 16
AT3 := 0,0,48,0,0,48,0,0,48,0,0,0
TRT := $(BIN)/vitfold optimize --images $(PHOTOS) --keep-slower --overwrite
audits: $(VENV)/.dev
	mkdir -p $(A)/384 $(A)/twin
	for p in fp16 int8; do for m in 0 $(AT3); do \
		$(TRT) $(VITB) --target tensorrt-$$p --merge $$m $$([ $$p = fp16 ] || echo $(MINMAX)) -o $(A)/$$p$$([ $$m = 0 ] || echo -3x48).fold; done; done
	for r in 8 16; do $(TRT) $(VITB) --target tensorrt-int8 --merge $$r $(MINMAX) -o $(A)/int8-r$$r.fold; done
	$(TRT) $(VITB) --target tensorrt-fp16 --merge 8 -o $(A)/fp16-r8.fold
	$(TRT) $(VITB) --target tensorrt-fp8 $(MINMAX) -o $(A)/fp8.fold
	for f in int8-rounded int8-rounded-3x48 fp8-rounded-3x48; do \
		(cat recipes/nvidia-$$f.toml; printf 'method = "minmax"\ncalibration_size = 16\n') > $(A)/$$f.toml; done
	$(TRT) $(VITB) --target tensorrt-int8 --recipe $(A)/int8-rounded.toml -o $(A)/int8-oq.fold
	$(TRT) $(VITB) --target tensorrt-int8 --recipe $(A)/int8-rounded-3x48.toml -o $(A)/int8-oq-3x48.fold
	$(TRT) $(VITB) --target tensorrt-fp8 --recipe $(A)/fp8-rounded-3x48.toml -o $(A)/fp8-oq-3x48.fold
	for b in 8 64; do cd $(A); \
		$(CURDIR)/$(BIN)/vitfold audit fp16.fold int8.fold int8-oq.fold fp16-3x48.fold int8-3x48.fold int8-oq-3x48.fold fp16-r8.fold int8-r8.fold int8-r16.fold \
			--gpu sm86 --batch $$b -o $(CURDIR)/results/audit-vit-b16-sm86-batch$$b.json; \
		$(CURDIR)/$(BIN)/vitfold audit fp16.fold int8.fold fp8.fold int8-oq-3x48.fold fp8-oq-3x48.fold \
			--gpu sm89 --batch $$b -o $(CURDIR)/results/audit-vit-b16-sm89-batch$$b.json; cd $(CURDIR); done
	$(TRT) $(B384) --target tensorrt-fp16 -o $(A)/384/fp16.fold
	$(TRT) $(B384) --target tensorrt-int8 $(MINMAX) -o $(A)/384/int8.fold
	$(TRT) $(B384) --target tensorrt-int8 $(MINMAX) --merge 0,96,0,0,0,0,0,0,0,0,0,0 -o $(A)/384/int8-96.fold
	cd $(A)/384 && $(CURDIR)/$(BIN)/vitfold audit fp16.fold int8.fold int8-96.fold -o $(CURDIR)/results/audit-vit-b16-384-sm86.json
	$(TRT) demo --target tensorrt-fp16 -o $(A)/twin/fp16.fold
	$(TRT) demo --target tensorrt-int8 --calibration-size 8 -o $(A)/twin/shifted.fold
	$(TRT) demo --target tensorrt-int8 --calibration-size 8 --method ptq4vit -o $(A)/twin/twin.fold
	cd $(A)/twin && $(CURDIR)/$(BIN)/vitfold audit fp16.fold shifted.fold twin.fold --batch 64 -o $(CURDIR)/results/audit-twin-demo-sm86.json
	$(BIN)/vitfold forecast demo --images $(CIFAR10_TRAIN) --like 4 -o results/forecast-demo.json
	$(BIN)/vitfold forecast $(VITB) --images $(PHOTOS) -o results/forecast-vit-b16.json
	$(BIN)/vitfold forecast $(VITB) --lengths 197,192,176,160,147,144,128,101 --gpus H100,A100 --batches 1,8,64,128 -o results/forecast-lengths-vit-b16.json

# The same kernels by the model of time as it is now, in seconds and without the compiler; then `make readme`.
prices: $(VENV)/.dev
	for f in vit-b16-sm86-batch8 vit-b16-sm86-batch64 vit-b16-sm89-batch8 vit-b16-sm89-batch64 vit-b16-384-sm86 twin-demo-sm86; do \
		$(BIN)/vitfold audit results/audit-$$f.json -o results/audit-$$f.json || exit 1; done

# Step reuse on the demo's Diffusion Transformer: time and likeness of every method; distances, which need many images; the
# search, and its winner beside the unaccelerated sampler. Half an hour on an idle machine.
DRAW := $(BIN)/vitfold diffusion sample demo-dit --classes all --batch 10 --json
METHODS := solved:12,solved:14,solved:18,solved:26,stack:2,stack:3,taylor:2:1,taylor:3:1,taylor:3:2,chebyshev:4:2,first-block:0.1,guidance:2,fora:2
# Forecasts and rules side by side, at 12, 14, 18 and 26 full steps or as near as their numbers come.
AT := 12 14 18 26
FORECASTS := $(foreach k,$(AT),fitted:$(k) dpcache:$(k) solved:$(k)) $(foreach k,5 4 3 2,taylor-modules:$(k) dmd:$(k) foca:$(k))
RULES := spectrum:3:1.5 spectrum:3:0.75 spectrum:2:0.25 spectrum:2:0.05 magcache:3:20 magcache:3:12 magcache:0.5:5 magcache:0.06:8 \
	speca:0.25 speca:0.07:1 teacache:0.32 teacache:0.17 seacache:0.1 seacache:0.05
TOKENS := tokencache:0.5:2:4,tokencache:0.8:3:6
diffusion: $(VENV)/.dev
	mkdir -p $(WORK)/diffusion
	$(DRAW) --count 20 --trials 5 --reuse $(METHODS),$(TOKENS) -o $(WORK)/diffusion/methods > results/diffusion-methods.json
	$(DRAW) --count 30 --trials 1 --reuse $(subst $() ,$(comma),$(strip $(FORECASTS) $(RULES))) -o $(WORK)/diffusion/forecasts > results/diffusion-forecasts.json
	$(DRAW) --count 400 --trials 1 --reuse solved:10,solved:12,solved:18,solved:26,stack:2,$(TOKENS) -o $(WORK)/diffusion/quality > results/diffusion-quality.json
	$(DRAW) --count 400 --trials 1 --seed 7000 --reuse fitted:10,fitted:12,tokencache:0.8:3:6 -o $(WORK)/diffusion/fitted > results/diffusion-fitted.json
	$(BIN)/vitfold diffusion ablate demo-dit --classes all --count 10 --batch 10 --trials 1 --threads 1 -o results/diffusion-tokencache.json
	$(BIN)/vitfold diffusion optimize demo-dit --reuse auto --min-psnr 30 -o $(WORK)/diffusion/auto.fold --overwrite --json > results/diffusion-search.json
	$(BIN)/vitfold diffusion optimize demo-dit --reuse none -o $(WORK)/diffusion/plain.fold --overwrite
	$(BIN)/vitfold diffusion bench $(WORK)/diffusion/plain.fold $(WORK)/diffusion/auto.fold --batch 8 --trials 11 -o results/diffusion-bench.json
	$(BIN)/vitfold diffusion optimize demo-dit --reuse fitted:14 -o $(WORK)/diffusion/f14.fold --overwrite
	$(BIN)/vitfold diffusion bench $(WORK)/diffusion/f14.fold --peers diffusers,cache-dit --batch 10 --trials 1 -o results/diffusion-peers.json

# Which checkpoints work, and how: small models of their classes, about 10 minutes.
models: $(VENV)/.dev
	$(BIN)/python examples/check_models.py --output docs/models.json

# What PyTorch gets from vitfold on the GPU at hand: gpu-*.json in GPU_OUTPUT, within GPU_SECONDS. It needs no network and installs nothing: torch,
# timm, onnx, onnx-ir, onnxruntime, safetensors, numpy, pillow, typer, rich and jaxtyping have to be there for PYTHON; what is pure Python
# beside them, and torchao as a rival, comes from the wheels that `make gpu-wheels` fetched before, 6 MB that travel with the checkout.
GPU_SECONDS ?= 360
GPU_DEVICE ?= cuda
GPU_OUTPUT ?= results
gpu-wheels:
	mkdir -p .gpu/wheels
	$(PYTHON) -m pip download --disable-pip-version-check --no-deps --only-binary :all: --dest .gpu/wheels \
		tomli-w platformdirs py-cpuinfo pytest pluggy iniconfig packaging beartype torchao

gpu:
	mkdir -p .gpu/site
	for wheel in .gpu/wheels/*.whl; do $(PYTHON) -m zipfile -e $$wheel .gpu/site || exit 1; done
	PYTHONPATH=src:.gpu/site $(PYTHON) -m vitfold.gpu --output $(GPU_OUTPUT) --device $(GPU_DEVICE) --seconds $(GPU_SECONDS)

readme:
	$(BIN)/python -m vitfold.report.document README.md docs/*.md

clean:
	rm -rf $(VENV) .gpu out build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
