// Backpropagation through time. On CPU tensors it is one call of the engine, if no derivative of
// the result can be requested. Otherwise it is the adjoint recurrence, followed by GEMMs over all
// rows that are built from torch ops. The ops of this file are composite: autograd, vmap and
// tracing see the ops that they consist of.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>

#include <array>

#include "checks.h"
#include "cpu/engine.h"
#include "cpu/recurrence_cpu.h"
#include "epilogues.h"
#include "forward_mode.h"
#ifdef FUSEDRNN_CUDA
#include "cuda/to_device.h"
#endif

namespace fusedrnn {
namespace {

Tensor rows(const Tensor& series) { return series.flatten(0, -2); }

// Σ aᵀ b over all rows, [A, B]. MKL takes twice as long for a narrow b as for a narrow a.
Tensor product_of_rows(const Tensor& a, const Tensor& b) {
  if (b.sym_size(-1) < a.sym_size(-1)) return at::mm(rows(b).t(), rows(a)).t().contiguous();
  return at::mm(rows(a).t(), rows(b));
}

// Returns the series with zeros where `reset` is true.
Tensor without_resets(const Tensor& series, const OptionalTensor& reset) {
  return reset ? at::where(reset->unsqueeze(-1), at::zeros_like(series), series) : series;
}

// Copies batch_sizes, a CPU tensor, to the device of the series that it describes.
Tensor beside(const Tensor& batch_sizes, const Tensor& series) {
  const c10::Device device = series.device();
#ifdef FUSEDRNN_CUDA
  // to_device is not an op, so it must not be called while tracing or a transform is active.
  const bool traced =
      batch_sizes.key_set().has(c10::DispatchKey::Python) ||
      c10::impl::TorchDispatchModeTLS::any_modes_set() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
  if (device.is_cuda() && !traced) return cuda::to_device(batch_sizes, device);
#endif
  return batch_sizes.to(device);
}

// For each packed row (t, b): the indices of rows (t-1, b) and (t+1, b), or -1 if there is no such
// row; and b. If `reverse`, t+1 and t-1.
struct Neighbours {
  Tensor previous, next, b;
};

Neighbours neighbours(const Tensor& batch_sizes, const Tensor& series, bool reverse) {
  const Tensor sizes = beside(batch_sizes, series);
  const c10::SymInt n = series.sym_size(0);
  const Tensor starts = sizes.cumsum(0) - sizes;
  const c10::SymInt T = sizes.sym_size(0);
  // repeat_interleave is faster, but it corrupts memory if the sizes do not sum to n, and only
  // readable sizes have been checked.
  const Tensor t = is_readable(batch_sizes)
                       ? at::arange(T, sizes.options()).repeat_interleave_symint(sizes, 0, n)
                       : at::searchsorted(starts + sizes, at::arange(n, sizes.options()),
                                          /*out_int32=*/false, /*right=*/true);
  const Tensor b = at::arange(n, sizes.options()) - starts.index_select(0, t);
  const Tensor before = (t - 1).clamp_min(0);
  const Tensor after = at::minimum(t + 1, at::full_like(t, 1) * T - 1);
  const Tensor earlier = at::where(t > 0, starts.index_select(0, before) + b, -1);
  const Tensor goes_on = (t < after).logical_and(b < sizes.index_select(0, after));
  const Tensor later = at::where(goes_on, starts.index_select(0, after) + b, -1);
  return reverse ? Neighbours{later, earlier, b} : Neighbours{earlier, later, b};
}

// Checks `first`, the [B, H] state before the first step of the series. `batch` is the B that
// check_series returned.
void check_first(const char* name, const OptionalTensor& first,
                 const std::optional<c10::SymInt>& batch, const Tensor& series) {
  if (!first) return;
  TORCH_CHECK(first->dim() == 2, "fusedrnn: ", name, " must be [B, H], got ", first->sym_sizes());
  check_like(name, *first, {batch.value_or(first->sym_size(0)), series.sym_size(-1)}, series);
}

// The sizes of `series`, with `size` as the last one.
at::SymDimVector rows_like(const Tensor& series, const c10::SymInt& size) {
  at::SymDimVector sizes(series.sym_sizes());
  sizes.back() = size;
  return sizes;
}

// series[t-1] for every t, or 0 where reset[t]: the state that step t starts from. series[-1] is
// `first` (or 0). If `reverse`, steps run from T-1 down to 0, and t-1 becomes t+1.
Tensor previous(const Tensor& series, const OptionalTensor& first, const OptionalTensor& reset,
                const OptionalTensor& batch_sizes, bool reverse) {
  check_first("first", first, check_series("series", series, reset, batch_sizes), series);
  if (!batch_sizes) {
    const Tensor ends = (first ? *first : at::zeros_like(series.select(0, 0))).unsqueeze(0);
    // No conditional operator between two lists: g++ 12 destroys both when cat throws.
    const Tensor one = reverse ? series.slice(0, 1) : ends;
    const Tensor other = reverse ? ends : series.slice(0, 0, -1);
    return without_resets(at::cat({one, other}), reset);
  }
  const auto [before, after, b] = neighbours(*batch_sizes, series, reverse);
  const Tensor ends = first ? *first : at::zeros_like(series.slice(0, 0, 1));
  const Tensor end = at::full_like(b, 1) * series.sym_size(0) + (first ? b : at::zeros_like(b));
  return without_resets(at::cat({series, ends}).index_select(0, at::where(before < 0, end, before)),
                        reset);
}

// series[t+1] for every t, or 0 where reset[t+1] and after the last step: the transpose of
// `previous`.
Tensor following(const Tensor& series, const OptionalTensor& reset,
                 const OptionalTensor& batch_sizes, bool reverse) {
  check_series("series", series, reset, batch_sizes);
  const Tensor masked = without_resets(series, reset);
  const Tensor zeros = at::zeros_like(masked.slice(0, 0, 1));
  if (!batch_sizes) {
    const Tensor one = reverse ? zeros : masked.slice(0, 1);
    const Tensor other = reverse ? masked.slice(0, 0, -1) : zeros;
    return at::cat({one, other});
  }
  const auto [before, after, b] = neighbours(*batch_sizes, series, reverse);
  const Tensor end = at::full_like(b, 1) * series.sym_size(0);
  return at::cat({masked, zeros}).index_select(0, at::where(after < 0, end, after));
}

// series[t] of each row's first step t, the step that starts from h0; or 0 where reset[t]. `batch`
// is B.
Tensor following_first(const Tensor& series, const OptionalTensor& reset,
                       const OptionalTensor& batch_sizes, bool reverse, c10::SymInt batch) {
  const c10::SymInt rows = check_series("series", series, reset, batch_sizes).value_or(batch);
  TORCH_SYM_CHECK(batch.sym_eq(rows), "fusedrnn: batch must be ", rows, ", got ", batch);
  const Tensor masked = without_resets(series, reset);
  if (!batch_sizes) return masked.select(0, reverse ? -1 : 0);
  if (!reverse) return masked.slice_symint(0, 0, batch);
  const Tensor sizes = beside(*batch_sizes, series);
  const Tensor b = at::arange(batch, sizes.options());
  const Tensor lengths = (sizes.unsqueeze(1) > b).sum(0);
  const Tensor starts = sizes.cumsum(0) - sizes;
  return masked.index_select(0, starts.index_select(0, lengths - 1) + b);
}

// Σ_t δ[t]ᵀ previous[t], the gradient of W_hh.
Tensor recurrent_product(const Tensor& delta, const Tensor& series, const OptionalTensor& first,
                         const OptionalTensor& reset, const OptionalTensor& batch_sizes,
                         bool reverse) {
  const auto batch = check_series("series", series, reset, batch_sizes);
  check_first("first", first, batch, series);
  check_rank("delta", delta, batch_sizes.has_value());
  check_like("delta", delta, rows_like(series, delta.sym_size(-1)), series);
  if (reset || batch_sizes)
    return product_of_rows(delta, previous(series, first, reset, batch_sizes, reverse));
  // The same, without copying the series.
  const Tensor deltas = rows(delta), states = rows(series);
  const c10::SymInt end = states.sym_size(0) - *batch;
  const Tensor others = reverse ? deltas.slice_symint(0, 0, end) : deltas.slice_symint(0, *batch);
  const Tensor before = reverse ? states.slice_symint(0, *batch) : states.slice_symint(0, 0, end);
  if (!first) return product_of_rows(others, before);
  const Tensor product = at::mm(delta.select(0, reverse ? -1 : 0).t(), *first);
  if (delta.sym_size(0) == 1) return product;
  return at::addmm(product, others.t(), before);
}

using AdjointOp = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, c10::string_view, c10::string_view, bool, std::optional<double>, bool,
    bool);

// Whether no derivative of the result can be requested: no grad mode, transform or dual tensor.
bool is_final(const Tensor& saved, const Tensor& w_hh,
              std::initializer_list<const OptionalTensor*> others) {
  const auto dual = [](const Tensor& t) { return t._fw_grad(0).defined(); };
  if (c10::GradMode::is_enabled() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
      dual(saved) || dual(w_hh))
    return false;
  for (const OptionalTensor* other : others)
    if (*other && dual(**other)) return false;
  return true;
}

// Whether the engine may read the memory of the tensors: none is fake, wrapped, batched or on
// another device, and no dispatch mode records the ops.
bool is_plain(std::initializer_list<const Tensor*> tensors,
              std::initializer_list<const OptionalTensor*> others) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  for (const Tensor* tensor : tensors)
    if (!is_readable(*tensor)) return false;
  for (const OptionalTensor* other : others)
    if (*other && !is_readable(**other)) return false;
  return true;
}

