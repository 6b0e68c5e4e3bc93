// Measures the latencies that decide how a recurrence is laid out on a GPU, each with its own
// kernel. Built into a shared library that probes.py calls. Does not use torch; the caller owns all
// memory. Every launcher returns a cudaError_t.
//
// Each kernel repeats one operation `n` times and writes the totals: out[0] = cycles, out[1] =
// nanoseconds.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

__device__ int64_t nanoseconds() {
  int64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns)::"memory");
  return ns;
}

__device__ int64_t cycles() {
  int64_t count;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(count)::"memory");
  return count;
}

// Times the calling thread; one thread of each kernel writes the result.
struct Stopwatch {
  __device__ Stopwatch() : first_ns(nanoseconds()), first_cycle(cycles()) {}
  __device__ void stop(int64_t* out) const {
    out[0] = cycles() - first_cycle;
    out[1] = nanoseconds() - first_ns;
  }
  int64_t first_ns, first_cycle;
};

// ---- within a block

__global__ void block_barrier(int n, int64_t* out) {
  __syncthreads();
  const Stopwatch watch;
  for (int i = 0; i < n; ++i) __syncthreads();
  if (threadIdx.x == 0) watch.stop(out);
}

// Each warp runs `kChains` independent chains of mma. Within a chain, each mma waits for the
// previous one, so a single chain gives the latency.
template <int kChains>
__global__ void tensor_core(int n, int64_t* out, float* sink) {
  float d[kChains][4] = {};
  const uint32_t a[4] = {threadIdx.x, threadIdx.x + 1, threadIdx.x + 2, threadIdx.x + 3};
  const uint32_t b[2] = {threadIdx.x + 4, threadIdx.x + 5};
  __syncthreads();
  const Stopwatch watch;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int c = 0; c < kChains; ++c)
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kChains; ++c) sum += d[c][0] + d[c][1] + d[c][2] + d[c][3];
  sink[threadIdx.x] = sum;  // before the barrier, so that all mma finish before the stop
  __syncthreads();
  if (threadIdx.x == 0) watch.stop(out);
}

// ---- L2

// Follows a ring of indices; each load depends on the one before it and bypasses L1.
__global__ void pointer_chase(int n, int64_t* out, const int32_t* ring, float* sink) {
  int32_t at = 0;
  const Stopwatch watch;
  for (int i = 0; i < n; ++i) at = __ldcg(ring + at);
  sink[0] = float(at);
  if (threadIdx.x == 0) watch.stop(out);
}

__global__ void warm(const int32_t* ring, int64_t size, float* sink) {
  int32_t sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) sum += __ldcg(ring + i);
  sink[threadIdx.x] = float(sum);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// ---- a cluster of blocks

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
__device__ int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}

// The address of the same variable in the shared memory of block `rank`.
__device__ uint32_t remote(const void* p, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(p)), "r"(rank));
  return address;
}

template <bool kRelaxed>
__device__ void synchronise_cluster() {
  if (kRelaxed)
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  else
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <bool kRelaxed>
__global__ void cluster_barrier(int n, int64_t* out) {
  synchronise_cluster<false>();
  const Stopwatch watch;
  for (int i = 0; i < n; ++i) synchronise_cluster<kRelaxed>();
  if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out);
}

// A small model of a recurrence's step: each thread writes a word to the next block, the cluster
// synchronises, and each thread reads the word that it has received. With two slots, one barrier
// per step is enough.
__global__ void cluster_exchange(int n, int64_t* out, float* sink) {
  extern __shared__ uint32_t exchanged[];  // [2][threads]
  const int next = (cluster_rank() + 1) % cluster_size();
  uint32_t value = threadIdx.x;
  synchronise_cluster<false>();
  const Stopwatch watch;
  for (int i = 0; i < n; ++i) {
    uint32_t* slot = exchanged + (i % 2) * blockDim.x + threadIdx.x;
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote(slot, next)), "r"(value)
                 : "memory");
    synchronise_cluster<false>();
    value = *slot + 1;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out);
  if (blockIdx.x == 0) sink[threadIdx.x] = float(value);
}

