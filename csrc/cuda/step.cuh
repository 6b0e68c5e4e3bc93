// The fused kernel of one step, for any size: W_hh and W_ih come through L2 in slabs of K, both
// products are summed in registers, and the epilogue follows.
#pragma once

#include "layer.cuh"
#include "products.cuh"

namespace fusedrnn::cuda {

constexpr int kSlab = 32;  // of K

// 64 units times 32 rows by plain multiplication: of a thread, 4 units times 2 rows.
template <class S>
struct SlabFma {
  using C = Computed<S>;
  static constexpr int kPad = 16 / sizeof(S);  // rows begin in different banks
  C sum[2][4] = {};

  __device__ void add(const S (*w)[kSlab + kPad], const S (*e)[kSlab + kPad]) {
    constexpr int kVector = 16 / sizeof(S);
    struct alignas(16) Vector {
      S v[kVector];
    };
    const int column = threadIdx.x % 16, line = threadIdx.x / 16;
#pragma unroll
    for (int k = 0; k < kSlab; k += kVector) {
      Vector states[2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
        states[r] = *reinterpret_cast<const Vector*>(&e[line + 16 * r][k]);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const Vector weights = *reinterpret_cast<const Vector*>(&w[column + 16 * u][k]);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            sum[r][u] = ::fma(weights.v[i], states[r].v[i], sum[r][u]);
      }
    }
  }
  __device__ C item(int i) const { return sum[i / 4][i % 4]; }
  __device__ int unit(int i) const { return threadIdx.x % 16 + i % 4 * 16; }
  __device__ int row(int i) const { return threadIdx.x / 16 + i / 4 * 16; }
};

// The same by tensor cores: of a warp, 16 units times 16 rows.
template <class S>
struct SlabMma {
  static constexpr int kPad = 8;
  float sum[2][4] = {};  // of 8 rows each

  __device__ void add(const S (*w)[kSlab + kPad], const S (*e)[kSlab + kPad]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const S* a = &w[warp % 4 * 16 + lane % 16][lane / 16 * 8];
    const S* b = &e[warp / 4 * 16 + lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8];
#pragma unroll
    for (int k = 0; k < kSlab; k += 16) {
      const uint4 weights = load_matrices(a + k), states = load_matrices(b + k);
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

template <class S>
struct SlabProduct {
  using type = SlabFma<S>;
};
template <>
struct SlabProduct<__half> {
  using type = SlabMma<__half>;
};
template <>
struct SlabProduct<__nv_bfloat16> {
  using type = SlabMma<__nv_bfloat16>;
};

// Step s of the walk; after the last, s = T, the product that leads to ∂L/∂h0.
template <class S, Pass pass>
__global__ void __launch_bounds__(kThreads)
    fused_step(const __grid_constant__ Params p, const int64_t s) {
  using Product = typename SlabProduct<S>::type;
  using L = Layer<S, pass, 1>;
  using C = typename L::C;
  __shared__ S w_slab[kStepUnits][kSlab + Product::kPad];
  __shared__ S e_slab[kStepRows][kSlab + Product::kPad];
  const L layer(p, int64_t(blockIdx.x / p.blocks) * kStepRows,
                int64_t(blockIdx.x % p.blocks) * kStepUnits);
  const Problem& q = p.problem;
  const bool finishing = s == q.T;
  const Step before = layer.step(s - 1), now = layer.step(s), after = layer.step(s + 1);
  const int alive = finishing ? layer.rows : now.alive;
  if (alive == 0) return;

  // What this thread loads of each slab: of one row of states and inputs,
  const int row = threadIdx.x / 8, e_k = threadIdx.x % 8 * 4;
  const S* const state = row >= alive ? nullptr
                         : finishing  ? layer.state_after_all(row)
                                      : layer.state_before(row, before, now);
  const S* const x = q.I && row < alive ? layer.at(q.x, now, row, 0) : nullptr;
  // and of weights: along K; backward, W_hh is read along the units.
  const int w_unit = L::kForward ? threadIdx.x / 4 : threadIdx.x % 8 * 8;
  const int w_k = L::kForward ? threadIdx.x % 4 * 8 : threadIdx.x / 8;
  S w_next[8], e_next[4];

  const auto fetch = [&](int64_t k0, int64_t size, const S* numbers, const void* matrix,
                         int64_t unit_stride, int64_t k_stride) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t k = k0 + e_k + i;
      e_next[i] = numbers && k < size ? numbers[k] : narrow<S>(0);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int unit = w_unit + (L::kForward ? 0 : i);
      const int64_t k = k0 + w_k + (L::kForward ? i : 0);
      w_next[i] =
          unit < layer.units && k < size
              ? static_cast<const S*>(matrix)[(layer.j0 + unit) * unit_stride + k * k_stride]
              : narrow<S>(0);
    }
  };
  const int64_t state_slabs = (q.H + kSlab - 1) / kSlab;
  const int64_t slabs = state_slabs + (q.I + kSlab - 1) / kSlab;
  const auto fetch_slab = [&](int64_t slab) {
    if (slab < state_slabs)
      fetch(slab * kSlab, q.H, state, q.w_hh, L::kForward ? q.w_hh_row : 1,
            L::kForward ? 1 : q.w_hh_row);
    else
      fetch((slab - state_slabs) * kSlab, q.I, x, q.w_ih, q.w_ih_row, 1);
  };

  Product product;
  fetch_slab(0);
  for (int64_t slab = 0; slab < slabs; ++slab) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) e_slab[row][e_k + i] = e_next[i];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      w_slab[w_unit + (L::kForward ? 0 : i)][w_k + (L::kForward ? i : 0)] = w_next[i];
    __syncthreads();
    if (slab + 1 < slabs) fetch_slab(slab + 1);
    product.add(w_slab, e_slab);
  }

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int unit = product.unit(i), r = product.row(i);
    if (r >= alive || unit >= layer.units) continue;
    const int64_t j = layer.j0 + unit;
    C* const carried =
        layer.leaky ? static_cast<C*>(p.carry) + ((layer.b0 + r) * q.H + j) : nullptr;
    const C sum[] = {product.item(i)};
    if (finishing) {
      *layer.at(q.last, r, j) = narrow<S>(carried ? sum[0] + *carried : sum[0]);
      continue;
    }
    const bool begins = r >= before.alive, ends = r >= after.alive;
    const C bias = layer.bias(j), alpha = layer.alpha(j);
    C carry[] = {begins && (carried || !L::kForward) ? layer.first_carry(r, j, now)
                 : carried                           ? *carried
                                                     : C(0)};
    layer.compute(layer.inputs(unit, r, now, after), sum, unit, r, now, begins, ends, &bias, &alpha,
                  carry);
    if (carried) *carried = carry[0];
  }
}

}  // namespace fusedrnn::cuda
