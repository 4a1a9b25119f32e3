// cooperative_groups: thread_block, tiles of 1 to 32 threads, coalesced groups, collectives and reduce.
#pragma once
#include <cuda_runtime.h>

namespace cooperative_groups {
struct thread_block {
    static void sync(EMU_HERE) { emu::block_barrier(false, "thread_block::sync", file, line); }
    static unsigned thread_rank() { return (unsigned)emu::worker->current->thread; }
    static unsigned num_threads() { return (unsigned)emu::worker->threads; }
    static unsigned size() { return num_threads(); }
    static dim3 group_index() { return blockIdx; }
    static dim3 thread_index() { return threadIdx; }
    static dim3 group_dim() { return blockDim; }
    static dim3 dim_threads() { return blockDim; }
};
inline thread_block this_thread_block() { return {}; }

// Lanes of one warp. A rank counts the lanes of `mask`, so that tiles and coalesced groups share all code.
struct lane_group {
    unsigned mask;
    unsigned num_threads() const { return (unsigned)__popc(mask); }
    unsigned size() const { return num_threads(); }
    unsigned thread_rank() const { return (unsigned)__popc(mask & ((1u << emu::lane_id()) - 1)); }
    void sync(EMU_HERE) const { __syncwarp(mask, file, line); }
#define EMU_GROUP_SHUFFLE(NAME, SOURCE) \
    template<class T> T NAME(T v, int k, EMU_HERE) const { return emu::shuffle(mask, v, lane(SOURCE), "group." #NAME, file, line); }
    EMU_GROUP_SHUFFLE(shfl, k % (int)size()) EMU_GROUP_SHUFFLE(shfl_xor, (int)thread_rank() ^ k)
    EMU_GROUP_SHUFFLE(shfl_up, (int)thread_rank() - k) EMU_GROUP_SHUFFLE(shfl_down, (int)thread_rank() + k)
    unsigned ballot(int p, EMU_HERE) const {
        unsigned lanes = __ballot_sync(mask, p, file, line), ranks = 0;
        for (unsigned r = 0; r < size(); r++) ranks |= (lanes >> lane((int)r) & 1) << r;
        return ranks;
    }
    bool any(int p, EMU_HERE) const { return __any_sync(mask, p, file, line); }
    bool all(int p, EMU_HERE) const { return __all_sync(mask, p, file, line); }
    int lane(int rank) const {                     // the lane with that rank; -1 (the own value, in a shuffle) if there is none
        if (rank >= 0) for (int l = 0; l < 32; l++) if (mask >> l & 1 && rank-- == 0) return l;
        return -1;
    }
};
template<unsigned N> struct tile : lane_group {
    static_assert(N >= 1 && N <= 32 && (N & (N - 1)) == 0, "a tile has 1, 2, 4, 8, 16 or 32 threads");
    tile() : lane_group{(N == 32 ? ~0u : (1u << N % 32) - 1) << emu::first_lane(N)} {}
    static constexpr unsigned num_threads() { return N; }
    static constexpr unsigned size() { return N; }
    static unsigned thread_rank() { return (unsigned)emu::worker->current->thread % N; }
    static unsigned meta_group_rank() { return (unsigned)emu::worker->current->thread / N; }
    static unsigned meta_group_size() { return (unsigned)(emu::worker->threads + N - 1) / N; }
};
template<unsigned N, class Parent = void> using thread_block_tile = tile<N>;
template<unsigned N, class Parent> inline tile<N> tiled_partition(const Parent &) { return {}; }
struct coalesced_group : lane_group {};
inline coalesced_group coalesced_threads() { return {{__activemask()}}; }    // right outside of divergent branches, as __activemask

template<class T> struct plus { T operator()(T a, T b) const { return a + b; } };
template<class T> struct less { T operator()(T a, T b) const { return b < a ? b : a; } };           // as in CUDA: the minimum
template<class T> struct greater { T operator()(T a, T b) const { return a < b ? b : a; } };        // the maximum
template<class T> struct bit_and { T operator()(T a, T b) const { return a & b; } };
template<class T> struct bit_or { T operator()(T a, T b) const { return a | b; } };
template<class T> struct bit_xor { T operator()(T a, T b) const { return a ^ b; } };
// all lanes get the same bits; added pairwise over halving distances, as a butterfly of shuffles does
template<class Group, class T, class F> inline T reduce(const Group &group, T value, F f, EMU_HERE) {
    return emu::meet_and_compute<T>(group.mask, value, [f](const emu::Lanes &lanes) {
        T v[32];
        int n = 0;
        for (int l = 0; l < 32; l++) if (lanes.present >> l & 1) v[n++] = lanes.get<T>(l);
        for (int half; n > 1; n = half) {
            half = (n + 1) / 2;
            for (int i = 0; i + half < n; i++) v[i] = f(v[i], v[i + half]);
        }
        return v[0];
    }, "cooperative_groups::reduce", file, line);
}
template<class Group> inline void sync(const Group &group, EMU_HERE) { group.sync(file, line); }
}
