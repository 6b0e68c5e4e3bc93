// Runs the CUDA engine without torch, for sanitizers: planner, launchers and kernels on the
// emulator of tests/support/emulator, in buffers of exactly the required size. The results are
// compared with a plain loop in float64, to make sure that everything was computed.
//
//   program DEVICE SEED PROBLEM...
//
// The seed determines the order of threads. A problem is one argument of several words. Required
// are a regime, a pass, tile=, split=, I=, H=, and either T= and B= or sizes= (packed: the rows of
// each step). Optional are reset, alpha, h0, bias, descending, unfused (the input product is
// computed before the recurrence), apart (gaps between rows) and plain (no second input and
// output). Three words provoke errors: short=NAME (that buffer lacks its last element), forget=N
// (see forgotten_barriers.cu) and stuck (blocks wait for something that never happens).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/engine.h"

extern "C" {
int cudaemu_use_device(const char* name);
void cudaemu_schedule(const char* order, unsigned long long seed, double yield_probability);
void cudaemu_values_order(int on);
// defined in forgotten_barriers.cu, if that is linked in
__attribute__((weak)) void fusedrnn_forget(int which);
const char* cudaemu_last_failure();
}

namespace fusedrnn::cuda {
namespace {

// ---- numbers in memory ----

template <class T>
T read(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

double widened(Storage storage, const char* from) {
  switch (storage) {
    case Storage::f32: return read<float>(from);
    case Storage::f64: return read<double>(from);
    case Storage::f16: return double(read<_Float16>(from));
    case Storage::bf16: break;
  }
  const uint32_t bits = uint32_t(read<uint16_t>(from)) << 16;
  return read<float>(reinterpret_cast<const char*>(&bits));
}

void store_narrowed(Storage storage, char* to, double value) {
  const float narrow = float(value);
  const _Float16 half = _Float16(value);
  switch (storage) {
    case Storage::f32: std::memcpy(to, &narrow, 4); return;
    case Storage::f64: std::memcpy(to, &value, 8); return;
    case Storage::f16: std::memcpy(to, &half, 2); return;
    // Little-endian, and truncated: the plain loop starts from the stored numbers, too.
    case Storage::bf16: std::memcpy(to, reinterpret_cast<const char*>(&narrow) + 2, 2); return;
  }
}

// Rows of numbers that start `distance` elements apart. The buffer ends with the last element of
// the last row.
struct Rows {
  Storage storage;
  int64_t count, width, distance;
  std::vector<char> bytes;

  char* place(int64_t row, int64_t j) { return bytes.data() + offset(row, j); }
  // False for an element that short= removed.
  bool exists(int64_t row, int64_t j) const { return size_t(offset(row, j + 1)) <= bytes.size(); }
  double at(int64_t row, int64_t j) const {
    return exists(row, j) ? widened(storage, bytes.data() + offset(row, j)) : 0;
  }
  template <class Make>
  void fill(const Make& make) {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t j = 0; j < width; ++j)
        if (exists(row, j)) store_narrowed(storage, place(row, j), make(row, j));
  }
  bool gaps_are_untouched() const {
    for (int64_t row = 0; row + 1 < count; ++row)
      for (int64_t i = offset(row, width); i < offset(row + 1, 0); ++i)
        if (bytes[i] != char(0xFF)) return false;
    return true;
  }
  Series series(int64_t rows_of_step) { return {bytes.data(), rows_of_step * distance, distance}; }
  States states() { return {bytes.data(), distance}; }

 private:
  int64_t offset(int64_t row, int64_t j) const { return (row * distance + j) * size_of(storage); }
};

// ---- problems ----

constexpr const char* kPassNames[] = {"activation", "tangent", "adjoint"};

struct Case {
  std::map<std::string, std::string> words;
  Pass pass;
  Overrides overrides;
  Storage storage;
  int64_t T, B, I, H;
  std::vector<int64_t> sizes;    // rows of each step
  std::vector<int64_t> offsets;  // rows before each step, and the total

