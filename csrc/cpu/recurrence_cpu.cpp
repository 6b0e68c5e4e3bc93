// The ops on CPU tensors.
#include "recurrence_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cores.h"
#include "engine.h"

namespace fusedrnn::cpu {
namespace {

struct Engine {
  static at::ScalarType dtype(const Tensor& like) { return like.scalar_type(); }
  static void run(Call& call) { cpu::run(call.problem, num_threads()); }
};

}  // namespace

int num_threads() {
  const int threads = at::get_num_threads();
  return threads > 1 ? std::min(threads, usable_cores()) : threads;
}

BackwardResults backward(const OptionalTensor& g, const OptionalTensor& d, const OptionalTensor& f,
                         const OptionalTensor& g_n, const Tensor& slope_of, const Tensor& x,
                         const OptionalTensor& w_ih, const Tensor& h, const OptionalTensor& h0,
                         const Tensor& w_hh, const OptionalTensor& alpha,
                         const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                         c10::string_view nonlinearity, c10::string_view form, bool reverse,
                         std::optional<double> grad_clip, const WantedGradients& wanted) {
  Call call = Ops<Engine>::adjoint_call(g, d, f, g_n, slope_of, w_hh, alpha, reset, batch_sizes,
                                        nonlinearity, form, reverse, grad_clip);
  Problem& p = call.problem;
  Gradients gradients;
  if (w_ih) {
    call.input(x, *w_ih);
    gradients.I = std::exchange(p.I, 0);
    gradients.x = std::exchange(p.x, {});
    gradients.w_ih = std::exchange(p.w_ih, nullptr);
    gradients.w_ih_row = p.w_ih_row;
  }
  gradients.h = call.series("h", h);
  gradients.h0 = call.states("h0", h0);

  const int64_t I = x.size(-1);
  const auto empty = [&](void*& where, bool is_wanted, at::IntArrayRef sizes) {
    if (!is_wanted) return Tensor();
    // The engine does not run for a batch of zero rows, whose sums are 0.
    const Tensor result =
        call.is_empty() ? at::zeros(sizes, x.options()) : at::empty(sizes, x.options());
    if (result.numel() > 0) where = result.data_ptr();
    return result;
  };
  BackwardResults results;
  if (w_ih) {
    results.x = empty(gradients.dx, wanted.x, x.sizes());
    results.w_ih = empty(gradients.dw_ih, wanted.w_ih, {p.H, I});
  } else if (wanted.x) {
    results.x = call.to(p.out[0]);
  }
  results.w_hh = empty(gradients.dw_hh, wanted.w_hh, {p.H, p.H});
  results.b = empty(gradients.db, wanted.b, {p.H});
  results.h0 = call.to(p.last, wanted.h0 || wanted.v0);
  results.v0 = call.to(p.last_carry, wanted.v0 && p.form == Form::potential);
  results.a = call.to(p.out[1], wanted.a);
  if (!call.is_empty()) cpu::run(p, gradients, num_threads());
  return results;
}

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { Ops<Engine>::add_to(m); }

}  // namespace fusedrnn::cpu
