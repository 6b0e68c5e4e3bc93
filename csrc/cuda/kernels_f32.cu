// Kernels for float32.
#include "kernels.cuh"

namespace fusedrnn::cuda {
const TileKernels kFmaF32[] = {
    tile_kernels<Fma<float, 2, 1>>(),
    tile_kernels<Fma<float, 2, 4>>(),
    tile_kernels<Fma<float, 4, 2>>(),
    tile_kernels<Fma<float, 1, 8>>(),
};
const StepKernels kStepF32 = step_kernels<float>();
}  // namespace fusedrnn::cuda
