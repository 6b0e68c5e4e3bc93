// Barriers and messages by which blocks exchange states, and asynchronous copies.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "params.h"

namespace fusedrnn::cuda {

// Check builds, which define FUSEDRNN_CHECK as a number of GPU cycles, limit the time that a thread
// polls: after a deadlock, the thread prints where it waits and ends the kernel with a trap.
// Release builds have no such limit.
class TimeLimit {
 public:
#ifdef FUSEDRNN_CHECK
  __device__ TimeLimit(const Params& params, int64_t step, const char* wait)
      : p_(params), step_(step), wait_(wait) {
    start_ = clock64();
  }
  __device__ void check() const {
    if (clock64() - start_ > FUSEDRNN_CHECK) fail(p_, step_, wait_);
  }

 private:
  static __device__ __noinline__ void fail(const Params& p, int64_t step, const char* wait) {
    printf(
        "fusedrnn: no end of the wait for %s, pass %d, T %lld, B %lld, H %lld: step %lld, block %d "
        "of %d, thread %d (batch groups of %d blocks, %d rows, %d units a block, split %d)\n",
        wait, int(p.problem.pass), (long long)p.problem.T, (long long)p.problem.B,
        (long long)p.problem.H, (long long)step, int(blockIdx.x), int(gridDim.x), int(threadIdx.x),
        p.blocks, p.rows, p.units, 1 << p.split_log2);
    __trap();
  }

  const Params& p_;
  const int64_t step_;
  const char* const wait_;
  long long start_;
#else
  __device__ TimeLimit(const Params&, int64_t, const char*) {}
  __device__ void check() const {}
#endif
};

// The shared-memory address that PTX instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- clusters ----

// A barrier for all threads of the cluster. Afterwards each sees what every thread wrote into the
// shared memory of its own block or of a peer.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}

// Initialises an mbarrier in shared memory. Each of its phases ends after one arrival.
__device__ __forceinline__ void init_arrivals(uint64_t* arrived) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(
          shared_address(arrived))
      : "memory");
#endif
}

// Waits for the end of the phase with parity `phase`. The scope is the block, even for bytes from
// peers: they are written into this block's own shared memory, which no cache duplicates. With
// cluster scope, each warp would invalidate its L1 (CCTL.IVALL). CUTLASS waits for a cluster's
// bytes in the same way.
__device__ __forceinline__ void wait_for_arrivals(uint64_t* arrived, unsigned phase,
                                                  const TimeLimit& limit) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    limit.check();
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(arrived)), "r"(phase)
        : "memory");
  } while (!done);
#endif
}

// Makes the current phase also wait for `bytes` bytes from send_to_peer(), and arrives. The
// mbarrier has one arrival per phase, by the thread that calls this. Bytes may arrive before the
// call.
__device__ __forceinline__ void expect_bytes(uint64_t* arrived, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrived)),
      "r"(bytes)
      : "memory");
#endif
}

// Stores 4, 8 or 16 bytes in the shared memory of block `peer`, at the address that corresponds to
// `place` in this block, and counts them at the peer's mbarrier. This takes one hop and no fence.
template <class Numbers>
__device__ __forceinline__ void send_to_peer(void* place, const uint64_t* arrived, int peer,
                                             const Numbers& numbers) {
#if __CUDA_ARCH__ >= 900
  const auto at_peer = [&](const void* ours) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(shared_address(ours)), "r"(peer));
    return address;
  };
  constexpr int kWords = sizeof(numbers) / 4;
  uint32_t word[kWords];
  memcpy(word, &numbers, sizeof(numbers));
  if constexpr (kWords == 4)
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(at_peer(place)),
        "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]), "r"(at_peer(arrived))
        : "memory");
  else if constexpr (kWords == 2)
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
            at_peer(place)),
        "r"(word[0]), "r"(word[1]), "r"(at_peer(arrived))
        : "memory");
  else
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                     at_peer(place)),
                 "r"(word[0]), "r"(at_peer(arrived))
                 : "memory");
#endif
}

// ---- the grid ----

// Counts an arrival. A thread that reads the new count with read_count() sees all earlier writes of
// this thread, and the writes of other threads that this thread has synchronised with.
__device__ __forceinline__ void count_arrival(unsigned* arrived) {
#if __CUDA_ARCH__ >= 700
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
#endif
}
__device__ __forceinline__ unsigned read_count(const unsigned* arrived) {
  unsigned now = 0;
#if __CUDA_ARCH__ >= 700
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
#endif
  return now;
}

// A barrier for all blocks of a batch group, which must run at the same time. `arrived` counts
// arrivals over all steps and is never reset; `full` is the count at which this barrier opens.
// Afterwards the threads see each other's writes to global memory if they read them through L2.
__device__ __forceinline__ void grid_barrier(unsigned* arrived, unsigned full,
                                             const TimeLimit& limit) {
  __syncthreads();
  if (threadIdx.x == 0) {
    count_arrival(arrived);
    while (int(read_count(arrived) - full) < 0) limit.check();
  }
  __syncthreads();
}

// Loads what another block may have written: L1 may hold an older version, L2 does not.
template <class T>
__device__ __forceinline__ T load_through_l2(const T* from) {
  T value;
  if constexpr (sizeof(T) == 8) {
    const auto word = __ldcg(reinterpret_cast<const unsigned long long*>(from));
    memcpy(&value, &word, 8);
  } else if constexpr (sizeof(T) == 4) {
    const auto word = __ldcg(reinterpret_cast<const unsigned*>(from));
    memcpy(&value, &word, 4);
  } else {
    const auto word = __ldcg(reinterpret_cast<const unsigned short*>(from));
    memcpy(&value, &word, 2);
  }
  return value;
}

// ---- copies from global to shared memory ----

// Copies 16 bytes, bypassing L1.
__device__ __forceinline__ void copy_through_l2(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
#else
  *static_cast<uint4*>(to) = __ldcg(static_cast<const uint4*>(from));
#endif
}

// Copies 4, 8 or 16 bytes. Both addresses must be aligned to that size.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  const uint32_t address = shared_address(to);
  if (bytes == 16)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else if (bytes == 8)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
#else
  if (bytes == 16)
    *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
  else if (bytes == 8)
    *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
  else
    *static_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from);
#endif
}

// Waits for this thread's copies. After a subsequent barrier, the copies of all threads are
// visible.
__device__ __forceinline__ void copies_done() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Copies in groups: the first function closes a group, the second waits for all groups but the last
// `left` groups.
__device__ __forceinline__ void end_of_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int left>
__device__ __forceinline__ void wait_for_copies_but() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
}

// Prefetches the cache line at `from` into L2. Does not wait.
__device__ __forceinline__ void prefetch_into_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// ---- programmatic dependent launch (Launch::waits_for_itself) ----

// The first function allows the next kernel in the stream to start; the second waits until the
// previous kernel has ended and its writes are visible.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fusedrnn::cuda
