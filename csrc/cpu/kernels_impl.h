// The kernels of one instruction set, and their table. Included by each kernels_*.cpp, which
// defines FUSEDRNN_ISA, FUSEDRNN_VECTOR_BYTES, FUSEDRNN_TILE_ROWS and FUSEDRNN_TILE_VECTORS first.
#include "kernels.h"
#include "simd.h"
// after simd.h, because its functors use Vec's functions
#include "../epilogues.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

// ---- the product ----

// acc += rows · panel, over k in [k, end). A tile too small to hide the latency of an FMA uses
// `Split` independent sums, which are added at the end in a fixed order.
template <int Rows, int Vectors, int Split, class C>
FUSEDRNN_FORCE_INLINE void accumulate(Vec<C> (&acc)[Rows][Vectors], const C* const (&row)[Rows],
                                      int64_t k, int64_t end, const C* w, int64_t w_stride) {
  constexpr int L = Vec<C>::lanes;
  w += k * w_stride;
  if constexpr (Split > 1) {
    Vec<C> part[Split][Rows][Vectors];
    for (int s = 0; s < Split; ++s)
      for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < Vectors; ++j) part[s][i][j] = s == 0 ? acc[i][j] : Vec<C>(C(0));
    for (; k + Split <= end; k += Split, w += Split * w_stride)
#pragma GCC unroll 8
      for (int s = 0; s < Split; ++s) {
        Vec<C> column[Vectors];
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) column[j] = load<C>(w + s * w_stride + j * L);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < Vectors; ++j)
            part[s][i][j] = fma(Vec<C>(row[i][k + s]), column[j], part[s][i][j]);
      }
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Vectors; ++j) {
        acc[i][j] = part[0][i][j];
        for (int s = 1; s < Split; ++s) acc[i][j] = acc[i][j] + part[s][i][j];
      }
  }
#pragma GCC unroll 2
  for (; k < end; ++k, w += w_stride) {
    Vec<C> column[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) column[j] = load<C>(w + j * L);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) acc[i][j] = fma(Vec<C>(row[i][k]), column[j], acc[i][j]);
  }
}

// acc += rows · panel. `fresh` means that acc is zero. The rounding error of a sum grows with its
// length and with its starting value, so each block of terms is summed from zero. A single running
// sum would have several times the error of a BLAS.
template <int Rows, int Vectors, int Split, class C>
FUSEDRNN_FORCE_INLINE void multiply(Vec<C> (&acc)[Rows][Vectors], bool fresh, const C* const* rows,
                                    int64_t size, const C* w, int64_t w_stride) {
  constexpr int64_t block = 64;
  const C* row[Rows];
  for (int i = 0; i < Rows; ++i) row[i] = rows[i];
  int64_t k = 0;
  if (fresh) {
    accumulate<Rows, Vectors, Split>(acc, row, 0, size < block ? size : block, w, w_stride);
    k = block;
  }
  for (; k < size; k += block) {
    Vec<C> part[Rows][Vectors];
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Vectors; ++j) part[i][j] = Vec<C>(C(0));
    accumulate<Rows, Vectors, Split>(part, row, k, size - k < block ? size : k + block, w,
                                     w_stride);
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Vectors; ++j) acc[i][j] = acc[i][j] + part[i][j];
  }
}

template <int Rows, int Vectors, class C>
void product(const Product<C>& p) {
  constexpr int L = Vec<C>::lanes;
  // 8 independent sums keep two FMA units of latency 4 busy.
  constexpr int Tile = Rows * Vectors;
  constexpr int Split = Tile >= 8 ? 1 : Tile >= 2 ? 8 / Tile : 4;
  Vec<C> acc[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) acc[i][j] = Vec<C>(C(0));
  if (p.state_size)
    multiply<Rows, Vectors, Split>(acc, true, p.state, p.state_size, p.w_state, p.w_stride);
  if (p.input_size)
    multiply<Rows, Vectors, Split>(acc, !p.state_size, p.input, p.input_size, p.w_input,
                                   p.w_stride);
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) {
      const C* init = p.init ? p.init + i * p.init_row + j * L : nullptr;
      store<C>(p.tile + i * p.tile_row + j * L, init ? acc[i][j] + load<C>(init) : acc[i][j]);
    }
}

