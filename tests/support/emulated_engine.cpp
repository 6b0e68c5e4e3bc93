// Runs the CUDA engine on CPU tensors, on the emulator of tests/support/emulator: the same glue,
// planner, launchers and kernels as on a GPU. While installed, it replaces the CPU engine.
#include <c10/util/Exception.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../../csrc/cuda/recurrence_cuda.h"

namespace fusedrnn::cuda {
namespace {

int64_t runs[std::size(kRegimeNames)] = {};

// A pass that ran while `watching`, and its plan.
struct Run {
  Pass pass;
  Plan plan;
};
std::vector<Run> watched;
bool watching = false;

struct Engine {
  static at::ScalarType dtype(const Tensor& like) {
    return dtype_on(device_properties(0), like.scalar_type());
  }

  static void run(Call& call) {
    const Plan plan = cuda::run(call, 0, nullptr);
    ++runs[int(plan.regime)];
    if (watching) watched.push_back({call.problem.pass, plan});
  }
};

// Drops the dispatcher's warnings about replaced kernels, because the replacement is intended.
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

// Overrides the planner: the regime as an index into kRegimeNames, the tile as an index into
// kTiles, how many warps share the K of the same units, and whether the input product is part of
// the step. For an argument of -1, the planner chooses.
void fusedrnn_use_regime(int regime, int tile, int split, int fuse_input) {
  const auto wanted = [](int value) { return value < 0 ? std::nullopt : std::optional(value); };
  fusedrnn::cuda::Overrides overrides;
  if (regime >= 0) overrides.regime = fusedrnn::cuda::Regime(regime);
  overrides.tile = wanted(tile);
  overrides.split = wanted(split);
  if (fuse_input >= 0) overrides.fuse_input = fuse_input != 0;
  fusedrnn::cuda::set_overrides(overrides);
}

// Returns how often a regime has run.
int64_t fusedrnn_runs(int regime) { return fusedrnn::cuda::runs[regime]; }

// Starts (1) or stops (0) recording the plans that run, and discards those recorded before.
void fusedrnn_watch(int watching) {
  fusedrnn::cuda::watching = watching != 0;
  fusedrnn::cuda::watched.clear();
}

// Copies the pass and plan of a recorded run into `values`; returns 0 if there is no such run.
int fusedrnn_watched(int64_t index, int64_t values[10]) {
  using namespace fusedrnn::cuda;
  if (index >= int64_t(watched.size())) return 0;
  const auto& [pass, plan] = watched[size_t(index)];
  const int64_t found[] = {
      int64_t(pass), int64_t(plan.regime), plan.tile,   plan.split,        plan.fuse_input,
      plan.rows,     plan.units,           plan.blocks, plan.batch_groups, plan.chunks};
  std::copy(std::begin(found), std::end(found), values);
  return 1;
}
}
