// The kernel that keeps the weights on the chip and runs the time loop. Each block of a batch group
// (plan.h) computes some of the hidden units, and receives all states of the group's rows in each
// step. How states are exchanged depends on the regime:
//   block    the group is one block, and states stay in its shared memory
//   cluster  each block writes its states into the shared memory of all its peers
//   grid     states pass through the output tensor, which is in L2
#pragma once

#include "exchange.cuh"
#include "layer.cuh"
#include "products.cuh"

namespace fusedrnn::cuda {

template <class Product, Pass pass>
class TimeLoop : protected Layer<typename Product::Stored, pass, Product::kPack> {
 protected:
  using S = typename Product::Stored;
  static constexpr int N = Product::kPack;
  using Base = Layer<S, pass, N>;
  using C = typename Base::C;
  using Base::b0, Base::j0, Base::kForward, Base::p, Base::problem, Base::rows, Base::step,
      Base::units;
  using typename Base::Inputs, typename Base::Numbers;
  static constexpr int kItems = Product::kItems;  // each of N neighbouring units
  // Load the inputs of a step while the previous one is computed, if registers are left for that.
  static constexpr bool kAhead = kItems <= 2;

 public:
  __device__ TimeLoop(const Params& params, unsigned char* shared)
      : Base(params, int64_t(batch_group(params)) * params.rows,
             int64_t(blockIdx.x % params.blocks) * params.units),
        shared_(shared),
        product_(shared, params.split_log2),
        e_(reinterpret_cast<S*>(shared + pinned(params.e_offset))),
        carry_(params.carry_offset ? reinterpret_cast<C*>(shared + params.carry_offset) : nullptr),
        vectors_(reinterpret_cast<C*>(shared + params.vectors_offset)),
        partial_(reinterpret_cast<float*>(shared + params.partial_offset)) {}

  __device__ void run() {
    hold_weights();
    begin(p, b0, j0, shared_);
    // A block without units exits: its peers neither send to it nor expect anything from it.
    if (p.regime == Regime::cluster && units == 0) return;
    const bool through_l2 = p.regime == Regime::grid;
    // In the backward pass, one more product after the last step gives ∂L/∂h0.
    const int64_t end = problem.T + (!kForward && problem.last.data);
    // Steps are counted from the first one that has rows. In a step without rows no bytes are sent,
    // so nothing would synchronise the blocks of a cluster.
    const int64_t skipped = Base::first_step(0);
    Step before{}, now = step(skipped), after = step(skipped + 1);
    Inputs next[kItems];
    if constexpr (kAhead) load_inputs(next, 0, now, after);
    for (int64_t s = 0; s < end - skipped; ++s) {
      const bool finishing = !kForward && s + skipped == problem.T, goes_on = s + skipped + 1 < end;
      const int active = finishing ? rows : now.active;
      const Step second_after = step(s + skipped + 2);
      const S* from = buffer(s);
      S* const to = buffer(s + 1);
      if (through_l2) {
        gather(0, active, finishing, before, now);
      } else {
        if (p.regime == Regime::cluster && goes_on) expect(s, active);
        if (!kForward && problem.last.data) {
          // Packed: the product after the last step may read either buffer, so copy the states of
          // rows that have just ended into the other one.
#pragma unroll 1
          for (int row = now.active; row < before.active; ++row)
            for (int j = threadIdx.x; j < p.state_k; j += kThreads)
              to[row * p.e_row + j] = from[row * p.e_row + j];
        }
        if (problem.I) load_x(*this, to, after, 0, after.active);
      }
      for (int first = 0; first < active; first += Product::kRows) {
        const S* states = from + first * p.e_row;
        if (through_l2) {  // gather the next group of rows while this one is multiplied
          copies_done();
          __syncthreads();
          if (first + Product::kRows < active)
            gather(first + Product::kRows, active, finishing, before, now);
          states = buffer(first / Product::kRows);
        }
        if (!product_.busy(units)) continue;
        Inputs in[kItems];
        if constexpr (!kAhead) {
          load_inputs(in, first, now, after);
        } else {
#pragma unroll
          for (int i = 0; i < kItems; ++i) in[i] = next[i];
          if (first + Product::kRows < now.active)
            load_inputs(next, first + Product::kRows, now, after);
          else
            load_inputs(next, 0, after, second_after);
        }
        C sum[kItems][N];
        product_.multiply(states, p.e_row, p.chunks, partial_, sum);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int row = first + product_.row(i), unit = product_.unit(i);
          if (!product_.owns(i) || row >= active || unit >= units) continue;
          C* const carried = carry_ ? carry_ + row * p.units + unit : nullptr;
          if (finishing) {
            Base::finish(sum[i], unit, row, carried);
            continue;
          }
          Base::compute(in[i], sum[i], unit, row, before, now, after, vectors_ + unit,
                        vectors_ + p.units + unit, carried, [&](const Numbers& published) {
                          if (!through_l2 && goes_on)
                            send(s, to + row * p.e_row + j0 + unit, published);
                        });
        }
      }
      if (kAhead && active == 0) load_inputs(next, 0, after, second_after);
      if (goes_on) synchronise(s);
      before = now;
      now = after;
      after = second_after;
    }
    // A block must not exit while a peer may still write into its shared memory.
    if (p.regime == Regime::cluster) cluster_barrier();
  }

