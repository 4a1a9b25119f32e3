// nccl.h: NCCL between processes of one machine, through shared memory.
//
// Every rank has a slot in a file that all of them map. A collective goes chunk by chunk: each rank copies its part into its slot, waits
// for the others, reads what it needs from their slots, and waits again before a slot is written anew. Sums are floats (or the integers
// themselves) added in the order of the ranks and rounded once: all ranks get the same bits in every run; a GPU's ring may round otherwise.
//
// What hangs on a GPU is reported here, and the process ends with code 1: ranks that call different collectives, or with different
// counts, types, operations or roots; a rank that has ended (found through the lock that it holds on the file); a rank that has not come
// after EMU_NCCL_SECONDS (default 60).
// Limits: one GPU a process; a communicator's calls run in the order in which they were made, whatever their streams; up to 64 ranks.
#pragma once
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define NCCL_VERSION_CODE 22809
#define NCCL_UNIQUE_ID_BYTES 128
struct ncclUniqueId { char internal[NCCL_UNIQUE_ID_BYTES]; };       // the file's name
enum ncclResult_t {
    ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclSystemError = 2, ncclInternalError = 3, ncclInvalidArgument = 4, ncclInvalidUsage = 5,
    ncclRemoteError = 6, ncclInProgress = 7,
};
enum ncclRedOp_t { ncclSum = 0, ncclProd = 1, ncclMax = 2, ncclMin = 3, ncclAvg = 4 };
enum ncclDataType_t {
    ncclInt8 = 0, ncclChar = 0, ncclUint8 = 1, ncclInt32 = 2, ncclInt = 2, ncclInt64 = 4, ncclFloat16 = 6, ncclHalf = 6,
    ncclFloat32 = 7, ncclFloat = 7, ncclBfloat16 = 9,
};

namespace emu {
enum { MAX_RANKS = 64, SLOT_BYTES = 1 << 20 };
struct NcclCall { char name[24]; size_t count; int type, op, root; };               // what all ranks must agree on (root also: peer)
struct NcclRank { std::atomic<uint64_t> phase; NcclCall call[2]; };     // phase: barriers that this rank has reached; call: the latest two
struct NcclShared { std::atomic<int> joined; NcclRank rank[MAX_RANKS]; };           // followed by the slots
}
struct ncclComm {
    int rank, ranks, file;
    emu::NcclShared *shared;
    char *slots;
    uint64_t phase, calls;
    cudaEvent_t last;           // completion of the latest call, for order across streams
    ncclUniqueId id;
};
typedef ncclComm *ncclComm_t;

