// Computes a step for one unit of one row, and the addresses of what the step loads and stores.
// Shared by the kernels that keep weights on the chip (persistent.cuh, plain.cuh) and the kernel
// that does not (step.cuh).
#pragma once

#include "exchange.cuh"
#include "numbers.cuh"
#include "params.h"

namespace fusedrnn::cuda {

// How many steps ahead data is prefetched into L2: together they take at least as long as a load
// from memory. 0 from architecture 10.0 on, where the compiler would spill registers for it.
#if __CUDA_ARCH__ < 1000
constexpr int kFar = 8;
#else
constexpr int kFar = 0;
#endif

// The index of this block's batch group (plan.h).
__device__ __forceinline__ unsigned batch_group(const Params& p) {
  return unsigned(p.first_batch_group) + blockIdx.x / unsigned(p.blocks);
}

// A step of the time loop: where its rows are, and how many there are.
struct Step {
  int64_t t;
  int64_t offset;  // packed: number of rows before step t
  int active;      // how many of this layer's rows b0, b0 + 1, ... have a step t
};

// N numbers that are loaded or stored together.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T v[N];
};

// The unsigned integer of `bytes` bytes.
template <int bytes>
struct Word {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<8> {
  using type = uint64_t;
};

// The part of a layer that a block computes: batch rows from b0 on and hidden units from j0 on, N
// neighbouring units at a time.
template <class S, Pass pass, int N>
struct Layer {
  using C = Computed<S>;
  using Numbers = Pack<S, N>;
  static constexpr bool kForward = pass != Pass::adjoint;

  // The inputs of a step for N units of one row. They are kept as loaded until they are used,
  // because unpacking waits for the loads.
  using Raw = typename Word<sizeof(Numbers)>::type;
  struct Inputs {
    Raw in[2], gate;
    uint32_t keep;  // 0: the next step does not start from the state that this step leaves
  };
  // How many of Problem::in are loaded ahead of the step. The others are rare, and registers are
  // scarce.
  static constexpr int kInputs = pass == Pass::activation ? 1 : 2;
  static __device__ __forceinline__ Numbers unpack(Raw raw) {
    Numbers numbers;
    memcpy(&numbers, &raw, sizeof(numbers));
    return numbers;
  }

  const Params& p;
  const Problem& problem;
  const int64_t b0;
  const int rows;
  const int64_t j0;
  const int units;
  const bool leaky, clips;

  __device__ Layer(const Params& params, int64_t b0, int64_t j0)
      : p(params),
        problem(params.problem),
        b0(b0),
        rows(int(min(int64_t(params.rows), problem.B - b0))),
        j0(j0),
        units(int(max(int64_t(0), min(int64_t(params.units), problem.H - j0)))),
        leaky(problem.alpha.data != nullptr),
        clips(problem.clips()) {}

  // ---- the time loop ----

