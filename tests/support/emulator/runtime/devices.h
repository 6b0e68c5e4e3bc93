// The GPUs that the replacement for the CUDA runtime can emulate.
#pragma once
#include <cstddef>
#include <vector>

namespace emulator {

struct Device {
  const char* name;       // for cudaemu_use_device
  const char* full_name;  // as cudaGetDeviceProperties gives it
  int major, minor;
  int multiprocessors;
  int threads_per_multiprocessor, blocks_per_multiprocessor;
  int registers_per_multiprocessor;
  int shared_per_multiprocessor, shared_per_block, shared_per_block_optin, shared_reserved;
  int l2_bytes;
  int clock_khz, memory_clock_khz, memory_bus_bits;
  size_t memory_bytes;
  int largest_cluster;  // 0: no clusters
  // Multiprocessors of each GPC; a cluster lies in one GPC. On real chips it varies which are
  // disabled.
  std::vector<int> gpcs;

  int architecture() const { return 10 * major + minor; }
};

const Device* find_device(const char* name);  // null: no such device

}  // namespace emulator
