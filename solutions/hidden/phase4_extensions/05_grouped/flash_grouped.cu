// flash_grouped: attention of groups of queries to slices of one shared K and V, and its gradients, on tensor cores
//
// New here   Who works on what. A plan, made on the host and handed over as an argument, cuts the queries into strips:
//            a few rows of one group and one head, the share of a warp. Four strips that read the same K/V head make a
//            block, heads of a GQA group side by side, then groups whose slices overlap. The block walks over the union
//            of its warps' keys and loads each tile once for all of them. Backward a block owns keys instead and hears
//            from every group whose slice holds them, so dK and dV are summed up in registers, in one order.
// Forward    grouped_forward_kernel     2.05's kernel, a strip of 32 queries for each of 4 warps
// Backward   delta_kernel, keys_kernel, round_kernel or queries_kernel, as in 3.05
// Try        ./kata test 4.05    ./kata profile 4.05
#include "grouped.hpp"

#include "solutions/hidden/block_order.cuh"
#include "solutions/hidden/mma_tile.cuh"

namespace flashkata {
namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int BLOCK_KV = 64;  // keys in a tile of the kernels whose blocks own queries
constexpr int WARPS = 4;      // of these blocks; each has a strip of queries of its own
constexpr int PLANNED = 128;  // groups in one launch: the arguments of a kernel may take 4 KiB
static_assert(PLANNED >= MOST_GROUPS, "the blocks that own keys hear from all groups in one launch");

// ---- The plan -------------------------------------------------------------------------------------------------------

struct PlannedGroup {
  int q_begin, q_end, k_begin, k_end;
  int first_strip;  // strips are numbered through; group after group, last queries first, the heads of a tile together
};

// What a warp works on. Row r of the strip is query q_first + r < q_end and sees keys k_begin .. sees + r - 1 < k_end.
struct Strip {
  int head;
  int q_first, q_end;
  int k_begin, k_end, sees;

  KATA_DEVICE int keys_end(int row) const { return min(k_end, sees + row); }
};

template <int STRIP_ROWS>
struct Plan {
  static constexpr int ROWS = STRIP_ROWS;

  int heads_per_kv;  // query heads that read one K/V head
  bool causal;
  int blocks;  // for each K/V head
  int count;
  PlannedGroup groups[PLANNED];

  KATA_BOTH int strips_of(const PlannedGroup& group) const {
    return (group.q_end - group.q_begin + ROWS - 1) / ROWS * heads_per_kv;
  }

  // The number `local` of a group's strips, of one K/V head.
  KATA_BOTH Strip strip_of(const PlannedGroup& group, int local, int kv_head) const {
    const int q_first = group.q_begin + (strips_of(group) - 1 - local) / heads_per_kv * ROWS;
    return {.head = kv_head * heads_per_kv + local % heads_per_kv,
            .q_first = q_first,
            .q_end = group.q_end,
            .k_begin = group.k_begin,
            .k_end = group.k_end,
            .sees = causal ? q_first + group.k_end - group.q_end + 1 : group.k_end};
  }

  // The group of strip `number`: the last that does not begin behind it.
  KATA_DEVICE int group_of(int number) const {
    int at = 0;
    for (int behind = count; at + 1 < behind;) {
      const int middle = (at + behind) / 2;
      if (groups[middle].first_strip <= number) {
        at = middle;
      } else {
        behind = middle;
      }
    }
    return at;
  }
};

// Keys begin .. end - 1.
struct Keys {
  int begin = 0, end = 0;

  bool empty() const { return begin >= end; }
  int count() const { return empty() ? 0 : end - begin; }
  int tiles() const { return ceil_div(count(), BLOCK_KV); }
};

Keys hull(const Keys& one, const Keys& other) {
  if (one.empty()) return other;
  if (other.empty()) return one;
  return {std::min(one.begin, other.begin), std::max(one.end, other.end)};
}

// The groups that have queries, and one without keys for each gap between them. Families of slices that overlap stay
// together, those with the most keys first: what takes long should not begin last.
std::vector<PlannedGroup> ordered(std::span<const Group> groups, Index queries) {
  std::vector<PlannedGroup> by_query;
  for (const Group& group : groups) {
    if (group.q_begin >= group.q_end) continue;
    const bool has_keys = group.k_begin < group.k_end;
    by_query.push_back({.q_begin = static_cast<int>(group.q_begin),
                        .q_end = static_cast<int>(group.q_end),
                        .k_begin = has_keys ? static_cast<int>(group.k_begin) : 0,
                        .k_end = has_keys ? static_cast<int>(group.k_end) : 0,
                        .first_strip = 0});
  }
  std::sort(by_query.begin(), by_query.end(), [](const auto& a, const auto& b) { return a.q_begin < b.q_begin; });
  std::vector<PlannedGroup> all;
  int next = 0;
  for (const PlannedGroup& group : by_query) {
    if (next < group.q_begin) all.push_back({next, group.q_begin, 0, 0, 0});
    all.push_back(group);
    next = group.q_end;
  }
  if (next < queries) all.push_back({next, static_cast<int>(queries), 0, 0, 0});

  std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
    return std::pair(a.k_begin, -a.k_end) < std::pair(b.k_begin, -b.k_end);
  });
  struct Family {
    Keys keys;
    std::vector<PlannedGroup> groups;
  };
  std::vector<Family> families;
  for (const PlannedGroup& group : all) {
    if (families.empty() || group.k_begin >= families.back().keys.end) families.push_back({});
    Family& family = families.back();
    family.keys = hull(family.keys, {group.k_begin, group.k_end});
    family.groups.push_back(group);
  }
  std::stable_sort(families.begin(), families.end(),
                   [](const auto& a, const auto& b) { return a.keys.count() > b.keys.count(); });
  all.clear();
  for (const Family& family : families) all.insert(all.end(), family.groups.begin(), family.groups.end());
  return all;
}

// Calls body(plan) for up to PLANNED groups at a time.
template <int ROWS, typename Body>
void for_each_plan(const std::vector<PlannedGroup>& groups, Index heads_per_kv, bool causal, const Body& body) {
  Plan<ROWS> plan{
      .heads_per_kv = static_cast<int>(heads_per_kv), .causal = causal, .blocks = 0, .count = 0, .groups = {}};
  int strips = 0;
  Keys seen;  // by the strips of the block that is not yet full
  for (std::size_t i = 0; i < groups.size(); ++i) {
    PlannedGroup group = groups[i];
    const int own_strips = plan.strips_of(group);
    const auto seen_by = [&](int local) {
      const Strip strip = plan.strip_of(group, local, 0);
      return Keys{strip.k_begin, std::min(strip.k_end, strip.sees + ROWS - 1)};
    };
    // Groups share a block if no key lies between theirs and the walk over the union is shorter than two walks.
    const Keys most = seen_by(0);
    const Keys both = hull(seen, most);
    const bool pays = both.count() <= seen.count() + most.count() && both.tiles() < seen.tiles() + most.tiles();
    if (!pays && !most.empty()) strips = ceil_div(strips, WARPS) * WARPS;
    group.first_strip = strips;
    plan.groups[plan.count++] = group;
    const int open = strips % WARPS;
    strips += own_strips;
    const int left = strips % WARPS;
    if (open + own_strips < WARPS) {
      seen = open == 0 ? most : both;
    } else {
      seen = left == 0 ? Keys{} : seen_by(own_strips - left);
    }
    if (plan.count == PLANNED || i + 1 == groups.size()) {
      plan.blocks = ceil_div(strips, WARPS);
      body(plan);
      plan.count = 0;
      strips = 0;
      seen = {};
    }
  }
}