 protected:
  // ---- before the time loop ----

  __device__ void hold_weights() {
    Weights w;
    w.w_hh_unit = kForward ? problem.w_hh_row : 1;
    w.w_hh_k = kForward ? 1 : problem.w_hh_row;
    w.w_hh = static_cast<const S*>(problem.w_hh) + j0 * w.w_hh_unit;
    w.w_ih_unit = problem.w_ih_row;
    w.w_ih = static_cast<const S*>(problem.w_ih) + j0 * problem.w_ih_row;
    w.units = units;
    w.H = problem.H;
    w.I = problem.I;
    w.state_k = p.state_k;
    product_.hold(w, p.chunks, p.e_row);
  }

  // Static because it is not inlined: passing `this` would force the weights out of registers.
  static __device__ __noinline__ void begin(const Params& p, int64_t b0, int64_t j0,
                                            unsigned char* shared) {
    const Base layer(p, b0, j0);
    const Problem& problem = p.problem;
    S* const e = reinterpret_cast<S*>(shared + p.e_offset);
    C* const carry = reinterpret_cast<C*>(shared + p.carry_offset);
    C* const vectors = reinterpret_cast<C*>(shared + p.vectors_offset);
    if (p.regime == Regime::cluster && threadIdx.x == 0)
      for (int b = 0; b < 2; ++b) init_arrivals(arrivals(p, shared) + b);
    for (int i = threadIdx.x; i < 2 * p.e_size; i += kThreads) e[i] = narrow<S>(0);
    layer.prepare(vectors, carry, kThreads);
    __syncthreads();
    if (p.regime == Regime::grid) return;
    // In a packed descending loop rows join late. Until then, both buffers hold their initial
    // state.
    if (kForward && problem.first.data)
      for (int row = 0; row < layer.rows; ++row) {
        const bool keep = layer.keeps(layer.step(layer.first_step(row)), row);
#pragma unroll 1
        for (int64_t j = threadIdx.x; keep && j < problem.H; j += kThreads) {
          const S first = *layer.at(problem.first, row, j);
          e[row * p.e_row + j] = first;
          e[p.e_size + row * p.e_row + j] = first;
        }
      }
    const Step first = layer.step(layer.first_step(0));
    if (problem.I) load_x(layer, e, first, 0, first.active);
    copies_done();
    if (p.regime == Regime::cluster)
      cluster_barrier();
    else
      __syncthreads();
  }

  // ---- the inputs of a step ----

  __device__ __forceinline__ void load_inputs(Inputs (&in)[kItems], int first, const Step& now,
                                              const Step& after) const {
    const int far = Base::far_ahead(now);
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (product_.owns(i))
        in[i] = Base::inputs(product_.unit(i), first + product_.row(i), now, after, far);
  }

