#include "context_parallel.hpp"
#include "phase2_forward/02_merge/merge.hpp"
#include "solutions/hidden/phase4_extensions/08_context_parallel/chunk_pairs.hpp"

namespace flashkata {
namespace {

// Calls body(queries, keys, pairs) for the pairs of chunks that a rank computes when it holds the keys of `source`.
template <typename Body>
void for_each_pair(const Zigzag& zigzag, int rank, int source, bool causal, const Body& body) {
  for (const Part& queries : parts_of(zigzag, rank)) {
    for (const Part& keys : parts_of(zigzag, source)) {
      const Pairs pairs = pairs_of(queries.chunk, keys.chunk, causal);
      if (pairs != Pairs::none && queries.tokens > 0 && keys.tokens > 0) body(queries, keys, pairs);
    }
  }
}

// Whose keys a rank holds after so many hops: they come from rank - 1, which had them from rank - 2, ...
int source_of(int rank, int hop, int ranks) { return (rank - hop + ranks) % ranks; }

}  // namespace

TiledResult ring_attention(const LocalAttention& local, Communicator& communicator) {
  check_local_attention(local, communicator.size());
  const Zigzag zigzag{local.tokens, communicator.size()};
  const Shape<4>& q = local.query.shape();
  const Index key_heads = local.key.size(1);
  const Index width = local.value.size(3);
  const Index shared = q[1] / key_heads;
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

  // For each head its two chunks: attention over the keys that have come by so far.
  std::vector<Partial> parts;
  for (Index head = 0; head < q[0] * q[1]; ++head) {
    for (const Part& part : parts_of(zigzag, communicator.rank())) {
      parts.push_back({Matrix::Zero(part.tokens, width), Vector::Constant(part.tokens, minus_infinity)});
    }
  }
  const auto part_of = [&](Index b, Index h, const Part& part) -> Partial& {
    return parts[static_cast<std::size_t>((b * q[1] + h) * 2 + (part.row > 0 ? 1 : 0))];
  };

  KeysAndValues held = KeysAndValues::copy_of(local);
  KeysAndValues next(local);
  for (int hop = 0; hop < zigzag.ranks; ++hop) {
    Transfer transfer;  // of what the next hop computes on, while this one computes
    if (hop + 1 < zigzag.ranks) transfer = communicator.shift(held.floats(), next.floats());
    const int source = source_of(communicator.rank(), hop, zigzag.ranks);
    for_each_pair(
        zigzag, communicator.rank(), source, local.causal, [&](const Part& queries, const Part& keys, Pairs pairs) {
          for (Index b = 0; b < q[0]; ++b) {
            const auto there = [&](const View<const float, 4>& x) {
              return shared_by(rows_of(x, keys.row, keys.tokens), b, q[1]);
            };
            const TiledResult attended = tiled_forward(
                by_key_head(rows_of(local.query, queries.row, queries.tokens), b, key_heads), there(held.key()),
                there(held.value()), {.causal = pairs == Pairs::causal, .scale = local.scale, .threads = 1});
            for (Index h = 0; h < q[1]; ++h) {
              const Index head = h / shared, g = h % shared;
              const Partial these{as_matrix(attended.output.view()[head][g]),
                                  Eigen::Map<const Vector>(&attended.lse(head, g, 0), queries.tokens)};
              Partial& before = part_of(b, h, queries);
              before = merge_partials(before, these);
            }
          }
        });
    transfer.wait();  // what was sent may be overwritten, what has come may be read
    std::swap(held, next);
  }

  TiledResult result{filled_with<4>(0.0f, {q[0], q[1], q[2], width}),
                     filled_with<3>(minus_infinity, {q[0], q[1], q[2]})};
  for (Index b = 0; b < q[0]; ++b) {
    for (Index h = 0; h < q[1]; ++h) {
      for (const Part& part : parts_of(zigzag, communicator.rank())) {
        const Partial& from = part_of(b, h, part);
        as_matrix(result.output.view()[b][h]).middleRows(part.row, part.tokens) = from.output;
        for (Index i = 0; i < part.tokens; ++i) result.lse(b, h, part.row + i) = from.lse(i);
      }
    }
  }
  return result;
}

TiledGradients ring_attention_backward(const LocalAttention& local, View<const float, 4> output,
                                       View<const float, 3> lse, View<const float, 4> d_output,
                                       Communicator& communicator) {
  check_local_backward(local, output, lse, d_output, communicator.size());
  const Zigzag zigzag{local.tokens, communicator.size()};
  const Shape<4>& q = local.query.shape();
  const Index key_heads = local.key.size(1);
  const Index shared = q[1] / key_heads;
  TiledGradients gradients{filled_with<4>(0.0f, q), Tensor<float, 4>(local.key.shape()),
                           Tensor<float, 4>(local.value.shape())};

  KeysAndValues held = KeysAndValues::copy_of(local);
  KeysAndValues next(local);
  // Gradients travel one hop behind their keys: what the ranks before this one have said about `held` arrives while
  // this one finds out what it has to say itself.
  KeysAndValues leaving(local), arriving(local);
  Transfer sums;
  for (int hop = 0; hop < zigzag.ranks; ++hop) {
    Transfer transfer;
    if (hop + 1 < zigzag.ranks) transfer = communicator.shift(held.floats(), next.floats());
    KeysAndValues mine(local);  // zeros
    const int source = source_of(communicator.rank(), hop, zigzag.ranks);
    for_each_pair(
        zigzag, communicator.rank(), source, local.causal, [&](const Part& queries, const Part& keys, Pairs pairs) {
          for (Index b = 0; b < q[0]; ++b) {
            const auto here = [&](auto x) {
              return by_key_head(rows_of(x, queries.row, queries.tokens), b, key_heads);
            };
            const auto there = [&](const View<const float, 4>& x) {
              return shared_by(rows_of(x, keys.row, keys.tokens), b, q[1]);
            };
            // lse and output are those over all keys: so are the weights that are made from them.
            const TiledGradients given =
                tiled_backward(here(local.query), there(held.key()), there(held.value()), here(output), here(lse),
                               here(d_output), {.causal = pairs == Pairs::causal, .scale = local.scale, .threads = 1});
            for (Index h = 0; h < q[1]; ++h) {
              const Index head = h / shared, g = h % shared;
              as_matrix(gradients.query.view()[b][h]).middleRows(queries.row, queries.tokens) +=
                  as_matrix(given.query.view()[head][g]);
              as_matrix(mine.key()[b][head]).middleRows(keys.row, keys.tokens) += as_matrix(given.key.view()[head][g]);
              as_matrix(mine.value()[b][head]).middleRows(keys.row, keys.tokens) +=
                  as_matrix(given.value.view()[head][g]);
            }
          }
        });
    sums.wait();
    if (hop > 0) mine += arriving;
    std::swap(leaving, mine);
    sums = communicator.shift(leaving.floats(), arriving.floats());
    transfer.wait();
    std::swap(held, next);
  }
  sums.wait();  // after W hops they are where they began
  copy(arriving.key(), gradients.key);
  copy(arriving.value(), gradients.value);
  return gradients;
}

}  // namespace flashkata