// What a block's warps have in front of them: the union of their keys, and those among them that every row with keys
// sees. It follows from the block's number and the arguments alone. So the compiler knows that all threads agree, keeps
// it in registers that a warp has in common, and need not ask at every branch whether the warp still stays together.
struct Walk {
  int begin = std::numeric_limits<int>::max(), end = 0;
  int clean_begin = 0, clean_end = std::numeric_limits<int>::max();

  // Also leaves each warp's strip in shared memory; it is there after the next barrier.
  template <int ROWS>
  KATA_DEVICE Walk(const Plan<ROWS>& plan, int block, int kv_head, Strip (&strips)[WARPS]) {
    int at = plan.group_of(block * WARPS);
#pragma unroll 1
    for (int warp = 0; warp < WARPS; ++warp) {
      const int number = block * WARPS + warp;
      while (at + 1 < plan.count && plan.groups[at + 1].first_strip <= number) ++at;
      const PlannedGroup group = plan.groups[at];
      const int local = number - group.first_strip;
      const Strip strip = local < plan.strips_of(group) ? plan.strip_of(group, local, kv_head) : Strip{};
      if (threadIdx.x == 0) strips[warp] = strip;
      const int strip_end = strip.keys_end(ROWS - 1);
      if (strip.k_begin >= strip_end) continue;
      begin = min(begin, strip.k_begin);
      end = max(end, strip_end);
      clean_begin = max(clean_begin, strip.k_begin);
      clean_end = min(clean_end, strip.keys_end(0));
    }
    if (end == 0) begin = 0;
  }

  KATA_DEVICE int tiles() const { return (end - begin + BLOCK_KV - 1) / BLOCK_KV; }
  // Need no row forbid a key of the tile?
  KATA_DEVICE bool is_clean(int kv_first) const { return kv_first >= clean_begin && kv_first + BLOCK_KV <= clean_end; }
};

// ---- Forward --------------------------------------------------------------------------------------------------------

constexpr int THREADS = 32 * WARPS;
constexpr int ROW_TILES = 2;                 // of 16 queries, for each warp
constexpr int STRIP_ROWS = ROW_TILES * 16;   // queries of a warp
constexpr int BLOCK_Q = WARPS * STRIP_ROWS;  // of a block

// Blocks that share an SM. More of them hide each other's waiting, but 65536 registers are all there are.
template <int HEAD_DIM>
constexpr int BLOCKS_OF_AN_SM = HEAD_DIM == 128  ? 2
                                : HEAD_DIM == 16 ? 4
                                                 : 3;

// Whether the tiles that need no mask are counted before they are visited. Otherwise each is asked, which takes longer;
// with 64 channels and 3 blocks there is no register to spare for a count.
template <int HEAD_DIM>
constexpr bool COUNTS_CLEAN_TILES = HEAD_DIM != 64;

// The weights of a row are relative to a maximum that may lag behind by this many powers of 2: 256 fits into 16 bits
// as well as 1 does, and O is rescaled once in a while instead of in every tile.
constexpr float LAG = 8.0f;

