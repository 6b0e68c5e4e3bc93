// Runs a grid, with settings for tests.
#pragma once
#include <string>

#include "machine.h"

namespace emulator {

enum class Order { forward, reverse, random };

struct Settings {
  Order order = Order::forward;
  u64 seed = 1;
  u64 launches = 0;              // since the seed was set: each launch has its own order
  double yield_probability = 0;  // random order: the chance to be interrupted at an atomic or fence
  // For ThreadSanitizer: what a lane did before it passed on a value (by a shuffle or a tensor-core
  // multiplication) happens before what the receiving lanes do afterwards. On a GPU this holds for
  // the reads that the value was computed from, but not for writes.
  bool values_order = false;
};
extern Settings settings;

struct Launch {
  const Kernel* kernel = nullptr;
  Dim3 grid, block, cluster;
  size_t dynamic_shared = 0;
  bool cooperative = false;
  const char* parameters = nullptr;
};

struct Failure {
  std::string text;  // empty: success
  bool illegal_address = false;
};
Failure run(const Launch&);

// All modules of this library, in the order of linking.
const Module* const* registered_modules(size_t* count);

}  // namespace emulator
