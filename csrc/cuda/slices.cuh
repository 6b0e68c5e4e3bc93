// The kernel for weights that need the whole chip, and for many batch rows. A block holds the
// weights of many hidden units, but only for a slice of K. The blocks of a cluster hold the slices
// of the same units, and each of them finishes some of these units, its own. A block multiplies its
// slice, sends the partial sums of a peer's own units into that peer's shared memory, and finishes
// its own units. States reach the other clusters through the output tensor, which is in L2. Each
// block thus fetches a slice of the states instead of all of them. (Diamos et al., Persistent RNNs,
// ICML 2016, split W_hh in the same way.)
//
// Each group of rows is an independent recurrence. A turn is one step of one group. Groups take
// turns, and while one is multiplied, the states and sums of the others are in flight. Three kinds
// of warps share the work of a turn and synchronise through mbarriers:
//   fetcher  waits until all blocks of the team have signalled the group's states, and copies them
//   workers  multiply them, send the sums to their owners, and finish the previous turn
//   tellers  signal to the team that this block has finished a turn
#pragma once

#include "exchange.cuh"
#include "layer.cuh"
#include "products.cuh"

namespace fusedrnn::cuda {

// A product covers all units of a cluster and the rows of a group, and accumulates over slabs of K.
// Each thread then has the sums of some pairs of neighbouring units. With tensor cores, all of K is
// one slab.
template <class S>
struct SliceMma : Mma<S, 2> {
  using Base = Mma<S, 2>;
  static constexpr Tile kTile = Base::kTile;
  float sum[Base::kItems][2];

  __device__ explicit SliceMma(void* weights) : Base(weights, 0) {}
  __device__ __forceinline__ void add(const S* e, int e_row, int /*slab*/, int chunks) {
    Base::multiply(e, e_row, chunks, nullptr, sum);
  }
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < Base::kItems; ++i)
      f(Base::row(i), Base::unit(i), Pack<float, 2>{sum[i][0], sum[i][1]});
  }
};

// Without tensor cores: 32 rows times 128 units. A warp has 16 rows and 32 units; a lane has 4
// rows, 8 units and every other 16 bytes of K: 12 loads for 128 multiplications. All weights are in
// shared memory, [K / 4][unit].
struct SliceFma {
  using Stored = float;
  using Vector = Pack<float, 4>;
  static constexpr Tile kTile{Arithmetic::fma_f32, 4, 32};
  static constexpr int kUnits = kTile.block_units(1), kVectors = kTile.chunk() / 4;
  Vector* const weights;
  // Lanes n and n ^ 1 load the same weights, n and n ^ 2 the same states. The 16-byte loads of a
  // warp are served in only two passes, a half-warp each, if all lanes have such a partner.
  const int column, line, half, unit0, row0;
  float sum[4][8];

  __device__ explicit SliceFma(void* shared)
      : weights(static_cast<Vector*>(shared)),
        column(threadIdx.x / 2 % 2 + threadIdx.x / 8 % 2 * 2),
        line(threadIdx.x % 2 + threadIdx.x / 4 % 2 * 2),
        half(threadIdx.x / 16 % 2),
        unit0(threadIdx.x / 32 % 4 * 32),
        row0(threadIdx.x / 128 * 16) {}

  __device__ bool busy(int units) const { return unit0 < units; }

  // Of the 32 units of a warp, units 8 c + u with c = 0 ... 3 are neighbours in memory, so that
  // four lanes load from different banks.
  static __device__ int place(int unit) { return unit / 32 * 32 + unit % 8 * 4 + unit / 8 % 4; }

  __device__ void hold(const Weights& from, int chunks, int /*e_row*/) {
    for (int i = threadIdx.x; i < kUnits * chunks * kVectors; i += kThreads) {
      const int unit = i % kUnits, v = i / kUnits;
      Vector loaded;
#pragma unroll
      for (int k = 0; k < 4; ++k) loaded.v[k] = from.at<float>(unit, v * 4 + k);
      weights[v * kUnits + place(unit)] = loaded;
    }
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");  // others hold what this one reads
  }

