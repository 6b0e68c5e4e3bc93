// The working memory of one call. Torch-free.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace fusedrnn::cpu {

constexpr int64_t kCacheLine = 64;

// Owns memory aligned to cache lines.
class Block {
 public:
  explicit Block(int64_t bytes = 0) : bytes_(bytes) {
    if (bytes) data_.reset(std::aligned_alloc(kCacheLine, size_t(bytes)));
    if (bytes && !data_) throw std::bad_alloc();
  }
  char* data() const { return static_cast<char*>(data_.get()); }
  int64_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<void, decltype(&std::free)> data_{nullptr, &std::free};
  int64_t bytes_;
};

// Scratch memory of one call. The calling thread keeps a block of the size that its largest call
// needed, up to a limit, because fresh memory costs a page fault for every 4 KB. For a megabyte of
// weights, the page faults take longer than the packing.
class Scratch {
 public:
  Scratch() {
    if (wanted_ <= kept_.bytes()) return;
    kept_ = Block();
    kept_ = Block(std::exchange(wanted_, 0));
  }
  ~Scratch() { wanted_ = taken_ <= kMaxKept ? taken_ : 0; }

  template <class C>
  C* take(int64_t numbers) {
    const int64_t bytes = (numbers * int64_t(sizeof(C)) + kCacheLine - 1) & -kCacheLine;
    taken_ += bytes;
    if (taken_ <= kept_.bytes()) return reinterpret_cast<C*>(kept_.data() + taken_ - bytes);
    more_.emplace_back(bytes);
    return reinterpret_cast<C*>(more_.back().data());
  }
  template <class C>
  C* take_zeros(int64_t numbers) {
    C* piece = take<C>(numbers);
    std::memset(piece, 0, size_t(numbers) * sizeof(C));
    return piece;
  }

 private:
  static constexpr int64_t kMaxKept = 32 << 20;
  static thread_local Block kept_;
  static thread_local int64_t wanted_;
  int64_t taken_ = 0;
  std::vector<Block> more_;
};
inline thread_local Block Scratch::kept_;
inline thread_local int64_t Scratch::wanted_ = 0;

constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// The distance, in elements of `size` bytes, between rows of `row` elements. It exceeds `row` if
// the rows would otherwise be a multiple of 2 KB apart and share cache sets.
constexpr int64_t spread(int64_t row, int64_t size) {
  return row * size % 2048 == 0 ? row + kCacheLine / size : row;
}

// The start of the i-th of `parts` nearly equal pieces of [0, n).
constexpr int64_t split_at(int64_t n, int64_t parts, int64_t i) { return n * i / parts; }

}  // namespace fusedrnn::cpu