  explicit Case(const std::string& text) {
    std::istringstream in(text);
    for (std::string word; in >> word;) {
      const size_t sign = std::min(word.find('='), word.size());
      words[word.substr(0, sign)] = word.substr(std::min(sign + 1, word.size()));
    }
    for (size_t r = 0; r < std::size(kRegimeNames); ++r)
      if (has(kRegimeNames[r])) overrides.regime = Regime(r);
    for (int p = 0; p < kPasses; ++p)
      if (has(kPassNames[p])) pass = Pass(p);
    overrides.tile = int(number("tile"));
    overrides.split = int(number("split"));
    overrides.fuse_input = !has("unfused");
    constexpr Storage storages[] = {Storage::f32, Storage::f64, Storage::bf16, Storage::f16,
                                    Storage::f32};
    storage = storages[int(arithmetic())];
    if (has("sizes")) {
      std::istringstream list(words["sizes"]);
      for (std::string one; std::getline(list, one, ',');) sizes.push_back(std::stoll(one));
    } else {
      sizes.assign(number("T"), number("B"));
    }
    T = int64_t(sizes.size());
    B = sizes[0];
    I = number("I");
    H = number("H");
    offsets.push_back(0);
    for (const int64_t size : sizes) offsets.push_back(offsets.back() + size);
  }
  bool has(const std::string& word) const { return words.count(word) != 0; }
  int64_t number(const std::string& word) const { return std::stoll(words.at(word)); }
  Arithmetic arithmetic() const { return kTiles[*overrides.tile].arithmetic; }
  int64_t rows() const { return offsets.back(); }
};

// Returns a buffer of 0xFF bytes, which are NaN in every format; it is one element too small if
// short= names it.
std::vector<char> buffer(const Case& c, const char* name, int64_t count, int size) {
  const auto shorter = c.words.find("short");
  if (shorter != c.words.end() && shorter->second == name) --count;
  return std::vector<char>(size_t(count * size), char(0xFF));
}

struct Tensors {
  Rows x, w_ih, w_hh, b_ih, b_hh, alpha, first, in[2], gate, out[2], last;
  std::vector<char> reset, offsets;

  explicit Tensors(const Case& c)
      : x(rows(c, "x", c.rows(), c.I)),
        w_ih(rows(c, "w_ih", c.H, c.I)),
        w_hh(rows(c, "w_hh", c.H, c.H)),
        b_ih(rows(c, "b_ih", 1, c.H)),
        b_hh(rows(c, "b_hh", 1, c.H)),
        alpha(rows(c, "alpha", 1, c.H)),
        first(rows(c, "first", c.B, c.H)),
        in{rows(c, "in0", c.rows(), c.H), rows(c, "in1", c.rows(), c.H)},
        gate(rows(c, "gate", c.rows(), c.H)),
        out{rows(c, "out0", c.rows(), c.H), rows(c, "out1", c.rows(), c.H)},
        last(rows(c, "last", c.B, c.H)),
        reset(buffer(c, "reset", c.rows(), 1)),
        offsets(buffer(c, "offsets", c.T + 1, 8)) {
    std::mt19937 random(1);
    const auto uniform = [&](double most) {
      return [&, most](int64_t, int64_t) {
        return std::uniform_real_distribution<double>(-most, most)(random);
      };
    };
    for (Rows* r : {&x, &b_ih, &b_hh, &first, &in[0], &in[1], &gate}) r->fill(uniform(0.9));
    w_hh.fill(uniform(1 / std::sqrt(double(c.H))));
    w_ih.fill(uniform(1 / std::sqrt(double(c.I))));
    alpha.fill([&](int64_t, int64_t j) { return 0.2 + 0.6 * double(j) / double(c.H); });
    for (char& one : reset) one = random() % 4 == 0;
    std::memcpy(offsets.data(), c.offsets.data(), offsets.size());
    if (c.pass == Pass::activation && c.has("unfused"))
      in[0].fill([&](int64_t row, int64_t j) { return input_product(row, j); });
  }

  double input_product(int64_t row, int64_t j) const {
    double sum = 0;
    for (int64_t i = 0; i < x.width; ++i) sum += x.at(row, i) * w_ih.at(j, i);
    return sum;
  }

