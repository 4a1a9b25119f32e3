// Fibers: flows of control that hand the processor to each other by a call. Each CUDA thread that has to wait keeps its stack on one.
// A switch saves the registers that a callee must preserve on the old stack and takes them from the new one: about 5 ns.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define EMU_TSAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#elif __has_feature(thread_sanitizer)
#define EMU_TSAN 1
#endif
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#define EMU_UCONTEXT 1
#endif

// ---- what the sanitizers want to know
#ifdef EMU_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMU_TSAN
extern "C" {
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *fiber);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *address);
void __tsan_release(void *address);
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
}
#define EMU_NO_TSAN __attribute__((no_sanitize("thread")))
namespace emu {
// the emulator's own accesses are not the program's: TSan does not look while an Unwatched lives
struct Unwatched {
    Unwatched() { AnnotateIgnoreReadsBegin("", 0); AnnotateIgnoreWritesBegin("", 0); }
    ~Unwatched() { AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0); }
};
inline void happens_before(void *address) { __tsan_release(address); }   // what this thread did until here ...
inline void happens_after(void *address) { __tsan_acquire(address); }    // ... is known to a thread from here on
}
#else
#define EMU_NO_TSAN
namespace emu {
struct Unwatched { Unwatched() {} };
inline void happens_before(void *) {}
inline void happens_after(void *) {}
}
#endif

// ---- the switch
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#else
extern "C" void emu_switch(void **save_stack, void *load_stack);
extern "C" void emu_start();
#if defined(__x86_64__)
asm(R"(
    .text
    .weak emu_switch
    .type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emu_switch, .-emu_switch
    .weak emu_start
    .type emu_start, @function
emu_start:                  # a new fiber's first "return" arrives here: r12 is the argument, r13 the function
    movq %r12, %rdi
    xorl %ebp, %ebp
    callq *%r13
    ud2
    .size emu_start, .-emu_start
)");
#else
asm(R"(
    .text
    .weak emu_switch
    .type emu_switch, %function
emu_switch:
    stp x19, x20, [sp, #-160]!
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp d14, d15, [sp, #144]
    ldp d12, d13, [sp, #128]
    ldp d10, d11, [sp, #112]
    ldp d8, d9, [sp, #96]
    ldp x29, x30, [sp, #80]
    ldp x27, x28, [sp, #64]
    ldp x25, x26, [sp, #48]
    ldp x23, x24, [sp, #32]
    ldp x21, x22, [sp, #16]
    ldp x19, x20, [sp], #160
    ret
    .size emu_switch, .-emu_switch
    .weak emu_start
    .type emu_start, %function
emu_start:                  // a new fiber's first "return" arrives here: x19 is the argument, x20 the function
    mov x0, x19
    mov x29, xzr
    blr x20
    brk #0
    .size emu_start, .-emu_start
)");
#endif
#endif

namespace emu {
constexpr size_t kPage = 4096;
#if defined(EMU_ASAN)
constexpr size_t kStackBytes = 512 << 10;      // red zones make frames several times larger
#elif defined(EMU_TSAN)
constexpr size_t kStackBytes = 64 << 10;       // TSan forgets a stack once per CUDA thread, at a cost that grows with its size
#else
constexpr size_t kStackBytes = 128 << 10;      // address space: pages that are never touched cost nothing
#endif

struct Context {
#ifdef EMU_UCONTEXT
    ucontext_t registers;
#else
    void *stack_pointer = nullptr;             // of a suspended flow; its registers lie there
#endif
    char *stack = nullptr;                     // lowest usable byte, above a guard page
    size_t stack_bytes = 0;
    void *asan_fake_stack = nullptr, *tsan_fiber = nullptr;
};

// Makes c ready to run start(argument) at the next switch to it. `colour` shifts the first frame, so that the hot frames of a
// block's threads do not all fall into the same cache sets (1024 threads: 12 instead of 18 ns per switch).
inline void context_prepare(Context &c, int colour, void (*start)(void *), void *argument) {
    if (!c.stack) {
        c.stack_bytes = kStackBytes;
        char *p = (char *)mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) { perror("emu: no memory for the stack of a CUDA thread"); _exit(1); }
        mprotect(p, kPage, PROT_NONE);
        c.stack = p + kPage;
    }
    char *top = c.stack + c.stack_bytes - (size_t)(colour * 448 & 4095);
#if defined(EMU_UCONTEXT)
    getcontext(&c.registers);
    c.registers.uc_stack.ss_sp = c.stack;
    c.registers.uc_stack.ss_size = top - c.stack;
    c.registers.uc_link = nullptr;
    static thread_local struct { void (*start)(void *); void *argument; } first;    // makecontext passes ints only
    first = {start, argument};
    makecontext(&c.registers, []() { auto f = first; f.start(f.argument); }, 0);
#elif defined(__x86_64__)
    // r15 r14 r13 r12 rbx rbp, emu_start, and room that keeps the stack as the ABI wants it: aligned to 16 bytes at a call
    void **sp = (void **)((uintptr_t)top & ~(uintptr_t)15) - 11;
    for (int i = 0; i < 11; i++) sp[i] = nullptr;
    sp[2] = (void *)start; sp[3] = argument; sp[6] = (void *)emu_start;
    c.stack_pointer = sp;
#else
    void **sp = (void **)((uintptr_t)top & ~(uintptr_t)15) - 20;
    for (int i = 0; i < 20; i++) sp[i] = nullptr;
    sp[0] = argument; sp[1] = (void *)start; sp[11] = (void *)emu_start;
    c.stack_pointer = sp;
#endif
}

EMU_NO_TSAN inline void context_switch(Context &from, Context &to) {
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef EMU_TSAN
    __tsan_switch_to_fiber(to.tsan_fiber, 1);              // 1: a switch by itself orders nothing
#endif
#ifdef EMU_UCONTEXT
    swapcontext(&from.registers, &to.registers);
#else
    emu_switch(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}
inline void context_entered() {                            // the first thing that a fiber's function does
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}
}  // namespace emu
