// Answers to 08_context_parallel, wrong and right. Every deviation stands where somebody made it. Attention is written
// out pair by pair here: a token is its place in the sequence, and each pair is asked for.
#include "context_parallel.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <optional>
#include <vector>

#include "../corpus.hpp"

namespace flashkata {
namespace {

using corpus::plays;
using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    {"zigzag: r and r + W", "zigzag-not-mirrored"},
    {"zigzag: 2r and 2r + 1", "zigzag-contiguous"},
    {"zigzag: the later chunk first", UNNAMED},
    {"zigzag: C rounded down", "ring-not-divisible"},
    {"zigzag: every chunk is full", "zigzag-padding-counted"},
    {"zigzag: less than no token", UNNAMED},
    {"zigzag: owner is the chunk modulo W", "zigzag-owner-modulo"},
    {"zigzag: the diagonal is full", "zigzag-diagonal-full"},
    {"zigzag: the future is causal", UNNAMED},
    {"zigzag: nothing is skipped", "zigzag-nothing-skipped"},
    {"zigzag: causal or not", "zigzag-always-causal"},
    {"zigzag: split leaves padding as it was", UNNAMED},
    {"zigzag: split ignores strides", UNNAMED},
    {"zigzag: merge ignores the zigzag", "zigzag-merge-order"},
    {"zigzag: merge turns the later chunk round", UNNAMED},
    {"zigzag: merge ignores strides", UNNAMED},
    {"gather: not put in order", "gather-not-in-order"},
    {"gather: one slice for both chunks", "grouped-slice-length"},
    {"gather: diagonal of the local rows", "ring-naive-chunks"},
    {"gather: padding attended to", "gather-padding-attended"},
    {"gather: heads dealt out in turn", "gqa-head-mapping"},
    {"gather: the scale ignored", "scale-arg-ignored"},
    {"gather: rows of padding not written", UNNAMED},
    {"gather: NaN times 0", UNNAMED},
    {"gather: remembers the last keys", UNNAMED},
    {"gather: heads repeated on the wire", UNNAMED},
    {"gather: a ring", UNNAMED},
    {"gather backward: its own share alone", "gather-own-share"},
    {"gather backward: sums in another order", "gather-sums-order"},
    {"gather backward: slices overwrite", "grouped-overlap-overwrite"},
    {"gather backward: the last head of a group", "gqa-bwd-overwrite"},
    {"gather backward: dK without the scale", "bwd-dk-no-scale"},
    {"gather backward: mean over the ranks", "gather-sums-averaged"},
    {"gather backward: all_reduce", UNNAMED},
    {"ring: chunks of others are full", "ring-chunks-full"},
    {"ring: later hops skipped", "ring-causal-step"},
    {"ring: the other way round", "ring-direction"},
    {"ring: padding attended to", "ring-padding-attended"},
    {"ring: outputs averaged", "merge-average"},
    {"ring: weights exchanged", "merge-swapped"},
    {"ring: exp of the log-sum-exp itself", "merge-no-max"},
    {"ring: a hop too few", "ring-hop-missing"},
    {"ring: three hops at most", UNNAMED},
    {"ring: waits at once", UNNAMED},
    {"ring: reads before it waits", UNNAMED},
    {"ring: changes what is being sent", UNNAMED},
    {"ring: gathers", UNNAMED},
    {"ring: keeps all keys", UNNAMED},
    {"ring: one exchange too many", UNNAMED},
    {"ring: rank 0 leaves", UNNAMED},
    {"ring: a rank crashes", UNNAMED},
    {"ring: a rank throws", UNNAMED},
    {"ring: another size on one rank", UNNAMED},
    {"ring: changes its input", UNNAMED},
    {"ring: other bits the second time", UNNAMED},
    {"ring backward: log-sum-exp of the hop", "ring-wrong-lse-bwd"},
    {"ring backward: the keys it began with", "ring-stale-kv-bwd"},
    {"ring backward: sums do not travel", "ring-sums-stay"},
    {"ring backward: a hop short of home", "ring-sums-not-home"},
    {"ring backward: each rank overwrites", "ring-sums-overwritten"},
    {"ring backward: dQ of the last hop", "bwd-dq-assign"},
    {"ring backward: waits at once", UNNAMED},
    {"arguments unchecked", UNNAMED},
    {"gpu: strides ignored", UNNAMED},
    {"gpu: the scale ignored", "scale-arg-ignored"},
    {"gpu: padding of gradients not written", UNNAMED},
    {"gpu: lengths unchecked", UNNAMED},
    {"gpu gather: not put in order", "gather-not-in-order"},
    {"gpu gather: one slice for both chunks", "grouped-slice-length"},
    {"gpu gather: diagonal of the local rows", "ring-naive-chunks"},
    {"gpu gather: padding attended to", "gather-padding-attended"},
    {"gpu gather: rows of padding not written", UNNAMED},
    {"gpu gather: remembers the last keys", UNNAMED},
    {"gpu gather backward: its own share alone", "gather-own-share"},
    {"gpu gather backward: sums in another order", "gather-sums-order"},
    {"gpu gather backward: mean over the ranks", "gather-sums-averaged"},
    {"gpu ring: chunks of others are full", "ring-chunks-full"},
    {"gpu ring: later hops skipped", "ring-causal-step"},
    {"gpu ring: the other way round", "ring-direction"},
    {"gpu ring: padding attended to", "ring-padding-attended"},
    {"gpu ring: outputs averaged", "merge-average"},
    {"gpu ring: weights exchanged", "merge-swapped"},
    {"gpu ring: exp of the log-sum-exp itself", "merge-no-max"},
    {"gpu ring: -inf from -inf", "merge-empty-nan"},
    {"gpu ring: the last hop replaces what was before", "merge-last-only"},
    {"gpu ring: the lse written before all have read it", "global-memory race"},
    {"gpu ring: outputs in 16 bits between hops", UNNAMED},
    {"gpu ring: a hop too few", "ring-hop-missing"},
    {"gpu ring: waits at once", UNNAMED},
    {"gpu ring: never waits", UNNAMED},
    {"gpu ring: changes its input", UNNAMED},
    {"gpu ring: keeps all keys", UNNAMED},
    {"gpu ring backward: log-sum-exp of the hop", "ring-wrong-lse-bwd"},
    {"gpu ring backward: the keys it began with", "ring-stale-kv-bwd"},
    {"gpu ring backward: sums do not travel", "ring-sums-stay"},
    {"gpu ring backward: a hop short of home", "ring-sums-not-home"},
    {"gpu ring backward: each rank overwrites", "ring-sums-overwritten"},
    {"gpu ring backward: dQ of the last hop", "bwd-dq-assign"},
    {"gpu ring backward: dQ in 16 bits between hops", UNNAMED},
    {"gpu ring backward: sums in 16 bits", UNNAMED},
    {"right: sums of numbers not yet divided", RIGHT},
    {"right: in double", RIGHT},
    {"right: from the last key to the first", RIGHT},
    {"right: keys turned round in the message", RIGHT},
    {"right: gathers once for K and once for V", RIGHT},
    {"right gpu: K and V in two messages", RIGHT},
    {"right gpu: a call for each group", RIGHT},
    {"right gpu: the later chunk first, destructors wait", RIGHT},
};

constexpr float INF = std::numeric_limits<float>::infinity();

// Where a rank's rows stand in the sequence.
struct Rows {
  Index tokens, chunk;
  int ranks;

