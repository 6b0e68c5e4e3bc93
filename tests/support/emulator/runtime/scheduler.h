// Declarations that the parts of the machine share.
#pragma once
#include <string>
#include <vector>

#include "launch.h"
#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef EMULATOR_TSAN
// This runtime is compiled without -fsanitize=thread, so that ThreadSanitizer sees only the
// accesses of the kernels. These calls declare the order between fibers.
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range_pc(void*, unsigned long, void*);
void __tsan_write_range_pc(void*, unsigned long, void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace emulator {

#ifdef EMULATOR_TSAN
inline void tsan_acquire(const void* p) { __tsan_acquire(const_cast<void*>(p)); }
inline void tsan_release(const void* p) { __tsan_release(const_cast<void*>(p)); }
// Report accesses that the runtime makes for a kernel (ldmatrix) as accesses of the kernel, at the
// line that called the runtime. They are ignored while a `Quiet` exists.
[[gnu::always_inline]] inline void note_read(const void* p, size_t n) {
  __tsan_read_range_pc(const_cast<void*>(p), n, __builtin_return_address(0));
}
[[gnu::always_inline]] inline void note_write(void* p, size_t n) {
  __tsan_write_range_pc(p, n, __builtin_return_address(0));
}
// Hides the runtime's own accesses, which ThreadSanitizer sees through libc's interceptors.
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
inline void tsan_acquire(const void*) {}
inline void tsan_release(const void*) {}
inline void note_read(const void*, size_t) {}
inline void note_write(void*, size_t) {}
struct Quiet {
  Quiet() {}
  ~Quiet() {}
};
#endif

// Where a suspended fiber continues.
struct Context {
  void* stack_pointer = nullptr;
#ifdef EMULATOR_ASAN
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
#ifdef EMULATOR_TSAN
  void* fiber = nullptr;
#endif
};

struct Copies;  // of one thread, in async.cpp

struct ThreadState : Thread {
  Context context;
  char* stack = nullptr;
  const char* waiting = nullptr;  // what it waits for, if it waits
  const Site* site = nullptr;
  const void* operand = nullptr;  // of the warp operation that it waits in
  void* result = nullptr;
  u32 barrier_result = 0;
  u32 cluster_phase = 0;  // of the cluster barrier that it arrived at
  bool cluster_arrived = false;
  bool started = false, exited = false;
  Copies* copies = nullptr;
};

struct Barrier {
  u32 arrived = 0;
  u32 expected = 0;  // 0: all that have not exited
  u32 phase = 0;
  u32 votes = 0;  // of bar.red
  const Site* first = nullptr;
  std::vector<ThreadState*> waiting;
  char order[2] = {};  // addresses that ThreadSanitizer orders the phases by
};

struct WarpOperation {
  u32 mask, arrived, kind;
};
struct Warp {
  u32 live = 0;  // lanes that exist and have not exited
  u32 existing = 0;
  std::vector<WarpOperation> pending;  // disjoint masks
  char order = 0;
};

struct ClusterState;
struct BlockState : Block {
  ClusterState* cluster = nullptr;
  ThreadState* threads = nullptr;
  u32 live = 0;
  size_t shared_capacity = 0;
  std::vector<Warp> warps;
  std::vector<Barrier> barriers;
};
struct ClusterState {
  BlockState* blocks = nullptr;
  u32 count = 0, live = 0;
  Barrier barrier;
};

inline ThreadState& state(Thread& thread) { return static_cast<ThreadState&>(thread); }
inline BlockState& block_of(Thread& thread) { return static_cast<BlockState&>(*thread.block); }

// Runs when all lanes of `mask` have arrived. It reads operands[lane] and writes results[lane].
using WarpFunction = void (*)(const void* const operands[32], void* const results[32], u32 mask,
                              const void* shared_argument);
// Operations of different `kind` are not combined.
void warp_operation(Thread&, const Site&, u32 mask, u32 kind, const void* operand, void* result,
                    WarpFunction, const void* shared_argument);

[[noreturn, gnu::cold]] void fail(Thread&, const Site&, const std::string& text);

u64 random_number();
void progress();  // records a change that polling threads may be waiting for

// async.cpp
bool run_one_async_operation();  // false if there is none
void run_all_async_operations();
void finish_copies(ThreadState&);
void forget_async_operations();

}  // namespace emulator
