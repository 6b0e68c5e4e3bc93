// The ops on CUDA tensors.
#include "recurrence_cuda.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace fusedrnn::cuda {
namespace {

struct Engine {
  static at::ScalarType dtype(const Tensor& like) {
    const c10::cuda::CUDAGuard guard(like.device());
    return dtype_on(device_properties(like.get_device()), like.scalar_type());
  }

  static void run(Call& call) {
    const c10::cuda::CUDAGuard guard(call.like.device());
    const auto device = call.like.get_device();
    cuda::run(call, device, c10::cuda::getCurrentCUDAStream(device));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) { Ops<Engine>::add_to(m); }

}  // namespace fusedrnn::cuda