  Rows(Index tokens_, int ranks_) : tokens(tokens_), chunk((tokens_ + 2 * ranks_ - 1) / (2 * ranks_)), ranks(ranks_) {}
  // The token in a row, or -1.
  Index token(int rank, Index row) const {
    const Index t = place(rank, row);
    return t < tokens ? t : -1;
  }
  Index place(int rank, Index row) const {
    return row < chunk ? rank * chunk + row : (2 * ranks - 1 - rank) * chunk + row - chunk;
  }
};

// K and V of one rank, as a message.
struct Message {
  Shape<4> k, v;
  std::vector<float> floats;

  explicit Message(const LocalAttention& local)
      : k(local.key.shape()),
        v(local.value.shape()),
        floats(static_cast<std::size_t>(local.key.count() + local.value.count())) {}
  View<float, 4> key() { return {floats.data(), k}; }
  View<float, 4> value() { return {floats.data() + key().count(), v}; }
  std::span<float> key_floats() { return std::span(floats).first(static_cast<std::size_t>(key().count())); }
  std::span<float> value_floats() { return std::span(floats).subspan(static_cast<std::size_t>(key().count())); }
};

void copy(const View<const float, 4>& from, const View<float, 4>& to) {
  for (Index b = 0; b < from.size(0); ++b)
    for (Index h = 0; h < from.size(1); ++h)
      for (Index i = 0; i < from.size(2); ++i)
        for (Index d = 0; d < from.size(3); ++d) to(b, h, i, d) = from(b, h, i, d);
}

Message message_of(const LocalAttention& local) {
  Message message(local);
  copy(local.key, message.key());
  copy(local.value, message.value());
  return message;
}

template <int Rank>
Tensor<float, Rank> constant(float value, const Shape<Rank>& shape) {
  Tensor<float, Rank> result(shape);
  std::fill_n(result.data(), result.count(), value);
  return result;
}

// One key of one head, and where it comes from.
struct Key {
  const float* key;
  const float* value;
  float* d_key;
  float* d_value;
};

struct Problem {
  const LocalAttention& local;
  Rows rows;
  int rank;
  float scale;

