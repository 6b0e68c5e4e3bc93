// Kernels for bfloat16.
#include "kernels.cuh"

namespace fusedrnn::cuda {
const TileKernels kMmaBf16[] = {
    tile_kernels<Mma<__nv_bfloat16, 1>>(),
    tile_kernels<Mma<__nv_bfloat16, 2>>(),
};
const StepKernels kStepBf16 = step_kernels<__nv_bfloat16>();
}  // namespace fusedrnn::cuda
