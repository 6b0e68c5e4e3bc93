// A barrier for the threads of one call. Torch-free.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace fusedrnn::cpu {

// A barrier for threads that should all arrive within a microsecond. They spin first, and yield the
// core if that takes too long, because the machine may be shared.
class SpinBarrier {
 public:
  // `visits` counts the visits of the calling thread.
  void wait(int threads, int64_t& visits) {
    if (threads == 1) return;
    const int64_t full = ++visits * threads;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 >= full) return;
    for (int spins = 0; arrived_.load(std::memory_order_acquire) < full; ++spins) {
      if (spins < 1000) {
#ifdef __x86_64__
        _mm_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  alignas(64) std::atomic<int64_t> arrived_{0};
};

}  // namespace fusedrnn::cpu