__device__ void wait_for_phase(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The exchange of one step of a recurrence in a cluster: every block sends 4 bytes per thread to
// every block, and continues when it has the data of all blocks. It uses st.async and an mbarrier
// that counts bytes (kAsync), or plain stores and the cluster's barrier. Two slots are enough: when
// a block sends its next data, it has received the current data of all blocks, and each of them had
// read the previous data before it sent the current data. So the slot of the previous data can be
// overwritten.
template <bool kAsync>
__global__ void cluster_gather(int n, int64_t* out, float* sink) {
  extern __shared__ uint32_t gathered[];  // [2][blocks][threads]
  __shared__ alignas(8) uint64_t barriers[2];
  const int rank = cluster_rank(), size = cluster_size();
  if (kAsync && threadIdx.x == 0) {
    for (const auto& barrier : barriers)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier))
                   : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  uint32_t value = threadIdx.x;
  synchronise_cluster<false>();
  const Stopwatch watch;
  for (int i = 0; i < n; ++i) {
    uint32_t* slot = gathered + (i % 2) * size * blockDim.x + threadIdx.x;
    const void* barrier = &barriers[i % 2];
    for (int peer = 0; peer < size; ++peer) {
      const uint32_t there = remote(slot + rank * blockDim.x, peer);
      if (kAsync)
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                there),
            "r"(value), "r"(remote(barrier, peer))
            : "memory");
      else
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(value) : "memory");
    }
    if (kAsync) {
      if (threadIdx.x == 0)
        asm volatile(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
            "r"(int(size * blockDim.x * sizeof(uint32_t)))
            : "memory");
      wait_for_phase(shared_address(barrier), i / 2 % 2);
    } else {
      synchronise_cluster<false>();
    }
    value = *static_cast<volatile uint32_t*>(slot + (rank + 1 + i) % size * blockDim.x) + 1;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out);
  if (blockIdx.x == 0) sink[threadIdx.x] = float(value);
  synchronise_cluster<false>();
}

// The same exchange with 1 KB for every block, by st.async of 16 bytes (kBulk: by one bulk copy for
// each peer, from this block's shared memory). st.async stores the 1 KB as 64 / `run` pieces of
// `run` times 16 bytes, one in each row, like the states of several batch rows. There are `pad`
// bytes between rows.
template <bool kBulk>
__global__ void cluster_send(int run, int pad, int n, int64_t* out, float* sink) {
  extern __shared__ __align__(128) unsigned char sent[];  // [2][64 / run][stride], then [2][1 KB]
  __shared__ alignas(8) uint64_t barriers[2];
  const int rank = cluster_rank(), size = cluster_size();
  const int stride = size * run * 16 + pad, slot_bytes = kBulk ? size * 1024 : 64 / run * stride;
  if (threadIdx.x == 0) {
    for (const auto& barrier : barriers)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier))
                   : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  const int piece = threadIdx.x % 64;
  const auto place = [&](int slot, int from) {
    return sent + slot * slot_bytes +
           (kBulk ? from * 1024 + piece * 16
                  : piece / run * stride + (from * run + piece % run) * 16);
  };
  uint32_t value = piece;
  synchronise_cluster<false>();
  const Stopwatch watch;
  for (int i = 0; i < n; ++i) {
    const void* barrier = &barriers[i % 2];
    if (threadIdx.x == 0)
      asm volatile(
          "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
          "r"(size * 1024)
          : "memory");
    if (kBulk) {
      unsigned char* const source = sent + 2 * slot_bytes + i % 2 * 1024;
      if (threadIdx.x < 64)
        *reinterpret_cast<uint4*>(source + piece * 16) = make_uint4(value, value, value, value);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncthreads();
      if (int(threadIdx.x) < size)
        asm volatile(
            "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], "
            "1024, [%2];" ::"r"(remote(sent + i % 2 * slot_bytes + rank * 1024, threadIdx.x)),
            "r"(shared_address(source)), "r"(remote(barrier, threadIdx.x))
            : "memory");
    } else {
      for (int peer = threadIdx.x / 64; peer < size; peer += int(blockDim.x) / 64)
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %1, %1, %1}, "
            "[%2];" ::"r"(remote(place(i % 2, rank), peer)),
            "r"(value), "r"(remote(barrier, peer))
            : "memory");
    }
    wait_for_phase(shared_address(barrier), i / 2 % 2);
    value = *reinterpret_cast<volatile uint32_t*>(place(i % 2, (rank + 1 + i) % size)) + 1;
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out);
  if (blockIdx.x == 0) sink[threadIdx.x] = float(value);
  synchronise_cluster<false>();
}

// Two blocks send a word back and forth, for n round trips: st.async carries the word and signals
// the mbarrier of the waiting block. The word may arrive before its bytes are announced
// (expect_tx): the phase cannot end without the announcement, which is also the one arrival that
// the mbarrier expects.
__global__ void async_ping_pong(int n, int64_t* out, float* sink) {
  __shared__ alignas(8) uint64_t barrier;
  __shared__ alignas(8) uint32_t slot;
  const uint32_t own = shared_address(&barrier);
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(own) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  synchronise_cluster<false>();
  if (threadIdx.x == 0) {
    const uint32_t their_slot = remote(&slot, rank ^ 1), their_barrier = remote(&barrier, rank ^ 1);
    uint32_t value = 0;
    const auto announce = [&] {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 4;" ::"r"(own) : "memory");
    };
    const auto send = [&] {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
              their_slot),
          "r"(value), "r"(their_barrier)
          : "memory");
    };
    const Stopwatch watch;
    for (int i = 0; i < n; ++i) {
      if (rank == 0) send();
      announce();  // while the message is on its way
      wait_for_phase(own, i & 1);
      value = *static_cast<volatile uint32_t*>(&slot) + 1;
      if (rank == 1) send();
    }
    if (rank == 0) watch.stop(out);
    if (rank == 0) sink[0] = float(value);
  }
  synchronise_cluster<false>();  // a block must not exit while another writes to its memory
}

