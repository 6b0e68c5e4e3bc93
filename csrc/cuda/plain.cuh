// A specialisation of the time loop in persistent.cuh for the most common problem, in the block and
// cluster regimes: a dense sequence with one output, without resets and without a leak, whose input
// product a GEMM has computed, and which has no more batch rows than one product takes. Everything
// that is constant in time is computed before the loop, pointers advance by a constant stride, and
// no step is special: even the states of the last step are sent, although nothing reads them.
#pragma once

#include "persistent.cuh"

namespace fusedrnn::cuda {

template <class Product, Pass pass, bool kCluster>
class PlainTimeLoop : TimeLoop<Product, pass> {
  using S = typename Product::Stored;
  using Base = TimeLoop<Product, pass>;
  using C = typename Base::C;
  using Base::b0, Base::j0, Base::kForward, Base::p, Base::problem, Base::rows, Base::units;
  using Base::product_, Base::e_, Base::carry_, Base::vectors_, Base::partial_, Base::shared_;
  using typename Base::Numbers, typename Base::Raw;
  static constexpr int N = Product::kPack, kItems = Product::kItems;

  // The number of shuffles in which lanes gather 16 bytes of neighbouring units.
  static constexpr int kJoins = sizeof(Numbers) == 8 ? 1 : 2;
  // The number of lanes that then hold the same 16 bytes. Each sends them to different peers.
  static constexpr int kSenders = Product::kCopies << kJoins;
  static constexpr int kSent = 16 / int(sizeof(S));

 public:
  __device__ PlainTimeLoop(const Params& params, unsigned char* shared) : Base(params, shared) {}

  __device__ void run() {
    Base::hold_weights();
    Base::begin(p, b0, j0, shared_);
    product_.settle(rows, units);
    // Warps without units run their own loop, so that the other warps need no branch around the
    // step.
    if (product_.busy(units))
      time_loop<true>();
    else
      time_loop<false>();
    if (kCluster) cluster_barrier();
  }

