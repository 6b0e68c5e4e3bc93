// Queries the device, and launches the kernels of a plan.
#include "engine.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "params.h"

namespace fusedrnn::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear it, or the next call that checks would report it again
  throw std::runtime_error(std::string("fusedrnn: ") + what + ": " + cudaGetErrorString(error));
}

const TileKernels& tile_kernels(int tile) {
  const TileKernels* const lists[] = {kFmaF32, kFmaF64, kMmaBf16, kMmaF16, kMmaTf32};
  int index = 0;  // among the tiles of the same arithmetic
  while (index < tile && kTiles[tile - index - 1].arithmetic == kTiles[tile].arithmetic) ++index;
  return lists[int(kTiles[tile].arithmetic)][index];
}

StepKernel step_kernel(Storage storage, Pass pass) {
  const StepKernels* const kernels[] = {&kStepF32, &kStepF64, &kStepBf16, &kStepF16};
  return kernels[int(storage)]->of_pass[int(pass)];
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "a device attribute");
  return value;
}

// Raises the limits that a launch may need. They are attributes of the kernel and persist. Another
// thread may be about to launch the same kernel, so the values do not depend on the launch.
void allow(const void* kernel, const Device& device, int64_t cluster) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(device.shared_memory)),
        "shared memory");
  if (cluster > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "clusters of more than 8 blocks");
}

// The configuration of a launch, optionally of clusters, optionally cooperative.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  Launch(int64_t blocks, int threads, int64_t shared, cudaStream_t stream) {
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = stream;
    config.attrs = attributes;
  }
  void clusters_of(int64_t blocks) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  // Programmatic dependent launch: this kernel may start while the previous one still runs.
  void waits_for_itself() {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  // A cooperative launch: all blocks run at the same time, or the launch fails.
  void all_at_once() {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
};

// Makes a device current for the lifetime of this object.
class OnDevice {
 public:
  explicit OnDevice(int index) {
    check(cudaGetDevice(&before_), "the current device");
    check(cudaSetDevice(index), "a device");
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_;
};

// Counts how many clusters of 1, 2, 4, 8 and 16 blocks the device runs at once. Dividing the number
// of SMs by the cluster size would be wrong: SMs come in groups of uneven size, and a cluster must
// fit into one group.
void count_clusters(Device& device) {
  for (int log2 = 0; log2 < 5; ++log2) device.clusters[log2] = 0;
  device.clusters[0] = device.sms;
  if (device.architecture < 90) return;
  const auto kernel = reinterpret_cast<const void*>(tile_kernels(0).of_pass[0]);
  for (int log2 = 1; log2 < 5; ++log2) {
    Launch launch(int64_t(1) << log2, kThreads, device.shared_memory, nullptr);
    launch.clusters_of(int64_t(1) << log2);
    int clusters = 0;
    try {
      allow(kernel, device, int64_t(1) << log2);
      check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config), "occupancy");
    } catch (const std::runtime_error&) {
      clusters = 0;  // the device does not support this cluster size
    }
    device.clusters[log2] = clusters;
  }
}

Device query(int index) {
  const OnDevice guard(index);  // the queries below refer to the current device
  Device device;
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "device properties");
  device.name = properties.name;
  // If the driver compiled the kernels from the PTX of an older architecture, use that one.
  cudaFuncAttributes compiled;
  check(cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(tile_kernels(0).of_pass[0])),
        "the kernels");
  device.architecture = std::min(properties.major * 10 + properties.minor, compiled.ptxVersion);
  device.sms = properties.multiProcessorCount;
  device.shared_memory = int64_t(properties.sharedMemPerBlockOptin);
  device.clock = attribute(cudaDevAttrClockRate, index) / 1e6;
  // two transfers per cycle
  device.memory_bandwidth = 2.0 * attribute(cudaDevAttrMemoryClockRate, index) *
                            attribute(cudaDevAttrGlobalMemoryBusWidth, index) / 8 / 1e6;
  device.cooperative = attribute(cudaDevAttrCooperativeLaunch, index) != 0;
  count_clusters(device);
  return device;
}

// As many numbers as fit into the 4 KB of a kernel's arguments.
struct Numbers {
  static constexpr int kMax = 480;
  int64_t v[kMax];
};
__global__ void write_numbers(int64_t* to, const __grid_constant__ Numbers numbers, int count) {
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) to[i] = numbers.v[i];
}

std::mutex mutex;  // guards the next two variables
std::map<int, std::unique_ptr<const Device>> known;
Overrides current_overrides;

// Whether rows of `count` elements can be copied `bytes` at a time.
bool fits(const Series& series, int64_t count, int64_t number_size, int64_t bytes) {
  const auto whole = [&](int64_t n) { return n * number_size % bytes == 0; };
  return reinterpret_cast<uintptr_t>(series.data) % uintptr_t(bytes) == 0 && whole(series.row) &&
         whole(series.step) && whole(count);
}