template <typename T>
struct ForwardArguments {
  View<const T, 4> query, key, value;  // [1, H, Tq, D], [1, Hk, Tk, D]
  View<T, 4> output;                   // [1, H, Tq, D]
  View<float, 3> lse;                  // [1, H, Tq]
  float scale_log2;                    // |scale| log2(e): weights are exp2(scale_log2 * (score - max))
  bool negated;                        // the scale is negative: queries change their sign
  Plan<STRIP_ROWS> plan;
};

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS, BLOCKS_OF_AN_SM<HEAD_DIM>)
    grouped_forward_kernel(const ForwardArguments<T> args) {
  constexpr int KV = BLOCK_KV;
  constexpr int KEY_TILES = KV / 8;        // n tiles of S, 8 keys each
  constexpr int DIM_TILES = HEAD_DIM / 8;  // n tiles of O, 8 channels each
  constexpr int KEY_STEPS = KV / 16;       // k steps of O
  constexpr int CHUNKS = HEAD_DIM / CHUNK;
  constexpr float INF = std::numeric_limits<float>::infinity();
  using Operand = WalkingTile<T, HEAD_DIM, THREADS>;

  const int first_thread = static_cast<int>(threadIdx.x);
  const BlockOrder order{static_cast<int>(args.key.size(1)), true};
  const BlockWork work = order.work_of(static_cast<int>(blockIdx.x), args.plan.blocks, BLOCKS_OF_AN_SM<HEAD_DIM>);

  T* smem = dynamic_shared<T>();
  const Tile<T, HEAD_DIM> q_smem{smem};
  const Operand k_smem{{smem + BLOCK_Q * HEAD_DIM}};
  const Operand v_smem{{smem + (BLOCK_Q + KV) * HEAD_DIM}};
  __shared__ Strip strips[WARPS];
  __shared__ int left_out;  // whether a value that some row of the block may not see was not finite
  if (threadIdx.x == 0) left_out = 0;
  const Walk walk(args.plan, work.tile, work.head, strips);
  const int kv_tiles = walk.tiles();
  const int kv_begin = walk.begin;
  __syncthreads();  // strips are known, left_out is 0
  {
    // Each warp copies its own queries.
    const int warp = first_thread / 32;
    const Strip& strip = strips[warp];
    const Index q_stride = args.query.stride(2);
    const T* q_rows = &args.query(0, strip.head, strip.q_first, 0);
#pragma unroll 4
    for (int index = first_thread % 32; index < STRIP_ROWS * CHUNKS; index += 32) {
      const int row = index / CHUNKS;
      const int chunk = index % CHUNKS;
      cp_async_16(q_smem.at(warp * STRIP_ROWS + row, chunk), q_rows + row * q_stride + chunk * CHUNK,
                  strip.q_first + row < strip.q_end);
    }
    cp_async_commit();
  }

  float o_frag[ROW_TILES][DIM_TILES][4] = {};  // C fragments of O: [2 x 16 queries, HEAD_DIM]
  float row_max[ROW_TILES][2];                 // rows lane / 4 and lane / 4 + 8 of each row tile
  float row_sum[ROW_TILES][2];                 // this lane's share; added up over the quad at the end
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_max[m][half] = -INF;
      row_sum[m][half] = 0.0f;
    }
  }

  const Index k_stride = args.key.stride(2);
  const Index v_stride = args.value.stride(2);
  int kv_first = kv_begin + (kv_tiles - 1) * KV;  // of the tile that is due
  // What this thread copies of the tile that is due next. Pointers walk: an address from a number costs more.
  const T* k_source = Operand::own_source(first_thread, &args.key(0, work.head, kv_first, 0), k_stride);
  const T* v_source = Operand::own_source(first_thread, &args.value(0, work.head, kv_first, 0), v_stride);
  if (kv_tiles > 0) {
    k_smem.template load_async<KV, true>(first_thread, k_source, k_stride, walk.end - kv_first);
    cp_async_commit();
  }
  if (args.negated) {
    cp_async_wait<0>();
    for (int index = first_thread % 32; index < STRIP_ROWS * CHUNKS; index += 32) {
      auto* twos =
          reinterpret_cast<std::uint32_t*>(q_smem.at(first_thread / 32 * STRIP_ROWS + index / CHUNKS, index % CHUNKS));
      for (int i = 0; i < CHUNK / 2; ++i) twos[i] ^= 0x80008000;
    }
  }

  // One tile of keys. `masked` is a type: std::true_type if some row may not see, or nobody has, one of its keys.
  const auto visit = [&](auto masked) {
    constexpr bool MASKED = decltype(masked)::value;
    const int thread = computed_anew(first_thread);
    const int lane = thread % 32;
    const int warp_row = thread / 32 * STRIP_ROWS;  // first row of this warp in the block
    const Strip& strip = strips[thread / 32];
    // A warp whose slice does not hold the tile goes on copying and waiting with the others.
    const bool sees =
        !MASKED || __any_sync(FULL_WARP, kv_first + KV > strip.k_begin && kv_first < strip.keys_end(STRIP_ROWS - 1));

    cp_async_wait<0>();
    __syncthreads();  // k_smem (and q_smem) are full; everybody has finished with v_smem of the tile before
    v_smem.template load_async<KV, MASKED>(thread, v_source, v_stride, walk.end - kv_first);
    v_source -= KV * v_stride;
    cp_async_commit();

    // S = Q K^T  [2 x 16 queries, KV keys]
    float s_frag[ROW_TILES][KEY_TILES][4] = {};
    if (sees) {
      add_rows_times_rows<T, HEAD_DIM>(s_frag, q_smem.down_first(warp_row, 0, lane), k_smem.right_first(0, 0, lane));
    }

    cp_async_wait<0>();
    // A weight of 0 does not protect those who may not see a value: 0 times NaN is NaN.
    if (MASKED && !walk.is_clean(kv_first) && v_smem.template clear_non_finite<KV>(thread)) atomicOr(&left_out, 1);
    __syncthreads();  // v_smem is full; everybody has finished with k_smem
    if (kv_first > kv_begin) {
      k_source -= KV * k_stride;
      k_smem.template load_async<KV, false>(thread, k_source, k_stride, KV);
      cp_async_commit();
    }
    if (!sees) return;

    // Forbid the keys outside of the slice and, when causal, beyond each query's own.
    if (MASKED) {
      const int begin = strip.k_begin - kv_first;  // in the tile
      const int end = strip.k_end - kv_first;
      const int row_end = strip.sees - kv_first;  // of row 0
      if (__any_sync(FULL_WARP, min(end, row_end) < KV)) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int own_end = min(end, row_end + m * 16 + half * 8 + lane / 4) - lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < KEY_TILES; ++n) {
              if (n * 8 >= own_end) s_frag[m][n][half * 2] = -INF;
              if (n * 8 + 1 >= own_end) s_frag[m][n][half * 2 + 1] = -INF;
            }
          }
        }
      }
      if (__any_sync(FULL_WARP, begin > 0)) {
        const int own_begin = begin - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n) {
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if (n * 8 < own_begin) s_frag[m][n][half * 2] = -INF;
              if (n * 8 + 1 < own_begin) s_frag[m][n][half * 2 + 1] = -INF;
            }
          }
        }
      }
    }

    // P = exp(scale S - max); where a maximum has risen too far, sums and output are brought to the new one first
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float tile_max = s_frag[m][0][half * 2];
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n) {
          tile_max = fmaxf(tile_max, fmaxf(s_frag[m][n][half * 2], s_frag[m][n][half * 2 + 1]));
        }
        tile_max = quad_max(tile_max);
        if (__any_sync(FULL_WARP, (tile_max - row_max[m][half]) * args.scale_log2 > LAG)) {
          const float new_max = fmaxf(row_max[m][half], tile_max);
          const float rescale = new_max == -INF ? 1.0f : fast_exp2((row_max[m][half] - new_max) * args.scale_log2);
          row_max[m][half] = new_max;
          row_sum[m][half] *= rescale;
#pragma unroll
          for (int n = 0; n < DIM_TILES; ++n) {
            o_frag[m][n][half * 2] *= rescale;
            o_frag[m][n][half * 2 + 1] *= rescale;
          }
        }
        // While a row has seen no key its maximum is -inf, and -inf minus -inf would be NaN.
        const float shift = row_max[m][half] == -INF ? 0.0f : row_max[m][half] * args.scale_log2;
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n) {
          float& left = s_frag[m][n][half * 2];
          float& right = s_frag[m][n][half * 2 + 1];
          left = fast_exp2(left * args.scale_log2 - shift);
          right = fast_exp2(right * args.scale_log2 - shift);
          row_sum[m][half] += left + right;
        }
      }
    }

    // O += P V  [2 x 16 queries, HEAD_DIM]
    const auto v_lane = v_smem.down_first(0, 0, lane);
#pragma unroll
    for (int step = 0; step < KEY_STEPS; ++step) {
      std::uint32_t p_frag[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        // Two C fragments side by side are one A fragment: 16 keys.
        const float(&left)[4] = s_frag[m][2 * step];
        const float(&right)[4] = s_frag[m][2 * step + 1];
        p_frag[m][0] = pack2<T>(left[0], left[1]);
        p_frag[m][1] = pack2<T>(left[2], left[3]);
        p_frag[m][2] = pack2<T>(right[0], right[1]);
        p_frag[m][3] = pack2<T>(right[2], right[3]);
      }
#pragma unroll
      for (int pair = 0; pair < DIM_TILES / 2; ++pair) {
        std::uint32_t v_frag[4];
        ldmatrix_x4_trans(v_frag, v_lane.at(step * 16, pair * 2));
        multiply<T>(o_frag, p_frag, v_frag, pair);
      }
    }
  };

  // From the last tile to the first.  Tiles that need no mask have a shorter loop of their own.
  if constexpr (COUNTS_CLEAN_TILES<HEAD_DIM>) {
#pragma unroll 1
    for (; kv_first >= max(kv_begin, walk.clean_end - KV + 1); kv_first -= KV) visit(std::true_type{});
    const int clean_tiles = kv_first < walk.clean_begin ? 0 : (kv_first - walk.clean_begin) / KV + 1;
#pragma unroll 1
    for (int left = clean_tiles; left > 0; --left, kv_first -= KV) visit(std::false_type{});
  } else {
#pragma unroll 1
    for (; kv_first >= kv_begin && !walk.is_clean(kv_first); kv_first -= KV) visit(std::true_type{});
#pragma unroll 1
    for (; kv_first >= kv_begin && walk.is_clean(kv_first); kv_first -= KV) visit(std::false_type{});
  }
#pragma unroll 1
  for (; kv_first >= kv_begin; kv_first -= KV) visit(std::true_type{});

  // O / l through shared memory, where a warp's own rows of q_smem are free: rows leave in whole chunks.
  const int thread = computed_anew(static_cast<int>(threadIdx.x));
  const int lane = thread % 32;
  const int warp_row = thread / 32 * STRIP_ROWS;
  const Strip strip = strips[thread / 32];
  cp_async_wait<0>();  // a block without keys has not waited for its queries
  __syncwarp();        // this warp has finished with its queries
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane / 4;
      const float row_total = quad_sum(row_sum[m][half]);
      // A strip without keys has taken part in the others' clean tiles.
      const float sum = strip.k_begin < strip.keys_end(row) ? row_total : 0.0f;
      const float inverse = 1.0f / sum;