  // Loads x of a step for `count` rows, and stores it after their states in e.
  static __device__ __forceinline__ void load_x(const Base& layer, S* e, const Step& step,
                                                int first, int count) {
    const Params& p = layer.p;
    const int size = int(p.problem.I);
    const int per_copy = p.x_copy ? p.x_copy / int(sizeof(S)) : 1;
    const int copies = size / per_copy, far = layer.far_ahead(step);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * copies; i += kThreads) {
      const int row = i / copies, j = i % copies * per_copy;
      S* const to = e + row * p.e_row + p.state_k + j;
      const S* const from = layer.at(p.problem.x, step, first + row, j);
      if (far) prefetch_into_l2(from + far * p.problem.x.step);
      if (p.x_copy)
        copy_async(to, from, p.x_copy);
      else
        *to = *from;
    }
  }

  // ---- states ----

  __device__ S* buffer(int64_t s) const { return e_ + (s & 1) * p.e_size; }

  // Grid: loads, for a group of rows, the states from which a step starts and its x from global
  // memory. One warp loads the states of one row.
  __device__ __forceinline__ void gather(int first, int active, bool finishing, const Step& before,
                                         const Step& now) {
    const int count = min(Product::kRows, active - first), H = int(problem.H);
    S* const e = buffer(first / Product::kRows);
    const int index = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (index < count) {
      const int row = first + index;
      S* const to = e + index * p.e_row;
      const S* const from =
          finishing ? Base::state_after_all(row) : Base::state_before(row, before, now);
      constexpr int kPerCopy = 16 / int(sizeof(S));
      const bool by_copies = p.state_copies && from && (finishing || row < before.active);
      const int step = by_copies ? kPerCopy : 1;
#pragma unroll 1
      for (int j = lane * step; j < H; j += 32 * step) {
        if (by_copies)
          copy_through_l2(to + j, from + j);
        else
          to[j] = from ? load_through_l2(from + j) : narrow<S>(0);
      }
    }
    if (problem.I) load_x(*this, e, now, first, count);
  }

  // Cluster: the mbarriers, one per buffer, that count the bytes that have arrived.
  static __device__ uint64_t* arrivals(const Params& p, unsigned char* shared) {
    return reinterpret_cast<uint64_t*>(shared + p.arrivals_offset);
  }

  // Cluster: sets how many bytes the mbarrier of this block expects from the batch group in step s.
  __device__ __forceinline__ void expect(int64_t s, int active) const {
    const int size = (int(problem.H) + N - 1) / N * int(sizeof(Numbers));
    if (threadIdx.x == 0) expect_bytes(arrivals(p, shared_) + ((s + 1) & 1), active * size);
  }

  // Sends states to all blocks of the batch group that have units, including this one.
  __device__ __forceinline__ void send(int64_t s, S* place, const Numbers& numbers) const {
    if (p.regime == Regime::block) {
      *reinterpret_cast<Numbers*>(place) = numbers;
      return;
    }
    const uint64_t* const arrived = arrivals(p, shared_) + ((s + 1) & 1);
    const int self = int(blockIdx.x) & (p.blocks - 1);  // a power of two
#pragma unroll kUnroll
    for (int i = 0; i < p.blocks; ++i) {  // each block starts with itself, to spread the load
      const int peer = i ^ self;
      if (peer < p.receivers) send_to_peer(place, arrived, peer, numbers);
    }
  }

  // Ends a step: waits until everything that was sent to this block has arrived. The blocks of a
  // cluster need no other barrier: a block sends into a buffer only after it has received the
  // states of the previous step from all peers, and each peer sent these after its last use of that
  // buffer. But the threads of a block need one: a thread two steps behind would mistake a later
  // phase for the one that it waits for.
  __device__ __forceinline__ void synchronise(int64_t s) const {
    if (p.regime == Regime::grid) {
      grid_barrier(p.counters + batch_group(p), unsigned(s + 1) * unsigned(p.blocks),
                   {p, s, "all blocks of the batch group (grid)"});
      return;
    }
    copies_done();
    __syncthreads();
    if (p.regime == Regime::cluster)
      wait_for_arrivals(arrivals(p, shared_) + ((s + 1) & 1), unsigned(s >> 1) & 1,
                        {p, s, "states of all peers (cluster)"});
  }

  unsigned char* const shared_;
  Product product_;
  S* const e_;        // two buffers, used alternately
  C* const carry_;    // [rows][units]
  C* const vectors_;  // bias, then alpha
  float* const partial_;
};

template <class Product, Pass pass>
__global__ void __launch_bounds__(kThreads, 1) persistent(const __grid_constant__ Params params) {
  extern __shared__ __align__(16) unsigned char shared[];
  TimeLoop<Product, pass>(params, shared).run();
}

}  // namespace fusedrnn::cuda
