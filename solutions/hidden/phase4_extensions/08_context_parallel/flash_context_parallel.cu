// flash_context_parallel: one sequence on several GPUs, by a gather or around a ring; the way there and back
//
// New here   Nothing about attention: step 4.05's kernels do all of it, for two groups or for one rectangle at a time.
//            What is here is bookkeeping on the GPU: rows that change their places, hops that are merged, sums.
// Gather     gather -> order_rows -> flash_grouped_forward            two groups, the queries' two chunks
//            ... -> flash_grouped_backward -> rows_by_owner -> reduce_scatter -> copy_rows
// Ring       W hops: flash_grouped_forward | exchange of K and V, then merge_rows; at the end copy_rows
//            W hops: flash_grouped_backward | exchanges of K and V and of sums, then add_rows twice
// Grid       of all kernels here (ceil(rows / WARPS), heads, ranks) blocks of WARPS warps; a warp owns one row of a
// head Moves      each number once in and once out: bandwidth is the limit, and it is small beside the attention Try
// ./kata test 4.08    ./kata check 4.08
#include "flash_context_parallel.hpp"

namespace flashkata {
namespace {

constexpr int WARP = 32;
constexpr int WARPS = 4;  // of a block

// ---- Kernels that know nothing of attention -------------------------------------------------------------------------

// The row of the tensor [., ., rows, D] that this warp owns.
KATA_DEVICE Index row_of_warp() { return Index{blockIdx.x} * WARPS + threadIdx.x / WARP; }
KATA_DEVICE int lane_of_warp() { return static_cast<int>(threadIdx.x) % WARP; }

// One warp for each row of `like`.
template <typename... Parameters, typename Element, typename... Arguments>
void launch_rows(void (*kernel)(Parameters...), const View<Element, 4>& like, Arguments&&... arguments) {
  if (like.count() == 0) return;  // a grid must not be empty
  const dim3 grid(static_cast<unsigned>(ceil_div(like.size(2), WARPS)), static_cast<unsigned>(like.size(1)),
                  static_cast<unsigned>(like.size(0)));
  launch(kernel, grid, dim3(WARPS * WARP), /*shared bytes*/ 0, Stream{}, std::forward<Arguments>(arguments)...);
}

// to = from, rounded to To.
template <typename To, typename From>
__global__ void copy_rows_kernel(View<To, 4> to, View<const From, 4> from) {
  const Index row = row_of_warp();
  if (row >= to.size(2)) return;
  for (Index d = lane_of_warp(); d < to.size(3); d += WARP) {
    to(blockIdx.z, blockIdx.y, row, d) = from_float<To>(to_float(from(blockIdx.z, blockIdx.y, row, d)));
  }
}

// The zigzag as a kernel sees it.
struct Deal {
  Index rows;    // C, of a chunk
  Index tokens;  // S
  int ranks;     // W

