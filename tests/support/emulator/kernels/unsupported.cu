// For an instruction that the emulator does not support, the error must give its name and line.
extern "C" __global__ void profiled(unsigned* y) {
  unsigned value;
  asm volatile("vadd2.u32.u32.u32 %0, %1, %1, %1;" : "=r"(value) : "r"(y[0]));
  y[0] = value;
}
