// Products of the states of some batch rows with the weights that a block holds, divided among 256
// threads in two ways: Fma and Mma. In both, the weights of a block, [units, K], are divided into
// chunks of K. Each thread holds its part of as many chunks as fit into 128 registers; the rest is
// in shared memory, in the order in which threads load it. States e [rows, K] are read from shared
// memory. After a product each thread owns the sums of kItems items; an item is kPack neighbouring
// units of one row.
#pragma once

#include <cstdint>
#include <type_traits>

#include "exchange.cuh"
#include "numbers.cuh"
#include "plan.h"

namespace fusedrnn::cuda {

constexpr int kWarps = kThreads / 32;

// How far to unroll loops that load and multiply, or that send. From architecture 10.0 on the
// compiler uses more registers and would spill.
#if __CUDA_ARCH__ < 1000
constexpr int kUnroll = 2;
#else
constexpr int kUnroll = 1;
#endif

// The weights that a block holds: the rows of its units, with the columns of W_hh, then of W_ih.
struct Weights {
  const void* w_hh;
  const void* w_ih;
  int64_t w_hh_unit, w_hh_k;  // strides of units, and along K
  int64_t w_ih_unit;
  int units;              // that exist
  int64_t H, I, state_k;  // K: H states, padded to state_k, then I inputs

  template <class S>
  __device__ S at(int unit, int64_t k) const {
    if (unit >= units) return narrow<S>(0);
    if (k < state_k)
      return k < H ? static_cast<const S*>(w_hh)[unit * w_hh_unit + k * w_hh_k] : narrow<S>(0);
    k -= state_k;
    return k < I ? static_cast<const S*>(w_ih)[unit * w_ih_unit + k] : narrow<S>(0);
  }
};

// An integer known at compile time.
template <int n>
using Number = std::integral_constant<int, n>;

// Returns v, which the compiler then keeps in a register instead of recomputing it in each step.
// All lanes of the warp must call it. Does nothing on architectures where registers are scarce.
__device__ __forceinline__ int pinned(int v) {
#if __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
  return __shfl_sync(~0u, v, threadIdx.x % 32);
#else
  return v;
#endif
}

template <class T>
__device__ __forceinline__ uint32_t bits(T v) {
  static_assert(sizeof(T) == 4);
  uint32_t u;
  memcpy(&u, &v, 4);
  return u;
}

// ---- plain multiplication and addition ----

// The lanes of a warp are divided into 4 groups of units times 8 parts of K. A 16-byte load of e
// then has only 8 different addresses; the other 24 lanes are served by broadcast.
template <class C, int UnitsPerThread, int Rows>
struct Fma {
  using Stored = C;
  static constexpr Tile kTile{sizeof(C) == 8 ? Arithmetic::fma_f64 : Arithmetic::fma_f32,
                              UnitsPerThread, Rows};
  static constexpr int kVector = 16 / sizeof(C);
  static constexpr int kChunk = kTile.chunk();
  static constexpr int kHeld = kTile.held(), kGroup = kTile.group();
  static constexpr int kRows = Rows;  // batch rows at once
  static constexpr int kSums = UnitsPerThread * Rows;
  static_assert(kSums <= 8);  // so that 8 lanes can own one each
  static constexpr int kItems = 1;
  static constexpr int kPack = 1;
  // kCopies is how many lanes end with the same sums. neighbour(0) is the bit of the lane index in
  // which the owners of neighbouring packs of units differ, neighbour(1) that of the owners of
  // neighbouring pairs of packs.
  static constexpr int kCopies = 8 / kSums;
  static constexpr int neighbour(int join) {
    if (UnitsPerThread == 1) return join ? 2 : 1;
    return join == 0 ? 4 : UnitsPerThread == 2 ? 1 : 8;
  }

  struct alignas(16) Vector {
    C v[kVector];
  };

  Vector held[kHeld][UnitsPerThread];
  const Vector* spilled;  // [chunk][unit][thread] in shared memory
  int lane, warp;