// Whether the engine also computes the GEMMs.
bool multiplies(const Tensor& h, const OptionalTensor& w_ih) {
  const std::optional<Storage> storage = storage_of(h.scalar_type());
  const int64_t H = h.size(-1);
  return storage && cpu::multiplies_as_fast(cpu::instruction_set(), *storage,
                                            H * H + (w_ih ? w_ih->numel() : 0));
}

// φ(z), computed from the `saved` of activation. Above the threshold of 40, softplus(z) is z; this
// makes it as accurate as in epilogues.h.
Tensor value_of(const Tensor& saved, Nonlinearity nonlinearity) {
  if (nonlinearity == Nonlinearity::softplus) return at::softplus(saved, 1, 40);
  return nonlinearity == Nonlinearity::elu ? at::elu(saved) : saved;
}

// Computes the `wanted` gradients of activation's arguments x, w_ih, b_ih, b_hh, h0, v0, w_hh,
// alpha and q. g and g_n are the gradients of its results h and last. The gradient of its result
// `saved` is passed as f or, with the form rate, as d: the gradient of z that follows from it.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bptt(
    const OptionalTensor& g, const OptionalTensor& d, const OptionalTensor& f,
    const OptionalTensor& g_n, const Tensor& x, const OptionalTensor& w_ih,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& h0,
    const OptionalTensor& v0, const Tensor& w_hh, const OptionalTensor& alpha,
    const OptionalTensor& reset, const OptionalTensor& batch_sizes, const Tensor& h,
    const OptionalTensor& saved, c10::string_view nonlinearity_name, c10::string_view form_name,
    bool reverse, std::optional<double> grad_clip, std::array<bool, 9> wanted) {
  static const auto adjoint =
      c10::Dispatcher::singleton().findSchemaOrThrow("fusedrnn::adjoint", "").typed<AdjointOp>();
  const auto [to_x, to_w_ih, to_b_ih, to_b_hh, to_h0, to_v0, to_w_hh, to_alpha, to_q] = wanted;
  const Nonlinearity nonlinearity = nonlinearity_named(nonlinearity_name);
  const Form form = form_named(form_name);
  // The checks that `adjoint` does not make.
  const auto batch = check_series("h", h, reset, batch_sizes);
  check_first("h0", h0, batch, h);
  check_first("v0", v0, batch, h);
  check_only_of_potential("v0", v0, form);
  check_rank("x", x, batch_sizes.has_value());
  check_like("x", x, rows_like(h, w_ih ? x.sym_size(-1) : h.sym_size(-1)), h);
  check_like("w_ih", w_ih, {h.sym_size(-1), x.sym_size(-1)}, h);
  check_like("b_ih", b_ih, {h.sym_size(-1)}, h);
  check_like("b_hh", b_hh, {h.sym_size(-1)}, h);
  check_like("saved", saved, h.sym_sizes(), h);
  const bool from_saved = saved && (saves_z(nonlinearity) || form == Form::rate);
  TORCH_CHECK(
      saved || !(saves_z(nonlinearity) || form == Form::potential || (form == Form::rate && alpha)),
      "fusedrnn: saved must be given with alpha, elu, softplus and potential, got None");
  TORCH_CHECK(w_ih || !to_w_ih, "fusedrnn: w_ih must be given for its gradient, got None");
  TORCH_CHECK(alpha || !to_alpha, "fusedrnn: alpha must be given for its gradient, got None");
  const Tensor slope_of = from_saved ? *saved : h;
  const bool final = is_final(slope_of, w_hh, {&g, &d, &f, &g_n});
  Tensor dx, dw_ih, db, dw_hh, dh0, dv0, dalpha, a;
  if (final &&
      is_plain({&x, &w_hh, &h, &slope_of},
               {&g, &d, &f, &g_n, &w_ih, &h0, &alpha, &reset, &batch_sizes}) &&
      multiplies(h, w_ih)) {
    cpu::BackwardResults all =
        cpu::backward(g, d, f, g_n, slope_of, x, w_ih, h, h0, w_hh, alpha, reset, batch_sizes,
                      nonlinearity_name, form_name, reverse, grad_clip,
                      {to_x, to_w_ih, to_b_ih || to_b_hh, to_h0, to_v0, to_w_hh, to_alpha || to_q});
    dx = all.x, dw_ih = all.w_ih, db = all.b, dw_hh = all.w_hh;
    dh0 = all.h0, dv0 = all.v0, a = all.a;
  } else {
    Tensor delta, y;
    std::tie(delta, dh0, dv0, a, y) =
        adjoint.call(g, d, f, g_n, slope_of, w_hh, alpha, reset, batch_sizes, nonlinearity_name,
                     form_name, reverse, grad_clip, to_h0 || to_v0, to_alpha || to_q);
    if (to_x) dx = w_ih ? at::matmul(delta, *w_ih) : delta;
    if (to_w_ih) dw_ih = product_of_rows(delta, x);
    if (to_b_ih || to_b_hh) db = rows(delta).sum(0);
    if (to_w_hh) dw_hh = recurrent_product(delta, h, h0, reset, batch_sizes, reverse);
  }
  if (to_alpha) {
    const Tensor before = previous(h, h0, reset, batch_sizes, reverse);
    Tensor k = before, leaked;  // the state is (1 - α) k + α leaked
    if (form == Form::rate) {
      leaked = value_of(*saved, nonlinearity);
    } else {
      leaked = (w_ih ? at::matmul(x, w_ih->t()) : x) + at::matmul(before, w_hh.t());
      if (b_ih) leaked = leaked + *b_ih;
      if (b_hh) leaked = leaked + *b_hh;
      if (form == Form::potential) k = previous(*saved, v0, reset, batch_sizes, reverse);
    }
    dalpha = a * (leaked - k);
    if (alpha->dim() == 1) dalpha = rows(dalpha).sum(0);
  }
  // Return separate tensors, because callers may scale gradients in place.
  const Tensor db_hh = !to_b_hh ? Tensor() : to_b_ih ? db.clone() : db;
  return {
      dx,    dw_ih,  to_b_ih ? db : Tensor(), db_hh, to_h0 ? dh0 : Tensor(), to_v0 ? dv0 : Tensor(),
      dw_hh, dalpha, to_q ? a : Tensor()};
}

void implement(torch::Library& m) {
  m.impl("bptt", &bptt);
  m.impl("previous", &previous);
  m.impl("following", &following);
  m.impl("following_first", &following_first);
  m.impl("recurrent_product", &recurrent_product);
}

}  // namespace

bool forward_mode() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr; }

TORCH_LIBRARY_IMPL(fusedrnn, CompositeImplicitAutograd, m) { implement(m); }
TORCH_LIBRARY_IMPL(fusedrnn, FuncTorchBatchedDecomposition, m) { implement(m); }  // vmap

}  // namespace fusedrnn
