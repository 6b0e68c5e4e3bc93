// The kernel that keeps the weights on the chip and walks through time. A team of blocks shares a
// W_hh and owns some rows of the batch; each block owns some hidden units of them, and all states
// of its rows come to it each step:
//   block    the team is one block, and states pass through its shared memory
//   cluster  blocks write into the shared memory of all their peers
//   grid     states pass through the output tensor, which lies in L2
#pragma once

#include "exchange.cuh"
#include "layer.cuh"
#include "products.cuh"

namespace fusedrnn::cuda {

template <class Product, Pass pass>
class Walk : Layer<typename Product::Stored, pass> {
  using S = typename Product::Stored;
  using Base = Layer<S, pass>;
  using C = typename Base::C;
  using typename Base::Inputs;
  using Base::at, Base::b0, Base::j0, Base::keeps, Base::kForward, Base::leaky, Base::p, Base::q,
      Base::rows, Base::step, Base::units;
  static constexpr int kItems = Product::kItems;
  // What steps bring is loaded while the step before is computed, if registers are left for it.
  static constexpr bool kAhead = kItems <= 4;

 public:
  __device__ Walk(const Params& params, unsigned char* shared)
      : Base(params, int64_t(blockIdx.x / params.blocks) * params.rows,
             int64_t(blockIdx.x % params.blocks) * params.units),
        product_(shared, params.split),
        e_(reinterpret_cast<S*>(shared + params.e_offset)),
        carry_(params.carry_offset ? reinterpret_cast<C*>(shared + params.carry_offset) : nullptr),
        vectors_(reinterpret_cast<C*>(shared + params.vectors_offset)),
        partial_(reinterpret_cast<float*>(shared + params.partial_offset)) {}

  __device__ void run() {
    hold_weights();
    begin();
    const bool through_l2 = p.regime == Regime::grid;
    Step before{}, now = step(0), after = step(1);
    Inputs next[kItems];
    if constexpr (kAhead) load_inputs(next, 0, now, after);
    for (int64_t s = 0; s < q.T; ++s) {
      const Step second_after = step(s + 2);
      const S* from = through_l2 ? e_ : buffer(s);
      S* to = through_l2 ? nullptr : buffer(s + 1);
      if (through_l2) {
        gather([&](int row) { return Base::state_before(row, before, now); }, now.alive, s > 0);
        if (q.I) load_x(e_, now);
        copies_done();
        __syncthreads();
      } else {
        if (!kForward && q.last.data)  // rows that ended leave their state for the end of the walk
          for (int row = now.alive; row < before.alive; ++row)
            for (int64_t j = threadIdx.x; j < q.H; j += kThreads)
              to[row * p.e_row + j] = from[row * p.e_row + j];
        if (q.I) load_x(to, after);
      }
      for (int first = 0; first < now.alive; first += Product::kRows) {
        Inputs in[kItems];
        if constexpr (!kAhead) {
          load_inputs(in, first, now, after);
        } else {
#pragma unroll
          for (int i = 0; i < kItems; ++i) in[i] = next[i];
          if (first + Product::kRows < now.alive)
            load_inputs(next, first + Product::kRows, now, after);
          else
            load_inputs(next, 0, after, second_after);
        }
        C sum[kItems];
        product_.multiply(from + first * p.e_row, p.e_row, p.chunks, partial_, sum);
        S sent[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int row = first + product_.row(i), unit = product_.unit(i);
          sent[i] = S(0.0f);
          if (!product_.owns(i) || row >= now.alive || unit >= units) continue;
          const bool begins = row >= before.alive, ends = row >= after.alive;
          C* const carried = carry_ ? carry_ + row * p.units + unit : nullptr;
          C carry = carried && (leaky || begins) ? *carried : C(0);
          sent[i] = Base::compute(in[i], sum[i], unit, row, now, begins, ends, vectors_[unit],
                                  vectors_[p.units + unit], carry);
          if (leaky) *carried = carry;
        }
        if (!through_l2) send(to, sent, first, now.alive);
      }
      meet(s);
      before = now;
      now = after;
      after = second_after;
    }
    if (!kForward && q.last.data) finish();
    // Nobody may leave while a peer could still write into its shared memory.
    if (p.regime == Regime::cluster) cluster_barrier();
  }

 private:
  // ---- before the walk ----

  __device__ void hold_weights() {
    Weights w;
    w.w_hh_unit = kForward ? q.w_hh_row : 1;
    w.w_hh_k = kForward ? 1 : q.w_hh_row;
    w.w_hh = static_cast<const S*>(q.w_hh) + j0 * w.w_hh_unit;
    w.w_ih_unit = q.w_ih_row;
    w.w_ih = static_cast<const S*>(q.w_ih) + j0 * q.w_ih_row;
    w.units = units;
    w.H = q.H;
    w.I = q.I;
    w.state_k = p.state_k;
    product_.hold(w, p.chunks);
  }

