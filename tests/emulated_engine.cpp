// The CUDA engine for CPU tensors, on the emulator of tests/emulator: the same glue, planner,
// launchers and kernels as on a GPU. While installed, it stands in for the CPU engine.
#include <c10/util/Exception.h>

#include <memory>
#include <string>

#include "../csrc/cuda/recurrence_cuda.h"

namespace fusedrnn::cuda {
namespace {

int64_t runs[std::size(kRegimeNames)] = {};

struct Engine {
  static at::ScalarType dtype(const Tensor& like) {
    return dtype_on(device_properties(0), like.scalar_type());
  }

  static void run(Call& call) { ++runs[int(cuda::run(call, 0, nullptr).regime)]; }
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

// A regime by its place in kRegimeNames, a tile by its place in kTiles, and a split; -1 for what
// the planner chooses.
void fusedrnn_use_regime(int regime, int tile, int split) {
  const auto wanted = [](int value) { return value < 0 ? std::nullopt : std::optional(value); };
  fusedrnn::cuda::Wish wish;
  if (regime >= 0) wish.regime = fusedrnn::cuda::Regime(regime);
  wish.tile = wanted(tile);
  wish.split = wanted(split);
  fusedrnn::cuda::wish(wish);
}

// How often a regime ran.
int64_t fusedrnn_runs(int regime) { return fusedrnn::cuda::runs[regime]; }
}
