// Kernels for float32 when torch allows TF32.
#include "kernels.cuh"

namespace fusedrnn::cuda {
const TileKernels kMmaTf32[] = {
    tile_kernels<Mma<float, 1>>(),
    tile_kernels<Mma<float, 2>>(),
};
}  // namespace fusedrnn::cuda
