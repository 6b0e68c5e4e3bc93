// Vec<T>: a vector of numbers, for the instruction set that the including file is compiled for.
//
// Included once per instruction set, after `#pragma GCC target`. FUSEDRNN_ISA is the namespace and
// FUSEDRNN_VECTOR_BYTES the vector width. Each instruction set needs its own namespace: if several
// shared an inline function, the linker would keep one copy, which might use instructions that the
// machine lacks. For the same reason nothing here calls the standard library, except for scalar
// libm.
#include "../recurrence.h"

namespace fusedrnn::cpu::FUSEDRNN_ISA {

#define FUSEDRNN_FORCE_INLINE inline __attribute__((always_inline))

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

// Lane i of the result is lane from[i] of a and b concatenated.
template <class V, class From>
FUSEDRNN_FORCE_INLINE V shuffle(V a, V b, From from) {
#ifdef __clang__
  V result;
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  for (int i = 0; i < lanes; ++i) result[i] = from[i] < lanes ? a[from[i]] : b[from[i] - lanes];
  return result;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

template <class T>
struct Vec {
  static constexpr int lanes = FUSEDRNN_VECTOR_BYTES / sizeof(T);
  using Integer = typename IntegerOf<T>::type;
  typedef T Raw __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES), aligned(1), may_alias));
  typedef Integer Mask __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));

  Raw raw;

  Vec() = default;
  // Constructs from a Raw, or from one number for every lane. This is one template, because gcc
  // mistakes two overloads for the same function.
  template <class X>
  FUSEDRNN_FORCE_INLINE Vec(X x) {
    if constexpr (sizeof(X) == sizeof(Raw)) {
      raw = x;
    } else {
      raw = T(x) - Raw{};
    }
  }

  friend FUSEDRNN_FORCE_INLINE Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  friend FUSEDRNN_FORCE_INLINE Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  friend FUSEDRNN_FORCE_INLINE Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  friend FUSEDRNN_FORCE_INLINE Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
  friend FUSEDRNN_FORCE_INLINE Mask operator<(Vec a, Vec b) { return a.raw < b.raw; }
  friend FUSEDRNN_FORCE_INLINE Mask operator>(Vec a, Vec b) { return a.raw > b.raw; }
  friend FUSEDRNN_FORCE_INLINE Mask operator<=(Vec a, Vec b) { return a.raw <= b.raw; }
  friend FUSEDRNN_FORCE_INLINE Mask operator>=(Vec a, Vec b) { return a.raw >= b.raw; }
  friend FUSEDRNN_FORCE_INLINE Mask operator==(Vec a, Vec b) { return a.raw == b.raw; }
  friend FUSEDRNN_FORCE_INLINE Vec select(Mask m, Vec a, Vec b) { return m ? a.raw : b.raw; }

  // a b + c, with a single rounding if the instruction set has FMA
  friend FUSEDRNN_FORCE_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if FUSEDRNN_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
      return Raw(_mm512_fmadd_ps(__m512(a.raw), __m512(b.raw), __m512(c.raw)));
    else
      return Raw(_mm512_fmadd_pd(__m512d(a.raw), __m512d(b.raw), __m512d(c.raw)));
#elif FUSEDRNN_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4)
      return Raw(_mm256_fmadd_ps(__m256(a.raw), __m256(b.raw), __m256(c.raw)));
    else
      return Raw(_mm256_fmadd_pd(__m256d(a.raw), __m256d(b.raw), __m256d(c.raw)));
#else
    return a.raw * b.raw + c.raw;
#endif
  }

  // Each round adds the upper half of the sums to the lower half, so its additions are independent.
  FUSEDRNN_FORCE_INLINE T sum() const {
    Raw total = raw;
#pragma GCC unroll 4
    for (int half = lanes / 2; half > 0; half /= 2) {
      Mask upper{};
      for (int i = 0; i < half; ++i) upper[i] = i + half;
      total = total + shuffle(total, total, upper);
    }
    return total[0];
  }
};

// ---- storage types ----

FUSEDRNN_FORCE_INLINE float widen(bf16 x) {
  return __builtin_bit_cast(float, uint32_t(x.bits) << 16);
}

FUSEDRNN_FORCE_INLINE void narrow(float x, bf16& to) {  // round to nearest even, NaN stays NaN
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  to.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}

FUSEDRNN_FORCE_INLINE float widen(f16 x) {
  // Shift exponent and mantissa into place; the multiplication rebiases, also for denormals.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0;  // Inf, NaN
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  return __builtin_bit_cast(float, sign | special | __builtin_bit_cast(uint32_t, scaled));
}

