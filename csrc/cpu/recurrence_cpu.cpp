// The ops on CPU tensors: checks, a Problem, the engine.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "engine.h"

namespace fusedrnn::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Storage::f32;
    case at::kDouble: return Storage::f64;
    case at::kBFloat16: return Storage::bf16;
    case at::kHalf: return Storage::f16;
    default:
      TORCH_CHECK_TYPE(false,
                       "fusedrnn: the CPU engine computes in float32, float64, bfloat16 and "
                       "float16, got ",
                       x.scalar_type());
  }
}

// A problem, and the dense copies that its pointers need: only where the last dimension of a
// tensor is not dense already.
class Call {
 public:
  Call(Pass pass, const Tensor& like, const Sizes& sizes, int64_t H, const Tensor& w_hh,
       const OptionalTensor& alpha, const OptionalTensor& keep, const OptionalTensor& batch_sizes,
       c10::string_view nonlinearity, bool descending)
      : like_(like), sizes_(sizes), packed_(batch_sizes) {
    check_like("w_hh", w_hh, {H, H}, like);
    check_like("alpha", alpha, {H}, like);
    check_keep(keep, like.sizes().slice(0, like.dim() - 1), like);
    problem.pass = pass;
    problem.nonlinearity = nonlinearity_named(nonlinearity);
    problem.storage = storage_of(like);
    problem.T = sizes.T;
    problem.B = sizes.B;
    problem.I = 0;
    problem.H = H;
    problem.descending = descending;
    if (packed_) problem.batch_sizes = batch_sizes->const_data_ptr<int64_t>();
    if (keep) problem.keep = static_cast<const bool*>(hold(keep->contiguous()));
    problem.w_hh = matrix(w_hh, problem.w_hh_row);
    problem.alpha = vector("alpha", alpha);
  }

  Series series(const Tensor& tensor) {
    const Tensor t = dense(tensor);
    return {const_cast<void*>(hold(t)), packed_ ? 0 : t.stride(0),
            packed_ ? t.stride(0) : t.stride(1)};
  }

  // An optional [T, B, H].
  Series series(const char* name, const OptionalTensor& tensor) {
    if (!tensor) return {};
    check_like(name, *tensor, sequence_sizes(problem.H), like_);
    return series(*tensor);
  }

  // An optional [B, H].
  States states(const char* name, const OptionalTensor& tensor) {
    if (!tensor) return {};
    check_like(name, *tensor, {sizes_.B, problem.H}, like_);
    const Tensor t = dense(*tensor);
    return {const_cast<void*>(hold(t)), t.stride(0)};
  }

  // An optional [H].
  const void* vector(const char* name, const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    check_like(name, *tensor, {problem.H}, like_);
    return hold(tensor->contiguous());
  }

  void input(const Tensor& x, const Tensor& w_ih) {
    problem.I = x.size(-1);
    check_like("w_ih", w_ih, {problem.H, problem.I}, like_);
    problem.w_ih = matrix(w_ih, problem.w_ih_row);
    problem.x = series(x);
  }

  Tensor new_sequence() { return at::empty(sequence_sizes(problem.H), like_.options()); }
  Tensor new_states() { return at::empty({sizes_.B, problem.H}, like_.options()); }
  Tensor nothing() { return at::empty({0}, like_.options()); }

  void run() {
    if (problem.B > 0 && problem.H > 0) cpu::run(problem, at::get_num_threads());
  }

  Problem problem;

 private:
  static Tensor dense(const Tensor& t) {
    return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous();
  }

  const void* matrix(const Tensor& tensor, int64_t& row) {
    const Tensor t = dense(tensor);
    row = t.stride(0);
    return hold(t);
  }

  const void* hold(const Tensor& t) {
    held_.push_back(t);
    return t.const_data_ptr();
  }

  at::DimVector sequence_sizes(int64_t H) const {
    if (packed_) return {sizes_.rows, H};
    return {sizes_.T, sizes_.B, H};
  }

  const Tensor& like_;
  const Sizes sizes_;
  const bool packed_;
  std::vector<Tensor> held_;
};

