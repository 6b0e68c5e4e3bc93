// A replacement for the CUDA runtime library. It accepts the registrations and calls of host code
// compiled by nvcc, checks launches as a real device would, and runs them on the emulator. "Device
// memory" is host memory. When a call returns, all its work is finished.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "devices.h"
#include "launch.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace emulator {
namespace {

// --- State ---
const Device* device = find_device("h100");
thread_local cudaError_t last_error = cudaSuccess;
int next_launch_fails_with = 0;
std::string last_failure;

struct Counters {
  u64 launches, cooperative_launches, cluster_launches, failed_launches;
  u64 synchronizations, copies, allocations, frees;
} counters;

cudaError_t done(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
cudaError_t refuse(cudaError_t error, const std::string& why) {
  last_failure = why;
  return done(error);
}

// --- Host functions and the kernels behind them ---
struct Function {
  const Kernel* kernel = nullptr;
  std::string name;
  int arch = 0;
  int dynamic_shared_limit = -1;  // set by cudaFuncSetAttribute; -1: never
  bool large_clusters = false;
  int carveout = -1;
  Dim3 required_cluster = {0, 0, 0};
  u64 launches = 0;  // by host code, completed
};
std::unordered_map<const void*, Function>& functions() {
  static std::unordered_map<const void*, Function> all;
  return all;
}
std::unordered_map<const void*, const Variable*>& variables() {
  static std::unordered_map<const void*, const Variable*> all;
  return all;
}

Function* find(const void* host) {
  const auto found = functions().find(host);
  return found == functions().end() ? nullptr : &found->second;
}

const Kernel* kernel_in(const Module* module, const char* name) {
  for (u32 i = 0; module && i < module->kernel_count; ++i)
    if (!std::strcmp(module->kernels[i].name, name)) return &module->kernels[i];
  return nullptr;
}

// --- Occupancy ---
int registers_of(const Kernel& kernel) {
  if (kernel.registers) return int(kernel.registers);
  if (!kernel.max_threads) return 64;
  return std::min(255, 65536 / int(kernel.max_threads * std::max(1u, kernel.min_blocks)) / 8 * 8);
}
int largest_block(const Function& f) {
  const int per_warp = (registers_of(*f.kernel) * 32 + 255) / 256 * 256;
  const int by_registers = device->registers_per_multiprocessor / per_warp / 4 * 4 * 32;
  int most = std::min(1024, by_registers);
  if (f.kernel->max_threads) most = std::min(most, int(f.kernel->max_threads));
  return most;
}
int dynamic_limit(const Function& f) {
  if (f.dynamic_shared_limit >= 0) return f.dynamic_shared_limit;
  return std::max(0, device->shared_per_block - int(f.kernel->static_shared));
}
int blocks_per_multiprocessor(const Function& f, int threads, size_t dynamic_shared) {
  if (threads <= 0 || threads > largest_block(f)) return 0;
  if (dynamic_shared > size_t(dynamic_limit(f))) return 0;
  const int warps = (threads + 31) / 32;
  // Registers are allocated to warps in units of 256; the four schedulers share the warps evenly.
  const int per_warp = (registers_of(*f.kernel) * 32 + 255) / 256 * 256;
  const int warps_by_registers = device->registers_per_multiprocessor / 4 / per_warp * 4;
  const size_t shared = f.kernel->static_shared + dynamic_shared + device->shared_reserved;
  const size_t unit = device->major >= 8 ? 128 : 256;
  const size_t rounded = (shared + unit - 1) / unit * unit;
  int most = std::min(device->blocks_per_multiprocessor,
                      device->threads_per_multiprocessor / (warps * 32));
  most = std::min(most, warps_by_registers / warps);
  if (rounded) most = std::min(most, int(device->shared_per_multiprocessor / rounded));
  return most;
}
int active_clusters(const Function& f, int threads, size_t dynamic_shared, int cluster) {
  const int blocks = blocks_per_multiprocessor(f, threads, dynamic_shared);
  int total = 0;
  for (const int multiprocessors : device->gpcs) total += multiprocessors * blocks / cluster;
  return total;
}

// --- Launching ---
struct Configuration {
  dim3 grid, block;
  size_t dynamic_shared = 0;
  cudaStream_t stream = nullptr;
  Dim3 cluster;
  bool cluster_given = false;
  bool cooperative = false;
};

Dim3 dims(const dim3& d) { return {d.x, d.y, d.z}; }

// Returns the error with which a device would refuse to start this launch.
cudaError_t check_launch(const Function& f, Configuration& c) {
  const Kernel& kernel = *f.kernel;
  const u64 threads = u64(c.block.x) * c.block.y * c.block.z;
  const u64 blocks = u64(c.grid.x) * c.grid.y * c.grid.z;
  const auto text = [&](const std::string& why) { return f.name + ": " + why; };
  if (f.arch > device->architecture())
    return refuse(
        cudaErrorNoKernelImageForDevice,
        text("compiled for sm_" + std::to_string(f.arch) + ", but the device is " + device->name));
  if (!threads || !blocks || c.grid.x > 0x7FFFFFFFu || c.grid.y > 65535 || c.grid.z > 65535 ||
      threads > 1024 || c.block.x > 1024 || c.block.y > 1024 || c.block.z > 64)
    return refuse(cudaErrorInvalidConfiguration, text("no valid grid or block"));
  if (kernel.max_threads && threads > kernel.max_threads)
    return refuse(cudaErrorInvalidValue, text("more threads than __launch_bounds__ allows"));
  if (int(threads) > largest_block(f))
    return refuse(cudaErrorLaunchOutOfResources, text("more registers than the device has"));
  if (kernel.static_shared + c.dynamic_shared > size_t(device->shared_per_block_optin))
    return refuse(cudaErrorInvalidValue, text("more shared memory than a block can have"));
  if (c.dynamic_shared > size_t(dynamic_limit(f)))
    return refuse(cudaErrorInvalidValue,
                  text(std::to_string(c.dynamic_shared) +
                       " bytes of dynamic shared memory, but cudaFuncSetAttribute allowed " +
                       std::to_string(dynamic_limit(f))));
  if (kernel.cluster.x) {
    const Dim3& fixed = kernel.cluster;
    if (c.cluster_given &&
        (c.cluster.x != fixed.x || c.cluster.y != fixed.y || c.cluster.z != fixed.z))
      return refuse(cudaErrorInvalidClusterSize, text("another cluster than __cluster_dims__"));
    c.cluster = fixed;
    c.cluster_given = true;
  }
  if (c.cluster_given) {
    const int size = int(c.cluster.count());
    if (!device->largest_cluster)
      return refuse(cudaErrorNotSupported, text("this device has no clusters"));
    if (size < 1 || size > device->largest_cluster || (size > 8 && !f.large_clusters))
      return refuse(cudaErrorInvalidClusterSize,
                    text("cluster of " + std::to_string(size) + " blocks"));
    if (c.grid.x % c.cluster.x || c.grid.y % c.cluster.y || c.grid.z % c.cluster.z)
      return refuse(cudaErrorInvalidConfiguration, text("the grid is no multiple of the cluster"));
    if (active_clusters(f, int(threads), c.dynamic_shared, size) == 0)
      return refuse(cudaErrorLaunchOutOfResources, text("no room for even one cluster"));
  }
  const int per_multiprocessor = blocks_per_multiprocessor(f, int(threads), c.dynamic_shared);
  if (per_multiprocessor == 0)
    return refuse(cudaErrorLaunchOutOfResources, text("no room for even one block"));
  if (c.cooperative) {
    u64 resident = u64(per_multiprocessor) * device->multiprocessors;
    if (c.cluster_given) {
      const int size = int(c.cluster.count());
      resident = u64(active_clusters(f, int(threads), c.dynamic_shared, size)) * size;
    }
    if (blocks > resident)
      return refuse(cudaErrorCooperativeLaunchTooLarge,
                    text(std::to_string(blocks) + " blocks, but only " + std::to_string(resident) +
                         " are resident at once"));
  }
  return cudaSuccess;
}

cudaError_t launch(const void* host, Configuration c, void** arguments) {
  ++counters.launches;
  counters.cooperative_launches += c.cooperative;
  Function* const f = find(host);
  if (!f || !f->kernel) {
    ++counters.failed_launches;
    return refuse(cudaErrorInvalidDeviceFunction, "no such kernel" + (f ? ": " + f->name : ""));
  }
  if (next_launch_fails_with) {
    const auto error = cudaError_t(next_launch_fails_with);
    next_launch_fails_with = 0;
    ++counters.failed_launches;
    return refuse(error, "a failure that cudaemu_fail_next_launch asked for");
  }
  const cudaError_t checked = check_launch(*f, c);
  counters.cluster_launches += c.cluster_given;
  if (checked != cudaSuccess) {
    ++counters.failed_launches;
    return checked;
  }
  const Kernel& kernel = *f->kernel;
  std::vector<u128> parameters(kernel.parameter_bytes / 16 + 1);  // aligned as parameters are
  char* const block = reinterpret_cast<char*>(parameters.data());
  for (u32 i = 0; i < kernel.parameter_count; ++i)
    std::memcpy(block + kernel.parameters[i].offset, arguments[i], kernel.parameters[i].bytes);
  const Failure failure = run(
      {&kernel, dims(c.grid), dims(c.block), c.cluster, c.dynamic_shared, c.cooperative, block});
  if (failure.text.empty()) {
    ++f->launches;
    return cudaSuccess;
  }
  ++counters.failed_launches;
  return refuse(failure.illegal_address ? cudaErrorIllegalAddress : cudaErrorLaunchFailure,
                failure.text);
}

thread_local std::vector<Configuration> pushed;

Configuration configuration_of(const cudaLaunchConfig_t& config) {
  Configuration c;
  c.grid = config.gridDim;
  c.block = config.blockDim;
  c.dynamic_shared = config.dynamicSmemBytes;
  c.stream = config.stream;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      c.cluster = {attribute.val.clusterDim.x, attribute.val.clusterDim.y,
                   attribute.val.clusterDim.z};
      c.cluster_given = true;
    } else if (attribute.id == cudaLaunchAttributeCooperative) {
      c.cooperative = attribute.val.cooperative;
    }
  }
  return c;
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
  ++counters.copies;
  if (bytes) std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t allocate(void** pointer, size_t bytes) {
  ++counters.allocations;
  *pointer = nullptr;
  if (bytes > device->memory_bytes) return done(cudaErrorMemoryAllocation);
  if (bytes && posix_memalign(pointer, 512, bytes)) return done(cudaErrorMemoryAllocation);
  if (bytes) std::memset(*pointer, 0xFF, bytes);
  return cudaSuccess;
}

struct Event {
  std::chrono::steady_clock::time_point time;
  bool recorded = false;
};

int attribute(cudaDeviceAttr which, bool* known) {
  *known = true;
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimX: return 1024;
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 0x7FFFFFFF;
    case cudaDevAttrMaxGridDimY: return 65535;
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return device->shared_per_block;
    case cudaDevAttrTotalConstantMemory: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return device->registers_per_multiprocessor;
    case cudaDevAttrClockRate: return device->clock_khz;
    case cudaDevAttrMultiProcessorCount: return device->multiprocessors;
    case cudaDevAttrConcurrentKernels: return 1;
    case cudaDevAttrMemoryClockRate: return device->memory_clock_khz;
    case cudaDevAttrGlobalMemoryBusWidth: return device->memory_bus_bits;
    case cudaDevAttrL2CacheSize: return device->l2_bytes;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return device->threads_per_multiprocessor;
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrComputeCapabilityMajor: return device->major;
    case cudaDevAttrComputeCapabilityMinor: return device->minor;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return device->shared_per_multiprocessor;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return device->registers_per_multiprocessor;
    case cudaDevAttrManagedMemory: return 1;
    case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return device->shared_per_block_optin;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return device->blocks_per_multiprocessor;
    case cudaDevAttrMaxPersistingL2CacheSize:
      return device->major >= 8 ? device->l2_bytes / 8 * 5 : 0;
    case cudaDevAttrReservedSharedMemoryPerBlock: return device->shared_reserved;
    case cudaDevAttrMemoryPoolsSupported: return 1;
    case cudaDevAttrClusterLaunch: return device->largest_cluster > 0;
    default: *known = false; return 0;
  }
}