#pragma unroll
      for (int n = 0; n < DIM_TILES; ++n) {
        const std::uint32_t two = pack2<T>(o_frag[m][n][half * 2] * inverse, o_frag[m][n][half * 2 + 1] * inverse);
        *reinterpret_cast<std::uint32_t*>(q_smem.at(warp_row + row, n) + lane % 4 * 2) = sum == 0.0f ? 0 : two;
      }
      if (lane % 4 == 0 && strip.q_first + row < strip.q_end) {
        args.lse(0, strip.head, strip.q_first + row) =
            sum == 0.0f ? -INF : row_max[m][half] * args.scale_log2 * (1.0f / LOG2_E) + logf(sum);
      }
    }
  }
  __syncwarp();  // this warp's rows are complete
  if (left_out) {
    // What was left out for the sake of those who may not see it belongs to those who may.
#pragma unroll 1
    for (int index = lane; index < STRIP_ROWS * HEAD_DIM; index += 32) {
      const int row = index / HEAD_DIM;
      const int channel = index % HEAD_DIM;
      T& output = q_smem.at(warp_row + row, channel / CHUNK)[channel % CHUNK];
      const int end = strip.keys_end(row);
      for (int key = strip.k_begin; key < end; ++key) {
        if (walk.is_clean(walk.begin + (key - walk.begin) / KV * KV)) continue;
        const T value = args.value(0, strip.head / args.plan.heads_per_kv, key, channel);
        if (!is_finite(value)) output = from_float<T>(to_float(output) + to_float(value));
      }
    }
    __syncwarp();
  }
#pragma unroll
  for (int step = 0; step < STRIP_ROWS * CHUNKS / 32; ++step) {
    const int index = step * 32 + lane;
    const int row = index / CHUNKS;
    const int chunk = index % CHUNKS;
    if (strip.q_first + row < strip.q_end) {
      *reinterpret_cast<uint4*>(&args.output(0, strip.head, strip.q_first + row, chunk * CHUNK)) =
          *reinterpret_cast<const uint4*>(q_smem.at(warp_row + row, chunk));
    }
  }
}

template <typename T, int HEAD_DIM>
void launch_forward(const FlashForward<T>& p, std::span<const Group> groups, const Stream& stream) {
  const float scale = p.scale.value_or(1.0f / std::sqrt(static_cast<float>(HEAD_DIM)));
  // A scale of 0 becomes the smallest that still keeps -inf apart from NaN.
  const float size = std::max(std::abs(scale), std::numeric_limits<float>::min());
  const Index kv_heads = p.key.size(1);
  if (p.query.size(1) == 0) return;
  for_each_plan<STRIP_ROWS>(
      ordered(groups, p.query.size(2)), p.query.size(1) / kv_heads, p.causal, [&](const Plan<STRIP_ROWS>& plan) {
        const ForwardArguments<T> args{p.query, p.key, p.value, p.output, p.lse, size * LOG2_E, scale < 0.0f, plan};
        constexpr std::size_t shared_bytes = (BLOCK_Q + 2 * BLOCK_KV) * HEAD_DIM * sizeof(T);
        launch(grouped_forward_kernel<T, HEAD_DIM>, dim3(static_cast<unsigned>(plan.blocks * kv_heads)), dim3(THREADS),
               shared_bytes, stream, args);
      });
}

template <typename T>
void dispatch_forward(const FlashForward<T>& problem, std::span<const Group> groups, const Stream& stream) {
  switch (problem.query.size(3)) {
    case 16:
      return launch_forward<T, 16>(problem, groups, stream);
    case 32:
      return launch_forward<T, 32>(problem, groups, stream);
    case 64:
      return launch_forward<T, 64>(problem, groups, stream);
    default:
      return launch_forward<T, 128>(problem, groups, stream);
  }
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// How keys_kernel cuts the work. A warp owns ROW_TILES x 16 keys: the more there are, the more often each fragment of Q
// and dO is used, and the more registers dK and dV take: ROW_TILES x HEAD_DIM in each thread.
template <int HEAD_DIM>
struct Blocking {
  static constexpr int WARPS = HEAD_DIM == 128 ? 8 : 4;
  static constexpr int ROW_TILES = HEAD_DIM == 32 || HEAD_DIM == 64 ? 2 : 1;  // of 16 keys, for each warp
  static constexpr int BLOCK_Q = HEAD_DIM == 64 ? 32 : 64;
  static constexpr int BLOCKS_PER_SM = HEAD_DIM == 128 ? 1 : 2;
  static constexpr int Q_WARPS = HEAD_DIM == 16 ? 4 : 2;  // dQ is cut among the warps: so many along the queries,
  static constexpr int D_WARPS = WARPS / Q_WARPS;         // so many along the channels

  static constexpr int THREADS = 32 * WARPS;
  static constexpr int BLOCK_KV = WARPS * ROW_TILES * 16;
  static constexpr int Q_SIZE = BLOCK_Q * HEAD_DIM;  // elements of a tile of queries
  static constexpr int KV_SIZE = BLOCK_KV * HEAD_DIM;
  static constexpr int DS_SIZE = BLOCK_KV * BLOCK_Q;
  static constexpr int TILES_SIZE = 2 * KV_SIZE + 4 * Q_SIZE + 2 * DS_SIZE;
};

template <typename T>
struct Gradients {
  View<const T, 4> query, key, value, output, d_output;  // [1, H or Hk, Tq or Tk, D]
  View<const float, 3> lse;                              // [1, H, Tq]
  View<T, 4> d_query, d_key, d_value;                    // as query, key, value
  View<float, 3> delta;                                  // [1, H, Tq]
  View<float, 4> d_query_sum;                            // [1, H, Tq, D], in the order of add_to_sum()
  int queries, keys;
  float scale;
  bool sum_d_query;  // keys_kernel adds to d_query_sum; otherwise queries_kernel computes dQ
};

constexpr int ROW_THREADS = 256;  // of delta_kernel and round_kernel

template <int HEAD_DIM>
constexpr int ROWS_PER_BLOCK = ROW_THREADS / (HEAD_DIM / CHUNK);  // a thread for each chunk of a row

// delta = rowsum(dO * O), and zeros for the sums of dQ.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(ROW_THREADS) delta_kernel(const Gradients<T> args) {
  constexpr int CHUNKS = HEAD_DIM / CHUNK;
  constexpr int ROWS = ROWS_PER_BLOCK<HEAD_DIM>;
  const int tiles = (args.queries + ROWS - 1) / ROWS;
  const int head = static_cast<int>(blockIdx.x) / tiles;
  const int row = static_cast<int>(blockIdx.x) % tiles * ROWS + static_cast<int>(threadIdx.x) / CHUNKS;
  const int chunk = static_cast<int>(threadIdx.x) % CHUNKS;
  const bool exists = row < args.queries;
  float sum = 0.0f;
  if (exists) {
    const auto output = *reinterpret_cast<const Chunk<T>*>(&args.output(0, head, row, chunk * CHUNK));
    const auto d_output = *reinterpret_cast<const Chunk<T>*>(&args.d_output(0, head, row, chunk * CHUNK));
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) sum += to_float(output.elements[i]) * to_float(d_output.elements[i]);
    if (args.sum_d_query) {
      // Neighbouring lanes, neighbouring addresses: which of the row's sums a lane clears does not matter.
      float4* sums = reinterpret_cast<float4*>(&args.d_query_sum(0, head, row, 0));
      sums[chunk] = float4{0.0f, 0.0f, 0.0f, 0.0f};
      sums[chunk + CHUNKS] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
  }
#pragma unroll
  for (int distance = 1; distance < CHUNKS; distance *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
  if (exists && chunk == 0) args.delta(0, head, row) = sum;
}

// d_query from its sums, which lie in the order of add_to_sum().
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(ROW_THREADS) round_kernel(const Gradients<T> args) {
  constexpr int CHUNKS = HEAD_DIM / CHUNK;
  constexpr int ROWS = ROWS_PER_BLOCK<HEAD_DIM>;
  const int tiles = (args.queries + ROWS - 1) / ROWS;
  const int head = static_cast<int>(blockIdx.x) / tiles;
  const int row = static_cast<int>(blockIdx.x) % tiles * ROWS + static_cast<int>(threadIdx.x) / CHUNKS;
  const int chunk = static_cast<int>(threadIdx.x) % CHUNKS;
  if (row >= args.queries) return;
  const float* sums = &args.d_query_sum(0, head, row, chunk / 2 * 16 + chunk % 2 * 2);
  const float scale = SCALES_DS<T> ? 1.0f : args.scale;
  Chunk<T> rounded;
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) rounded.elements[i] = from_float<T>(scale * sums[i / 2 * 4 + i % 2]);
  *reinterpret_cast<Chunk<T>*>(&args.d_query(0, head, row, chunk * CHUNK)) = rounded;
}