  __device__ Step step(int64_t s) const {
    if (s < 0 || s >= problem.T) return {0, 0, 0};
    const int64_t t = problem.descending ? problem.T - 1 - s : s;
    if (!p.offsets) return {t, 0, rows};
    const int64_t offset = p.offsets[t], active = p.offsets[t + 1] - offset - b0;
    return {t, offset, int(max(int64_t(0), min(int64_t(rows), active)))};
  }
  // The first and last step of a row. Packed rows join late in a descending loop and end early in
  // an ascending one.
  __device__ int64_t first_step(int row) const {
    if (!p.offsets || !problem.descending) return 0;
    return search([&](int64_t s) { return step(s).active > row; });
  }
  __device__ int64_t last_step(int row) const {
    if (!p.offsets || problem.descending) return problem.T - 1;
    return search([&](int64_t s) { return step(s).active <= row; }) - 1;
  }
  // The first step for which `reached` is true, or T. Once true, it must stay true.
  template <class Reached>
  __device__ int64_t search(const Reached& reached) const {
    int64_t low = 0, high = problem.T;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (reached(middle))
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  __device__ S* at(const Series& series, const Step& step, int row, int64_t j) const {
    const int64_t place = p.offsets ? (step.offset + b0 + row) * series.row
                                    : step.t * series.step + (b0 + row) * series.row;
    return static_cast<S*>(series.data) + (place + j);
  }
  __device__ S* at(const States& states, int row, int64_t j) const {
    return static_cast<S*>(states.data) + ((b0 + row) * states.row + j);
  }
  __device__ uint32_t reset_of(const Step& step, int row) const {
    const auto* reset = reinterpret_cast<const uint8_t*>(problem.reset);
    return reset[(p.offsets ? step.offset : step.t * problem.B) + b0 + row];
  }
  __device__ bool keeps(const Step& step, int row) const {
    return !problem.reset || reset_of(step, row) == 0;
  }

  // The address of the state from which row `row` starts step `now`; null stands for zeros.
  __device__ const S* state_before(int row, const Step& before, const Step& now) const {
    if (row < before.active) {
      // A reset at a step separates it from the step that precedes it in the forward pass. The
      // later of the two is `now` in the forward pass and `before` in the backward pass.
      return keeps(kForward ? now : before, row) ? at(problem.out[0], before, row, 0) : nullptr;
    }
    return kForward && problem.first.data && keeps(now, row) ? at(problem.first, row, 0) : nullptr;
  }
  // The same after the row's last step. Used in the backward pass, for ∂L/∂h0.
  __device__ const S* state_after_all(int row) const {
    const Step end = step(last_step(row));
    return keeps(end, row) ? at(problem.out[0], end, row, 0) : nullptr;
  }

  // The value that a row carries into its first step.
  __device__ C first_carry(int row, int64_t j, const Step& start) const {
    const States& first =
        kForward && problem.form == Form::potential ? problem.first_carry : problem.first;
    if (!first.data || (kForward && !keeps(start, row))) return C(0);
    return widen(*at(first, row, j));
  }

  // ---- a step ----

  __device__ static C value_of(const void* vector, int64_t j) {
    return vector ? C(widen(static_cast<const S*>(vector)[j])) : C(0);
  }
  __device__ C bias(int64_t j) const {
    return value_of(problem.b_ih, j) + value_of(problem.b_hh, j);
  }
  __device__ C alpha(int64_t j) const {
    return value_of(problem.alpha_varies() ? nullptr : problem.alpha.data, j);
  }

  // How many steps of t ahead to prefetch into L2 while the data of `step` is loaded. 0 (no
  // prefetch) near the end, and if packed, because then steps are not a constant distance apart.
  __device__ int far_ahead(const Step& step) const {
    if (kFar == 0 || p.offsets) return 0;
    if (problem.descending) return step.t >= kFar ? -kFar : 0;
    return step.t + kFar < problem.T ? kFar : 0;
  }

  // Load and store those of N units of a row that exist.
  __device__ Raw load(const Series& series, const Step& step, int row, int unit, int far) const {
    const S* from = at(series, step, row, j0 + unit);
    if (far) prefetch_into_l2(from + far * series.step);
    if (N == 1 || p.packs) return *reinterpret_cast<const Raw*>(from);
    Numbers numbers = {};
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (unit + n < units) numbers.v[n] = from[n];
    Raw raw;
    memcpy(&raw, &numbers, sizeof(raw));
    return raw;
  }
  __device__ void store(const Series& series, const Step& step, int row, int unit,
                        const Numbers& numbers) const {
    S* to = at(series, step, row, j0 + unit);
    if (N == 1 || p.packs)
      *reinterpret_cast<Numbers*>(to) = numbers;
    else
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (unit + n < units) to[n] = numbers.v[n];
  }

  __device__ Inputs inputs(int unit, int row, const Step& now, const Step& after,
                           int far = 0) const {
    Inputs in = {};
    if (row >= now.active || unit >= units) return in;
#pragma unroll
    for (int n = 0; n < kInputs; ++n)
      if (problem.in[n].data) in.in[n] = load(problem.in[n], now, row, unit, far);
    if (pass != Pass::activation) in.gate = load(problem.gate, now, row, unit, far);
    // In the forward pass, the reset of the next step applies to the state that this step leaves;
    // in the backward pass, the reset of this step does.
    in.keep = 1;
    if (problem.reset)
      in.keep = !kForward ? !reset_of(now, row) : row < after.active ? !reset_of(after, row) : 0;
    return in;
  }

  template <Form form, class Publish>
  __device__ __forceinline__ void compute_as(const Inputs& in, const C (&sums)[N], int unit,
                                             int row, const Step& now, bool begins, bool ends,
                                             const C* bias, const C* alpha, C (&carry)[N],
                                             const Publish& publish) const {
    const Chosen<S> phi(problem.nonlinearity);
    constexpr bool rate = form == Form::rate, potential = form == Form::potential;
    constexpr int kLate = kInputs;
    const bool late = (pass == Pass::activation || !rate) && problem.in[kLate].data;
    const Numbers in0 = unpack(in.in[0]), in1 = unpack(in.in[1]), gates = unpack(in.gate);
    Numbers more = {}, alphas = {}, out[3], published;
    if (late) more = unpack(load(problem.in[kLate], now, row, unit, 0));
    if (problem.alpha_varies()) alphas = unpack(load(problem.alpha, now, row, unit, 0));
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const C first = widen(in0.v[n]), second = widen(in1.v[n]);
      const C leak = problem.alpha_varies() ? C(widen(alphas.v[n])) : alpha[n];
      C sum = sums[n], state = carry[n], results[3] = {};
      if constexpr (pass == Pass::activation) {
        activation<rate>(phi, potential, sum + first + bias[n],
                         late ? C(widen(more.v[n])) : C(-0.0), carry[n], leaky, leak, state,
                         results[0], results[1]);
      } else {
        // Without an initial state, a row's first step has no product, even if W_hh is NaN.
        if (begins && !(kForward && problem.first.data)) sum = C(0);
        const C third = widen(more.v[n]), slope_of = widen(gates.v[n]);
        if constexpr (pass == Pass::tangent)
          tangent<rate>(phi, potential, sum, first, second, third, slope_of, carry[n], leaky, leak,
                        state, results[0], results[1], results[2]);
        else
          adjoint<rate>(phi, potential, sum, first, second, third, slope_of, state, leaky, leak,
                        clips, C(problem.grad_clip), results[0], results[1], results[2]);
      }
#pragma unroll
      for (int i = 0; i < 3; ++i) out[i].v[n] = narrow<S>(results[i]);
      const bool exists = unit + n < units;
      published.v[n] = in.keep && exists ? out[0].v[n] : narrow<S>(0);
      if (kForward && ends && exists && problem.last.data)
        *at(problem.last, row, j0 + unit + n) = narrow<S>(state);
      carry[n] = in.keep ? state : C(0);
    }
    publish(published);
    store(problem.out[0], now, row, unit, out[0]);
    if (problem.out[1].data) store(problem.out[1], now, row, unit, out[1]);
    if (!rate && pass != Pass::activation && problem.out[2].data)
      store(problem.out[2], now, row, unit, out[2]);
  }

