// Answers to 02_row_delta, wrong and right. Every deviation stands where somebody made it.
#include "row_delta.hpp"

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../corpus.hpp"

namespace flashkata {
namespace {

using corpus::plays;
using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    // What is added up.
    {"bwd-dO-ignored", "bwd-dO-ignored"},
    {"bwd-D-wrong-source", "bwd-D-wrong-source"},
    {"delta-product-of-sums", "delta-product-of-sums"},
    {"delta-mean", "delta-mean"},
    {"delta-scaled", "delta-scaled"},
    {"delta-absolute", "delta-absolute"},
    {"delta-query-axis", "delta-query-axis"},
    {"delta-assign", "delta-assign"},
    {"delta-last-channel", "delta-last-channel"},
    {"delta-tail-dropped, groups of 4", "delta-tail-dropped"},
    {"delta-tail-dropped, groups of 8", "delta-tail-dropped"},
    {"delta-tail-dropped, groups of 32", "delta-tail-dropped"},
    {"delta-row-carried", "delta-row-carried"},
    {"delta-row-carried within a head", "delta-row-carried"},
    {"delta-not-zeroed", "delta-not-zeroed"},
    {"output squared", UNNAMED},
    {"with a minus", UNNAMED},
    {"channels beyond 128 dropped", UNNAMED},
    {"channel 0 left out", UNNAMED},
    {"channel 0 twice", UNNAMED},
    // Where it lies.
    {"bwd-dO-stride, those of output", "bwd-dO-stride"},
    {"bwd-dO-stride, packed", "bwd-dO-stride"},
    {"noncontiguous-stride", "noncontiguous-stride"},
    {"noncontiguous-stride of output", "noncontiguous-stride"},
    {"delta-channel-stride", "delta-channel-stride"},
    {"delta-channel-stride of d_output", "delta-channel-stride"},
    {"delta-channel-stride, refused", "delta-channel-stride"},
    {"delta-token-order", "delta-token-order"},
    {"heads-first-only", "heads-first-only"},
    {"batch-first-only", "batch-first-only"},
    {"heads taken to lie Sq rows apart", UNNAMED},
    {"batch items taken to lie H heads apart", UNNAMED},
    {"a stride of 0 taken for 1", UNNAMED},
    {"a stride of 0 refused", UNNAMED},
    {"negative strides taken for positive", UNNAMED},
    {"offsets in 32 bits", UNNAMED},
    {"strides of heads and tokens exchanged", UNNAMED},
    {"the last query copied from the one before", UNNAMED},
    // How exactly.
    {"terms in half precision", UNNAMED},
    {"inputs in bf16", UNNAMED},
    {"sum in bf16", UNNAMED},
    {"small numbers flushed to 0", UNNAMED},
    {"clamped to 1e6", UNNAMED},
    {"rounded to whole numbers beyond 1000", UNNAMED},
    {"NaN counted as 0", UNNAMED},
    {"NaN in a head fills it", UNNAMED},
    // Nothing to add up, and what a caller can expect.
    {"rows with output 0 left unwritten", UNNAMED},
    {"rows without channels left unwritten", UNNAMED},
    {"no query gives no shape", UNNAMED},
    {"kept from the first call", UNNAMED},
    {"added to the call before", UNNAMED},
    {"product left in d_output", UNNAMED},
    {"arguments unchecked", UNNAMED},
    {"only the count of d_output checked", UNNAMED},
    {"only the channels of d_output checked", UNNAMED},
    {"output named instead of d_output", UNNAMED},
    {"right: double", RIGHT},
    {"right: the last channel first", RIGHT},
    {"right: four partial sums", RIGHT},
    {"right: fused multiply-add", RIGHT},
    {"right: in halves, and halves of halves", RIGHT},
    {"right: compensated", RIGHT},
    {"right: channels outside", RIGHT},
    {"right: Eigen over strided maps", RIGHT},
    {"right: packed copies and matrices", RIGHT},
    {"right: slices of slices", RIGHT},
    {"right: one loop over rows", RIGHT},
};

using Heads = View<const float, 4>;

float to_bf16(float x) {
  const float high = x * 65537.0f;  // Dekker: the upper 8 bits of the significand
  return high - (high - x);
}

// Where the answer looks for element (b, h, i, c).
struct Place {
  Heads view;
  Shape<4> strides;

