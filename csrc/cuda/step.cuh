// The fused kernel of one step, for any size. W_hh and W_ih are loaded through L2 in slabs of K,
// and the next slabs are in flight while one is multiplied. Both products are summed in registers;
// the epilogue follows.
#pragma once

#include "layer.cuh"
#include "products.cuh"

namespace fusedrnn::cuda {

constexpr int kSlabs = 3;  // in shared memory

// A slab is 128 bytes of K. Weights have the layout of global memory: forward [unit][k], backward
// [k][unit].
template <class S, bool forward>
struct alignas(16) Slab {
  static constexpr int kK = 128 / int(sizeof(S));
  static constexpr int kVector = 16 / int(sizeof(S));
  static constexpr int kPad = kVector;  // rows begin in different banks
  static constexpr int kLines = forward ? kStepUnits : kK;
  static constexpr int kLine = forward ? kK : kStepUnits;
  S w[kLines][kLine + kPad];
  S e[kStepRows][kK + kPad];
};

// The product of 64 units and 32 rows without tensor cores. Four groups of threads share the K of a
// slab, so that a thread can have 8 units times 4 rows: 12 loads for 128 multiplications.
template <class S, bool forward>
struct SlabFma {
  using C = Computed<S>;
  using Slab = cuda::Slab<S, forward>;
  static constexpr int kVector = Slab::kVector;
  static constexpr int kGroups = 4;
  C sum[4][8] = {};
  C* const total;  // [rows][units] in shared memory

  __device__ explicit SlabFma(void* shared) : total(static_cast<C*>(shared)) {}
  __device__ static int group() { return threadIdx.x / 64; }
  __device__ static int column() { return threadIdx.x % 8; }
  __device__ static int line() { return threadIdx.x / 8 % 8; }
  // In the forward pass, the units of a thread are 8 apart, so that neighbouring threads load from
  // different banks; in the backward pass, they are the units that one load brings.
  __device__ static int unit_of_sum(int u) {
    return forward ? column() + 8 * u : (u / kVector * 8 + column()) * kVector + u % kVector;
  }

  __device__ void add(const Slab& slab) {
    using Vector = Pack<S, kVector>;
#pragma unroll kUnroll
    for (int i = 0; i < Slab::kK / kGroups; i += kVector) {
      const int k = group() * (Slab::kK / kGroups) + i;
      Vector states[4];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        states[r] = *reinterpret_cast<const Vector*>(&slab.e[line() + 8 * r][k]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        // forward, several k of one unit; backward, several units of one k
        const int v0 = forward ? 0 : j % kVector, u0 = forward ? j : j / kVector * kVector;
        const Vector weights = *reinterpret_cast<const Vector*>(
            forward ? &slab.w[unit_of_sum(u0)][k] : &slab.w[k + v0][unit_of_sum(u0)]);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            C& place = sum[r][forward ? u0 : u0 + v];
            place = ::fma(weights.v[v], states[r].v[forward ? v : v0], place);
          }
      }
    }
  }
  // Adds the sums of the groups in a fixed order, so that results are bitwise reproducible.
  __device__ void finish() {
    for (int g = 0; g < kGroups; ++g) {
      if (g == group())
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int u = 0; u < 8; ++u) {
            C& place = total[(line() + 8 * r) * kStepUnits + unit_of_sum(u)];
            place = g == 0 ? sum[r][u] : place + sum[r][u];
          }
      __syncthreads();
    }
  }
  __device__ C item(int i) const { return total[row(i) * kStepUnits + unit(i)]; }
  __device__ int unit(int /*i*/) const { return threadIdx.x % kStepUnits; }
  __device__ int row(int i) const { return threadIdx.x / kStepUnits + 4 * i; }
};

// The same with tensor cores: each warp has 16 units times 16 rows.
template <class S, bool forward>
struct SlabMma {
  using Slab = cuda::Slab<S, forward>;
  float sum[2][4] = {};  // of 8 rows each

  __device__ explicit SlabMma(void* /*shared*/) {}
  __device__ void finish() {}
  __device__ void add(const Slab& slab) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, unit = warp % 4 * 16;
    const S* b = &slab.e[warp / 4 * 16 + lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8];
#pragma unroll
    for (int k = 0; k < Slab::kK; k += 16) {
      uint4 weights;
      if constexpr (forward)
        weights = load_matrices(&slab.w[unit + lane % 16][k + lane / 16 * 8]);
      else
        weights = load_transposed(&slab.w[k + lane / 16 * 8 + lane % 8][unit + lane / 8 % 2 * 8]);
      const uint4 states = load_matrices(b + k);
      mma(sum[0], weights, states.x, states.y, S{});
      mma(sum[1], weights, states.z, states.w, S{});
    }
  }
  __device__ float item(int i) const { return sum[i / 4][i % 4]; }
  __device__ int unit(int i) const {
    return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + i % 4 / 2 * 8;
  }
  __device__ int row(int i) const {
    return threadIdx.x / 128 * 16 + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
  }
};

template <class S, bool forward>
struct SlabProduct {
  using type = SlabFma<S, forward>;
};
template <bool forward>
struct SlabProduct<__half, forward> {
  using type = SlabMma<__half, forward>;
};
template <bool forward>
struct SlabProduct<__nv_bfloat16, forward> {
  using type = SlabMma<__nv_bfloat16, forward>;
};