Params parameters(const Problem& problem, const Plan& plan, const Workspace& workspace) {
  const Tile& tile = kTiles[plan.tile];
  Params p = {};
  p.problem = problem;
  p.offsets = workspace.offsets;
  p.counters = workspace.counters;
  p.carry = workspace.carry;
  p.regime = plan.regime;
  p.blocks = int(plan.blocks);
  p.rows = int(plan.rows);
  p.units = int(plan.units);
  p.receivers = int((problem.H + plan.units - 1) / plan.units);
  while (1 << p.split_log2 < plan.split) ++p.split_log2;
  p.state_k = int(plan.state_chunks) * tile.chunk();
  p.chunks = int(plan.chunks);
  p.e_row = int(plan.shared.e_row);
  p.e_size = int(plan.shared.e_size);
  p.e_offset = int(plan.shared.e);
  const bool carries = problem.alpha.data || (problem.pass == Pass::adjoint && problem.first.data);
  p.carry_offset = carries ? int(plan.shared.carry) : 0;
  p.vectors_offset = int(plan.shared.vectors);
  p.partial_offset = int(plan.shared.partial);
  p.arrivals_offset = int(plan.shared.arrivals);
  const int size = tile.number_size();
  for (int bytes = 4; bytes <= 16; bytes *= 2)
    if (problem.I && fits(problem.x, problem.I, size, bytes)) p.x_copy = bytes;
  p.state_copies = fits(problem.out[0], problem.H, size, 16);
  p.packs = true;
  const Series alpha = problem.alpha_varies() ? problem.alpha : Series{};
  for (const Series* series : {&problem.in[0], &problem.in[1], &problem.in[2], &problem.gate,
                               &alpha, &problem.out[0], &problem.out[1], &problem.out[2]})
    p.packs = p.packs && (!series->data || fits(*series, problem.H, size, 2 * size));
  const bool constant = problem.form == Form::rate && problem.pass != Pass::tangent && !p.offsets &&
                        !problem.reset && !problem.alpha.data && !problem.clips() &&
                        problem.I == 0 && problem.in[0].data && !problem.in[1].data &&
                        !problem.out[1].data;
  // States are sent to peers 16 bytes at a time.
  const bool sends = plan.regime == Regime::cluster && problem.H * size % 16 == 0 &&
                     plan.units * size % 16 == 0 && p.receivers == p.blocks;
  p.plain = constant && (plan.regime == Regime::block || sends) && plan.rows <= tile.rows &&
            problem.T > 0 && problem.T < INT32_MAX && (p.packs || !tile.mma());
  const auto step = [&](const Series& series) {
    return (problem.descending ? -series.step : series.step) * size;
  };
  p.in_step = step(problem.in[0]);
  p.gate_step = step(problem.gate);
  p.out_step = step(problem.out[0]);
  return p;
}

void launch(const Problem& problem, const Plan& plan, const Device& device,
            const Workspace& workspace, cudaStream_t stream) {
  Params p = parameters(problem, plan, workspace);
  if (plan.regime == Regime::step) {
    StepKernel kernel = step_kernel(problem.storage, problem.pass);
    const bool finish = problem.pass == Pass::adjoint && problem.last.data;
    for (int64_t s = 0; s < problem.T + finish; ++s) {
      Launch launch(plan.blocks * plan.batch_groups, kThreads, 0, stream);
      if (s > 0 && device.architecture >= 90) launch.waits_for_itself();
      void* arguments[] = {&p, &s};
      check(cudaLaunchKernelExC(&launch.config, reinterpret_cast<const void*>(kernel), arguments),
            "the launch failed");
    }
    return;
  }
  const TileKernels& of_tile = tile_kernels(plan.tile);
  PersistentKernel kernel = (!p.plain                         ? of_tile.of_pass
                             : plan.regime == Regime::cluster ? of_tile.plain_cluster
                                                              : of_tile.plain)[int(problem.pass)];
  const int64_t cluster = plan.regime == Regime::cluster ? plan.blocks : 1;
  allow(reinterpret_cast<const void*>(kernel), device, cluster);
  // In the grid regime the blocks of a batch group wait for each other, so each launch has only as
  // many batch groups as can run at once. In the other regimes one launch has all batch groups, and
  // the hardware starts them as SMs become free.
  const bool waits = plan.regime == Regime::grid;
  const int64_t waves = waits ? plan.waves : 1, of_a_wave = (plan.batch_groups + waves - 1) / waves;
  for (int64_t first = 0; first < plan.batch_groups; first += of_a_wave) {
    p.first_batch_group = int(first);
    Launch launch(plan.blocks * std::min(of_a_wave, plan.batch_groups - first), kThreads,
                  plan.shared.end, stream);
    if (cluster > 1) launch.clusters_of(cluster);
    if (waits) launch.all_at_once();
    void* arguments[] = {&p};
    check(cudaLaunchKernelExC(&launch.config, reinterpret_cast<const void*>(kernel), arguments),
          "the launch failed");
  }
}

}  // namespace

const Device& device_properties(int index) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto& device = known[index];
  if (!device) device = std::make_unique<const Device>(query(index));
  return *device;
}

void copy_to_device(const int64_t* from, int64_t count, int64_t* to, cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += Numbers::kMax) {
    Numbers numbers;
    int size = int(std::min<int64_t>(Numbers::kMax, count - first));
    std::copy_n(from + first, size, numbers.v);
    int64_t* place = to + first;
    Launch launch(1, 128, 0, stream);
    void* arguments[] = {&place, &numbers, &size};
    check(cudaLaunchKernelExC(&launch.config, reinterpret_cast<const void*>(&write_numbers),
                              arguments),
          "a copy to the device failed");
  }
}

void set_overrides(const Overrides& wanted) {
  const std::lock_guard<std::mutex> lock(mutex);
  current_overrides = wanted;
}

Overrides overrides() {
  const std::lock_guard<std::mutex> lock(mutex);
  return current_overrides;
}

void run(const Problem& problem, const PlanInput& in, const Plan& plan, const Device& device,
         const Workspace& workspace, cudaStream_t stream) {
  if (problem.B == 0 || problem.H == 0) return;
  try {
    launch(problem, plan, device, workspace, stream);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(error.what()) +
                             " (the plan was: " + in_words(in, plan, device) + ")");
  }
}

}  // namespace fusedrnn::cuda
