// Argument checks of the ops, shared by CPU and CUDA. Each error message states what the op expects
// and what it got.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <iomanip>
#include <limits>
#include <optional>
#include <string>

#include "recurrence.h"

namespace fusedrnn {

template <size_t N>
int index_of(c10::string_view name, const char* const (&names)[N], const char* what) {
  std::string all;
  for (size_t i = 0; i < N; ++i) {
    if (name == names[i]) return int(i);
    all += std::string(i ? ", " : "") + names[i];
  }
  TORCH_CHECK_VALUE(false, "Unknown ", what, " '", name, "'. Select from ", all, ".");
}

inline Nonlinearity nonlinearity_named(c10::string_view name) {
  return Nonlinearity(index_of(name, kNonlinearityNames, "nonlinearity"));
}

inline Form form_named(c10::string_view name) { return Form(index_of(name, kFormNames, "form")); }

// The sizes of a sequence: x is [T, B, size], or packed [N, size] with batch_sizes [T].
struct Sizes {
  int64_t T, B, rows;  // rows: N if the sequence is packed, otherwise 0
};

inline void check_rank(const char* name, const at::Tensor& x, bool packed) {
  TORCH_CHECK(x.dim() == (packed ? 2 : 3), "fusedrnn: ", packed ? "packed " : "", name,
              packed ? " must be [N, size], got " : " must be [T, B, size], got ", x.sym_sizes());
}

// batch_sizes must be on the CPU; it may be on meta if x is.
inline void check_batch_sizes_kind(const at::Tensor& batch_sizes, const at::Tensor& x) {
  TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.scalar_type() == at::kLong &&
                  (batch_sizes.is_cpu() || (batch_sizes.is_meta() && x.is_meta())) &&
                  batch_sizes.is_contiguous(),
              "fusedrnn: batch_sizes must be a dense 1-D int64 CPU tensor, got ",
              batch_sizes.toString(), " of sizes ", batch_sizes.sym_sizes());
}

// Checks batch_sizes against a packed sequence of `rows` rows and returns the sizes.
inline Sizes check_batch_sizes(const char* name, int64_t rows, const at::Tensor& batch_sizes) {
  const int64_t T = batch_sizes.size(0);
  TORCH_CHECK(T > 0, "Expected sequence length to be larger than 0 in RNN");
  const int64_t* sizes = batch_sizes.const_data_ptr<int64_t>();
  int64_t sum = 0;
  for (int64_t t = 0; t < T; ++t) {
    TORCH_CHECK(sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]),
                "fusedrnn: batch_sizes must be positive and non-increasing, got ",
                at::IntArrayRef(sizes, size_t(T)));
    // before the addition, which could overflow
    TORCH_CHECK(sizes[t] <= rows - sum, "fusedrnn: batch_sizes sum to more than the ", rows,
                " rows of packed ", name);
    sum += sizes[t];
  }
  TORCH_CHECK(sum == rows, "fusedrnn: batch_sizes sum to ", sum, ", but packed ", name, " has ",
              rows, " rows");
  return {T, sizes[0], rows};
}

inline Sizes check_sequence(const char* name, const at::Tensor& x,
                            const std::optional<at::Tensor>& batch_sizes) {
  check_rank(name, x, batch_sizes.has_value());
  if (batch_sizes) {
    check_batch_sizes_kind(*batch_sizes, x);
    return check_batch_sizes(name, x.size(0), *batch_sizes);
  }
  TORCH_CHECK(x.size(0) > 0, "Expected sequence length to be larger than 0 in RNN");
  return {x.size(0), x.size(1), 0};
}

inline void check_sizes(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef sizes) {
  bool same = tensor.dim() == int64_t(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i)  // deferred if the size depends on data
    same = tensor.sym_size(int64_t(i)).sym_eq(sizes[i]).expect_true(__FILE__, __LINE__);
  TORCH_CHECK(same, "fusedrnn: ", name, " must have sizes ", sizes, ", got ", tensor.sym_sizes());
}

