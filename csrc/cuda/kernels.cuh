// The kernels of a tile, and those of the step regime. Included by kernels_*.cu, one file per
// arithmetic, so that they compile in parallel.
#pragma once

#include "persistent.cuh"
#include "plain.cuh"
#include "step.cuh"

namespace fusedrnn::cuda {

template <class Product>
TileKernels tile_kernels() {
  return {
      {&persistent<Product, Pass::activation>, &persistent<Product, Pass::tangent>,
       &persistent<Product, Pass::adjoint>},
      {&plain<Product, Pass::activation, false>, nullptr, &plain<Product, Pass::adjoint, false>},
      {&plain<Product, Pass::activation, true>, nullptr, &plain<Product, Pass::adjoint, true>}};
}

template <class S>
StepKernels step_kernels() {
  return {{&fused_step<S, Pass::activation>, &fused_step<S, Pass::tangent>,
           &fused_step<S, Pass::adjoint>}};
}

}  // namespace fusedrnn::cuda
