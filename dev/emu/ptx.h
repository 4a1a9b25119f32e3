// The tensor-core path as plain C++: ldmatrix, mma.sync.m16n8k16 and cp.async under the names of the program's PTX wrappers, with the
// fragment layouts of the PTX ISA ("Warp-level matrix instructions"). A 32-bit register holds two 16-bit elements, the lower half first.
#pragma once
#include <cuda_runtime.h>

namespace emu {
// ldmatrix.sync.aligned.m8n8.x<N>[.trans].shared.b16: lane 8 j + i gives the address of row i (16 bytes) of matrix j; r[j] of lane l
// gets row l / 4, columns 2 (l % 4) and the next, of matrix j (of its transpose)
template<int N> inline void ldmatrix(uint32_t (&r)[N], const void *row, bool transpose, const char *what, const char *file, int line) {
    int l = lane_id();
    if (l < 8 * N && (uintptr_t)row % 16) stop("%s: the row address of lane %d is not a multiple of 16, %s:%d", what, l, file, line);
    const Lanes &lanes = meet(~0u, row, what, file, line);
    for (int j = 0; j < N; j++) {
        uint32_t element[2];
        for (int e = 0; e < 2; e++) {
            int i = l / 4, k = 2 * (l % 4) + e;
            element[e] = transpose ? lanes.get<const uint16_t *>(8 * j + k)[i] : lanes.get<const uint16_t *>(8 * j + i)[k];
        }
        r[j] = element[0] | element[1] << 16;
    }
    meet(~0u, char(0), what, file, line);          // all have read before any lane goes on and overwrites a row
}
// d (16,8) += a (16,16) b (16,8). Lane l = 4 g + t holds
//   a, half e of register i: row g + 8 (i % 2), column 2 t + e + 8 (i / 2)
//   b, half e of register i: row 2 t + e + 8 i, column g
//   d[i]: row g + 8 (i / 2), column 2 t + i % 2
template<class Format> inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char *file, int line) {
    struct Operands { uint32_t a[4], b[2]; } operands = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    struct Product { float d[16][8]; };
    const Product &p = meet_and_compute<Product>(~0u, operands, [](const Lanes &lanes) {
        float A[16][16], B[16][8];
        for (int l = 0; l < kWarp; l++) {
            Operands o = lanes.get<Operands>(l);
            int g = l / 4, t = l % 4;
            for (int e = 0; e < 2; e++) {
                for (int i = 0; i < 4; i++) A[g + 8 * (i % 2)][2 * t + e + 8 * (i / 2)] = Format::to_float((uint16_t)(o.a[i] >> 16 * e));
                for (int i = 0; i < 2; i++) B[2 * t + e + 8 * i][g] = Format::to_float((uint16_t)(o.b[i] >> 16 * e));
            }
        }
        Product r = {};
        for (int i = 0; i < 16; i++) for (int k = 0; k < 16; k++) for (int j = 0; j < 8; j++) r.d[i][j] += A[i][k] * B[k][j];
        return r;
    }, "mma.m16n8k16", file, line);
    int g = lane_id() / 4, t = lane_id() % 4;
    for (int i = 0; i < 4; i++) d[i] += p.d[g + 8 * (i / 2)][2 * t + i % 2];
}
}
#define EMU_LDMATRIX(N) \
    inline void ldmatrix_x##N(uint32_t (&r)[N], const void *row, EMU_HERE) { \
        emu::ldmatrix(r, row, false, "ldmatrix.x" #N, file, line); \
    } \
    inline void ldmatrix_x##N##_trans(uint32_t (&r)[N], const void *row, EMU_HERE) { \
        emu::ldmatrix(r, row, true, "ldmatrix.x" #N ".trans", file, line); \
    }
EMU_LDMATRIX(1) EMU_LDMATRIX(2) EMU_LDMATRIX(4)
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_HERE) {
    emu::mma_m16n8k16<emu::Bfloat>(d, a, b, file, line);
}
inline void mma_m16n8k16_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_HERE) {
    emu::mma_m16n8k16<emu::Half>(d, a, b, file, line);
}

// cp.async.cg: 16 bytes to shared memory, zeros if not valid. EMU_ORDER 0 copies as late as the program permits, at the wait, so that a
// missing wait shows; 1 copies at once, so that overwriting what others still read shows; a seed tosses a coin for each copy.
inline void cp_async_16(void *to_shared, const void *from_global, bool valid, EMU_HERE) {
    if ((uintptr_t)to_shared % 16 || (valid && (uintptr_t)from_global % 16)) {
        emu::stop("cp.async: address not a multiple of 16 (shared %p, global %p), %s:%d", to_shared, from_global, file, line);
    }
    emu::Fiber *f = emu::worker->current;
    emu::AsyncCopy copy = {to_shared, from_global, valid, f->copy_groups};
    {
        emu::Unwatched u;
        bool at_once = emu::order == 1 || (emu::order >= 2 && emu::worker->random() % 2);
        if (!at_once) { f->copies.push_back(copy); return; }
    }
    emu::finish_copy(copy);
}
inline void cp_async_commit() { emu::Unwatched u; emu::worker->current->copy_groups++; }
template<int N> inline void cp_async_wait() { emu::finish_copies(emu::worker->current, emu::worker->current->copy_groups - N); }
