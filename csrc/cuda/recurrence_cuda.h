// Runs a Call on the CUDA engine: makes the plan, prepares what the recurrence needs, and launches
// it. Shared by the ops on CUDA tensors (recurrence_cuda.cpp) and by the tests, which run them on
// an emulator (tests/emulated_engine.cpp), so nothing here may call libtorch_cuda.
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

// Before architecture 80, neither tensor cores nor ordinary arithmetic support bf16.
inline at::ScalarType dtype_on(const Device& device, at::ScalarType type) {
  return type == at::kBFloat16 && device.architecture < 80 ? at::kFloat : type;
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
  // A part of the sequence must be a problem of its own, with few series (part_of).
  in.packed = p.batch_sizes || p.form != Form::rate || p.alpha_varies() ||
              (p.pass == Pass::activation && p.in[1].data);
  return in;
}

// The number of rows before each step, and of all steps, [T + 1].
inline Tensor row_offsets(const Problem& p, const Tensor& like, cudaStream_t stream) {
  std::vector<int64_t> rows(size_t(p.T + 1));
  std::partial_sum(p.batch_sizes, p.batch_sizes + p.T, rows.begin() + 1);
  const Tensor offsets = at::empty({p.T + 1}, like.options().dtype(at::kLong));
  copy_to_device(rows.data(), p.T + 1, offsets.mutable_data_ptr<int64_t>(), stream);
  return offsets;
}

// Steps `from` to `end` of a forward pass, starting from the state that step `from - 1` left.
inline Problem part_of(const Problem& p, int64_t from, int64_t end) {
  const auto place = [&](const Series& series, int64_t t) -> void* {
    return series.data ? static_cast<char*>(series.data) + t * series.step * size_of(p.storage)
                       : nullptr;
  };
  const int64_t begin = p.descending ? p.T - end : from;
  Problem part = p;
  part.T = end - from;
  for (Series* series : {&part.in[0], &part.out[0], &part.out[1]})
    series->data = place(*series, begin);
  if (p.reset) part.reset += begin * p.B;
  if (from > 0) part.first = {place(p.out[0], p.descending ? p.T - from : from - 1), p.out[0].row};
  if (end < p.T) part.last = {};
  return part;
}

// Tensors made here may be destroyed once their launches are queued, because the allocator does not
// reuse their memory on another stream. `beside` is a side stream and has
//   fork()     makes the side stream wait for what has been queued on `stream` so far
//   run(work)  calls work(), which queues on the side stream
//   join()     makes `stream` wait for the side stream
template <class Beside>
Plan run(Call& call, int device, cudaStream_t stream, Beside&& beside) {
  const Problem& problem = call.problem;
  const Device& properties = device_properties(device);
  const PlanInput in = plan_input(call);
  const Plan plan = make_plan(in, properties, wished());
  const Tensor counters =
      at::zeros({plan.cut > 0 ? 2 : 1, plan.counters}, call.like.options().dtype(at::kInt));
  Workspace workspace;
  workspace.counters = static_cast<unsigned*>(counters.mutable_data_ptr());
  const Tensor carry = at::empty({plan.carry_bytes}, call.like.options().dtype(at::kByte));
  workspace.carry = carry.mutable_data_ptr();
  Tensor offsets;
  if (problem.batch_sizes) {
    offsets = row_offsets(problem, call.like, stream);
    workspace.offsets = offsets.const_data_ptr<int64_t>();
  }
  const auto launch = [&](const Problem& part) {
    run(part, in, plan, properties, workspace, stream);
  };
  if (plan.cut == 0) {
    if (problem.I > 0 && !plan.fuse_input) call.project(at::matmul(call.x, call.w_ih.t()));
    launch(problem);
    return plan;
  }
  const Tensor x = call.x, w = call.w_ih.t();
  const Tensor u = at::empty({problem.T, problem.B, problem.H}, x.options());
  const auto project = [&](int64_t from, int64_t end) {
    const int64_t begin = problem.descending ? problem.T - end : from;
    Tensor part = u.narrow(0, begin, end - from);
    at::matmul_out(part, x.narrow(0, begin, end - from), w);
  };
  call.project(u);
  project(0, plan.cut);
  beside.fork();  // the recurrence is launched before the second GEMM, so that it finds idle SMs
  launch(part_of(problem, 0, plan.cut));
  beside.run([&] { project(plan.cut, problem.T); });
  beside.join();
  workspace.counters += plan.counters;
  launch(part_of(problem, plan.cut, problem.T));
  return plan;
}

}  // namespace fusedrnn::cuda
