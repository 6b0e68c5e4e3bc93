// How states get from block to block, and copies that wait for nobody.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "params.h"

namespace fusedrnn::cuda {

// Check builds (FUSEDRNN_CHECK: GPU cycles) limit the time that a thread polls: a deadlock prints
// where the thread waits and ends the kernel with a trap. Release builds have no such limit.
class TimeLimit {
 public:
#ifdef FUSEDRNN_CHECK
  __device__ TimeLimit(const Params& params, int64_t step, const char* wait)
      : p_(params), step_(step), wait_(wait) {
    start_ = clock64();
  }
  __device__ void check() const {
    if (clock64() - start_ > FUSEDRNN_CHECK) give_up(p_, step_, wait_);
  }

 private:
  static __device__ __noinline__ void give_up(const Params& p, int64_t step, const char* wait) {
    printf(
        "fusedrnn: no end of the wait for %s, pass %d, T %lld, B %lld, H %lld: step %lld, block %d "
        "of %d, thread %d (teams of %d blocks, %d rows, %d units a block, split %d, %d slices)\n",
        wait, int(p.problem.pass), (long long)p.problem.T, (long long)p.problem.B,
        (long long)p.problem.H, (long long)step, int(blockIdx.x), int(gridDim.x), int(threadIdx.x),
        p.blocks, p.rows, p.units, 1 << p.split_log2, p.slices);
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

// What PTX calls a place in shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- clusters ----

// All threads of the cluster; what they wrote into each other's shared memory is then seen.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}

// An mbarrier in shared memory: a phase of it ends with so many arrivals.
__device__ __forceinline__ void init_arrivals(uint64_t* arrived, int count = 1) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(
          shared_address(arrived)),
      "r"(count)
      : "memory");
#endif
}

// Among threads of a block: what they did before they arrived is seen by those who waited.
__device__ __forceinline__ void arrive(uint64_t* arrived) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(arrived))
               : "memory");
#endif
}
// Arrives, but only when this thread's copies are there.
__device__ __forceinline__ void arrive_after_copies(uint64_t* arrived) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(arrived))
               : "memory");
#endif
}
// The scope is the block, also for bytes from peers: they lie in this block's own shared memory,
// which no cache duplicates. With the scope of the cluster each warp would invalidate its L1
// (CCTL.IVALL). CUTLASS waits for a cluster's bytes in the same way.
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

// Arrivals of bytes, counted by an mbarrier of one arrival a phase: that of the thread which says
// how many bytes are expected. Bytes may come before it does.
__device__ __forceinline__ void expect_bytes(uint64_t* arrived, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrived)),
      "r"(bytes)
      : "memory");
#endif
}

// Stores 4, 8 or 16 bytes where `peer` has in its shared memory what `place` is in ours, and counts
// them there: one hop, and no fence.
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

// One more has arrived. Who waits for it sees all that this thread did before, or knows of.
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

// All blocks of a team, which run at once: `arrived` counts them, over all steps together. Their
// threads see each other's writes to global memory afterwards, through L2.
__device__ __forceinline__ void grid_barrier(unsigned* arrived, unsigned full,
                                             const TimeLimit& limit) {
  __syncthreads();
  if (threadIdx.x == 0) {
    count_arrival(arrived);
    while (int(read_count(arrived) - full) < 0) limit.check();
  }
  __syncthreads();
}

// What other blocks wrote: L1 may hold an older version, L2 does not.
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

// 16 bytes, past L1.
__device__ __forceinline__ void copy_through_l2(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
#else
  *static_cast<uint4*>(to) = __ldcg(static_cast<const uint4*>(from));
#endif
}

// The same where `exists`, or zeros; `from` is then any address that is aligned.
__device__ __forceinline__ void copy_or_zero(void* to, const void* from, bool exists) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
#endif
}

// 4, 8 or 16 bytes, aligned alike.
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

// This thread's copies are there; after a barrier, everyone's.
__device__ __forceinline__ void copies_done() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Copies in groups: the end of one, and a wait for all but the last few.
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

// From there to L2, and nobody waits.
__device__ __forceinline__ void prefetch_into_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// ---- kernels of a stream, one after another ----

// The next kernel may begin, if it was launched to wait for itself; and what the one before wrote
// is there.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_the_one_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fusedrnn::cuda
