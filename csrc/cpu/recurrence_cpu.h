// The whole backward pass on CPU tensors, in one call of the engine.
#pragma once

#include "../ops.h"

namespace fusedrnn::cpu {

struct WantedGradients {
  bool x, w_ih, b, h0, v0, w_hh, a;
};

// The gradients; those that are not wanted are undefined or empty.
struct BackwardResults {
  Tensor x, w_ih, b, h0, v0, w_hh, a;
};

// Computes the adjoint op and the GEMMs that follow from it. `slope_of` is the op's argument
// `saved`.
BackwardResults backward(const OptionalTensor& g, const OptionalTensor& d, const OptionalTensor& f,
                         const OptionalTensor& g_n, const Tensor& slope_of, const Tensor& x,
                         const OptionalTensor& w_ih, const Tensor& h, const OptionalTensor& h0,
                         const Tensor& w_hh, const OptionalTensor& alpha,
                         const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                         c10::string_view nonlinearity, c10::string_view form, bool reverse,
                         std::optional<double> grad_clip, const WantedGradients& wanted);

}  // namespace fusedrnn::cpu