// Groups in the order of their slices' beginnings, those that have queries and keys.
struct Readers {
  int heads_per_kv;
  bool causal;
  int most;  // queries, of one head, that see the same key
  int count;
  PlannedGroup groups[PLANNED];
};

// The most queries of `groups`, of one head, that have the same key in their slice: so many stream past a tile of keys.
int most_readers(const std::vector<PlannedGroup>& groups) {
  int most = 0;
  for (const PlannedGroup& one : groups) {
    int readers = 0;  // of the first key of its slice: no other key has more than the first one of some slice
    for (const PlannedGroup& other : groups) {
      if (other.k_begin <= one.k_begin && one.k_begin < other.k_end) readers += other.q_end - other.q_begin;
    }
    most = std::max(most, readers);
  }
  return most;
}

// A tile of queries of one group and one head that a block of keys hears from. No such tile: q_first = q_end.
struct Turn {
  int group, head;
  int q_first, q_end;
  int k_begin, k_end, diagonal;  // query i sees keys k_begin .. min(k_end, i + diagonal + 1) - 1

  KATA_DEVICE bool exists() const { return q_first < q_end; }
  KATA_DEVICE int keys_end(int query) const { return min(k_end, query + diagonal + 1); }

  // To the first tile that hears of keys kv_first .. kv_end - 1, of groups from `group` on.
  KATA_DEVICE void begin_group(const Readers& readers, int kv_head, int kv_first, int kv_end) {
    q_first = q_end = 0;
    for (; group < readers.count; ++group) {
      const PlannedGroup& next = readers.groups[group];
      if (next.k_begin >= kv_end) break;  // and so do all that follow
      diagonal = readers.causal ? next.k_end - next.q_end : next.k_end - next.q_begin;
      const int first = max(next.q_begin, max(kv_first, next.k_begin) - diagonal);
      if (next.k_end <= kv_first || first >= next.q_end) continue;
      head = kv_head * readers.heads_per_kv;
      q_first = first;
      q_end = next.q_end;
      k_begin = next.k_begin;
      k_end = next.k_end;
      break;
    }
  }

  KATA_DEVICE void advance(const Readers& readers, int block_q, int kv_head, int kv_first, int kv_end) {
    if (!exists()) return;
    q_first += block_q;
    if (q_first < q_end) return;
    if (++head < (kv_head + 1) * readers.heads_per_kv) {
      q_first = max(readers.groups[group].q_begin, max(kv_first, k_begin) - diagonal);
    } else {
      ++group;
      begin_group(readers, kv_head, kv_first, kv_end);
    }
  }
};

