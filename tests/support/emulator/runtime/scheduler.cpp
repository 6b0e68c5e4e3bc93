// Fibers, the order they run in, barriers, warp operations, and the lifetime of a grid.
#include "scheduler.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

// Saves the callee-saved registers and continues where `load` was saved. It jumps instead of
// returning, because the processor predicts that a `ret` returns to its caller, and would
// mispredict each switch.
extern "C" void emulator_switch_stack(void** save, void* load);
#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly; other processors need their own"
#endif
asm(R"(
.text
.globl emulator_switch_stack
.hidden emulator_switch_stack
.type emulator_switch_stack,@function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size emulator_switch_stack,.-emulator_switch_stack
)");

namespace emulator {

Settings settings;
bool preemption = false;

namespace {

constexpr u32 barriers_per_block = 16;
// A kernel that polls this often without progress of any thread is considered stuck.
constexpr u64 most_idle_polls = 20'000'000;

// --- Stacks ---
// Address space is reserved in slabs, and only the pages that a fiber touches are mapped, so stacks
// can be large. They have no guard pages: each would split a mapping in two, and a grid on all of
// an H100 has more threads than a process may have mappings. Instead, build.py makes the compiler
// refuse kernels whose frame comes near the size of a stack.
#ifdef EMULATOR_ASAN
constexpr size_t stack_bytes = 512 << 10;
#else
constexpr size_t stack_bytes = 128 << 10;
#endif
constexpr size_t stacks_per_slab = 64;

class StackPool {
 public:
  char* take() {
    if (free_.empty()) grow();
    char* stack = free_.back();
    free_.pop_back();
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(stack, stack_bytes);  // a failed launch abandons its fibers
#endif
    return stack;
  }
  void give(char* stack) { free_.push_back(stack); }  // reused first, while it is in the cache

  // After a large grid: releases memory, but not address space.
  void trim() {
    constexpr size_t kept = 2048;
    for (size_t i = 0; i + kept < free_.size(); ++i) madvise(free_[i], stack_bytes, MADV_DONTNEED);
  }

  // Stacks that start at the same offset would all compete for the same cache lines.
  static char* top(char* stack) {
    const size_t number = reinterpret_cast<size_t>(stack) / stack_bytes;
    return stack + stack_bytes - 64 - number * 5 % 61 * 64;
  }

 private:
  void grow() {
    void* slab = mmap(nullptr, stacks_per_slab * stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) {
      std::fputs("emulator: no address space for the stacks of fibers\n", stderr);
      std::abort();
    }
    for (size_t i = stacks_per_slab; i-- > 0;)
      free_.push_back(static_cast<char*>(slab) + i * stack_bytes);
  }
  std::vector<char*> free_;
};

// --- Threads that can run ---
class ReadyQueue {
 public:
  void reset(size_t capacity) {
    size_t size = 64;
    while (size < capacity + 1) size *= 2;
    if (size > ring_.size()) ring_.resize(size);
    mask_ = ring_.size() - 1;
    head_ = tail_ = 0;
  }
  bool empty() const { return head_ == tail_; }
  void push(ThreadState* thread) { ring_[tail_++ & mask_] = thread; }
  // For the lanes of a warp: a warp that runs as long as it can stays in the cache.
  void push_front(ThreadState* thread) { ring_[--head_ & mask_] = thread; }
  ThreadState* pop() {
    ThreadState* thread = ring_[head_++ & mask_];
    // Most of the time of a switch is spent waiting for the other stack to reach the cache. So
    // choose the next thread now and prefetch its stack; push_front may still put another thread
    // first.
    const size_t count = tail_ - head_;
    if (settings.order == Order::random) {
      if (count == 0) return thread;
      std::swap(ring_[head_ & mask_], ring_[(head_ + random_number() % count) & mask_]);
      prefetch(ring_[head_ & mask_]);
    } else if (count > 1) {
      prefetch(ring_[(head_ + 1) & mask_]);
    }
    return thread;
  }

 private:
  static void prefetch(const ThreadState* thread) {
    const char* stack = static_cast<const char*>(thread->context.stack_pointer);
    for (int line = 0; line < 4; ++line) __builtin_prefetch(stack + 64 * line);
  }