  __device__ __forceinline__ void add(const float* e, int e_row, int slab, int chunks) {
    if (slab == 0)
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int u = 0; u < 8; ++u) sum[r][u] = 0;
    const int first = slab * kSliceSlab, end = min(first + kSliceSlab, chunks);
    const Vector* states[4];
#pragma unroll
    for (int r = 0; r < 4; ++r)
      states[r] = reinterpret_cast<const Vector*>(e + (row0 + line + 4 * r) * e_row) + half;
    // The other half of the lanes takes the units in the order u ^ 1, which are in the other banks.
    const Vector* w[2];
#pragma unroll
    for (int odd = 0; odd < 2; ++odd)
      w[odd] =
          weights + (first * kVectors + half) * kUnits + unit0 + column + (odd ? -4 : 4) * half;
    for (int chunk = first; chunk < end; ++chunk) {
#pragma unroll kUnroll
      for (int v = 0; v < kVectors; v += 2) {
        Vector state[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) state[r] = states[r][v];
#pragma unroll
        for (int u = 0; u < 8; ++u) {
          const Vector weight = w[u % 2][v * kUnits + u * 4];
#pragma unroll
          for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[r][u] = ::fmaf(weight.v[k], state[r].v[k], sum[r][u]);
        }
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) states[r] += kVectors;
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) w[odd] += kVectors * kUnits;
    }
  }

  // Two lanes have the same rows and units. Each of them adds up two of the rows.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    Pack<float, 2> pairs[2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        const float mine = half ? sum[r + 2][u ^ 1] : sum[r][u];
        const float theirs = half ? sum[r][u ^ 1] : sum[r + 2][u];
        pairs[r][u / 2].v[u % 2] = mine + __shfl_xor_sync(~0u, theirs, 16);
      }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        f(row0 + line + 4 * (r + 2 * half), unit0 + column * 8 + 2 * i, pairs[r][i]);
  }
};

// Workers that hold weights in registers need more registers than an equal share, so the other
// warps give some away. Only 9.0a can move registers between warps; plain 9.0 runs without, more
// slowly.
template <bool wanted>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (wanted) asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
#endif
}
template <bool wanted>
__device__ __forceinline__ void give_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (wanted) asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
#endif
}

constexpr int kTellers = (kSliceThreads - kThreads) / 32 - 1;

template <class Product, Pass pass>
class Slices : Layer<typename Product::Stored, pass, 2> {
  using S = typename Product::Stored;
  using Base = Layer<S, pass, 2>;
  using Base::b0, Base::j0, Base::kForward, Base::p, Base::q, Base::rows, Base::step, Base::units;
  using typename Base::Inputs;
  static constexpr Tile kTile = Product::kTile;
  static constexpr int kGroup = kTile.rows;
  static constexpr int kOwn = own_units(kTile);
  // The threads that finish a group, each with a pair of units. If they are half of the workers,
  // the two halves finish groups alternately: finishing takes long but uses few resources.
  static constexpr int kFinishers = kGroup * kOwn / 2, kHalves = kThreads / kFinishers;
  static_assert(kHalves * kFinishers == kThreads);

 public:
  __device__ Slices(const Params& params, unsigned char* shared)
      : Base(params, int64_t(team(params)) * params.rows,
             int64_t(blockIdx.x % params.blocks) * kOwn),
        shared_(shared),
        slice_(int(blockIdx.x) & (params.slices - 1)),  // a power of two
        k0_(int64_t(slice_) * params.state_k),
        counters_(params.counters + team(params) * params.groups),
        e_(reinterpret_cast<S*>(shared + params.e_offset)),
        received_(reinterpret_cast<float*>(shared + params.partial_offset)),
        fetched_(reinterpret_cast<uint64_t*>(shared + params.arrivals_offset)),
        freed_(fetched_ + kMostSlots),
        arrived_(freed_ + kMostSlots),
        finished_(arrived_ + kMostGroups) {}

