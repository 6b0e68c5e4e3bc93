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
       const Tensor& w_hh, const OptionalTensor& alpha, const OptionalTensor& keep,
       const OptionalTensor& batch_sizes, c10::string_view nonlinearity, bool descending)
      : like(like), dtype_(dtype), sizes_(sizes), packed_(batch_sizes) {
    const std::optional<Storage> storage = storage_of(dtype);
    TORCH_CHECK_TYPE(
        storage, "fusedrnn: the engine computes in float32, float64, bfloat16 and float16, got ",
        dtype);
    check_like("w_hh", w_hh, {H, H}, like);
    check_like("alpha", alpha, {H}, like);
    check_keep(keep, like);
    problem.pass = pass;
    problem.nonlinearity = nonlinearity_named(nonlinearity);
    problem.storage = *storage;
    problem.T = sizes.T;
    problem.B = sizes.B;
    problem.I = 0;
    problem.H = H;
    problem.descending = descending;
    if (packed_) problem.batch_sizes = batch_sizes->const_data_ptr<int64_t>();
    if (keep) problem.keep = static_cast<const bool*>(hold(keep->contiguous()));
    problem.w_hh = matrix(dense(w_hh), problem.w_hh_row);
    problem.alpha = vector("alpha", alpha);
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

  // Allocate a result for the engine to write, or an empty tensor if it is not wanted.
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
  using Results = std::tuple<Tensor, Tensor, Tensor>;

  static Results activation(const Tensor& x, const OptionalTensor& w_ih, const OptionalTensor& b_ih,
                            const OptionalTensor& b_hh, const OptionalTensor& h0,
                            const Tensor& w_hh, const OptionalTensor& alpha,
                            const OptionalTensor& keep, const OptionalTensor& batch_sizes,
                            c10::string_view nonlinearity, bool reverse) {
    const Sizes sizes = check_sequence("x", x, batch_sizes);
    TORCH_CHECK(w_hh.dim() == 2, "fusedrnn: w_hh must be [H, H], got ", w_hh.sizes());
    Call call(Pass::activation, x, Engine::dtype(x), sizes, w_hh.size(0), w_hh, alpha, keep,
              batch_sizes, nonlinearity, reverse);
    check_alpha(alpha);
    Problem& p = call.problem;
    if (w_ih) {
      call.input(x, *w_ih);
    } else {
      p.in[0] = call.series("u", x);
    }
    p.b_ih = call.vector("b_ih", b_ih);
    p.b_hh = call.vector("b_hh", b_hh);
    p.first = call.states("h0", h0);
    const Tensor h = call.to(p.out[0]), h_n = call.to(p.last);
    const Tensor saved = call.to(p.out[1], alpha.has_value() || saves_z(p.nonlinearity));
    return run(call, h, h_n, saved);
  }

  static Results tangent(const OptionalTensor& w, const OptionalTensor& q, const OptionalTensor& s0,
                         const Tensor& saved, const Tensor& w_hh, const OptionalTensor& alpha,
                         const OptionalTensor& keep, const OptionalTensor& batch_sizes,
                         c10::string_view nonlinearity, bool reverse, bool full) {
    const Sizes sizes = check_sequence("saved", saved, batch_sizes);
    Call call(Pass::tangent, saved, Engine::dtype(saved), sizes, saved.size(-1), w_hh, alpha, keep,
              batch_sizes, nonlinearity, reverse);
    return linear(call, {"w", "q", "s0"}, w, q, s0, saved, true, full);
  }

  static Results adjoint(const OptionalTensor& g, const OptionalTensor& d,
                         const OptionalTensor& g_n, const Tensor& saved, const Tensor& w_hh,
                         const OptionalTensor& alpha, const OptionalTensor& keep,
                         const OptionalTensor& batch_sizes, c10::string_view nonlinearity,
                         bool reverse, bool to_h0, bool full) {
    const Sizes sizes = check_sequence("saved", saved, batch_sizes);
    Call call(Pass::adjoint, saved, Engine::dtype(saved), sizes, saved.size(-1), w_hh, alpha, keep,
              batch_sizes, nonlinearity, !reverse);
    return linear(call, {"g", "d", "g_n"}, g, d, g_n, saved, to_h0, full);
  }

  static void add_to(torch::Library& library) {
    library.impl("activation", &activation);
    library.impl("tangent", &tangent);
    library.impl("adjoint", &adjoint);
  }

 private:
  // The common part of tangent and adjoint, which are transposes of each other.
  static Results linear(Call& call, std::array<const char*, 3> names, const OptionalTensor& in,
                        const OptionalTensor& other, const OptionalTensor& first,
                        const Tensor& saved, bool with_last, bool full) {
    Problem& p = call.problem;
    p.in[0] = call.series(names[0], in);
    p.in[1] = call.series(names[1], other);
    p.gate = call.series("saved", saved);
    p.first = call.states(names[2], first);
    const Tensor out = call.to(p.out[0]), last = call.to(p.last, with_last);
    const Tensor second = call.to(p.out[1], full);
    return run(call, out, last, second);
  }

  static Results run(Call& call, const Tensor& a, const Tensor& b, const Tensor& c) {
    if (!call.is_empty()) Engine::run(call);
    return {call.returned(a), call.returned(b), call.returned(c)};
  }
};

}  // namespace fusedrnn
