// Prints how a forward pass would be launched, for step_cost.py. The arguments are the dtype, T, B,
// I, H and the fields of Device; the output is the plan as JSON and in words, and the bytes of
// Params. Tensor n has the address n << 40. The planner and launcher of the engine are compiled in;
// nothing is launched.
#include "../../csrc/cuda/engine.cu"
#include "../../csrc/cuda/plan.cpp"

namespace fusedrnn::cuda {  // defined in kernels_*.cu, which are not linked
const TileKernels kFmaF32[4] = {}, kFmaF64[2] = {}, kMmaBf16[2] = {}, kMmaF16[2] = {},
                  kMmaTf32[2] = {};
const StepKernels kStepF32 = {}, kStepF64 = {}, kStepBf16 = {}, kStepF16 = {};
}  // namespace fusedrnn::cuda

int main(int, char** argv) {
  using namespace fusedrnn;
  using namespace fusedrnn::cuda;
  const auto number = [&](int i) { return int64_t(std::stoll(argv[i])); };
  const auto at = [](int64_t n) { return reinterpret_cast<void*>(n << 40); };
  const Device device{
      argv[6],
      int(number(7)),
      int(number(8)),
      number(9),
      std::stod(argv[10]),
      std::stod(argv[11]),
      {int(number(12)), int(number(13)), int(number(14)), int(number(15)), int(number(16))}};
  const bool half = std::string(argv[1]) == "bf16";
  PlanInput in{
      Pass::activation, half ? Storage::bf16 : Storage::f32, false, 256, number(3), number(4),
      number(5)};
  const Plan plan = make_plan(in, device);
  Problem p{};
  p.pass = in.pass;
  p.storage = in.storage;
  p.T = number(2);
  p.B = in.B;
  p.H = p.w_hh_row = in.H;
  p.w_hh = at(1);
  p.b_ih = at(3);
  p.b_hh = at(4);
  const auto series = [&](int64_t n, int64_t size) { return Series{at(n), in.B * size, size}; };
  if (plan.fuse_input) {
    p.I = p.w_ih_row = in.I;
    p.w_ih = at(2);
    p.x = series(5, in.I);
  } else {
    p.in[0] = series(6, in.H);
  }
  p.out[0] = series(7, in.H);
  p.last = {at(8), in.H};
  Workspace workspace{};
  workspace.counters = static_cast<unsigned*>(at(9));
  const Params params = parameters(p, plan, workspace);
  const Tile& tile = kTiles[plan.tile];
  std::printf(
      "{\"regime\": \"%s\", \"plain\": %d, \"tile_units\": %d, \"tile_rows\": %d, \"blocks\": %d, "
      "\"rows\": %d, \"units\": %d, \"state_k\": %d, \"fused\": %d, \"microseconds\": %.3f, "
      "\"threads\": %d, \"shared\": %d}\n",
      kRegimeNames[int(plan.regime)], int(params.plain), tile.units, tile.rows, params.blocks,
      params.rows, params.units, params.state_k, int(plan.fuse_input), plan.microseconds, kThreads,
      int(plan.shared.end));
  std::printf("%s\n", in_words(in, plan, device).c_str());
  for (size_t i = 0; i < sizeof(params); ++i)
    std::printf("%02x", reinterpret_cast<const unsigned char*>(&params)[i]);
  std::printf("\n");
}
