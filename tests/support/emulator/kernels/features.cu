// One small kernel for each kind of instruction. tests/cuda/test_emulator.py compares them with
// torch.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda/barrier>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>

namespace cg = cooperative_groups;

#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
#define AMPERE 1
#endif

struct Params {
  const float* x;
  float* y;
  int n;
  double factor;
};

extern "C" __global__ void structure(const __grid_constant__ Params p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) p.y[i] = float(p.factor * p.x[i]);
}

extern "C" __global__ void functions_f32(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  const float v = x[i];
  y[0 * n + i] = expf(v);
  y[1 * n + i] = tanhf(v);
  y[2 * n + i] = 1.f / (1.f + expf(-v));
  y[3 * n + i] = logf(fabsf(v) + 1e-3f);
  y[4 * n + i] = sinf(v * 30);
  y[5 * n + i] = rsqrtf(fabsf(v) + 1.f);
  y[6 * n + i] = erff(v);
  y[7 * n + i] = __expf(v);
  y[8 * n + i] = powf(fabsf(v), 1.7f);
  y[9 * n + i] = log1pf(expf(v));
  y[10 * n + i] = expm1f(v);
}

extern "C" __global__ void functions_f64(const double* x, double* y, int n) {
  const int i = threadIdx.x;
  const double v = x[i];
  y[0 * n + i] = exp(v);
  y[1 * n + i] = tanh(v);
  y[2 * n + i] = 1. / (1. + exp(-v));
  y[3 * n + i] = log(fabs(v) + 1e-3);
  y[4 * n + i] = sqrt(fabs(v));
  y[5 * n + i] = v / 3.;
  y[6 * n + i] = expm1(v);
}

extern "C" __global__ void approximate(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y[i]) : "f"(x[i]));
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y[n + i]) : "f"(x[i]));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y[2 * n + i]) : "f"(x[i]));
}

extern "C" __global__ void rounding(const float* a, const float* b, const double* d, float* y,
                                    int n) {
  const int i = threadIdx.x;
  y[0 * n + i] = __fadd_rd(a[i], b[i]);
  y[1 * n + i] = __fadd_ru(a[i], b[i]);
  y[2 * n + i] = __fadd_rz(a[i], b[i]);
  y[3 * n + i] = __fmul_rd(a[i], b[i]);
  y[4 * n + i] = __fmul_ru(a[i], b[i]);
  y[5 * n + i] = __fmaf_rz(a[i], b[i], 1.f);
  y[6 * n + i] = __double2float_rd(d[i]);
  y[7 * n + i] = __double2float_ru(d[i]);
  y[8 * n + i] = __saturatef(a[i]);
  y[9 * n + i] = float(__float2int_rn(a[i] * 10));
  y[10 * n + i] = float(__float2int_rd(a[i] * 10));
}

extern "C" __global__ void integers(const int* a, int* q, int n) {
  const int i = threadIdx.x;
  q[0 * n + i] = a[i] / 7;
  q[1 * n + i] = a[i] % 13;
  q[2 * n + i] = __clz(a[i]);
  q[3 * n + i] = __brev(a[i]);
  q[4 * n + i] = a[i] / (i + 1);
  q[5 * n + i] = __mulhi(a[i], 123456789);
  q[6 * n + i] = __popc(a[i]);
  q[7 * n + i] = __ffs(a[i]);
  q[8 * n + i] = int((long long)a[i] * a[i] / 1000);
}

extern "C" __global__ void halves(const __half* x, __half* y, int n) {
  const int i = threadIdx.x;
  y[0 * n + i] = hexp(x[i]);
  y[1 * n + i] = __hdiv(x[i], __float2half(3.f));
  y[2 * n + i] = __hmul(x[i], x[i]);
  y[3 * n + i] = __hfma(x[i], x[i], x[i]);
  const __half2 pair = __hadd2(__half2half2(x[i]), __floats2half2_rn(1.f, 2.f));
  y[4 * n + i] = __low2half(pair);
  y[5 * n + i] = __high2half(pair);
}

extern "C" __global__ void brain_floats(const __nv_bfloat16* x, __nv_bfloat16* y, int n) {
  const int i = threadIdx.x;
  const float v = __bfloat162float(x[i]);
  y[0 * n + i] = __float2bfloat16_rn(v * 3.f);
  y[1 * n + i] = __float2bfloat16_rn(v + 1e-3f);
#ifdef AMPERE
  y[2 * n + i] = __hfma(x[i], x[i], x[i]);
  y[3 * n + i] = __hmax(x[i], __float2bfloat16_rn(0.f));
#endif
}

