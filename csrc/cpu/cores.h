// How many threads a call may use. No header of torch is included.
#pragma once

#include <string>

namespace fusedrnn::cpu {

// The most threads that a call uses: torch's number, but no more than usable_cores(), because
// threads that wait for each other in every step must run at the same time.
int num_threads();

// The number of cores that the calling thread may run on, at most those of `cores_in_quota`. A
// system call takes longer than the rest of this function, so the thread's affinity is read again
// only after 10 ms; the quota is read once.
int usable_cores();

// Overrides usable_cores, so that tests run several threads on few cores. 0 ends that.
void use_cores(int cores);

// The whole cores, at least one, that the CPU quotas of this process's cgroup and of the groups
// above it allow, of version 1 or 2; INT_MAX without a quota. Tests put `root` before all paths.
int cores_in_quota(const std::string& root);

}  // namespace fusedrnn::cpu
