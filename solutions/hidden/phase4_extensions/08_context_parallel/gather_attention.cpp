#include "context_parallel.hpp"
#include "solutions/hidden/phase4_extensions/08_context_parallel/chunk_pairs.hpp"

namespace flashkata {
namespace {

// Keys and values of the whole sequence, in its order.
struct Sequence {
  Tensor<float, 4> key;    // [B, Hk, S, D]
  Tensor<float, 4> value;  // [B, Hk, S, Dv]
};

Sequence gather(const LocalAttention& local, Communicator& communicator) {
  KeysAndValues mine = KeysAndValues::copy_of(local);
  const std::size_t each = mine.floats().size();
  const auto ranks = static_cast<std::size_t>(communicator.size());
  std::vector<float> all(ranks * each);
  communicator.all_gather(mine.floats(), all);
  std::vector<View<const float, 4>> keys, values;
  for (std::size_t r = 0; r < ranks; ++r) {
    keys.emplace_back(all.data() + r * each, local.key.shape());
    values.emplace_back(all.data() + r * each + local.key.count(), local.value.shape());
  }
  return {zigzag_merge(keys, local.tokens), zigzag_merge(values, local.tokens)};
}

// The slice of the sequence that a chunk of queries looks at begins with the first key. Under a causal mask its last
// query stands at the slice's last key, so that the slice is a rectangle aligned to the bottom right.
Index keys_for(const Part& part, Index rows, const LocalAttention& local) {
  return local.causal ? part.chunk * rows + part.tokens : local.tokens;
}

}  // namespace

TiledResult gather_attention(const LocalAttention& local, Communicator& communicator) {
  check_local_attention(local, communicator.size());
  const Zigzag zigzag{local.tokens, communicator.size()};
  const Shape<4>& q = local.query.shape();
  const Index key_heads = local.key.size(1);
  const Sequence sequence = gather(local, communicator);
  TiledResult result{filled_with<4>(0.0f, {q[0], q[1], q[2], local.value.size(3)}),
                     filled_with<3>(-std::numeric_limits<float>::infinity(), {q[0], q[1], q[2]})};
  for (const Part& part : parts_of(zigzag, communicator.rank())) {
    if (part.tokens == 0) continue;
    const Index keys = keys_for(part, chunk_rows(zigzag), local);
    for (Index b = 0; b < q[0]; ++b) {
      const auto here = [&](auto x) { return by_key_head(rows_of(x, part.row, part.tokens), b, key_heads); };
      const auto slice = [&](const Tensor<float, 4>& x) { return shared_by(rows_of(x.view(), 0, keys), b, q[1]); };
      const TiledResult attended =
          tiled_forward(here(local.query), slice(sequence.key), slice(sequence.value),
                        {.causal = local.causal, .scale = local.scale, .threads = 1});  // the ranks share the cores
      copy(attended.output, here(result.output.view()));
      const View<float, 3> lse = here(result.lse.view());
      for (Index head = 0; head < key_heads; ++head)
        for (Index g = 0; g < lse.size(1); ++g)
          for (Index i = 0; i < part.tokens; ++i) lse(head, g, i) = attended.lse(head, g, i);
    }
  }
  return result;
}

TiledGradients gather_attention_backward(const LocalAttention& local, View<const float, 4> output,
                                         View<const float, 3> lse, View<const float, 4> d_output,
                                         Communicator& communicator) {
  check_local_backward(local, output, lse, d_output, communicator.size());
  const Zigzag zigzag{local.tokens, communicator.size()};
  const Shape<4>& q = local.query.shape();
  const Index key_heads = local.key.size(1);
  const Sequence sequence = gather(local, communicator);

  // What this rank's queries have to say about the keys of all.
  Tensor<float, 4> d_query = filled_with<4>(0.0f, q);
  Tensor<float, 4> d_key = filled_with<4>(0.0f, sequence.key.shape());
  Tensor<float, 4> d_value = filled_with<4>(0.0f, sequence.value.shape());
  for (const Part& part : parts_of(zigzag, communicator.rank())) {
    if (part.tokens == 0) continue;
    const Index keys = keys_for(part, chunk_rows(zigzag), local);
    for (Index b = 0; b < q[0]; ++b) {
      const auto here = [&](auto x) { return by_key_head(rows_of(x, part.row, part.tokens), b, key_heads); };
      const auto slice = [&](const Tensor<float, 4>& x) { return shared_by(rows_of(x.view(), 0, keys), b, q[1]); };
      const TiledGradients given =
          tiled_backward(here(local.query), slice(sequence.key), slice(sequence.value), here(output), here(lse),
                         here(d_output), {.causal = local.causal, .scale = local.scale, .threads = 1});
      copy(given.query, here(d_query.view()));
      // The slices overlap, and heads share keys: sums.
      for (Index head = 0; head < key_heads; ++head) {
        for (Index g = 0; g < q[1] / key_heads; ++g) {
          as_matrix(d_key.view()[b][head]).topRows(keys) += as_matrix(given.key.view()[head][g]);
          as_matrix(d_value.view()[b][head]).topRows(keys) += as_matrix(given.value.view()[head][g]);
        }
      }
    }
  }

  // To each rank its own, where the other ranks' shares are added to it.
  std::vector<float> all;
  for (int r = 0; r < communicator.size(); ++r) {
    for (const Tensor<float, 4>* gradient : {&d_key, &d_value}) {
      const Tensor<float, 4> part = zigzag_split(*gradient, r, communicator.size());
      all.insert(all.end(), part.data(), part.data() + part.count());
    }
  }
  KeysAndValues mine(local);
  communicator.reduce_scatter(all, mine.floats());
  TiledGradients gradients{std::move(d_query), Tensor<float, 4>(local.key.shape()),
                           Tensor<float, 4>(local.value.shape())};
  copy(mine.key(), gradients.key);
  copy(mine.value(), gradients.value);
  return gradients;
}

}  // namespace flashkata