  Problem(const LocalAttention& local_, const Communicator& communicator)
      : local(local_),
        rows(local_.tokens, communicator.size()),
        rank(communicator.rank()),
        scale(local_.scale.value_or(1.0f / std::sqrt(static_cast<float>(local_.query.size(3))))) {
    if (plays("gather: the scale ignored")) scale = 1.0f / std::sqrt(static_cast<float>(local_.query.size(3)));
  }

  Index kv_head(Index h) const { return h / (local.query.size(1) / local.key.size(1)); }

  template <typename Number>
  Number dot(const float* a, const float* b, Index count) const {
    Number sum = 0;
    for (Index d = 0; d < count; ++d) sum += static_cast<Number>(a[d]) * static_cast<Number>(b[d]);
    return sum;
  }
};

// Attention of one row over these keys: output and log-sum-exp.
template <typename Number = float>
float attend(const Problem& p, const float* q, const std::vector<Key>& keys, Number* output) {
  const Index D = p.local.query.size(3), Dv = p.local.value.size(3);
  std::fill_n(output, Dv, Number(0));
  if (keys.empty()) return -INF;
  std::vector<Number> scores;
  Number largest = -std::numeric_limits<Number>::infinity();
  for (const Key& key : keys) {
    scores.push_back(static_cast<Number>(p.scale) * p.dot<Number>(q, key.key, D));
    largest = std::max(largest, scores.back());
  }
  Number sum = 0;
  for (std::size_t j = 0; j < keys.size(); ++j) {
    const Number weight = std::exp(scores[j] - largest);
    sum += weight;
    for (Index d = 0; d < Dv; ++d) output[d] += weight * static_cast<Number>(keys[j].value[d]);
  }
  for (Index d = 0; d < Dv; ++d) output[d] /= sum;
  return static_cast<float>(largest + std::log(sum));
}

// What one row gives to the gradients of these keys, and what it gets.
void go_back(const Problem& p, const float* q, const float* d_output, float lse, float delta,
             const std::vector<Key>& keys, float* d_query) {
  const Index D = p.local.query.size(3), Dv = p.local.value.size(3);
  for (const Key& key : keys) {
    const float weight = std::exp(p.scale * p.dot<float>(q, key.key, D) - lse);
    const float d_score = weight * (p.dot<float>(d_output, key.value, Dv) - delta);
    for (Index d = 0; d < Dv; ++d) key.d_value[d] += weight * d_output[d];
    const float scale = plays("gather backward: dK without the scale") ? 1.0f : p.scale;
    for (Index d = 0; d < D; ++d) key.d_key[d] += scale * d_score * q[d];
    for (Index d = 0; d < D; ++d) d_query[d] += p.scale * d_score * key.key[d];
  }
}

float delta_of(const View<const float, 4>& output, const View<const float, 4>& d_output, Index b, Index h, Index i) {
  float delta = 0.0f;
  for (Index d = 0; d < output.size(3); ++d) delta += output(b, h, i, d) * d_output(b, h, i, d);
  return delta;
}

template <typename Body>
void each_row(const LocalAttention& local, const Body& body) {
  for (Index b = 0; b < local.query.size(0); ++b)
    for (Index h = 0; h < local.query.size(1); ++h)
      for (Index i = 0; i < local.query.size(2); ++i) body(b, h, i);
}

// ---- Gather ---------------------------------------------------------------------------------------------------------

struct Gathered {
  Tensor<float, 4> key, value;  // [B, Hk, 2WC, .], in the order of the sequence
};

Gathered gather(const Problem& p, Communicator& communicator) {
  const LocalAttention& local = p.local;
  const int W = communicator.size();
  Message mine = message_of(local);
  const std::size_t each = mine.floats.size(), keys = mine.key_floats().size();
  std::vector<float> all(each * static_cast<std::size_t>(W));
  if (plays("gather: heads repeated on the wire")) {
    std::vector<float> twice(2 * each), all_twice(2 * all.size());
    std::copy(mine.floats.begin(), mine.floats.end(), twice.begin());
    communicator.all_gather(twice, all_twice);
    for (int r = 0; r < W; ++r) {
      std::copy_n(all_twice.begin() + 2 * r * static_cast<Index>(each), each,
                  all.begin() + r * static_cast<Index>(each));
    }
  } else if (plays("gather: a ring")) {
    std::vector<float> held = mine.floats, next(each);
    for (int hop = 0; hop < W; ++hop) {
      std::copy(held.begin(), held.end(), all.begin() + ((p.rank - hop + W) % W) * static_cast<Index>(each));
      communicator.shift(held, next).wait();
      std::swap(held, next);
    }
  } else if (plays("right: gathers once for K and once for V")) {
    std::vector<float> all_keys(keys * static_cast<std::size_t>(W)),
        all_values((each - keys) * static_cast<std::size_t>(W));
    communicator.all_gather(mine.value_floats(), all_values);
    communicator.all_gather(mine.key_floats(), all_keys);
    for (std::size_t r = 0; r < static_cast<std::size_t>(W); ++r) {
      std::copy_n(all_keys.data() + r * keys, keys, all.data() + r * each);
      std::copy_n(all_values.data() + r * (each - keys), each - keys, all.data() + r * each + keys);
    }
  } else {
    communicator.all_gather(mine.floats, all);
  }
  if (plays("gather: remembers the last keys")) {
    static std::vector<float> last;
    if (last.size() != all.size()) last = all;
    all = last;
  }
  const Index rows = 2 * p.rows.chunk;
  Gathered result{Tensor<float, 4>({local.key.size(0), local.key.size(1), W * rows, local.key.size(3)}),
                  Tensor<float, 4>({local.key.size(0), local.key.size(1), W * rows, local.value.size(3)})};
  for (int r = 0; r < W; ++r) {
    const View<const float, 4> key(all.data() + static_cast<std::size_t>(r) * each, local.key.shape());
    const View<const float, 4> value(all.data() + static_cast<std::size_t>(r) * each + keys, local.value.shape());
    for (Index b = 0; b < key.size(0); ++b)
      for (Index h = 0; h < key.size(1); ++h)
        for (Index i = 0; i < rows; ++i) {
          const Index to = plays("gather: not put in order") ? r * rows + i : p.rows.place(r, i);
          for (Index d = 0; d < key.size(3); ++d) result.key(b, h, to, d) = key(b, h, i, d);
          for (Index d = 0; d < value.size(3); ++d) result.value(b, h, to, d) = value(b, h, i, d);
        }
  }
  return result;
}

// The keys that row i sees.
std::vector<Key> slice(const Problem& p, Gathered& all, Gathered* gradients, Index b, Index h, Index i) {
  const Index token = p.rows.token(p.rank, i);
  Index end = p.local.causal ? token + 1 : p.local.tokens;
  if (plays("gather: one slice for both chunks") && p.local.causal && i < p.rows.chunk) {
    const Index last = std::min(p.local.tokens, (2 * p.rows.ranks - p.rank) * p.rows.chunk);
    end = std::min(last, token + 1 + last - (p.rank + 1) * p.rows.chunk);
  }
  if (plays("gather: diagonal of the local rows") && p.local.causal) end = std::min(i + 1, p.local.tokens);
  if (plays("gather: padding attended to") && !p.local.causal) end = 2 * p.rows.ranks * p.rows.chunk;
  const Index head = plays("gather: heads dealt out in turn") ? h % p.local.key.size(1) : p.kv_head(h);
  std::vector<Key> keys;
  for (Index j = 0; j < end; ++j) {
    Key key{&all.key(b, head, j, 0), &all.value(b, head, j, 0), nullptr, nullptr};
    if (gradients != nullptr) {
      key.d_key = &gradients->key(b, head, j, 0);
      key.d_value = &gradients->value(b, head, j, 0);
    }
    keys.push_back(key);
  }
  if (plays("right: from the last key to the first")) std::reverse(keys.begin(), keys.end());
  return keys;
}

}  // namespace

