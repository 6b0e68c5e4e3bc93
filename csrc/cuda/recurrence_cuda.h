// Runs a Call on the CUDA engine: makes the plan, prepares what the recurrence needs, and launches
// it. Shared by the ops on CUDA tensors (recurrence_cuda.cpp) and by the tests, which run the
// engine on an emulator (tests/support/emulated_engine.cpp), so nothing here may call
// libtorch_cuda.
#pragma once

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include <numeric>
#include <vector>

#include "../ops.h"
#include "engine.h"

namespace fusedrnn::cuda {

// The dtype in which the device computes tensors of this type.
inline at::ScalarType dtype_on(const Device& device, at::ScalarType type) {
  const std::optional<Storage> storage = storage_of(type);
  return storage && device.computed_as(*storage) == Storage::f32 ? at::kFloat : type;
}

inline PlanInput plan_input(const Call& call) {
  const Problem& p = call.problem;
  PlanInput in;
  in.pass = p.pass;
  in.storage = p.storage;
  // As torch does for cuBLAS. Throws if old and new settings of torch contradict each other.
  in.tf32 = p.storage == Storage::f32 && !at::NoTF32Guard::should_disable_tf32() &&
            at::globalContext().allowTF32CuBLAS();
  in.T = p.T;
  in.B = p.B;
  in.I = p.I;
  in.H = p.H;
  in.leaky = p.alpha.data;
  return in;
}

// The number of rows before each step, then that of all steps, [T + 1].
inline Tensor row_offsets(const Problem& p, const Tensor& like, cudaStream_t stream) {
  std::vector<int64_t> rows(size_t(p.T + 1));
  std::partial_sum(p.batch_sizes, p.batch_sizes + p.T, rows.begin() + 1);
  const Tensor offsets = at::empty({p.T + 1}, like.options().dtype(at::kLong));
  copy_to_device(rows.data(), p.T + 1, offsets.mutable_data_ptr<int64_t>(), stream);
  return offsets;
}

// The tensors made here may be destroyed on return, although the kernels are only queued, because
// the allocator does not reuse their memory on another stream.
inline Plan run(Call& call, int device, cudaStream_t stream) {
  const Problem& problem = call.problem;
  const Device& properties = device_properties(device);
  const PlanInput in = plan_input(call);
  const Plan plan = make_plan(in, properties, overrides());
  const Tensor counters = at::zeros({plan.counters}, call.like.options().dtype(at::kInt));
  Workspace workspace;
  workspace.counters = static_cast<unsigned*>(counters.mutable_data_ptr());
  const Tensor carry = at::empty({plan.carry_bytes}, call.like.options().dtype(at::kByte));
  workspace.carry = carry.mutable_data_ptr();
  Tensor offsets;
  if (problem.batch_sizes) {
    offsets = row_offsets(problem, call.like, stream);
    workspace.offsets = offsets.const_data_ptr<int64_t>();
  }
  if (problem.I > 0 && !plan.fuse_input) call.project(at::matmul(call.x, call.w_ih.t()));
  run(problem, in, plan, properties, workspace, stream);
  return plan;
}

}  // namespace fusedrnn::cuda
