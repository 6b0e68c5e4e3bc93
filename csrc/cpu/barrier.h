// A barrier for the threads of one call. Torch-free.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace fusedrnn::cpu {

// A barrier for threads that should all arrive within a microsecond. They spin first, and then
// sleep, because another thread may need the core in order to arrive. Yielding would be worse: a
// busy process could then run for milliseconds before they check again.
class SpinBarrier {
 public:
  // The state of one thread, kept between its waits. A thread that had to sleep may share its core,
  // so it spins less the next time.
  class Visitor {
    friend class SpinBarrier;
    static constexpr int kMaxSpins = 1024, kMinSpins = 32;
    int64_t visits_ = 0;
    int spins_ = kMaxSpins;
  };

  void wait(int threads, Visitor& visitor) {
    if (threads == 1) return;
    const uint32_t round = rounds_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == ++visitor.visits_ * threads) {
      rounds_.store(round + 1);
      if (asleep_.load() > 0) wake();
      return;
    }
    for (int spin = 0; spin < visitor.spins_; ++spin) {
      if (rounds_.load(std::memory_order_acquire) != round) {
        visitor.spins_ = std::min(2 * visitor.spins_, Visitor::kMaxSpins);
        return;
      }
#ifdef __x86_64__
      _mm_pause();
#endif
    }
    visitor.spins_ = std::max(visitor.spins_ / 2, Visitor::kMinSpins);
    // The last thread to arrive changes rounds_ before it reads asleep_. So either it sees that
    // this thread sleeps, or this thread sees the new round.
    ++asleep_;
    while (rounds_.load() == round) sleep_while(round);
    --asleep_;
  }

 private:
#ifdef __linux__
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
  void sleep_while(uint32_t round) {
    syscall(SYS_futex, &rounds_, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
  }
  void wake() { syscall(SYS_futex, &rounds_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
  void sleep_while(uint32_t) { std::this_thread::yield(); }
  void wake() {}
#endif

  alignas(64) std::atomic<int64_t> arrived_{0};
  std::atomic<uint32_t> rounds_{0};
  std::atomic<int> asleep_{0};
};

}  // namespace fusedrnn::cpu
