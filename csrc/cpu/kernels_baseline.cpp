// The CPU kernels for the compiler's default target: SSE2 on x86-64, NEON on arm64.
#include <math.h>

#include <cstdint>
#include <type_traits>

#define FUSEDRNN_ISA baseline
#define FUSEDRNN_VECTOR_BYTES 16
#define FUSEDRNN_TILE_ROWS 4
#define FUSEDRNN_TILE_VECTORS 2
#include "kernels_impl.h"

namespace fusedrnn::cpu {

extern const InstructionSet kBaseline{"baseline",
                                      [] { return true; },
                                      &baseline::kF32,
                                      &baseline::kF64,
                                      &baseline::kStoredF32,
                                      &baseline::kStoredF64,
                                      &baseline::kStoredBf16,
                                      &baseline::kStoredF16};

}  // namespace fusedrnn::cpu