const char* error_name(cudaError_t error) {
  switch (error) {
#define NAME(e) \
  case e: return #e;
    NAME(cudaSuccess)
    NAME(cudaErrorInvalidValue)
    NAME(cudaErrorMemoryAllocation)
    NAME(cudaErrorInvalidConfiguration)
    NAME(cudaErrorInvalidSymbol)
    NAME(cudaErrorInvalidDeviceFunction)
    NAME(cudaErrorInvalidDevice)
    NAME(cudaErrorInvalidResourceHandle)
    NAME(cudaErrorNotReady)
    NAME(cudaErrorIllegalAddress)
    NAME(cudaErrorLaunchOutOfResources)
    NAME(cudaErrorLaunchTimeout)
    NAME(cudaErrorLaunchFailure)
    NAME(cudaErrorCooperativeLaunchTooLarge)
    NAME(cudaErrorNotPermitted)
    NAME(cudaErrorNotSupported)
    NAME(cudaErrorNoKernelImageForDevice)
    NAME(cudaErrorInvalidClusterSize)
    NAME(cudaErrorStreamCaptureUnsupported)
    NAME(cudaErrorUnknown)
#undef NAME
    default: return "unknown error";
  }
}

}  // namespace
}  // namespace emulator

using namespace emulator;

// --- Control, for tests (see library.py) ---
EXPORT int cudaemu_use_device(const char* name) {
  const Device* found = find_device(name);
  if (!found) return 0;
  device = found;
  for (auto& [host, f] : functions()) {  // attributes belong to a context, and this is a new one
    f.dynamic_shared_limit = -1;
    f.large_clusters = false;
    f.carveout = -1;
  }
  return 1;
}
EXPORT void cudaemu_schedule(const char* order, unsigned long long seed, double probability) {
  settings.order = !std::strcmp(order, "random")    ? Order::random
                   : !std::strcmp(order, "reverse") ? Order::reverse
                                                    : Order::forward;
  settings.seed = seed;
  settings.launches = 0;
  settings.yield_probability = probability;
}
EXPORT void cudaemu_values_order(int on) { settings.values_order = on != 0; }
EXPORT void cudaemu_fail_next_launch(int error) { next_launch_fails_with = error; }
EXPORT const char* cudaemu_last_failure() { return last_failure.c_str(); }
EXPORT void cudaemu_clear_failure() {
  last_failure.clear();
  last_error = cudaSuccess;
}
EXPORT void cudaemu_counters(unsigned long long values[8]) {
  std::memcpy(values, &counters, sizeof counters);
}
EXPORT void cudaemu_reset_counters() { counters = {}; }
EXPORT const char* cudaemu_kernel_name(size_t index) {
  size_t count;
  const Module* const* modules = registered_modules(&count);
  for (size_t m = 0; m < count; ++m) {
    if (index < modules[m]->kernel_count) return modules[m]->kernels[index].name;
    index -= modules[m]->kernel_count;
  }
  return nullptr;
}
EXPORT const Kernel* cudaemu_kernel(const char* name) {
  size_t count;
  const Module* const* modules = registered_modules(&count);
  for (size_t m = 0; m < count; ++m)
    if (const Kernel* kernel = kernel_in(modules[m], name)) return kernel;
  return nullptr;
}
// Writes the parameter bytes, static shared memory, registers and stack bytes of the kernel `name`.
EXPORT int cudaemu_kernel_info(const char* name, unsigned values[4]) {
  const Kernel* kernel = cudaemu_kernel(name);
  if (!kernel) return 0;
  values[0] = kernel->parameter_bytes;
  values[1] = kernel->static_shared;
  values[2] = kernel->registers;
  values[3] = kernel->local_bytes;
  return 1;
}
EXPORT unsigned long long cudaemu_kernel_launches(const char* name) {
  u64 launches = 0;
  for (const auto& [host, f] : functions())
    if (f.name == name) launches += f.launches;
  return launches;
}
// Runs a kernel without host code and without the checks of a device. Returns null on success.
EXPORT const char* cudaemu_launch(const char* name, const unsigned grid[3], const unsigned block[3],
                                  const unsigned cluster[3], size_t dynamic_shared, int cooperative,
                                  const char* parameters) {
  const Kernel* kernel = cudaemu_kernel(name);
  if (!kernel) return "no such kernel";
  static std::string failure;
  failure = run({kernel,
                 {grid[0], grid[1], grid[2]},
                 {block[0], block[1], block[2]},
                 {cluster[0], cluster[1], cluster[2]},
                 dynamic_shared,
                 cooperative != 0,
                 parameters})
                .text;
  return failure.empty() ? nullptr : failure.c_str();
}

