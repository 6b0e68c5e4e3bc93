// Prelude of the C++ that translate.py writes: PTX arithmetic and memory access, all inline.
#pragma once
#include "machine.h"

namespace emulator {

template <class To, class From>
[[gnu::always_inline]] inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

// --- 16-bit floating point: registers hold u16, arithmetic happens in f32 or f64 ---
inline f32 from_f16(u16 x) { return f32(bits<_Float16>(x)); }
inline f32 from_bf16(u16 x) { return bits<f32>(u32(x) << 16); }
inline u16 to_f16(f32 x) { return x != x ? u16(0x7FFF) : bits<u16>(_Float16(x)); }
inline u16 to_bf16(f32 x) {
  const u32 b = bits<u32>(x);
  return x != x ? u16(0x7FFF) : u16((b + 0x7FFFu + (b >> 16 & 1)) >> 16);
}
// Converts f64 to f32, rounding to odd, so that a second rounding to 16 bits gives the exact
// result.
inline f32 to_odd(f64 x) {
  const f32 nearest = f32(x);
  if (f64(nearest) == x || x != x || __builtin_isinf(nearest)) return nearest;
  u32 b = bits<u32>(nearest);
  if (b & 1) return nearest;
  const bool too_large = (f64(nearest) > x) == (nearest > 0);  // in magnitude
  return bits<f32>(too_large ? b - 1 : b + 1);
}
template <bool bf>
inline f32 from_half(u16 x) {
  return bf ? from_bf16(x) : from_f16(x);
}
template <bool bf>
inline u16 to_half(f64 x) {
  return bf ? to_bf16(to_odd(x)) : to_f16(to_odd(x));
}
template <bool bf>
inline u16 to_half(f32 x) {
  return bf ? to_bf16(x) : to_f16(x);
}
inline u32 pack(u16 low, u16 high) { return u32(low) | u32(high) << 16; }

// --- Integers ---
template <class T>
inline T shift_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <class T>
inline T shift_right(T a, u32 n) {
  constexpr u32 width = 8 * sizeof(T);
  return n < width ? T(a >> n) : T(-1) < T(0) && a < 0 ? T(-1) : T(0);
}
inline u32 funnel_left(u32 low, u32 high, u32 n) {
  return n == 0 ? high : n >= 32 ? low : high << n | low >> (32 - n);
}
inline u32 funnel_right(u32 low, u32 high, u32 n) {
  return n == 0 ? low : n >= 32 ? high : low >> n | high << (32 - n);
}
// Dividing by zero is undefined in PTX, but must not end the process.
template <class T>
inline T divide(T a, T b) {
  if (b == 0) return T(-1);
  if (T(-1) < T(0) && b == T(-1)) return T(0) - a;
  return a / b;
}
template <class T>
inline T remainder(T a, T b) {
  if (b == 0) return a;
  if (T(-1) < T(0) && b == T(-1)) return 0;
  return a % b;
}
inline u16 multiply_high(u16 a, u16 b) { return u16(u32(a) * b >> 16); }
inline s16 multiply_high(s16 a, s16 b) { return s16(s32(a) * b >> 16); }
inline u32 multiply_high(u32 a, u32 b) { return u32(u64(a) * b >> 32); }
inline s32 multiply_high(s32 a, s32 b) { return s32(s64(a) * b >> 32); }
inline u64 multiply_high(u64 a, u64 b) { return u64(u128(a) * b >> 64); }
inline s64 multiply_high(s64 a, s64 b) { return s64(s128(a) * b >> 64); }
template <class T>
inline T saturated(s64 x) {
  constexpr s64 low = T(-1) < T(0) ? -(s64(1) << (8 * sizeof(T) - 1)) : 0;
  constexpr s64 high = T(-1) < T(0) ? (s64(1) << (8 * sizeof(T) - 1)) - 1
                                    : s64((u64(1) << (8 * sizeof(T) % 64)) - 1);
  return x < low ? T(low) : x > high ? T(high) : T(x);
}
inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 source = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 choice = selector >> (4 * i) & 15;
    u32 byte = u32(source >> (8 * (choice & 7))) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline u32 logic3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
template <class T>
inline T reverse_bits(T x) {
  T result = 0;
  for (u32 i = 0; i < 8 * sizeof(T); ++i) result |= T(x >> i & 1) << (8 * sizeof(T) - 1 - i);
  return result;
}
template <class T, class Unsigned>
inline T extract_bits(T a, u32 position, u32 length) {
  constexpr u32 width = 8 * sizeof(T);
  position &= 255;
  length &= 255;
  if (length == 0) return 0;
  const u32 last = position + length - 1 < width - 1 ? position + length - 1 : width - 1;
  const Unsigned sign = T(-1) < T(0) ? Unsigned(a) >> last & 1 : 0;
  Unsigned result = 0;
  for (u32 i = 0; i < width; ++i)
    result |= (i < length && position + i < width ? Unsigned(a) >> (position + i) & 1 : sign) << i;
  return T(result);
}
template <class T>
inline T insert_bits(T from, T into, u32 position, u32 length) {
  position &= 255;
  length &= 255;
  for (u32 i = 0; i < length && position + i < 8 * sizeof(T); ++i)
    into = (into & ~(T(1) << (position + i))) | (from >> i & 1) << (position + i);
  return into;
}
template <class T, class Unsigned>
inline u32 find_leading(T x, bool as_shift) {
  Unsigned y = Unsigned(x);
  if (T(-1) < T(0) && x < 0) y = ~y;
  if (y == 0) return ~0u;
  u32 highest = 0;
  for (u32 i = 0; i < 8 * sizeof(T); ++i)
    if (y >> i & 1) highest = i;
  return as_shift ? 8 * sizeof(T) - 1 - highest : highest;
}
inline s32 dot_bytes(u32 a, bool a_signed, u32 b, bool b_signed, s32 c) {
  for (int i = 0; i < 32; i += 8)
    c += (a_signed ? s32(s8(a >> i)) : s32(u8(a >> i))) *
         (b_signed ? s32(s8(b >> i)) : s32(u8(b >> i)));
  return c;
}

// --- f32 and f64 ---
inline f32 fused(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
inline f64 fused(f64 a, f64 b, f64 c) { return __builtin_fma(a, b, c); }
inline f32 flush(f32 x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }
inline f32 saturate(f32 x) { return x > 0 ? x < 1 ? x : 1.f : 0.f; }  // NaN becomes 0
inline f64 saturate(f64 x) { return x > 0 ? x < 1 ? x : 1. : 0.; }
template <class T>
inline bool is_nan(T x) {
  return x != x;
}
// min and max of integers and floats: a number wins over NaN, and -0 is below +0.
template <class T>
inline T minimum(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (T(0.5) != T(0) && a == b) return __builtin_signbit(f64(a)) ? a : b;
  return a < b ? a : b;
}
template <class T>
inline T maximum(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (T(0.5) != T(0) && a == b) return __builtin_signbit(f64(a)) ? b : a;
  return a > b ? a : b;
}
template <class T>
inline T minimum_nan(T a, T b) {
  return a != a || b != b ? T(__builtin_nan("")) : minimum(a, b);
}
template <class T>
inline T maximum_nan(T a, T b) {
  return a != a || b != b ? T(__builtin_nan("")) : maximum(a, b);
}

// Directed rounding of value + error, where value is the sum rounded to nearest in f64 and error is
// what that rounding left out. It is exact, and much cheaper than changing the FPU's rounding mode.
// The cost matters because nvcc's expf contains an fma.rm.
template <char mode>
inline f32 round_to_f32(f64 value, f64 error) {
  const f32 nearest = f32(value);
  if (nearest != nearest) return nearest;
  const f64 difference = f64(nearest) - value;  // exact where both are finite
  const bool above = difference > 0 || (difference == 0 && error < 0);
  const bool below = difference < 0 || (difference == 0 && error > 0);
  const bool down = mode == 'm' || (mode == 'z' && value > 0);
  if (down && above) {
    if (nearest == 0) return -0x1p-149f;
    const u32 b = bits<u32>(nearest);
    return bits<f32>(nearest > 0 ? b - 1 : b + 1);
  }
  if (!down && below) {
    if (nearest == 0) return 0x1p-149f;
    const u32 b = bits<u32>(nearest);
    return bits<f32>(nearest > 0 ? b + 1 : b - 1);
  }
  return nearest;
}
template <char mode>
inline f32 add_directed(f64 a, f64 b) {
  const f64 sum = a + b, part = sum - a;
  const f64 error = __builtin_isfinite(sum) ? (a - (sum - part)) + (b - part) : 0;
  if (sum == 0 && error == 0 && a != 0) return mode == 'm' ? -0.f : 0.f;
  return round_to_f32<mode>(sum, error);
}
template <char mode>
inline f32 fused_directed(f32 a, f32 b, f32 c) {
  return add_directed<mode>(f64(a) * b, c);
}
template <char mode>
inline f32 multiply_directed(f32 a, f32 b) {
  return round_to_f32<mode>(f64(a) * b, 0);
}
f64 directed_f64(char mode, char operation, f64 a, f64 b, f64 c);  // arithmetic.cpp
f32 directed_from_integer(char mode, bool is_signed, u64 x);
f64 directed_f64_from_integer(char mode, bool is_signed, u64 x);
f32 directed_divide(char mode, f32 a, f32 b);
f32 directed_sqrt(char mode, f32 a);

template <char mode, class T>
inline T round_to_integer(T x) {
  if constexpr (sizeof(T) == 4) {
    return mode == 'n'   ? __builtin_nearbyintf(x)
           : mode == 'z' ? __builtin_truncf(x)
           : mode == 'm' ? __builtin_floorf(x)
                         : __builtin_ceilf(x);
  } else {
    return mode == 'n'   ? __builtin_nearbyint(x)
           : mode == 'z' ? __builtin_trunc(x)
           : mode == 'm' ? __builtin_floor(x)
                         : __builtin_ceil(x);
  }
}
// Conversion to an integer saturates; NaN becomes 0.
template <class To, char mode, class From>
inline To to_integer(From x) {
  if (x != x) return 0;
  const f64 whole = f64(round_to_integer<mode>(x));
  constexpr bool is_signed = To(-1) < To(0);
  constexpr int width = 8 * sizeof(To);
  const f64 top = is_signed ? 0x1p0 * f64(u64(1) << (width - 1)) : 2. * f64(u64(1) << (width - 1));
  constexpr To smallest = is_signed ? To(u64(1) << (width - 1)) : To(0);
  constexpr To largest = is_signed ? To((u64(1) << (width - 1)) - 1) : To(-1);
  if (whole >= top) return largest;
  if (whole <= (is_signed ? -top : 0.)) return smallest;
  return To(whole);
}
inline u32 to_tf32(f32 x) { return x != x ? 0x7FFFFFFFu : (bits<u32>(x) + 0x1000u) & 0xFFFFE000u; }
// The hardware's tanh.approx is accurate to 11 bits. More would hide errors from the tests of code
// that uses it.
inline f32 tanh_approx(f32 x) {
  const f32 y = __builtin_tanhf(x);
  return y != y ? y : bits<f32>((bits<u32>(y) + 0x800u) & 0xFFFFF000u);
}
inline f32 divide_approx(f32 a, f32 b) {
  const f32 size = __builtin_fabsf(b);
  if (size > 0x1p126f && size <= 0x1.fffffep127f)
    return __builtin_isinf(a) ? __builtin_nanf("") : 0.f;
  return a / b;
}

inline u64 next_tick() {
  static u64 ticks = 0;
  return ticks += 64;
}

// --- Memory ---
// There is one branch for both checks: kernels have thousands of accesses, and each branch costs
// time to compile. `bytes` is a power of two.
[[gnu::always_inline]] inline char* shared_at(Thread& self, char* base, u32 size, u32 address,
                                              u32 bytes, const Site& site) {
  if (__builtin_expect((u64(address) + bytes > size) | ((address & (bytes - 1)) != 0), 0))
    fail_shared_access(self, site, address, bytes);
  return base + address;
}
[[gnu::always_inline]] inline char* global_at(Thread& self, u64 address, u32 bytes,
                                              const Site& site) {
  if (__builtin_expect((address & (bytes - 1)) != 0, 0)) fail_alignment(self, site, address, bytes);
  return reinterpret_cast<char*>(address);
}
template <class T>
[[gnu::always_inline]] inline T load(const char* p) {
  return *reinterpret_cast<const T*>(p);
}
template <class T>
[[gnu::always_inline]] inline void store(char* p, T value) {
  *reinterpret_cast<T*>(p) = value;
}
// Under AddressSanitizer, prefetched addresses must be valid, although CUDA does not require that.
[[gnu::always_inline]] inline void prefetch([[maybe_unused]] const char* p) {
#ifdef __SANITIZE_ADDRESS__
  (void)*static_cast<const volatile char*>(p);
#endif
}
// A polling thread must let the thread that it waits for run. It yields when it reads the same
// address again, and on every 16th poll in case it alternates between addresses.
inline void poll(Thread& self, const void* p, const Site& site) {
  if (self.polled == p || ++self.polls % 16 == 0) yield(self, site);
  self.polled = p;
  preempt(self);
}
template <class T>
inline T load_strong(Thread& self, const char* p, bool acquire, const Site& site) {
  poll(self, p, site);
  const T value = __atomic_load_n(reinterpret_cast<const T*>(p), __ATOMIC_RELAXED);
  if (acquire) after_acquire();
  return value;
}
template <class T>
inline void store_strong(Thread& self, char* p, T value, bool release) {
  if (release) before_release();
  __atomic_store_n(reinterpret_cast<T*>(p), value, __ATOMIC_RELAXED);
  self.polled = nullptr;
  preempt(self);
}
// T is the unsigned type of the operation's width; `update` turns the old value into the new one.
template <class T, class Update>
inline T read_modify_write(Thread& self, char* p, bool acquire, bool release, const Site& site,
                           Update update) {
  if (++self.polls % 16 == 0) yield(self, site);
  preempt(self);
  if (release) before_release();
  T old = __atomic_load_n(reinterpret_cast<T*>(p), __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(reinterpret_cast<T*>(p), &old, update(old), true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  if (acquire) after_acquire();
  return old;
}

}  // namespace emulator