// C[16][8] = A[16][16] B[16][8], with B given transposed, and with ldmatrix, as real kernels do it.
extern "C" __global__ void multiply_f16(const __half* a, const __half* b, float* c) {
  __shared__ __align__(16) __half rows[16 * 16], columns[8 * 16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 16; i += 32) rows[i] = a[i];
  for (int i = lane; i < 8 * 16; i += 32) columns[i] = b[i];
  __syncwarp();
  unsigned fa[4], fb[2];
  const unsigned pa = __cvta_generic_to_shared(rows + (lane & 15) * 16 + (lane >> 4) * 8);
  const unsigned pb = __cvta_generic_to_shared(columns + (lane & 7) * 16 + (lane >> 3 & 1) * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
               : "r"(pa));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(fb[0]), "=r"(fb[1])
               : "r"(pb));
  float d[4] = {};
  // In two halves of depth 8, which Turing also supports.
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(fa[0]), "r"(fa[1]), "r"(fb[0]));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(fa[2]), "r"(fa[3]), "r"(fb[1]));
  const int row = lane >> 2, column = (lane & 3) * 2;
  c[row * 8 + column] = d[0];
  c[row * 8 + column + 1] = d[1];
  c[(row + 8) * 8 + column] = d[2];
  c[(row + 8) * 8 + column + 1] = d[3];
}

extern "C" __global__ void transpose(const __half* x, __half* y) {  // 8 x 8, by ldmatrix.trans
  __shared__ __align__(16) __half s[64];
  const int lane = threadIdx.x;
  s[2 * lane] = x[2 * lane];
  s[2 * lane + 1] = x[2 * lane + 1];
  __syncwarp();
  unsigned pair;
  const unsigned row = __cvta_generic_to_shared(s + (lane & 7) * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(pair)
               : "r"(row));
  reinterpret_cast<unsigned*>(y)[lane] = pair;
}

extern "C" __global__ void atomics(float* f, int* i, double* d, unsigned* most, unsigned* wrapped,
                                   unsigned long long* chosen) {
  atomicAdd(f, 1.f);
  atomicAdd(i, 2);
  atomicAdd(d, 0.5);
  atomicMax(most, threadIdx.x);
  atomicInc(wrapped, 9);
  atomicCAS(chosen, 0ull, (unsigned long long)(1 + threadIdx.x));
}

extern "C" __global__ void warps(const float* x, float* y) {
  const auto tile = cg::tiled_partition<32>(cg::this_thread_block());
  const float sum = cg::reduce(tile, x[threadIdx.x], cg::plus<float>());
  const unsigned positive = __ballot_sync(~0u, x[threadIdx.x] > 0);
  float scan = x[threadIdx.x];
  for (int d = 1; d < 32; d *= 2) {
    const float below = __shfl_up_sync(~0u, scan, d);
    if (threadIdx.x % 32 >= d) scan += below;
  }
  const float last = __shfl_sync(~0u, scan, 31);
  const unsigned same = __match_any_sync(~0u, threadIdx.x % 4);
  if (tile.thread_rank() == 0) {
    float* out = y + threadIdx.x / 32 * 4;
    out[0] = sum;
    out[1] = __popc(positive);
    out[2] = last;
    out[3] = same;
  }
}

extern "C" __global__ void half_a_warp(float* y) {  // lanes 8 to 15 alone
  if (threadIdx.x >= 8 && threadIdx.x < 16)
    y[threadIdx.x] = __shfl_xor_sync(0xFF00u, float(threadIdx.x), 1);
}

extern "C" __global__ void local_memory(const int* index, float* y) {
  float a[16];
  for (int i = 0; i < 16; ++i) a[i] = i * int(threadIdx.x);
  for (int i = 0; i < 16; ++i) a[index[i] & 15] += 1.f;
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += a[index[(i + threadIdx.x) & 15] & 15];
  y[threadIdx.x] = sum;
}

extern "C" __global__ void arrive_and_wait(int* out) {  // an mbarrier in shared memory
  __shared__ cuda::barrier<cuda::thread_scope_block> barrier;
  __shared__ int s[64];
  if (threadIdx.x == 0) init(&barrier, blockDim.x);
  __syncthreads();
  s[threadIdx.x] = threadIdx.x;
  barrier.arrive_and_wait();
  out[threadIdx.x] = s[63 - threadIdx.x];
  barrier.arrive_and_wait();
}

// Threads 64 to 127 produce, the others consume.
extern "C" __global__ void named_barriers(int* out, int rounds) {
  __shared__ int s[64];
  const int t = threadIdx.x;
  for (int round = 0; round < rounds; ++round) {
    if (t >= 64) {
      s[t - 64] = t + round;
      asm volatile("bar.arrive 1, 128;" ::: "memory");
      asm volatile("bar.sync 2, 128;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 128;" ::: "memory");
      out[round * 64 + t] = s[63 - t];
      asm volatile("bar.arrive 2, 128;" ::: "memory");
    }
  }
}

extern "C" __global__ void counting_barrier(int* out) {
  out[threadIdx.x] = __syncthreads_count(threadIdx.x % 3 == 0);
  out[blockDim.x + threadIdx.x] = __syncthreads_and(threadIdx.x < 63);
  out[2 * blockDim.x + threadIdx.x] = __syncthreads_or(threadIdx.x == 5);
}

__device__ __noinline__ float sum_of(const float* p, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += p[i];
  return sum;
}
extern "C" __global__ void call(const float* x, float* y) {
  y[threadIdx.x] = sum_of(x + threadIdx.x, 8);
}