// --- What nvcc's host code calls when a library is loaded ---
// The host object of each .cu file is linked directly after its translated kernels, and both are
// initialised in that order. So the module registered last holds the kernels of the calling host
// code. Names alone are not enough: static kernels of different files may have the same name.
struct FatBinary {
  const Module* module;
};
EXPORT void** __cudaRegisterFatBinary(void*) {
  size_t count;
  const Module* const* modules = registered_modules(&count);
  return reinterpret_cast<void**>(new FatBinary{count ? modules[count - 1] : nullptr});
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void** handle) {
  delete reinterpret_cast<FatBinary*>(handle);
}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int,
                                   uint3*, uint3*, dim3*, dim3*, int*) {
  const Module* module = reinterpret_cast<FatBinary*>(handle)->module;
  Function& f = functions()[host];
  f.kernel = kernel_in(module, name);
  f.name = name;
  f.arch = module ? module->arch : 0;
  if (!f.kernel)
    std::fprintf(stderr, "emulator: kernel %s is not among the translated ones of %s\n", name,
                 module ? module->source : "?");
}
EXPORT void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t, int,
                              int) {
  const Module* module = reinterpret_cast<FatBinary*>(handle)->module;
  for (u32 i = 0; module && i < module->variable_count; ++i)
    if (!std::strcmp(module->variables[i].name, name)) variables()[host] = &module->variables[i];
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  Configuration c;
  c.grid = grid;
  c.block = block;
  c.dynamic_shared = shared;
  c.stream = static_cast<cudaStream_t>(stream);
  pushed.push_back(c);
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared,
                                              void* stream) {
  if (pushed.empty()) return cudaErrorInvalidConfiguration;
  *grid = pushed.back().grid;
  *block = pushed.back().block;
  *shared = pushed.back().dynamic_shared;
  *static_cast<cudaStream_t*>(stream) = pushed.back().stream;
  pushed.pop_back();
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

// --- Launches ---
EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                    size_t shared, cudaStream_t stream) {
  Configuration c;
  c.grid = grid;
  c.block = block;
  c.dynamic_shared = shared;
  c.stream = stream;
  return launch(function, c, arguments);
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                      size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block,
                                               void** arguments, size_t shared,
                                               cudaStream_t stream) {
  Configuration c;
  c.grid = grid;
  c.block = block;
  c.dynamic_shared = shared;
  c.stream = stream;
  c.cooperative = true;
  return launch(function, c, arguments);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                       void** arguments) {
  return launch(function, configuration_of(*config), arguments);
}

