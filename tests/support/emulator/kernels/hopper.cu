// What sm_90 adds: clusters, distributed shared memory, transaction barriers, bulk copies.
#include <cooperative_groups.h>

namespace cg = cooperative_groups;

namespace {

__device__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }
__device__ unsigned in_block(unsigned address, unsigned rank) {
  unsigned mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
__device__ void wait(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "LOOK:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra FOUND;\n"
      "bra LOOK;\n"
      "FOUND:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace

extern "C" __global__ void neighbours(int* out) {
  __shared__ int own;
  auto cluster = cg::this_cluster();
  const unsigned other = (cluster.block_rank() + 1) % cluster.num_blocks();
  if (threadIdx.x == 0) own = 100 + cluster.block_rank();
  cluster.sync();
  if (threadIdx.x == 0) {
    out[blockIdx.x] = *cluster.map_shared_rank(&own, other);
    int value;
    asm volatile("ld.shared::cluster.s32 %0, [%1];"
                 : "=r"(value)
                 : "r"(in_block(shared_address(&own), other)));
    out[gridDim.x + blockIdx.x] = value;
  }
  cluster.sync();
}

// Each block writes to all blocks. Arriving at the barrier and waiting are separate instructions.
extern "C" __global__ void scatter(int* out) {
  __shared__ int received[16];
  auto cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank(), blocks = cluster.num_blocks();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // all blocks have begun
  if (threadIdx.x < blocks)
    asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(
                     in_block(shared_address(&received[rank]), threadIdx.x)),
                 "r"(10 * rank + threadIdx.x));
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (threadIdx.x < blocks) out[blockIdx.x * blocks + threadIdx.x] = received[threadIdx.x];
}

// A ring: in each round every block sends 64 floats to the next by st.async, which counts bytes at
// the receiver's mbarrier. If `careless`, the receiver does not wait.
extern "C" __global__ void ring(float* out, int rounds, int careless) {
  __shared__ __align__(16) float inbox[2][64];
  __shared__ __align__(8) unsigned long long full[2];
  auto cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank(), next = (rank + 1) % cluster.num_blocks();
  const int t = threadIdx.x;
  if (t == 0) {
    for (int slot = 0; slot < 2; ++slot)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[slot])));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster.sync();
  float value = 100.f * rank + t;
  for (int round = 0; round < rounds; ++round) {
    const int slot = round & 1;
    if (t == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 256;" ::"r"(
          shared_address(&full[slot])));
    if (t % 2 == 0) {
      const float more = __shfl_down_sync(0x55555555u, value, 0);
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::
              "r"(in_block(shared_address(&inbox[slot][t]), next)),
          "f"(more), "f"(more + 1), "r"(in_block(shared_address(&full[slot]), next))
          : "memory");
    }
    if (!careless) wait(shared_address(&full[slot]), round >> 1 & 1);
    value = inbox[slot][t] + 1000.f;
    cluster.sync();  // the slot may be written again
  }
  out[blockIdx.x * 64 + t] = value;
}

extern "C" __global__ void bulk(const float* x, float* y) {  // global -> shared -> global
  __shared__ __align__(128) float s[256];
  __shared__ __align__(8) unsigned long long full;
  const int t = threadIdx.x;
  if (t == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full)));
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (t == 0) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 1024;" ::"r"(shared_address(&full)));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 1024, "
        "[%2];" ::"r"(shared_address(s)),
        "l"(__cvta_generic_to_global(x)), "r"(shared_address(&full))
        : "memory");
  }
  wait(shared_address(&full), 0);
  s[t] *= 2;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (t == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 1024;" ::"l"(
                     __cvta_generic_to_global(y)),
                 "r"(shared_address(s))
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

extern "C" __global__ void bulk_to_peer(const float* x, float* y) {  // shared -> another's shared
  __shared__ __align__(128) float mine[64], received[64];
  __shared__ __align__(8) unsigned long long full;
  auto cluster = cg::this_cluster();
  const unsigned other = cluster.block_rank() ^ 1;
  const int t = threadIdx.x;
  mine[t] = x[blockIdx.x * 64 + t];
  if (t == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full)));
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 256;" ::"r"(shared_address(&full)));
  }
  cluster.sync();
  if (t == 0)
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 256, "
        "[%2];" ::"r"(in_block(shared_address(received), other)),
        "r"(shared_address(mine)), "r"(in_block(shared_address(&full), other))
        : "memory");
  wait(shared_address(&full), 0);
  y[blockIdx.x * 64 + t] = received[t];
  cluster.sync();
}

// A block reads the shared memory of one that may have exited.
extern "C" __global__ void leave_early(int* out) {
  __shared__ int own;
  auto cluster = cg::this_cluster();
  own = 5;
  cluster.sync();
  if (cluster.block_rank() == 0) return;
  for (int i = 0; i < 100; ++i) __nanosleep(10);
  int value;
  asm volatile("ld.shared::cluster.s32 %0, [%1];"
               : "=r"(value)
               : "r"(in_block(shared_address(&own), 0)));
  out[blockIdx.x] = value;
}

extern "C" __global__ void elected(int* out) {
  unsigned chosen;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }"
               : "=r"(chosen));
  out[threadIdx.x] = chosen;
}

extern "C" __global__ void store_matrix(const unsigned* x, unsigned* y) {
  __shared__ __align__(16) unsigned s[4 * 8];
  const unsigned row = shared_address(s + (threadIdx.x & 7) * 4);
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(row),
               "r"(x[threadIdx.x])
               : "memory");
  __syncwarp();
  y[threadIdx.x] = s[threadIdx.x];
}