// acc[i][j] += rows[i] · w[j], vectorised along k.
template <int Rows, int Columns, class C, class S>
FUSEDRNN_FORCE_INLINE void dot_accumulate(Vec<C> (&acc)[Rows][Columns], const C* const* rows,
                                          int64_t size, const S* w, int64_t w_row) {
  constexpr int L = Vec<C>::lanes;
  const auto step = [&](int64_t k, auto load_at) __attribute__((always_inline)) {
    Vec<C> a[Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) a[i] = load_at(rows[i] + k);
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) {
      const Vec<C> b = load_at(w + j * w_row + k);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) acc[i][j] = fma(a[i], b, acc[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + L <= size; k += L)
    step(k, [](const auto* p) __attribute__((always_inline)) { return load<C>(p); });
  if (k < size)
    step(k, [&](const auto* p) __attribute__((always_inline)) { return load<C>(p, size - k); });
}

template <int Rows, int Columns, class S, class C>
void dot_tile(const DotProduct<C>& p, int64_t first_column) {
  Vec<C> acc[Rows][Columns];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Columns; ++j) acc[i][j] = Vec<C>(C(0));
  dot_accumulate<Rows, Columns>(acc, p.input, p.input_size,
                                static_cast<const S*>(p.w_input) + first_column * p.w_input_row,
                                p.w_input_row);
  dot_accumulate<Rows, Columns>(acc, p.state, p.state_size,
                                static_cast<const S*>(p.w_state) + first_column * p.w_state_row,
                                p.w_state_row);
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Columns; ++j)
      p.tile[i * p.tile_row + first_column + j] =
          acc[i][j].sum() + (p.init ? p.init[first_column + j] : C(0));
}

template <int Rows, class S, class C>
void dot_rows(const DotProduct<C>& p) {
  int64_t j = 0;
  for (; j + 4 <= p.columns; j += 4) dot_tile<Rows, 4, S>(p, j);
  for (; j < p.columns; ++j) dot_tile<Rows, 1, S>(p, j);
}

template <class S, class C>
void dot(const DotProduct<C>& p) {
  switch (p.rows) {
    case 1: return dot_rows<1, S>(p);
    case 2: return dot_rows<2, S>(p);
    case 3: return dot_rows<3, S>(p);
    default: return dot_rows<4, S>(p);
  }
}

// ---- the step ----

// `plain` means the form rate without a leak, a second input, a second output or clipping. It is
// compiled separately, because it is the most common kind, and the branches of the others would
// make it 10 % slower.
enum class Kind { plain, rate, other };

template <Pass pass, Kind kind, class F, class S, class C>
void step_of_kind(const StepEpilogue<C>& s) {
  using V = Vec<C>;
  constexpr bool plain = kind == Kind::plain, rate = kind != Kind::other;
  const bool leaky = !plain && s.leaky, clips = !plain && s.clips;
  const bool potential = !rate && s.form == Form::potential;
  const int64_t columns = s.columns;
  const auto row_of = [](auto* p, int64_t offset) {
    using Stored =
        std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(p)>>, const S, S>;
    return p ? static_cast<Stored*>(p) + offset : nullptr;
  };
  for (int64_t i = 0; i < s.rows; ++i) {
    const C* tile = s.tile + i * s.tile_row;
    const C* state = s.state[i];
    C* next = s.next + i * s.state_row;
    C* carry_out = !plain && s.carry ? s.carry + i * s.state_row : nullptr;
    const S* in0 = row_of(s.in[0], i * s.in_row[0]);
    const S* in1 = plain ? nullptr : row_of(s.in[1], i * s.in_row[1]);
    const S* in2 = rate ? nullptr : row_of(s.in[2], i * s.in_row[2]);
    const S* saved = row_of(s.gate, i * s.gate_row);
    const S* varying_alpha = plain ? nullptr : row_of(s.varying_alpha, i * s.varying_alpha_row);
    S* out0 = row_of(s.out[0], i * s.out_row[0]);
    S* out1 = plain ? nullptr : row_of(s.out[1], i * s.out_row[1]);
    S* out2 = rate ? nullptr : row_of(s.out[2], i * s.out_row[2]);
    for (int64_t j = 0; j < columns; j += V::lanes) {
      const int64_t n = columns - j;
      const V acc = load<C>(tile + j);
      V carry = load<C>(state + j);
      V alpha = V(C(1));
      if (leaky) alpha = varying_alpha ? load<C>(varying_alpha + j, n) : load<C>(s.alpha + j);
      V first, second, third = V(C(0));
      if constexpr (pass == Pass::activation) {
        const V z = in0 ? acc + load<C>(in0 + j, n) : acc;
        const V q = in1 ? load<C>(in1 + j, n) : V(C(-0.0));
        activation<rate>(F{}, potential, z, q, carry, leaky, alpha, carry, first, second);
      } else {
        const V drive = in0 ? load<C>(in0 + j, n) : V(C(0));
        const V extra = in1 ? load<C>(in1 + j, n) : V(C(0));
        const V more = in2 ? load<C>(in2 + j, n) : V(C(0));
        const V slope_of = load<C>(saved + j, n);
        if constexpr (pass == Pass::tangent)
          tangent<rate>(F{}, potential, acc, drive, extra, more, slope_of, carry, leaky, alpha,
                        carry, first, second, third);
        else
          adjoint<rate>(F{}, potential, acc, drive, extra, more, slope_of, carry, leaky, alpha,
                        clips, V(s.grad_clip), first, second, third);
      }
      if (carry_out) store<C>(carry_out + j, carry);
      store<C>(next + j, first);
      store<C>(out0 + j, first, n);
      if (out1) store<C>(out1 + j, second, n);
      if (out2) store<C>(out2 + j, third, n);
    }
  }
}

