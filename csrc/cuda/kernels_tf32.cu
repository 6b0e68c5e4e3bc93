// Kernels for float32 when torch allows TF32.
#include "kernels.cuh"

namespace fusedrnn::cuda {
const TileKernels kMmaTf32[] = {
    tile_kernels<Mma<float, 1>>(),
    tile_kernels<Mma<float, 2>>(),
};
const TileKernels kSlicesTf32 = slices_kernels<SliceMma<float>>();
}  // namespace fusedrnn::cuda
