// The interface between the emulated machine and the generated C++.
//
// A CUDA thread is a fiber, a function call with its own stack. All fibers of a launch run on the
// one OS thread that called the launcher, so that a run is repeatable and needs no locks. Fibers
// switch only where CUDA threads wait for each other (barriers, warp operations) or poll memory;
// between such points a thread runs alone.
//
// This header is parsed once for each translated .cu file, so it includes nothing that is slow to
// parse.
#pragma once
#include <cstdint>

namespace emulator {

using u8 = uint8_t;
using s8 = int8_t;
using u16 = uint16_t;
using s16 = int16_t;
using u32 = uint32_t;
using s32 = int32_t;
using u64 = unsigned long long;
using s64 = long long;
using u128 = unsigned __int128;
using s128 = __int128;
using f32 = float;
using f64 = double;

// A line of the .cu file, as nvcc -lineinfo gives it.
struct Site {
  const char* file;
  int line;
};

struct Dim3 {
  u32 x = 1, y = 1, z = 1;
  u32 count() const { return x * y * z; }
};

struct Grid {
  Dim3 blocks, threads, cluster;
  const char* parameters = nullptr;
  u32 dynamic_shared = 0;  // offset of `extern __shared__`, after the static variables
  bool cooperative = false;
  alignas(16) u32 workspace[8] = {};  // where cooperative groups keep the grid's barrier
};

struct Block {
  Dim3 index;
  Grid* grid = nullptr;
  char* shared = nullptr;
  u32 shared_bytes = 0;
  u32 cluster_rank = 0;
};

struct Thread {
  Dim3 index;
  u32 lane = 0, warp = 0;
  Block* block = nullptr;
  const void* polled = nullptr;  // address of the last volatile, relaxed or acquire load
  u32 polls = 0;
};

// These end the launch with an error; the thread does not continue.
[[noreturn, gnu::cold]] void fail(Thread&, const Site&, const char* text);
[[noreturn, gnu::cold]] void fail_shared_access(Thread&, const Site&, u32 address, u32 bytes);
[[noreturn, gnu::cold]] void fail_alignment(Thread&, const Site&, u64 address, u32 bytes);

// --- Waiting for other threads ---
// A count of 0 means all threads of the block.
void block_barrier(Thread&, const Site&, u32 id, u32 count);
void block_barrier_arrive(Thread&, const Site&, u32 id, u32 count);
enum class Reduce { popc, all, any };
u32 block_barrier_reduce(Thread&, const Site&, Reduce, u32 id, u32 count, bool predicate);
void cluster_barrier_arrive(Thread&, const Site&, bool release);
void cluster_barrier_wait(Thread&, const Site&, bool acquire);
void yield(Thread&, const Site&);  // lets other threads run; for polling loops

// In random order only: may let another thread run here.
extern bool preemption;
void preempt_now(Thread&);
inline void preempt(Thread& self) {
  if (__builtin_expect(preemption, 0)) preempt_now(self);
}

// --- Warp operations: the last lane of the mask to arrive computes the results of all ---
void warp_barrier(Thread&, const Site&, u32 mask);
u32 warp_shuffle(Thread&, const Site&, char mode, u32 value, u32 b, u32 c, u32 mask,
                 bool* in_range);
u32 warp_ballot(Thread&, const Site&, u32 mask, bool predicate);
u32 warp_match(Thread&, const Site&, bool all, u64 value, u32 mask, bool* all_equal);
enum class Combine { add, min, max, smin, smax, bit_and, bit_or, bit_xor };
u32 warp_reduce(Thread&, const Site&, Combine, u32 value, u32 mask);
u32 active_mask(Thread&);

// --- Memory order. Everything runs on one OS thread: this only informs ThreadSanitizer. ---
#ifdef EMULATOR_TSAN
void fence(Thread&);
void after_acquire();
void before_release();
#else
inline void fence(Thread& self) { preempt(self); }
inline void after_acquire() {}
inline void before_release() {}
#endif

// --- Clusters. A shared::cluster address has the owner's rank + 1 in bits 24 to 31. ---
char* cluster_shared(Thread&, const Site&, u32 address, u32 bytes);
u32 map_to_rank(Thread&, const Site&, u32 address, u32 rank);
u64 map_generic_to_rank(Thread&, const Site&, u64 pointer, u32 rank);
u32 shared_address_of(Thread&, const Site&, u64 pointer);  // of a generic pointer
bool is_shared(Thread&, u64 pointer, bool of_cluster);
u32 rank_of_shared(u32 address, const Thread&);

// --- Matrices (matrix.cpp), fragments as the PTX manual lays them out ---
enum class Half { f16, bf16 };
void mma_16bit(Thread&, const Site&, Half, u32 k, f32 d[4], const u32* a, const u32* b,
               const f32 c[4]);
void mma_tf32(Thread&, const Site&, u32 k, f32 d[4], const u32* a, const u32* b, const f32 c[4]);
void mma_f64(Thread&, const Site&, f64 d[2], f64 a, f64 b, const f64 c[2]);
void load_matrices(Thread&, const Site&, u32 count, bool transposed, u32 result[], const char* row);
void store_matrices(Thread&, const Site&, u32 count, bool transposed, const u32 value[], char* row);
// wmma fragments are opaque to the program: element e of lane l is element 8 l + e of the tile.
void wmma_load_16bit(Thread&, const Site&, u32 registers, u32 result[], const char* tile,
                     u32 stride, bool column_major);
void wmma_load_f32(Thread&, const Site&, f32 result[8], const char* tile, u32 stride,
                   bool column_major);
void wmma_store_f32(Thread&, const Site&, const f32 value[8], char* tile, u32 stride,
                    bool column_major);
void wmma_mma(Thread&, const Site&, Half, f32 d[8], const u32* a, const u32* b, const f32 c[8]);

// --- Asynchronous copies and mbarriers (async.cpp) ---
// Data arrives as late as the program allows (in random order, sometimes at once), so that a
// missing wait is found.
void copy_async(Thread&, const Site&, char* to, const char* from, u32 bytes, u32 source_bytes);
void copy_async_commit(Thread&);
void copy_async_wait(Thread&, u32 groups_left);
void copy_async_wait_all(Thread&);
void copy_async_arrive(Thread&, const Site&, char* barrier, bool counted);
void bulk_copy_to_shared(Thread&, const Site&, char* to, const char* from, u32 bytes,
                         char* barrier);
void bulk_copy_to_global(Thread&, const Site&, char* to, const char* from, u32 bytes);
void bulk_commit(Thread&);
void bulk_wait(Thread&, const Site&, u32 groups_left);
void store_async(Thread&, const Site&, char* to, const void* value, u32 bytes, char* barrier);
void mbarrier_init(Thread&, const Site&, char* barrier, u32 count);
void mbarrier_invalidate(Thread&, const Site&, char* barrier);
u64 mbarrier_arrive(Thread&, const Site&, char* barrier, u32 count, bool drop, bool release);
void mbarrier_expect(Thread&, const Site&, char* barrier, u32 bytes);
void mbarrier_complete(Thread&, const Site&, char* barrier, u32 bytes);
bool mbarrier_test(Thread&, const Site&, char* barrier, bool parity, bool acquire);
bool mbarrier_test_state(Thread&, const Site&, char* barrier, u64 state, bool acquire);
u32 mbarrier_pending(u64 state);

void device_printf(const char* format, const char* arguments);

// --- What a translated file registers when its library is loaded ---
struct Parameter {
  u32 offset, bytes;
};
struct Kernel {
  const char* name;  // mangled, as nvcc's host code registers it
  void (*body)(Thread&);
  const Parameter* parameters;
  u32 parameter_count, parameter_bytes;
  u32 static_shared;
  u32 max_threads;  // __launch_bounds__; 0: none
  u32 min_blocks;   // its second argument; 0: none
  Dim3 cluster;     // __cluster_dims__; 0, 0, 0: none
  u32 registers;    // as ptxas counted them; 0: unknown
  u32 local_bytes;  // stack, spilled registers included
};
struct Variable {
  const char* name;
  void* address;
  u64 bytes;
};
struct Module {
  const char* source;
  int arch;
  const Kernel* kernels;
  u32 kernel_count;
  const Variable* variables;
  u32 variable_count;
};
struct RegisterModule {
  explicit RegisterModule(const Module&);
};

}  // namespace emulator