  // The second parameter is used only by Mma.
  __device__ Fma(void* spill, int /*split_log2*/)
      : spilled(static_cast<const Vector*>(spill)),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32) {}

  __device__ int first_unit() const { return (warp * 4 + lane % 4) * UnitsPerThread; }
  // Whether this warp has any of a block's units.
  __device__ bool busy(int units) const { return warp * 4 * UnitsPerThread < units; }

  // This thread's part of a chunk. Its loads are all in flight at once.
  struct Part {
    Vector of[UnitsPerThread];
  };
  static __device__ __noinline__ Part load(const Weights& weights, int unit, int64_t k) {
    Part part;
#pragma unroll
    for (int u = 0; u < UnitsPerThread; ++u)
#pragma unroll
      for (int i = 0; i < kVector; ++i) part.of[u].v[i] = weights.at<C>(unit + u, k + i);
    return part;
  }

  __device__ void hold(const Weights& weights, int chunks, int /*e_row*/) {
    const int64_t k = lane / 4 * kVector;
#pragma unroll
    for (int c = 0; c < kHeld; ++c)
      if (c / kGroup * kGroup < chunks) {  // a whole group: beyond K, weights are 0
        const Part part = load(weights, first_unit(), k + c * kChunk);
#pragma unroll
        for (int u = 0; u < UnitsPerThread; ++u) held[c][u] = part.of[u];
      }
    Vector* spill = const_cast<Vector*>(spilled) + threadIdx.x;
    for (int c = kHeld; c < chunks; ++c) {
      const Part part = load(weights, first_unit(), k + c * kChunk);
#pragma unroll
      for (int u = 0; u < UnitsPerThread; ++u)
        spill[((c - kHeld) * UnitsPerThread + u) * kThreads] = part.of[u];
    }
  }

  struct States {
    Vector of[Rows];
  };
  static __device__ __forceinline__ States load_states(const C* e, int e_row) {
    States states;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      states.of[r] = *reinterpret_cast<const Vector*>(e + r * e_row);
    }
    return states;
  }
  static __device__ __forceinline__ void add(C (&sum)[UnitsPerThread][Rows],
                                             const Vector (&w)[UnitsPerThread],
                                             const States& states) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const Vector state = states.of[r];
#pragma unroll
      for (int i = 0; i < kVector; ++i)
#pragma unroll
        for (int u = 0; u < UnitsPerThread; ++u)
          sum[u][r] = ::fma(w[u].v[i], state.v[i], sum[u][r]);
    }
  }

  // Computes the sums of the rows at e, e + e_row, ...
  __device__ __forceinline__ void multiply(const C* e, int e_row, int chunks, float* /*partial*/,
                                           C (&item)[kItems][kPack]) {
    // With few sums, chunks alternate between two sets, so that FMAs wait less for each other.
    constexpr int kSets = kSums <= 2 ? 2 : 1;
    C sums[kSets][UnitsPerThread][Rows] = {};
    e += lane / 4 * kVector;
    const auto products = [&] {
#pragma unroll
      for (int c = 0; c < kHeld; c += kGroup) {
        if (c > 0 && c >= chunks) return;
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          add(sums[(c + i) % kSets], held[c + i], load_states(e + (c + i) * kChunk, e_row));
      }
      for (int c = kHeld; c < chunks; ++c) {
        Vector w[UnitsPerThread];
#pragma unroll
        for (int u = 0; u < UnitsPerThread; ++u)
          w[u] = spilled[((c - kHeld) * UnitsPerThread + u) * kThreads + threadIdx.x];
        add(sums[0], w, load_states(e + c * kChunk, e_row));
      }
    };
    products();
    C(&sum)[UnitsPerThread][Rows] = sums[0];
    if constexpr (kSets == 2)
#pragma unroll
      for (int u = 0; u < UnitsPerThread; ++u)
#pragma unroll
        for (int r = 0; r < Rows; ++r) sum[u][r] += sums[1][u][r];
    // Sums over the 8 lanes. As long as a lane has two or more sums, it passes half of them
    // to another lane.
    C value[kSums];
#pragma unroll
    for (int r = 0; r < Rows; ++r)
#pragma unroll
      for (int u = 0; u < UnitsPerThread; ++u) value[r * UnitsPerThread + u] = sum[u][r];
    int count = kSums;
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) {
      if (count > 1) {
        count /= 2;
        const bool odd = lane & bit;
#pragma unroll
        for (int i = 0; i < kSums / 2; ++i)
          if (i < count) {
            const C mine = odd ? value[2 * i + 1] : value[2 * i];
            const C theirs = odd ? value[2 * i] : value[2 * i + 1];
            value[i] = mine + __shfl_xor_sync(~0u, theirs, bit);
          }
      } else {
        value[0] += __shfl_xor_sync(~0u, value[0], bit);
      }
    }
    item[0][0] = value[0];
  }

  // Of the 8 lanes that share units, number `lane / 4` has sum `lane / 4 % kSums` after a product.
  __device__ bool owns(int /*i*/) const { return lane / 4 < kSums; }
  __device__ int unit(int /*i*/) const { return first_unit() + lane / 4 % kSums % UnitsPerThread; }
  __device__ int row(int /*i*/) const { return lane / 4 % kSums / UnitsPerThread; }
  __device__ int copy() const { return lane / 4 / kSums; }
  __device__ void settle(int /*rows*/, int /*units*/) {}
};

