# make train_qwen && ./train_qwen     build the trainer and train a small model on a small Chinese corpus
# make test                           everything that is checked, plain and with sanitizers
# make all | debug | clean            all programs; with -g and sanitizers; remove what was built
#
# Needs a C compiler and make. OpenMP is used if the compiler has it. CC=clang, CFLAGS=..., OPENMP= (none) can be given.

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
CFLAGS ?= -O3 -fno-math-errno
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
build:
	@mkdir -p build
# Changes when compiler or flags do, so that everything is built again.
build/flags: FORCE | build
	@echo '$(CC) $(FLAGS) $(OPENMP)' | cmp -s - $@ || echo '$(CC) $(FLAGS) $(OPENMP)' > $@
FORCE:

# One calm line for each thing that is not there.
notes:
	@$(if $(OPENMP),,echo "note: $(CC) has no OpenMP here; the programs will use one thread, which is fine")
	@command -v nvcc >/dev/null || echo "note: no nvcc here; building the CPU programs, which is fine"

# The default corpus: generated text, then tokens with a vocabulary trimmed to them.
TINY := data/tiny_baike
tiny_baike: $(TINY)/train.bin
$(TINY)/train.bin: $(wildcard dev/data/tiny_baike/*) | prepare $(GENERATE)
	@mkdir -p $(TINY)
	$(GENERATE) --out $(TINY) --seed 1
	./prepare --trim-vocab --val-fraction 0.05 --out $(TINY) $(TINY)/wiki.json $(TINY)/baike.jsonl $(TINY)/web.jsonl

# Tests. Each prints "passed N, failed M, skipped K" last; its exit code is the verdict.
TESTS := test_train test_tokenizer test_tiny_baike
RUN_SANITIZED := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
build/test_%: dev/test/test_%.c build/flags
	$(BUILD)
build/sanitized_%: dev/test/%.c build/flags
	$(CC) $(SANITIZE) -MMD -MP -MF build/$(@F).d -o $@ $< -lm

test: $(PROGRAMS) $(TINY)/train.bin $(TESTS:%=build/%) $(TESTS:%=build/sanitized_%) test-compile
	$(foreach t,$(TESTS),build/$(t) && $(RUN_SANITIZED) build/sanitized_$(t) && ) true
	sh dev/test/test_prepare.sh
	sh dev/test/test_cli.sh
	@echo "all tests passed"

# The sources are C11 and C++17, with and without OpenMP, without a warning, for each compiler that is here.
SOURCES := train_qwen.c dev/data/prepare.c dev/data/tiny_baike/generate.c
test-compile:
	@for c in gcc clang; do command -v $$c >/dev/null || { echo "SKIP $$c is not here"; continue; }; \
	    for s in $(SOURCES); do \
	        $$c -std=c11 -Wall -Wextra -Wc++-compat -Wno-unknown-pragmas -Werror -fsyntax-only $$s && \
	        $$c -std=c11 -Wall -Wextra $(OPENMP) -Werror -fsyntax-only $$s && \
	        $$c -x c++ -std=c++17 -Wall -Wextra -Wno-missing-field-initializers -Wno-unknown-pragmas -Werror -fsyntax-only $$s && \
	        echo "ok   $$c: $$s as C11 and C++17" || exit 1; done; done

debug: train_qwen.c | build
	$(CC) $(SANITIZE) -O0 -o build/train_qwen_debug train_qwen.c -lm

clean:
	rm -rf build $(PROGRAMS)

.PHONY: FORCE all notes tiny_baike test test-compile debug clean
-include $(wildcard build/*.d)
