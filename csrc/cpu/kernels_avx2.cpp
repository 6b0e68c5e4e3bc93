// The CPU kernels for AVX2 with FMA (16 registers of 8 f32).
#ifdef __x86_64__
#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FUSEDRNN_ISA avx2
#define FUSEDRNN_VECTOR_BYTES 32
#define FUSEDRNN_TILE_ROWS 6
#define FUSEDRNN_TILE_VECTORS 2
#include "kernels_impl.h"

namespace fusedrnn::cpu {

extern const InstructionSet kAvx2{
    "avx2",
    [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
    &avx2::kF32,
    &avx2::kF64,
    &avx2::kStoredF32,
    &avx2::kStoredF64,
    &avx2::kStoredBf16,
    &avx2::kStoredF16};

}  // namespace fusedrnn::cpu

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
