// Kernels for float16.
#include "kernels.cuh"

namespace fusedrnn::cuda {
const TileKernels kMmaF16[] = {
    tile_kernels<Mma<__half, 1>>(),
    tile_kernels<Mma<__half, 2>>(),
};
const StepKernels kStepF16 = step_kernels<__half>();
}  // namespace fusedrnn::cuda