// ---- The zigzag -----------------------------------------------------------------------------------------------------

Index chunk_rows(const Zigzag& zigzag) {
  if (!plays("arguments unchecked")) check_zigzag(zigzag);
  const Index chunks = 2 * zigzag.ranks;
  return plays("zigzag: C rounded down") ? zigzag.tokens / chunks : (zigzag.tokens + chunks - 1) / chunks;
}

Index chunk_tokens(const Zigzag& zigzag, Index chunk) {
  if (!plays("arguments unchecked")) check_chunk(zigzag, chunk);
  const Index rows = chunk_rows(zigzag);
  if (plays("zigzag: every chunk is full")) return rows;
  if (plays("zigzag: less than no token")) return std::min(rows, zigzag.tokens - chunk * rows);
  return std::clamp<Index>(zigzag.tokens - chunk * rows, 0, rows);
}

std::array<Index, 2> chunks_of(const Zigzag& zigzag, int rank) {
  if (!plays("arguments unchecked")) check_rank(rank, zigzag.ranks);
  if (plays("zigzag: r and r + W")) return {rank, rank + zigzag.ranks};
  if (plays("zigzag: 2r and 2r + 1")) return {2 * rank, 2 * rank + 1};
  if (plays("zigzag: the later chunk first")) return {2 * zigzag.ranks - 1 - rank, rank};
  return {rank, 2 * zigzag.ranks - 1 - rank};
}

