// One time step of a stack of layers, for samples that arrive one by one. On CPU tensors it is one
// call of the engine per layer, if no other code must see what it consists of. Otherwise it is the
// op `activation` for each layer, which autograd, autocast, vmap and tracing see.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cores.h"
#include "cpu/engine.h"
#include "forward_mode.h"
#include "ops.h"

namespace fusedrnn {
namespace {

using ActivationOp = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, c10::string_view,
    c10::string_view, bool, std::optional<double>);

// The weights of one layer, from the op's list for all layers.
struct Weights {
  Weights(at::TensorList all, int64_t layers, int64_t layer) {
    const size_t count = size_t(layers), each = all.size() / count, leaky = each % 2;
    const Tensor* own = &all[size_t(layer) * (each - leaky)];
    w_ih = own;
    w_hh = own + 1;
    if (each > 3) b_ih = own + 2, b_hh = own + 3;
    if (leaky) alpha = &all[count * (each - 1) + size_t(layer)];
  }

  const Tensor *w_ih, *w_hh, *b_ih = nullptr, *b_hh = nullptr, *alpha = nullptr;
};

// Whether no code must see the ops: no autograd, autocast, transform, dispatch mode or tracer.
bool is_unobserved() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return !c10::GradMode::is_enabled() && !forward_mode() &&
         keys.excluded_.has(c10::DispatchKey::AutocastCPU) &&
         (keys.included_ - c10::default_included_set).empty();
}

// Whether the engine can read the tensor, which must have these sizes, where it is.
bool fits(const Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype) {
  return is_readable(t) && t.scalar_type() == dtype && t.sizes() == sizes &&
         (sizes.back() == 1 || t.stride(-1) == 1);
}

// Computes the step by the engine, or returns nullopt if the arguments are not plain tensors of the
// right sizes, or more threads or packed weights would save time.
std::optional<std::tuple<Tensor, Tensor>> step_directly(const Tensor& x, const Tensor& h0,
                                                        at::TensorList weights,
                                                        Nonlinearity nonlinearity, Form form,
                                                        const OptionalTensor& v0) {
  if (!cpu::shortcuts_allowed() || !is_unobserved() || !is_readable(x) || !is_readable(h0))
    return std::nullopt;
  const at::ScalarType dtype = x.scalar_type();
  const std::optional<Storage> storage = storage_of(dtype);
  const bool batched = x.dim() == 2, potential = form == Form::potential;
  const int64_t layers = h0.size(0), B = batched ? x.size(0) : 1, I = x.size(-1), H = h0.size(-1);
  const int64_t widest = layers > 1 ? std::max(I, H) : I;
  at::DimVector state_sizes{layers, B, H}, output_sizes{B, H};
  if (!batched) {
    state_sizes.erase(state_sizes.begin() + 1);
    output_sizes.erase(output_sizes.begin());
  }
  if (!storage || B < 1 || I < 1 || H < 1 || !fits(x, x.sizes(), dtype) ||
      !fits(h0, state_sizes, dtype) || v0.has_value() != potential ||
      (v0 && !fits(*v0, state_sizes, dtype)) ||
      !cpu::step_takes_one_thread(*storage, B, widest, H, cpu::num_threads()))
    return std::nullopt;
  for (int64_t i = 0; i < layers; ++i) {
    const Weights w(weights, layers, i);
    if (!fits(*w.w_ih, {H, i ? H : I}, dtype) || !fits(*w.w_hh, {H, H}, dtype) ||
        (w.b_ih && (!fits(*w.b_ih, {H}, dtype) || !fits(*w.b_hh, {H}, dtype))))
      return std::nullopt;
    if (!w.alpha) continue;
    if (!is_readable(*w.alpha) || w.alpha->scalar_type() != dtype ||
        (w.alpha->dim() != 0 && !fits(*w.alpha, {H}, dtype)))
      return std::nullopt;
    check_alpha(*w.alpha);
  }

  const Tensor y = at::detail::empty_cpu(output_sizes, dtype);
  const Tensor state = at::detail::empty_cpu(state_sizes, dtype);
  const auto data = [](const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); };
  const auto layer_of = [&](const Tensor& states, int64_t i) {
    void* first = static_cast<char*>(data(states)) + i * states.stride(0) * size_of(*storage);
    return States{first, batched ? states.stride(1) : H};
  };
  Problem p{};
  p.pass = Pass::activation;
  p.nonlinearity = nonlinearity;
  p.form = form;
  p.storage = *storage;
  p.T = 1;
  p.B = B;
  p.H = H;
  p.out[0] = {data(y), 0, H};
  for (int64_t i = 0; i < layers; ++i) {
    const Weights w(weights, layers, i);
    p.I = i ? H : I;
    p.x = i ? p.out[0] : Series{data(x), 0, batched ? x.stride(0) : I};
    p.w_ih = data(*w.w_ih);
    p.w_ih_row = w.w_ih->stride(0);
    p.w_hh = data(*w.w_hh);
    p.w_hh_row = w.w_hh->stride(0);
    p.b_ih = w.b_ih ? data(*w.b_ih) : nullptr;
    p.b_hh = w.b_ih ? data(*w.b_hh) : nullptr;
    p.alpha.data = w.alpha ? data(*w.alpha) : nullptr;
    p.first = layer_of(h0, i);
    if (v0) p.first_carry = layer_of(*v0, i);
    p.last = layer_of(state, i);
    cpu::step(p, w.alpha && w.alpha->dim() == 0 ? 1 : H);
  }
  return std::tuple(y, state);
}