// A block owns BLOCK_KV keys of a K/V head. In round t it computes P and dS of query tile t, adds to dV and dK, leaves
// dS in shared memory, and adds up dQ of tile t - 1, whose dS is complete by then: one barrier a round is enough. The
// tiles come from every group whose slice holds one of the keys, and from every query head that reads them.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(Blocking<HEAD_DIM>::THREADS, Blocking<HEAD_DIM>::BLOCKS_PER_SM)
    keys_kernel(const Gradients<T> args, const Readers readers) {
  using Cut = Blocking<HEAD_DIM>;
  constexpr int BLOCK_Q = Cut::BLOCK_Q;
  constexpr int BLOCK_KV = Cut::BLOCK_KV;
  constexpr int THREADS = Cut::THREADS;
  constexpr int M = Cut::ROW_TILES;
  constexpr int Q_TILES = BLOCK_Q / 8;               // n tiles of S^T and dP^T
  constexpr int D_TILES = HEAD_DIM / 8;              // n tiles of dV and dK
  constexpr int DQ_M = BLOCK_Q / Cut::Q_WARPS / 16;  // a warp's share of dQ: [16 DQ_M, 8 DQ_N]
  constexpr int DQ_N = HEAD_DIM / Cut::D_WARPS / 8;

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  // When causal, the first keys are seen by the most queries: the longest work comes first. Heads are together as long
  // as what streams past their keys stays in L2: of many short groups more heads than of a long one.
  const BlockOrder order{static_cast<int>(args.key.size(1)), true};
  const int together = order.heads_together(ceil_div(max(1, readers.most), BLOCK_KV), Cut::BLOCKS_PER_SM);
  const BlockWork work =
      order.work_in_groups(static_cast<int>(blockIdx.x), ceil_div(args.keys, BLOCK_KV), min(order.heads, together));
  const int kv_head = work.head;
  const int kv_first = work.tile * BLOCK_KV;
  const int warp_key = warp * M * 16;  // first key of this warp in the block

  T* smem = dynamic_shared<T>();
  const Tile<T, HEAD_DIM> k_smem{smem};
  const Tile<T, HEAD_DIM> v_smem{smem + Cut::KV_SIZE};
  // Of what follows there are two; query tile t has number t % 2.
  const auto q_smem = [=](int t) { return Tile<T, HEAD_DIM>{smem + 2 * Cut::KV_SIZE + t % 2 * Cut::Q_SIZE}; };
  const auto do_smem = [=](int t) { return Tile<T, HEAD_DIM>{q_smem(t).smem + 2 * Cut::Q_SIZE}; };
  const auto ds_smem = [=](int t) {
    return Tile<T, BLOCK_Q>{smem + 2 * Cut::KV_SIZE + 4 * Cut::Q_SIZE + t % 2 * Cut::DS_SIZE};
  };
  float* const row_smem = reinterpret_cast<float*>(smem + Cut::TILES_SIZE);  // [2][lse, delta][BLOCK_Q]
  int* const leak_smem = reinterpret_cast<int*>(row_smem + 4 * BLOCK_Q);     // [2][WARPS]
  // The tiles of queries of rounds t - 1, t and t + 1. All threads compute the same, from the same arguments.
  const int kv_end = kv_first + BLOCK_KV;
  Turn before{}, turn{}, next{};
  turn.begin_group(readers, kv_head, kv_first, kv_end);

  const auto load_queries = [&](int t, const Turn& turn) {
    q_smem(t).template load_async<BLOCK_Q, THREADS>(&args.query(0, turn.head, 0, 0),
                                                    static_cast<int>(args.query.stride(2)), turn.q_first, turn.q_end);
    do_smem(t).template load_async<BLOCK_Q, THREADS>(
        &args.d_output(0, turn.head, 0, 0), static_cast<int>(args.d_output.stride(2)), turn.q_first, turn.q_end);
    if (threadIdx.x < BLOCK_Q) {
      const int query = turn.q_first + static_cast<int>(threadIdx.x);
      const bool exists = query < turn.q_end;
      float* row = row_smem + t % 2 * 2 * BLOCK_Q + threadIdx.x;
      cp_async_4(row, &args.lse(0, turn.head, exists ? query : 0), exists);
      cp_async_4(row + BLOCK_Q, &args.delta(0, turn.head, exists ? query : 0), exists);
    }
    cp_async_commit();
  };
  // The first query of the tile that sees the key of row `row` of this warp, and the end of the tile.
  const auto queries_seeing = [&](int row) {
    const int key = kv_first + warp_key + row;
    const bool in_slice = key >= turn.k_begin && key < turn.k_end;
    return int2{in_slice ? max(0, key - turn.diagonal - turn.q_first) : BLOCK_Q, BLOCK_Q};
  };
  // Is a pair of a tile forbidden?
  const auto is_masked = [&](const Turn& turn) {
    return kv_first < turn.k_begin || kv_first + BLOCK_KV > turn.keys_end(turn.q_first);
  };

  if (turn.exists()) {  // otherwise nobody would wait for these copies
    k_smem.template load_async<BLOCK_KV, THREADS>(&args.key(0, kv_head, 0, 0), static_cast<int>(args.key.stride(2)),
                                                  kv_first, args.keys);
    v_smem.template load_async<BLOCK_KV, THREADS>(&args.value(0, kv_head, 0, 0), static_cast<int>(args.value.stride(2)),
                                                  kv_first, args.keys);
    load_queries(0, turn);
  }

  float dv_frag[M][D_TILES][4] = {};  // C fragments of dV and dK: [16 M keys, HEAD_DIM]
  float dk_frag[M][D_TILES][4] = {};
  int fresh_lane = lane;

  // dQ of the tile of round t, which was the one before, += dS K  [BLOCK_Q, HEAD_DIM], cut among the warps
  const auto add_d_query = [&](int t) {
    const int row = warp / Cut::D_WARPS * DQ_M * 16;
    const int chunk = warp % Cut::D_WARPS * DQ_N;
    float dq_frag[DQ_M][DQ_N][4] = {};
    bool leaks = false;
    if (is_masked(before)) {
      for (int w = 0; w < Cut::WARPS; ++w) leaks |= leak_smem[t % 2 * Cut::WARPS + w] != 0;
    }
    if (!leaks) {
      add_columns_times_rows<T, BLOCK_KV / 16>(dq_frag, ds_smem(t).right_first(0, row / CHUNK, fresh_lane),
                                               k_smem.down_first(0, chunk, fresh_lane));
    } else {
      add_allowed_rows(
          dq_frag, lane, k_smem, chunk,
          [&](int m, int key) { return ds_smem(t).at(key, (row + m) / CHUNK)[(row + m) % CHUNK]; },
          [&](int m) {
            return int2{max(0, before.k_begin - kv_first),
                        min(BLOCK_KV, before.keys_end(before.q_first + row + m) - kv_first)};
          });
    }
#pragma unroll
    for (int m = 0; m < DQ_M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = before.q_first + row + m * 16 + half * 8 + lane / 4;
        if (query < before.q_end) {
          float* sums = &args.d_query_sum(0, before.head, query, chunk * CHUNK);
#pragma unroll
          for (int n = 0; n < DQ_N; n += 2) {
            add_to_sum(sums + n * 8, lane, &dq_frag[m][n][half * 2], &dq_frag[m][n + 1][half * 2]);
          }
        }
      }
    }
  };

  for (int t = 0;; ++t) {
    fresh_lane = computed_anew(fresh_lane);
    cp_async_wait<0>();
    // Tile t's Q, dO, lse and delta are there, and dS of tile t - 1; everybody has finished with the other stage of Q
    // and dO and with dS of tile t - 2.
    __syncthreads();
    next = turn;
    next.advance(readers, BLOCK_Q, kv_head, kv_first, kv_end);
    if (next.exists()) load_queries(t + 1, next);
    // Half of the warps add up dQ of the tile before now, the others at the end of the round: while some multiply,
    // others take exponentials.
    const bool last = !turn.exists();
    const bool due = t > 0 && args.sum_d_query;
    const bool early = warp < Cut::WARPS / 2 || last;
    if (due && early) add_d_query(t - 1);
    if (last) break;

    // S^T = K Q^T  [BLOCK_KV, BLOCK_Q]
    float p_frag[M][Q_TILES][4] = {};
    add_rows_times_rows<T, HEAD_DIM>(p_frag, k_smem.down_first(warp_key, 0, fresh_lane),
                                     q_smem(t).right_first(0, 0, fresh_lane));

    // Forbidden pairs have P = 0, and so dS = 0. Only if the other one's row of Q, dO or K holds NaN or inf would that
    // not be enough: 0 times NaN is NaN. Then their score or dP is NaN or inf, too.
    const auto each_forbidden = [&](auto& frag, auto&& body) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int first = queries_seeing(m * 16 + half * 8 + lane / 4).x;
#pragma unroll
          for (int n = 0; n < Q_TILES; ++n) {
            const int query = n * 8 + lane % 4 * 2;
            if (query < first) body(frag[m][n][half * 2]);
            if (query + 1 < first) body(frag[m][n][half * 2 + 1]);
          }
        }
      }
    };
    const bool masked = is_masked(turn);
    float poison = 0.0f;  // becomes NaN
    if (masked) each_forbidden(p_frag, [&](const float& score) { poison += 0.0f * score; });
    fresh_lane = computed_anew(fresh_lane);  // addresses kept over both halves of a round cost registers, too

    // P^T = exp(scale S^T - lse)
    float dp_frag[M][Q_TILES][4];
    const float* lse = row_smem + t % 2 * 2 * BLOCK_Q + lane % 4 * 2;
    const float* delta = lse + BLOCK_Q;
