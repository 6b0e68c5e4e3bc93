// Kernels with planted mistakes, each with a correct version, to check that the emulator finds the
// mistakes.
#include <cuda_runtime.h>

// `broken` is a template argument, so that the code differs as it would after a real mistake.
template <bool broken>
__global__ void missing_barrier(const float* x, float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  if (!broken) __syncthreads();
  y[threadIdx.x] = s[(threadIdx.x + 33) % 64];
}

// Several steps in one buffer: the second barrier of a step keeps readers and writers apart.
template <bool broken>
__global__ void overwritten_too_soon(const float* x, float* y, int steps) {
  __shared__ float s[64];
  float value = x[threadIdx.x];
  for (int i = 0; i < steps; ++i) {
    s[threadIdx.x] = value;
    __syncthreads();
    value = s[(threadIdx.x + 1) % 64];
    if (!broken) __syncthreads();
  }
  y[threadIdx.x] = value;
}

// A hand-written barrier over the grid, in which only the fence makes the block's writes visible.
template <bool broken>
__global__ void missing_fence(float* x, float* y, unsigned* counter) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  x[i] = i;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (!broken) __threadfence();
    atomicAdd(counter, 1);
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < gridDim.x);
  }
  __syncthreads();
  y[i] = x[(i + blockDim.x) % n];
}

template <bool broken>
__global__ void beyond_shared(float* y) {
  extern __shared__ float s[];
  s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + (broken ? 1 : 0)];
}

template <bool broken>
__global__ void beyond_global(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x + (broken ? 1 : 0)];
}

template <bool broken>
__global__ void wild_pointer(float* y) {
  float* p = broken ? reinterpret_cast<float*>(size_t(threadIdx.x + 1) << 40) : y;
  p[threadIdx.x] = 1;
}

template <bool broken>
__global__ void divergent_barrier(float* y) {
  if (!broken || threadIdx.x < 32) {
    __syncthreads();
    y[threadIdx.x] = 1;
  } else {
    __syncthreads();
    y[threadIdx.x] = 2;
  }
}

template <bool broken>
__global__ void waits_for_ever(int* flag) {
  if (threadIdx.x == 0) {
    volatile int* f = flag;
    if (!broken) *f = 1;
    while (*f == 0) {
    }
  }
}

template <bool broken>
__global__ void half_of_a_barrier(float* y) {
  if (broken && threadIdx.x == 0) asm volatile("bar.sync 1, 64;" ::: "memory");
  __syncthreads();
  y[threadIdx.x] = 1;
}

template <bool broken>
__global__ void bad_mask(float* y) {
  float v = threadIdx.x;
  if (!broken || threadIdx.x < 16) v = __shfl_xor_sync(broken ? 0xFFu : ~0u, v, 1);
  y[threadIdx.x] = v;
}

template <bool broken>
__global__ void misaligned(float* y) {
  __shared__ __align__(16) float s[64];
  s[threadIdx.x] = s[threadIdx.x + 32] = threadIdx.x;
  __syncthreads();
  const float4 v = *reinterpret_cast<const float4*>(s + (broken ? 1 : 4));
  y[threadIdx.x] = v.x + v.y * v.z * v.w;
}

#define LAUNCHER(kernel, parameters, arguments, blocks, threads, shared) \
  extern "C" int kernel##_launch(int broken, parameters) {               \
    auto* chosen = broken ? &kernel<true> : &kernel<false>;              \
    chosen<<<blocks, threads, shared>>> arguments;                       \
    return cudaGetLastError();                                           \
  }
#define LIST(...) __VA_ARGS__
LAUNCHER(missing_barrier, LIST(const float* x, float* y), (x, y), 1, 64, 0)
LAUNCHER(overwritten_too_soon, LIST(const float* x, float* y, int steps), (x, y, steps), 1, 64, 0)
LAUNCHER(beyond_shared, LIST(float* y), (y), 1, 64, 256)
LAUNCHER(beyond_global, LIST(const float* x, float* y), (x, y), 1, 64, 0)
LAUNCHER(wild_pointer, LIST(float* y), (y), 1, 32, 0)
LAUNCHER(divergent_barrier, LIST(float* y), (y), 1, 64, 0)
LAUNCHER(waits_for_ever, LIST(int* flag), (flag), 1, 32, 0)
LAUNCHER(half_of_a_barrier, LIST(float* y), (y), 1, 64, 0)
LAUNCHER(bad_mask, LIST(float* y), (y), 1, 32, 0)
LAUNCHER(misaligned, LIST(float* y), (y), 1, 32, 0)

extern "C" int missing_fence_launch(int broken, float* x, float* y, unsigned* counter) {
  void* kernel = broken ? (void*)&missing_fence<true> : (void*)&missing_fence<false>;
  void* arguments[] = {&x, &y, &counter};
  const cudaError_t error =
      cudaLaunchCooperativeKernel(kernel, dim3(4), dim3(32), arguments, 0, nullptr);
  return error != cudaSuccess ? error : cudaGetLastError();
}