std::tuple<Tensor, Tensor> step(const Tensor& x, const Tensor& h0, at::TensorList weights,
                                c10::string_view nonlinearity, c10::string_view form,
                                const OptionalTensor& v0) {
  static const auto activation = c10::Dispatcher::singleton()
                                     .findSchemaOrThrow("fusedrnn::activation", "")
                                     .typed<ActivationOp>();
  TORCH_CHECK(x.dim() == 1 || x.dim() == 2, "fusedrnn: x must be [B, I] or [I], got ",
              x.sym_sizes());
  const bool batched = x.dim() == 2;
  const auto check_states = [&](const char* name, const Tensor& states) {
    TORCH_CHECK(states.dim() == x.dim() + 1, "fusedrnn: ", name, " must be ",
                batched ? "[L, B, H]" : "[L, H]", ", got ", states.sym_sizes());
  };
  check_states("h0", h0);
  if (v0) check_states("v0", *v0);
  const int64_t layers = h0.sym_size(0).guard_int(__FILE__, __LINE__);
  const size_t each = layers > 0 ? weights.size() / size_t(layers) : 0;
  TORCH_CHECK(each >= 2 && each <= 5 && each * size_t(layers) == weights.size(),
              "fusedrnn: weights must be 2 to 5 tensors for each of the ", layers,
              " layers of h0, got ", weights.size());
  if (auto results =
          step_directly(x, h0, weights, nonlinearity_named(nonlinearity), form_named(form), v0))
    return *results;

  const auto optional = [](const Tensor* t) { return t ? OptionalTensor(*t) : std::nullopt; };
  const auto layer_of = [&](const Tensor& all, int64_t i) {
    return batched ? all.select(0, i) : all.narrow(0, i, 1);
  };
  std::vector<Tensor> states;
  Tensor h = batched ? x.unsqueeze(0) : x.expand({1, 1, -1}), last;
  for (int64_t i = 0; i < layers; ++i) {
    const Weights w(weights, layers, i);
    OptionalTensor alpha = optional(w.alpha);
    if (alpha && alpha->dim() == 0) alpha = alpha->expand_symint({h0.sym_size(-1)});
    std::tie(h, last, std::ignore) = activation.call(
        h, *w.w_ih, optional(w.b_ih), optional(w.b_hh), layer_of(h0, i),
        v0 ? OptionalTensor(layer_of(*v0, i)) : std::nullopt, *w.w_hh, alpha, std::nullopt,
        std::nullopt, std::nullopt, nonlinearity, form, false, std::nullopt);
    states.push_back(batched ? last.unsqueeze(0) : last);
  }
  const Tensor y = h.select(0, 0);
  return {batched ? y : y.select(0, 0), layers == 1 ? states[0] : at::cat(states)};
}

void implement(torch::Library& m) { m.impl("step", &step); }

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CompositeImplicitAutograd, m) { implement(m); }
TORCH_LIBRARY_IMPL(fusedrnn, FuncTorchBatchedDecomposition, m) { implement(m); }  // vmap

}  // namespace fusedrnn
