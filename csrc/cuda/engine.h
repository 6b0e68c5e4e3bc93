// The CUDA engine without torch: a plan, made by plan.h, is carried out on a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "../recurrence.h"
#include "plan.h"

namespace fusedrnn::cuda {

// What the planner needs to know of a device; asked once of the CUDA runtime, for each device.
const Device& device_properties(int index);

// What a run needs besides the problem, all in the memory of the device.
struct Workspace {
  const int64_t* offsets = nullptr;  // [T + 1]: rows before each step; packed problems only
  unsigned* counters = nullptr;      // [plan.counters] zeros
  void* carry = nullptr;             // [plan.carry_bytes], not initialised
};

// Launches what the plan says and returns at once. Nothing is allocated and nobody waits, so that a
// stream can be captured. Throws std::runtime_error, with the plan in words, where a launch fails.
// Problem::batch_sizes stays on the host; every other pointer is the device's.
void run(const Problem& problem, const PlanInput& in, const Plan& plan, const Device& device,
         const Workspace& workspace, cudaStream_t stream);

// Copies numbers from the host without waiting, as arguments of kernels: a graph that is captured
// keeps them, where it would read host memory anew at every replay.
void copy_to_device(const int64_t* from, int64_t count, int64_t* to, cudaStream_t stream);

// What tests and the curious wish of all plans from now on; {} gives the choice back to the
// planner.
void wish(const Wish& wanted);
Wish wished();

}  // namespace fusedrnn::cuda