std::tuple<Tensor, Tensor, Tensor> activation(const Tensor& x, const OptionalTensor& w_ih,
                                              const OptionalTensor& b_ih,
                                              const OptionalTensor& b_hh, const OptionalTensor& h0,
                                              const Tensor& w_hh, const OptionalTensor& alpha,
                                              const OptionalTensor& keep,
                                              const OptionalTensor& batch_sizes,
                                              c10::string_view nonlinearity, bool reverse) {
  const Sizes sizes = check_sequence("x", x, batch_sizes);
  const int64_t H = w_hh.size(0);
  Call call(Pass::activation, x, sizes, H, w_hh, alpha, keep, batch_sizes, nonlinearity, reverse);
  Problem& p = call.problem;
  if (w_ih) {
    call.input(x, *w_ih);
  } else {
    p.in[0] = call.series("u", x);
  }
  p.b_ih = call.vector("b_ih", b_ih);
  p.b_hh = call.vector("b_hh", b_hh);
  p.first = call.states("h0", h0);
  Tensor h = call.new_sequence(), h_n = call.new_states();
  Tensor phi = alpha ? call.new_sequence() : call.nothing();
  p.out[0] = call.series(h);
  if (alpha) p.out[1] = call.series(phi);
  p.last = call.states("h_n", h_n);
  call.run();
  return {h, h_n, phi};
}

std::tuple<Tensor, Tensor, Tensor> tangent(const OptionalTensor& w, const OptionalTensor& q,
                                           const OptionalTensor& s0, const Tensor& phi,
                                           const Tensor& w_hh, const OptionalTensor& alpha,
                                           const OptionalTensor& keep,
                                           const OptionalTensor& batch_sizes,
                                           c10::string_view nonlinearity, bool reverse, bool full) {
  const Sizes sizes = check_sequence("phi", phi, batch_sizes);
  Call call(Pass::tangent, phi, sizes, phi.size(-1), w_hh, alpha, keep, batch_sizes, nonlinearity,
            reverse);
  Problem& p = call.problem;
  p.in[0] = call.series("w", w);
  p.in[1] = call.series("q", q);
  p.gate = call.series(phi);
  p.first = call.states("s0", s0);
  Tensor lambda = call.new_sequence(), lambda_n = call.new_states();
  Tensor m = full ? call.new_sequence() : call.nothing();
  p.out[0] = call.series(lambda);
  if (full) p.out[1] = call.series(m);
  p.last = call.states("lambda_n", lambda_n);
  call.run();
  return {lambda, lambda_n, m};
}

std::tuple<Tensor, Tensor, Tensor> adjoint(const OptionalTensor& g, const OptionalTensor& d,
                                           const OptionalTensor& g_n, const Tensor& phi,
                                           const Tensor& w_hh, const OptionalTensor& alpha,
                                           const OptionalTensor& keep,
                                           const OptionalTensor& batch_sizes,
                                           c10::string_view nonlinearity, bool reverse, bool to_h0,
                                           bool full) {
  const Sizes sizes = check_sequence("phi", phi, batch_sizes);
  Call call(Pass::adjoint, phi, sizes, phi.size(-1), w_hh, alpha, keep, batch_sizes, nonlinearity,
            !reverse);
  Problem& p = call.problem;
  p.in[0] = call.series("g", g);
  p.in[1] = call.series("d", d);
  p.gate = call.series(phi);
  p.first = call.states("g_n", g_n);
  Tensor delta = call.new_sequence();
  Tensor to_first = to_h0 ? call.new_states() : call.nothing();
  Tensor a = full ? call.new_sequence() : call.nothing();
  p.out[0] = call.series(delta);
  if (full) p.out[1] = call.series(a);
  if (to_h0) p.last = call.states("dh0", to_first);
  call.run();
  return {delta, to_first, a};
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("activation", &activation);
  m.impl("tangent", &tangent);
  m.impl("adjoint", &adjoint);
}

}  // namespace fusedrnn::cpu
