// The ops on CPU tensors.
#include <ATen/Parallel.h>

#include "../ops.h"
#include "engine.h"

namespace fusedrnn::cpu {
namespace {

struct Engine {
  static at::ScalarType dtype(const Tensor& like) { return like.scalar_type(); }
  static void run(Call& call) { cpu::run(call.problem, at::get_num_threads()); }
};

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { Ops<Engine>::add_to(m); }

}  // namespace fusedrnn::cpu
