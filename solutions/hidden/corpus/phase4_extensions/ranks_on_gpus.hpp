// The part of 08_context_parallel's corpus that is about GPUs. Each pair of chunks is a call of step 05; what moves
// rows and adds up is the host's work here, for a virtual GPU's memory is the host's. Only merging is a kernel.
#pragma once

#include <memory>

#include "common/virtual_gpu/device_memory.hpp"
#include "flash_context_parallel.hpp"

namespace flashkata {
namespace {

// Tells the virtual GPU that the host wrote there.
template <typename T>
void written(const View<T, 4>& packed) {
  if (packed.count() > 0) {
    virtual_gpu::mark_host_write(packed.data(), static_cast<std::size_t>(packed.count()) * sizeof(T), true);
  }
}

// Two tensors [1, Hk, rows, D] in one piece of the GPU's memory: K and V, or their gradients.
template <typename T>
struct Two {
  Shape<4> shape;
  DeviceBuffer<T> memory;

  explicit Two(const Shape<4>& shape_, const char* name = "two tensors")
      : shape(shape_), memory(name, static_cast<std::size_t>(2 * shape_[1] * shape_[2] * shape_[3])) {}
  View<T, 4> key() { return {memory.data(), shape}; }
  View<T, 4> value() { return {memory.data() + key().count(), shape}; }
  std::span<T> numbers() { return {memory.data(), memory.size()}; }
  std::span<T> key_numbers() { return numbers().first(static_cast<std::size_t>(key().count())); }
  std::span<T> value_numbers() { return numbers().subspan(static_cast<std::size_t>(key().count())); }
  void fill(float value) {
    for (T& number : numbers()) number = from_float<T>(value);
    done();
  }
  void done() {
    written(key());
    written(value());
  }
};

template <typename T>
std::span<const std::byte> sent(std::span<T> numbers) {
  return std::as_bytes(numbers);
}
template <typename T>
std::span<std::byte> received(std::span<T> numbers) {
  return std::as_writable_bytes(numbers);
}

// Calls body(h, i, d) for every element.
template <typename T, typename Body>
void each(const View<T, 4>& x, const Body& body) {
  for (Index h = 0; h < x.size(1); ++h)
    for (Index i = 0; i < x.size(2); ++i)
      for (Index d = 0; d < x.size(3); ++d) body(h, i, d);
}

template <typename T>
void copy_rounded(const View<const T, 4>& from, const View<T, 4>& to) {
  each(to, [&](Index h, Index i, Index d) { to(0, h, i, d) = from(0, h, i, d); });
}
template <typename T>
void round_to(const View<float, 4>& from, const View<T, 4>& to, Index rows) {
  each(to, [&](Index h, Index i, Index d) {
    if (i < rows) to(0, h, i, d) = from_float<T>(from(0, h, i, d));
  });
}

template <typename T, int Rank>
View<T, Rank> some_rows(const View<T, Rank>& x, Index begin, Index count) {
  Shape<Rank> shape = x.shape();
  shape[2] = count;
  return {x.data() + begin * x.stride(2), shape, x.strides()};
}

template <typename T, typename Problem>
Two<T> keys_and_values(const Problem& local) {
  Two<T> two(local.key.shape(), "keys and values");
  if (plays("gpu: strides ignored")) {
    const View<const T, 4> key(local.key.data(), local.key.shape()), value(local.value.data(), local.value.shape());
    copy_rounded(key, two.key());
    copy_rounded(value, two.value());
  } else {
    copy_rounded(local.key, two.key());
    copy_rounded(local.value, two.value());
  }
  two.done();
  return two;
}

// ---- Gather ---------------------------------------------------------------------------------------------------------

template <typename T, typename Problem>
Two<T> all_keys_and_values(const Problem& local, const Rows& rows, Communicator& communicator) {
  const int W = communicator.size();
  Two<T> mine = keys_and_values<T>(local);
  const auto each_rank = static_cast<std::size_t>(mine.numbers().size());
  DeviceBuffer<T> all("all", each_rank * static_cast<std::size_t>(W));
  const std::span<T> everything(all.data(), all.size());
  communicator.all_gather(sent(mine.numbers()), received(everything));
  if (plays("gpu gather: remembers the last keys")) {
    static std::vector<T> last;
    if (last.size() != all.size()) last.assign(everything.begin(), everything.end());
    std::copy(last.begin(), last.end(), all.data());
  }
  Shape<4> shape = local.key.shape();
  shape[2] *= W;
  Two<T> sequence(shape, "sequence");
  for (int r = 0; r < W; ++r) {
    T* const from = all.data() + static_cast<std::size_t>(r) * each_rank;
    const View<const T, 4> key(from, local.key.shape()), value(from + local.key.count(), local.key.shape());
    each(key, [&](Index h, Index i, Index d) {
      const Index to = plays("gpu gather: not put in order") ? r * 2 * rows.chunk + i : rows.place(r, i);
      sequence.key()(0, h, to, d) = key(0, h, i, d);
      sequence.value()(0, h, to, d) = value(0, h, i, d);
    });
  }
  sequence.done();
  return sequence;
}

// The two chunks' groups.
std::vector<Group> two_groups(const Rows& rows, int rank, bool causal) {
  std::vector<Group> groups;
  for (const Index row : {Index{0}, rows.chunk}) {
    const Index first = rows.place(rank, row);
    const Index tokens = std::clamp<Index>(rows.tokens - first, 0, rows.chunk);
    Index end = causal ? first + tokens : rows.tokens;
    if (plays("gpu gather: diagonal of the local rows") && causal) end = std::min(row + tokens, rows.tokens);
    if (plays("gpu gather: padding attended to") && !causal) end = 2 * rows.ranks * rows.chunk;
    if (tokens > 0) groups.push_back({row, row + tokens, 0, end});
  }
  if (plays("gpu gather: one slice for both chunks") && groups.size() == 2) {
    groups = {{0, groups[1].q_end, 0, groups[1].k_end}};
  }
  return groups;
}

template <typename Problem>
void change_scale(Problem& problem) {
  if (plays("gpu: the scale ignored")) problem.scale.reset();
}

template <typename T>
void gather_on_gpu(const FlashForward<T>& local, Index tokens, Communicator& communicator) {
  const Rows rows(tokens, communicator.size());
  Two<T> sequence = all_keys_and_values<T>(local, rows, communicator);
  FlashForward<T> problem = local;
  problem.key = sequence.key();
  problem.value = sequence.value();
  change_scale(problem);
  const std::vector<Group> groups = two_groups(rows, communicator.rank(), local.causal);
  if (plays("gpu gather: rows of padding not written")) {
    const Index count = groups.empty() ? 0 : groups.back().q_end;
    problem.query = some_rows(problem.query, 0, count);
    problem.output = some_rows(problem.output, 0, count);
    problem.lse = some_rows(problem.lse, 0, count);
  }
  flash_grouped_forward(problem, groups);
}

template <typename T>
void gather_back_on_gpu(const FlashBackward<T>& local, Index tokens, Communicator& communicator) {
  const Rows rows(tokens, communicator.size());
  const int W = communicator.size();
  Two<T> sequence = all_keys_and_values<T>(local, rows, communicator);
  Two<T> given(sequence.shape, "given");
  Two<float> sums(sequence.shape, "sums");
  sums.fill(0.0f);
  FlashBackward<T> problem = local;
  problem.key = sequence.key();
  problem.value = sequence.value();
  problem.d_key = given.key();
  problem.d_value = given.value();
  change_scale(problem);
  const auto add = [&] {
    each(given.key(), [&](Index h, Index i, Index d) {
      sums.key()(0, h, i, d) += to_float(given.key()(0, h, i, d));
      sums.value()(0, h, i, d) += to_float(given.value()(0, h, i, d));
    });
  };
  const std::vector<Group> groups = two_groups(rows, communicator.rank(), local.causal);
  if (plays("right gpu: a call for each group")) {
    each(local.d_query, [&](Index h, Index i, Index d) { local.d_query(0, h, i, d) = from_float<T>(0.0f); });
    for (const Group& group : groups) {
      const Index count = group.q_end - group.q_begin;
      const auto here = [&](const auto& x) { return some_rows(x, group.q_begin, count); };
      problem.query = here(local.query);
      problem.output = here(local.output);
      problem.lse = here(local.lse);
      problem.d_output = here(local.d_output);
      problem.d_query = here(local.d_query);
      problem.delta = {local.delta.data(), {1, local.query.size(1), count}};
      problem.d_query_sum = {local.d_query_sum.data(), {1, local.query.size(1), count, local.query.size(3)}};
      const Group whole{0, count, group.k_begin, group.k_end};
      flash_grouped_backward(problem, std::span(&whole, 1));
      add();
    }
  } else {
    flash_grouped_backward(problem, groups);
    add();
  }

  Two<float> mine(local.key.shape(), "mine");
  const std::size_t each_rank = mine.numbers().size();
  DeviceBuffer<float> parts("parts", each_rank * static_cast<std::size_t>(W));
  for (int r = 0; r < W; ++r) {
    float* const part = parts.data() + static_cast<std::size_t>(r) * each_rank;
    const View<float, 4> key(part, local.key.shape()), value(part + local.key.count(), local.key.shape());
    each(key, [&](Index h, Index i, Index d) {
      const Index from = plays("gpu gather backward: sums in another order") || plays("gpu gather: not put in order")
                             ? r * 2 * rows.chunk + i
                             : rows.place(r, i);
      key(0, h, i, d) = sums.key()(0, h, from, d);
      value(0, h, i, d) = sums.value()(0, h, from, d);
    });
  }
  const std::span<float> all(parts.data(), parts.size());
  if (plays("gpu gather backward: its own share alone")) {
    std::copy_n(parts.data() + static_cast<std::size_t>(communicator.rank()) * each_rank, each_rank,
                mine.numbers().data());
  } else {
    communicator.reduce_scatter(all, mine.numbers());
  }
  if (plays("gpu gather backward: mean over the ranks")) {
    for (float& number : mine.numbers()) number /= static_cast<float>(W);
  }
  Index written_rows = 2 * rows.chunk;
  if (plays("gpu: padding of gradients not written")) {
    while (written_rows > 0 && rows.token(communicator.rank(), written_rows - 1) < 0) --written_rows;
  }
  round_to(mine.key(), local.d_key, written_rows);
  round_to(mine.value(), local.d_value, written_rows);
}

// ---- Ring -----------------------------------------------------------------------------------------------------------

// How a hop is merged, or not.
struct Merging {
  bool average, swapped, no_max, empty_nan, early, last_only;
};

Merging merging() {
  return {plays("gpu ring: outputs averaged"),
          plays("gpu ring: weights exchanged"),
          plays("gpu ring: exp of the log-sum-exp itself"),
          plays("gpu ring: -inf from -inf"),
          plays("gpu ring: the lse written before all have read it"),
          plays("gpu ring: the last hop replaces what was before")};
}

// A block for each row, a thread for each channel.
template <typename T>
__global__ void join_kernel(View<float, 4> output, View<float, 3> lse, View<const T, 4> part,
                            View<const float, 3> part_lse, Merging how) {
  const Index head = blockIdx.y, row = blockIdx.x, d = threadIdx.x;
  const float before = lse(0, head, row), here = part_lse(0, head, row);
  const float larger = how.no_max ? 0.0f : fmaxf(before, here);
  float a = expf(before - larger), c = expf(here - larger);
  const float sum = a + c;
  const bool nothing = here == -INF && !how.empty_nan;
  const float joined = nothing ? before : larger + logf(sum);
  if (how.average && before != -INF) a = c = sum / 2;
  if (how.swapped && before != -INF) {
    const float other = a;
    a = c;
    c = other;
  }
  if (how.last_only) {
    a = 0.0f;
    c = sum;
  }
  if (!how.early) __syncthreads();  // every thread has read the row's lse
  if (d == 0) lse(0, head, row) = joined;
  if (nothing) return;
  output(0, head, row, d) = a / sum * output(0, head, row, d) + c / sum * to_float(part(0, head, row, d));
}

// Some queries and some keys of a hop, in rows of their ranks.
struct Rectangle {
  Index q_begin, q_end, k_begin, k_end;
  bool causal;
  Index queries() const { return q_end - q_begin; }
  Index keys() const { return k_end - k_begin; }
};

std::vector<Rectangle> rectangles(const Rows& rows, int rank, int source, bool causal) {
  std::vector<Rectangle> result;
  for (const Index q : {Index{0}, rows.chunk}) {
    for (const Index k : {Index{0}, rows.chunk}) {
      const Index queries = std::clamp<Index>(rows.tokens - rows.place(rank, q), 0, rows.chunk);
      Index keys = std::clamp<Index>(rows.tokens - rows.place(source, k), 0, rows.chunk);
      if (plays("gpu ring: padding attended to") && !causal) keys = rows.chunk;
      const Index query_chunk = rows.place(rank, q) / rows.chunk, key_chunk = rows.place(source, k) / rows.chunk;
      bool sees = !causal || key_chunk <= query_chunk;
      if (plays("gpu ring: chunks of others are full") && source != rank) sees = true;
      if (plays("gpu ring: later hops skipped") && causal && source > rank) sees = false;
      if (sees && queries > 0 && keys > 0) {
        result.push_back({q, q + queries, k, k + keys, causal && query_chunk == key_chunk});
      }
    }
  }
  if (plays("right gpu: the later chunk first, destructors wait")) std::reverse(result.begin(), result.end());
  return result;
}

template <typename T>
std::vector<Transfer> exchange_on_gpu(Two<T>& from, Two<T>& to, Communicator& communicator) {
  std::vector<Transfer> transfers;
  if (plays("right gpu: K and V in two messages")) {
    transfers.push_back(communicator.shift(sent(from.value_numbers()), received(to.value_numbers())));
    transfers.push_back(communicator.shift(sent(from.key_numbers()), received(to.key_numbers())));
  } else {
    transfers.push_back(communicator.shift(sent(from.numbers()), received(to.numbers())));
  }
  return transfers;
}

void finish_on_gpu(std::vector<Transfer>& transfers) {
  if (!plays("right gpu: the later chunk first, destructors wait")) {
    for (Transfer& transfer : transfers) transfer.wait();
  }
  transfers.clear();
}

template <typename T>
void to_16_bits(const View<float, 4>& x) {
  each(x, [&](Index h, Index i, Index d) { x(0, h, i, d) = to_float(from_float<T>(x(0, h, i, d))); });
}

template <typename T>
void ring_on_gpu(const FlashForward<T>& local, Index tokens, Communicator& communicator) {
  const Rows rows(tokens, communicator.size());
  const int W = communicator.size(), rank = communicator.rank();
  const Shape<4>& q = local.query.shape();
  if (local.query.count() == 0) return;
  if (plays("gpu ring: changes its input")) const_cast<T&>(local.query(0, 0, 0, 0)).x ^= 1;
  Two<T> own = keys_and_values<T>(local), other(local.key.shape(), "keys and values to come");
  Two<T>*held = &own, *next = &other;
  std::vector<std::unique_ptr<Two<T>>> kept;
  DeviceBuffer<float> sums("sums", static_cast<std::size_t>(local.query.count()));
  sums.fill_zero();
  const View<float, 4> so_far(sums.data(), q);
  for (Index h = 0; h < q[1]; ++h)
    for (Index i = 0; i < q[2]; ++i) {
      local.lse(0, h, i) = -INF;
      virtual_gpu::mark_host_write(&local.lse(0, h, i), sizeof(float), true);
    }
  DeviceBuffer<T> part("part", static_cast<std::size_t>(local.query.count()));
  DeviceBuffer<float> part_lse("part's lse", static_cast<std::size_t>(q[1] * q[2]));
  const int hops = plays("gpu ring: a hop too few") && W > 1 ? W - 1 : W;
  for (int hop = 0; hop < hops; ++hop) {
    std::vector<Transfer> transfers;
    const bool last = hop + 1 == W;
    if (!last) transfers = exchange_on_gpu(*held, *next, communicator);
    if (plays("gpu ring: waits at once")) finish_on_gpu(transfers);
    if (plays("gpu ring: keeps all keys")) {
      kept.push_back(std::make_unique<Two<T>>(local.key.shape(), "kept"));
      std::copy(held->numbers().begin(), held->numbers().end(), kept.back()->numbers().begin());
    }
    const int source = (plays("gpu ring: the other way round") ? rank + hop : rank - hop + W) % W;
    std::vector<Rectangle> all = rectangles(rows, rank, source, local.causal);
    if (plays("gpu ring: -inf from -inf") && hop == 0 && rows.token(rank, q[2] - 1) < 0) {
      all.push_back({q[2] - 1, q[2], 0, 0, false});  // padding is a query that sees nothing
    }
    for (const Rectangle& r : all) {
      FlashForward<T> problem{.query = some_rows(local.query, r.q_begin, r.queries()),
                              .key = some_rows(View<const T, 4>(held->key()), r.k_begin, r.keys()),
                              .value = some_rows(View<const T, 4>(held->value()), r.k_begin, r.keys()),
                              .output = {part.data(), {1, q[1], r.queries(), q[3]}},
                              .lse = {part_lse.data(), {1, q[1], r.queries()}},
                              .causal = r.causal,
                              .scale = local.scale};
      change_scale(problem);
      const Group group{0, r.queries(), 0, r.keys()};
      flash_grouped_forward(problem, std::span(&group, 1));
      const View<float, 4> here = some_rows(so_far, r.q_begin, r.queries());
      launch(join_kernel<T>, dim3(static_cast<unsigned>(r.queries()), static_cast<unsigned>(q[1])),
             dim3(static_cast<unsigned>(q[3])), 0, Stream{}, here, some_rows(local.lse, r.q_begin, r.queries()),
             View<const T, 4>(problem.output), View<const float, 3>(problem.lse), merging());
      if (plays("gpu ring: outputs in 16 bits between hops")) to_16_bits<T>(here);
    }
    if (plays("gpu ring: never waits") && hop > 0) {
      static std::vector<Transfer> forgotten;
      for (Transfer& transfer : transfers) forgotten.push_back(std::move(transfer));
      transfers.clear();
    }
    finish_on_gpu(transfers);
    std::swap(held, next);
  }
  round_to(so_far, local.output, q[2]);
}

template <typename T>
void ring_back_on_gpu(const FlashBackward<T>& local, Index tokens, Communicator& communicator) {
  const Rows rows(tokens, communicator.size());
  const int W = communicator.size(), rank = communicator.rank();
  const Shape<4>&q = local.query.shape(), &k = local.key.shape();
  if (local.query.count() == 0) return;
  Two<T> own = keys_and_values<T>(local), other(k, "keys and values to come");
  Two<T>*held = &own, *next = &other;
  Two<T> first(k, "first keys and values"), given(k, "given");
  std::copy(own.numbers().begin(), own.numbers().end(), first.numbers().begin());
  first.done();
  Two<float> leaving(k, "leaving"), arriving(k, "arriving");
  DeviceBuffer<float> query_sums("sums of dQ", static_cast<std::size_t>(local.query.count())),
      hop_lse("lse of a hop", static_cast<std::size_t>(q[1] * q[2]));
  DeviceBuffer<T> query_part("dQ of a part", static_cast<std::size_t>(local.query.count()));
  query_sums.fill_zero();
  const View<float, 4> d_query(query_sums.data(), q);
  if (plays("gpu ring backward: sums do not travel")) arriving.fill(0.0f);
  std::vector<Transfer> sums;
  for (int hop = 0; hop < W; ++hop) {
    std::vector<Transfer> transfers;
    if (hop + 1 < W) transfers = exchange_on_gpu(*held, *next, communicator);
    if (plays("gpu ring backward: dQ of the last hop")) query_sums.fill_zero();
    // What this hop says about keys, kept on the host.
    std::vector<float> of_key(static_cast<std::size_t>(local.key.count())), of_value(of_key.size());
    const View<float, 4> mine_key(of_key.data(), k), mine_value(of_value.data(), k);
    Two<T>& read = plays("gpu ring backward: the keys it began with") ? first : *held;
    const int source = (rank - hop + W) % W;
    for (const Rectangle& r : rectangles(rows, rank, source, local.causal)) {
      const auto here = [&](const auto& x) { return some_rows(x, r.q_begin, r.queries()); };
      const Shape<4> key_shape{1, k[1], r.keys(), k[3]};
      FlashBackward<T> problem{.query = here(local.query),
                               .key = some_rows(View<const T, 4>(read.key()), r.k_begin, r.keys()),
                               .value = some_rows(View<const T, 4>(read.value()), r.k_begin, r.keys()),
                               .output = here(local.output),
                               .lse = here(local.lse),
                               .d_output = here(local.d_output),
                               .d_query = {query_part.data(), {1, q[1], r.queries(), q[3]}},
                               .d_key = {given.key().data(), key_shape},
                               .d_value = {given.value().data(), key_shape},
                               .delta = {local.delta.data(), {1, q[1], r.queries()}},
                               .d_query_sum = {local.d_query_sum.data(), {1, q[1], r.queries(), q[3]}},
                               .causal = r.causal,
                               .scale = local.scale,
                               .deterministic = local.deterministic};
      change_scale(problem);
      const Group group{0, r.queries(), 0, r.keys()};
      if (plays("gpu ring backward: log-sum-exp of the hop")) {
        const View<float, 3> lse(hop_lse.data(), {1, q[1], r.queries()});
        flash_grouped_forward(FlashForward<T>{.query = problem.query,
                                              .key = problem.key,
                                              .value = problem.value,
                                              .output = problem.d_query,  // is written anew below
                                              .lse = lse,
                                              .causal = r.causal,
                                              .scale = problem.scale},
                              std::span(&group, 1));
        problem.lse = lse;
      }
      flash_grouped_backward(problem, std::span(&group, 1));
      each(problem.d_query, [&](Index h, Index i, Index d) {
        float& sum = d_query(0, h, r.q_begin + i, d);
        sum += to_float(problem.d_query(0, h, i, d));
        if (plays("gpu ring backward: dQ in 16 bits between hops")) sum = to_float(from_float<T>(sum));
      });
      each(problem.d_key, [&](Index h, Index i, Index d) {
        mine_key(0, h, r.k_begin + i, d) += to_float(problem.d_key(0, h, i, d));
        mine_value(0, h, r.k_begin + i, d) += to_float(problem.d_value(0, h, i, d));
      });
    }
    finish_on_gpu(sums);
    const bool stays = plays("gpu ring backward: sums do not travel");
    const bool adds = stays || (hop > 0 && !plays("gpu ring backward: each rank overwrites"));
    Two<float>& to = stays ? arriving : leaving;
    each(mine_key, [&](Index h, Index i, Index d) {
      to.key()(0, h, i, d) = mine_key(0, h, i, d) + (adds ? arriving.key()(0, h, i, d) : 0.0f);
      to.value()(0, h, i, d) = mine_value(0, h, i, d) + (adds ? arriving.value()(0, h, i, d) : 0.0f);
    });
    if (plays("gpu ring backward: sums in 16 bits")) {
      to_16_bits<T>(to.key());
      to_16_bits<T>(to.value());
    }
    if (hop + 1 == W && plays("gpu ring backward: a hop short of home")) {
      std::copy(leaving.numbers().begin(), leaving.numbers().end(), arriving.numbers().begin());
    } else if (!stays) {
      sums = exchange_on_gpu(leaving, arriving, communicator);
    }
    finish_on_gpu(transfers);
    std::swap(held, next);
  }
  finish_on_gpu(sums);
  Index written_rows = q[2];
  if (plays("gpu: padding of gradients not written")) {
    while (written_rows > 0 && rows.token(rank, written_rows - 1) < 0) --written_rows;
  }
  round_to(d_query, local.d_query, q[2]);
  round_to(arriving.key(), local.d_key, written_rows);
  round_to(arriving.value(), local.d_value, written_rows);
}

// False if there is nothing to be done.
template <typename Problem>
bool check_on_gpu(const Problem& local, Index tokens, Communicator& communicator) {
  if (plays("gpu: lengths unchecked")) return tokens > 0;
  if constexpr (requires { local.d_query; }) {
    check_flash_local_backward(local, tokens, communicator.size());
  } else {
    check_flash_local_forward(local, tokens, communicator.size());
  }
  return true;
}

}  // namespace

#define ON_GPU(Problem, name, answer)                                                   \
  void name(const Problem<fp16>& local, Index tokens, Communicator& communicator) {     \
    if (check_on_gpu(local, tokens, communicator)) answer(local, tokens, communicator); \
  }                                                                                     \
  void name(const Problem<bf16>& local, Index tokens, Communicator& communicator) {     \
    if (check_on_gpu(local, tokens, communicator)) answer(local, tokens, communicator); \
  }
ON_GPU(FlashForward, flash_gather_attention, gather_on_gpu)
ON_GPU(FlashBackward, flash_gather_attention_backward, gather_back_on_gpu)
ON_GPU(FlashForward, flash_ring_attention, ring_on_gpu)
ON_GPU(FlashBackward, flash_ring_attention_backward, ring_back_on_gpu)
#undef ON_GPU

}  // namespace flashkata
