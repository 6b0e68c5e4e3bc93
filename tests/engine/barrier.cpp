// Tests the CPU engine's barrier: each thread reads what every thread wrote before the barrier.
// Prints the number of wrong values.
#include "../../csrc/cpu/barrier.h"

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

using fusedrnn::cpu::SpinBarrier;

int main() {
  constexpr int kRounds = 5000;
  std::atomic<int> wrong{0};
  for (const int threads : {2, 3, 7}) {
    SpinBarrier barrier;
    std::vector<int> written(size_t(threads), 0);
    std::vector<std::thread> workers;
    for (int i = 0; i < threads; ++i)
      workers.emplace_back([&, i] {
        SpinBarrier::Visitor visitor;
        for (int round = 1; round <= kRounds; ++round) {
          written[size_t(i)] = round;
          barrier.wait(threads, visitor);
          for (const int value : written) wrong += value != round;
          barrier.wait(threads, visitor);
        }
      });
    for (std::thread& worker : workers) worker.join();
  }
  std::printf("%d\n", wrong.load());
}