  float operator()(Index b, Index h, Index i, Index c) const {
    Index offset = b * strides[0] + h * strides[1] + i * strides[2] + c * strides[3];
    if (plays("offsets in 32 bits")) offset = static_cast<std::int32_t>(offset);
    return view.data()[offset];
  }
};

Shape<4> packed_strides(const Shape<4>& shape) {
  return {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1};
}

Place place_of(const Heads& view, const Heads& other, bool is_d_output) {
  Shape<4> strides = view.strides();
  const Shape<4>& shape = view.shape();
  if (plays("noncontiguous-stride")) strides = packed_strides(shape);
  if (plays("noncontiguous-stride of output") && !is_d_output) strides = packed_strides(shape);
  if (plays("bwd-dO-stride, those of output") && is_d_output) strides = other.strides();
  if (plays("bwd-dO-stride, packed") && is_d_output) strides = packed_strides(shape);
  if (plays("delta-channel-stride")) strides[3] = 1;
  if (plays("delta-channel-stride of d_output") && is_d_output) strides[3] = 1;
  if (plays("heads taken to lie Sq rows apart") && shape[1] > 1) strides[1] = shape[2] * strides[2];
  if (plays("batch items taken to lie H heads apart") && shape[0] > 1) {
    strides[0] = shape[1] * strides[1];
  }
  if (plays("strides of heads and tokens exchanged") && is_d_output) std::swap(strides[1], strides[2]);
  for (std::size_t axis = 0; axis < 4; ++axis) {
    if (plays("a stride of 0 taken for 1") && strides[axis] == 0) strides[axis] = 1;
    if (plays("a stride of 0 refused")) require(strides[axis] != 0 || shape[axis] <= 1, "stride", 0, "at least 1");
    if (plays("negative strides taken for positive")) strides[axis] = std::abs(strides[axis]);
  }
  return {view, strides};
}

// An answer that looks in the wrong place must not leave its arguments' memory: only the suite knows where that ends,
// and leaves 128 numbers on either side. Where it might, it finds NaN.
bool reaches(const Place& place, Index b, Index h, Index i, Index c) {
  const auto& view = place.view;
  Index low = -128;
  Index high = 128;
  for (int axis = 0; axis < 4; ++axis) {
    const Index last = std::max<Index>(view.size(axis) - 1, 0) * view.stride(axis);
    (last < 0 ? low : high) += last;
  }
  const Index at = b * place.strides[0] + h * place.strides[1] + i * place.strides[2] + c * place.strides[3];
  return plays("offsets in 32 bits") || (low <= at && at <= high);
}

Index channels_added(Index channels) {
  if (plays("delta-last-channel")) return channels - 1;
  if (plays("delta-tail-dropped, groups of 4")) return channels / 4 * 4;
  if (plays("delta-tail-dropped, groups of 8")) return channels / 8 * 8;
  if (plays("delta-tail-dropped, groups of 32")) return channels / 32 * 32;
  if (plays("channels beyond 128 dropped")) return std::min<Index>(channels, 128);
  return channels;
}

Tensor<float, 3> summed(const Heads& output, const Heads& d_output) {
  const auto [batch, heads, queries, channels] = output.shape();
  const Place o = place_of(output, d_output, false);
  const Place d_o = place_of(d_output, output, true);
  const auto at = [](const Place& place, Index b, Index h, Index i, Index c) {
    if (!reaches(place, b, h, i, c)) return std::numeric_limits<float>::quiet_NaN();
    const float number = place(b, h, i, c);
    return plays("inputs in bf16") ? to_bf16(number) : number;
  };
  Tensor<float, 3> delta({batch, heads, queries});
  float sum = 0.0f;
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < heads; ++h) {
      if (plays("delta-row-carried within a head")) sum = 0.0f;
      for (Index i = 0; i < queries; ++i) {
        if (plays("rows without channels left unwritten") && channels == 0) continue;
        if (!corpus::name().starts_with("delta-row-carried")) sum = 0.0f;
        if (plays("delta-not-zeroed")) sum = delta(b, h, i);
        float of_output = 0.0f;
        float of_d_output = 0.0f;
        bool all_zero = true;
        const Index from_b = plays("batch-first-only") ? 0 : b;
        const Index from_h = plays("heads-first-only") ? 0 : h;
        for (Index c = plays("channel 0 left out") ? 1 : 0; c < channels_added(channels); ++c) {
          float a = at(o, from_b, from_h, i, c);
          float g = at(d_o, from_b, from_h, i, c);
          if (plays("bwd-dO-ignored")) g = 1.0f;
          if (plays("bwd-D-wrong-source")) a = 1.0f;
          if (plays("output squared")) g = a;
          float term = a * g;
          if (plays("delta-absolute")) term = std::abs(term);
          if (plays("terms in half precision")) term = std::round(term * 2048.0f) / 2048.0f;
          if (plays("small numbers flushed to 0") && std::abs(term) < 1e-20f) term = 0.0f;
          if (plays("NaN counted as 0") && std::isnan(term)) term = 0.0f;
          if (plays("channel 0 twice") && c == 0) term *= 2.0f;
          if (plays("delta-assign")) sum = 0.0f;
          sum += term;
          if (plays("sum in bf16")) sum = to_bf16(sum);
          of_output += a;
          of_d_output += g;
          all_zero = all_zero && a == 0.0f;
        }
        float result = sum;
        if (plays("delta-product-of-sums")) result = of_output * of_d_output;
        if (plays("delta-mean") && channels > 0) result /= static_cast<float>(channels);
        if (plays("delta-scaled") && channels > 0) result /= std::sqrt(static_cast<float>(channels));
        if (plays("with a minus")) result = -result;
        if (plays("clamped to 1e6")) result = std::min(std::max(result, -1e6f), 1e6f);
        if (plays("rounded to whole numbers beyond 1000") && std::abs(result) > 1000.0f) result = std::round(result);
        if (plays("rows with output 0 left unwritten") && all_zero && channels > 0) continue;
        delta(b, h, i) = result;
      }
      if (plays("the last query copied from the one before") && queries > 8) {
        delta(b, h, queries - 1) = delta(b, h, queries - 2);
      }
      if (plays("NaN in a head fills it")) {
        float any = 0.0f;
        for (Index i = 0; i < queries; ++i) any += 0.0f * delta(b, h, i);
        for (Index i = 0; i < queries; ++i) delta(b, h, i) += any;
      }
    }
  }
  return delta;
}