// --- Functions ---
EXPORT cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  Function* f = find(function);
  if (!f || !f->kernel) return done(cudaErrorInvalidDeviceFunction);
  switch (which) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value + int(f->kernel->static_shared) > device->shared_per_block_optin)
        return refuse(cudaErrorInvalidValue, f->name + ": no block can have " +
                                                 std::to_string(value) +
                                                 " bytes of dynamic shared memory");
      f->dynamic_shared_limit = value;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout: f->carveout = value; return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      if (!device->largest_cluster) return done(cudaErrorNotSupported);
      f->large_clusters = value != 0;
      return cudaSuccess;
    default: return done(cudaErrorInvalidValue);
  }
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* result, const void* function) {
  const Function* f = find(function);
  if (!f || !f->kernel) return done(cudaErrorInvalidDeviceFunction);
  *result = {};
  result->sharedSizeBytes = f->kernel->static_shared;
  result->localSizeBytes = f->kernel->local_bytes;
  result->maxThreadsPerBlock = largest_block(*f);
  result->numRegs = registers_of(*f->kernel);
  result->ptxVersion = result->binaryVersion = f->arch;
  result->maxDynamicSharedSizeBytes = dynamic_limit(*f);
  result->preferredShmemCarveout = f->carveout;
  result->nonPortableClusterSizeAllowed = f->large_clusters;
  result->requiredClusterWidth = int(f->kernel->cluster.x);
  result->requiredClusterHeight = int(f->kernel->cluster.y);
  result->requiredClusterDepth = int(f->kernel->cluster.z);
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* function, int threads, size_t dynamic_shared, unsigned) {
  const Function* f = find(function);
  *blocks = 0;
  if (!f || !f->kernel) return done(cudaErrorInvalidDeviceFunction);
  if (threads <= 0 || threads > 1024) return done(cudaErrorInvalidValue);
  *blocks = blocks_per_multiprocessor(*f, threads, dynamic_shared);
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                                 int threads,
                                                                 size_t dynamic_shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads,
                                                                dynamic_shared, 0);
}
EXPORT cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                                  const cudaLaunchConfig_t* config) {
  const Function* f = find(function);
  *clusters = 0;
  if (!f || !f->kernel) return done(cudaErrorInvalidDeviceFunction);
  const Configuration c = configuration_of(*config);
  const int size = int(f->kernel->cluster.x ? f->kernel->cluster.count() : c.cluster.count());
  if (!device->largest_cluster) return done(cudaErrorNotSupported);
  if (size < 1 || size > device->largest_cluster || (size > 8 && !f->large_clusters))
    return done(cudaErrorInvalidClusterSize);
  *clusters = active_clusters(*f, int(c.block.x * c.block.y * c.block.z), c.dynamic_shared, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void* function,
                                                        const cudaLaunchConfig_t* config) {
  const Function* f = find(function);
  *size = 0;
  if (!f || !f->kernel) return done(cudaErrorInvalidDeviceFunction);
  if (!device->largest_cluster) return done(cudaErrorNotSupported);
  const Configuration c = configuration_of(*config);
  const int threads = int(c.block.x * c.block.y * c.block.z);
  for (int n = std::min(device->largest_cluster, f->large_clusters ? 16 : 8); n > 0; n /= 2) {
    if (!active_clusters(*f, threads, c.dynamic_shared, n)) continue;
    *size = n;
    return cudaSuccess;
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* function,
                                                             int blocks, int threads) {
  const Function* f = find(function);
  *bytes = 0;
  if (!f || !f->kernel) return done(cudaErrorInvalidDeviceFunction);
  for (size_t n = size_t(device->shared_per_block_optin) / 128 * 128;; n -= 128) {
    if (blocks_per_multiprocessor(*f, threads, n) >= blocks) {
      *bytes = n;
      return cudaSuccess;
    }
    if (n == 0) return done(cudaErrorInvalidValue);
  }
}

// --- The device ---
EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int number) {
  return number == 0 ? cudaSuccess : done(cudaErrorInvalidDevice);
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int number) {
  if (number != 0) return done(cudaErrorInvalidDevice);
  bool known;
  *value = attribute(which, &known);
  if (!known)
    return refuse(cudaErrorInvalidValue,
                  "the emulator does not know device attribute " + std::to_string(which));
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int number) {
  if (number != 0) return done(cudaErrorInvalidDevice);
  *p = {};
  std::snprintf(p->name, sizeof p->name, "%s", device->full_name);
  p->totalGlobalMem = device->memory_bytes;
  p->sharedMemPerBlock = device->shared_per_block;
  p->regsPerBlock = device->registers_per_multiprocessor;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7FFFFFFF;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = device->major;
  p->minor = device->minor;
  p->multiProcessorCount = device->multiprocessors;
  p->concurrentKernels = 1;
  p->unifiedAddressing = 1;
  p->managedMemory = 1;
  p->memoryBusWidth = device->memory_bus_bits;
  p->l2CacheSize = device->l2_bytes;
  p->maxThreadsPerMultiProcessor = device->threads_per_multiprocessor;
  p->sharedMemPerMultiprocessor = device->shared_per_multiprocessor;
  p->regsPerMultiprocessor = device->registers_per_multiprocessor;
  p->cooperativeLaunch = 1;
  p->sharedMemPerBlockOptin = device->shared_per_block_optin;
  p->maxBlocksPerMultiProcessor = device->blocks_per_multiprocessor;
  p->reservedSharedMemPerBlock = device->shared_reserved;
  p->clusterLaunch = device->largest_cluster > 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = *total = device->memory_bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() {
  ++counters.synchronizations;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

// --- Errors ---
EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT const char* cudaGetErrorName(cudaError_t error) { return error_name(error); }
EXPORT const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  text = error_name(error);
  if (error != cudaSuccess && !last_failure.empty()) text += " (emulated): " + last_failure;
  return text.c_str();
}

// --- Memory ---
EXPORT cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  ++counters.synchronizations;
  return allocate(pointer, bytes);
}
EXPORT cudaError_t cudaFree(void* pointer) {
  ++counters.synchronizations;
  ++counters.frees;
  std::free(pointer);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return allocate(pointer, bytes);
}
EXPORT cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  ++counters.frees;
  std::free(pointer);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  ++counters.synchronizations;
  return allocate(pointer, bytes);
}
EXPORT cudaError_t cudaFreeHost(void* pointer) {
  ++counters.synchronizations;
  ++counters.frees;
  std::free(pointer);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  ++counters.synchronizations;
  return copy(to, from, bytes);
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  return copy(to, from, bytes);
}
EXPORT cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  ++counters.synchronizations;
  if (bytes) std::memset(to, value, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes) std::memset(to, value, bytes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  const auto found = variables().find(symbol);
  if (found == variables().end()) return done(cudaErrorInvalidSymbol);
  *pointer = found->second->address;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  const auto found = variables().find(symbol);
  if (found == variables().end()) return done(cudaErrorInvalidSymbol);
  *bytes = found->second->bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes,
                                           size_t offset, cudaMemcpyKind, cudaStream_t) {
  void* to;
  const cudaError_t error = cudaGetSymbolAddress(&to, symbol);
  return error == cudaSuccess ? copy(static_cast<char*>(to) + offset, from, bytes) : error;
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes,
                                      size_t offset, cudaMemcpyKind kind) {
  ++counters.synchronizations;
  return cudaMemcpyToSymbolAsync(symbol, from, bytes, offset, kind, nullptr);
}
EXPORT cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset,
                                        cudaMemcpyKind) {
  ++counters.synchronizations;
  void* from;
  const cudaError_t error = cudaGetSymbolAddress(&from, symbol);
  return error == cudaSuccess ? copy(to, static_cast<char*>(from) + offset, bytes) : error;
}

// --- Streams and events ---
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(new char);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, 0);
}
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<char*>(stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++counters.synchronizations;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, 0);
}
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *reinterpret_cast<Event*>(event) = {std::chrono::steady_clock::now(), true};
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t) {
  ++counters.synchronizations;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const Event &a = *reinterpret_cast<Event*>(start), &b = *reinterpret_cast<Event*>(end);
  if (!a.recorded || !b.recorded) return done(cudaErrorInvalidResourceHandle);
  *milliseconds = std::chrono::duration<float, std::milli>(b.time - a.time).count();
  return cudaSuccess;
}
