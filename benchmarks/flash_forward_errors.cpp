// How exact 2.04 and 2.05 are: their worst errors as a part of what the suites allow, as a table in Markdown.
//
// Inputs are spread evenly between -2 and 2 and rounded to the type; the exact result is computed in float64. Of long
// sequences about 24 rows of each head are compared. Works on a real GPU and, for the shapes that it can do within
// seconds, on the virtual one.
#include <cstdio>

#include "common/testing/step.hpp"
#include "phase2_forward/04_flash_forward/flash_forward.hpp"
#include "phase2_forward/05_flash_forward_mma/flash_forward_mma.hpp"
#include "phase2_forward/kernel_suite.hpp"

namespace flashkata::testing {

const Step step{"2.05", "flash_forward_errors", "benchmarks/flash_forward_errors.cpp"};  // who main() runs

}  // namespace flashkata::testing

using namespace flashkata;
using namespace flashkata::testing;

namespace {

// Errors divided by their bounds. More than 1 would be wrong.
struct Shares {
  double output = 0.0;
  double lse = 0.0;
};

// The worst element of all, as a part of its own bound.
double worst_share(const Array& got, const Array& want, const Bound& bound) {
  double worst = 0.0;
  for (std::size_t i = 0; i < want.count(); ++i) {
    if (got.values[i] == want.values[i]) continue;
    const double share = std::abs(got.values[i] - want.values[i]) / (bound.relative * bound.magnitude.values[i]);
    if (!(share <= worst)) worst = share;
  }
  return worst;
}

template <typename T>
Shares measure(const ForwardSizes& sizes, bool causal) {
  const ForwardInputs<T> in(sizes, noise(1), noise(2), noise(3));
  const auto launch = [](const FlashForward<T>& problem) {
    if constexpr (std::is_same_v<T, float>) {
      flash_forward(problem);
    } else {
      flash_forward_mma(problem);
    }
  };
  const ForwardAnswer got = forward<T>(launch, in, {.causal = causal}, /*judge=*/false);
  const double scale = static_cast<double>(1.0f / std::sqrt(static_cast<float>(sizes.width)));
  const ForwardRows want = forward_rows(in, causal, scale, spread_rows(sizes.queries, 24));
  const Array output = want.of(got.output);
  Shares shares{.lse = worst_share(want.of(got.lse), want.lse, lse_bound_of<T>(want))};
  if constexpr (std::is_same_v<T, float>) {
    shares.output = worst_share(output, want.output, fp32_bound(want.size, want.largest_score));
  } else {
    shares.output = half_errors<T>(output, want.output, want.baseline, arithmetic_of(want)).share();
  }
  return shares;
}

constexpr ForwardSizes GRID[] = {
    {1, 2, 64, 64, 32},      {2, 8, 256, 256, 64},   {1, 16, 512, 512, 128}, {4, 8, 1024, 1024, 64},
    {2, 4, 1024, 1024, 128}, {1, 2, 2048, 2048, 16}, {1, 2, 4096, 4096, 64}, {1, 1, 8192, 8192, 128},
    {2, 3, 113, 203, 64},    {1, 2, 203, 113, 32},   {1, 2, 239, 1, 64},     {1, 2, 1, 239, 128},
    {1, 2, 127, 513, 128},   {1, 2, 1023, 1024, 64}, {3, 5, 37, 53, 16},
};

}  // namespace

TEST_CASE("errors as a part of what is allowed") {
  std::printf("| B x H x Sq x Sk x D | | fp32 output | fp32 lse | fp16 output | fp16 lse | bf16 output | bf16 lse |\n");
  std::printf("|---|---|---|---|---|---|---|---|\n");
  Shares worst[3];
  for (const ForwardSizes& s : GRID) {
    const Index products = s.batch * s.heads * s.queries * s.keys * s.width;
    if (!KATA_REAL_GPU && products > Index{1} << 27) continue;
    for (const bool causal : {false, true}) {
      const Shares shares[] = {measure<float>(s, causal), measure<fp16>(s, causal), measure<bf16>(s, causal)};
      std::printf("| %d x %d x %d x %d x %d | %s |", int(s.batch), int(s.heads), int(s.queries), int(s.keys),
                  int(s.width), causal ? "causal" : "full");
      for (int type = 0; type < 3; ++type) {
        std::printf(" %.3f | %.3f |", shares[type].output, shares[type].lse);
        worst[type].output = std::max(worst[type].output, shares[type].output);
        worst[type].lse = std::max(worst[type].lse, shares[type].lse);
      }
      std::printf("\n");
      std::fflush(stdout);
    }
  }
  std::printf("| worst | |");
  for (const Shares& shares : worst) std::printf(" %.3f | %.3f |", shares.output, shares.lse);
  std::printf("\n");
  for (const Shares& shares : worst) {
    expect(shares.output <= 1.0 && shares.lse <= 1.0, "errors", "more than is allowed");
  }
}