  __device__ void run() {
    begin();
    if (threadIdx.x < kThreads) {
      take_registers<kTile.mma()>();
      work();
    } else {
      give_registers<kTile.mma()>();
      const int helper = int(threadIdx.x) / 32 - kWarps;
      if (helper < kTellers)
        tell(helper);
      else
        fetch();
    }
    // A block must not exit while a peer may still write into its shared memory.
    cluster_barrier();
  }

 private:
  __device__ void begin() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < p.slots; ++i) {
        init_arrivals(fetched_ + i, 32);
        init_arrivals(freed_ + i, kWarps);
      }
      for (int g = 0; g < p.groups; ++g) {
        init_arrivals(arrived_ + g);
        init_arrivals(finished_ + g, kFinishers / 32);
      }
    }
    // Start with zeros, because rows that are not fetched are multiplied, too.
    for (int i = threadIdx.x; i < p.slots * p.e_size; i += kSliceThreads) e_[i] = narrow<S>(0);
    Base::prepare(vectors(), carry(), kSliceThreads);
    cluster_barrier();
  }

  // Calls turn(s, group, number of its rows) for all steps and all groups that have rows in them,
  // in the order that all warps of all blocks follow.
  template <class Turn>
  __device__ __forceinline__ void each_turn(const Turn& turn) const {
    const int64_t end = q.T + (!kForward && q.last.data);
    for (int64_t s = Base::first_step(0); s < end; ++s) {
      const int alive = is_finishing(s) ? rows : step(s).alive;
      for (int g = 0; g * kGroup < alive; ++g) turn(s, g, min(kGroup, alive - g * kGroup));
    }
  }
  // Backward, one more product after the last step gives ∂L/∂h0.
  __device__ bool is_finishing(int64_t s) const { return !kForward && s == q.T; }

  // A position in the ring of buffers for states. The slabs of all turns use the buffers in order.
  struct Ring {
    int slot = 0;
    unsigned round = 0;

    __device__ __forceinline__ void advance(int slots) {
      if (++slot == slots) {
        slot = 0;
        ++round;
      }
    }
  };
  __device__ S* states_in(const Ring& ring) const { return e_ + ring.slot * p.e_size; }

  // ---- workers ----

  // A turn that has been multiplied but not finished.
  struct Pending {
    int64_t s;
    int group = -1, count;
    Inputs in;
  };

  __device__ __forceinline__ void work() {
    Product product(shared_);
    hold_weights(product);
    const int lane = threadIdx.x % 32;
    const int cluster_units = int(min(int64_t(p.slices) * kOwn, q.H - (j0 - slice_ * kOwn)));
    const bool busy = product.busy(cluster_units);
    Pending pending;
    unsigned phases = 0;  // parity of the phase of arrived_, one bit per group
    Ring ring;
    each_turn([&](int64_t s, int group, int count) {
      const Inputs in = load_inputs(s, group);
      for (int i = 0; i <= p.slabs; ++i) {
        // Finish the previous turn after the first slab, when its sums have arrived. But if it was
        // of the same group, finish it first: this turn's states are fetched only after that.
        if (pending.group >= 0 && (i == 1 || pending.group == group)) finish(pending, phases);
        if (i == p.slabs) break;
        wait_for_arrivals(fetched_ + ring.slot, ring.round & 1, {p, s, "fetched states (slices)"});
        if (busy) product.add(states_in(ring), p.e_row, i, p.chunks);
        __syncwarp();
        if (lane == 0) arrive(freed_ + ring.slot);
        ring.advance(p.slots);
      }
      if (threadIdx.x == 0)
        expect_bytes(arrived_ + group, p.slices * count * ((units + 1) / 2) * 8);
      if (busy)
        product.each([&](int row, int unit, const Pack<float, 2>& sums) {
          if (row < count && unit < cluster_units)
            send_to_peer(received(group, slice_, row, unit % kOwn), arrived_ + group, unit / kOwn,
                         sums);
        });
      if (finishes(group)) pending = {s, group, count, in};
    });
    if (pending.group >= 0) finish(pending, phases);
  }

  __device__ void hold_weights(Product& product) const {
    const int64_t first = j0 - slice_ * kOwn;  // first unit of the cluster
    Weights w = {};
    w.w_hh_unit = kForward ? q.w_hh_row : 1;
    w.w_hh_k = kForward ? 1 : q.w_hh_row;
    w.w_hh = static_cast<const S*>(q.w_hh) + first * w.w_hh_unit + k0_ * w.w_hh_k;
    w.units = int(min(int64_t(p.slices) * kOwn, q.H - first));
    w.H = q.H - k0_;
    w.state_k = p.state_k;
    product.hold(w, p.chunks, p.e_row);
  }

  __device__ static bool finishes(int group) {
    return kHalves == 1 || int(threadIdx.x) / kFinishers == group % kHalves;
  }
  // The row in a group and the first unit of this thread's pair.
  __device__ static int own_row() { return threadIdx.x % kFinishers / (kOwn / 2); }
  __device__ static int own_unit() { return threadIdx.x % (kOwn / 2) * 2; }

  __device__ __forceinline__ Inputs load_inputs(int64_t s, int group) const {
    if (!finishes(group)) return {};
    return Base::inputs(own_unit(), group * kGroup + own_row(), step(s), step(s + 1));
  }

  __device__ __forceinline__ void finish(Pending& turn, unsigned& phases) const {
    const int group = turn.group, unit = own_unit(), row = group * kGroup + own_row();
    wait_for_arrivals(arrived_ + group, phases >> group & 1, {p, turn.s, "sums of peers (slices)"});
    phases ^= 1u << group;
    if (own_row() < turn.count && unit < units) {
      float sum[2] = {};
      for (int slice = 0; slice < p.slices; ++slice) {
        const auto part =
            *reinterpret_cast<const Pack<float, 2>*>(received(group, slice, own_row(), unit));
#pragma unroll
        for (int n = 0; n < 2; ++n) sum[n] += part.v[n];
      }
      float* const carried = p.carry_offset ? carry() + row * kOwn + unit : nullptr;
      if (is_finishing(turn.s))
        Base::finish(sum, unit, row, carried);
      else
        Base::compute(turn.in, sum, unit, row, step(turn.s - 1), step(turn.s), step(turn.s + 1),
                      vectors() + unit, vectors() + kOwn + unit, carried, [](const auto&) {});
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(finished_ + group);
    turn.group = -1;
  }

  // ---- the fetcher ----

  __device__ __forceinline__ void fetch() const {
    const int lane = threadIdx.x % 32;
    // Each lane tracks the group of its number: the turns so far, and the counter as last read.
    unsigned turns = 0, told = 0;
    Ring ring;
    each_turn([&](int64_t s, int group, int count) {
      // Each lane has the source address of one row.
      const int row = group * kGroup + lane;
      const Step before = step(s - 1);
      const S* from = nullptr;
      if (lane < count)
        from =
            is_finishing(s) ? Base::state_after_all(row) : Base::state_before(row, before, step(s));
      const bool by_copies =
          __all_sync(~0u, p.state_copies && (!from || is_finishing(s) || row < before.alive));
      const unsigned full = __shfl_sync(~0u, turns, group) * unsigned(p.blocks);
      if (lane == group) ++turns;
      // One read of all counters may be enough for several turns.
      const TimeLimit limit(p, s, "all blocks of the team (slices)");
      while (int(__shfl_sync(~0u, told, group) - full) < 0) {
        if (lane < p.groups) told = read_count(counters_ + lane);
        limit.check();
      }
      __syncwarp();
      for (int i = 0; i < p.slabs; ++i) {
        if (ring.round > 0)
          wait_for_arrivals(freed_ + ring.slot, ring.round - 1 & 1, {p, s, "a buffer (slices)"});
        fetch_slab(states_in(ring), i * p.slab * kTile.chunk(), from, count, by_copies);
        if (by_copies)
          arrive_after_copies(fetched_ + ring.slot);
        else
          arrive(fetched_ + ring.slot);
        ring.advance(p.slots);
      }
    });
  }

  // Fetches a slab, which begins at `first` in the slice, for the rows of a group. Missing states
  // become zeros.
  __device__ __forceinline__ void fetch_slab(S* e, int first, const S* from, int count,
                                             bool by_copies) const {
    const int lane = threadIdx.x % 32;
    const int size = min(p.slab * kTile.chunk(), p.state_k - first);
    const int64_t k0 = k0_ + first;
    const auto source_of = [&](int row) {
      return reinterpret_cast<const S*>(
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(from), row));
    };
    if (by_copies) {
      // 16 or 32 lanes copy a row of a slab; several rows are in flight at once.
      constexpr int kPerCopy = 16 / int(sizeof(S)), kLanes = kTile.mma() ? 32 : 16;
#pragma unroll 4
      for (int i = 0; i < kGroup; i += 32 / kLanes) {
        const int row = i + lane / kLanes;
        const S* const source = source_of(row);
        if (row < count)
          for (int j = lane % kLanes * kPerCopy; j < size; j += kLanes * kPerCopy) {
            const bool exists = source && k0 + j < q.H;
            copy_or_zero(e + row * p.e_row + j,
                         exists ? source + k0 + j : static_cast<const S*>(q.out[0].data), exists);
          }
      }
    } else {
#pragma unroll 1
      for (int row = 0; row < count; ++row) {
        const S* const source = source_of(row);
#pragma unroll 1
        for (int j = lane; j < size; j += 32)
          e[row * p.e_row + j] =
              source && k0 + j < q.H ? load_through_l2(source + k0 + j) : narrow<S>(0);
      }
    }
  }

  // ---- tellers ----

  // Signals (tells) finished turns to the team. Each signal waits until the written states are
  // visible in memory, so the groups are divided among several warps (tellers).
  __device__ __forceinline__ void tell(int teller) const {
    unsigned phases = 0;
    each_turn([&](int64_t s, int group, int) {
      if (group % kTellers != teller) return;
      wait_for_arrivals(finished_ + group, phases >> group & 1,
                        {p, s, "the end of a turn (slices)"});
      phases ^= 1u << group;
      if (threadIdx.x % 32 == 0) count_arrival(counters_ + group);
    });
  }

  // The partial sum from `slice` for one of this block's own units.
  __device__ float* received(int group, int slice, int row, int unit) const {
    return received_ + ((group * p.slices + slice) * kGroup + row) * kOwn + unit;
  }
  __device__ float* carry() const { return reinterpret_cast<float*>(shared_ + p.carry_offset); }
  __device__ float* vectors() const {
    return reinterpret_cast<float*>(shared_ + p.vectors_offset);  // bias, then alpha
  }

  unsigned char* const shared_;
  const int slice_;
  const int64_t k0_;          // where the slice begins
  unsigned* const counters_;  // per group: signals from all blocks, over all steps
  S* const e_;                // [slots], of kGroup rows
  float* const received_;
  // mbarriers: states fetched into a slot, slot freed, sums of a group arrived, group finished
  uint64_t *const fetched_, *const freed_, *const arrived_, *const finished_;
};

template <class Product, Pass pass>
__global__ void __launch_bounds__(kSliceThreads, 1) sliced(const __grid_constant__ Params params) {
#if __CUDA_ARCH__ >= 900  // not planned on older ones, nor with tensor cores on newer ones
  if constexpr (__CUDA_ARCH__ < 1000 || !Product::kTile.mma()) {
    extern __shared__ __align__(16) unsigned char shared[];
    Slices<Product, pass>(params, shared).run();
  }
#endif
}

}  // namespace fusedrnn::cuda