 private:
  template <bool kBusy>
  __device__ __forceinline__ void time_loop() {
    const int lane = threadIdx.x % 32;
    // This is 0 (the alpha of a unit, which is 0 without a leak), but the compiler cannot know
    // that. A parameter to which it is added stays in a register; otherwise the compiler loads it
    // from constant memory in each step, at 30 cycles. Tiles of 4 items have no registers left for
    // that.
    const int zero = kItems < 4 ? *reinterpret_cast<volatile int*>(vectors_ + p.units) : 0;
    const int e_row = p.e_row + zero, chunks = p.chunks + zero;
    const int nonlinearity = int(problem.nonlinearity) + zero;
    // The place of an item's state in e, and of the 16 bytes that this lane sends; -1 if there is
    // no such item.
    const int sender = sender_of(lane);
    const int first_peer = pinned(sender ^ (int(blockIdx.x) & (p.blocks - 1)));  // a power of two
    int place[kItems], sent[kItems];
    C bias[kItems][N];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int row = product_.row(i), unit = product_.unit(i);
      const bool exists = kBusy && computes(i) && row < rows && unit < units;
      const int at = row * e_row + int(j0) + unit;
      place[i] = pinned(exists && product_.owns(i) ? at : -1);
      sent[i] = pinned(exists && sender < p.blocks ? at / kSent * kSent : -1);
#pragma unroll
      for (int n = 0; n < N; ++n) bias[i][n] = exists ? vectors_[unit + n] : C(0);
    }
    // Pointers to the current step of this thread's first item; the other items lie at fixed
    // distances. A thread without an item points to the first item of the block, so that loads need
    // no branch. For the same reason the pointers stay where they are after the last step.
    const char *in = track(problem.in[0]), *gate = track(problem.gate);
    char* out = track(problem.out[0]);
    const int64_t in_step = p.in_step + zero, gate_step = p.gate_step + zero;
    const int64_t out_step = p.out_step + zero;
    Raw next_in[kItems] = {}, next_gate[kItems] = {};
    const auto load = [&](bool far) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const bool exists = kCluster && Product::kCopies > 1 ? row_exists(i) : place[i] >= 0;
        next_in[i] = fetched(in + (exists ? distance(problem.in[0], i) : 0), far, in_step);
        if (!kForward)
          next_gate[i] = fetched(gate + (exists ? distance(problem.gate, i) : 0), far, gate_step);
      }
    };
    if (kBusy) load(false);

    // Bytes that arrive in a step.
    const int bytes = rows * int(problem.H) * int(sizeof(S)) + zero;
    unsigned char* const arrivals = shared_ + (p.arrivals_offset + zero);
    Numbers results[kItems];
    const int half = p.e_size + zero;
    int from = 0;
    const int end = kForward || !problem.last.data ? 0 : -1;  // one more product gives ∂L/∂h0
    unsigned s = 0;
    for (int left = int(problem.T); left > end; --left, ++s) {
      const bool finishing = !kForward && left == 0;
      S* const to = e_ + (from ^ half);
      uint64_t* const arrived = reinterpret_cast<uint64_t*>(arrivals) + (~s & 1);
      if (kCluster && threadIdx.x == 0 && !finishing) expect_bytes(arrived, bytes);
      if (kBusy) {
        // Copy the inputs out of the registers into which those of the next step are loaded.
        // Otherwise the compiler copies the loaded values at the end of the step, and waits for
        // them there.
        Raw now_in[kItems], now_gate[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          now_in[i] = copied(next_in[i]);
          if (!kForward) now_gate[i] = copied(next_gate[i]);
        }
        const bool more = left >= 2;
        in += more ? in_step : 0;
        if (!kForward) gate += more ? gate_step : 0;
        load(kFar && left > kFar + 1);
        C sum[kItems][N];
        product_.multiply(e_ + from, e_row, chunks, partial_, sum);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          if (!computes(i)) continue;
          const bool stores = place[i] >= 0;
          if (finishing) {
            if (stores) store_last(i, sum[i]);
            continue;
          }
          // The first step has no product, even if W_hh is NaN; it starts from ∂L/∂h_n if given.
          if (!kForward && s == 0)
#pragma unroll
            for (int n = 0; n < N; ++n)
              sum[i][n] = carry_ && row_exists(i)
                              ? carry_[product_.row(i) * p.units + product_.unit(i) + n]
                              : C(0);
          const Numbers ins = Base::unpack(now_in[i]);
          const Numbers gates = kForward ? Numbers{} : Base::unpack(now_gate[i]);
          with_nonlinearity<S>(Nonlinearity(nonlinearity), [&](auto phi) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
              C result, state, other,
                  none = C(-0.0);  // adding it changes nothing, and costs nothing
              if constexpr (kForward)
                activation<true>(phi, false, sum[i][n] + C(widen(ins.v[n])) + bias[i][n], none,
                                 none, false, none, state, result, other);
              else
                adjoint<true>(phi, false, sum[i][n], C(widen(ins.v[n])), none, none,
                              C(widen(gates.v[n])), none, false, none, false, none, result, state,
                              other);
              results[i].v[n] = narrow<S>(result);
            }
          });
          if (kCluster)
            send_to_all(to + sent[i], sent[i] >= 0, first_peer, results[i], arrived);
          else if (stores)
            *reinterpret_cast<Numbers*>(to + place[i]) = results[i];
          if (stores) *reinterpret_cast<Numbers*>(out + distance(problem.out[0], i)) = results[i];
        }
        out += out_step;
      }
      if (finishing) break;
      from ^= half;
      __syncthreads();
      if (kCluster)
        wait_for_arrivals(arrived, s >> 1 & 1, {p, int64_t(s), "states of all peers (plain)"});
    }
    if (kBusy && kForward && problem.last.data)
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (place[i] >= 0) store_last(i, results[i].v);
  }

  // Stores item i of the state after the last step, or of ∂L/∂h0.
  template <class T>
  __device__ __forceinline__ void store_last(int i, const T (&values)[N]) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
      *Base::at(problem.last, product_.row(i), j0 + product_.unit(i) + n) =
          narrow<S>(C(widen(values[n])));
  }

  // All lanes that hold the same sums compute the state, so that they can share the sends.
  __device__ bool computes(int i) const {
    return (kCluster && Product::kCopies > 1) || product_.owns(i);
  }

  // Whether the row and unit of item i exist; the item may belong to another lane.
  __device__ bool row_exists(int i) const {
    return product_.row(i) < rows && product_.unit(i) < units;
  }
  // The index of a lane among those that hold the same 16 bytes.
  __device__ int sender_of(int lane) const {
    int sender = product_.copy() << kJoins;
    for (int join = 0; join < kJoins; ++join)
      if (lane & Product::neighbour(join)) sender += 1 << join;
    return sender;
  }

  // The address of unit (or input) j of the block's row `row` in the first step.
  __device__ char* track(const Series& series, int row, int64_t j) const {
    const int64_t t = problem.descending ? problem.T - 1 : 0;
    const int64_t place = t * series.step + (b0 + row) * series.row + j;
    return reinterpret_cast<char*>(static_cast<S*>(series.data) + place);
  }
  __device__ char* track(const Series& series) const {
    return row_exists(0) ? track(series, product_.row(0), j0 + product_.unit(0))
                         : track(series, 0, j0);
  }
  // Bytes from the first item to item i.
  __device__ static int64_t distance(const Series& series, int i) {
    return (i % 2 * series.row + i / 2 * 16) * int64_t(sizeof(S));
  }
  // Returns a copy that the compiler does not merge with the original.
  template <class T>
  __device__ static T copied(T v) {
    if constexpr (sizeof(T) == 8)
      asm volatile("" : "+l"(v));
    else
      asm volatile("" : "+r"(v));
    return v;
  }
  __device__ static Raw fetched(const char* from, bool far, int64_t step) {
    if (kFar) prefetch_into_l2(from + (far ? kFar * step : 0));
    return *reinterpret_cast<const Raw*>(from);
  }

  // Sends to all blocks of the batch group. All lanes of the warp must call it.
  __device__ __forceinline__ void send_to_all(S* place, bool exists, int first_peer,
                                              const Numbers& numbers,
                                              const uint64_t* arrived) const {
    uint32_t words[4] = {};
    memcpy(words, &numbers, sizeof(numbers));
#pragma unroll
    for (int join = 0; join < kJoins; ++join) {
      const int bit = Product::neighbour(join), count = int(sizeof(Numbers)) / 4 << join;
      const bool second = threadIdx.x & bit;
#pragma unroll
      for (int w = 0; w < count; ++w) {
        const uint32_t theirs = __shfl_xor_sync(~0u, words[w], bit);
        words[count + w] = second ? words[w] : theirs;
        words[w] = second ? theirs : words[w];
      }
    }
    if (!exists) return;
#pragma unroll
    for (int k = 0; k < 16; k += kSenders)  // each block starts with a different peer
      if (k < p.blocks) send_to_peer(place, arrived, k ^ first_peer, words);
  }
};

template <class Product, Pass pass, bool kCluster>
__global__ void __launch_bounds__(kThreads, 1) plain(const __grid_constant__ Params params) {
#if __CUDA_ARCH__ >= 900
  constexpr bool exists = true;
#else
  constexpr bool exists = !kCluster;
#endif
  extern __shared__ __align__(16) unsigned char shared[];
  if constexpr (exists) PlainTimeLoop<Product, pass, kCluster>(params, shared).run();
}

}  // namespace fusedrnn::cuda