// The same with a plain remote store (release) and a loop that polls until the word changes.
__global__ void flag_ping_pong(int n, int64_t* out, float* sink) {
  __shared__ uint32_t slot;
  const int rank = cluster_rank();
  if (threadIdx.x == 0) slot = 0;
  synchronise_cluster<false>();
  if (threadIdx.x == 0) {
    const uint32_t own = shared_address(&slot), theirs = remote(&slot, rank ^ 1);
    const auto send = [&](uint32_t value) {
      asm volatile("st.release.cluster.shared::cluster.u32 [%0], %1;" ::"r"(theirs), "r"(value)
                   : "memory");
    };
    const auto receive = [&](uint32_t value) {
      uint32_t got;
      do {
        asm volatile("ld.acquire.cluster.shared::cta.u32 %0, [%1];"
                     : "=r"(got)
                     : "r"(own)
                     : "memory");
      } while (got != value);
    };
    const Stopwatch watch;
    for (int i = 1; i <= n; ++i) {
      if (rank == 0) send(uint32_t(i));
      receive(uint32_t(i));
      if (rank == 1) send(uint32_t(i));
    }
    if (rank == 0) watch.stop(out);
    if (rank == 0) sink[0] = float(slot);
  }
  synchronise_cluster<false>();
}
#else
template <bool kRelaxed>
__global__ void cluster_barrier(int, int64_t*) {}
__global__ void cluster_exchange(int, int64_t*, float*) {}
template <bool kAsync>
__global__ void cluster_gather(int, int64_t*, float*) {}
template <bool kBulk>
__global__ void cluster_send(int, int, int, int64_t*, float*) {}
__global__ void async_ping_pong(int, int64_t*, float*) {}
__global__ void flag_ping_pong(int, int64_t*, float*) {}
#endif

// ---- the grid

__global__ void cooperative_barrier(int n, int64_t* out) {
  const auto grid = cooperative_groups::this_grid();
  grid.sync();
  const Stopwatch watch;
  for (int i = 0; i < n; ++i) grid.sync();
  if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out);
}

// All blocks increment one counter and poll it until all have arrived.
__device__ void synchronise_by_counter(uint32_t* counter, uint32_t full) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    uint32_t arrived;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
    } while (arrived < full);
  }
  __syncthreads();
}

__global__ void counter_barrier(int n, int64_t* out, uint32_t* counter) {
  uint32_t full = gridDim.x;
  synchronise_by_counter(counter, full);
  const Stopwatch watch;
  for (int i = 0; i < n; ++i) synchronise_by_counter(counter, full += gridDim.x);
  if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out);
}

// Each block writes one 8-byte word, a value and the step number, and polls the words of all blocks
// until they have the number of this step: data and signal take one hop together, without a fence.
// Two slots are enough, because no block is more than one step ahead.
__global__ void flag_in_data(int n, int64_t* out, uint64_t* words, float* sink) {
  uint32_t value = blockIdx.x;
  const Stopwatch watch;
  for (int i = 1; i <= n; ++i) {
    uint64_t* slot = words + (i % 2) * gridDim.x;
    if (threadIdx.x == 0) {
      const uint64_t word = uint64_t(i) << 32 | value;
      asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(slot + blockIdx.x), "l"(word)
                   : "memory");
    }
    for (int j = threadIdx.x; j < int(gridDim.x); j += blockDim.x) {
      uint64_t word;
      do {
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(slot + j) : "memory");
      } while (word >> 32 != uint64_t(i));
      value = uint32_t(word) + 1;
    }
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) watch.stop(out);
  if (threadIdx.x == 0) sink[blockIdx.x] = float(value);
}

// ---- launches and occupancy

__global__ void nothing() {}