 private:
  static Rows rows(const Case& c, const char* name, int64_t count, int64_t width) {
    const int64_t distance = width + (c.has("apart") ? 3 : 0);
    const int64_t numbers = (count - 1) * distance + width;
    return {c.storage, count, width, distance, buffer(c, name, numbers, int(size_of(c.storage)))};
  }
};

// ---- the plain loop ----

struct Expected {
  std::vector<double> out[2], last;
};

Expected expected(const Case& c, const Tensors& t) {
  const bool forward = c.pass != Pass::adjoint;
  const int64_t H = c.H;
  Expected e;
  for (auto& out : e.out) out.resize(c.rows() * H);
  // What each row of the batch passes to its next step: the input of the product, and the carry.
  std::vector<double> state(c.B * H), carry(c.B * H);
  if (c.has("h0"))
    for (int64_t i = 0; i < c.B * H; ++i) (forward ? state : carry)[i] = t.first.at(i / H, i % H);
  const auto product = [&](const double* of, int64_t j) {
    double sum = 0;
    for (int64_t k = 0; k < H; ++k) sum += of[k] * (forward ? t.w_hh.at(j, k) : t.w_hh.at(k, j));
    return sum;
  };
  for (int64_t s = 0; s < c.T; ++s) {
    const int64_t step = c.has("descending") ? c.T - 1 - s : s;
    for (int64_t b = 0; b < c.sizes[step]; ++b) {
      const int64_t row = c.offsets[step] + b;
      const bool reset = c.has("reset") && t.reset[row];
      double* const from = &state[b * H];
      if (forward && reset) std::fill(from, from + H, 0.);
      std::vector<double> next(H);
      for (int64_t j = 0; j < H; ++j) {
        const double sum = product(from, j), in0 = t.in[0].at(row, j);
        const double in1 = c.has("plain") ? 0 : t.in[1].at(row, j);
        const double alpha = c.has("alpha") ? t.alpha.at(0, j) : 1, phi = t.gate.at(row, j);
        const double p = alpha * (1 - phi * phi);
        double& result = e.out[0][row * H + j];
        double& other = e.out[1][row * H + j];
        if (c.pass == Pass::activation) {
          const double u = c.has("unfused") ? in0 : t.input_product(row, j);
          const double bias = c.has("bias") ? t.b_ih.at(0, j) + t.b_hh.at(0, j) : 0;
          other = std::tanh(u + bias + sum);
          result = (1 - alpha) * from[j] + alpha * other;
        } else if (c.pass == Pass::tangent) {
          other = in0 + sum;
          result = in1 + p * other + (1 - alpha) * from[j];
        } else {
          other = in0 + carry[b * H + j] + sum;
          result = in1 + p * other;
          carry[b * H + j] = reset ? 0 : (1 - alpha) * other;
        }
        next[j] = forward || !reset ? result : 0;
      }
      std::copy(next.begin(), next.end(), from);
    }
  }
  e.last = state;
  if (!forward)
    for (int64_t i = 0; i < c.B * H; ++i) e.last[i] = product(&state[i / H * H], i % H) + carry[i];
  return e;
}

// ---- a run ----

Problem problem_of(const Case& c, Tensors& t) {
  const int64_t step = c.has("sizes") ? 0 : c.B;
  const auto vector = [&](const char* word, Rows& r) {
    return c.has(word) ? r.place(0, 0) : nullptr;
  };
  Problem p = {};
  p.pass = c.pass;
  p.nonlinearity = Nonlinearity::tanh;
  p.storage = c.storage;
  p.T = c.T;
  p.B = c.B;
  p.H = c.H;
  p.descending = c.has("descending");
  if (c.has("sizes")) p.batch_sizes = c.sizes.data();
  if (c.has("reset")) p.reset = reinterpret_cast<const bool*>(t.reset.data());
  p.w_hh = t.w_hh.place(0, 0);
  p.w_hh_row = t.w_hh.distance;
  p.alpha.data = vector("alpha", t.alpha);  // one row for all steps
  if (c.pass == Pass::activation) {
    p.b_ih = vector("bias", t.b_ih);
    p.b_hh = vector("bias", t.b_hh);
    if (c.has("unfused")) {
      p.in[0] = t.in[0].series(step);
    } else {
      p.I = c.I;
      p.w_ih = t.w_ih.place(0, 0);
      p.w_ih_row = t.w_ih.distance;
      p.x = t.x.series(step);
    }
  } else {
    for (int i = 0; i < (c.has("plain") ? 1 : 2); ++i) p.in[i] = t.in[i].series(step);
    p.gate = t.gate.series(step);
  }
  for (int i = 0; i < (c.has("plain") ? 1 : 2); ++i) p.out[i] = t.out[i].series(step);
  if (c.has("h0")) p.first = t.first.states();
  p.last = t.last.states();
  return p;
}

void compare(const char* name, const Rows& found, const std::vector<double>& wanted,
             double granted) {
  if (!found.gaps_are_untouched()) throw std::runtime_error(std::string(name) + ": between rows");
  double most = 0;
  for (const double value : wanted) most = std::max(most, std::abs(value));
  for (int64_t i = 0; i < int64_t(wanted.size()); ++i)
    if (!(std::abs(found.at(i / found.width, i % found.width) - wanted[i]) <= granted * most))
      throw std::runtime_error(std::string(name) + ": number " + std::to_string(i) + " is wrong");
}

void run_and_compare(const Case& c) {
  Tensors t(c);
  const Problem p = problem_of(c, t);
  PlanInput in = {};
  in.pass = c.pass;
  in.storage = c.storage;
  in.tf32 = c.arithmetic() == Arithmetic::mma_tf32;
  in.T = c.T;
  in.B = c.B;
  in.I = c.pass == Pass::activation ? c.I : 0;
  in.H = c.H;
  in.leaky = c.has("alpha");
  const Device& device = device_properties(0);
  Plan plan = make_plan(in, device, c.overrides);
  const bool step = plan.regime == Regime::step;
  if (plan.regime != c.overrides.regime ||
      (in.I > 0 && plan.fuse_input != c.overrides.fuse_input) ||
      (!step && (plan.tile != c.overrides.tile || plan.split != c.overrides.split)))
    throw std::runtime_error("another plan: " + in_words(in, plan, device));
  std::printf("%d groups of %d blocks, ", int(plan.batch_groups), int(plan.blocks));
  std::fflush(stdout);

  std::vector<char> counters = buffer(c, "counters", plan.counters, sizeof(unsigned));
  // stuck: either the counts never reach the awaited value, or too few units send their states.
  std::fill(counters.begin(), counters.end(), c.has("stuck") ? 0x80 : 0);
  if (c.has("stuck")) plan.units = 1;
  std::vector<char> carry = buffer(c, "carry", plan.carry_bytes, 1);
  Workspace workspace;
  if (c.has("sizes")) workspace.offsets = reinterpret_cast<const int64_t*>(t.offsets.data());
  workspace.counters = reinterpret_cast<unsigned*>(counters.data());
  workspace.carry = carry.data();
  // In the cluster regime, a peer overwrites a buffer once all warps of this block have sent it the
  // values computed from the states in that buffer. The lanes that read the states run before the
  // lanes that send only because these values pass between them.
  cudaemu_values_order(plan.regime == Regime::cluster);
  if (c.has("forget")) fusedrnn_forget(int(c.number("forget")));
  run(p, in, plan, device, workspace, nullptr);

  constexpr double granted[] = {1e-5, 1e-12, 5e-2, 1e-2, 1e-2};  // by arithmetic
  const Expected e = expected(c, t);
  const double most = step && in.tf32 ? granted[0] : granted[int(c.arithmetic())];
  compare("out0", t.out[0], e.out[0], most);
  if (!c.has("plain")) compare("out1", t.out[1], e.out[1], most);
  compare("last", t.last, e.last, most);
  std::printf("right\n");
}

}  // namespace
}  // namespace fusedrnn::cuda

int main(int count, char** words) {
  using namespace fusedrnn;
  try {
    if (count < 4 || !cudaemu_use_device(words[1])) throw std::runtime_error("bad arguments");
    const unsigned long long seed = std::stoull(words[2]);
    for (int i = 3; i < count; ++i) {
      cudaemu_schedule("random", seed, 0.1);
      std::printf("%s, seed %llu: ", words[i], seed);
      cuda::run_and_compare(cuda::Case(words[i]));
    }
  } catch (const std::exception& error) {
    std::printf("%s\n%s\n", error.what(), cudaemu_last_failure());
    return 1;
  }
}