__constant__ float table[4] = {1.5f, 2.5f, 3.5f, 4.5f};
__device__ int counter = 7;
extern "C" __global__ void variables(float* y) {
  y[threadIdx.x] = table[threadIdx.x & 3] + counter;
}

extern "C" __global__ void vectors(const float4* x, float4* y, const short* a, short* b) {
  const int i = threadIdx.x;
  float4 v = __ldcg(x + i);
  v.x += v.w;
  y[i] = v;
  b[i] = short(a[i] * 2 - 1);
}

extern "C" __global__ void never_written(float* y) {
  extern __shared__ float s[];
  y[threadIdx.x] = s[threadIdx.x];
}

// The barrier of cooperative groups, over the whole grid.
extern "C" __global__ void grid_sync(int* x, int* y, int rounds) {
  const auto grid = cg::this_grid();
  const int i = grid.thread_rank(), n = grid.size();
  for (int r = 0; r < rounds; ++r) {
    x[i] = i + r;
    grid.sync();
    y[i] = x[(i + blockDim.x) % n];
    grid.sync();
  }
}

#ifdef AMPERE
extern "C" __global__ void multiply_wmma(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c,
                                         int depth) {
  using namespace nvcuda;
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
  wmma::fill_fragment(fc, 0.f);
  for (int k = 0; k < depth; k += 16) {
    wmma::load_matrix_sync(fa, a + k, depth);
    wmma::load_matrix_sync(fb, b + k, depth);
    wmma::mma_sync(fc, fa, fb, fc);
  }
  wmma::store_matrix_sync(c, fc, 16, wmma::mem_row_major);
}

// C[16][8] = A[16][16] B[16][8]; fragments are read from memory as the PTX manual defines them.
extern "C" __global__ void multiply_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  const int group = threadIdx.x >> 2, member = threadIdx.x & 3;
  const auto pair = [](const __nv_bfloat16* p) { return *reinterpret_cast<const unsigned*>(p); };
  const unsigned fa[4] = {
      pair(a + group * 16 + member * 2), pair(a + (group + 8) * 16 + member * 2),
      pair(a + group * 16 + member * 2 + 8), pair(a + (group + 8) * 16 + member * 2 + 8)};
  const unsigned fb[2] = {pair(b + group * 16 + member * 2), pair(b + group * 16 + member * 2 + 8)};
  float d[4] = {1, 2, 3, 4};
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  c[group * 8 + member * 2] = d[0] - 1;
  c[group * 8 + member * 2 + 1] = d[1] - 2;
  c[(group + 8) * 8 + member * 2] = d[2] - 3;
  c[(group + 8) * 8 + member * 2 + 1] = d[3] - 4;
}

extern "C" __global__ void multiply_tf32(const float* a, const float* b, float* c) {
  const int group = threadIdx.x >> 2, member = threadIdx.x & 3;
  const auto tf32 = [](float x) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
  };
  float d[4] = {};
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(tf32(a[group * 8 + member])), "r"(tf32(a[(group + 8) * 8 + member])),
        "r"(tf32(a[group * 8 + member + 4])), "r"(tf32(a[(group + 8) * 8 + member + 4])),
        "r"(tf32(b[group * 8 + member])), "r"(tf32(b[group * 8 + member + 4])));
  c[group * 8 + member * 2] = d[0];
  c[group * 8 + member * 2 + 1] = d[1];
  c[(group + 8) * 8 + member * 2] = d[2];
  c[(group + 8) * 8 + member * 2 + 1] = d[3];
}

extern "C" __global__ void multiply_f64(const double* a, const double* b, double* c) {
  const int lane = threadIdx.x;
  double c0 = 0, c1 = 0;
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(c0), "+d"(c1)
               : "d"(a[lane]), "d"(b[lane]));
  c[lane * 2] = c0;
  c[lane * 2 + 1] = c1;
}

extern "C" __global__ void copies(const float* x, float* y, int wait) {
  __shared__ __align__(16) float s[3 * 32];
  const int t = threadIdx.x;
  __pipeline_memcpy_async(s + t, x + t, 4);
  if (t < 16) __pipeline_memcpy_async(s + 32 + 2 * t, x + 32 + 2 * t, 8);
  if (t < 8) __pipeline_memcpy_async(s + 64 + 4 * t, x + 64 + 4 * t, 16, t == 7 ? 8 : 0);
  __pipeline_commit();
  if (wait) __pipeline_wait_prior(0);
  __syncthreads();
  for (int i = t; i < 96; i += 32) y[i] = s[i];
}

extern "C" __global__ void reduce_warp(int* y) {
  const int t = threadIdx.x;
  y[t] = __reduce_max_sync(~0u, t - 40);
  y[32 + t] = __reduce_add_sync(~0u, unsigned(t));
}
#endif

extern "C" __global__ void wait_a_while(long long* y) {
  const long long start = clock64();
  while (clock64() - start < 100000) {
  }
  y[threadIdx.x] = clock64() - start;
}