  // Computes a step. Calls `publish` with the values that the next step multiplies, before storing
  // the results, because other blocks may wait for them. Updates `carry`, the value that the row
  // carries.
  template <class Publish>
  __device__ __forceinline__ void compute(const Inputs& in, const C (&sums)[N], int unit, int row,
                                          const Step& now, bool begins, bool ends, const C* bias,
                                          const C* alpha, C (&carry)[N],
                                          const Publish& publish) const {
    if (problem.form == Form::rate)
      compute_as<Form::rate>(in, sums, unit, row, now, begins, ends, bias, alpha, carry, publish);
    else if (problem.form == Form::potential)
      compute_as<Form::potential>(in, sums, unit, row, now, begins, ends, bias, alpha, carry,
                                  publish);
    else
      compute_as<Form::inside>(in, sums, unit, row, now, begins, ends, bias, alpha, carry, publish);
  }

  // The same, with the carry in memory; `carried` is null if the row carries nothing.
  template <class Publish>
  __device__ __forceinline__ void compute(const Inputs& in, const C (&sums)[N], int unit, int row,
                                          const Step& before, const Step& now, const Step& after,
                                          const C* bias, const C* alpha, C* carried,
                                          const Publish& publish) const {
    const bool begins = row >= before.active, ends = row >= after.active;
    C carry[N] = {};
    if (carried && (leaky || begins))
#pragma unroll
      for (int n = 0; n < N; ++n) carry[n] = carried[n];
    compute(in, sums, unit, row, now, begins, ends, bias, alpha, carry, publish);
    if (leaky)
#pragma unroll
      for (int n = 0; n < N; ++n) carried[n] = carry[n];
  }

  // Backward: stores ∂L/∂h0, computed from the product after the last step.
  __device__ __forceinline__ void finish(const C (&sums)[N], int unit, int row,
                                         const C* carried) const {
    const bool keep = !problem.reset || keeps(step(last_step(row)), row);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (unit + n >= units) continue;
      const C sum = keep ? sums[n] : C(0), carry = keep && leaky ? carried[n] : C(0);
      const int64_t j = j0 + unit + n;
      *at(problem.last, row, j) = narrow<S>(problem.form == Form::potential ? sum : sum + carry);
      if (problem.last_carry.data) *at(problem.last_carry, row, j) = narrow<S>(carry);
    }
  }

  // Before the time loop, stores bias and alpha of the units and the initial carries of the rows.
  // Called by `threads` threads.
  __device__ void prepare(C* vectors, C* carry, int threads) const {
#pragma unroll 1
    for (int unit = threadIdx.x; unit < p.units; unit += threads) {
      vectors[unit] = unit < units ? bias(j0 + unit) : C(0);
      vectors[p.units + unit] = unit < units ? alpha(j0 + unit) : C(0);
    }
    if (!p.carry_offset) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * p.units; i += threads) {
      const int row = i / p.units, unit = i % p.units;
      carry[i] = unit < units ? first_carry(row, j0 + unit, step(first_step(row))) : C(0);
    }
  }
};

}  // namespace fusedrnn::cuda