// delta[b, h, c], as far as there are queries to hold it: the sum over i of what channel c holds.
Tensor<float, 3> over_queries(const Heads& output, const Heads& d_output) {
  const auto [batch, heads, queries, channels] = output.shape();
  Tensor<float, 3> delta({batch, heads, queries});
  std::fill_n(delta.data(), delta.count(), 0.0f);
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < queries; ++i)
        for (Index c = 0; c < std::min(queries, channels); ++c)
          delta(b, h, c) += output(b, h, i, c) * d_output(b, h, i, c);
  return delta;
}

Tensor<float, 3> in_token_order(const Tensor<float, 3>& right) {
  Tensor<float, 3> delta(right.shape());
  float* next = delta.data();
  for (Index b = 0; b < delta.size(0); ++b)
    for (Index i = 0; i < delta.size(2); ++i)
      for (Index h = 0; h < delta.size(1); ++h) *next++ = right(b, h, i);
  return delta;
}

// ---- Correct answers that look unlike the solution ------------------------------------------------------------------

float in_halves(const View<const float, 1>& o, const View<const float, 1>& d_o, Index first, Index count) {
  if (count == 0) return 0.0f;
  if (count == 1) return o(first) * d_o(first);
  const Index half = count / 2;
  return in_halves(o, d_o, first, half) + in_halves(o, d_o, first + half, count - half);
}