  KATA_DEVICE int rank_of(Index token) const {
    const int chunk = static_cast<int>(token / rows);
    return chunk < ranks ? chunk : 2 * ranks - 1 - chunk;
  }
  KATA_DEVICE Index row_of(Index token) const { return token % rows + (token / rows < ranks ? 0 : rows); }
  KATA_DEVICE Index token_at(int rank, Index row) const {
    return row < rows ? rank * rows + row : (2 * ranks - 1 - rank) * rows + row - rows;
  }
};

// sequence [1, Hk, S, D] from what the ranks have, [W, Hk, 2C, D].
template <typename T>
__global__ void order_rows_kernel(View<T, 4> sequence, View<const T, 4> gathered, Deal deal) {
  const Index token = row_of_warp();
  if (token >= sequence.size(2)) return;
  const int rank = deal.rank_of(token);
  const Index row = deal.row_of(token);
  for (Index d = lane_of_warp(); d < sequence.size(3); d += WARP) {
    sequence(0, blockIdx.y, token, d) = gathered(rank, blockIdx.y, row, d);
  }
}

// The way back, as floats: parts [W, Hk, 2C, D] from sequence [1, Hk, S, D]; padding is 0.
template <typename T>
__global__ void rows_by_owner_kernel(View<float, 4> parts, View<const T, 4> sequence, Deal deal) {
  const Index row = row_of_warp();
  if (row >= parts.size(2)) return;
  const Index token = deal.token_at(static_cast<int>(blockIdx.z), row);
  for (Index d = lane_of_warp(); d < parts.size(3); d += WARP) {
    parts(blockIdx.z, blockIdx.y, row, d) = token < deal.tokens ? to_float(sequence(0, blockIdx.y, token, d)) : 0.0f;
  }
}

// sum = before + term. `term` may have fewer rows: behind them it is 0. `before` may be `sum`; without `adds` it is 0,
// whatever it holds.
template <typename T>
__global__ void add_rows_kernel(View<float, 4> sum, View<const float, 4> before, View<const T, 4> term, bool adds) {
  const Index row = row_of_warp();
  if (row >= sum.size(2)) return;
  for (Index d = lane_of_warp(); d < sum.size(3); d += WARP) {
    const float old = adds ? before(0, blockIdx.y, row, d) : 0.0f;
    sum(0, blockIdx.y, row, d) = row < term.size(2) ? old + to_float(term(0, blockIdx.y, row, d)) : old;
  }
}

// Step 2.02 for one row a warp: output and lse of the keys so far, and those of a hop, become those of both. In the
// first hop nothing has been before it, and what is there is not looked at.
template <typename T>
__global__ void merge_rows_kernel(View<float, 4> output, View<float, 3> lse, View<const T, 4> hop_output,
                                  View<const float, 3> hop_lse, bool first) {
  const Index row = row_of_warp();
  if (row >= output.size(2)) return;
  const Index head = blockIdx.y;
  const float here = hop_lse(0, head, row);
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  if (!first && here == minus_infinity) return;  // no key of this hop; also keeps -inf - -inf away
  const float before = first ? minus_infinity : lse(0, head, row);
  const float larger = fmaxf(before, here);
  const float weight_before = first ? 0.0f : __expf(before - larger);
  const float weight_here = first ? 1.0f : __expf(here - larger);
  const float sum = weight_before + weight_here;
  for (Index d = lane_of_warp(); d < output.size(3); d += WARP) {
    const float old = first ? 0.0f : output(0, head, row, d);
    output(0, head, row, d) = (weight_before * old + weight_here * to_float(hop_output(0, head, row, d))) / sum;
  }
  __syncwarp();  // every lane has read the row's lse: it may change
  if (lane_of_warp() == 0) lse(0, head, row) = first ? here : larger + logf(sum);
}

// ---- Views and messages ---------------------------------------------------------------------------------------------

// Rows begin .. begin + count - 1 of every head, of [1, H, S, D] or [1, H, S].
template <typename T, int Rank>
View<T, Rank> rows_of(const View<T, Rank>& x, Index begin, Index count) {
  Shape<Rank> shape = x.shape();
  shape[2] = count;
  return {x.data() + begin * x.stride(2), shape, x.strides()};
}

// A tensor on the GPU.
template <typename T>
struct Rows {
  DeviceBuffer<T> memory;
  Shape<4> shape;

  Rows(const char* name, const Shape<4>& shape_)
      : memory(name, static_cast<std::size_t>(shape_[0] * shape_[1] * shape_[2] * shape_[3])), shape(shape_) {}
  View<T, 4> view() { return {memory.data(), shape}; }
  // Its memory as a tensor with so many rows, one after the other.
  View<T, 4> view(Index rows) { return {memory.data(), {shape[0], shape[1], rows, shape[3]}}; }
};

// K and V of one rank, or of all, or their gradients, in one piece: [ranks, 2, Hk, rows, D].
template <typename T>
class Message {
 public:
  Message(const char* name, int ranks, const Shape<4>& key)
      : ranks_(ranks), key_(key), memory_(name, static_cast<std::size_t>(2 * ranks * key[1] * key[2] * key[3])) {}

  View<T, 4> key() { return part(0, key_[2]); }  // [ranks, Hk, rows, D]
  View<T, 4> value() { return part(1, key_[2]); }
  // The same with fewer rows, in the same memory.
  View<T, 4> key(Index rows) { return part(0, rows); }
  View<T, 4> value(Index rows) { return part(1, rows); }
  std::span<T> numbers() { return {memory_.data(), memory_.size()}; }
  std::span<const std::byte> bytes() { return std::as_bytes(numbers()); }
  std::span<std::byte> writable_bytes() { return std::as_writable_bytes(numbers()); }

