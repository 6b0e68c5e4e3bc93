// A specialisation of the time loop in persistent.cuh for the most common problem: a dense sequence
// without resets and without a leak, one output, and no more batch rows than one product takes; in
// the block and cluster regimes. Everything that is constant in time is computed before the loop,
// pointers advance by a constant stride, and no step is special: the states of the last step are
// sent, too, although nothing reads them.
#pragma once

#include "persistent.cuh"

namespace fusedrnn::cuda {

template <class Product, Pass pass, bool kCluster>
class PlainWalk : Walk<Product, pass> {
  using S = typename Product::Stored;
  using Base = Walk<Product, pass>;
  using C = typename Base::C;
  using Base::b0, Base::j0, Base::kForward, Base::p, Base::q, Base::rows, Base::units;
  using Base::product_, Base::e_, Base::carry_, Base::vectors_, Base::partial_, Base::shared_;
  using typename Base::Numbers, typename Base::Raw;
  static constexpr int N = Product::kPack, kItems = Product::kItems;

  // The number of shuffles in which lanes gather 16 bytes of neighbouring units.
  static constexpr int kJoins = sizeof(Numbers) == 8 ? 1 : 2;
  // The number of lanes that then hold the same 16 bytes. Each sends them to other peers.
  static constexpr int kSenders = Product::kCopies << kJoins;
  static constexpr int kSent = 16 / int(sizeof(S));

 public:
  __device__ PlainWalk(const Params& params, unsigned char* shared) : Base(params, shared) {}