template <Pass pass, class F, class S, class C>
void step(const StepEpilogue<C>& s) {
  if (s.form != Form::rate) return step_of_kind<pass, Kind::other, F, S>(s);
  if (s.leaky || s.clips || s.in[1] || s.out[1]) return step_of_kind<pass, Kind::rate, F, S>(s);
  step_of_kind<pass, Kind::plain, F, S>(s);
}

// ---- moving data ----

template <class S, class C>
void pack(const void* w, int64_t k_stride, int64_t j_stride, int64_t size, int64_t columns,
          int64_t width, C* panel) {
  constexpr int64_t L = Vec<C>::lanes;
  const S* from = static_cast<const S*>(w);
  if (j_stride == 1) {
    for (int64_t k = 0; k < size; ++k)
      for (int64_t j = 0; j < width; j += L)
        store<C>(panel + k * width + j,
                 j < columns ? load<C>(from + k * k_stride + j, columns - j) : Vec<C>(C(0)));
    return;
  }
  for (int64_t k = 0; k < size; k += L)
    for (int64_t j = 0; j < width; j += L) {
      Vec<C> square[L];
      const S* corner = from + j * j_stride + k;
      C* to = panel + k * width + j;
      if (j + L <= columns && k + L <= size) {
        for (int64_t i = 0; i < L; ++i) square[i] = load<C>(corner + i * j_stride);
        transpose(square);
        for (int64_t i = 0; i < L; ++i) store<C>(to + i * width, square[i]);
      } else {
        for (int64_t i = 0; i < L; ++i)
          square[i] = j + i < columns ? load<C>(corner + i * j_stride, size - k) : Vec<C>(C(0));
        transpose(square);
        for (int64_t i = 0; i < L && k + i < size; ++i) store<C>(to + i * width, square[i]);
      }
    }
}

template <class C>
C sum(const C* from, int64_t n) {
  Vec<C> total = Vec<C>(C(0));
  for (int64_t i = 0; i < n; i += Vec<C>::lanes) total = total + load<C>(from + i);
  return total.sum();
}

template <class S, class C>
void load_numbers(const void* from, int64_t n, C* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(static_cast<const S*>(from)[i]);
}

template <class S, class C>
void store_numbers(const C* from, int64_t n, void* to) {
  for (int64_t i = 0; i < n; ++i) narrow(from[i], static_cast<S*>(to)[i]);
}

// ---- the table ----

template <class S, class C>
constexpr StorageKernels<C> stored_as() {
#define FUSEDRNN_STEP(F) step<Pass::activation, F, S, C>,
#define FUSEDRNN_TANGENT(F) step<Pass::tangent, F, S, C>,
#define FUSEDRNN_ADJOINT(F) step<Pass::adjoint, F, S, C>,
  return {pack<S, C>,
          load_numbers<S, C>,
          store_numbers<S, C>,
          dot<S, C>,
          {{FUSEDRNN_FOR_EACH_NONLINEARITY(FUSEDRNN_STEP)},
           {FUSEDRNN_FOR_EACH_NONLINEARITY(FUSEDRNN_TANGENT)},
           {FUSEDRNN_FOR_EACH_NONLINEARITY(FUSEDRNN_ADJOINT)}}};
#undef FUSEDRNN_STEP
#undef FUSEDRNN_TANGENT
#undef FUSEDRNN_ADJOINT
}

template <class C, int Rows, int Vectors>
constexpr void add_products(Kernels<C>& kernels) {
  kernels.product[Rows - 1][Vectors - 1] = product<Rows, Vectors, C>;
  if constexpr (Vectors > 1) {
    add_products<C, Rows, Vectors - 1>(kernels);
  } else if constexpr (Rows > 1) {
    add_products<C, Rows - 1, FUSEDRNN_TILE_VECTORS>(kernels);
  }
}

template <class C>
constexpr Kernels<C> kernels() {
  Kernels<C> all{Vec<C>::lanes, FUSEDRNN_TILE_ROWS, FUSEDRNN_TILE_VECTORS, {}, sum<C>};
  add_products<C, FUSEDRNN_TILE_ROWS, FUSEDRNN_TILE_VECTORS>(all);
  return all;
}

constexpr Kernels<float> kF32 = kernels<float>();
constexpr Kernels<double> kF64 = kernels<double>();
constexpr StorageKernels<float> kStoredF32 = stored_as<float, float>();
constexpr StorageKernels<double> kStoredF64 = stored_as<double, double>();
constexpr StorageKernels<float> kStoredBf16 = stored_as<bf16, float>();
constexpr StorageKernels<float> kStoredF16 = stored_as<f16, float>();

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