int owner_of(const Zigzag& zigzag, Index chunk) {
  if (!plays("arguments unchecked")) check_chunk(zigzag, chunk);
  if (plays("zigzag: owner is the chunk modulo W")) return static_cast<int>(chunk % zigzag.ranks);
  for (int rank = 0; rank < zigzag.ranks; ++rank) {
    const auto chunks = chunks_of(zigzag, rank);
    if (chunks[0] == chunk || chunks[1] == chunk) return rank;
  }
  return 0;
}

Pairs pairs_of(Index query_chunk, Index key_chunk, bool causal) {
  if (plays("zigzag: causal or not")) causal = true;
  if (!causal) return Pairs::all;
  if (plays("zigzag: nothing is skipped") && key_chunk > query_chunk) return Pairs::all;
  if (plays("zigzag: the diagonal is full") && key_chunk == query_chunk) return Pairs::all;
  if (plays("zigzag: the future is causal") && key_chunk > query_chunk) return Pairs::causal;
  return key_chunk < query_chunk ? Pairs::all : key_chunk == query_chunk ? Pairs::causal : Pairs::none;
}

Tensor<float, 4> zigzag_split(View<const float, 4> whole, int rank, int ranks) {
  if (!plays("arguments unchecked")) check_rank(rank, ranks);
  if (plays("zigzag: split ignores strides")) whole = View<const float, 4>(whole.data(), whole.shape());
  const Zigzag zigzag{whole.size(2), ranks};
  const Index C = chunk_rows(zigzag);
  Tensor<float, 4> part({whole.size(0), whole.size(1), 2 * C, whole.size(3)});
  if (!plays("zigzag: split leaves padding as it was")) std::fill_n(part.data(), part.count(), 0.0f);
  const auto chunks = chunks_of(zigzag, rank);
  for (Index b = 0; b < whole.size(0); ++b)
    for (Index h = 0; h < whole.size(1); ++h)
      for (Index i = 0; i < 2 * C; ++i) {
        const Index token = chunks[i < C ? 0 : 1] * C + i % C;
        if (token >= whole.size(2)) continue;
        for (Index d = 0; d < whole.size(3); ++d) part(b, h, i, d) = whole(b, h, token, d);
      }
  return part;
}

Tensor<float, 4> zigzag_merge(std::span<const View<const float, 4>> parts, Index tokens) {
  if (!plays("arguments unchecked")) check_parts(parts, tokens);
  const Rows rows(tokens, static_cast<int>(parts.size()));
  const Shape<4> shape = parts.empty() ? Shape<4>{} : parts.front().shape();
  Tensor<float, 4> whole({shape[0], shape[1], tokens, shape[3]});
  for (int rank = 0; rank < rows.ranks; ++rank) {
    View<const float, 4> part = parts[static_cast<std::size_t>(rank)];
    if (plays("zigzag: merge ignores strides")) part = View<const float, 4>(part.data(), part.shape());
    for (Index b = 0; b < shape[0]; ++b)
      for (Index h = 0; h < shape[1]; ++h)
        for (Index i = 0; i < std::min(shape[2], 2 * rows.chunk); ++i) {
          Index token = rows.place(rank, i);
          if (plays("zigzag: merge ignores the zigzag")) token = rank * 2 * rows.chunk + i;
          if (plays("zigzag: merge turns the later chunk round") && i >= rows.chunk) {
            token = rows.place(rank, 3 * rows.chunk - 1 - i);
          }
          if (token >= tokens) continue;
          for (Index d = 0; d < shape[3]; ++d) whole(b, h, token, d) = part(b, h, i, d);
        }
  }
  return whole;
}

// ---- (b) ------------------------------------------------------------------------------------------------------------

TiledResult gather_attention(const LocalAttention& local, Communicator& communicator) {
  if (!plays("arguments unchecked")) check_local_attention(local, communicator.size());
  const Problem p(local, communicator);
  Gathered all = gather(p, communicator);
  const Shape<4>& q = local.query.shape();
  const float nothing = plays("gather: rows of padding not written") ? std::nanf("") : 0.0f;
  TiledResult result{constant<4>(nothing, {q[0], q[1], q[2], local.value.size(3)}),
                     constant<3>(nothing == 0.0f ? -INF : nothing, {q[0], q[1], q[2]})};
  each_row(local, [&](Index b, Index h, Index i) {
    if (p.rows.token(p.rank, i) < 0) return;
    const float* row = &local.query(b, h, i, 0);
    if (plays("right: in double")) {
      std::vector<double> output(static_cast<std::size_t>(local.value.size(3)));
      result.lse(b, h, i) = attend<double>(p, row, slice(p, all, nullptr, b, h, i), output.data());
      std::copy(output.begin(), output.end(), &result.output(b, h, i, 0));
      return;
    }
    result.lse(b, h, i) = attend(p, row, slice(p, all, nullptr, b, h, i), &result.output(b, h, i, 0));
    if (plays("gather: NaN times 0")) {
      for (Index j = 0; j < local.tokens; ++j)
        for (Index d = 0; d < local.value.size(3); ++d) {
          result.output(b, h, i, d) += 0.0f * all.value(b, p.kv_head(h), j, d);
        }
    }
  });
  return result;
}

