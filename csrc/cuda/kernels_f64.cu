// Kernels for float64.
#include "kernels.cuh"

namespace fusedrnn::cuda {
const TileKernels kFmaF64[] = {
    tile_kernels<Fma<double, 2, 1>>(),
    tile_kernels<Fma<double, 2, 4>>(),
};
const StepKernels kStepF64 = step_kernels<double>();
}  // namespace fusedrnn::cuda