  std::vector<ThreadState*> ring_;
  size_t mask_ = 0, head_ = 0, tail_ = 0;
};

struct Machine {
  StackPool stacks;
  ReadyQueue ready;
  Context main;
  ThreadState* current = nullptr;
  void (*body)(Thread&) = nullptr;
  Grid grid;
  u32 live = 0;  // threads that have not exited
  u64 idle_polls = 0;
  bool failed = false;
  std::string failure;
  u64 fault_at = 0;  // the instruction that accessed an illegal address
  u64 random_state = 1;
#ifdef EMULATOR_TSAN
  char start = 0;  // ThreadSanitizer orders threads by its address
  std::vector<void*> fibers;
  size_t fibers_used = 0;  // in this launch
#endif
  char end_of_launch = 0;
  // Kept between launches: a small launch would otherwise spend most of its time on allocation.
  std::vector<ThreadState> threads;
  std::vector<BlockState> blocks;
  std::vector<ClusterState> clusters;
  std::vector<char*> dead_stacks;
  std::mutex mutex;
} machine;

// --- Switching ---
void switch_context(Context& from, Context& to, [[maybe_unused]] bool for_ever) {
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(to.fiber, 1);  // 1: the switch itself does not synchronise
#endif
  emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void thread_exits(ThreadState&);
void prepare(ThreadState&);

// The next thread to run; null if all have exited or are waiting.
ThreadState* next_ready() { return machine.ready.empty() ? nullptr : machine.ready.pop(); }

// The first function on a fiber's stack. Runs one after another the threads that have not started
// yet, which needs no switch, until the next thread is a suspended one.
[[noreturn]] void fiber_main() {
#ifdef EMULATOR_ASAN
  // The first fiber of a launch is entered from the OS thread's stack: record its bounds.
  const bool first = !machine.main.bottom;
  __sanitizer_finish_switch_fiber(nullptr, first ? &machine.main.bottom : nullptr,
                                  first ? &machine.main.size : nullptr);
#endif
  for (;;) {
    ThreadState& self = *machine.current;
#ifdef EMULATOR_TSAN
    tsan_acquire(&machine.start);
#endif
    machine.body(self);
    thread_exits(self);
    ThreadState* next = next_ready();
    char* stack = self.stack;
    self.stack = nullptr;
#ifdef EMULATOR_TSAN
    {
      // Not reused: to ThreadSanitizer, the locals of two threads on one stack would race.
      const Quiet quiet;
      machine.dead_stacks.push_back(stack);
    }
#else
    if (next && !next->started) {
      next->started = true;
      next->stack = stack;
      machine.current = next;
      continue;
    }
    machine.stacks.give(stack);
#endif
    if (!next) switch_context(self.context, machine.main, true);
    if (!next->started) prepare(*next);
    machine.current = next;
    switch_context(self.context, next->context, true);
  }
}

void prepare(ThreadState& thread) {
  const Quiet quiet;
  thread.started = true;
  thread.stack = machine.stacks.take();
  void** top = reinterpret_cast<void**>(StackPool::top(thread.stack));
  *--top = nullptr;  // fiber_main never returns; this aligns its stack as a call would
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  thread.context.stack_pointer = top;
#ifdef EMULATOR_ASAN
  thread.context.bottom = thread.stack;
  thread.context.size = stack_bytes;
#endif
}

// Runs other threads until one makes `self` ready. The caller must have put `self` on a list.
void suspend(ThreadState& self, const char* waiting, const Site& site) {
  self.waiting = waiting;
  self.site = &site;
  ThreadState* next = next_ready();
  if (next != &self) {
    if (next) {
      if (!next->started) prepare(*next);
      machine.current = next;
      switch_context(self.context, next->context, false);
    } else {
      switch_context(self.context, machine.main, false);
    }
  }
  self.waiting = nullptr;
}

// --- Barriers ---
void release_all(Barrier& barrier) {
  ++barrier.phase;
  barrier.arrived = 0;
  barrier.expected = 0;
  barrier.first = nullptr;
  barrier.votes = 0;
  machine.idle_polls = 0;
  if (settings.order == Order::reverse)
    std::reverse(barrier.waiting.begin(), barrier.waiting.end());
  for (ThreadState* thread : barrier.waiting) machine.ready.push(thread);
  barrier.waiting.clear();
}

std::string name_of(const Site& site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

Barrier& block_barrier_named(Thread& self, const Site& site, u32 id) {
  if (id >= barriers_per_block) fail(self, site, "barrier " + std::to_string(id) + " of 16");
  return block_of(self).barriers[id];
}

// True if this was the last arrival.
bool arrive(Thread& self, const Site& site, Barrier& barrier, u32 count, u32 live) {
  if (count) {
    if (barrier.arrived && barrier.expected != count)
      fail(self, site, "threads arrive at one named barrier with different counts");
    if (count % 32) fail(self, site, "the count of a named barrier is not a multiple of 32");
    barrier.expected = count;
  } else if (!barrier.first) {
    barrier.first = &site;
  } else if (barrier.first != &site &&
             (barrier.first->line != site.line || std::strcmp(barrier.first->file, site.file))) {
    fail(self, site,
         "threads of one block wait at different __syncthreads(): some at " +
             name_of(*barrier.first));
  }
  tsan_release(&barrier.order[barrier.phase & 1]);
  ++barrier.arrived;
  return barrier.arrived == (count ? count : live);
}

void thread_exits(ThreadState& self) {
  const Quiet quiet;
  self.exited = true;
  --machine.live;
  machine.idle_polls = 0;
  tsan_release(&machine.end_of_launch);
  BlockState& block = block_of(self);
  ClusterState& cluster = *block.cluster;
  block.warps[self.warp].live &= ~(1u << self.lane);
  --block.live;
  --cluster.live;
  for (Barrier& barrier : block.barriers)
    if (barrier.arrived && !barrier.expected && barrier.arrived == block.live) release_all(barrier);
  if (cluster.barrier.arrived && cluster.barrier.arrived == cluster.live)
    release_all(cluster.barrier);
  if (block.live == 0)
    for (u32 i = 0; i < machine.grid.threads.count(); ++i) finish_copies(block.threads[i]);
  if (block.live == 0 && block.shared_bytes) {
    // The block's shared memory is no longer valid, not even for its peers in the cluster.
    std::memset(block.shared, 0xFF, block.shared_bytes);
#ifdef EMULATOR_ASAN
    __asan_poison_memory_region(block.shared, block.shared_bytes);
#endif
  }
}

// --- The life of a grid ---
void allocate_shared(BlockState& block, u32 bytes) {
  const Quiet quiet;
  constexpr size_t alignment = 1024;  // what swizzled bulk copies require
  // With AddressSanitizer, each block's memory has its exact size and red zones around it. With
  // ThreadSanitizer, it must be memory that no other block of this launch has used.
#if defined(EMULATOR_ASAN) || defined(EMULATOR_TSAN)
  std::free(block.shared);
  block.shared = nullptr;
  block.shared_capacity = 0;
#endif
  if (bytes > block.shared_capacity) {
    std::free(block.shared);
    block.shared = nullptr;
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, bytes)) std::abort();
    block.shared = static_cast<char*>(memory);
    block.shared_capacity = bytes;
  }
  block.shared_bytes = bytes;
  if (bytes) std::memset(block.shared, 0xFF, bytes);  // NaN in every floating-point format
}

void start_cluster(u32 number, ClusterState& cluster, BlockState* blocks, ThreadState* threads,
                   u32 shared_bytes) {
  const Grid& grid = machine.grid;
  const Dim3 shape = grid.cluster;
  const u32 across = grid.blocks.x / shape.x, down = grid.blocks.y / shape.y;
  const Dim3 corner = {number % across * shape.x, number / across % down * shape.y,
                       number / across / down * shape.z};
  const u32 threads_per_block = grid.threads.count();
  cluster.blocks = blocks;
  cluster.count = shape.count();
  cluster.live = cluster.count * threads_per_block;
  cluster.barrier.arrived = 0;
  cluster.barrier.first = nullptr;
  cluster.barrier.waiting.clear();
  for (u32 rank = 0; rank < cluster.count; ++rank) {
    BlockState& block = blocks[rank];
    block.index = {corner.x + rank % shape.x, corner.y + rank / shape.x % shape.y,
                   corner.z + rank / shape.x / shape.y};
    block.grid = &machine.grid;
    block.cluster = &cluster;
    block.cluster_rank = rank;
    block.live = threads_per_block;
    block.threads = threads + rank * threads_per_block;
    allocate_shared(block, shared_bytes);
    block.barriers.resize(barriers_per_block);
    for (Barrier& barrier : block.barriers) {
      barrier.arrived = barrier.expected = barrier.votes = 0;
      barrier.first = nullptr;
      barrier.waiting.clear();
    }
    block.warps.resize((threads_per_block + 31) / 32);
    for (u32 w = 0; w < block.warps.size(); ++w) {
      const u32 lanes = std::min(32u, threads_per_block - 32 * w);
      block.warps[w].live = block.warps[w].existing = lanes == 32 ? ~0u : (1u << lanes) - 1;
      block.warps[w].pending.clear();
    }
    u32 x = 0, y = 0, z = 0;
    for (u32 t = 0; t < threads_per_block; ++t) {
      ThreadState& thread = block.threads[t];
      thread.index = {x, y, z};
      thread.lane = t % 32;
      thread.warp = t / 32;
      thread.block = &block;
      thread.polled = nullptr;
      thread.polls = 0;
      thread.waiting = nullptr;
      thread.cluster_phase = cluster.barrier.phase;
      thread.cluster_arrived = thread.started = thread.exited = false;
      if (++x == grid.threads.x) {
        x = 0;
        if (++y == grid.threads.y) y = 0, ++z;
      }
    }
  }
}

std::string who_waits(u32 count) {
  std::map<std::string, std::pair<u32, const ThreadState*>> groups;
  for (u32 i = 0; i < count; ++i) {
    const ThreadState& thread = machine.threads[i];
    if (thread.exited) continue;
    const std::string where = thread.waiting && thread.site
                                  ? std::string(thread.waiting) + " at " + name_of(*thread.site)
                                  : "running";
    auto& group = groups.try_emplace(where, 0u, &thread).first->second;
    ++group.first;
  }
  std::string report;
  for (const auto& [where, group] : groups) {
    const Dim3& b = group.second->block->index;
    const Dim3& t = group.second->index;
    char line[200];
    std::snprintf(line, sizeof line, "\n  %u threads: %s (first: block %u,%u,%u thread %u,%u,%u)",
                  group.first, where.c_str(), b.x, b.y, b.z, t.x, t.y, t.z);
    report += line;
  }
  return report;
}

void start_randomness() {
  machine.random_state = (settings.seed + settings.launches++) * 0x9E3779B97F4A7C15ull | 1;
  preemption = settings.order == Order::random && settings.yield_probability > 0;
}

#ifdef EMULATOR_TSAN
// Gives fibers to the first `count` threads. To ThreadSanitizer, they run after everything that the
// launching thread did. Fibers are kept, since each takes a millisecond to create. The clusters of
// one launch get different fibers while there are enough, because ThreadSanitizer finds no race
// between accesses of one fiber.
void give_fibers(u32 count) {
  constexpr size_t most = 6000;
  if (machine.fibers_used + count > most) machine.fibers_used = 0;
  while (machine.fibers.size() < machine.fibers_used + count)
    machine.fibers.push_back(__tsan_create_fiber(0));
  for (u32 i = 0; i < count; ++i)
    machine.threads[i].context.fiber = machine.fibers[machine.fibers_used++];
  tsan_release(&machine.start);
}
#endif

// Runs the first `count` threads until all have exited, or one has failed, or none can continue.
void run_threads(u32 count) {
  machine.ready.reset(count);
  machine.live = count;
  machine.idle_polls = 0;
  const u32 first_index = settings.order == Order::random ? u32(random_number() % count) : 0;
  for (u32 i = 0; i < count; ++i) {
    const u32 index = (first_index + i) % count;
    machine.ready.push(&machine.threads[settings.order == Order::reverse ? count - 1 - i : index]);
  }
#ifdef EMULATOR_ASAN
  machine.main.bottom = nullptr;
#endif
#ifdef EMULATOR_TSAN
  give_fibers(count);
#endif
  ThreadState* first = next_ready();
  prepare(*first);
  machine.current = first;
  switch_context(machine.main, first->context, false);
  machine.current = nullptr;
  if (!machine.failed && machine.live) {
    machine.failed = true;
    machine.failure = "deadlock: no thread can go on" + who_waits(count);
  }
  const Quiet quiet;
  if (machine.failed) {
    forget_async_operations();
  } else {
    run_all_async_operations();
  }
  for (u32 i = 0; i < count; ++i) {
    ThreadState& thread = machine.threads[i];
    if (thread.stack) machine.stacks.give(thread.stack);  // a launch that failed leaves some
    thread.stack = nullptr;
    if (!thread.exited) finish_copies(thread);
  }
#ifdef EMULATOR_TSAN
  if (machine.failed) machine.fibers.clear();  // some stopped inside a `Quiet`
#endif
#ifdef EMULATOR_ASAN
  for (BlockState& block : machine.blocks)
    if (block.shared_bytes) __asan_unpoison_memory_region(block.shared, block.shared_bytes);
#endif
}

// --- Illegal addresses ---
// A kernel that accesses an illegal address must fail its launch, and not end the process.
// Sanitizers have their own handlers, which report more.
#if defined(EMULATOR_ASAN) || defined(EMULATOR_TSAN)
struct FaultHandler {
  FaultHandler() {}
  ~FaultHandler() {}
};
#else
void handle_fault(int, siginfo_t* info, void* context) {
  if (!machine.current || machine.failed) {  // not a kernel's fault: let it recur
    std::signal(SIGSEGV, SIG_DFL);
    return;
  }
  machine.fault_at = u64(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  static const Site nowhere = {"", 0};
  char text[64];
  std::snprintf(text, sizeof text, "illegal address 0x%llx", reinterpret_cast<u64>(info->si_addr));
  fail(*machine.current, nowhere, text);
}

class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action = {};
    action.sa_sigaction = handle_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler does not return
    sigaction(SIGSEGV, &action, &before_[0]);
    sigaction(SIGBUS, &action, &before_[1]);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &before_[0], nullptr);
    sigaction(SIGBUS, &before_[1], nullptr);
  }

