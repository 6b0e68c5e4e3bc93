// Some kernels of a copy of csrc/cuda in which any single barrier can be left out, to check that
// ThreadSanitizer then reports a race. test_sanitizers.py makes the copy.
#include <cuda_runtime.h>

__constant__ int forgotten;  // the number of the barrier to leave out; 0: none

#include "kernels.cuh"

namespace fusedrnn::cuda {
const TileKernels kFmaF32[4] = {tile_kernels<Fma<float, 2, 1>>()};
const TileKernels kFmaF64[2] = {};
const TileKernels kMmaBf16[2] = {tile_kernels<Mma<__nv_bfloat16, 1>>()};
const TileKernels kMmaF16[2] = {};
const TileKernels kMmaTf32[2] = {};
const StepKernels kStepF32 = step_kernels<float>();
const StepKernels kStepF64 = {};
const StepKernels kStepBf16 = {};
const StepKernels kStepF16 = {};
}  // namespace fusedrnn::cuda

extern "C" void fusedrnn_forget(int which) { cudaMemcpyToSymbol(forgotten, &which, sizeof(which)); }
