// Host code that uses the CUDA runtime as the engine does. Its calls must reach the emulator's
// replacement for the CUDA runtime library.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace cg = cooperative_groups;

namespace {

template <class T>
__global__ void scale(const T* x, T* y, T factor, long long n) {
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = factor * x[i];
}

__global__ void __launch_bounds__(128, 2) wait_for_all(int* x) {
  const auto grid = cg::this_grid();
  x[grid.thread_rank()] += 1;
  grid.sync();
  if (x[(grid.thread_rank() + blockDim.x) % grid.size()] != 1) x[grid.thread_rank()] = -1;
}

__global__ void fill(float* y) {
  extern __shared__ float s[];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}

__global__ void rank_of_block(int* y) {
#if __CUDA_ARCH__ >= 900
  const auto cluster = cg::this_cluster();
  cluster.sync();
  if (threadIdx.x == 0) y[blockIdx.x] = cluster.block_rank() + 100 * cluster.num_blocks();
#endif
}

__device__ int total;
__constant__ int factor = 3;
__global__ void add(int n) { atomicAdd(&total, n * factor); }

struct Plan {
  const float* x;
  float* y;
  int64_t n;
  char kind;
};
__global__ void by_structure(Plan plan, double factor) {
  for (int64_t i = threadIdx.x; i < plan.n; i += blockDim.x)
    plan.y[i] = float(plan.x[i] * factor) + plan.kind;
}

}  // namespace

extern "C" {

int launch_scale(const float* x, float* y, float factor, long long n) {
  scale<<<unsigned((n + 127) / 128), 128>>>(x, y, factor, n);
  return cudaGetLastError();
}
int launch_scale_f64(const double* x, double* y, double factor, long long n) {
  scale<<<unsigned((n + 127) / 128), 128>>>(x, y, factor, n);
  return cudaGetLastError();
}

int launch_cooperative(int* x, int blocks) {
  void* arguments[] = {&x};
  return cudaLaunchCooperativeKernel((void*)wait_for_all, dim3(blocks), dim3(64), arguments, 0, 0);
}

int launch_fill(float* y, int threads, int bytes, int allow) {
  if (allow) {
    const cudaError_t error =
        cudaFuncSetAttribute((void*)fill, cudaFuncAttributeMaxDynamicSharedMemorySize, allow);
    if (error != cudaSuccess) return cudaGetLastError();
  }
  fill<<<1, threads, bytes>>>(y);
  return cudaGetLastError();
}

int launch_cluster(int* y, int blocks, int size, int large, int cooperative) {
  cudaFuncSetAttribute((void*)rank_of_block, cudaFuncAttributeNonPortableClusterSizeAllowed, large);
  cudaGetLastError();
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = 32;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(size), 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = cooperative;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, rank_of_block, y);
}
int most_clusters(int size, int large, int shared) {
  cudaFuncSetAttribute((void*)rank_of_block, cudaFuncAttributeNonPortableClusterSizeAllowed, large);
  cudaFuncSetAttribute((void*)rank_of_block, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaLaunchConfig_t config = {};
  config.gridDim = size;
  config.blockDim = 1024;
  config.dynamicSmemBytes = shared;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(size), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = -1;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, rank_of_block, &config);
  cudaGetLastError();
  return error == cudaSuccess ? clusters : -int(error);
}

int blocks_per_multiprocessor(int threads, int shared) {
  cudaFuncSetAttribute((void*)fill, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  int blocks = -1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, fill, threads, shared);
  return blocks;
}
int registers() {
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, (void*)wait_for_all);
  return attributes.numRegs;
}
int largest_block() {
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, (void*)wait_for_all);
  return attributes.maxThreadsPerBlock;
}

int launch_structure(const float* x, float* y, long long n) {
  by_structure<<<1, 32>>>({x, y, n, 1}, 0.5);
  return cudaGetLastError();
}

int through_symbols() {
  const int zero = 0, four = 4;
  int result = -1;
  cudaMemcpyToSymbol(total, &zero, sizeof zero);
  cudaMemcpyToSymbol(factor, &four, sizeof four);
  add<<<1, 8>>>(2);
  cudaMemcpyFromSymbol(&result, total, sizeof result);
  return result;
}

int round_trip(float* values, int n) {
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  float *device, *scaled;
  if (cudaMalloc(&device, n * sizeof(float)) || cudaMallocAsync(&scaled, n * sizeof(float), stream))
    return cudaGetLastError();
  cudaMemcpyAsync(device, values, n * sizeof(float), cudaMemcpyHostToDevice, stream);
  cudaEvent_t start, end;
  cudaEventCreate(&start);
  cudaEventCreate(&end);
  cudaEventRecord(start, stream);
  scale<<<(n + 127) / 128, 128, 0, stream>>>(device, scaled, 3.f, n);
  cudaEventRecord(end, stream);
  cudaMemcpyAsync(values, scaled, n * sizeof(float), cudaMemcpyDeviceToHost, stream);
  cudaStreamSynchronize(stream);
  float milliseconds = -1;
  cudaEventElapsedTime(&milliseconds, start, end);
  cudaFreeAsync(scaled, stream);
  cudaFree(device);
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  cudaDeviceSynchronize();
  return milliseconds < 0 ? -1 : cudaGetLastError();
}

int device_figures(int* values) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, 0);
  values[0] = p.multiProcessorCount;
  values[1] = 10 * p.major + p.minor;
  values[2] = int(p.sharedMemPerBlockOptin);
  cudaDeviceGetAttribute(&values[3], cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  cudaDeviceGetAttribute(&values[4], cudaDevAttrL2CacheSize, 0);
  cudaDeviceGetAttribute(&values[5], cudaDevAttrClusterLaunch, 0);
  return cudaGetLastError();
}

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

void launch_often(float* y, int times) {
  for (int i = 0; i < times; ++i) fill<<<1, 256, 1024>>>(y);
}

}  // extern "C"
