// The ops on tensors, shared by CPU and CUDA. They check the arguments and build a Problem, which
// an engine runs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "epilogues.h"

namespace fusedrnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::optional<Storage> storage_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Storage::f32;
    case at::kDouble: return Storage::f64;
    case at::kBFloat16: return Storage::bf16;
    case at::kHalf: return Storage::f16;
    default: return std::nullopt;
  }
}

// A Problem and the tensors that own its memory. A tensor is copied only if its last dimension is
// not dense or if the engine computes in another dtype.
class Call {
 public:
  Call(Pass pass, const Tensor& like, at::ScalarType dtype, const Sizes& sizes, int64_t H,
       const Tensor& w_hh, const OptionalTensor& alpha, const OptionalTensor& reset,
       const OptionalTensor& batch_sizes, c10::string_view nonlinearity, c10::string_view form,
       bool descending)
      : like(like), dtype_(dtype), sizes_(sizes), packed_(batch_sizes) {
    const std::optional<Storage> storage = storage_of(dtype);
    TORCH_CHECK_TYPE(
        storage, "fusedrnn: the engine computes in float32, float64, bfloat16 and float16, got ",
        dtype);
    check_like("w_hh", w_hh, {H, H}, like);
    check_reset(reset, like);
    problem.pass = pass;
    problem.nonlinearity = nonlinearity_named(nonlinearity);
    problem.form = form_named(form);
    problem.storage = *storage;
    problem.T = sizes.T;
    problem.B = sizes.B;
    problem.I = 0;
    problem.H = H;
    problem.descending = descending;
    if (packed_) problem.batch_sizes = batch_sizes->const_data_ptr<int64_t>();
    if (reset) problem.reset = static_cast<const bool*>(hold(reset->contiguous()));
    problem.w_hh = matrix(dense(w_hh), problem.w_hh_row);
    if (alpha && alpha->dim() == 1)
      problem.alpha = {const_cast<void*>(vector("alpha", alpha)), 0, 0};
    else
      problem.alpha = series("alpha", alpha);
  }

  // From an optional [T, B, H] tensor.
  Series series(const char* name, const OptionalTensor& tensor) {
    if (!tensor) return {};
    check_like(name, *tensor, c10::fromIntArrayRefSlow(sequence_sizes()), like);
    return series(dense(*tensor));
  }

  // From an optional [B, H] tensor.
  States states(const char* name, const OptionalTensor& tensor) {
    if (!tensor) return {};
    check_like(name, *tensor, {sizes_.B, problem.H}, like);
    return states(dense(*tensor));
  }

  // From an optional [B, H] tensor that only the form "potential" has.
  States potentials(const char* name, const OptionalTensor& tensor) {
    check_only_of_potential(name, tensor, problem.form);
    return states(name, tensor);
  }

  // From an optional [H] tensor.
  const void* vector(const char* name, const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    check_like(name, *tensor, {problem.H}, like);
    return hold(computed(tensor->contiguous()));
  }

  void input(const Tensor& x, const Tensor& w_ih) {
    problem.I = x.size(-1);
    check_like("w_ih", w_ih, {problem.H, problem.I}, like);
    this->x = dense(x);
    this->w_ih = dense(w_ih);
    problem.w_ih = matrix(this->w_ih, problem.w_ih_row);
    problem.x = series(this->x);
  }

  // Replaces x by u [T, B, H] = x W_ihᵀ, computed beforehand, as the input of the engine.
  void project(const Tensor& u) {
    problem.I = 0;
    problem.w_ih = nullptr;
    problem.x = {};
    problem.in[0] = series(u);
  }

  // Allocates a result for the engine to write, or an empty tensor if it is not wanted.
  Tensor to(Series& where, bool wanted = true) {
    const Tensor result = new_tensor(wanted, sequence_sizes());
    if (wanted) where = series(result);
    return result;
  }
  Tensor to(States& where, bool wanted = true) {
    const Tensor result = new_tensor(wanted, {sizes_.B, problem.H});
    if (wanted) where = states(result);
    return result;
  }

