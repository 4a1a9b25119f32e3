// nccl_test.cu: collectives between processes. Every case forks its ranks; each rank checks what it got, or must be told what went wrong.
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <vector>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <nccl.h>
#define CHECK(condition, ...) do { if (!(condition)) { fprintf(stderr, __VA_ARGS__); exit(1); } } while (0)
#include "../../test/test.h"

#define OK(call) CHECK((call) == 0, "line %d: %s failed\n", __LINE__, #call)
typedef bool RankTest(ncclComm_t comm, int rank, int ranks);

// Runs `test` in `ranks` processes; `said` gets what they write to stderr. Returns in how many it was true.
int run_ranks(int ranks, RankTest *test, std::string *said) {
    ncclUniqueId id;
    int ends[2], good = 0;
    OK(ncclGetUniqueId(&id));
    OK(pipe(ends));
    fflush(stdout);
    for (int rank = 0; rank < ranks; rank++) {
        if (fork() != 0) continue;
        dup2(ends[1], 2), close(ends[0]), close(ends[1]);
        ncclComm_t comm;
        OK(ncclCommInitRank(&comm, ranks, id, rank));
        bool ok = test(comm, rank, ranks);
        OK(ncclCommDestroy(comm));
        fflush(stdout);
        _exit(ok ? 0 : 2);
    }
    close(ends[1]);
    char text[1024];
    for (ssize_t n; (n = read(ends[0], text, sizeof text)) > 0; ) said->append(text, (size_t)n);
    close(ends[0]);
    for (int rank = 0, status; rank < ranks; rank++) if (wait(&status) > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0) good++;
    return good;
}
void test_good(const char *what, int ranks, RankTest *test) {
    std::string said;
    int good = run_ranks(ranks, test, &said);
    check(good == ranks && said.empty(), "%s, %d ranks%s%s", what, ranks, said.empty() ? "" : ": ", said.c_str());
}
void test_reported(const char *what, int ranks, RankTest *test, int good, const char *report) {
    std::string said;
    int as_expected = run_ranks(ranks, test, &said);
    size_t end = said.find('\n', said.find(report) == std::string::npos ? 0 : said.find(report)),
        begin = said.rfind('\n', end ? end - 1 : 0) + 1;
    check(as_expected == good && said.find(report) != std::string::npos, "%s: %s", what, said.substr(begin, end - begin).c_str());
}