#pragma unroll
    for (int n = 0; n < Q_TILES; ++n) {
      const float2 lse_pair = *reinterpret_cast<const float2*>(lse + n * 8);
      const float2 delta_pair = *reinterpret_cast<const float2*>(delta + n * 8);
      const float lse_log2[2] = {lse_pair.x * LOG2_E, lse_pair.y * LOG2_E};
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p_frag[m][n][e] = fast_exp2(p_frag[m][n][e] * (args.scale * LOG2_E) - lse_log2[e % 2]);
          dp_frag[m][n][e] = e % 2 == 0 ? -delta_pair.x : -delta_pair.y;
        }
      }
    }

    // dP^T - delta = V dO^T - delta  [BLOCK_KV, BLOCK_Q]: the sums began with -delta
    add_rows_times_rows<T, HEAD_DIM>(dp_frag, v_smem.down_first(warp_key, 0, fresh_lane),
                                     do_smem(t).right_first(0, 0, fresh_lane));
    bool leaks = false;
    if (masked) {
      each_forbidden(p_frag, [](float& p) { p = 0.0f; });
      each_forbidden(dp_frag, [&](const float& dp) { poison += 0.0f * dp; });
      leaks = __any_sync(FULL_WARP, poison != 0.0f) != 0;
      if (lane == 0) leak_smem[t % 2 * Cut::WARPS + warp] = leaks ? 1 : 0;
    }

    // dS^T = P^T * (dP^T - delta), scaled or not
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < Q_TILES; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dp_frag[m][n][e] *= SCALES_DS<T> ? p_frag[m][n][e] * args.scale : p_frag[m][n][e];
      }
    }
    std::uint32_t p_pack[BLOCK_Q / 16][M][4];  // A fragments
    std::uint32_t ds_pack[BLOCK_Q / 16][M][4];
    pack<T>(p_pack, p_frag);
    pack<T>(ds_pack, dp_frag);

    // dV += P^T dO,  dK += dS^T Q  [BLOCK_KV, HEAD_DIM]
    if (!leaks) {
      if (args.sum_d_query) store(ds_smem(t), warp_key, lane, ds_pack);  // for everybody's dQ
      add_weighted_rows<T>(dv_frag, p_pack, do_smem(t).down_first(0, 0, fresh_lane));
      add_weighted_rows<T>(dk_frag, ds_pack, q_smem(t).down_first(0, 0, fresh_lane));
    } else {
      const auto weight = [&](int row, int query) {
        return ds_smem(t).at(warp_key + row, query / CHUNK)[query % CHUNK];
      };
      const auto range = [&](int row) { return queries_seeing(row); };
      store(ds_smem(t), warp_key, lane, p_pack);
      __syncwarp();  // this warp's rows of ds_smem hold P
      add_allowed_rows(dv_frag, lane, do_smem(t), 0, weight, range);
      __syncwarp();  // P has been used
      store(ds_smem(t), warp_key, lane, ds_pack);
      __syncwarp();  // they hold dS
      add_allowed_rows(dk_frag, lane, q_smem(t), 0, weight, range);
    }
    if (due && !early) add_d_query(t - 1);
    before = turn;
    turn = next;
  }

  if (!SCALES_DS<T>) multiply_all(dk_frag, args.scale);
  // Only this warp has read its rows of v_smem, so they are free.
  store_rows<T, HEAD_DIM>(dv_frag, v_smem, warp_key, lane, &args.d_value(0, kv_head, 0, 0), args.d_value.stride(2),
                          kv_first + warp_key, args.keys);
  store_rows<T, HEAD_DIM>(dk_frag, v_smem, warp_key, lane, &args.d_key(0, kv_head, 0, 0), args.d_key.stride(2),
                          kv_first + warp_key, args.keys);
}

constexpr int QUERIES_BLOCK = 16 * WARPS;  // queries of a block

// A block's warps own 16 queries each and walk over the union of their keys, as in the forward pass. Nothing is
// transposed here: the C fragments of S = Q K^T and dP = dO V^T have queries as rows, and dS of them is the A fragment
// of dS K.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS) queries_kernel(const Gradients<T> args, const Plan<16> plan) {
  constexpr int SIZE = BLOCK_KV * HEAD_DIM;  // elements of a tile; the queries' are as large
  constexpr int KV_TILES = BLOCK_KV / 8;     // n tiles of S and dP
  constexpr int CHUNKS = HEAD_DIM / CHUNK;
  static_assert(QUERIES_BLOCK == BLOCK_KV, "tiles of queries and of keys are equally large");

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp * 16;  // first row of this warp in the block
  const BlockOrder order{static_cast<int>(args.key.size(1)), true};
  const BlockWork work = order.work_of(static_cast<int>(blockIdx.x), plan.blocks, 2);
  const int kv_head = work.head;
  __shared__ Strip strips[WARPS];
  const Walk walk(plan, work.tile, kv_head, strips);
  __syncthreads();  // strips are known
  const Strip& strip = strips[warp];

  T* smem = dynamic_shared<T>();
  const Tile<T, HEAD_DIM> q_smem{smem};
  const Tile<T, HEAD_DIM> do_smem{smem + SIZE};
  const auto k_smem = [=](int t) { return Tile<T, HEAD_DIM>{smem + (2 + t % 2) * SIZE}; };
  const auto v_smem = [=](int t) { return Tile<T, HEAD_DIM>{smem + (4 + t % 2) * SIZE}; };
  const Tile<T, BLOCK_KV> ds_smem{smem + 6 * SIZE};  // used where NaN or inf would leak

  // Each warp copies its own rows of Q and dO.
  for (int index = lane; index < 16 * CHUNKS; index += 32) {
    const int row = index / CHUNKS;
    const int chunk = index % CHUNKS;
    const bool exists = strip.q_first + row < strip.q_end;
    const int query = exists ? strip.q_first + row : 0;
    cp_async_16(q_smem.at(warp_row + row, chunk), &args.query(0, strip.head, query, chunk * CHUNK), exists);
    cp_async_16(do_smem.at(warp_row + row, chunk), &args.d_output(0, strip.head, query, chunk * CHUNK), exists);
  }
  cp_async_commit();
  const auto load_keys = [&](int t) {
    const auto load = [&](const Tile<T, HEAD_DIM>& tile, const View<const T, 4>& tensor) {
      tile.template load_async<BLOCK_KV, THREADS>(&tensor(0, kv_head, 0, 0), static_cast<int>(tensor.stride(2)),
                                                  walk.begin + t * BLOCK_KV, walk.end);
    };
    load(k_smem(t), args.key);
    load(v_smem(t), args.value);
    cp_async_commit();
  };
  const int kv_tiles = walk.tiles();
  if (kv_tiles > 0) load_keys(0);

  float lse_log2[2] = {};  // of rows lane / 4 and lane / 4 + 8
  float delta[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = strip.q_first + half * 8 + lane / 4;
    if (query < strip.q_end) {
      lse_log2[half] = args.lse(0, strip.head, query) * LOG2_E;
      delta[half] = args.delta(0, strip.head, query);
    }
  }
  float dq_frag[1][HEAD_DIM / 8][4] = {};  // C fragments of dQ: [16 queries, HEAD_DIM]

  int fresh_lane = lane;
  for (int t = 0; t < kv_tiles; ++t) {
    fresh_lane = computed_anew(fresh_lane);
    const int kv_first = walk.begin + t * BLOCK_KV;
    cp_async_wait<0>();
    __syncthreads();  // this tile's K and V are there; everybody has finished with the other stage
    if (t + 1 < kv_tiles) load_keys(t + 1);
    // A warp whose slice does not hold the tile goes on copying and waiting with the others.
    if (__all_sync(FULL_WARP, kv_first + BLOCK_KV <= strip.k_begin || kv_first >= strip.keys_end(15))) continue;

    // S = Q K^T,  dP - delta = dO V^T - delta  [16 queries, BLOCK_KV] for each warp
    float p_frag[1][KV_TILES][4] = {};
    float ds_frag[1][KV_TILES][4];
#pragma unroll
    for (int n = 0; n < KV_TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) ds_frag[0][n][e] = -delta[e / 2];
    }
    add_rows_times_rows<T, HEAD_DIM>(p_frag, q_smem.down_first(warp_row, 0, fresh_lane),
                                     k_smem(t).right_first(0, 0, fresh_lane));
    add_rows_times_rows<T, HEAD_DIM>(ds_frag, do_smem.down_first(warp_row, 0, fresh_lane),
                                     v_smem(t).right_first(0, 0, fresh_lane));

    const auto keys_seen_by = [&](int row) {
      return int2{max(0, strip.k_begin - kv_first), min(BLOCK_KV, strip.keys_end(row) - kv_first)};
    };
    // dS = P * (dP - delta), scaled or not