float row_by_hand(const View<const float, 1>& o, const View<const float, 1>& d_o) {
  const Index channels = o.size(0);
  if (plays("right: in halves, and halves of halves")) return in_halves(o, d_o, 0, channels);
  if (plays("right: double")) {
    double sum = 0.0;
    for (Index c = 0; c < channels; ++c) sum += static_cast<double>(o(c)) * static_cast<double>(d_o(c));
    return static_cast<float>(sum);
  }
  if (plays("right: the last channel first")) {
    float sum = 0.0f;
    for (Index c = channels; c-- > 0;) sum += o(c) * d_o(c);
    return sum;
  }
  if (plays("right: four partial sums")) {
    float sums[4] = {};
    for (Index c = 0; c < channels; ++c) sums[c % 4] += o(c) * d_o(c);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  if (plays("right: compensated")) {
    float sum = 0.0f;
    float lost = 0.0f;
    for (Index c = 0; c < channels; ++c) {
      const float term = o(c) * d_o(c) - lost;
      const float next = sum + term;
      lost = (next - sum) - term;
      sum = next;
    }
    return sum;
  }
  if (plays("right: Eigen over strided maps")) {
    using Strided = Eigen::Map<const Eigen::VectorXf, Eigen::Unaligned, Eigen::InnerStride<>>;
    if (channels == 0) return 0.0f;
    return Strided(o.data(), channels, Eigen::InnerStride<>(o.stride(0)))
        .dot(Strided(d_o.data(), channels, Eigen::InnerStride<>(d_o.stride(0))));
  }
  float sum = 0.0f;  // fused multiply-add, or slices of slices
  for (Index c = 0; c < channels; ++c) {
    sum = plays("right: fused multiply-add") ? std::fma(o(c), d_o(c), sum) : sum + o(c) * d_o(c);
  }
  return sum;
}

Tensor<float, 3> unusual(const Heads& output, const Heads& d_output) {
  const auto [batch, heads, queries, channels] = output.shape();
  Tensor<float, 3> delta({batch, heads, queries});
  if (plays("right: channels outside")) {
    std::fill_n(delta.data(), delta.count(), 0.0f);
    for (Index c = 0; c < channels; ++c)
      for (Index i = 0; i < queries; ++i)
        for (Index h = 0; h < heads; ++h)
          for (Index b = 0; b < batch; ++b) delta(b, h, i) += d_output(b, h, i, c) * output(b, h, i, c);
    return delta;
  }
  if (plays("right: one loop over rows")) {
    for (Index row = 0; row < delta.count(); ++row) {
      const Index b = row / (heads * queries);
      const Index h = row / queries % heads;
      const Index i = row % queries;
      float sum = 0.0f;
      for (Index c = 0; c < channels; ++c) sum += output(b, h, i, c) * d_output(b, h, i, c);
      delta.data()[row] = sum;
    }
    return delta;
  }
  if (plays("right: packed copies and matrices")) {
    Matrix o(delta.count(), channels);
    Matrix d_o(delta.count(), channels);
    for (Index row = 0; row < delta.count(); ++row)
      for (Index c = 0; c < channels; ++c) {
        o(row, c) = output(row / (heads * queries), row / queries % heads, row % queries, c);
        d_o(row, c) = d_output(row / (heads * queries), row / queries % heads, row % queries, c);
      }
    Eigen::Map<Eigen::VectorXf>(delta.data(), delta.count()) = o.cwiseProduct(d_o).rowwise().sum();
    return delta;
  }
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < queries; ++i) delta(b, h, i) = row_by_hand(output[b][h][i], d_output[b][h][i]);
  return delta;
}

bool checked(const Heads& output, const Heads& d_output) {
  if (plays("arguments unchecked")) return d_output.shape() == output.shape();
  if (plays("only the count of d_output checked") && d_output.count() == output.count()) {
    return d_output.shape() == output.shape();
  }
  if (plays("only the channels of d_output checked") && d_output.size(3) == output.size(3)) {
    return d_output.shape() == output.shape();
  }
  if (plays("output named instead of d_output")) {
    require(d_output.shape() == output.shape(), "output", to_text(output.shape()), "the shape of its gradient");
  }
  check_row_delta(output, d_output);
  return true;
}

}  // namespace

Tensor<float, 3> row_delta(View<const float, 4> output, View<const float, 4> d_output) {
  if (!checked(output, d_output)) return Tensor<float, 3>(Shape<3>{0, 0, 0});
  if (corpus::name().starts_with("right:")) return unusual(output, d_output);
  if (plays("delta-query-axis")) return over_queries(output, d_output);
  if (plays("no query gives no shape") && output.size(2) == 0) return Tensor<float, 3>(Shape<3>{0, 0, 0});
  if (plays("delta-channel-stride, refused")) {
    for (const Heads& view : {output, d_output}) {
      require(view.stride(3) == 1 || view.size(3) <= 1, "stride(3)", view.stride(3), "1");
    }
  }

  Tensor<float, 3> delta = summed(output, d_output);
  if (plays("delta-token-order")) return in_token_order(delta);
  if (plays("product left in d_output") && d_output.count() > 0) {
    const_cast<float&>(d_output(0, 0, 0, 0)) *= output(0, 0, 0, 0);
  }
  if (plays("kept from the first call") || plays("added to the call before")) {
    static std::vector<std::pair<Shape<3>, std::vector<float>>> kept;
    for (auto& [shape, numbers] : kept) {
      if (shape != delta.shape()) continue;
      for (std::size_t n = 0; n < numbers.size(); ++n) {
        float& number = delta.data()[n];
        number = plays("kept from the first call") ? numbers[n] : number + numbers[n];
      }
      return delta;
    }
    kept.emplace_back(delta.shape(), std::vector<float>(delta.data(), delta.data() + delta.count()));
  }
  return delta;
}

}  // namespace flashkata
