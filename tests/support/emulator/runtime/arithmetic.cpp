// Rare operations: directed rounding through the FPU's rounding mode, and printf.
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "device_code.h"

namespace emulator {

namespace {

class RoundingMode {
 public:
  explicit RoundingMode(char mode) : before_(std::fegetround()) {
    std::fesetround(mode == 'z'   ? FE_TOWARDZERO
                    : mode == 'm' ? FE_DOWNWARD
                    : mode == 'p' ? FE_UPWARD
                                  : FE_TONEAREST);
  }
  ~RoundingMode() { std::fesetround(before_); }

 private:
  int before_;
};

}  // namespace

// volatile, because the compiler ignores the rounding mode and would move the arithmetic out of its
// scope.
f64 directed_f64(char mode, char operation, f64 a, f64 b, f64 c) {
  const RoundingMode set(mode);
  volatile f64 x = a, y = b, z = c, result = 0;
  switch (operation) {
    case '+': result = x + y; break;
    case '-': result = x - y; break;
    case '*': result = x * y; break;
    case '/': result = x / y; break;
    case 'f': result = std::fma(x, y, z); break;
    case 's': result = std::sqrt(x); break;
  }
  return result;
}
f32 directed_divide(char mode, f32 a, f32 b) {
  const RoundingMode set(mode);
  volatile f32 x = a, y = b, result = x / y;
  return result;
}
f32 directed_sqrt(char mode, f32 a) {
  const RoundingMode set(mode);
  volatile f32 x = a, result = std::sqrt(x);
  return result;
}
f32 directed_from_integer(char mode, bool is_signed, u64 x) {
  const RoundingMode set(mode);
  volatile u64 y = x;
  volatile f32 result = is_signed ? f32(s64(y)) : f32(y);
  return result;
}
f64 directed_f64_from_integer(char mode, bool is_signed, u64 x) {
  const RoundingMode set(mode);
  volatile u64 y = x;
  volatile f64 result = is_signed ? f64(s64(y)) : f64(y);
  return result;
}

// Arguments are laid out in memory as in a C struct.
void device_printf(const char* format, const char* arguments) {
  size_t offset = 0;
  const auto next = [&](auto value) {
    offset = (offset + sizeof value - 1) / sizeof value * sizeof value;
    std::memcpy(&value, arguments + offset, sizeof value);
    offset += sizeof value;
    return value;
  };
  for (const char* p = format; *p; ++p) {
    if (*p != '%' || p[1] == '%') {
      std::putchar(*p);
      if (*p == '%') ++p;
      continue;
    }
    std::string conversion = "%";
    for (++p; *p && !std::strchr("diuxXofFeEgGaAcsp", *p); ++p) conversion += *p;
    if (!*p) break;
    const bool is_long = conversion.find('l') != std::string::npos;
    conversion += *p;
    const char* c = conversion.c_str();
    if (std::strchr("fFeEgGaA", *p)) {
      std::printf(c, next(f64()));
    } else if (*p == 's') {
      std::printf(c, reinterpret_cast<const char*>(next(u64())));
    } else if (*p == 'p' || is_long) {
      std::printf(c, next(u64()));
    } else {
      std::printf(c, next(u32()));
    }
  }
  std::fflush(stdout);
}

}  // namespace emulator