// Uses as many registers as a thread of a 256-thread block can have, because all values depend on
// each other.
__global__ void __launch_bounds__(256, 1) many_registers(int n, float* data) {
  constexpr int kValues = 224;
  extern __shared__ float unused[];
  float v[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) v[i] = data[i * 256 + threadIdx.x];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] = fmaf(v[i], v[(i + 1) % kValues], v[(i + 7) % kValues]);
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) data[i * 256 + threadIdx.x] = v[i];
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, int cluster,
                   bool cooperative, size_t shared, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[1];
  config.attrs = attributes;
  if (cluster > 1) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(cluster), 1, 1};
    config.numAttrs = 1;
  } else if (cooperative) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    config.numAttrs = 1;
  }
  if (cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace

extern "C" {

const char* probe_error(int error) { return cudaGetErrorName(cudaError_t(error)); }

int probe_block_barrier(int threads, int n, int64_t* out, cudaStream_t stream) {
  return launch(block_barrier, 1, threads, 1, false, 0, stream, n, out);
}

int probe_tensor_core(int chains, int threads, int n, int64_t* out, float* sink,
                      cudaStream_t stream) {
  const auto kernel = chains == 1 ? tensor_core<1> : tensor_core<8>;
  return launch(kernel, 1, threads, 1, false, 0, stream, n, out, sink);
}

int probe_l2(int64_t size, int n, int64_t* out, const int32_t* ring, float* sink,
             cudaStream_t stream) {
  const cudaError_t error = launch(warm, 1, 256, 1, false, 0, stream, ring, size, sink);
  if (error != cudaSuccess) return error;
  return launch(pointer_chase, 1, 1, 1, false, 0, stream, n, out, ring, sink);
}

int probe_cluster_barrier(bool relaxed, int cluster, int threads, int n, int64_t* out,
                          cudaStream_t stream) {
  const auto kernel = relaxed ? cluster_barrier<true> : cluster_barrier<false>;
  return launch(kernel, cluster, threads, cluster, false, 0, stream, n, out);
}

int probe_cluster_exchange(int cluster, int threads, int n, int64_t* out, float* sink,
                           cudaStream_t stream) {
  const size_t shared = 2 * size_t(threads) * sizeof(uint32_t);
  return launch(cluster_exchange, cluster, threads, cluster, false, shared, stream, n, out, sink);
}

int probe_cluster_gather(bool async, int cluster, int threads, int n, int64_t* out, float* sink,
                         cudaStream_t stream) {
  const auto kernel = async ? cluster_gather<true> : cluster_gather<false>;
  const size_t shared = 2 * size_t(cluster) * size_t(threads) * sizeof(uint32_t);
  return launch(kernel, cluster, threads, cluster, false, shared, stream, n, out, sink);
}

int probe_cluster_send(bool bulk, int run, int pad, int cluster, int threads, int n, int64_t* out,
                       float* sink, cudaStream_t stream) {
  const auto kernel = bulk ? cluster_send<true> : cluster_send<false>;
  const size_t shared = 2 * (size_t(cluster) * 1024 + size_t(64 / run) * size_t(pad) + 1024);
  return launch(kernel, cluster, threads, cluster, false, shared, stream, run, pad, n, out, sink);
}

int probe_async_ping_pong(int n, int64_t* out, float* sink, cudaStream_t stream) {
  return launch(async_ping_pong, 2, 32, 2, false, 0, stream, n, out, sink);
}

int probe_flag_ping_pong(int n, int64_t* out, float* sink, cudaStream_t stream) {
  return launch(flag_ping_pong, 2, 32, 2, false, 0, stream, n, out, sink);
}

int probe_cooperative_barrier(int blocks, int threads, int n, int64_t* out, cudaStream_t stream) {
  return launch(cooperative_barrier, blocks, threads, 1, true, 0, stream, n, out);
}

// `counter` must be 0.
int probe_counter_barrier(int blocks, int threads, int n, int64_t* out, uint32_t* counter,
                          cudaStream_t stream) {
  return launch(counter_barrier, blocks, threads, 1, true, 0, stream, n, out, counter);
}

// `words` [2][blocks] must be 0.
int probe_flag_in_data(int blocks, int threads, int n, int64_t* out, uint64_t* words, float* sink,
                       cudaStream_t stream) {
  return launch(flag_in_data, blocks, threads, 1, true, 0, stream, n, out, words, sink);
}

// Launches `n` empty kernels.
int probe_launches(int n, cudaStream_t stream) {
  for (int i = 0; i < n; ++i) nothing<<<1, 32, 0, stream>>>();
  return cudaGetLastError();
}

// Returns how many clusters of 256-thread blocks, with `shared` bytes per block, the device holds
// at once, and the registers per thread of that kernel.
int probe_occupancy(int cluster, int64_t shared, int* clusters, int* registers) {
  const auto kernel = reinterpret_cast<const void*>(&many_registers);
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *registers = attributes.numRegs;
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(cluster));
  config.blockDim = dim3(256);
  config.dynamicSmemBytes = size_t(shared);
  cudaLaunchAttribute attributes_of_launch[1];
  attributes_of_launch[0].id = cudaLaunchAttributeClusterDimension;
  attributes_of_launch[0].val.clusterDim = {unsigned(cluster), 1, 1};
  config.attrs = attributes_of_launch;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
}

}  // extern "C"