FUSEDRNN_FORCE_INLINE void narrow(float x, f16& to) {  // round to nearest even
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t bits;
  if (magnitude > 0x7f800000) {
    bits = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    bits = 0x7c00;  // at least 65520: Inf
  } else if (magnitude < 0x38800000) {
    // Denormal: after adding 0.5, the low bits are the rounded value in units of 2^-24.
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    bits = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000;
  } else {
    bits = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to.bits = uint16_t(sign | bits);
}

FUSEDRNN_FORCE_INLINE float widen(float x) { return x; }
FUSEDRNN_FORCE_INLINE double widen(double x) { return x; }
FUSEDRNN_FORCE_INLINE void narrow(float x, float& to) { to = x; }
FUSEDRNN_FORCE_INLINE void narrow(double x, double& to) { to = x; }

template <class C, class S>
FUSEDRNN_FORCE_INLINE Vec<C> load(const S* p) {
  using V = Vec<C>;
  if constexpr (sizeof(S) == sizeof(C)) {
    return typename V::Raw(*reinterpret_cast<const typename V::Unaligned*>(p));
  } else {
    V v;
    for (int i = 0; i < V::lanes; ++i) v.raw[i] = widen(p[i]);
    return v;
  }
}

template <class C, class S>
FUSEDRNN_FORCE_INLINE void store(S* p, Vec<C> v) {
  using V = Vec<C>;
  if constexpr (sizeof(S) == sizeof(C)) {
    *reinterpret_cast<typename V::Unaligned*>(p) = v.raw;
  } else {
    for (int i = 0; i < V::lanes; ++i) narrow(C(v.raw[i]), p[i]);
  }
}

// Load or store only the first n numbers, and access no byte past them. The other lanes load as 0.
template <class C, class S>
FUSEDRNN_FORCE_INLINE Vec<C> load(const S* p, int64_t n) {
  using V = Vec<C>;
  if (n >= V::lanes) return load<C>(p);
#if FUSEDRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 4)
    return typename V::Raw(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
  if constexpr (sizeof(S) == 8)
    return typename V::Raw(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
#elif FUSEDRNN_VECTOR_BYTES == 32
  if constexpr (sizeof(S) == sizeof(C)) {
    typename V::Mask lane;
    for (int i = 0; i < V::lanes; ++i) lane[i] = i;
    const __m256i loaded = __m256i(lane < typename V::Integer(n));
    if constexpr (sizeof(S) == 4)
      return typename V::Raw(_mm256_maskload_ps(p, loaded));
    else
      return typename V::Raw(_mm256_maskload_pd(p, loaded));
  }
#endif
  S some[V::lanes] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return load<C>(static_cast<const S*>(some));
}

template <class C, class S>
FUSEDRNN_FORCE_INLINE void store(S* p, Vec<C> v, int64_t n) {
  using V = Vec<C>;
  if (n >= V::lanes) return store<C>(p, v);
#if FUSEDRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 4)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), __m512(v.raw));
  if constexpr (sizeof(S) == 8)
    return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), __m512d(v.raw));
#endif
  S some[V::lanes];
  store<C>(static_cast<S*>(some), v);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
}

// Transposes a square matrix held as rows. In each round, every square block of twice `size` swaps
// its two off-diagonal blocks of size x size; the size doubles from round to round.
template <class T>
FUSEDRNN_FORCE_INLINE void transpose(Vec<T> (&rows)[Vec<T>::lanes]) {
  constexpr int lanes = Vec<T>::lanes;
#pragma GCC unroll 4
  for (int size = 1; size < lanes; size *= 2) {
    typename Vec<T>::Mask low, high;
    for (int i = 0; i < lanes; ++i) {
      low[i] = i & size ? i - size + lanes : i;
      high[i] = i & size ? i + lanes : i + size;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & size) continue;
      const auto a = rows[i].raw, b = rows[i + size].raw;
      rows[i].raw = shuffle(a, b, low);
      rows[i + size].raw = shuffle(a, b, high);
    }
  }
}

// ---- exp, expm1, log1p, tanh ----
//
// e^y = 2^n e^r with |r| <= ln2 / 2, and e^r - 1 = r + r² P(r). With FMA, tanh is odd and in f32
// within 1.7 ulp (tested for every float). Without FMA, these functions call libm.

#if FUSEDRNN_VECTOR_BYTES == 16
// Computes in double, because libm's tanhf is off by more than 2 ulp.
template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> each(Vec<T> x, double (*f)(double)) {
  for (int i = 0; i < Vec<T>::lanes; ++i) x.raw[i] = T(f(x.raw[i]));
  return x;
}
template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> tanh(Vec<T> x) {
  return each(x, ::tanh);
}
template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> exp(Vec<T> x) {
  return each(x, ::exp);
}
template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> expm1(Vec<T> x) {
  return each(x, ::expm1);
}
template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> log1p_of_at_most_one(Vec<T> x) {
  return each(x, ::log1p);
}
#else

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, held in the low bits
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float infinite = 89, zero = -104;  // where e^y rounds to infinity, to 0
  static constexpr float tanh_is_one = 10, expm1_is_minus_one = -20;
  static FUSEDRNN_FORCE_INLINE Vec<float> polynomial(Vec<float> r) {  // P, minimax (Cephes)
    const Vec<float> r2 = r * r;
    const Vec<float> low = fma(Vec<float>(1.6666665459e-1f), r, Vec<float>(5.0000001201e-1f));
    const Vec<float> middle = fma(Vec<float>(8.3334519073e-3f), r, Vec<float>(4.1665795894e-2f));
    const Vec<float> high = fma(Vec<float>(1.9875691500e-4f), r, Vec<float>(1.3981999507e-3f));
    return fma(fma(high, r2, middle), r2, low);
  }
};