template <class T> std::vector<T> download(const T *p, size_t n) {
    std::vector<T> v(n);
    OK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
}
template <class T> T *upload(const std::vector<T> &v) {
    T *p;
    OK(cudaMalloc(&p, (v.empty() ? 1 : v.size()) * sizeof(T)));
    OK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
template <class T> T make(float x) { return (T)x; }
template <> __nv_bfloat16 make<__nv_bfloat16>(float x) { return __float2bfloat16(x); }
template <> __half make<__half>(float x) { return __float2half(x); }
// small: sums and products of 3 are exact in every type
float number(int rank, size_t i) { return (float)((i * 7 + (size_t)rank * 5) % 6 + 1); }

float reduced(ncclRedOp_t op, int ranks, size_t i) {
    float r = number(0, i);
    for (int k = 1; k < ranks; k++) {
        float x = number(k, i);
        r = op == ncclProd ? r * x : op == ncclMax ? fmaxf(r, x) : op == ncclMin ? fminf(r, x) : r + x;
    }
    return op == ncclAvg ? r / ranks : r;
}
// Every collective with one type and operation; counts: none, odd, and more than a chunk
template <class T> bool collectives(ncclComm_t comm, int rank, int ranks, ncclDataType_t type, ncclRedOp_t op, size_t n) {
    std::vector<T> mine(n * ranks);
    for (size_t i = 0; i < mine.size(); i++) mine[i] = make<T>(number(rank, i));
    T *send = upload(mine), *recv = upload(mine);
    bool ok = true;
    auto holds = [&](T *p, size_t count, auto expected) {
        std::vector<T> v = download(p, count);
        for (size_t i = 0; i < count; i++) if (!((float)v[i] == (float)make<T>(expected(i)))) {
            if (ok) fprintf(stderr, "type %d op %d count %zu: at %zu %g, should be %g\n", type, op, n, i, (double)(float)v[i],
                (double)expected(i));
            ok = false;
        }
    };
    auto reset = [&] {
        OK(cudaMemcpy(send, mine.data(), mine.size() * sizeof(T), cudaMemcpyHostToDevice));
        OK(cudaMemcpy(recv, mine.data(), mine.size() * sizeof(T), cudaMemcpyHostToDevice));
    };
    OK(ncclAllReduce(send, recv, n, type, op, comm, 0));
    holds(recv, n, [&](size_t i) { return reduced(op, ranks, i); });
    holds(send, n, [&](size_t i) { return number(rank, i); });
    OK(ncclAllReduce(send, send, n, type, op, comm, 0));
    holds(send, n, [&](size_t i) { return reduced(op, ranks, i); });

    reset();
    OK(ncclReduceScatter(send, recv, n, type, op, comm, 0));
    holds(recv, n, [&](size_t i) { return reduced(op, ranks, rank * n + i); });
    OK(ncclReduceScatter(send, send + rank * n, n, type, op, comm, 0));
    holds(send + rank * n, n, [&](size_t i) { return reduced(op, ranks, rank * n + i); });

    reset();
    OK(ncclAllGather(send, recv, n, type, comm, 0));
    holds(recv, n * ranks, [&](size_t i) { return n ? number((int)(i / n), i % n) : 0; });
    OK(ncclAllGather(send + rank * n, send, n, type, comm, 0));
    holds(send, n * ranks, [&](size_t i) { return n ? number((int)(i / n), i) : 0; });

    reset();
    int root = ranks - 1;
    OK(ncclBroadcast(send, recv, n, type, root, comm, 0));
    holds(recv, n, [&](size_t i) { return number(root, i); });
    OK(ncclReduce(send, recv, n, type, op, 0, comm, 0));
    holds(recv, n, [&](size_t i) { return rank == 0 ? reduced(op, ranks, i) : number(root, i); });
    OK(ncclBroadcast(send, send, n, type, 0, comm, 0));
    holds(send, n, [&](size_t i) { return number(0, i); });
    OK(cudaFree(send));
    OK(cudaFree(recv));
    return ok;
}
bool floats(ncclComm_t comm, int rank, int ranks) {
    bool ok = true;
    for (ncclRedOp_t op : {ncclSum, ncclProd, ncclMax, ncclMin, ncclAvg}) ok &= collectives<float>(comm, rank, ranks, ncclFloat, op, 37);
    return ok;
}
bool other_types(ncclComm_t comm, int rank, int ranks) {
    return collectives<__nv_bfloat16>(comm, rank, ranks, ncclBfloat16, ncclSum, 37) &&
        collectives<__nv_bfloat16>(comm, rank, ranks, ncclBfloat16, ncclAvg, 8) &&
           collectives<__half>(comm, rank, ranks, ncclHalf, ncclMax, 37) && collectives<int>(comm, rank, ranks, ncclInt32, ncclSum, 37) &&
           collectives<int64_t>(comm, rank, ranks, ncclInt64, ncclMin, 37) &&
               collectives<uint8_t>(comm, rank, ranks, ncclUint8, ncclSum, 37);
}
bool sizes(ncclComm_t comm, int rank, int ranks) {
    return collectives<float>(comm, rank, ranks, ncclFloat, ncclSum, 0) &&
        collectives<float>(comm, rank, ranks, ncclFloat, ncclSum, 600001) &&
           collectives<uint8_t>(comm, rank, ranks, ncclUint8, ncclMax, 1) && collectives<float>(comm, rank, ranks, ncclFloat, ncclSum, 0);
}
// 1 + 2^-30 + 2^-30 ...: sums depend on the order, which is that of the ranks; bf16 is rounded once
bool order_and_rounding(ncclComm_t comm, int rank, int ranks) {
    float *f = upload(std::vector<float>{rank == 0 ? 1e8f : rank == 1 ? -1e8f : 1.0f, rank == 0 ? 1.0f : rank == 1 ? 1e8f : -1e8f});
    __nv_bfloat16 *b = upload(std::vector<__nv_bfloat16>{__float2bfloat16(rank == 0 ? 256.0f : 1.0f)});
    OK(ncclAllReduce(f, f, 2, ncclFloat, ncclSum, comm, 0));
    OK(ncclAllReduce(b, b, 1, ncclBfloat16, ncclSum, comm, 0));
    std::vector<float> r = download(f, 2);
    float once = __bfloat162float(download(b, 1)[0]);       // 256 + 1 + 1 = 258, a bf16; 257 is none
    OK(cudaFree(f));
    OK(cudaFree(b));
    return ranks == 3 && r[0] == 1.0f && r[1] == 0.0f && once == 258.0f;
}
__global__ void add(float *p, float x) { p[threadIdx.x] += x; }
// Calls come after the work before them in their stream, and one communicator's calls in their order whatever the stream.
bool streams_and_groups(ncclComm_t comm, int rank, int ranks) {
    cudaStream_t s, t;
    OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    OK(cudaStreamCreateWithFlags(&t, cudaStreamNonBlocking));
    float *p = upload(std::vector<float>(8, 0.0f)), *q = upload(std::vector<float>(8, 1.0f));
    add<<<1, 8, 0, s>>>(p, (float)rank + 1);
    OK(ncclAllReduce(p, p, 8, ncclFloat, ncclSum, comm, s));
    add<<<1, 8, 0, s>>>(p, 1.0f);
    OK(ncclGroupStart());
    OK(ncclAllReduce(q, q, 8, ncclFloat, ncclSum, comm, t));
    OK(ncclGroupStart());
    OK(ncclBroadcast(q, q, 4, ncclFloat, 0, comm, t));
    OK(ncclGroupEnd());
    OK(ncclAllReduce(p, p, 8, ncclFloat, ncclMax, comm, s));
    OK(ncclGroupEnd());
    OK(cudaStreamSynchronize(rank % 2 ? s : t));        // ranks may look at their streams in another order
    OK(cudaStreamSynchronize(rank % 2 ? t : s));
    float a = download(p, 8)[7], b = download(q, 8)[7];
    OK(cudaStreamDestroy(s));
    OK(cudaStreamDestroy(t));
    OK(cudaFree(p));
    OK(cudaFree(q));
    int count, me;
    OK(ncclCommCount(comm, &count));
    OK(ncclCommUserRank(comm, &me));
    return a == ranks * (ranks + 1) / 2 + 1 && b == ranks && count == ranks && me == rank && ncclGroupEnd() == ncclInvalidUsage;
}
bool one_leaves(ncclComm_t comm, int rank, int) {
    float *p = upload(std::vector<float>(8, 1.0f));
    if (rank == 1) _exit(0);
    OK(ncclAllReduce(p, p, 8, ncclFloat, ncclSum, comm, 0));
    OK(cudaDeviceSynchronize());
    return true;
}
bool counts_differ(ncclComm_t comm, int rank, int) {
    float *p = upload(std::vector<float>(8, 1.0f));
    OK(ncclAllReduce(p, p, rank == 1 ? 7 : 8, ncclFloat, ncclSum, comm, 0));
    OK(cudaDeviceSynchronize());
    return true;
}
bool calls_differ(ncclComm_t comm, int rank, int) {
    float *p = upload(std::vector<float>(8, 1.0f));
    if (rank == 0) OK(ncclAllReduce(p, p, 8, ncclFloat, ncclSum, comm, 0));
    else OK(ncclBroadcast(p, p, 8, ncclFloat, 0, comm, 0));
    OK(cudaDeviceSynchronize());
    return true;
}
bool one_is_late(ncclComm_t comm, int rank, int) {
    setenv("EMU_NCCL_SECONDS", "1", 1);
    float *p = upload(std::vector<float>(8, 1.0f));
    if (rank == 1) sleep(3), _exit(0);
    OK(ncclAllReduce(p, p, 8, ncclFloat, ncclSum, comm, 0));
    OK(cudaDeviceSynchronize());
    return true;
}
bool bad_arguments(ncclComm_t comm, int, int ranks) {
    float *p = upload(std::vector<float>(8, 1.0f));
    bool ok = ncclBroadcast(p, p, 8, ncclFloat, ranks, comm, 0) == ncclInvalidArgument &&
        ncclAllReduce(p, p, 8, (ncclDataType_t)77, ncclSum, comm, 0) == ncclInvalidArgument &&
              ncclAllReduce(p, p, 8, ncclFloat, (ncclRedOp_t)9, comm, 0) == ncclInvalidArgument &&
                  ncclAllReduce(p, p, 8, ncclFloat, ncclSum, NULL, 0) == ncclInvalidArgument;
    OK(cudaFree(p));
    return ok;
}
int files_left(void) {
    int count = 0;
    DIR *directory = opendir("/dev/shm");
    for (struct dirent *entry; directory && (entry = readdir(directory)) != NULL; ) {
        char mine[64];
        snprintf(mine, sizeof mine, "emu_nccl_%d_", (int)getpid());
        count += strncmp(entry->d_name, mine, strlen(mine)) == 0;
    }
    if (directory) closedir(directory);
    return count;
}

int main(void) {
    test_good("every operation on floats", 3, floats);
    test_good("other types", 3, other_types);
    test_good("no numbers, one, more than a chunk", 2, sizes);
    test_good("a communicator of one", 1, floats);
    test_good("order of summation, one rounding", 3, order_and_rounding);
    test_good("streams and groups", 3, streams_and_groups);
    test_reported("a rank that has ended", 3, one_leaves, 1, "rank 1 has ended");
    test_reported("counts that differ", 2, counts_differ, 0, "is at call 1 with ncclAllReduce count 7");
    test_reported("calls that differ", 2, calls_differ, 0, "is at call 1 with ncclBroadcast");
    test_reported("a rank that does not come", 2, one_is_late, 1, "rank 1 has not come in time");
    test_reported("arguments that are refused", 1, bad_arguments, 1, "root 1: invalid");
    check(files_left() == 0, "no files left behind");
    return verdict();
}