#pragma unroll
    for (int n = 0; n < KV_TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float p = fast_exp2(p_frag[0][n][e] * (args.scale * LOG2_E) - lse_log2[e / 2]);
        ds_frag[0][n][e] *= SCALES_DS<T> ? p * args.scale : p;
      }
    }
    float poison = 0.0f;  // becomes NaN where the score of a forbidden pair is NaN or inf
    if (kv_first < strip.k_begin || kv_first + BLOCK_KV > strip.keys_end(0)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int2 seen = keys_seen_by(half * 8 + lane / 4);
#pragma unroll
        for (int n = 0; n < KV_TILES; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            const int key = n * 8 + lane % 4 * 2 + e % 2;
            if (key < seen.x || key >= seen.y) {
              poison += 0.0f * p_frag[0][n][e];
              ds_frag[0][n][e] = 0.0f;
            }
          }
        }
      }
    }

    // dQ += dS K  [16 queries, HEAD_DIM]
    std::uint32_t ds_pack[BLOCK_KV / 16][1][4];
    pack<T>(ds_pack, ds_frag);
    if (!__any_sync(FULL_WARP, poison != 0.0f)) {
      add_weighted_rows<T>(dq_frag, ds_pack, k_smem(t).down_first(0, 0, fresh_lane));
    } else {
      __syncwarp();  // this warp has finished with its rows of ds_smem
      store(ds_smem, warp_row, lane, ds_pack);
      __syncwarp();  // they are complete
      const auto weight = [&](int row, int key) { return ds_smem.at(warp_row + row, key / CHUNK)[key % CHUNK]; };
      add_allowed_rows(dq_frag, lane, k_smem(t), 0, weight, keys_seen_by);
    }
  }

  cp_async_wait<0>();  // a block without keys has not waited for its queries
  if (!SCALES_DS<T>) multiply_all(dq_frag, args.scale);
  store_rows<T, HEAD_DIM>(dq_frag, q_smem, warp_row, lane, &args.d_query(0, strip.head, 0, 0), args.d_query.stride(2),
                          strip.q_first, strip.q_end);
}

template <typename T, int HEAD_DIM>
void launch_backward(const FlashBackward<T>& p, std::span<const Group> groups, const Stream& stream) {
  using Cut = Blocking<HEAD_DIM>;
  const Index heads = p.query.size(1);
  const Index kv_heads = p.key.size(1);
  const Index keys = p.key.size(2);
  const Gradients<T> args{.query = p.query,
                          .key = p.key,
                          .value = p.value,
                          .output = p.output,
                          .d_output = p.d_output,
                          .lse = p.lse,
                          .d_query = p.d_query,
                          .d_key = p.d_key,
                          .d_value = p.d_value,
                          .delta = p.delta,
                          .d_query_sum = p.d_query_sum,
                          .queries = static_cast<int>(p.query.size(2)),
                          .keys = static_cast<int>(keys),
                          .scale = p.scale.value_or(1.0f / std::sqrt(static_cast<float>(HEAD_DIM))),
                          .sum_d_query = !p.deterministic};
  const auto row_blocks = dim3(static_cast<unsigned>(heads * ceil_div(p.query.size(2), ROWS_PER_BLOCK<HEAD_DIM>)));
  if (row_blocks.x > 0) launch(delta_kernel<T, HEAD_DIM>, row_blocks, dim3(ROW_THREADS), 0, stream, args);

  std::vector<PlannedGroup> in_order = ordered(groups, heads == 0 ? 0 : p.query.size(2));
  std::vector<PlannedGroup> by_key;
  for (const PlannedGroup& group : in_order) {
    if (group.k_begin < group.k_end) by_key.push_back(group);
  }
  std::stable_sort(by_key.begin(), by_key.end(), [](const auto& a, const auto& b) { return a.k_begin < b.k_begin; });
  constexpr std::size_t KEYS_BYTES =
      Cut::TILES_SIZE * sizeof(T) + 4 * Cut::BLOCK_Q * sizeof(float) + 2 * Cut::WARPS * sizeof(int);
  const auto blocks = dim3(static_cast<unsigned>(ceil_div(keys, Cut::BLOCK_KV) * kv_heads));
  Readers readers{.heads_per_kv = static_cast<int>(heads / kv_heads),
                  .causal = p.causal,
                  .most = most_readers(by_key),
                  .count = static_cast<int>(by_key.size()),
                  .groups = {}};
  std::copy(by_key.begin(), by_key.end(), readers.groups);
  if (blocks.x > 0) {
    launch(keys_kernel<T, HEAD_DIM>, blocks, dim3(Cut::THREADS), KEYS_BYTES, stream, args, readers);
  }

  if (p.deterministic) {
    constexpr std::size_t QUERIES_BYTES = BLOCK_KV * (6 * HEAD_DIM + BLOCK_KV) * sizeof(T);
    for_each_plan<16>(in_order, heads / kv_heads, p.causal, [&](const Plan<16>& plan) {
      launch(queries_kernel<T, HEAD_DIM>, dim3(static_cast<unsigned>(plan.blocks * kv_heads)), dim3(THREADS),
             QUERIES_BYTES, stream, args, plan);
    });
  } else if (row_blocks.x > 0) {
    launch(round_kernel<T, HEAD_DIM>, row_blocks, dim3(ROW_THREADS), 0, stream, args);
  }
}

template <typename T>
void dispatch_backward(const FlashBackward<T>& problem, std::span<const Group> groups, const Stream& stream) {
  switch (problem.query.size(3)) {
    case 16:
      return launch_backward<T, 16>(problem, groups, stream);
    case 32:
      return launch_backward<T, 32>(problem, groups, stream);
    case 64:
      return launch_backward<T, 64>(problem, groups, stream);
    default:
      return launch_backward<T, 128>(problem, groups, stream);
  }
}

}  // namespace

void flash_grouped_forward(const FlashForward<fp16>& problem, std::span<const Group> groups, const Stream& stream) {
  check_grouped_forward(problem, groups);
  dispatch_forward(problem, groups, stream);
}

void flash_grouped_forward(const FlashForward<bf16>& problem, std::span<const Group> groups, const Stream& stream) {
  check_grouped_forward(problem, groups);
  dispatch_forward(problem, groups, stream);
}

void flash_grouped_backward(const FlashBackward<fp16>& problem, std::span<const Group> groups, const Stream& stream) {
  check_grouped_backward(problem, groups);
  dispatch_backward(problem, groups, stream);
}

void flash_grouped_backward(const FlashBackward<bf16>& problem, std::span<const Group> groups, const Stream& stream) {
  check_grouped_backward(problem, groups);
  dispatch_backward(problem, groups, stream);
}

}  // namespace flashkata
