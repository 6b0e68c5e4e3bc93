// The CUDA engine for CPU tensors, on the emulator of tests/emulator: the same glue, planner,
// launchers and kernels as on a GPU. While installed, it stands in for the CPU engine.
#include <c10/util/Exception.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../csrc/cuda/recurrence_cuda.h"

namespace fusedrnn::cuda {
namespace {

int64_t runs[std::size(kRegimeNames)] = {};

// What ran, as long as somebody watches.
struct Run {
  Pass pass;
  Plan plan;
};
std::vector<Run> watched;
bool watching = false;

// Emulated streams are in order, and products are the CPU's.
struct Beside {
  void fork() {}
  template <class Work>
  void run(const Work& work) {
    work();
  }
  void join() {}
};

struct Engine {
  static at::ScalarType dtype(const Tensor& like) {
    return dtype_on(device_properties(0), like.scalar_type());
  }

  static void run(Call& call) {
    const Plan plan = cuda::run(call, 0, nullptr, Beside());
    ++runs[int(plan.regime)];
    if (watching) watched.push_back({call.problem.pass, plan});
  }
};

// The dispatcher warns of kernels that replace others, which is what is meant here.
struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

std::unique_ptr<torch::Library> installed;

}  // namespace
}  // namespace fusedrnn::cuda

extern "C" {

void fusedrnn_install() {
  using namespace fusedrnn::cuda;
  Silence silence;
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  installed = std::make_unique<torch::Library>(torch::Library::IMPL, "fusedrnn",
                                               c10::DispatchKey::CPU, __FILE__, __LINE__);
  fusedrnn::Ops<Engine>::add_to(*installed);
}

void fusedrnn_uninstall() { fusedrnn::cuda::installed.reset(); }

// A regime by its place in kRegimeNames, a tile by its place in kTiles, a split, whether the input
// product is part of the step, and where the chain is cut; -1 for what the planner chooses.
void fusedrnn_use_regime(int regime, int tile, int split, int fuse_input, int cut) {
  const auto wanted = [](int value) { return value < 0 ? std::nullopt : std::optional(value); };
  fusedrnn::cuda::Wish wish;
  if (regime >= 0) wish.regime = fusedrnn::cuda::Regime(regime);
  wish.tile = wanted(tile);
  wish.split = wanted(split);
  if (fuse_input >= 0) wish.fuse_input = fuse_input != 0;
  if (cut >= 0) wish.cut = cut;
  fusedrnn::cuda::wish(wish);
}

// How often a regime ran.
int64_t fusedrnn_runs(int regime) { return fusedrnn::cuda::runs[regime]; }

// From here on, the plans that run are kept; or, to end that, no longer, and those kept are gone.
void fusedrnn_watch(int watching) {
  fusedrnn::cuda::watching = watching != 0;
  fusedrnn::cuda::watched.clear();
}

// Pass, regime and so on of a run that was watched; false after the last one.
int fusedrnn_watched(int64_t index, int64_t values[11]) {
  using namespace fusedrnn::cuda;
  if (index >= int64_t(watched.size())) return 0;
  const auto& [pass, plan] = watched[size_t(index)];
  const int64_t found[] = {
      int64_t(pass), int64_t(plan.regime), plan.tile,   plan.split, plan.fuse_input, plan.cut,
      plan.rows,     plan.units,           plan.blocks, plan.teams, plan.chunks};
  std::copy(std::begin(found), std::end(found), values);
  return 1;
}
}
