// Limits the threads of a call to the cores that it may use. Includes no header of torch.
#pragma once

#include <string>

namespace fusedrnn::cpu {

// The maximum number of threads of a call: torch's number, but at most usable_cores(), because
// threads that wait for each other in every step must run at the same time.
int num_threads();

// The number of cores that the calling thread may run on (with OMP_PROC_BIND, the process), at most
// cores_in_quota(). The affinity is read at most every 10 ms, because that system call takes longer
// than the rest of this function; the quota is read once.
int usable_cores();

// Overrides usable_cores(), so that tests can run several threads on few cores; 0 removes the
// override.
void use_cores(int cores);

// The number of cores that the CPU quotas of this process's cgroup (version 1 or 2) and of its
// ancestors allow: rounded down, at least 1; INT_MAX without a quota. All paths begin with `root`,
// which tests set.
int cores_in_quota(const std::string& root);

}  // namespace fusedrnn::cpu