inline void check_device(const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  TORCH_CHECK(tensor.device() == like.device(), "fusedrnn: ", name, " must be on ", like.device(),
              ", got ", tensor.device());
}

inline void check_like(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef sizes,
                       const at::Tensor& like) {
  check_sizes(name, tensor, sizes);
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "fusedrnn: ", name, " must be ",
              like.scalar_type(), ", got ", tensor.scalar_type());
  check_device(name, tensor, like);
}

inline void check_like(const char* name, const std::optional<at::Tensor>& tensor,
                       c10::SymIntArrayRef sizes, const at::Tensor& like) {
  if (tensor) check_like(name, *tensor, sizes, like);
}

// reset has one element per row of `series`.
inline void check_reset(const std::optional<at::Tensor>& reset, const at::Tensor& series) {
  if (!reset) return;
  check_device("reset", *reset, series);
  TORCH_CHECK(reset->scalar_type() == at::kBool, "fusedrnn: reset must be bool, got ",
              reset->scalar_type());
  check_sizes("reset", *reset, series.sym_sizes().slice(0, series.dim() - 1));
}

inline void check_only_of_potential(const char* name, const std::optional<at::Tensor>& tensor,
                                    Form form) {
  TORCH_CHECK(!tensor || form == Form::potential, "fusedrnn: ", name,
              " must be None unless the form is potential");
}

// Each alpha must be in [0, 1]. Checked only on the CPU: reading values from another device would
// wait for that device.
inline void check_alpha(const std::optional<at::Tensor>& alpha) {
  if (!alpha || !alpha->is_cpu()) return;
  const at::Tensor all = alpha->dim() <= 1 ? *alpha : alpha->reshape(-1);
  const int64_t stride = all.dim() == 1 ? all.stride(0) : 1;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, all.scalar_type(), "alpha", [&] {
    const scalar_t* values = all.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < all.numel(); ++i) {
      const auto value = double(values[i * stride]);
      TORCH_CHECK_VALUE(value >= 0 && value <= 1, "fusedrnn: alpha must be in [0, 1], got ",
                        std::setprecision(std::numeric_limits<scalar_t>::max_digits10), value);
    }
  });
}

inline void check_grad_clip(std::optional<double> grad_clip) {
  TORCH_CHECK_VALUE(!grad_clip || *grad_clip > 0,
                    "fusedrnn: grad_clip must be positive or None, got ", *grad_clip);
}

// Whether the values of a tensor can be read here: false for a fake, wrapped or batched tensor.
inline bool is_readable(const at::Tensor& tensor) {
  return tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView -
             c10::autocast_dispatch_keyset ==
         c10::DispatchKeySet(c10::DispatchKey::CPU);
}

// check_sequence and check_reset for the composite ops (bptt.cpp), whose tensors may be fake,
// wrapped or batched and may have symbolic sizes. Returns B, or nullopt if the sequence is packed
// and its batch_sizes cannot be checked.
inline std::optional<c10::SymInt> check_series(const char* name, const at::Tensor& series,
                                               const std::optional<at::Tensor>& reset,
                                               const std::optional<at::Tensor>& batch_sizes) {
  check_rank(name, series, batch_sizes.has_value());
  check_reset(reset, series);
  if (!batch_sizes) {
    TORCH_SYM_CHECK(series.sym_size(0).sym_gt(0),
                    "Expected sequence length to be larger than 0 in RNN");
    return series.sym_size(1);
  }
  check_batch_sizes_kind(*batch_sizes, series);
  const std::optional<int64_t> rows = series.sym_size(0).maybe_as_int();
  if (!rows || !is_readable(*batch_sizes)) return std::nullopt;
  return check_batch_sizes(name, *rows, *batch_sizes).B;
}

}  // namespace fusedrnn