namespace emu {
[[noreturn]] inline void nccl_fail(const ncclComm *comm, const char *what, int peer, const char *why) {
    fflush(stdout);
    fprintf(stderr, "emu: %s on rank %d of %d: rank %d %s\n", what, comm->rank, comm->ranks, peer, why);
    unlink(comm->id.internal);      // still there if not all ranks have come
    _exit(1);       // not exit(): its handlers would wait for the work of this stream
}
inline size_t nccl_bytes(int type) {
    switch (type) {
        case ncclInt8: case ncclUint8: return 1;
        case ncclFloat16: case ncclBfloat16: return 2;
        case ncclInt32: case ncclFloat32: return 4;
        case ncclInt64: return 8;
    }
    return 0;
}
inline char *nccl_slot(const ncclComm *comm, int rank) { return comm->slots + (size_t)rank * SLOT_BYTES; }
inline struct flock nccl_lock(int rank) {       // byte number `rank` of the file is locked while that rank lives
    struct flock lock = {};
    lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = rank, lock.l_len = 1;
    return lock;
}

// Waits until done(); looks every few milliseconds whether `peer` still lives.
template <class Done> void nccl_wait(const ncclComm *comm, const char *what, int peer, Done done) {
    const char *text = getenv("EMU_NCCL_SECONDS");
    time_t end = time(nullptr) + (text ? atol(text) : 60);
    for (int spins = 0; !done(); spins++) {
        if (spins < 1000) { sched_yield(); continue; }
        struct timespec nap = {0, 2000000};
        nanosleep(&nap, nullptr);
        struct flock lock = nccl_lock(peer);
        bool joined = comm->shared->joined.load() == comm->ranks;
        if (joined && fcntl(comm->file, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK && !done()) nccl_fail(comm, what, peer, "has ended");
        if (time(nullptr) > end) nccl_fail(comm, what, peer, "has not come in time: does it make the same calls, and wait for its stream?");
    }
}
// All ranks meet. What a rank wrote before it is seen by all after it.
inline void nccl_barrier(ncclComm *comm, const char *what) {
    uint64_t phase = ++comm->phase;
    comm->shared->rank[comm->rank].phase.store(phase, std::memory_order_release);
    for (int r = 0; r < comm->ranks; r++)
        nccl_wait(comm, what, r, [&] { return comm->shared->rank[r].phase.load(std::memory_order_acquire) >= phase; });
}
// Compares this rank's call with the others'.
inline void nccl_agree(ncclComm *comm, const NcclCall &call) {
    int which = ++comm->calls % 2;      // a slow rank may still look at the call before
    comm->shared->rank[comm->rank].call[which] = call;
    nccl_barrier(comm, call.name);
    for (int r = 0; r < comm->ranks; r++) {
        const NcclCall &other = comm->shared->rank[r].call[which];
        bool same_numbers = call.count == other.count && call.type == other.type && call.op == other.op && call.root == other.root;
        if (same_numbers && strcmp(call.name, other.name) == 0) continue;
        char why[256];
        snprintf(why, sizeof why, "is at call %llu with %s count %zu type %d op %d root %d, this one with count %zu type %d op %d root %d",
                 (unsigned long long)comm->calls, other.name, other.count, other.type, other.op, other.root,
                 call.count, call.type, call.op, call.root);
        nccl_fail(comm, call.name, r, why);
    }
}

// to[i] = in[0][i] op in[1][i] op ..., in the order of the ranks. Sum: the type in which it is done.
template <class T, class Sum> void nccl_reduce(void *to, const std::vector<const char *> &in, size_t count, int op) {
    for (size_t i = 0; i < count; i++) {
        Sum s = (Sum)((const T *)in[0])[i];
        for (size_t r = 1; r < in.size(); r++) {
            Sum x = (Sum)((const T *)in[r])[i];
            switch (op) {
                case ncclProd: s = s * x; break;
                case ncclMax: s = x > s ? x : s; break;
                case ncclMin: s = x < s ? x : s; break;
                default: s = s + x;
            }
        }
        ((T *)to)[i] = (T)(op == ncclAvg ? s / (Sum)in.size() : s);
    }
}
inline void nccl_reduce(void *to, const std::vector<const char *> &in, size_t count, int type, int op) {
    switch (type) {
        case ncclInt8: return nccl_reduce<int8_t, int8_t>(to, in, count, op);
        case ncclUint8: return nccl_reduce<uint8_t, uint8_t>(to, in, count, op);
        case ncclInt32: return nccl_reduce<int32_t, int32_t>(to, in, count, op);
        case ncclInt64: return nccl_reduce<int64_t, int64_t>(to, in, count, op);
        case ncclFloat32: return nccl_reduce<float, float>(to, in, count, op);
        case ncclFloat16: return nccl_reduce<__half, float>(to, in, count, op);
        case ncclBfloat16: return nccl_reduce<__nv_bfloat16, float>(to, in, count, op);
    }
}

// Calls between ncclGroupStart and ncclGroupEnd are queued at its end.
inline int group_depth;
inline std::vector<std::function<void()>> group_calls;

// Queues a collective. Its data are `count` numbers for each of `parts` ranks in `send` (or none where send is NULL), handled in chunks:
// a rank's slot then holds its parts' chunks one after the other, and read(first, n) takes what this rank needs of numbers
// first.. first + n of every part.
template <class Read>
ncclResult_t nccl_collective(NcclCall call, const void *send, size_t parts, ncclComm *comm, cudaStream_t stream, Read read) {
    size_t size = nccl_bytes(call.type);
    if (comm == nullptr || size == 0 || call.op < ncclSum || call.op > ncclAvg || call.root < 0 || call.root >= comm->ranks) {
        fprintf(stderr, "emu: %s: communicator %p, type %d, operation %d, root %d: invalid\n", call.name, (void *)comm,
                call.type, call.op, call.root);
        return ncclInvalidArgument;
    }
    auto work = [=] {
        nccl_agree(comm, call);
        size_t chunk = SLOT_BYTES / parts / size;
        for (size_t first = 0; first < call.count; first += chunk) {
            size_t n = std::min(chunk, call.count - first);
            for (size_t p = 0; send != nullptr && p < parts; p++)
                memcpy(nccl_slot(comm, comm->rank) + p * n * size, (const char *)send + (p * call.count + first) * size, n * size);
            nccl_barrier(comm, call.name);
            read(first, n);
            nccl_barrier(comm, call.name);
        }
    };
    auto queue = [=] {      // after the latest call, also if that one went to another stream
        cudaStreamWaitEvent(stream, comm->last, 0);
        emu::enqueue(stream, call.name, work);
        cudaEventRecord(comm->last, stream);
    };
    if (group_depth > 0) group_calls.push_back(queue);
    else queue();
    return ncclSuccess;
}
// Where part `part` of every rank's chunk lies.
inline std::vector<const char *> nccl_parts(ncclComm *comm, size_t part, size_t bytes) {
    std::vector<const char *> parts;
    for (int r = 0; r < comm->ranks; r++) parts.push_back(nccl_slot(comm, r) + part * bytes);
    return parts;
}
}

inline const char *ncclGetErrorString(ncclResult_t result) {
    const char *names[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument",
                           "invalid usage", "remote error", "in progress"};
    return names[result];
}
inline ncclResult_t ncclGetVersion(int *version) { return *version = NCCL_VERSION_CODE, ncclSuccess; }
inline ncclResult_t ncclGroupStart(void) { return emu::group_depth++, ncclSuccess; }
inline ncclResult_t ncclGroupEnd(void) {
    if (emu::group_depth == 0) return ncclInvalidUsage;
    if (--emu::group_depth > 0) return ncclSuccess;
    for (auto &queue : emu::group_calls) queue();
    emu::group_calls.clear();
    return ncclSuccess;
}

inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static int count;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const char *directory = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "%s/emu_nccl_%d_%d_%lld%09ld", directory, (int)getpid(), count++,
             (long long)now.tv_sec, now.tv_nsec);
    return ncclSuccess;
}
// All ranks come here. The last one removes the file's name, so that nothing is left behind when the processes end.
inline ncclResult_t ncclCommInitRank(ncclComm_t *result, int ranks, ncclUniqueId id, int rank) {
    if (ranks < 1 || ranks > emu::MAX_RANKS || rank < 0 || rank >= ranks) {
        fprintf(stderr, "emu: ncclCommInitRank: rank %d of %d (at most %d)\n", rank, ranks, emu::MAX_RANKS);
        return ncclInvalidArgument;
    }
    size_t header = (sizeof(emu::NcclShared) + 4095) / 4096 * 4096, bytes = header + (size_t)ranks * emu::SLOT_BYTES;
    int file = open(id.internal, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    struct flock lock = emu::nccl_lock(rank);
    if (file < 0 || ftruncate(file, (off_t)bytes) != 0 || fcntl(file, F_SETLK, &lock) != 0) {
        bool taken = errno == EAGAIN || errno == EACCES;
        const char *why = taken ? "this rank is there already" : strerror(errno);
        fprintf(stderr, "emu: ncclCommInitRank: rank %d, file %s: %s\n", rank, id.internal, why);
        return ncclSystemError;
    }
    char *memory = (char *)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return ncclSystemError;
    ncclComm *comm = new ncclComm{rank, ranks, file, (emu::NcclShared *)memory, memory + header, 0, 0, nullptr, id};
    cudaEventCreate(&comm->last);
    if (comm->shared->joined.fetch_add(1) + 1 == ranks) unlink(id.internal);
    emu::nccl_barrier(comm, "ncclCommInitRank");
    return *result = comm, ncclSuccess;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    cudaEventSynchronize(comm->last);
    cudaEventDestroy(comm->last);
    munmap(comm->shared, (size_t)(comm->slots - (char *)comm->shared) + (size_t)comm->ranks * emu::SLOT_BYTES);
    close(comm->file);
    delete comm;
    return ncclSuccess;
}
inline ncclResult_t ncclCommCount(const ncclComm_t comm, int *count) { return *count = comm->ranks, ncclSuccess; }
inline ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) { return *rank = comm->rank, ncclSuccess; }

