// Running a grid, and the settings that tests make.
#pragma once
#include <string>

#include "machine.h"

namespace emulator {

enum class Order { forward, reverse, random };

struct Settings {
  Order order = Order::forward;
  u64 seed = 1;
  u64 launches = 0;              // since the seed was set: each launch has an order of its own
  double yield_probability = 0;  // random order: the chance to be interrupted at an atomic or fence
  // For ThreadSanitizer: what a lane did before it gave a value away (by a shuffle, a product)
  // comes before what the lanes do that got it. So it is on a GPU for the reads that the value was
  // made from, but not for writes.
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
  std::string text;  // empty: all went well
  bool illegal_address = false;
};
Failure run(const Launch&);

// All modules of this library, in the order of linking.
const Module* const* registered_modules(size_t* count);

}  // namespace emulator