  __device__ void begin() {
    const int buffers = p.regime == Regime::grid ? 1 : 2;
    for (int i = threadIdx.x; i < buffers * p.e_rows * p.e_row; i += kThreads) e_[i] = S(0.0f);
    for (int unit = threadIdx.x; unit < p.units; unit += kThreads) {
      vectors_[unit] = unit < units ? Base::bias(j0 + unit) : C(0);
      vectors_[p.units + unit] = unit < units ? Base::alpha(j0 + unit) : C(0);
    }
    if (carry_)
      for (int i = threadIdx.x; i < rows * p.units; i += kThreads) {
        const int row = i / p.units, unit = i % p.units;
        carry_[i] = unit < units ? Base::first_carry(row, j0 + unit, Base::start_of(row)) : C(0);
      }
    __syncthreads();
    if (p.regime == Regime::grid) return;
    // Packed and descending, rows begin late: until then both buffers have their first state.
    if (kForward && q.first.data)
      for (int row = 0; row < rows; ++row) {
        const bool keep = keeps(Base::start_of(row), row);
        for (int64_t j = threadIdx.x; keep && j < q.H; j += kThreads) {
          const S first = *at(q.first, row, j);
          e_[row * p.e_row + j] = first;
          e_[(p.e_rows + row) * p.e_row + j] = first;
        }
      }
    if (q.I) load_x(e_, step(0));
    copies_done();
    if (p.regime == Regime::cluster)
      cluster_barrier();
    else
      __syncthreads();
  }

  // ---- what a step brings ----

  __device__ __forceinline__ void load_inputs(Inputs (&in)[kItems], int first, const Step& now,
                                              const Step& after) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (product_.owns(i))
        in[i] = Base::inputs(product_.unit(i), first + product_.row(i), now, after);
  }

  // The inputs of a step, behind the states of its rows.
  __device__ void load_x(S* e, const Step& step) const {
    const int size = int(q.I);
    const int per_copy = p.x_copy / int(sizeof(S));
    if (per_copy > 0) {
      const int copies = size / per_copy;
      for (int i = threadIdx.x; i < step.alive * copies; i += kThreads) {
        const int row = i / copies, j = i % copies * per_copy;
        copy_async(e + row * p.e_row + p.state_k + j, at(q.x, step, row, j), p.x_copy);
      }
    } else {
      for (int i = threadIdx.x; i < step.alive * size; i += kThreads) {
        const int row = i / size, j = i % size;
        e[row * p.e_row + p.state_k + j] = *at(q.x, step, row, j);
      }
    }
  }

  // ---- states ----

  __device__ S* buffer(int64_t s) const { return e_ + (s & 1) * p.e_rows * p.e_row; }

  // Grid: states out of global memory, where `from` says, a warp for each row.
  template <class From>
  __device__ void gather(const From& from, int count, bool aligned) {
    const int lane = threadIdx.x % 32, H = int(q.H);
    for (int row = threadIdx.x / 32; row < count; row += kWarps) {
      S* to = e_ + row * p.e_row;
      const S* state = from(row);
      if (!state) {
        for (int j = lane; j < H; j += 32) to[j] = S(0.0f);
      } else if (aligned && p.state_copies) {
        constexpr int kPerCopy = 16 / int(sizeof(S));
        for (int j = lane * kPerCopy; j < H; j += 32 * kPerCopy) copy_through_l2(to + j, state + j);
      } else {
        for (int j = lane; j < H; j += 32) to[j] = load_through_l2(state + j);
      }
    }
  }

  // To everyone in the team who multiplies it.
  __device__ __forceinline__ void send(S* to, const S (&sent)[kItems], int first,
                                       int alive) const {
#pragma unroll
    for (int i = 0; i < kItems; i += Product::kPack) {
      const int row = first + product_.row(i);
      const int64_t j = j0 + product_.unit(i);
      if (!product_.owns(i) || row >= alive || product_.unit(i) >= units) continue;
      S* const place = to + row * p.e_row + j;
      Pack<S, Product::kPack> pack;
#pragma unroll
      for (int n = 0; n < Product::kPack; ++n) pack.v[n] = sent[i + n];
      if (p.regime == Regime::block)
        *reinterpret_cast<Pack<S, Product::kPack>*>(place) = pack;
      else
        for (int peer = 0; peer < p.blocks; ++peer) store_at_peer(place, peer, pack);
    }
  }

  // Ends a step: what was sent has arrived.
  __device__ __forceinline__ void meet(int64_t s) const {
    if (p.regime == Regime::grid) {
      grid_barrier(p.counters + blockIdx.x / p.blocks, unsigned(s + 1) * unsigned(p.blocks));
      return;
    }
    copies_done();
    if (p.regime == Regime::cluster)
      cluster_barrier();
    else
      __syncthreads();
  }

  // ∂L/∂h0: what goes on before each row's first step. One more product.
  __device__ void finish() {
    const S* from = e_;
    if (p.regime == Regime::grid) {
      gather([&](int row) { return Base::state_after_all(row); }, rows, true);
      copies_done();
      __syncthreads();
    } else {
      from = buffer(q.T);
    }
    for (int first = 0; first < rows; first += Product::kRows) {
      C sum[kItems];
      product_.multiply(from + first * p.e_row, p.e_row, p.chunks, partial_, sum);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int row = first + product_.row(i), unit = product_.unit(i);
        if (!product_.owns(i) || row >= rows || unit >= units) continue;
        if (leaky) sum[i] += carry_[row * p.units + unit];
        *at(q.last, row, j0 + unit) = narrow<S>(sum[i]);
      }
    }
  }

  Product product_;
  S* const e_;        // [2][e_rows][e_row], in turns; through L2, one
  C* const carry_;    // [rows][units]
  C* const vectors_;  // bias, then alpha
  float* const partial_;
};

template <class Product, Pass pass>
__global__ void __launch_bounds__(kThreads, 1)
    persistent(const __grid_constant__ Params params) {
  extern __shared__ __align__(16) unsigned char shared[];
  Walk<Product, pass>(params, shared).run();
}

}  // namespace fusedrnn::cuda