  // Converts a result to the dtype of the arguments.
  Tensor returned(const Tensor& result) const {
    return result.scalar_type() == like.scalar_type() ? result : result.to(like.scalar_type());
  }

  bool is_empty() const { return problem.B == 0 || problem.H == 0; }

  Problem problem;
  Tensor x, w_ih;  // set if problem.I > 0
  const Tensor& like;

 private:
  Tensor computed(const Tensor& t) const { return t.scalar_type() == dtype_ ? t : t.to(dtype_); }

  Tensor dense(const Tensor& t) const {
    return computed(t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous());
  }

  Tensor new_tensor(bool wanted, at::IntArrayRef sizes) const {
    return at::empty(wanted ? sizes : at::IntArrayRef{0}, like.options().dtype(dtype_));
  }

  Series series(const Tensor& t) {
    return {const_cast<void*>(hold(t)), packed_ ? 0 : t.stride(0),
            packed_ ? t.stride(0) : t.stride(1)};
  }

  States states(const Tensor& t) { return {const_cast<void*>(hold(t)), t.stride(0)}; }

  const void* matrix(const Tensor& t, int64_t& row) {
    row = t.stride(0);
    return hold(t);
  }

  const void* hold(const Tensor& t) {
    held_.push_back(t);
    return t.const_data_ptr();
  }

  at::DimVector sequence_sizes() const {
    if (packed_) return {sizes_.rows, problem.H};
    return {sizes_.T, sizes_.B, problem.H};
  }

  const at::ScalarType dtype_;
  const Sizes sizes_;
  const bool packed_;
  std::vector<Tensor> held_;
};

