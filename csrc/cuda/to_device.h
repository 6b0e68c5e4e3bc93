// A copy to the device that does not synchronise and can be captured.
#pragma once

#include <ATen/core/Tensor.h>

namespace fusedrnn::cuda {

// Copies an int64 CPU tensor to a CUDA device.
at::Tensor to_device(const at::Tensor& numbers, c10::Device device);

}  // namespace fusedrnn::cuda
