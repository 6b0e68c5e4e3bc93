// Asynchronous copies and mbarriers.
//
// cp.async is executed when its thread waits for it; st.async and bulk copies are executed while
// other threads poll, in an order that the settings determine. A kernel that does not wait reads
// the previous contents.
#include <cstring>
#include <deque>

#include "scheduler.h"

namespace emulator {

namespace {

struct Copy {
  char* to;
  const char* from;
  u32 bytes, source_bytes;
};

struct Operation {
  char* to;
  const char* from;  // null: `value` is stored
  u32 bytes;
  char* barrier;       // null: none
  ThreadState* owner;  // of a bulk copy that its thread waits for; else null
  u64 group;
  char value[16];
};
std::deque<Operation> in_flight;

void carry_out(const Copy& copy) {
  note_read(copy.from, copy.source_bytes);
  note_write(copy.to, copy.bytes);
  std::memcpy(copy.to, copy.from, copy.source_bytes);
  std::memset(copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace

struct Copies {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  u64 bulk_group = 0;  // the one that is open now
};

namespace {

Copies& copies_of(Thread& self) {
  ThreadState& thread = state(self);
  if (!thread.copies) thread.copies = new Copies;
  return *thread.copies;
}

void carry_out_group(std::vector<Copy>& group) {
  for (const Copy& copy : group) carry_out(copy);
  group.clear();
}

// An mbarrier in its 64 bits: arrivals per phase (20), arrivals still missing (20), bytes still
// missing (22, signed: they may arrive before they are announced), the phase (top bit).
struct State {
  u32 expected, pending;
  s32 bytes;
  bool phase;
};
constexpr u64 count_mask = (1 << 20) - 1;

State unpack(u64 x) {
  s32 bytes = s32(x >> 40 & 0x3FFFFF);
  if (bytes & 0x200000) bytes -= 0x400000;
  return {u32(x & count_mask), u32(x >> 20 & count_mask), bytes, x >> 63 != 0};
}
u64 packed(const State& s) {
  return u64(s.expected) | u64(s.pending) << 20 | (u64(s.bytes) & 0x3FFFFF) << 40 |
         u64(s.phase) << 63;
}
constexpr u64 never_initialized = ~0ull;  // shared memory begins as NaN

State read_barrier(Thread& self, const Site& site, char* barrier) {
  const u64 x = *reinterpret_cast<u64*>(barrier);
  if (x == never_initialized) fail(self, site, "an mbarrier is used before mbarrier.init");
  return unpack(x);
}
void write_barrier(char* barrier, State s) {
  if (s.pending == 0 && s.bytes == 0) {
    s.phase = !s.phase;
    s.pending = s.expected;
    progress();
  }
  *reinterpret_cast<u64*>(barrier) = packed(s);
}
void complete_bytes(char* barrier, u32 bytes) {
  State s = unpack(*reinterpret_cast<u64*>(barrier));
  s.bytes -= s32(bytes);
  write_barrier(barrier, s);
}

void carry_out(const Operation& operation) {
  const Quiet quiet;
  std::memcpy(operation.to, operation.from ? operation.from : operation.value, operation.bytes);
  if (operation.barrier) complete_bytes(operation.barrier, operation.bytes);
  progress();
}

void start(Thread& self, Operation operation) {
  tsan_release(operation.barrier ? operation.barrier : operation.to);
  // Carry it out immediately or as late as possible: a kernel must not rely on either.
  if (settings.order == Order::random && random_number() % 2)
    carry_out(operation);
  else
    in_flight.push_back(operation);
  preempt(self);
}

}  // namespace

bool run_one_async_operation() {
  if (in_flight.empty()) return false;
  size_t which = 0;
  if (settings.order == Order::random) which = random_number() % in_flight.size();
  if (settings.order == Order::reverse) which = in_flight.size() - 1;
  const Operation operation = in_flight[which];
  in_flight.erase(in_flight.begin() + which);
  carry_out(operation);
  return true;
}
void run_all_async_operations() {
  while (run_one_async_operation()) {
  }
}
void forget_async_operations() { in_flight.clear(); }

void finish_copies(ThreadState& thread) {
  if (!thread.copies) return;
  for (auto& group : thread.copies->groups) carry_out_group(group);
  carry_out_group(thread.copies->open);
  // Bulk copies read and write this block's shared memory, which is about to become invalid.
  if (thread.copies->bulk_group) run_all_async_operations();
  delete thread.copies;
  thread.copies = nullptr;
}

// --- cp.async ---
void copy_async(Thread& self, const Site& site, char* to, const char* from, u32 bytes,
                u32 source_bytes) {
  const Quiet quiet;
  if (source_bytes > bytes) fail(self, site, "cp.async reads more bytes than it writes");
  if ((reinterpret_cast<u64>(to) | reinterpret_cast<u64>(from)) & (bytes - 1))
    fail_alignment(self, site, reinterpret_cast<u64>(from), bytes);
  copies_of(self).open.push_back({to, from, bytes, source_bytes});
}
void copy_async_commit(Thread& self) {
  const Quiet quiet;
  Copies& copies = copies_of(self);
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
void copy_async_wait(Thread& self, u32 groups_left) {
  auto& groups = copies_of(self).groups;
  while (groups.size() > groups_left) {
    carry_out_group(groups.front());
    const Quiet quiet;
    groups.erase(groups.begin());
  }
}
void copy_async_wait_all(Thread& self) {
  copy_async_wait(self, 0);
  carry_out_group(copies_of(self).open);
}
void copy_async_arrive(Thread& self, const Site& site, char* barrier, bool counted) {
  copy_async_wait_all(self);
  if (!counted) {  // not .noinc: this arrival is not part of the expected count
    State s = read_barrier(self, site, barrier);
    ++s.pending;
    *reinterpret_cast<u64*>(barrier) = packed(s);
  }
  mbarrier_arrive(self, site, barrier, 1, false, true);
}

// --- st.async and bulk copies ---
void store_async(Thread& self, const Site& site, char* to, const void* value, u32 bytes,
                 char* barrier) {
  note_write(to, bytes);
  const Quiet quiet;
  read_barrier(self, site, barrier);
  Operation operation = {to, nullptr, bytes, barrier, nullptr, 0, {}};
  std::memcpy(operation.value, value, bytes);
  start(self, operation);
}
void check_bulk(Thread& self, const Site& site, const char* to, const char* from, u32 bytes) {
  if ((reinterpret_cast<u64>(to) | reinterpret_cast<u64>(from)) & 15 || bytes & 15)
    fail(self, site, "addresses and size of a bulk copy must be multiples of 16");
}
void bulk_copy_to_shared(Thread& self, const Site& site, char* to, const char* from, u32 bytes,
                         char* barrier) {
  note_read(from, bytes);
  note_write(to, bytes);
  const Quiet quiet;
  check_bulk(self, site, to, from, bytes);
  read_barrier(self, site, barrier);
  start(self, {to, from, bytes, barrier, nullptr, 0, {}});
}
void bulk_copy_to_global(Thread& self, const Site& site, char* to, const char* from, u32 bytes) {
  note_read(from, bytes);
  note_write(to, bytes);
  const Quiet quiet;
  check_bulk(self, site, to, from, bytes);
  Copies& copies = copies_of(self);
  if (!copies.bulk_group) copies.bulk_group = 1;
  start(self, {to, from, bytes, nullptr, &state(self), copies.bulk_group, {}});
}
void bulk_commit(Thread& self) {
  Copies& copies = copies_of(self);
  copies.bulk_group = copies.bulk_group ? copies.bulk_group + 1 : 2;
}
void bulk_wait(Thread& self, const Site&, u32 groups_left) {
  const Quiet quiet;
  const u64 open = copies_of(self).bulk_group;
  for (size_t i = 0; i < in_flight.size();) {
    const Operation operation = in_flight[i];
    if (operation.owner == &state(self) && operation.group + groups_left < open) {
      in_flight.erase(in_flight.begin() + i);
      carry_out(operation);
    } else {
      ++i;
    }
  }
}

// --- mbarrier ---
void mbarrier_init(Thread& self, const Site& site, char* barrier, u32 count) {
  if (count == 0 || count > count_mask) fail(self, site, "mbarrier.init with a bad count");
  *reinterpret_cast<u64*>(barrier) = packed({count, count, 0, false});
}
void mbarrier_invalidate(Thread& self, const Site& site, char* barrier) {
  read_barrier(self, site, barrier);
  *reinterpret_cast<u64*>(barrier) = never_initialized;
}
u64 mbarrier_arrive(Thread& self, const Site& site, char* barrier, u32 count, bool drop,
                    bool release) {
  const Quiet quiet;
  if (release) tsan_release(barrier);
  State s = read_barrier(self, site, barrier);
  const u64 before = packed(s);
  if (count > s.pending) fail(self, site, "more arrivals at an mbarrier than it expects");
  s.pending -= count;
  if (drop) s.expected -= count;
  write_barrier(barrier, s);
  preempt(self);
  return before;
}
void mbarrier_expect(Thread& self, const Site& site, char* barrier, u32 bytes) {
  State s = read_barrier(self, site, barrier);
  s.bytes += s32(bytes);
  *reinterpret_cast<u64*>(barrier) = packed(s);
}
void mbarrier_complete(Thread& self, const Site& site, char* barrier, u32 bytes) {
  read_barrier(self, site, barrier);
  complete_bytes(barrier, bytes);
}
// `parity` is the parity of the phase whose end the caller waits for.
bool mbarrier_test(Thread& self, const Site& site, char* barrier, bool parity, bool acquire) {
  if (read_barrier(self, site, barrier).phase == parity) yield(self, site);
  const bool done = read_barrier(self, site, barrier).phase != parity;
  if (done && acquire) tsan_acquire(barrier);
  return done;
}
bool mbarrier_test_state(Thread& self, const Site& site, char* barrier, u64 token, bool acquire) {
  return mbarrier_test(self, site, barrier, unpack(token).phase, acquire);
}
u32 mbarrier_pending(u64 token) { return unpack(token).pending; }

}  // namespace emulator