TiledGradients gather_attention_backward(const LocalAttention& local, View<const float, 4> output,
                                         View<const float, 3> lse, View<const float, 4> d_output,
                                         Communicator& communicator) {
  if (!plays("arguments unchecked")) check_local_backward(local, output, lse, d_output, communicator.size());
  const Problem p(local, communicator);
  const int W = communicator.size();
  Gathered all = gather(p, communicator);
  Gathered sums{constant<4>(0.0f, all.key.shape()), constant<4>(0.0f, all.value.shape())};
  TiledGradients gradients{constant<4>(0.0f, local.query.shape()), Tensor<float, 4>(local.key.shape()),
                           Tensor<float, 4>(local.value.shape())};
  const Index shared = local.query.size(1) / local.key.size(1);
  const auto clear = [](Tensor<float, 4>& x, Index b, Index h, Index rows) {
    for (Index i = 0; i < rows; ++i)
      for (Index d = 0; d < x.size(3); ++d) x(b, h, i, d) = 0.0f;
  };
  each_row(local, [&](Index b, Index h, Index i) {
    if (plays("gather backward: the last head of a group") && i == 0 && h % shared == 0 && shared > 1) {
      clear(sums.key, b, p.kv_head(h), sums.key.size(2));
    }
    if (p.rows.token(p.rank, i) < 0) return;
    if (plays("gather backward: the last head of a group") && h % shared != shared - 1) {
      Gathered lost{constant<4>(0.0f, all.key.shape()), constant<4>(0.0f, all.value.shape())};
      go_back(p, &local.query(b, h, i, 0), &d_output(b, h, i, 0), lse(b, h, i), delta_of(output, d_output, b, h, i),
              slice(p, all, &lost, b, h, i), &gradients.query(b, h, i, 0));
      return;
    }
    if (plays("gather backward: slices overwrite") && i == p.rows.chunk) {
      const Index end = local.causal ? p.rows.token(p.rank, i) + p.rows.chunk : local.tokens;
      clear(sums.key, b, p.kv_head(h), std::min(end, sums.key.size(2)));
      clear(sums.value, b, p.kv_head(h), std::min(end, sums.key.size(2)));
    }
    go_back(p, &local.query(b, h, i, 0), &d_output(b, h, i, 0), lse(b, h, i), delta_of(output, d_output, b, h, i),
            slice(p, all, &sums, b, h, i), &gradients.query(b, h, i, 0));
  });

  // By owner.
  std::vector<Message> parts(static_cast<std::size_t>(W), Message(local));
  const Index rows = 2 * p.rows.chunk;
  for (int r = 0; r < W; ++r) {
    Message& part = parts[static_cast<std::size_t>(r)];
    for (Index b = 0; b < local.key.size(0); ++b)
      for (Index h = 0; h < local.key.size(1); ++h)
        for (Index i = 0; i < rows; ++i) {
          const Index from = plays("gather backward: sums in another order") || plays("gather: not put in order")
                                 ? r * rows + i
                                 : p.rows.place(r, i);
          for (Index d = 0; d < local.key.size(3); ++d) part.key()(b, h, i, d) = sums.key(b, h, from, d);
          for (Index d = 0; d < local.value.size(3); ++d) part.value()(b, h, i, d) = sums.value(b, h, from, d);
        }
  }
  std::vector<float> flat;
  for (Message& part : parts) flat.insert(flat.end(), part.floats.begin(), part.floats.end());
  Message mine(local);
  if (plays("gather backward: its own share alone")) {
    mine = parts[static_cast<std::size_t>(p.rank)];
  } else if (plays("gather backward: all_reduce")) {
    communicator.all_reduce(flat);
    std::copy_n(flat.begin() + p.rank * static_cast<Index>(mine.floats.size()), mine.floats.size(),
                mine.floats.begin());
  } else {
    communicator.reduce_scatter(flat, mine.floats);
  }
  if (plays("gather backward: mean over the ranks")) {
    for (float& number : mine.floats) number /= static_cast<float>(W);
  }
  copy(mine.key(), gradients.key);
  copy(mine.value(), gradients.value);
  return gradients;
}

// ---- (c) ------------------------------------------------------------------------------------------------------------

