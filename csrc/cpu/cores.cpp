#include "cores.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <fstream>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fusedrnn::cpu {
namespace {

std::atomic<int> overridden{0};

// The quota of one group, in cores; INT_MAX if it has none.
double quota_of(const std::string& group, bool version2) {
  // A missing value, or "max", is read as 0.
  double quota = 0, period = 0;
  std::ifstream file(group + (version2 ? "/cpu.max" : "/cpu.cfs_quota_us"));
  file >> quota;
  if (version2)
    file >> period;
  else
    std::ifstream(group + "/cpu.cfs_period_us") >> period;
  return quota > 0 && period > 0 ? quota / period : INT_MAX;
}

}  // namespace

int cores_in_quota(const std::string& root) {
  double cores = INT_MAX;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // number:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool version2 = controllers == ",,";
    if (!version2 && controllers.find(",cpu,") == std::string::npos) continue;
    const std::string mount = root + "/sys/fs/cgroup" + (version2 ? "" : "/cpu");
    // In a container, the path may be the one on the host. Then only the last of these groups, the
    // mount itself, exists.
    std::string path = line.substr(second + 1);
    for (size_t end = path.size(); end != std::string::npos; end = path.rfind('/')) {
      path.resize(end);
      cores = std::min(cores, quota_of(mount + path, version2));
    }
  }
  return std::max(1, int(cores));
}

int usable_cores() {
  if (const int cores = overridden) return cores;
#ifdef _OPENMP
  using Clock = std::chrono::steady_clock;
  static const int quota = cores_in_quota("");
  thread_local int cores = 0;
  thread_local Clock::time_point until;
  const Clock::time_point now = Clock::now();
  if (cores == 0 || now > until) {
    // With OMP_PROC_BIND, a thread's affinity is a single core. OpenMP then counts the cores of the
    // process.
    cores = std::min(omp_get_num_procs(), quota);
    until = now + std::chrono::milliseconds(10);
  }
  return cores;
#else
  return 1;
#endif
}

void use_cores(int cores) { overridden = cores; }

}  // namespace fusedrnn::cpu