// The kernels of the ops. An Engine has
//   static at::ScalarType dtype(const Tensor& like)  the compute dtype for tensors like this one
//   static void run(Call&)                           called only if B and H are at least 1
template <class Engine>
struct Ops {
  static std::tuple<Tensor, Tensor, Tensor> activation(
      const Tensor& x, const OptionalTensor& w_ih, const OptionalTensor& b_ih,
      const OptionalTensor& b_hh, const OptionalTensor& h0, const OptionalTensor& v0,
      const Tensor& w_hh, const OptionalTensor& alpha, const OptionalTensor& q,
      const OptionalTensor& reset, const OptionalTensor& batch_sizes, c10::string_view nonlinearity,
      c10::string_view form, bool reverse, std::optional<double> grad_clip) {
    check_grad_clip(grad_clip);
    const Sizes sizes = check_sequence("x", x, batch_sizes);
    TORCH_CHECK(w_hh.dim() == 2, "fusedrnn: w_hh must be [H, H], got ", w_hh.sizes());
    Call call(Pass::activation, x, Engine::dtype(x), sizes, w_hh.size(0), w_hh, alpha, reset,
              batch_sizes, nonlinearity, form, reverse);
    check_alpha(alpha);
    Problem& p = call.problem;
    if (w_ih) {
      call.input(x, *w_ih);
    } else {
      p.in[0] = call.series("u", x);
    }
    p.b_ih = call.vector("b_ih", b_ih);
    p.b_hh = call.vector("b_hh", b_hh);
    p.in[1] = call.series("q", q);
    p.first = call.states("h0", h0);
    p.first_carry = call.potentials("v0", v0);
    const Tensor h = call.to(p.out[0]), last = call.to(p.last);
    // Backward computes the slope from h if it can, otherwise from `saved`. The potential is always
    // returned.
    const bool h_is_phi = p.form != Form::rate || !(alpha || q);
    const Tensor saved =
        call.to(p.out[1], saves_z(p.nonlinearity) || p.form == Form::potential || !h_is_phi);
    run(call);
    return {call.returned(h), call.returned(last), call.returned(saved)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> tangent(
      const OptionalTensor& w, const OptionalTensor& q, const OptionalTensor& r,
      const OptionalTensor& s0, const OptionalTensor& v0, const Tensor& saved, const Tensor& w_hh,
      const OptionalTensor& alpha, const OptionalTensor& reset, const OptionalTensor& batch_sizes,
      c10::string_view nonlinearity, c10::string_view form, bool reverse, bool full) {
    const Sizes sizes = check_sequence("saved", saved, batch_sizes);
    Call call(Pass::tangent, saved, Engine::dtype(saved), sizes, saved.size(-1), w_hh, alpha, reset,
              batch_sizes, nonlinearity, form, reverse);
    take(call, {"w", "q", "r"}, {w, q, r}, saved);
    Problem& p = call.problem;
    p.first = call.states("s0", s0);
    p.first_carry = call.potentials("v0", v0);
    const Tensor e = call.to(p.out[0]), last = call.to(p.last), m = call.to(p.out[1], full);
    const Tensor s = call.to(p.out[2], full && p.form != Form::rate);
    run(call);
    return {call.returned(e), call.returned(last), call.returned(m), call.returned(s)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adjoint(
      const OptionalTensor& g, const OptionalTensor& d, const OptionalTensor& f,
      const OptionalTensor& g_n, const Tensor& saved, const Tensor& w_hh,
      const OptionalTensor& alpha, const OptionalTensor& reset, const OptionalTensor& batch_sizes,
      c10::string_view nonlinearity, c10::string_view form, bool reverse,
      std::optional<double> grad_clip, bool to_h0, bool full) {
    Call call = adjoint_call(g, d, f, g_n, saved, w_hh, alpha, reset, batch_sizes, nonlinearity,
                             form, reverse, grad_clip);
    Problem& p = call.problem;
    const Tensor delta = call.to(p.out[0]), dh0 = call.to(p.last, to_h0);
    const Tensor dv0 = call.to(p.last_carry, to_h0 && p.form == Form::potential);
    const Tensor a = call.to(p.out[1], full);
    const Tensor y = call.to(p.out[2], full && p.form != Form::rate);
    run(call);
    return {call.returned(delta), call.returned(dh0), call.returned(dv0), call.returned(a),
            call.returned(y)};
  }

  // The call of an adjoint, before its results are allocated.
  static Call adjoint_call(const OptionalTensor& g, const OptionalTensor& d,
                           const OptionalTensor& f, const OptionalTensor& g_n, const Tensor& saved,
                           const Tensor& w_hh, const OptionalTensor& alpha,
                           const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                           c10::string_view nonlinearity, c10::string_view form, bool reverse,
                           std::optional<double> grad_clip) {
    check_grad_clip(grad_clip);
    const Sizes sizes = check_sequence("saved", saved, batch_sizes);
    Call call(Pass::adjoint, saved, Engine::dtype(saved), sizes, saved.size(-1), w_hh, alpha, reset,
              batch_sizes, nonlinearity, form, !reverse);
    take(call, {"g", "d", "f"}, {g, d, f}, saved);
    call.problem.first = call.states("g_n", g_n);
    if (grad_clip) call.problem.grad_clip = *grad_clip;
    return call;
  }

  static void add_to(torch::Library& library) {
    library.impl("activation", &activation);
    library.impl("tangent", &tangent);
    library.impl("adjoint", &adjoint);
  }

 private:
  static void take(Call& call, std::array<const char*, 3> names,
                   std::array<OptionalTensor, 3> series, const Tensor& saved) {
    Problem& p = call.problem;
    TORCH_CHECK(p.form != Form::rate || !series[2], "fusedrnn: ", names[2],
                " must be None with the form rate");
    for (size_t i = 0; i < 3; ++i) p.in[i] = call.series(names[i], series[i]);
    p.gate = call.series("saved", saved);
  }

  static void run(Call& call) {
    if (!call.is_empty()) Engine::run(call);
  }
};

}  // namespace fusedrnn
