// With same_name_2.cu: kernels of two files must not be confused, even with the same name.
static __global__ void kernel(int* y) { y[0] = 1; }
namespace {
__global__ void hidden(int* y) { y[1] = 10 * 1; }
}  // namespace
template <class T>
__global__ void shared_template(T* y) {
  y[2] = 7;
}

extern "C" void launch_1(int* y) {
  kernel<<<1, 1>>>(y);
  hidden<<<1, 1>>>(y);
  shared_template<<<1, 1>>>(y);
}
