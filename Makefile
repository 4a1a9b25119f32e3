# make train_qwen && ./train_qwen     build the trainer and train a small model on a small Chinese corpus
# make test                           everything that is checked, plain and with sanitizers
# make train_qwencu | test_qwencu     the trainer on the GPU, and its check against the CPU; PRECISION=fp32 for fp32 instead of bf16
# make demo                           pretraining, SFT and DPO of the small model, examined after each; half an hour
# make bench                          speed, against the limits of this machine
# make fuzz FUZZ_SECONDS=3600         look for inputs that crash the readers (clang)
# make portable                       train_qwen as one binary for every x86-64
# make chat | chatcu                  talk to a checkpoint
# make evaluate | evaluatecu          perplexity, multiple choice
# make plot                           loss curves of runs
# make all | debug | clean            all programs; with -g and sanitizers; remove what was built
#
# Needs a C compiler and make. OpenMP is used if the compiler has it. CC=clang, CFLAGS=..., OPENMP= (none) can be given.
# The CUDA programs are built by nvcc where there is one and a GPU, else (or with EMULATE=1) for dev/emu, which runs CUDA on the processor;
# EMULATE= forces nvcc.

ifeq ($(origin CC),default)
CC := cc
endif
CXX := $(if $(findstring clang,$(CC)),clang++,g++)

HASH := \#
# works,FLAGS: FLAGS if a program that uses OpenMP's header when it can compiles and links with them
works = $(shell printf '$(HASH)ifdef _OPENMP\n$(HASH)include <omp.h>\n$(HASH)endif\nint main(void) { return 0; }\n' | $(CC) $(1) -x c - -o /dev/null 2>/dev/null && echo "$(1)")
BREW := $(if $(filter Darwin,$(shell uname -s)),$(firstword $(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp)))
OPENMP ?= $(or $(call works,-fopenmp),$(if $(BREW),$(call works,-Xpreprocessor -fopenmp -I$(BREW)/include -L$(BREW)/lib -lomp)))
ARCH ?= $(or $(call works,-march=native),$(call works,-mcpu=native))
WIDE := $(call works,-mprefer-vector-width=512 -Werror)

WARN := -Wall -Wextra $(if $(OPENMP),,-Wno-unknown-pragmas)
# GCC's -std=c11 allows no fused multiply-adds unless told; without them matrix products run at 60 to 70 % of their speed.
CFLAGS ?= -O3 -fno-math-errno -ffp-contract=fast
FLAGS := -std=c11 $(CFLAGS) $(ARCH) $(filter-out -Werror,$(WIDE)) $(WARN)
SANITIZE := -std=c11 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -Wno-unknown-pragmas

BUILD = $(CC) $(FLAGS) $(OPENMP) -MMD -MP -MF build/$(@F).d -o $@ $< -lm
PROGRAMS := train_qwen prepare
GENERATE := build/generate

all: $(PROGRAMS) notes

# ./train_qwen makes its default data itself, with these two
train_qwen: train_qwen.c build/flags | prepare $(GENERATE) notes
	$(BUILD)
prepare: dev/data/prepare.c build/flags
	$(BUILD)
$(GENERATE): dev/data/tiny_baike/generate.c build/flags
	$(BUILD)
# chat edits lines with GNU readline if that is here, else with what the terminal itself can do (READLINE= for that).
READLINE ?= $(shell printf '$(HASH)include <stdio.h>\n$(HASH)include <readline/readline.h>\nint main(void) { return rl_catch_signals = 0; }\n' | \
    $(CC) -x c - -o /dev/null -lreadline 2>/dev/null && echo "-DQWEN_READLINE -lreadline")
chat: dev/chat.c build/flags
	$(BUILD) $(READLINE)
evaluate: dev/eval/evaluate.c build/flags
	$(BUILD)
plot: dev/plot.c build/flags
	$(BUILD)
build:
	@mkdir -p build/emu
# Changes when compiler or flags do, so that everything is built again.
build/flags: FORCE | build
	@echo '$(CC) $(FLAGS) $(OPENMP)' | cmp -s - $@ || echo '$(CC) $(FLAGS) $(OPENMP)' > $@
FORCE:

# CUDA programs, by nvcc or by the emulator.
GPU := $(if $(shell command -v nvcc),$(shell nvidia-smi -L 2>/dev/null | head -n 1))
EMULATE ?= $(if $(GPU),,1)
PRECISION ?= bf16
GPU_ARCH ?= native
FLAGS_bf16 :=
FLAGS_fp32 := -DQWEN_FP32
CUDA_SOURCES := train_qwen.cu train_qwen.c tokenizer.h dataloader.h $(wildcard dev/cuda/bench.h dev/test/*.h)
EMU_SOURCES := $(wildcard dev/emu/*.h dev/emu/cuda.sed dev/emu/emucc)
NVCC_FLAGS := -O3 -std=c++17 -Xcompiler -O3,-fopenmp,-Wno-unknown-pragmas
EMUCC = CXX=$(CXX) dev/emu/emucc
# Tests include the whole trainer and use some of it: g++ need not compile the rest.
WHOLE := $(if $(findstring clang,$(CXX)),,-fwhole-program)
CUDACC = $(if $(EMULATE),$(EMUCC) -O2 $(ARCH) $(WHOLE),nvcc $(NVCC_FLAGS) -arch=$(GPU_ARCH) -lcublasLt)
build/cuda_flags: FORCE | build
	@echo '$(CUDACC) $(PRECISION)' | cmp -s - $@ || echo '$(CUDACC) $(PRECISION)' > $@
train_qwencu test_qwencu: %_qwencu: %_qwen.cu $(CUDA_SOURCES) $(EMU_SOURCES) build/cuda_flags
	@echo "building $@ in $(PRECISION) for $(if $(EMULATE),the emulator: it computes what a GPU would but slowly,$(GPU))"
	$(CUDACC) $(FLAGS_$(PRECISION)) $< -o $@
# The programs of dev/ that use the model; both compilers want a .cu.
build/chat.cu: | build
	@printf '#include "../dev/chat.c"\n' > $@
build/evaluate.cu: | build
	@printf '#include "../dev/eval/evaluate.c"\n' > $@
chatcu evaluatecu: %cu: build/%.cu dev/chat.c dev/data/chat_template.h $(wildcard dev/eval/*.[ch]) $(CUDA_SOURCES) $(EMU_SOURCES) build/cuda_flags
	$(CUDACC) $(FLAGS_$(PRECISION)) $< -o $@

# One calm line for each thing that is not there.
notes:
	@$(if $(OPENMP),,echo "note: $(CC) has no OpenMP here; the programs will use one thread, which is fine")
	@command -v nvcc >/dev/null || echo "note: no nvcc here; building the CPU programs, which is fine (CUDA programs run on the emulator, dev/emu)"

# The default corpus: generated text, then tokens with a vocabulary trimmed to them.
TINY := data/tiny_baike
tiny_baike: $(TINY)/train.bin
$(TINY)/train.bin: $(wildcard dev/data/tiny_baike/*) | prepare $(GENERATE)
	@mkdir -p $(TINY)
	$(GENERATE) --out $(TINY) --seed 1
	./prepare --trim-vocab --val-fraction 0.05 --out $(TINY) $(TINY)/wiki.json $(TINY)/baike.jsonl $(TINY)/web.jsonl

# How fast the CPU code is, against what this machine can do; and matrix multiplication from three loops to the one in use.
CPU_SOURCES := train_qwen.c tokenizer.h dataloader.h dev/cpu/bench.h
build/cpu_%: dev/cpu/%.c $(CPU_SOURCES) build/flags
	$(CC) $(FLAGS) $(OPENMP) -o $@ $< -lm
# train_qwen for any x86-64 Linux: compiled for three generations of processors, of which dev/cpu/dispatch.c takes one when it starts.
PORTABLE := train_qwen
ARCH_sse2 := -march=x86-64
ARCH_avx2 := -march=x86-64-v3
ARCH_avx512 := -march=x86-64-v4 $(filter-out -Werror,$(WIDE))
build/portable_%.o: train_qwen.c tokenizer.h dataloader.h build/flags
	$(CC) -std=c11 $(CFLAGS) $(ARCH_$*) $(WARN) $(OPENMP) -Dmain=main_$* -c -o $@ $<
	objcopy --keep-global-symbol=main_$* $@
portable: dev/cpu/dispatch.c build/portable_sse2.o build/portable_avx2.o build/portable_avx512.o prepare $(GENERATE)
	$(CC) -std=c11 $(CFLAGS) $(WARN) $(OPENMP) -o $(PORTABLE) $(filter %.c %.o,$^) -lm
demo: $(PROGRAMS) chat evaluate $(TINY)/train.bin
	sh dev/scripts/demo.sh
bench: build/cpu_bench
	OMP_WAIT_POLICY=active build/cpu_bench

build/bench_tokenizer: dev/data/bench_tokenizer.c build/flags
	$(BUILD)

# Tests. Each prints "passed N, failed M, skipped K" last; its exit code is the verdict.
TESTS := test_train test_align test_tokenizer test_tiny_baike test_chat test_evaluate test_plot
RUN_SANITIZED := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
build/test_%: dev/test/test_%.c build/flags
	$(BUILD)
build/sanitized_%: dev/test/%.c build/flags
	$(CC) $(SANITIZE) -MMD -MP -MF build/$(@F).d -o $@ $< -lm

# The CUDA code without a GPU: the check against the CPU in both precisions and several orders of threads, the kernels in isolation, and the
# emulator's own tests. test-emu-asan and test-emu-tsan do the first with sanitizers, on a few cases.
KERNELS := $(patsubst dev/cuda/%.cu,%,$(wildcard dev/cuda/*.cu))
EMU_TESTS := $(KERNELS:%=build/emu/%) build/emu/test_bf16 build/emu/test_fp32 build/emu/train_bf16 build/emu/train_fp32 build/emu/align_bf16 build/emu/align_fp32 \
    build/emu/chat_fp32 build/emu/evaluate_fp32 build/emu/semantics build/emu/nccl_test
RUN_EMU := OMP_WAIT_POLICY=passive
$(KERNELS:%=build/%): build/%: dev/cuda/%.cu $(CUDA_SOURCES) $(EMU_SOURCES) build/cuda_flags
	$(CUDACC) $(FLAGS_$(PRECISION)) $< -o $@
build/emu/test_%: test_qwen.cu $(CUDA_SOURCES) $(EMU_SOURCES) build/flags
	$(EMUCC) -O1 $(ARCH) $(WHOLE) $(FLAGS_$*) $< -o $@
build/emu/align_%: dev/test/test_align.cu dev/test/test_align.c $(CUDA_SOURCES) $(EMU_SOURCES) build/flags
	$(EMUCC) -O1 $(ARCH) $(WHOLE) $(FLAGS_$*) $< -o $@
build/emu/train_%: train_qwen.cu $(CUDA_SOURCES) $(EMU_SOURCES) build/flags
	$(EMUCC) -O1 $(ARCH) $(WHOLE) $(FLAGS_$*) $< -o $@
build/emu/chat_fp32 build/emu/evaluate_fp32: build/emu/%_fp32: build/%.cu dev/chat.c dev/data/chat_template.h $(wildcard dev/eval/*.[ch]) $(CUDA_SOURCES) $(EMU_SOURCES) build/flags
	$(EMUCC) -O1 $(ARCH) $(WHOLE) $(FLAGS_fp32) $< -o $@
build/emu/%: dev/cuda/%.cu $(CUDA_SOURCES) $(EMU_SOURCES) build/flags
	$(EMUCC) -O1 $(ARCH) $(WHOLE) $< -o $@
build/emu/%: dev/emu/test/%.cu $(EMU_SOURCES) build/flags
	$(EMUCC) -Wall -Wextra -Wno-unused-function -Werror $< -o $@
build/emu/asan: test_qwen.cu $(CUDA_SOURCES) $(EMU_SOURCES) build/flags
	$(EMUCC) -O1 -g -fsanitize=address,undefined $< -o $@
build/emu/tsan: test_qwen.cu $(CUDA_SOURCES) $(EMU_SOURCES) build/flags
	CXX=clang++ dev/emu/emucc -O1 -g -fsanitize=thread $< -o $@
test-emu: train_qwen chat evaluate $(TINY)/train.bin | build
	$(MAKE) -s -j2 $(EMU_TESTS)
	for order in 0 1 2 3; do EMU_ORDER=$$order $(RUN_EMU) build/emu/test_bf16 > build/emu/log || { grep FAIL build/emu/log; exit 1; }; \
	    [ $$order = 0 ] && cp build/emu/log build/emu/log0; cmp build/emu/log0 build/emu/log || exit 1; \
	    echo "test_qwencu bf16, EMU_ORDER=$$order: $$(tail -n 1 build/emu/log)"; done
	for order in 0 2; do EMU_ORDER=$$order $(RUN_EMU) build/emu/test_fp32 > build/emu/log || { grep FAIL build/emu/log; exit 1; }; \
	    echo "test_qwencu fp32, EMU_ORDER=$$order: $$(tail -n 1 build/emu/log)"; done
	for precision in bf16 fp32; do $(RUN_EMU) build/emu/align_$$precision > build/emu/log || { grep FAIL build/emu/log; exit 1; }; \
	    echo "DPO and LoRA of train_qwencu, $$precision: $$(tail -n 1 build/emu/log)"; done
	for kernel in $(KERNELS); do $(RUN_EMU) build/emu/$$kernel > build/emu/log || { cat build/emu/log; exit 1; }; \
	    echo "dev/cuda/$$kernel.cu: $$(tail -n 1 build/emu/log)"; done
	for own in semantics nccl_test; do $(RUN_EMU) build/emu/$$own > build/emu/log 2>&1 || { cat build/emu/log; exit 1; }; \
	    echo "dev/emu/test/$$own.cu: $$(tail -n 1 build/emu/log)"; done
	sh dev/test/test_cuda_run.sh
	sh dev/test/test_cuda_programs.sh
	bash dev/emu/test/bugs.sh build/emu
test-emu-asan: build/emu/asan
	@for case in odd "of 64" "of 128" "300 rows"; do \
	    ASAN_OPTIONS=detect_leaks=0 $(RUN_EMU) build/emu/asan "$$case" > build/emu/log 2>&1 || { tail -n 30 build/emu/log; exit 1; }; \
	    echo "test_qwencu with address and undefined sanitizer, $$case: $$(tail -n 1 build/emu/log)"; done
test-emu-tsan:
	@command -v clang++ > /dev/null || { echo "SKIP test-emu-tsan: no clang++ here"; exit 0; }; \
	    $(MAKE) -s build/emu/tsan && for case in "v1: heads of 64" "of 128" "300 rows"; do \
	    $(RUN_EMU) build/emu/tsan "$$case" > build/emu/log 2>&1 || { tail -n 30 build/emu/log; exit 1; }; \
	    echo "test_qwencu with thread sanitizer, $$case: $$(tail -n 1 build/emu/log)"; done

# nvcc compiles everything, without a warning, for Ampere, Hopper and the newest it knows; no kernel of the trainer may spill registers.
test-nvcc: build/chat.cu build/evaluate.cu | build
	@command -v nvcc > /dev/null || { echo "SKIP nvcc is not here"; exit 0; }; \
	    for flags in "" -DQWEN_FP32; do for arch in sm_80 sm_90 $$(nvcc --list-gpu-code | tail -n 1); do \
	        nvcc $(NVCC_FLAGS) $$flags -arch=$$arch -Werror all-warnings -Xptxas -v -cubin -o build/emu/cubin train_qwen.cu 2> build/emu/ptxas || \
	            { cat build/emu/ptxas; exit 1; }; \
	        VERBOSE=$$([ "$$arch$$flags" = sm_80 ] && echo 1) sh dev/cuda/registers.sh $$arch "$$flags" < build/emu/ptxas || exit 1; done; done; \
	    for source in test_qwen.cu build/chat.cu build/evaluate.cu $(KERNELS:%=dev/cuda/%.cu); do \
	        nvcc -O1 -std=c++17 -Xcompiler -fopenmp,-Wno-unknown-pragmas -arch=sm_80 -Werror all-warnings -c -o build/emu/object $$source && echo "ok   nvcc: $$source" || exit 1; done
# On a machine with a GPU: the check in this PRECISION, for real.
test-gpu: $(if $(GPU),test_qwencu)
	$(if $(GPU),./test_qwencu,@echo "SKIP there is no GPU here; the emulator ran every kernel instead")

# Fuzzers: the JSON reader with prepare's records, the tokenizer, the token-file reader. `make test` feeds them the committed corpus;
# `make fuzz` looks for more with clang's libFuzzer, each for FUZZ_SECONDS: new inputs go to build/corpus_NAME, findings to build.
FUZZERS := json tokenizer tokens
FUZZ_SECONDS ?= 60
build/fuzz_%: dev/test/fuzz_%.c dev/test/fuzz.h dev/data/prepare.c train_qwen.c tokenizer.h dataloader.h | build
	clang $(SANITIZE) -DLIBFUZZER -fsanitize=fuzzer -o $@ $< -lm
fuzz: $(FUZZERS:%=build/fuzz_%)
	for f in $(FUZZERS); do mkdir -p build/corpus_$$f; (build/fuzz_$$f -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -rss_limit_mb=2048 \
	    -detect_leaks=0 -artifact_prefix=build/fuzz_$$f. build/corpus_$$f dev/test/fuzz_corpus/$$f > build/fuzz_$$f.log 2>&1; \
	    echo "fuzz_$$f: exit code $$?, $$(grep -a -o '^#[0-9][0-9]*' build/fuzz_$$f.log | tail -n 1) inputs, see build/fuzz_$$f.log") & done; wait; ! ls build/fuzz_*.crash-* build/fuzz_*.oom-* build/fuzz_*.timeout-* 2> /dev/null
test-fuzz: $(FUZZERS:%=build/sanitized_fuzz_%)
	for f in $(FUZZERS); do $(RUN_SANITIZED) build/sanitized_fuzz_$$f dev/test/fuzz_corpus/$$f/* || exit 1; done

test: $(PROGRAMS) chat $(TINY)/train.bin build/cpu_matmul build/cpu_bench $(TESTS:%=build/%) $(TESTS:%=build/sanitized_%) test-compile test-fuzz
	$(foreach t,$(TESTS),build/$(t) && $(RUN_SANITIZED) build/sanitized_$(t) && ) true
	sh dev/test/test_prepare.sh
	sh dev/test/test_cli.sh
	build/cpu_matmul check
	sh dev/test/test_portable.sh
	sh dev/test/test_align.sh
	$(MAKE) -s test-emu test-nvcc test-gpu
	@echo "all tests passed"

# The sources are C11 and C++17, with and without OpenMP, without a warning, for each compiler that is here.
SOURCES := train_qwen.c dev/data/prepare.c dev/data/bench_tokenizer.c dev/data/tiny_baike/generate.c dev/chat.c dev/eval/evaluate.c dev/plot.c
test-compile: | build
	@for c in gcc clang; do command -v $$c >/dev/null || { echo "SKIP $$c is not here"; continue; }; \
	    for s in $(SOURCES); do \
	        $$c -std=c11 -Wall -Wextra -Wc++-compat -Wno-unknown-pragmas -Werror -fsyntax-only $$s && \
	        $$c -std=c11 -Wall -Wextra $(OPENMP) -Werror -fsyntax-only $$s && \
	        $$c -x c++ -std=c++17 -Wall -Wextra -Wno-missing-field-initializers -Wno-unknown-pragmas -Werror -fsyntax-only $$s && \
	        echo "ok   $$c: $$s as C11 and C++17" || exit 1; done; done
	@rm -rf build/corpus_by_*; for c in gcc clang; do command -v $$c > /dev/null || continue; \
	    $$c -std=c11 -O1 -o build/generate_$$c dev/data/tiny_baike/generate.c -lm && build/generate_$$c --out build/corpus_by_$$c > /dev/null || exit 1; \
	    [ ! -d build/corpus_by_gcc ] || diff -rq build/corpus_by_gcc build/corpus_by_$$c || exit 1; done; echo "ok   the small corpus, the same from every compiler"

debug: train_qwen.c | build
	$(CC) $(SANITIZE) -O0 -o build/train_qwen_debug train_qwen.c -lm

clean:
	rm -rf build $(PROGRAMS) train_qwencu test_qwencu chat chatcu evaluate evaluatecu plot

.PHONY: FORCE all notes tiny_baike demo bench portable fuzz test test-fuzz test-compile test-emu test-emu-asan test-emu-tsan test-nvcc test-gpu debug clean
-include $(wildcard build/*.d)