 private:
  View<T, 4> part(Index which, Index rows) {
    const Index each = key_[1] * rows * key_[3];
    return {memory_.data() + which * each, {ranks_, key_[1], rows, key_[3]}, {2 * each, rows * key_[3], key_[3], 1}};
  }

  int ranks_;
  Shape<4> key_;
  DeviceBuffer<T> memory_;
};

template <typename To, typename From>
void copy_rows(const View<From, 4>& from, const View<To, 4>& to) {
  launch_rows(copy_rows_kernel<To, std::remove_const_t<From>>, to, to, from);
}

template <typename Problem>
auto message_of(const char* name, const Problem& local) {
  Message<std::remove_cvref_t<decltype(*local.output.data())>> message(name, 1, local.key.shape());
  copy_rows(local.key, message.key());
  copy_rows(local.value, message.value());
  return message;
}

// ---- The gather form ------------------------------------------------------------------------------------------------

Deal deal_of(const Zigzag& zigzag) { return {chunk_rows(zigzag), zigzag.tokens, zigzag.ranks}; }

// Keys and values of the whole sequence, in its order: a Message of one rank with S rows.
template <typename Problem>
auto gather(const Problem& local, const Zigzag& zigzag, Communicator& communicator) {
  auto mine = message_of("own keys and values", local);
  using T = std::remove_cvref_t<decltype(*mine.numbers().data())>;
  Message<T> all("gathered keys and values", zigzag.ranks, local.key.shape());
  communicator.all_gather(mine.bytes(), all.writable_bytes());
  Message<T> sequence("sequence of keys and values", 1, {1, local.key.size(1), zigzag.tokens, local.key.size(3)});
  launch_rows(order_rows_kernel<T>, sequence.key(), sequence.key(), all.key(), deal_of(zigzag));
  launch_rows(order_rows_kernel<T>, sequence.value(), sequence.value(), all.value(), deal_of(zigzag));
  return sequence;
}

// A rank's two chunks of queries, each with the slice of the sequence that it looks at. A slice begins with the first
// key; under a causal mask the last query of the chunk stands at the last key of its slice.
std::vector<Group> groups_of(const Zigzag& zigzag, int rank, bool causal) {
  const Index rows = chunk_rows(zigzag);
  std::vector<Group> groups;
  Index first_row = 0;
  for (const Index chunk : chunks_of(zigzag, rank)) {
    const Index tokens = chunk_tokens(zigzag, chunk);
    if (tokens > 0)
      groups.push_back({first_row, first_row + tokens, 0, causal ? chunk * rows + tokens : zigzag.tokens});
    first_row += rows;
  }
  return groups;
}

template <typename T>
void gather_forward(const FlashForward<T>& local, Index tokens, Communicator& communicator) {
  const Zigzag zigzag{tokens, communicator.size()};
  auto sequence = gather(local, zigzag, communicator);
  FlashForward<T> problem = local;
  problem.key = sequence.key();
  problem.value = sequence.value();
  flash_grouped_forward(problem, groups_of(zigzag, communicator.rank(), local.causal));
}

template <typename T>
void gather_backward(const FlashBackward<T>& local, Index tokens, Communicator& communicator) {
  const Zigzag zigzag{tokens, communicator.size()};
  auto sequence = gather(local, zigzag, communicator);

  // What this rank's queries have to say about the keys of all. Where the two slices overlap, 4.05 adds up.
  Message<T> gradients("gradients of the sequence", 1, sequence.key().shape());
  FlashBackward<T> problem = local;
  problem.key = sequence.key();
  problem.value = sequence.value();
  problem.d_key = gradients.key();
  problem.d_value = gradients.value();
  flash_grouped_backward(problem, groups_of(zigzag, communicator.rank(), local.causal));

  // To each rank its own, where the other ranks' shares are added to it.
  Message<float> parts("gradients by owner", zigzag.ranks, local.key.shape());
  launch_rows(rows_by_owner_kernel<T>, parts.key(), parts.key(), gradients.key(), deal_of(zigzag));
  launch_rows(rows_by_owner_kernel<T>, parts.value(), parts.value(), gradients.value(), deal_of(zigzag));
  Message<float> mine("own gradients", 1, local.key.shape());
  communicator.reduce_scatter(parts.numbers(), mine.numbers());
  copy_rows(mine.key(), local.d_key);
  copy_rows(mine.value(), local.d_value);
}

// ---- The ring form --------------------------------------------------------------------------------------------------

// What a rank computes while it holds the keys of `source`: rows q_begin .. q_end - 1 of its own with the first `keys`
// rows of theirs, in these groups, which count from q_begin.
struct Hop {
  Index q_begin, q_end, keys;
  bool causal;
  std::vector<Group> groups;