// ---- tensor cores ----

// D += A B for A [16, 16] of weights and B [16, 8] of states; [16, 8] and [8, 8] in TF32.
__device__ __forceinline__ void mma(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1,
                                    __half) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.z), "r"(a.w), "r"(b1));
#endif
}
__device__ __forceinline__ void mma(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1,
                                    __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800  // the planner does not use bf16 on older architectures
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#endif
}
__device__ __forceinline__ void mma(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1,
                                    float) {
#if __CUDA_ARCH__ >= 800  // the same for TF32
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ uint32_t to_tf32(float v) {
#if __CUDA_ARCH__ >= 800
  uint32_t u;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(v));
  return u;
#else
  return bits(v);
#endif
}

// Loads four 8 x 8 matrices of 16-bit numbers. Each lane passes the address of a row of 16 bytes.
__device__ __forceinline__ uint4 load_matrices(const void* row) {
  uint4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
               : "r"(shared_address(row))
               : "memory");
  return m;
}

__device__ __forceinline__ uint4 load_transposed(const void* row) {
  uint4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
               : "r"(shared_address(row))
               : "memory");
  return m;
}

// The weights are the stationary A operand; the N dimension is 8 batch rows. The units are divided
// among warps, and `split` warps share the K of the same units, taking chunks in turn. Of the units
// 2g and 2g + 1, the first is row g of A and the second row g + 8: a thread then owns neighbouring
// units, which it stores together.
template <class S, int TilesPerWarp>
struct Mma {
  using Stored = S;
  static constexpr bool kTf32 = sizeof(S) == 4;
  static constexpr Tile kTile{kTf32 ? Arithmetic::mma_tf32 : Arithmetic::mma_f16, TilesPerWarp, 8};
  static constexpr int kChunk = kTile.chunk();  // two fragments
  static constexpr int kFragment = kChunk / 2;
  static constexpr int kHeld = kTile.held();
  static_assert(kHeld % 2 == 0);  // multiply() relies on it
  static constexpr int kRows = 8;
  static constexpr int kItems = 2 * TilesPerWarp;
  static constexpr int kPack = 2;
  static constexpr int kParts = kItems * 32;  // pairs of sums in a warp
  static constexpr int kCopies = 1;           // see Fma
  static constexpr int neighbour(int join) { return 4 << join; }