// recv (count) on every rank = reduction of all ranks' send (count). In place: recv is send.
inline ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                                  cudaStream_t stream) {
    size_t size = emu::nccl_bytes(type);
    return emu::nccl_collective({"ncclAllReduce", count, type, op, 0}, send, 1, comm, stream, [=](size_t first, size_t n) {
        emu::nccl_reduce((char *)recv + first * size, emu::nccl_parts(comm, 0, 0), n, type, op);
    });
}
// recv (count) on the root only
inline ncclResult_t ncclReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op, int root, ncclComm_t comm,
                               cudaStream_t stream) {
    size_t size = emu::nccl_bytes(type);
    return emu::nccl_collective({"ncclReduce", count, type, op, root}, send, 1, comm, stream, [=](size_t first, size_t n) {
        if (comm->rank == root) emu::nccl_reduce((char *)recv + first * size, emu::nccl_parts(comm, 0, 0), n, type, op);
    });
}
// recv (count) = reduction of part `rank` of all ranks' send (ranks, count). In place: recv is send + rank count.
inline ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                                      cudaStream_t stream) {
    size_t size = emu::nccl_bytes(type), parts = comm ? comm->ranks : 1;
    return emu::nccl_collective({"ncclReduceScatter", count, type, op, 0}, send, parts, comm, stream, [=](size_t first, size_t n) {
        emu::nccl_reduce((char *)recv + first * size, emu::nccl_parts(comm, comm->rank, n * size), n, type, op);
    });
}
// recv (ranks, count) = send (count) of every rank. In place: send is recv + rank count.
inline ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
    size_t size = emu::nccl_bytes(type);
    return emu::nccl_collective({"ncclAllGather", count, type, 0, 0}, send, 1, comm, stream, [=](size_t first, size_t n) {
        for (int r = 0; r < comm->ranks; r++) memcpy((char *)recv + (r * count + first) * size, emu::nccl_slot(comm, r), n * size);
    });
}
// recv (count) on every rank = send (count) of the root
inline ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                                  cudaStream_t stream) {
    size_t size = emu::nccl_bytes(type);
    const void *source = comm && comm->rank == root ? send : nullptr;
    return emu::nccl_collective({"ncclBroadcast", count, type, 0, root}, source, 1, comm, stream, [=](size_t first, size_t n) {
        memcpy((char *)recv + first * size, emu::nccl_slot(comm, root), n * size);
    });
}
