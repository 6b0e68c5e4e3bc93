// The fused kernel of one step, for any size: W_hh and W_ih come through L2 in slabs of K, both
// products are summed in registers, and the epilogue follows.
#pragma once

#include "layer.cuh"
#include "products.cuh"

namespace fusedrnn::cuda {

constexpr int kSlab = 32;  // of K

// 64 units times 32 rows by plain multiplication. Four groups of threads share the K of a slab, so
// that a thread can have 8 units times 4 rows: 12 loads for 128 multiplications.
template <class S>
struct SlabFma {
  using C = Computed<S>;
  static constexpr int kVector = 16 / sizeof(S);
  static constexpr int kPad = kVector;  // rows begin in different banks
  static constexpr int kGroups = 4;
  static constexpr int kTotal = kStepUnits * kStepRows;  // numbers in shared memory
  C sum[4][8] = {};
  C* const total;  // [rows][units] in shared memory

  __device__ explicit SlabFma(C* shared) : total(shared) {}
  __device__ static int group() { return threadIdx.x / 64; }
  __device__ static int column() { return threadIdx.x % 8; }
  __device__ static int line() { return threadIdx.x / 8 % 8; }

  __device__ void add(const S (*w)[kSlab + kPad], const S (*e)[kSlab + kPad]) {
    using Vector = Pack<S, kVector>;
#pragma unroll
    for (int i = 0; i < kSlab / kGroups; i += kVector) {
      const int k = group() * (kSlab / kGroups) + i;
      Vector states[4];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        states[r] = *reinterpret_cast<const Vector*>(&e[line() + 8 * r][k]);
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        const Vector weights = *reinterpret_cast<const Vector*>(&w[column() + 8 * u][k]);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int v = 0; v < kVector; ++v)
            sum[r][u] = ::fma(weights.v[v], states[r].v[v], sum[r][u]);
      }
    }
  }
  // The groups' sums, in order, so that the bits do not depend on timing.
  __device__ void finish() {
    for (int g = 0; g < kGroups; ++g) {
      if (g == group())
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int u = 0; u < 8; ++u) {
            C& place = total[(line() + 8 * r) * kStepUnits + column() + 8 * u];
            place = g == 0 ? sum[r][u] : place + sum[r][u];
          }
      __syncthreads();
    }
  }
  __device__ C item(int i) const { return total[row(i) * kStepUnits + unit(i)]; }
  __device__ int unit(int /*i*/) const { return threadIdx.x % kStepUnits; }
  __device__ int row(int i) const { return threadIdx.x / kStepUnits + 4 * i; }
};

// The same by tensor cores: of a warp, 16 units times 16 rows.
template <class S>
struct SlabMma {
  static constexpr int kPad = 8;
  static constexpr int kTotal = 1;  // none
  float sum[2][4] = {};             // of 8 rows each

  __device__ explicit SlabMma(float* /*shared*/) {}
  __device__ void finish() {}
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
__global__ void __launch_bounds__(kThreads, 1)
    fused_step(const __grid_constant__ Params p, const int64_t s) {
  using Product = typename SlabProduct<S>::type;
  using L = Layer<S, pass, 1>;
  using C = typename L::C;
  __shared__ S w_slab[kStepUnits][kSlab + Product::kPad];
  __shared__ S e_slab[kStepRows][kSlab + Product::kPad];
  __shared__ C total[Product::kTotal];
  const L layer(p, int64_t(blockIdx.x / p.blocks) * kStepRows,
                int64_t(blockIdx.x % p.blocks) * kStepUnits);
  const Problem& q = p.problem;
  const bool finishing = s == q.T;
  const Step before = layer.step(s - 1), now = layer.step(s), after = layer.step(s + 1);
  const int alive = finishing ? layer.rows : now.alive;
  if (alive == 0) return;

  // What this thread loads of each slab, so that a warp reads neighbours: of states and inputs, one
  // k of 4 rows, and of weights one k of 8 units; backward, where W_hh is read along the units, one
  // unit of 8 k.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const S *state[4], *x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = warp + 8 * i;
    state[i] = row >= alive ? nullptr
               : finishing  ? layer.state_after_all(row)
                            : layer.state_before(row, before, now);
    x[i] = q.I && row < alive ? layer.at(q.x, now, row, 0) : nullptr;
  }
  S w_next[8], e_next[4];
  const auto w_unit = [&](int i) { return L::kForward ? warp + 8 * i : int(threadIdx.x) % 64; };
  const auto w_k = [&](int i) { return L::kForward ? lane : int(threadIdx.x) / 64 + 4 * i; };

  const auto fetch = [&](int64_t k0, int64_t size, const S* const(&of)[4], const void* matrix,
                         int64_t unit_stride, int64_t k_stride) {
#pragma unroll
    for (int i = 0; i < 4; ++i) e_next[i] = of[i] && k0 + lane < size ? of[i][k0 + lane] : S{};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t k = k0 + w_k(i);
      w_next[i] =
          w_unit(i) < layer.units && k < size
              ? static_cast<const S*>(matrix)[(layer.j0 + w_unit(i)) * unit_stride + k * k_stride]
              : S{};
    }
  };
  const int64_t state_slabs = (q.H + kSlab - 1) / kSlab;
  const int64_t slabs = state_slabs + (q.I + kSlab - 1) / kSlab;
  const auto fetch_slab = [&](int64_t slab) {
    if (slab < state_slabs)
      fetch(slab * kSlab, q.H, state, q.w_hh, L::kForward ? q.w_hh_row : 1,
            L::kForward ? 1 : q.w_hh_row);
    else if (L::kForward)
      fetch((slab - state_slabs) * kSlab, q.I, x, q.w_ih, q.w_ih_row, 1);
  };

  Product product(total);
  fetch_slab(0);
  for (int64_t slab = 0; slab < slabs; ++slab) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) e_slab[warp + 8 * i][lane] = e_next[i];
#pragma unroll
    for (int i = 0; i < 8; ++i) w_slab[w_unit(i)][w_k(i)] = w_next[i];
    __syncthreads();
    if (slab + 1 < slabs) fetch_slab(slab + 1);
    product.add(w_slab, e_slab);
  }
  product.finish();

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int unit = product.unit(i), r = product.row(i);
    if (r >= alive || unit >= layer.units) continue;
    const int64_t j = layer.j0 + unit;
    C* const carried =
        layer.leaky ? static_cast<C*>(p.carry) + ((layer.b0 + r) * q.H + j) : nullptr;
    const C sum[] = {product.item(i)};
    if (finishing) {
      layer.finish(sum, unit, r, carried);
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
