// Conversions between the types in which numbers are stored and computed, and the functions that
// epilogues.h needs for its type V, which is float or double in device code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fusedrnn {

template <class V>
__device__ __forceinline__ V select(bool condition, V yes, V no) {
  return condition ? yes : no;
}
// CUDA's tanh is odd and within 2 ulp; its exp and expm1 are within 2 ulp.
__device__ __forceinline__ float tanh(float z) { return ::tanhf(z); }
__device__ __forceinline__ double tanh(double z) { return ::tanh(z); }
__device__ __forceinline__ float exp(float z) { return ::expf(z); }
__device__ __forceinline__ double exp(double z) { return ::exp(z); }
__device__ __forceinline__ float expm1(float z) { return ::expm1f(z); }
__device__ __forceinline__ double expm1(double z) { return ::expm1(z); }
__device__ __forceinline__ float log1p_of_at_most_one(float z) { return ::log1pf(z); }
__device__ __forceinline__ double log1p_of_at_most_one(double z) { return ::log1p(z); }

}  // namespace fusedrnn

#include "../epilogues.h"
#include "../recurrence.h"

namespace fusedrnn::cuda {

// The type in which numbers that are stored as S are computed.
template <class S>
struct ComputedWith {
  using type = float;
};
template <>
struct ComputedWith<double> {
  using type = double;
};
template <class S>
using Computed = typename ComputedWith<S>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <class S>
__device__ __forceinline__ S narrow(Computed<S> v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}

// The hardware's tanh. Its relative error is at most 2^-11, to which rounding to bfloat16 adds
// 2^-9. For float16, where rounding adds only 2^-12, the error would be too large.
struct HardwareTanh : Tanh {
  static __device__ __forceinline__ float value(float z) {
    asm("tanh.approx.f32 %0, %0;" : "+f"(z));
    return z;
  }
};
template <class S>
using TanhFor = std::conditional_t<std::is_same_v<S, __nv_bfloat16>, HardwareTanh, Tanh>;

// A nonlinearity that is chosen at run time: one kernel for each would mean nine times as many
// kernels, and all threads take the same branch. The two common ones are inline, the others are
// function calls. The expectation keeps the compiler from making a jump table.
template <class S>
struct Chosen {
  using V = Computed<S>;
  Nonlinearity which;
  bool saves_z;

  explicit __device__ Chosen(Nonlinearity which)
      : which(which), saves_z(fusedrnn::saves_z(which)) {}

  __device__ __forceinline__ V value(V z) const {
    if (__builtin_expect(which == Nonlinearity::tanh, 1)) return TanhFor<S>::value(z);
    if (which == Nonlinearity::relu) return Relu::value(z);
    return other_value(which, z);
  }
  __device__ __forceinline__ V slope(V saved) const {
    if (__builtin_expect(which == Nonlinearity::tanh, 1)) return Tanh::slope(saved);
    if (which == Nonlinearity::relu) return Relu::slope(saved);
    return other_slope(which, saved);
  }

 private:
  // Tries them in the order of the enum.
  static __device__ __noinline__ V other_value(Nonlinearity which, V z) {
    int i = 0;
#define FUSEDRNN_TRY(F) \
  if (int(which) == i++) return F::value(z);
    FUSEDRNN_FOR_EACH_NONLINEARITY(FUSEDRNN_TRY)
#undef FUSEDRNN_TRY
    return z;
  }
  static __device__ __noinline__ V other_slope(Nonlinearity which, V saved) {
    int i = 0;
#define FUSEDRNN_TRY(F) \
  if (int(which) == i++) return F::slope(saved);
    FUSEDRNN_FOR_EACH_NONLINEARITY(FUSEDRNN_TRY)
#undef FUSEDRNN_TRY
    return saved;
  }
};

// Calls `use` with the nonlinearity, so that the whole computation is inside one branch.
template <class S, class Use>
__device__ __forceinline__ void with_nonlinearity(Nonlinearity which, const Use& use) {
  if (__builtin_expect(which == Nonlinearity::tanh, true))
    use(TanhFor<S>{});
  else if (which == Nonlinearity::relu)
    use(Relu{});
  else
    use(Chosen<S>(which));
}

}  // namespace fusedrnn::cuda