  Index queries() const { return q_end - q_begin; }
  bool empty() const { return queries() == 0 || keys == 0; }
};

// In the rows of a rank, tokens come first and padding last: if the earlier chunk is not full, the later one is empty.
Hop hop_of(const Zigzag& zigzag, int rank, int source, bool causal) {
  const auto tokens_of = [&](int r, int which) {
    return chunk_tokens(zigzag, chunks_of(zigzag, r)[static_cast<std::size_t>(which)]);
  };
  const Index rows = chunk_rows(zigzag);
  const Index queries = tokens_of(rank, 0) + tokens_of(rank, 1), keys = tokens_of(source, 0) + tokens_of(source, 1);
  if (source == rank) {  // all rows, so that those of padding are written as well
    std::vector<Group> groups{{0, tokens_of(rank, 0), 0, causal ? tokens_of(rank, 0) : keys}};
    if (tokens_of(rank, 1) > 0) groups.push_back({rows, queries, 0, keys});
    return {0, 2 * rows, 2 * rows, causal, groups};
  }
  Hop hop{0, queries, keys, false, {}};
  if (causal && source < rank) hop.keys = tokens_of(source, 0);        // its later chunk is behind both of ours
  if (causal && source > rank) hop.q_begin = std::min(rows, queries);  // both of its chunks are behind our earlier one
  hop.groups = {{0, hop.queries(), 0, hop.keys}};
  return hop;
}

// Whose keys a rank holds after so many hops: they come from rank - 1, which had them from rank - 2, ...
int source_of(int rank, int hop, int ranks) { return (rank - hop + ranks) % ranks; }

template <typename T>
void ring_forward(const FlashForward<T>& local, Index tokens, Communicator& communicator) {
  const Zigzag zigzag{tokens, communicator.size()};
  const Shape<4>& q = local.query.shape();
  Message<T> own = message_of("keys and values at hand", local),
             other("keys and values on their way", 1, local.key.shape());
  Message<T>*held = &own, *next = &other;
  Rows<T> hop_output("output of a hop", q);
  Rows<float> hop_lse("lse of a hop", {1, q[1], q[2], 1});
  Rows<float> output("output so far", q);  // its lse is local.lse

  for (int hop = 0; hop < zigzag.ranks; ++hop) {
    Transfer transfer;  // of what the next hop computes on, while this one computes
    if (hop + 1 < zigzag.ranks) transfer = communicator.shift(held->bytes(), next->writable_bytes());
    const Hop now =
        hop_of(zigzag, communicator.rank(), source_of(communicator.rank(), hop, zigzag.ranks), local.causal);
    if (hop == 0 || !now.empty()) {
      const View<float, 3> lse(hop_lse.memory.data(), {1, q[1], now.queries()});
      flash_grouped_forward(FlashForward<T>{.query = rows_of(local.query, now.q_begin, now.queries()),
                                            .key = rows_of(held->key(), 0, now.keys),
                                            .value = rows_of(held->value(), 0, now.keys),
                                            .output = hop_output.view(now.queries()),
                                            .lse = lse,
                                            .causal = now.causal,
                                            .scale = local.scale},
                            now.groups);
      const auto so_far = rows_of(output.view(), now.q_begin, now.queries());
      launch_rows(merge_rows_kernel<T>, so_far, so_far, rows_of(local.lse, now.q_begin, now.queries()),
                  hop_output.view(now.queries()), lse, hop == 0);
    }
    transfer.wait();  // what was sent may be overwritten by what is launched from now on, what has come may be read
    std::swap(held, next);
  }
  copy_rows(output.view(), local.output);
}

template <typename T>
void ring_backward(const FlashBackward<T>& local, Index tokens, Communicator& communicator) {
  const Zigzag zigzag{tokens, communicator.size()};
  const Shape<4>&q = local.query.shape(), &k = local.key.shape();
  Message<T> own = message_of("keys and values at hand", local), other("keys and values on their way", 1, k);
  Message<T>*held = &own, *next = &other;
  Rows<T> hop_query("gradient of the query, of a hop", q);
  Message<T> hop_keys("gradients of a hop", 1, k);
  Rows<float> d_query("gradient of the query so far", q);
  // Sums travel one hop behind their keys: what the ranks before this one have said about `held` arrives while this one
  // finds out what it has to say itself.
  Message<float> leaving("sums that leave", 1, k), arriving("sums that arrive", 1, k);
  Transfer sums;

  for (int hop = 0; hop < zigzag.ranks; ++hop) {
    Transfer transfer;
    if (hop + 1 < zigzag.ranks) transfer = communicator.shift(held->bytes(), next->writable_bytes());
    Hop now = hop_of(zigzag, communicator.rank(), source_of(communicator.rank(), hop, zigzag.ranks), local.causal);
    if (hop > 0 && now.empty()) now.keys = 0;  // nothing is added to what arrives
    if (hop == 0 || !now.empty()) {
      const auto here = [&](const auto& x) { return rows_of(x, now.q_begin, now.queries()); };
      // lse and output are those over all keys: so are the weights that are made from them.
      flash_grouped_backward(FlashBackward<T>{.query = here(local.query),
                                              .key = rows_of(held->key(), 0, now.keys),
                                              .value = rows_of(held->value(), 0, now.keys),
                                              .output = here(local.output),
                                              .lse = here(local.lse),
                                              .d_output = here(local.d_output),
                                              .d_query = hop_query.view(now.queries()),
                                              .d_key = hop_keys.key(now.keys),
                                              .d_value = hop_keys.value(now.keys),
                                              .delta = {local.delta.data(), {1, q[1], now.queries()}},
                                              .d_query_sum = {local.d_query_sum.data(), {1, q[1], now.queries(), q[3]}},
                                              .causal = now.causal,
                                              .scale = local.scale,
                                              .deterministic = local.deterministic},
                             now.groups);
      const auto so_far = here(d_query.view());
      launch_rows(add_rows_kernel<T>, so_far, so_far, so_far, hop_query.view(now.queries()), hop > 0);
    }
    sums.wait();  // `arriving` is here, `leaving` has left
    launch_rows(add_rows_kernel<T>, leaving.key(), leaving.key(), arriving.key(), hop_keys.key(now.keys), hop > 0);
    launch_rows(add_rows_kernel<T>, leaving.value(), leaving.value(), arriving.value(), hop_keys.value(now.keys),
                hop > 0);
    sums = communicator.shift(leaving.bytes(), arriving.writable_bytes());
    transfer.wait();
    std::swap(held, next);
  }
  copy_rows(d_query.view(), local.d_query);
  sums.wait();  // after W hops they are where they began
  copy_rows(arriving.key(), local.d_key);
  copy_rows(arriving.value(), local.d_value);
}

}  // namespace

void flash_gather_attention(const FlashForward<fp16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_forward(local, tokens, communicator.size());
  gather_forward(local, tokens, communicator);
}

void flash_gather_attention(const FlashForward<bf16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_forward(local, tokens, communicator.size());
  gather_forward(local, tokens, communicator);
}

void flash_gather_attention_backward(const FlashBackward<fp16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_backward(local, tokens, communicator.size());
  gather_backward(local, tokens, communicator);
}

void flash_gather_attention_backward(const FlashBackward<bf16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_backward(local, tokens, communicator.size());
  gather_backward(local, tokens, communicator);
}

void flash_ring_attention(const FlashForward<fp16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_forward(local, tokens, communicator.size());
  ring_forward(local, tokens, communicator);
}

void flash_ring_attention(const FlashForward<bf16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_forward(local, tokens, communicator.size());
  ring_forward(local, tokens, communicator);
}

void flash_ring_attention_backward(const FlashBackward<fp16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_backward(local, tokens, communicator.size());
  ring_backward(local, tokens, communicator);
}

void flash_ring_attention_backward(const FlashBackward<bf16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_backward(local, tokens, communicator.size());
  ring_backward(local, tokens, communicator);
}

}  // namespace flashkata