// Copies 16 bytes, of which only the first `count` elements exist; the others become zeros. It is
// one copy if all exist and `from` is aligned.
template <class S>
__device__ __forceinline__ void copy_some(S* to, const S* from, int64_t count) {
  constexpr int kVector = 16 / int(sizeof(S));
  if (count >= kVector && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    copy_through_l2(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = i < count ? load_through_l2(from + i) : narrow<S>(0);
  }
}

// Step s of the time loop; s = T is the product after the last step, which gives ∂L/∂h0. Two blocks
// fit on an SM, so that blocks of the next step can start early; in float64 one block needs the
// registers of two.
template <class S, Pass pass>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1 : 2)
    fused_step(const __grid_constant__ Params p, const int64_t s) {
  using L = Layer<S, pass, 1>;
  using C = typename L::C;
  using Slab = cuda::Slab<S, L::kForward>;
  constexpr int kVector = Slab::kVector;
  __shared__ Slab slabs[kSlabs];
  const L layer(p, int64_t(blockIdx.x / p.blocks) * kStepRows,
                int64_t(blockIdx.x % p.blocks) * kStepUnits);
  const Problem& q = p.problem;
  const bool finishing = s == q.T;
  const Step before = layer.step(s - 1), now = layer.step(s), after = layer.step(s + 1);
  const int active = finishing ? layer.rows : now.active;
  if (active == 0) return;

  const int64_t state_slabs = (q.H + Slab::kK - 1) / Slab::kK;
  const int64_t count = state_slabs + (q.I + Slab::kK - 1) / Slab::kK;
  // The slabs of W_hh come first, then those of W_ih.
  const auto fetch_weights = [&](Slab& to, int64_t slab) {
    const bool recurrent = slab < state_slabs;
    const S* const matrix = static_cast<const S*>(recurrent ? q.w_hh : q.w_ih);
    const int64_t stride = recurrent ? q.w_hh_row : q.w_ih_row, size = recurrent ? q.H : q.I;
    const int64_t k0 = (recurrent ? slab : slab - state_slabs) * Slab::kK;
    constexpr int kVectors = Slab::kLine / kVector;  // of a line
#pragma unroll
    for (int i = 0; i < Slab::kLines * kVectors / kThreads; ++i) {
      const int place = int(threadIdx.x) + i * kThreads;
      const int line = place / kVectors, j = place % kVectors * kVector;
      const int unit = L::kForward ? line : j, k = L::kForward ? j : line;
      const int64_t exist = L::kForward ? (unit < layer.units ? size - k0 - k : 0)
                                        : (k0 + k < size ? layer.units - unit : 0);
      const int64_t at =
          L::kForward ? (layer.j0 + unit) * stride + k0 + k : (k0 + k) * stride + layer.j0 + unit;
      copy_some(&to.w[line][j], matrix + at, exist);
    }
  };

  // Load weights while the previous step still runs, since they do not depend on it.
  let_next_kernel_start();
  for (int i = 0; i < kSlabs - 1; ++i)
    if (i < count) fetch_weights(slabs[i], i);
  wait_for_previous_kernel();

  // Each thread fetches 16 bytes per slab, always of the same row.
  const int row = threadIdx.x / 8, part = threadIdx.x % 8 * kVector;
  const S* const state = row >= active ? nullptr
                         : finishing   ? layer.state_after_all(row)
                                       : layer.state_before(row, before, now);
  const S* const x = q.I && row < active ? layer.at(q.x, now, row, 0) : nullptr;
  const auto fetch_states = [&](Slab& to, int64_t slab) {
    const bool recurrent = slab < state_slabs;
    const S* const from = recurrent ? state : x;
    const int64_t k = (recurrent ? slab : slab - state_slabs) * Slab::kK + part;
    copy_some(&to.e[row][part], from + k, from ? (recurrent ? q.H : q.I) - k : 0);
  };

  typename SlabProduct<S, L::kForward>::type product(slabs);
  for (int i = 0; i < kSlabs - 1; ++i) {
    if (i < count) fetch_states(slabs[i], i);
    end_of_copies();
  }
  for (int64_t slab = 0; slab < count; ++slab) {
    wait_for_copies_but<kSlabs - 2>();
    __syncthreads();
    const int64_t next = slab + kSlabs - 1;
    if (next < count) {
      fetch_weights(slabs[next % kSlabs], next);
      fetch_states(slabs[next % kSlabs], next);
    }
    end_of_copies();
    product.add(slabs[slab % kSlabs]);
  }
  __syncthreads();  // the product adds up where the slabs were
  product.finish();

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int unit = product.unit(i), r = product.row(i);
    if (r >= active || unit >= layer.units) continue;
    const int64_t j = layer.j0 + unit;
    C* const carried =
        layer.leaky ? static_cast<C*>(p.carry) + ((layer.b0 + r) * q.H + j) : nullptr;
    const C sum[] = {product.item(i)};
    const bool begins = !finishing && r >= before.active, ends = r >= after.active;
    // An earlier launch stored the carry, so load it through L2, like the states.
    const C carried_on = carried && !begins ? load_through_l2(carried) : C(0);
    if (finishing) {
      layer.finish(sum, unit, r, &carried_on);
      continue;
    }
    const C bias = layer.bias(j), alpha = layer.alpha(j);
    C carry[] = {begins && (carried || !L::kForward) ? layer.first_carry(r, j, now) : carried_on};
    layer.compute(layer.inputs(unit, r, now, after), sum, unit, r, now, begins, ends, &bias, &alpha,
                  carry, [](const auto&) {});
    if (carried) *carried = carry[0];
  }
}

}  // namespace fusedrnn::cuda
