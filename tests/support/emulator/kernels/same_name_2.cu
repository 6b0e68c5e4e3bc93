// With same_name_1.cu: kernels of two files must not be confused, even with the same name.
static __global__ void kernel(int* y) { y[0] = 2; }
namespace {
__global__ void hidden(int* y) { y[1] = 10 * 2; }
}  // namespace
template <class T>
__global__ void shared_template(T* y) {
  y[2] = 7;
}

extern "C" void launch_2(int* y) {
  kernel<<<1, 1>>>(y);
  hidden<<<1, 1>>>(y);
  shared_template<<<1, 1>>>(y);
}