namespace {

// The keys of `source` that row i sees.
std::vector<Key> keys_of(const Problem& p, Message& held, Message* gradients, int source, Index b, Index h, Index i) {
  const Index token = p.rows.token(p.rank, i);
  std::vector<Key> keys;
  for (Index j = 0; j < 2 * p.rows.chunk; ++j) {
    Index key = p.rows.token(source, j);
    if (plays("ring: padding attended to") && key < 0 && !p.local.causal) key = 0;
    if (key < 0) continue;
    bool sees = !p.local.causal || key <= token;
    if (plays("ring: chunks of others are full") && source != p.rank) sees = true;
    if (plays("ring: later hops skipped") && source > p.rank && p.local.causal) sees = false;
    if (!sees) continue;
    const Index row = plays("right: keys turned round in the message") ? 2 * p.rows.chunk - 1 - j : j;
    const Index head = p.kv_head(h);
    Key one{&held.key()(b, head, row, 0), &held.value()(b, head, row, 0), nullptr, nullptr};
    if (gradients != nullptr) {
      one.d_key = &gradients->key()(b, head, row, 0);
      one.d_value = &gradients->value()(b, head, row, 0);
    }
    keys.push_back(one);
  }
  return keys;
}

// Begins the exchange of a message.
std::vector<Transfer> exchange(Message& from, Message& to, Communicator& communicator) {
  std::vector<Transfer> transfers;
  transfers.push_back(communicator.shift(from.floats, to.floats));
  return transfers;
}

void finish(std::vector<Transfer>& transfers) {
  for (Transfer& transfer : transfers) transfer.wait();
  transfers.clear();
}

void turn_round(Message& message) {
  if (!plays("right: keys turned round in the message")) return;
  for (const View<float, 4>& x : {message.key(), message.value()})
    for (Index b = 0; b < x.size(0); ++b)
      for (Index h = 0; h < x.size(1); ++h)
        for (Index i = 0; i < x.size(2) / 2; ++i)
          for (Index d = 0; d < x.size(3); ++d) std::swap(x(b, h, i, d), x(b, h, x.size(2) - 1 - i, d));
}

void join(float* output, float& lse, const std::vector<float>& other, float other_lse) {
  if (other_lse == -INF) return;
  const float larger = plays("ring: exp of the log-sum-exp itself") ? 0.0f : std::max(lse, other_lse);
  float a = std::exp(lse - larger), c = std::exp(other_lse - larger);
  const float sum = a + c;
  if (plays("ring: outputs averaged") && a > 0.0f) a = c = sum / 2;
  if (plays("ring: weights exchanged") && a > 0.0f) std::swap(a, c);
  for (std::size_t d = 0; d < other.size(); ++d) output[d] = a / sum * output[d] + c / sum * other[d];
  lse = larger + std::log(sum);
}

}  // namespace

TiledResult ring_attention(const LocalAttention& local, Communicator& communicator) {
  if (!plays("arguments unchecked")) check_local_attention(local, communicator.size());
  if (plays("ring: gathers")) return gather_attention(local, communicator);
  const Problem p(local, communicator);
  const int W = communicator.size();
  const Shape<4>& q = local.query.shape();
  const auto width = static_cast<std::size_t>(local.value.size(3));
  if (plays("ring: changes its input") && local.query.count() > 0) {
    const_cast<float&>(local.query(0, 0, 0, 0)) += 1e-6f;
  }
  TiledResult result{constant<4>(0.0f, {q[0], q[1], q[2], local.value.size(3)}), constant<3>(-INF, {q[0], q[1], q[2]})};
  Tensor<double, 4> sums(
      {q[0], q[1], q[2], local.value.size(3) + 2});  // sum of weights times values, of weights, maximum
  std::fill_n(sums.data(), sums.count(), 0.0);

  Message held = message_of(local), next(local);
  turn_round(held);
  std::vector<Message> kept;
  int hops = W;
  if (plays("ring: a hop too few") && W > 1) hops = W - 1;
  if (plays("ring: three hops at most")) hops = std::min(W, 3);
  for (int hop = 0; hop < hops; ++hop) {
    std::vector<Transfer> transfers;
    const bool last = hop + 1 == W && !plays("ring: one exchange too many");
    if (plays("ring: rank 0 leaves") && p.rank == 0 && hop > 0) break;
    if (plays("ring: a rank crashes") && p.rank == 1 && hop > 0) std::abort();
    if (plays("ring: a rank throws") && p.rank == 2) throw std::runtime_error("no more");
    if (plays("ring: another size on one rank") && p.rank == 1 && !last) {
      communicator.shift(std::span<const float>(held.floats).first(1), next.floats).wait();
    } else if (!last) {
      transfers = exchange(held, next, communicator);
    }
    if (plays("ring: waits at once")) finish(transfers);
    Message& read = plays("ring: reads before it waits") && hop + 1 < W ? next : held;
    if (plays("ring: keeps all keys")) kept.push_back(held);
    const int source = (plays("ring: the other way round") ? p.rank + hop : p.rank - hop + W) % W;
    each_row(local, [&](Index b, Index h, Index i) {
      if (p.rows.token(p.rank, i) < 0) return;
      const std::vector<Key> keys = keys_of(p, read, nullptr, source, b, h, i);
      std::vector<float> output(width);
      const float lse = attend(p, &local.query(b, h, i, 0), keys, output.data());
      if (plays("right: sums of numbers not yet divided")) {
        if (lse == -INF) return;
        double& weight = sums(b, h, i, local.value.size(3));
        double& largest = sums(b, h, i, local.value.size(3) + 1);
        const double before = weight > 0 ? largest : -static_cast<double>(INF);
        largest = std::max(before, static_cast<double>(lse));
        const double old = weight > 0 ? std::exp(before - largest) : 0.0, now = std::exp(lse - largest);
        weight = weight * old + now;
        for (std::size_t d = 0; d < width; ++d) {
          double& sum = sums(b, h, i, static_cast<Index>(d));
          sum = sum * old + now * output[d];
        }
        return;
      }
      join(&result.output(b, h, i, 0), result.lse(b, h, i), output, lse);
    });
    if (plays("ring: changes what is being sent") && !last && !held.floats.empty()) held.floats[0] += 1.0f;
    finish(transfers);
    std::swap(held, next);
  }
  if (plays("right: sums of numbers not yet divided")) {
    each_row(local, [&](Index b, Index h, Index i) {
      const double weight = sums(b, h, i, local.value.size(3));
      if (weight == 0.0) return;
      for (std::size_t d = 0; d < width; ++d) {
        result.output(b, h, i, d) = static_cast<float>(sums(b, h, i, static_cast<Index>(d)) / weight);
      }
      result.lse(b, h, i) = static_cast<float>(sums(b, h, i, local.value.size(3) + 1) + std::log(weight));
    });
  }
  if (plays("ring: other bits the second time")) {
    static int calls = 0;
    if (result.output.count() > 0) result.output.data()[0] *= 1.0f + 2e-7f * static_cast<float>(calls++ % 2);
  }
  return result;
}

