// Tensor-core instructions. Products are exact; sums are computed in f64 and rounded once. The
// hardware keeps fewer bits and may be slightly less accurate.
#include <cstring>

#include "device_code.h"
#include "scheduler.h"

namespace emulator {

namespace {

constexpr u32 all_lanes = ~0u;

f32 half_of(Half type, u32 pair, u32 which) {
  const u16 x = u16(pair >> (16 * which));
  f32 value = type == Half::bf16 ? from_bf16(x) : from_f16(x);
  asm("" : "+x"(value));  // or the compiler would call a slow function from f16 to f64
  return value;
}

// Of one lane.
struct Fragments {
  u32 a[8], b[8];
  f32 c[8];
};

const Fragments& of(const void* operand) { return *static_cast<const Fragments*>(operand); }

template <u32 rows, u32 columns, u32 depth>
void multiply(const f64 (&a)[rows][depth], const f64 (&b)[depth][columns],
              f64 (&product)[rows][columns]) {
  for (u32 i = 0; i < rows; ++i) {
    f64 sums[columns] = {};
    for (u32 k = 0; k < depth; ++k)
      for (u32 j = 0; j < columns; ++j) sums[j] += a[i][k] * b[k][j];
    for (u32 j = 0; j < columns; ++j) product[i][j] = sums[j];
  }
}

// Element i of C and D in lane l is in row l / 4 (+ 8 for i >= 2), column 2 (l % 4) + i % 2.
void add_c(const f64 (&product)[16][8], const void* const* operands, void* const* results) {
  for (u32 l = 0; l < 32; ++l)
    for (u32 i = 0; i < 4; ++i)
      static_cast<f32*>(results[l])[i] =
          f32(product[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] + f64(of(operands[l]).c[i]));
}

template <u32 depth>
void mma_16bit_warp(const void* const operands[32], void* const results[32], u32,
                    const void* type) {
  const Half half = *static_cast<const Half*>(type);
  f64 a[16][depth], b[depth][8];
  for (u32 l = 0; l < 32; ++l) {
    const Fragments& x = of(operands[l]);
    const u32 group = l / 4, member = l % 4;
    for (u32 i = 0; i < depth / 2; ++i)
      a[group + i / 2 % 2 * 8][member * 2 + i % 2 + i / 4 * 8] = half_of(half, x.a[i / 2], i % 2);
    for (u32 i = 0; i < depth / 4; ++i)
      b[member * 2 + i % 2 + i / 2 * 8][group] = half_of(half, x.b[i / 2], i % 2);
  }
  f64 product[16][8];
  multiply(a, b, product);
  add_c(product, operands, results);
}

template <u32 depth>
void mma_tf32_warp(const void* const operands[32], void* const results[32], u32, const void*) {
  f64 a[16][depth], b[depth][8];
  // The hardware uses only the upper 19 bits.
  const auto tf32 = [](u32 x) { return bits<f32>(x & 0xFFFFE000u); };
  for (u32 l = 0; l < 32; ++l) {
    const Fragments& x = of(operands[l]);
    const u32 group = l / 4, member = l % 4;
    for (u32 i = 0; i < depth / 2; ++i) a[group + i % 2 * 8][member + i / 2 * 4] = tf32(x.a[i]);
    for (u32 i = 0; i < depth / 4; ++i) b[member + i * 4][group] = tf32(x.b[i]);
  }
  f64 product[16][8];
  multiply(a, b, product);
  add_c(product, operands, results);
}

struct DoubleFragments {
  f64 a, b, c[2];
};

}  // namespace

void mma_16bit(Thread& self, const Site& site, Half type, u32 k, f32 d[4], const u32* a,
               const u32* b, const f32 c[4]) {
  const Quiet quiet;
  Fragments x;
  for (u32 i = 0; i < k / 4; ++i) x.a[i] = a[i];
  for (u32 i = 0; i < k / 8; ++i) x.b[i] = b[i];
  std::memcpy(x.c, c, 16);
  warp_operation(self, site, all_lanes, 'M' + 256 * u32(type) + 1024 * k, &x, d,
                 k == 8 ? mma_16bit_warp<8> : mma_16bit_warp<16>, &type);
}

void mma_tf32(Thread& self, const Site& site, u32 k, f32 d[4], const u32* a, const u32* b,
              const f32 c[4]) {
  const Quiet quiet;
  Fragments x;
  std::memcpy(x.a, a, 2 * k);
  std::memcpy(x.b, b, k);
  std::memcpy(x.c, c, 16);
  warp_operation(self, site, all_lanes, 'T' + 1024 * k, &x, d,
                 k == 4 ? mma_tf32_warp<4> : mma_tf32_warp<8>, nullptr);
}

void mma_f64(Thread& self, const Site& site, f64 d[2], f64 a, f64 b, const f64 c[2]) {
  const Quiet quiet;
  const DoubleFragments x = {a, b, {c[0], c[1]}};
  warp_operation(
      self, site, all_lanes, 'D', &x, d,
      [](const void* const operands[32], void* const results[32], u32, const void*) {
        f64 rows[8][4], columns[4][8];
        for (u32 l = 0; l < 32; ++l) {
          const auto& y = *static_cast<const DoubleFragments*>(operands[l]);
          rows[l / 4][l % 4] = y.a;
          columns[l % 4][l / 4] = y.b;
        }
        for (u32 l = 0; l < 32; ++l) {
          for (u32 i = 0; i < 2; ++i) {
            f64 sum = static_cast<const DoubleFragments*>(operands[l])->c[i];
            for (u32 k = 0; k < 4; ++k) sum = fused(rows[l / 4][k], columns[k][l % 4 * 2 + i], sum);
            static_cast<f64*>(results[l])[i] = sum;
          }
        }
      },
      nullptr);
}

void load_matrices(Thread& self, const Site& site, u32 count, bool transposed, u32 result[],
                   const char* row) {
  if (self.lane < 8 * count) note_read(row, 16);
  const Quiet quiet;
  struct Argument {
    u32 count;
    bool transposed;
  } const argument = {count, transposed};
  warp_operation(
      self, site, all_lanes, 'L' + 256 * count + transposed * 4096, &row, result,
      [](const void* const operands[32], void* const results[32], u32, const void* shared) {
        const Argument& how = *static_cast<const Argument*>(shared);
        const auto row_of = [&](u32 matrix, u32 i) {
          return *static_cast<const char* const*>(operands[matrix * 8 + i]);
        };
        for (u32 l = 0; l < 32; ++l) {
          for (u32 m = 0; m < how.count; ++m) {
            u32& value = static_cast<u32*>(results[l])[m];
            if (how.transposed) {
              u16 pair[2];
              for (u32 i = 0; i < 2; ++i)
                std::memcpy(&pair[i], row_of(m, l % 4 * 2 + i) + l / 4 * 2, 2);
              value = pack(pair[0], pair[1]);
            } else {
              std::memcpy(&value, row_of(m, l / 4) + l % 4 * 4, 4);
            }
          }
        }
      },
      &argument);
}

void store_matrices(Thread& self, const Site& site, u32 count, bool transposed, const u32 value[],
                    char* row) {
  if (self.lane < 8 * count) note_write(row, 16);
  const Quiet quiet;
  struct Argument {
    u32 count;
    bool transposed;
  } const argument = {count, transposed};
  warp_operation(
      self, site, all_lanes, 'S' + 256 * count + transposed * 4096, value, row,
      [](const void* const operands[32], void* const results[32], u32, const void* shared) {
        const Argument& how = *static_cast<const Argument*>(shared);
        for (u32 l = 0; l < 32; ++l) {
          for (u32 m = 0; m < how.count; ++m) {
            const u32 x = static_cast<const u32*>(operands[l])[m];
            if (how.transposed) {
              for (u32 i = 0; i < 2; ++i) {
                const u16 half = u16(x >> (16 * i));
                std::memcpy(static_cast<char*>(results[m * 8 + l % 4 * 2 + i]) + l / 4 * 2, &half,
                            2);
              }
            } else {
              std::memcpy(static_cast<char*>(results[m * 8 + l / 4]) + l % 4 * 4, &x, 4);
            }
          }
        }
      },
      &argument);
}

// --- wmma 16 x 16 x 16 ---
void wmma_load_16bit(Thread& self, const Site& site, u32 registers, u32 result[], const char* tile,
                     u32 stride, bool column_major) {
  warp_barrier(self, site, all_lanes);
  for (u32 e = 0; e < 8; ++e) {
    const u32 i = (self.lane * 8 + e) / 16, j = (self.lane * 8 + e) % 16;
    const char* p = tile + 2 * (column_major ? j * stride + i : i * stride + j);
    note_read(p, 2);
    u16 x;
    std::memcpy(&x, p, 2);
    result[e / 2] = e % 2 ? pack(u16(result[e / 2]), x) : x;
  }
  for (u32 r = 4; r < registers; ++r) result[r] = result[r - 4];
}
void wmma_load_f32(Thread& self, const Site& site, f32 result[8], const char* tile, u32 stride,
                   bool column_major) {
  warp_barrier(self, site, all_lanes);
  for (u32 e = 0; e < 8; ++e) {
    const u32 i = (self.lane * 8 + e) / 16, j = (self.lane * 8 + e) % 16;
    const char* p = tile + 4 * (column_major ? j * stride + i : i * stride + j);
    note_read(p, 4);
    std::memcpy(&result[e], p, 4);
  }
}
void wmma_store_f32(Thread& self, const Site& site, const f32 value[8], char* tile, u32 stride,
                    bool column_major) {
  warp_barrier(self, site, all_lanes);
  for (u32 e = 0; e < 8; ++e) {
    const u32 i = (self.lane * 8 + e) / 16, j = (self.lane * 8 + e) % 16;
    char* p = tile + 4 * (column_major ? j * stride + i : i * stride + j);
    note_write(p, 4);
    std::memcpy(p, &value[e], 4);
  }
}
void wmma_mma(Thread& self, const Site& site, Half type, f32 d[8], const u32* a, const u32* b,
              const f32 c[8]) {
  const Quiet quiet;
  Fragments x;
  std::memcpy(x.a, a, 16);
  std::memcpy(x.b, b, 16);
  std::memcpy(x.c, c, 32);
  warp_operation(
      self, site, all_lanes, 'W' + 256 * u32(type), &x, d,
      [](const void* const operands[32], void* const results[32], u32, const void* shared) {
        const Half half = *static_cast<const Half*>(shared);
        f64 rows[16][16], columns[16][16];
        for (u32 e = 0; e < 256; ++e) {
          const Fragments& y = of(operands[e / 8]);
          rows[e / 16][e % 16] = half_of(half, y.a[e % 8 / 2], e % 2);
          columns[e / 16][e % 16] = half_of(half, y.b[e % 8 / 2], e % 2);
        }
        f64 product[16][16];
        multiply(rows, columns, product);
        for (u32 e = 0; e < 256; ++e)
          static_cast<f32*>(results[e / 8])[e % 8] =
              f32(product[e / 16][e % 16] + f64(of(operands[e / 8]).c[e % 8]));
      },
      &type);
}

}  // namespace emulator
