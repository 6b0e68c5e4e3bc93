// The ops on CUDA tensors.
#include "recurrence_cuda.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "to_device.h"

namespace fusedrnn::cuda {
namespace {

struct Engine {
  static at::ScalarType dtype(const Tensor& like) {
    // `like` is the first tensor that an op checks; another one may have selected the CUDA backend.
    TORCH_CHECK(like.is_cuda(), "fusedrnn: all tensors must be on cuda, got ", like.device());
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

Tensor to_device(const Tensor& numbers, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const Tensor from = numbers.contiguous();
  const Tensor to = at::empty(from.sizes(), from.options().device(device));
  copy_to_device(from.const_data_ptr<int64_t>(), from.numel(), to.mutable_data_ptr<int64_t>(),
                 c10::cuda::getCurrentCUDAStream(guard.current_device().index()));
  return to;
}

TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) { Ops<Engine>::add_to(m); }

}  // namespace fusedrnn::cuda
