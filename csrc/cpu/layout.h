// Row offsets and element addresses of a problem's tensors. Torch-free.
#pragma once

#include <cstdint>
#include <vector>

#include "../recurrence.h"

namespace fusedrnn::cpu {

class Layout {
 public:
  explicit Layout(const Problem& problem)
      : p_(problem), size_(size_of(problem.storage)), rows_(size_t(problem.T) + 1) {
    for (int64_t t = 0; t < p_.T; ++t) rows_[size_t(t) + 1] = rows_[size_t(t)] + active(t);
  }

  // Bytes of a stored element.
  int64_t size() const { return size_; }

  // The number of batch rows at step t; 0 outside the sequence.
  int64_t active(int64_t t) const {
    if (t < 0 || t >= p_.T) return 0;
    return p_.batch_sizes ? p_.batch_sizes[t] : p_.B;
  }

  // The number of rows before step t; for t = T, of all rows.
  int64_t rows_before(int64_t t) const { return rows_[size_t(t)]; }

  // Whether batch row b is reset to 0 before step t.
  bool resets(int64_t t, int64_t b) const { return p_.reset && p_.reset[rows_before(t) + b]; }

  // The address of an element.
  const void* at(const void* data, int64_t offset) const {
    return static_cast<const char*>(data) + offset * size_;
  }
  void* at(void* data, int64_t offset) const { return static_cast<char*>(data) + offset * size_; }
  void* at(const Series& series, int64_t t, int64_t b, int64_t column = 0) const {
    const int64_t row =
        p_.batch_sizes ? (rows_before(t) + b) * series.row : t * series.step + b * series.row;
    return at(series.data, row + column);
  }

 private:
  const Problem& p_;
  const int64_t size_;
  std::vector<int64_t> rows_;
};

}  // namespace fusedrnn::cpu