  uint4 held[kHeld][2][TilesPerWarp];
  const uint4* spilled;  // [chunk][fragment][tile][thread]
  int lane, warp, split_log2, part;
  int owned = 0;              // bit i: this warp finishes item i
  int first_state;            // offset of this lane's first load of states
  int first_part, this_part;  // offsets of partial sums: first warp of these units; this warp
  int turn = 0;

  __device__ Mma(void* spill, int split_log2)
      : spilled(static_cast<const uint4*>(spill)),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        split_log2(split_log2),
        part(warp & ((1 << split_log2) - 1)) {
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if ((i & ((1 << split_log2) - 1)) == part) owned |= 1 << i;
    owned = pinned(owned);
    first_part = pinned((warp >> split_log2 << split_log2) * kParts + lane);
    this_part = pinned(warp * kParts + lane);
  }

  __device__ int first_unit() const { return (warp >> split_log2) * (16 * TilesPerWarp); }
  __device__ bool busy(int units) const { return first_unit() < units; }

  // This thread's part of a chunk. Its loads are all in flight at once.
  struct Part {
    uint4 of[2][TilesPerWarp];
  };
  static __device__ __noinline__ Part load(const Weights& weights, int unit, int64_t k) {
    Part part;
    const int lane = threadIdx.x % 32;
    unit += lane / 4 * 2;
    k += lane % 4 * 2;
#pragma unroll
    for (int f = 0; f < 2; ++f)
#pragma unroll
      for (int m = 0; m < TilesPerWarp; ++m) {
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int u = unit + m * 16 + (i & 1);
          const int64_t at = k + f * kFragment;
          if constexpr (kTf32) {
            a[i] = to_tf32(weights.at<float>(u, at + i / 2));
          } else {
            S pair[2] = {weights.at<S>(u, at + i / 2 * 8), weights.at<S>(u, at + i / 2 * 8 + 1)};
            memcpy(&a[i], pair, 4);
          }
        }
        part.of[f][m] = make_uint4(a[0], a[1], a[2], a[3]);
      }
    return part;
  }

  // `chunks` must be a multiple of the number of warps that share them.
  __device__ void hold(const Weights& weights, int chunks, int e_row) {
    // In TF32, k and k + 4 of a fragment are neighbours in memory. The weights are permuted in the
    // same way.
    first_state = pinned(part * kChunk + (kTf32 ? lane / 4 * e_row + lane % 4 * 2
                                                : lane % 8 * e_row + lane / 8 * 8));
    uint4* spill = const_cast<uint4*>(spilled) + threadIdx.x;
    const int64_t stride = int64_t(kChunk) << split_log2, k = int64_t(part) * kChunk;
    const int mine = chunks >> split_log2;
#pragma unroll
    for (int c = 0; c < kHeld; ++c)
      if (c < mine) {
        const Part loaded = load(weights, first_unit(), k + c * stride);
#pragma unroll
        for (int f = 0; f < 2; ++f)
#pragma unroll
          for (int m = 0; m < TilesPerWarp; ++m) held[c][f][m] = loaded.of[f][m];
      }
    for (int c = kHeld; c < mine; ++c) {
      const Part loaded = load(weights, first_unit(), k + c * stride);
#pragma unroll
      for (int f = 0; f < 2; ++f)
#pragma unroll
        for (int m = 0; m < TilesPerWarp; ++m)
          spill[(((c - kHeld) * 2 + f) * TilesPerWarp + m) * kThreads] = loaded.of[f][m];
    }
  }

  // Loads a chunk of 8 rows of states as the B operands of its two fragments.
  static __device__ __forceinline__ uint4 load_states(const S* e) {
    if constexpr (kTf32) {
      const float2 first = *reinterpret_cast<const float2*>(e);
      const float2 second = *reinterpret_cast<const float2*>(e + kFragment);
      return make_uint4(to_tf32(first.x), to_tf32(first.y), to_tf32(second.x), to_tf32(second.y));
    } else {
      return load_matrices(e);
    }
  }
  __device__ __forceinline__ void multiply(const S* e, int /*e_row*/, int chunks, float* partial,
                                           float (&item)[kItems][kPack]) {
    // Fragments alternate between two sums, so that a product need not wait for the previous one.
    float sum[2][TilesPerWarp][4] = {};
    const char* from = reinterpret_cast<const char*>(e + first_state);
    const int stride = kChunk * int(sizeof(S)) << split_log2, mine = chunks >> split_log2;
    // Loads run two chunks ahead, even beyond the last chunk (Tile::overrun).
    const auto next = [&] {
      const uint4 states = load_states(reinterpret_cast<const S*>(from));
      from += stride;
      return states;
    };
    const auto multiply_by = [&](const uint4& b, const auto& weight) {
#pragma unroll
      for (int f = 0; f < 2; ++f)
#pragma unroll
        for (int m = 0; m < TilesPerWarp; ++m)
          mma(sum[f][m], weight(f, m), f ? b.z : b.x, f ? b.w : b.y, S{});
    };
    uint4 ahead[2] = {next(), next()};
    const auto all_held = [&] {
#pragma unroll
      for (int c = 0; c < kHeld; ++c) {
        if (c >= mine) return true;
        const uint4 b = ahead[c % 2];
        ahead[c % 2] = next();
        multiply_by(b, [&](int f, int m) { return held[c][f][m]; });
      }
      return false;
    };
    if (!all_held())
      for (int c = kHeld; c < mine; ++c) {
        const uint4 b = ahead[0];
        ahead[0] = ahead[1];
        ahead[1] = next();
        multiply_by(b, [&](int f, int m) {
          return spilled[(((c - kHeld) * 2 + f) * TilesPerWarp + m) * kThreads + threadIdx.x];
        });
      }
#pragma unroll
    for (int m = 0; m < TilesPerWarp; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)  // the tensor core puts batch rows 2t, 2t + 1 side by side
        item[m * 2 + i % 2][i / 2] = sum[0][m][i] + sum[1][m][i];
    if (split_log2 > 0) add_parts(partial, item);
  }

  // Adds the partial sums of the warps that share the units. Two buffers alternate: before a warp
  // writes to a buffer again, it passes the barrier of the other buffer, which all warps reach only
  // after they have read the first.
  __device__ __forceinline__ void add_parts(float* partial, float (&item)[kItems][kPack]) {
    float2* const parts = reinterpret_cast<float2*>(partial) + turn;
    turn ^= kWarps * kParts;
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      parts[this_part + i * 32] = make_float2(item[i][0], item[i][1]);
    asm volatile("bar.sync %0, %1;" ::"r"((warp >> split_log2) + 1), "r"(32 << split_log2)
                 : "memory");
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (owns(i)) {
        const auto add = [&](auto begin, auto end) {
          float2 found[end - begin];
#pragma unroll
          for (int w = begin; w < end; ++w)
            found[w - begin] = parts[first_part + w * kParts + i * 32];
#pragma unroll
          for (int w = begin; w < end; ++w) {
            item[i][0] += found[w - begin].x;
            item[i][1] += found[w - begin].y;
          }
        };
        item[i][0] = item[i][1] = 0;
        add(Number<0>{}, Number<2>{});
        if (split_log2 > 1) add(Number<2>{}, Number<4>{});
        if (split_log2 > 2) add(Number<4>{}, Number<8>{});
      }
  }

  __device__ bool owns(int i) const { return owned >> i & 1; }
  __device__ int unit(int i) const { return first_unit() + i / 2 * 16 + lane / 4 * 2; }
  __device__ int row(int i) const { return lane % 4 * 2 + i % 2; }
  __device__ int copy() const { return 0; }
  // Drops the items whose row or unit exists for no lane of this warp.
  __device__ void settle(int rows, int units) {
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (i % 2 >= rows || first_unit() + i / 2 * 16 >= units) owned &= ~(1 << i);
    owned = pinned(owned);
  }
};

}  // namespace fusedrnn::cuda