TiledGradients ring_attention_backward(const LocalAttention& local, View<const float, 4> output,
                                       View<const float, 3> lse, View<const float, 4> d_output,
                                       Communicator& communicator) {
  if (!plays("arguments unchecked")) check_local_backward(local, output, lse, d_output, communicator.size());
  const Problem p(local, communicator);
  const int W = communicator.size();
  TiledGradients gradients{constant<4>(0.0f, local.query.shape()), Tensor<float, 4>(local.key.shape()),
                           Tensor<float, 4>(local.value.shape())};
  Message held = message_of(local), next(local), leaving(local), arriving(local);
  turn_round(held);
  Message first = held;
  std::vector<Transfer> sums;
  for (int hop = 0; hop < W; ++hop) {
    std::vector<Transfer> transfers;
    if (hop + 1 < W) transfers = exchange(held, next, communicator);
    if (plays("ring backward: waits at once")) {
      finish(transfers);
      finish(sums);
    }
    Message mine(local);
    const int source = (p.rank - hop + W) % W;
    if (plays("ring backward: dQ of the last hop")) std::fill_n(gradients.query.data(), gradients.query.count(), 0.0f);
    each_row(local, [&](Index b, Index h, Index i) {
      if (p.rows.token(p.rank, i) < 0) return;
      Message& read = plays("ring backward: the keys it began with") ? first : held;
      const std::vector<Key> keys = keys_of(p, read, &mine, source, b, h, i);
      float row_lse = lse(b, h, i);
      if (plays("ring backward: log-sum-exp of the hop")) {
        std::vector<float> unused(static_cast<std::size_t>(local.value.size(3)));
        row_lse = attend(p, &local.query(b, h, i, 0), keys, unused.data());
      }
      go_back(p, &local.query(b, h, i, 0), &d_output(b, h, i, 0), row_lse, delta_of(output, d_output, b, h, i), keys,
              &gradients.query(b, h, i, 0));
    });
    finish(sums);
    const bool adds = hop > 0 && !plays("ring backward: each rank overwrites");
    if (plays("ring backward: sums do not travel")) {
      for (std::size_t at = 0; at < mine.floats.size(); ++at) arriving.floats[at] += mine.floats[at];
    } else {
      for (std::size_t at = 0; adds && at < mine.floats.size(); ++at) mine.floats[at] += arriving.floats[at];
      std::swap(leaving, mine);
      if (hop + 1 == W && plays("ring backward: a hop short of home")) {
        arriving = leaving;
      } else {
        sums = exchange(leaving, arriving, communicator);
      }
      if (plays("ring backward: waits at once")) finish(sums);
    }
    finish(transfers);
    std::swap(held, next);
  }
  finish(sums);
  turn_round(arriving);
  copy(arriving.key(), gradients.key);
  copy(arriving.value(), gradients.value);
  return gradients;
}

}  // namespace flashkata

#include "ranks_on_gpus.hpp"