  __device__ void run() {
    Base::hold_weights();
    Base::begin(p, b0, j0, shared_);
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    // This is 0 (it is the alpha of a unit), but the compiler cannot know that. A parameter to
    // which it is added stays in a register; otherwise the compiler loads it from constant memory
    // in each step, at 30 cycles. Tiles of 4 items have no registers left for that.
    const int zero = kItems < 4 ? *reinterpret_cast<volatile int*>(vectors_ + p.units) : 0;
    const int e_row = p.e_row + zero, chunks = p.chunks + zero;
    product_.settle(rows, units);
    const int busy = pinned(product_.busy(units)), nonlinearity = int(q.nonlinearity) + zero;
    // The place of an item's state in e, and of the 16 bytes that this lane sends; -1 if there is
    // no such item.
    const int sender = sender_of(lane);
    const int first_peer = pinned(sender ^ (int(blockIdx.x) & (p.blocks - 1)));  // a power of two
    int place[kItems], sent[kItems];
    C bias[kItems][N];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int row = product_.row(i), unit = product_.unit(i);
      const bool exists = busy && computes(i) && row < rows && unit < units;
      const int at = row * e_row + int(j0) + unit;
      place[i] = pinned(exists && product_.owns(i) ? at : -1);
      sent[i] = pinned(exists && sender < p.blocks ? at / kSent * kSent : -1);
#pragma unroll
      for (int n = 0; n < N; ++n) bias[i][n] = exists ? vectors_[unit + n] : C(0);
    }
    // Pointers to the current step of this thread's first item; the other items lie at fixed
    // distances. A thread without an item points to the first item of the block, so that loads need
    // no branch.
    const char *in = track(q.in[0]), *gate = track(q.gate);
    char* out = track(q.out[0]);
    const bool has_in = q.in[0].data, loads = busy && (!kForward || has_in);
    Raw next_in[kItems] = {}, next_gate[kItems] = {};
    const auto load = [&](bool far) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const bool exists = kCluster && Product::kCopies > 1 ? row_exists(i) : place[i] >= 0;
        if (kForward || has_in)
          next_in[i] = fetched(in + (exists ? distance(q.in[0], i) : 0), far, p.in_step);
        if (!kForward)
          next_gate[i] = fetched(gate + (exists ? distance(q.gate, i) : 0), far, p.gate_step);
      }
    };
    if (loads) load(false);
    // Each warp copies the inputs of one row. `begin` has copied those of the first step.
    const int x_copy = p.x_copy + zero, first_x = lane * (x_copy ? x_copy / int(sizeof(S)) : 1);
    const char* x = track(q.x, warp, first_x);
    const int copied = pinned(warp < rows ? int(q.I) - first_x : 0);
    const int x_place = pinned(warp * e_row + p.state_k + first_x);
    // The next step's inputs are loaded while at least this many steps are left, including this
    // one.
    const int with_next_x = pinned(copied > 0 ? 2 : INT32_MAX);
    const int with_next = pinned(loads ? 2 : INT32_MAX);

    // Bytes that arrive in a step.
    const int bytes = rows * int(q.H) * int(sizeof(S)) + zero;
    unsigned char* const arrivals = shared_ + (p.arrivals_offset + zero);
    Numbers results[kItems];
    const int half = p.e_size + zero;
    int from = 0;
    const int end = kForward || !q.last.data ? 0 : -1;  // one more product gives ∂L/∂h0
    unsigned s = 0;
    for (int left = int(q.T); left > end; --left, ++s) {
      const bool finishing = !kForward && left == 0;
      S* const to = e_ + (from ^ half);
      uint64_t* const arrived = reinterpret_cast<uint64_t*>(arrivals) + (~s & 1);
      if (kCluster && threadIdx.x == 0 && !finishing) expect_bytes(arrived, bytes);
      if (left >= with_next_x) {
        x += p.x_step;
        S* const to_x = to + x_place;
        const bool far = kFar && left > kFar + 1;
        if (x_copy == 16)
          copy_x<16>(to_x, x, copied, far);
        else if (x_copy == 8)
          copy_x<8>(to_x, x, copied, far);
        else if (x_copy == 4)
          copy_x<4>(to_x, x, copied, far);
        else
          copy_x<0>(to_x, x, copied, far);
      }
      if (busy) {
        Raw now_in[kItems], now_gate[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) now_in[i] = next_in[i], now_gate[i] = next_gate[i];
        if (left >= with_next) {
          in += p.in_step;
          if (!kForward) gate += p.gate_step;
          load(kFar && left > kFar + 1);
        }
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
          const Numbers ins = Base::unpack(now_in[i]), gates = Base::unpack(now_gate[i]);
          // The first step has no product, even if W_hh is NaN; it starts from ∂L/∂h_n if given.
          if (!kForward && s == 0)
#pragma unroll
            for (int n = 0; n < N; ++n)
              sum[i][n] = carry_ && row_exists(i)
                              ? carry_[product_.row(i) * p.units + product_.unit(i) + n]
                              : C(0);
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
                              C(widen(gates.v[n])), none, false, none, result, state, other);
              results[i].v[n] = narrow<S>(result);
            }
          });
          if (kCluster)
            send_to_all(to + sent[i], sent[i] >= 0, first_peer, results[i], arrived);
          else if (stores)
            *reinterpret_cast<Numbers*>(to + place[i]) = results[i];
          if (stores) *reinterpret_cast<Numbers*>(out + distance(q.out[0], i)) = results[i];
        }
        out += p.out_step;
      }
      if (finishing) break;
      from ^= half;
      copies_done();
      __syncthreads();
      if (kCluster)
        wait_for_arrivals(arrived, s >> 1 & 1, {p, int64_t(s), "states of all peers (plain)"});
    }
    if (kForward && q.last.data)
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (place[i] >= 0) store_last(i, results[i].v);
    if (kCluster) cluster_barrier();
  }

 private:
  // Stores item i of the state after the last step, or of ∂L/∂h0.
  template <class T>
  __device__ __forceinline__ void store_last(int i, const T (&values)[N]) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
      *Base::at(q.last, product_.row(i), j0 + product_.unit(i) + n) =
          narrow<S>(C(widen(values[n])));
  }

  // All lanes with the same sums compute the state, so that they can share the sends.
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
    const int64_t t = q.descending ? q.T - 1 : 0;
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
  __device__ static Raw fetched(const char* from, bool far, int64_t step) {
    if (far) prefetch_into_l2(from + kFar * step);
    return *reinterpret_cast<const Raw*>(from);
  }

  // Copies this lane's share of a row's inputs, `bytes` at a time; 0: one number at a time.
  template <int bytes>
  __device__ __forceinline__ void copy_x(S* to, const char* x, int count, bool far) const {
    constexpr int kPer = bytes ? bytes / int(sizeof(S)) : 1;
    if constexpr (bytes % sizeof(S) == 0) {
      const auto copy = [&](int j) {
        const S* const from = reinterpret_cast<const S*>(x) + j;
        if (far) prefetch_into_l2(reinterpret_cast<const char*>(from) + kFar * p.x_step);
        if (bytes)
          copy_async(to + j, from, bytes);
        else
          to[j] = *from;
      };
      copy(0);
#pragma unroll 1
      for (int j = 32 * kPer; j < count; j += 32 * kPer) copy(j);
    }
  }

  // Sends to all blocks of the team. All lanes of the warp must call it.
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
    for (int k = 0; k < 16; k += kSenders)  // each block starts with another peer
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
  if constexpr (exists) PlainWalk<Product, pass, kCluster>(params, shared).run();
}

}  // namespace fusedrnn::cuda
