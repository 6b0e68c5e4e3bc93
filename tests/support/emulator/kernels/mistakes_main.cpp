// Runs one kernel of mistakes.cu under a sanitizer: `program name broken`.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
int missing_barrier_launch(int, const float*, float*);
int overwritten_too_soon_launch(int, const float*, float*, int);
int missing_fence_launch(int, float*, float*, unsigned*);
int beyond_shared_launch(int, float*);
int beyond_global_launch(int, const float*, float*);
const char* cudaemu_last_failure();
void cudaemu_schedule(const char* order, unsigned long long seed, double yield_probability);
}

int main(int count, char** words) {
  if (count < 3) return 2;
  if (count > 3) cudaemu_schedule(words[3], 1, 0.1);
  const char* name = words[1];
  const int broken = std::atoi(words[2]);
  // `exact` has no spare element, so that AddressSanitizer sees an access beyond the end.
  std::vector<float> x(128, 1.f), exact(64, 1.f), y(128);
  unsigned counter = 0;
  int error = -1;
  if (!std::strcmp(name, "missing_barrier"))
    error = missing_barrier_launch(broken, x.data(), y.data());
  if (!std::strcmp(name, "overwritten_too_soon"))
    error = overwritten_too_soon_launch(broken, x.data(), y.data(), 3);
  if (!std::strcmp(name, "missing_fence"))
    error = missing_fence_launch(broken, x.data(), y.data(), &counter);
  if (!std::strcmp(name, "beyond_shared")) error = beyond_shared_launch(broken, y.data());
  if (!std::strcmp(name, "beyond_global"))
    error = beyond_global_launch(broken, exact.data(), y.data());
  if (error) std::printf("error %d: %s\n", error, cudaemu_last_failure());
  return error ? 1 : 0;
}
