// Checks of the arguments of an op, shared by CPU and CUDA. Each says what was wanted and what
// came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>

#include "recurrence.h"

namespace fusedrnn {

constexpr const char* kNonlinearityNames[kNonlinearities] = {
    "tanh", "relu", "identity", "sigmoid", "softplus", "retanh", "hardtanh", "leaky_relu", "elu"};

inline Nonlinearity nonlinearity_named(c10::string_view name) {
  for (int i = 0; i < kNonlinearities; ++i)
    if (name == kNonlinearityNames[i]) return Nonlinearity(i);
  std::string all;
  for (const char* known : kNonlinearityNames) all += std::string(all.empty() ? "" : ", ") + known;
  TORCH_CHECK_VALUE(false, "Unknown nonlinearity '", name, "'. Select from ", all, ".");
}

// The sizes of a sequence: x is [T, B, size], or packed [N, size] with batch_sizes [T].
struct Sizes {
  int64_t T, B, rows;  // rows: T * B, or N
};

inline Sizes check_sequence(const char* name, const at::Tensor& x,
                            const std::optional<at::Tensor>& batch_sizes) {
  if (!batch_sizes) {
    TORCH_CHECK(x.dim() == 3, "fusedrnn: ", name, " must be [T, B, size], got ", x.sizes());
    TORCH_CHECK(x.size(0) > 0, "Expected sequence length to be larger than 0 in RNN");
    return {x.size(0), x.size(1), x.size(0) * x.size(1)};
  }
  TORCH_CHECK(x.dim() == 2, "fusedrnn: packed ", name, " must be [N, size], got ", x.sizes());
  TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == at::kLong &&
                  batch_sizes->is_cpu() && batch_sizes->is_contiguous(),
              "fusedrnn: batch_sizes must be a dense 1-D int64 CPU tensor, got ",
              batch_sizes->toString(), " of sizes ", batch_sizes->sizes());
  const int64_t T = batch_sizes->size(0);
  TORCH_CHECK(T > 0, "Expected sequence length to be larger than 0 in RNN");
  const int64_t* sizes = batch_sizes->const_data_ptr<int64_t>();
  int64_t rows = 0;
  for (int64_t t = 0; t < T; ++t) {
    TORCH_CHECK(sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]),
                "fusedrnn: batch_sizes must be positive and never rise, got ",
                at::IntArrayRef(sizes, size_t(T)));
    // before adding, which could overflow
    TORCH_CHECK(sizes[t] <= x.size(0) - rows, "fusedrnn: batch_sizes sum to more than the ",
                x.size(0), " rows of packed ", name);
    rows += sizes[t];
  }
  TORCH_CHECK(rows == x.size(0), "fusedrnn: batch_sizes sum to ", rows, ", but packed ", name,
              " has ", x.size(0), " rows");
  return {T, sizes[0], rows};
}

inline void check_like(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes,
                       const at::Tensor& like) {
  TORCH_CHECK(tensor.sizes() == sizes, "fusedrnn: ", name, " must have sizes ", sizes, ", got ",
              tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "fusedrnn: ", name, " must be ",
              like.scalar_type(), " like the others, got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == like.device(), "fusedrnn: ", name, " must be on ", like.device(),
              " like the others, got ", tensor.device());
}

inline void check_like(const char* name, const std::optional<at::Tensor>& tensor,
                       at::IntArrayRef sizes, const at::Tensor& like) {
  if (tensor) check_like(name, *tensor, sizes, like);
}

inline void check_keep(const std::optional<at::Tensor>& keep, at::IntArrayRef sizes,
                       const at::Tensor& like) {
  if (!keep) return;
  TORCH_CHECK(keep->device() == like.device(), "fusedrnn: keep must be on ", like.device(),
              " like the others, got ", keep->device());
  TORCH_CHECK(keep->scalar_type() == at::kBool, "fusedrnn: keep must be bool, got ",
              keep->scalar_type());
  TORCH_CHECK(keep->sizes() == sizes, "fusedrnn: keep must have sizes ", sizes, ", got ",
              keep->sizes());
}

}  // namespace fusedrnn
