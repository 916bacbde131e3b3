// Long sequences, of which some rows are compared with float64.
#pragma once

#include "grouped_problems.hpp"

namespace flashkata::testing::grouped {

struct Sampled {
  Array exact{{1, 1, 0, 0}, {}}, honest = exact, size = exact;

  void add(Index width, const std::vector<double>& row, const std::vector<double>& honest_row,
           const std::vector<double>& size_row) {
    for (Array* array : {&exact, &honest, &size}) {
      ++array->shape[2];
      array->shape[3] = width;
    }
    exact.values.insert(exact.values.end(), row.begin(), row.end());
    honest.values.insert(honest.values.end(), honest_row.begin(), honest_row.end());
    size.values.insert(size.values.end(), size_row.begin(), size_row.end());
  }
};

// A row of a sum of products: exactly, with every sign made positive, and as wrong as the roundings of each first
// factor and of the sum make it on the whole. Not as wrong as such roundings happen to make it: few rows are looked at,
// in some of them a single product decides, and its rounding may be lucky in one way of computing it and not in
// another.
template <typename T>
struct Sum {
  explicit Sum(Index width) : exact(static_cast<std::size_t>(width), 0.0), squares(exact), size(exact) {}
  void add(double factor, double factor_size, const float* row) {
    const double factor_error = TYPICAL_ERROR * rounding_error<T>(factor);
    for (std::size_t d = 0; d < exact.size(); ++d) {
      const auto number = static_cast<double>(row[d]);
      exact[d] += factor * number;
      squares[d] += std::pow(factor_error * number, 2);
      size[d] += factor_size * std::abs(number);
    }
  }
  void append_to(Sampled& sampled) const {
    std::vector<double> honest = exact;
    for (std::size_t d = 0; d < exact.size(); ++d) {
      honest[d] += std::sqrt(squares[d] + std::pow(TYPICAL_ERROR * rounding_error<T>(exact[d]), 2));
    }
    sampled.add(static_cast<Index>(exact.size()), exact, honest, size);
  }
  std::vector<double> exact, squares, size;  // squares of errors
};

inline double dot(const float* one, const float* other, Index width, double* size = nullptr) {
  double sum = 0.0;
  for (Index d = 0; d < width; ++d) {
    const double product = static_cast<double>(one[d]) * static_cast<double>(other[d]);
    sum += product;
    if (size != nullptr) *size += std::abs(product);
  }
  return sum;
}

// Head and row.
using Places = std::vector<std::pair<Index, Index>>;

// Around the edges of some groups, and between.
inline Places places(const Grouped& g, bool of_keys) {
  Places picked;
  for (std::size_t n = 0; n < g.groups.size(); n += std::max<std::size_t>(1, g.groups.size() / 3)) {
    const Index begin = of_keys ? g.groups[n].k_begin : g.groups[n].q_begin;
    const Index end = of_keys ? g.groups[n].k_end : g.groups[n].q_end;
    const Index heads = of_keys ? g.kv_heads : g.heads;
    for (const Index s : {begin, begin + (end - begin) / 3, end - 1}) {
      if (begin < end) picked.push_back({static_cast<Index>(picked.size()) % heads, s});
    }
  }
  return picked;
}

inline Array rows_at(const Array& all, const Places& where) {
  const Index rows = all.shape[2], width = all.shape.size() > 3 ? all.shape[3] : 1;
  Array picked{{1, 1, static_cast<Index>(where.size())}, {}};
  if (all.shape.size() > 3) picked.shape.push_back(width);
  for (const auto& [h, s] : where) {
    const auto first = all.values.begin() + (h * rows + s) * width;
    picked.values.insert(picked.values.end(), first, first + width);
  }
  return picked;
}

// What a long problem took: GPU memory at most, and the largest errors of the sampled rows, as shares of what is
// allowed.
struct Taken {
  std::size_t bytes = 0;
  double output = 0.0, gradients = 0.0;
};

template <typename T>
bool expect_sampled(const char* name, const Array& got, const Sampled& want, double largest, const Axes& axes,
                    double& share) {
  const Bound bound{4.0 * std::numeric_limits<float>::epsilon() * (largest + 1.0), want.size};
  share = std::max(share, half_errors<T>(got, want.exact, want.honest, bound).share());
  return expect_close_in_half<T>(name, got, want.exact, want.honest, bound, "whose P, dS and results are rounded to",
                                 axes);
}

// A forward pass, and with `back` a backward pass from what it left behind; some rows of each are checked. Returns what
// was found to be right.
template <typename T>
bool expect_long(const Grouped& g, bool back, bool deterministic, Taken& taken) {
  const Inputs in = random_of<T>(g, 7);
  const Index width = g.width, shared = g.heads / g.kv_heads;
  const double scale = 1.0 / std::sqrt(static_cast<double>(width));
  const ForwardAnswer got = attend(fused<T>(), g, in);
  taken.bytes = peak_device_bytes();  // since the arguments were there: attend() and go_back() count anew
  const auto q = in.query.view();
  const auto k = in.key.view(), v = in.value.view();

  Sampled output;
  Array lse{{1, 1, 0}, {}};
  double largest = 0.0;
  const Places queries = places(g, /*of_keys=*/false);
  for (const auto& [h, i] : queries) {
    const Range seen = seen_by(g, i);
    std::vector<double> scores;
    double top = -std::numeric_limits<double>::infinity();
    for (Index j = seen.begin; j < seen.end; ++j) {
      double size = 0.0;
      scores.push_back(scale * dot(&q(0, h, i, 0), &k(0, h / shared, j, 0), width, &size));
      top = std::max(top, scores.back());
      largest = std::max(largest, scale * size);
    }
    double sum = 0.0;
    for (const double score : scores) sum += std::exp(score - top);
    Sum<T> row(width);
    for (Index j = seen.begin; j < seen.end; ++j) {
      const double weight = std::exp(scores[static_cast<std::size_t>(j - seen.begin)] - top) / sum;
      row.add(weight, weight, &v(0, h / shared, j, 0));
    }
    row.append_to(output);
    ++lse.shape[2];
    lse.values.push_back(seen.count() > 0 ? top + std::log(sum) : top);
  }
  const bool lse_is_right =
      expect_close("lse", rows_at(got.lse, queries), lse, lse_bound(lse, largest, roundoff<T>()), LSE_AXES);
  if (!expect_sampled<T>("output", rows_at(got.output, queries), output, largest, QUERY_AXES, taken.output) ||
      !lse_is_right) {
    return not_so(fused<T>(), g, type_name<T>());
  }
  if (!back) return true;

  // From here on output and lse are what the forward pass made them.
  const Gradients gradients = go_back(fused_backward<T>(), g, in, {got.output, got.lse}, deterministic);
  taken.bytes = std::max(taken.bytes, peak_device_bytes());
  const auto d_o = in.d_output.view();
  const auto delta_of = [&](Index h, Index i) {
    double delta = 0.0;
    for (Index d = 0; d < width; ++d) {
      delta += static_cast<double>(d_o(0, h, i, d)) *
               got.output.values[static_cast<std::size_t>((h * g.queries + i) * width + d)];
    }
    return delta;
  };
  // Calls body(weight, dS, size of dS) of a pair.
  const auto pair = [&](Index h, Index i, Index j, double delta, const auto& body) {
    const double row_lse = got.lse.values[static_cast<std::size_t>(h * g.queries + i)];
    const double weight = std::exp(scale * dot(&q(0, h, i, 0), &k(0, h / shared, j, 0), width) - row_lse);
    double size = 0.0;
    const double d_weight = dot(&d_o(0, h, i, 0), &v(0, h / shared, j, 0), width, &size);
    body(weight, scale * weight * (d_weight - delta), scale * weight * (size + std::abs(delta)));
  };
  Sampled d_query, d_key, d_value;
  for (const auto& [h, i] : queries) {
    Sum<T> row(width);
    const Range seen = seen_by(g, i);
    const double delta = delta_of(h, i);
    for (Index j = seen.begin; j < seen.end; ++j) {
      pair(h, i, j, delta, [&, h = h](double, double ds, double size) { row.add(ds, size, &k(0, h / shared, j, 0)); });
    }
    row.append_to(d_query);
  }
  const Places keys = places(g, /*of_keys=*/true);
  for (const auto& [hk, j] : keys) {
    Sum<T> of_key(width), of_value(width);
    for (Index h = hk * shared; h < (hk + 1) * shared; ++h)
      for (const Group& group : g.groups)
        for (Index i = group.q_begin; i < group.q_end; ++i) {
          const Index seen =
              keys_seen(g.causal, i - group.q_begin, group.q_end - group.q_begin, group.k_end - group.k_begin);
          if (j < group.k_begin || j >= group.k_begin + seen) continue;
          pair(h, i, j, delta_of(h, i), [&](double weight, double ds, double size) {
            of_key.add(ds, size, &q(0, h, i, 0));
            of_value.add(weight, weight, &d_o(0, h, i, 0));
          });
        }
    of_key.append_to(d_key);
    of_value.append_to(d_value);
  }
  const auto right = [&](const char* name, const Array& all, const Places& where, const Sampled& want,
                         const Axes& axes) {
    return expect_sampled<T>(name, rows_at(all, where), want, largest, axes, taken.gradients);
  };
  const bool key_is_right = right("d_key", gradients.key, keys, d_key, KEY_AXES);
  const bool value_is_right = right("d_value", gradients.value, keys, d_value, KEY_AXES);
  return (right("d_query", gradients.query, queries, d_query, QUERY_AXES) && key_is_right && value_is_right) ||
         not_so(fused_backward<T>(), g, type_name<T>(), deterministic);
}

template <typename T>
bool expect_long(const Grouped& g, bool back, bool deterministic = false) {
  Taken taken;
  return expect_long<T>(g, back, deterministic, taken);
}

inline std::string mebibytes(std::size_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

// The same, and the figures are printed.
template <typename T>
bool expect_stress(const Grouped& g, bool back, bool deterministic = false) {
  Taken taken;
  if (!expect_long<T>(g, back, deterministic, taken)) return false;
  std::ostringstream text;
  text.precision(2);
  text << g.queries << " tokens in " << g.groups.size() << " groups, H=" << g.heads << " Hk=" << g.kv_heads
       << " D=" << g.width << (g.causal ? ", causal, " : ", ") << type_name<T>() << ": at most "
       << mebibytes(taken.bytes) << " on the GPU, nothing beyond the arguments; largest error of the output "
       << taken.output << " of what is allowed";
  if (back) text << ", of the gradients " << taken.gradients;
  figures(text.str());
  return true;
}

// `lengths` tokens behind each other, each sequence a group; with `shared` keys every group also sees the last so many
// of the sequence before it.
inline Grouped sequences(const std::vector<Index>& lengths, Index shared = 0) {
  Grouped g{.queries = 0, .keys = 0};
  for (const Index length : lengths) {
    const Index begin = g.queries;
    g.groups.push_back({begin, begin + length, std::max<Index>(0, begin - shared), begin + length});
    g.queries = g.keys = begin + length;
  }
  return g;
}

inline Grouped with_heads(Grouped g, Index heads, Index kv_heads, Index width, bool causal) {
  g.heads = heads;
  g.kv_heads = kv_heads;
  g.width = width;
  g.causal = causal;
  return g;
}

// A short one on the virtual GPU, so that nobody takes a stub for a skipped test.
inline bool stress_needs_a_gpu() {
  return needs_a_gpu([] {
    return expect_long<fp16>(with_heads(sequences({9, 21}, 5), 2, 1, 64, true), /*back=*/true);
  });
}

// Bytes of the GPU's memory that are taken, by whatever means.
inline std::size_t bytes_taken() {
#if KATA_REAL_GPU
  std::size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  return total - free;
#else
  return device_bytes();
#endif
}

}  // namespace flashkata::testing::grouped
