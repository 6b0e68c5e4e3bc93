// The torch-free part of the CUDA engine: runs a plan (plan.h) on a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "../recurrence.h"
#include "plan.h"

namespace fusedrnn::cuda {

// The device properties that the planner needs. The CUDA runtime is queried once per device.
const Device& device_properties(int index);

// The device memory that a run needs besides the tensors of the problem.
struct Workspace {
  const int64_t* offsets = nullptr;  // [T + 1]: rows before each step; packed problems only
  unsigned* counters = nullptr;      // [plan.counters] zeros
  void* carry = nullptr;             // [plan.carry_bytes], not initialised
};

// Launches the kernels of the plan and returns without waiting for them. It neither allocates nor
// synchronises, so the stream can be captured. Throws std::runtime_error, with the plan in words,
// if a launch fails. Problem::batch_sizes is a host pointer; all other pointers are device
// pointers.
void run(const Problem& problem, const PlanInput& in, const Plan& plan, const Device& device,
         const Workspace& workspace, cudaStream_t stream);

// Copies numbers from the host without synchronising, by passing them as kernel arguments. A
// captured graph stores these, whereas a memcpy would read host memory again at every replay.
void copy_to_device(const int64_t* from, int64_t count, int64_t* to, cudaStream_t stream);

// Sets the overrides for all plans from now on, for tests and experiments; {} removes them.
void set_overrides(const Overrides& wanted);
Overrides overrides();

}  // namespace fusedrnn::cuda