 private:
  struct sigaction before_[2];
};
#endif

// The line of the .cu file that an instruction came from, as addr2line finds it.
std::string line_of(u64 instruction) {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(instruction), &info)) return "";
  char command[4200];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%llx 2>/dev/null", info.dli_fname,
                instruction - reinterpret_cast<u64>(info.dli_fbase));
  FILE* output = popen(command, "r");
  if (!output) return "";
  // Inlined functions come first; the last is in the kernel.
  char line[4200] = "";
  for (char next[4200]; std::fgets(next, sizeof next, output);) std::strcpy(line, next);
  pclose(output);
  line[std::strcspn(line, "\n")] = 0;
  return line;
}

std::vector<const Module*>& modules() {
  static std::vector<const Module*> all;
  return all;
}

}  // namespace

RegisterModule::RegisterModule(const Module& module) { modules().push_back(&module); }

const Module* const* registered_modules(size_t* count) {
  *count = modules().size();
  return modules().data();
}

u64 random_number() {  // xorshift64*
  u64& x = machine.random_state;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  return (x * 0x2545F4914F6CDD1Dull) >> 16;
}

void progress() { machine.idle_polls = 0; }

Failure run(const Launch& launch) {
  const std::lock_guard<std::mutex> one_grid_at_a_time(machine.mutex);
  start_randomness();
  const Kernel& kernel = *launch.kernel;
  Grid& grid = machine.grid;
  grid = Grid{};
  grid.blocks = launch.grid;
  grid.threads = launch.block;
  grid.cluster = launch.cluster;
  grid.parameters = launch.parameters;
  grid.cooperative = launch.cooperative;
  grid.dynamic_shared = (kernel.static_shared + 15) / 16 * 16;
  const u32 shared_bytes = launch.dynamic_shared ? grid.dynamic_shared + u32(launch.dynamic_shared)
                                                 : kernel.static_shared;
  machine.body = kernel.body;
  machine.failed = false;
  machine.failure.clear();
  machine.fault_at = 0;
  const FaultHandler faults;
#ifdef EMULATOR_TSAN
  machine.main.fiber = __tsan_get_current_fiber();
  machine.fibers_used = 0;
#endif

  const u32 blocks_per_cluster = launch.cluster.count();
  const u32 clusters = launch.grid.count() / blocks_per_cluster;
  const u32 threads_per_cluster = blocks_per_cluster * launch.block.count();
  // All blocks of a cooperative grid are alive at the same time. In other grids one cluster runs
  // after another, as on a GPU with a single SM, so that a kernel that waits for another block
  // fails.
  const u32 resident = launch.cooperative ? clusters : 1;
  if (machine.threads.size() < size_t(resident) * threads_per_cluster)
    machine.threads.resize(size_t(resident) * threads_per_cluster);
  if (machine.blocks.size() < size_t(resident) * blocks_per_cluster)
    machine.blocks.resize(size_t(resident) * blocks_per_cluster);
  if (machine.clusters.size() < resident) machine.clusters.resize(resident);

  std::vector<u32> order(clusters);
  for (u32 i = 0; i < clusters; ++i) order[i] = i;
  if (settings.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (settings.order == Order::random)
    for (u32 i = clusters; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);

  for (u32 done = 0; done < clusters && !machine.failed; done += resident) {
    for (u32 i = 0; i < resident; ++i)
      start_cluster(order[done + i], machine.clusters[i], &machine.blocks[i * blocks_per_cluster],
                    &machine.threads[size_t(i) * threads_per_cluster], shared_bytes);
    run_threads(resident * threads_per_cluster);
  }
  // Only here, not after each cluster: an order between clusters would hide races between them.
  tsan_acquire(&machine.end_of_launch);
  for (char* stack : machine.dead_stacks) machine.stacks.give(stack);
  machine.dead_stacks.clear();
  if (size_t(resident) * threads_per_cluster > 4096) machine.stacks.trim();
  if (!machine.failed) return {};
  if (machine.fault_at) machine.failure += ", at " + line_of(machine.fault_at);
  return {"kernel " + std::string(kernel.name) + ": " + machine.failure, machine.fault_at != 0};
}

void fail(Thread& self, const Site& site, const std::string& text) {
  char where[160];
  const Dim3 &b = self.block->index, &t = self.index;
  std::snprintf(where, sizeof where, " (block %u,%u,%u thread %u,%u,%u)", b.x, b.y, b.z, t.x, t.y,
                t.z);
  machine.failed = true;
  machine.failure = text + (site.line ? ", at " + name_of(site) : "") + where;
  switch_context(state(self).context, machine.main, true);
  std::abort();  // a failed thread never continues
}
void fail(Thread& self, const Site& site, const char* text) { fail(self, site, std::string(text)); }

void fail_shared_access(Thread& self, const Site& site, u32 address, u32 bytes) {
  if (u64(address) + bytes <= self.block->shared_bytes) fail_alignment(self, site, address, bytes);
  fail(self, site,
       "out of bounds: " + std::to_string(bytes) + " bytes at " + std::to_string(address) + " of " +
           std::to_string(self.block->shared_bytes) + " bytes of shared memory");
}
void fail_alignment(Thread& self, const Site& site, u64 address, u32 bytes) {
  char text[100];
  std::snprintf(text, sizeof text, "misaligned access of %u bytes at address 0x%llx", bytes,
                address);
  fail(self, site, text);
}

// --- Waiting ---
void block_barrier(Thread& thread, const Site& site, u32 id, u32 count) {
  const Quiet quiet;
  ThreadState& self = state(thread);
  Barrier& barrier = block_barrier_named(self, site, id);
  const u32 phase = barrier.phase;
  if (arrive(self, site, barrier, count, block_of(self).live)) {
    if (settings.order != Order::forward) {
      // Otherwise the last thread to arrive would always run first.
      barrier.waiting.push_back(&self);
      release_all(barrier);
      suspend(self, "after __syncthreads", site);
    } else {
      release_all(barrier);
    }
  } else {
    barrier.waiting.push_back(&self);
    suspend(self, "__syncthreads", site);
  }
  tsan_acquire(&barrier.order[phase & 1]);
}

void block_barrier_arrive(Thread& self, const Site& site, u32 id, u32 count) {
  const Quiet quiet;
  Barrier& barrier = block_barrier_named(self, site, id);
  if (arrive(self, site, barrier, count, block_of(self).live)) release_all(barrier);
}

u32 block_barrier_reduce(Thread& thread, const Site& site, Reduce operation, u32 id, u32 count,
                         bool predicate) {
  const Quiet quiet;
  ThreadState& self = state(thread);
  Barrier& barrier = block_barrier_named(self, site, id);
  const u32 phase = barrier.phase;
  barrier.votes += predicate;
  self.barrier_result = 0;
  if (arrive(self, site, barrier, count, block_of(self).live)) {
    barrier.waiting.push_back(&self);
    const u32 votes = barrier.votes, voters = barrier.arrived;
    for (ThreadState* waiting : barrier.waiting)
      waiting->barrier_result = operation == Reduce::popc  ? votes
                                : operation == Reduce::all ? votes == voters
                                                           : votes > 0;
    release_all(barrier);
  } else {
    barrier.waiting.push_back(&self);
  }
  suspend(self, "barrier with reduction", site);
  tsan_acquire(&barrier.order[phase & 1]);
  return self.barrier_result;
}

void cluster_barrier_arrive(Thread& thread, const Site& site, bool release) {
  const Quiet quiet;
  ThreadState& self = state(thread);
  ClusterState& cluster = *block_of(self).cluster;
  Barrier& barrier = cluster.barrier;
  if (self.cluster_arrived)
    fail(self, site, "barrier.cluster.arrive twice without a wait between them");
  self.cluster_arrived = true;
  self.cluster_phase = barrier.phase;
  if (release) tsan_release(&barrier.order[barrier.phase & 1]);
  if (++barrier.arrived == cluster.live) release_all(barrier);
}

void cluster_barrier_wait(Thread& thread, const Site& site, bool acquire) {
  const Quiet quiet;
  ThreadState& self = state(thread);
  Barrier& barrier = block_of(self).cluster->barrier;
  if (!self.cluster_arrived) fail(self, site, "barrier.cluster.wait without an arrive before it");
  self.cluster_arrived = false;
  if (barrier.phase == self.cluster_phase) {
    barrier.waiting.push_back(&self);
    suspend(self, "cluster barrier", site);
  } else if (settings.order == Order::random) {
    machine.ready.push(&self);
    suspend(self, "after cluster barrier", site);
  }
  if (acquire) tsan_acquire(&barrier.order[self.cluster_phase & 1]);
}

void yield(Thread& self, const Site& site) {
  const Quiet quiet;
  run_one_async_operation();
  if (++machine.idle_polls > most_idle_polls)
    fail(self, site,
         "livelock: threads poll and nothing changes" + who_waits(u32(machine.threads.size())));
  machine.ready.push(&state(self));
  suspend(state(self), "polling", site);
}

void preempt_now(Thread& self) {
  const Quiet quiet;
  static const Site nowhere = {"", 0};
  if (double(random_number() & 0xFFFFFF) >= settings.yield_probability * 0x1000000) return;
  run_one_async_operation();
  machine.ready.push(&state(self));
  suspend(state(self), "interrupted", nowhere);
}

#ifdef EMULATOR_TSAN
// One object for all fences, releases and acquires: this orders more than PTX does, never less, so
// that every report is a race.
static char fence_order;
void fence(Thread& self) {
  __tsan_acquire(&fence_order);
  __tsan_release(&fence_order);
  preempt(self);
}
void after_acquire() { __tsan_acquire(&fence_order); }
void before_release() { __tsan_release(&fence_order); }
#endif

// --- Warp operations ---
void warp_operation(Thread& thread, const Site& site, u32 mask, u32 kind, const void* operand,
                    void* result, WarpFunction function, const void* shared_argument) {
  ThreadState& self = state(thread);
  BlockState& block = block_of(self);
  Warp& warp = block.warps[self.warp];
  mask &= warp.existing;  // lanes beyond the end of the block
  if (settings.values_order) tsan_release(&warp.order);
  if (!(mask >> self.lane & 1))
    fail(self, site, "the calling lane is not in the mask of a warp operation");
  if (mask & ~warp.live) fail(self, site, "a warp operation names a lane that has exited");
  WarpOperation* operation = nullptr;
  for (WarpOperation& other : warp.pending) {
    if (other.mask == mask) {
      operation = &other;
    } else if (other.mask & mask & ~other.arrived) {
      fail(self, site, "lanes of one warp wait in operations with overlapping masks");
    }
  }
  if (!operation) {
    warp.pending.push_back({mask, 0, kind});
    operation = &warp.pending.back();
  }
  if (operation->kind != kind)
    fail(self, site, "lanes of one warp execute different warp operations");
  operation->arrived |= 1u << self.lane;
  self.operand = operand;
  self.result = result;
  if (operation->arrived != mask) {
    suspend(self, "warp operation", site);
    if (settings.values_order) tsan_acquire(&warp.order);
    return;
  }
  machine.idle_polls = 0;
  warp.pending.erase(warp.pending.begin() + (operation - warp.pending.data()));
  ThreadState* const lanes = block.threads + 32 * self.warp;
  if (function) {
    const void* operands[32] = {};
    void* results[32] = {};
    for (u32 l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      operands[l] = lanes[l].operand;
      results[l] = lanes[l].result;
    }
    function(operands, results, mask, shared_argument);
  }
  const auto make_ready = [&](u32 lane, auto push) {
    if (mask >> lane & 1 && &lanes[lane] != &self) (machine.ready.*push)(&lanes[lane]);
  };
  if (settings.order == Order::random) {
    for (u32 l = 0; l < 32; ++l) make_ready(l, &ReadyQueue::push);
    machine.ready.push(&self);
    suspend(self, "after a warp operation", site);
  } else if (settings.order == Order::reverse) {
    for (u32 l = 0; l < 32; ++l) make_ready(l, &ReadyQueue::push_front);
  } else {
    for (u32 l = 32; l-- > 0;) make_ready(l, &ReadyQueue::push_front);
  }
  if (settings.values_order) tsan_acquire(&warp.order);
}

void warp_barrier(Thread& self, const Site& site, u32 mask) {
  const Quiet quiet;
  // This is the only warp operation that orders memory.
  char* order = &block_of(self).warps[self.warp].order;
  tsan_release(order);
  warp_operation(self, site, mask, 'b', nullptr, nullptr, nullptr, nullptr);
  tsan_acquire(order);
}

u32 active_mask(Thread& self) { return block_of(self).warps[self.warp].live; }

namespace {
struct Shuffle {
  u32 value, source;
};
}  // namespace

u32 warp_shuffle(Thread& self, const Site& site, char mode, u32 value, u32 b, u32 c, u32 mask,
                 bool* in_range) {
  const Quiet quiet;
  const u32 lane = self.lane, segment = c >> 8 & 31, clamp = c & 31;
  b &= 31;
  const u32 last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  s32 source;
  bool inside;
  switch (mode) {
    case 'u':
      source = s32(lane - b);
      inside = source >= s32(last);
      break;
    case 'd':
      source = s32(lane + b);
      inside = source <= s32(last);
      break;
    case 'b':
      source = s32(lane ^ b);
      inside = source <= s32(last);
      break;
    default: source = s32(first | (b & ~segment & 31)); inside = source <= s32(last);
  }
  *in_range = inside;
  const Shuffle operand = {value, inside ? u32(source) : lane};
  u32 result = 0;
  warp_operation(
      self, site, mask, u32(mode), &operand, &result,
      [](const void* const operands[32], void* const results[32], u32 members, const void*) {
        for (u32 l = 0; l < 32; ++l) {
          if (!(members >> l & 1)) continue;
          const u32 from = static_cast<const Shuffle*>(operands[l])->source;
          // Reading a lane that does not participate gives poison.
          *static_cast<u32*>(results[l]) =
              members >> from & 1 ? static_cast<const Shuffle*>(operands[from])->value : ~0u;
        }
      },
      nullptr);
  return result;
}

u32 warp_ballot(Thread& self, const Site& site, u32 mask, bool predicate) {
  const Quiet quiet;
  u32 result = 0;
  warp_operation(
      self, site, mask, 'v', &predicate, &result,
      [](const void* const operands[32], void* const results[32], u32 members, const void*) {
        u32 votes = 0;
        for (u32 l = 0; l < 32; ++l)
          if (members >> l & 1) votes |= u32(*static_cast<const bool*>(operands[l])) << l;
        for (u32 l = 0; l < 32; ++l)
          if (members >> l & 1) *static_cast<u32*>(results[l]) = votes;
      },
      nullptr);
  return result;
}

u32 warp_match(Thread& self, const Site& site, bool all, u64 value, u32 mask, bool* all_equal) {
  const Quiet quiet;
  u32 equal = 0;
  warp_operation(
      self, site, mask, 'm', &value, &equal,
      [](const void* const operands[32], void* const results[32], u32 members, const void*) {
        for (u32 l = 0; l < 32; ++l) {
          if (!(members >> l & 1)) continue;
          u32 same = 0;
          for (u32 k = 0; k < 32; ++k)
            if (members >> k & 1 &&
                *static_cast<const u64*>(operands[k]) == *static_cast<const u64*>(operands[l]))
              same |= 1u << k;
          *static_cast<u32*>(results[l]) = same;
        }
      },
      nullptr);
  const u32 members = mask & block_of(self).warps[self.warp].existing;
  *all_equal = equal == members;
  return !all || *all_equal ? equal : 0;
}

u32 warp_reduce(Thread& self, const Site& site, Combine combine, u32 value, u32 mask) {
  const Quiet quiet;
  u32 result = 0;
  warp_operation(
      self, site, mask, 'r' + 256 * u32(combine), &value, &result,
      [](const void* const operands[32], void* const results[32], u32 members,
         const void* argument) {
        bool first = true;
        u32 total = 0;
        for (u32 l = 0; l < 32; ++l) {
          if (!(members >> l & 1)) continue;
          const u32 x = *static_cast<const u32*>(operands[l]);
          if (first) {
            total = x;
            first = false;
            continue;
          }
          switch (*static_cast<const Combine*>(argument)) {
            case Combine::add: total += x; break;
            case Combine::min: total = std::min(total, x); break;
            case Combine::max: total = std::max(total, x); break;
            case Combine::smin: total = u32(std::min(s32(total), s32(x))); break;
            case Combine::smax: total = u32(std::max(s32(total), s32(x))); break;
            case Combine::bit_and: total &= x; break;
            case Combine::bit_or: total |= x; break;
            case Combine::bit_xor: total ^= x; break;
          }
        }
        for (u32 l = 0; l < 32; ++l)
          if (members >> l & 1) *static_cast<u32*>(results[l]) = total;
      },
      &combine);
  return result;
}

// --- Clusters ---
namespace {
constexpr u32 offset_mask = 0xFFFFFF;

BlockState& peer(Thread& self, const Site& site, u32 rank) {
  ClusterState& cluster = *block_of(self).cluster;
  if (rank >= cluster.count)
    fail(self, site,
         "no block " + std::to_string(rank) + " in a cluster of " + std::to_string(cluster.count));
  return cluster.blocks[rank];
}
}  // namespace

char* cluster_shared(Thread& self, const Site& site, u32 address, u32 bytes) {
  const u32 rank = address >> 24;
  BlockState& owner = rank ? peer(self, site, rank - 1) : block_of(self);
  const u32 offset = address & offset_mask;
  if (u64(offset) + bytes > owner.shared_bytes) fail_shared_access(self, site, address, bytes);
  if (owner.live == 0) fail(self, site, "access to the shared memory of a block that has exited");
  if (bytes <= 16 && address & (bytes - 1)) fail_alignment(self, site, address, bytes);
  return owner.shared + offset;
}

u32 map_to_rank(Thread& self, const Site& site, u32 address, u32 rank) {
  peer(self, site, rank);
  return (address & offset_mask) | (rank + 1) << 24;
}

u64 map_generic_to_rank(Thread& self, const Site& site, u64 pointer, u32 rank) {
  const u32 offset = shared_address_of(self, site, pointer) & offset_mask;
  return reinterpret_cast<u64>(peer(self, site, rank).shared) + offset;
}

u32 shared_address_of(Thread& self, const Site& site, u64 pointer) {
  const u64 own = pointer - reinterpret_cast<u64>(self.block->shared);
  if (own <= self.block->shared_bytes) return u32(own);
  ClusterState& cluster = *block_of(self).cluster;
  for (u32 rank = 0; rank < cluster.count; ++rank) {
    const u64 offset = pointer - reinterpret_cast<u64>(cluster.blocks[rank].shared);
    if (offset <= cluster.blocks[rank].shared_bytes) return u32(offset) | (rank + 1) << 24;
  }
  if (pointer == 0) return 0;  // a null pointer may be converted, though not used
  fail(self, site, "a pointer is converted to shared memory that does not point there");
}

bool is_shared(Thread& self, u64 pointer, bool of_cluster) {
  if (pointer - reinterpret_cast<u64>(self.block->shared) < self.block->shared_bytes) return true;
  if (!of_cluster) return false;
  ClusterState& cluster = *block_of(self).cluster;
  for (u32 rank = 0; rank < cluster.count; ++rank)
    if (pointer - reinterpret_cast<u64>(cluster.blocks[rank].shared) <
        cluster.blocks[rank].shared_bytes)
      return true;
  return false;
}

u32 rank_of_shared(u32 address, const Thread& self) {
  return address >> 24 ? (address >> 24) - 1 : self.block->cluster_rank;
}

}  // namespace emulator
