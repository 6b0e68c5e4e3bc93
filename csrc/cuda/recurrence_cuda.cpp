// The ops on CUDA tensors.
#include "recurrence_cuda.h"

#include <c10/core/Event.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <exception>
#include <map>
#include <utility>

#include "to_device.h"

namespace fusedrnn::cuda {
namespace {

// A side stream, for work that overlaps the current stream's. Each thread has its own: otherwise a
// CUDA graph that one thread captures would include what another queues in the meantime. Tensors
// made on the current stream can be used on the side stream without record_stream(), because the
// allocator reuses their memory only on the current stream, after that has waited for the side
// stream.
class Beside {
 public:
  explicit Beside(c10::cuda::CUDAStream here) : here_(here) {}
  Beside(const Beside&) = delete;
  ~Beside() {  // after an error, too, because memory is freed then
    try {
      join();
    } catch (const std::exception&) {  // the first error is more informative
    }
  }

  void fork() {
    // Captures have a stream of their own: a graph that is replayed and work that runs at the same
    // time must not share the workspace that cuBLAS has for each stream.
    const bool captures =
        c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
    const auto device = here_.device_index();
    thread_local std::map<std::pair<c10::DeviceIndex, bool>, c10::cuda::CUDAStream> streams;
    auto found = streams.find({device, captures});
    if (found == streams.end()) {
      const auto stream = c10::cuda::getStreamFromPool(false, device);
      found = streams.emplace(std::pair(device, captures), stream).first;
    }
    there_ = found->second;
    let_wait(*there_, here_);
  }

  template <class Work>
  void run(const Work& work) {
    const c10::cuda::CUDAStreamGuard guard(*there_);
    work();
  }

  void join() {
    if (there_) let_wait(here_, *there_);
    there_.reset();
  }

 private:
  static void let_wait(c10::cuda::CUDAStream one, c10::cuda::CUDAStream for_other) {
    c10::Event queued(c10::DeviceType::CUDA);
    queued.record(for_other);
    queued.block(one);
  }

  const c10::cuda::CUDAStream here_;
  std::optional<c10::cuda::CUDAStream> there_;
};

struct Engine {
  static at::ScalarType dtype(const Tensor& like) {
    // `like` is the first tensor that an op checks; another one may have selected the CUDA backend.
    TORCH_CHECK(like.is_cuda(), "fusedrnn: all tensors must be on cuda like the others, got ",
                like.device());
    const c10::cuda::CUDAGuard guard(like.device());
    return dtype_on(device_properties(like.get_device()), like.scalar_type());
  }

  static void run(Call& call) {
    const c10::cuda::CUDAGuard guard(call.like.device());
    const auto device = call.like.get_device();
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device);
    cuda::run(call, device, stream, Beside(stream));
  }
};

}  // namespace

Tensor to_device(const Tensor& numbers, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const Tensor from = numbers.contiguous();
  const Tensor to = at::empty(from.sizes(), from.options().device(device));
  copy_to_device(from.const_data_ptr<int64_t>(), from.numel(), to.mutable_data_ptr<int64_t>(),
                 c10::cuda::getCurrentCUDAStream(guard.current_device().index()));
  return to;
}

TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) { Ops<Engine>::add_to(m); }

}  // namespace fusedrnn::cuda
