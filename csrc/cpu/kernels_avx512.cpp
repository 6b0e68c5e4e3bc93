// The CPU kernels for AVX-512 (32 registers of 16 f32).
#ifdef __x86_64__
#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#define FUSEDRNN_ISA avx512
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_TILE_ROWS 6
#define FUSEDRNN_TILE_VECTORS 4
#include "kernels_impl.h"

namespace fusedrnn::cpu {

extern const InstructionSet kAvx512{"avx512",
                                    [] {
                                      return __builtin_cpu_supports("avx512f") &&
                                             __builtin_cpu_supports("avx512bw") &&
                                             __builtin_cpu_supports("avx512dq") &&
                                             __builtin_cpu_supports("avx512vl") &&
                                             __builtin_cpu_supports("fma");
                                    },
                                    &avx512::kF32,
                                    &avx512::kF64,
                                    &avx512::kStoredF32,
                                    &avx512::kStoredF64,
                                    &avx512::kStoredBf16,
                                    &avx512::kStoredF16};

}  // namespace fusedrnn::cpu

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