template <>
struct ExpConstants<double> {
  static constexpr double magic = 0x1.8p52;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double infinite = 710, zero = -746;
  static constexpr double tanh_is_one = 22, expm1_is_minus_one = -40;
  static FUSEDRNN_FORCE_INLINE Vec<double> polynomial(Vec<double> r) {  // Taylor series: 1 / k!
    constexpr double inverse_factorials[] = {
        1.0 / 2,         1.0 / 6,          1.0 / 24,         1.0 / 120,     1.0 / 720,
        1.0 / 5040,      1.0 / 40320,      1.0 / 362880,     1.0 / 3628800, 1.0 / 39916800,
        1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200};
    Vec<double> p = inverse_factorials[12];
    for (int k = 11; k >= 0; --k) p = fma(p, r, Vec<double>(inverse_factorials[k]));
    return p;
  }
};

// e^y = 2^n (1 + rest)
template <class T>
FUSEDRNN_FORCE_INLINE void split_exp(Vec<T> y, typename Vec<T>::Mask& n, Vec<T>& rest) {
  using K = ExpConstants<T>;
  using V = Vec<T>;
  const V shifted = fma(y, V(K::log2e), V(K::magic));
  const V rounded = shifted - V(K::magic);
  const V r = fma(rounded, V(-K::ln2_low), fma(rounded, V(-K::ln2_high), y));
  n = (typename V::Mask)shifted.raw - (typename V::Mask)V(K::magic).raw;
  rest = fma(K::polynomial(r), r * r, r);
}

// 2^n; must be a normal number
template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> power_of_two(typename Vec<T>::Mask n) {
  using K = ExpConstants<T>;
  return typename Vec<T>::Raw((n + typename Vec<T>::Integer(K::bias)) << K::mantissa);
}

template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> exp(Vec<T> y) {
  using V = Vec<T>;
  const V zero = ExpConstants<T>::zero, infinite = ExpConstants<T>::infinite;
  typename V::Mask n;
  V rest;
  split_exp(select(y > infinite, infinite, select(y < zero, zero, y)), n, rest);
  // 2^n in two factors, because it may be too large or too small for one
  const V half = power_of_two<T>(n >> 1);
  return fma(rest, half, half) * power_of_two<T>(n - (n >> 1));
}

// e^y - 1; e^y must be a normal number
template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> expm1_of_normal(Vec<T> y) {
  typename Vec<T>::Mask n;
  Vec<T> rest;
  split_exp(y, n, rest);
  const Vec<T> scale = power_of_two<T>(n);
  return fma(rest, scale, scale - Vec<T>(1));
}

// e^y - 1 for y <= 0
template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> expm1(Vec<T> y) {
  const Vec<T> least = ExpConstants<T>::expm1_is_minus_one;
  return expm1_of_normal(select(y < least, least, y));
}

// 1 / x. For f32 with AVX-512, accurate to only 14 bits, in a third of the time.
template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> rough_inverse(Vec<T> x) {
#if FUSEDRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return typename Vec<T>::Raw(_mm512_maskz_rcp14_ps(__mmask16(-1), __m512(x.raw)));
#endif
  return Vec<T>(1) / x;
}

// log(1 + u) for 0 <= u <= 1, as 2 artanh(s) with s = u / (2 + u) <= 1/3
template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> log1p_of_at_most_one(Vec<T> u) {
  constexpr int terms = sizeof(T) == 4 ? 9 : 18;
  const Vec<T> s = u / (u + Vec<T>(2));
  const Vec<T> s2 = s * s;
  Vec<T> series = T(1) / T(2 * terms + 1);
  for (int k = terms - 1; k > 0; --k) series = fma(series, s2, Vec<T>(T(1) / T(2 * k + 1)));
  const Vec<T> twice = s + s;
  return fma(twice * s2, series, twice);
}

// tanh|x| = t / (t + 2) with t = e^2|x| - 1. The quotient is corrected by its remainder, which
// includes the rounding error of t + 2. So a rough quotient is enough to start from.
template <class T>
FUSEDRNN_FORCE_INLINE Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  const V one = V(ExpConstants<T>::tanh_is_one);
  const auto sign = (typename V::Mask)x.raw & (typename V::Mask)V(T(-0.0)).raw;
  const V magnitude = typename V::Raw((typename V::Mask)x.raw ^ sign);
  const V clamped = select(magnitude > one, one, magnitude);
  const V t = expm1_of_normal(clamped + clamped);
  const V divisor = t + V(2);
  const V divisor_rest = (V(2) - divisor) + t;
  const V inverse = rough_inverse(divisor);
  const V quotient = t * inverse;
  const V zero = V(0);
  const V remainder = fma(zero - quotient, divisor_rest, fma(zero - quotient, divisor, t));
  const V result = fma(remainder, inverse, quotient);
  return typename V::Raw((typename V::Mask)result.raw | sign);
}
#endif

}  // namespace fusedrnn::cpu::FUSEDRNN_ISA
