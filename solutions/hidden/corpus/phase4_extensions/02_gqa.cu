// Answers to 02_gqa, wrong and right. Every deviation stands where somebody made it.
//
// One query or one key a thread; the width of a row is an argument, so that each kernel is compiled once. An answer
// deviates in its kernels and is right on the host, or the other way round where its name says so.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../corpus.hpp"
#include "common/gpu/half.hpp"
#include "gqa.hpp"

namespace flashkata {
namespace {

using corpus::RIGHT;
using corpus::UNNAMED;

// These have a variant on the host.
// clang-format off
#define GQA_ANSWERS_OF_BOTH(X) \
  X(head_mapping, "gqa-head-mapping", "gqa-head-mapping") \
  X(mapping_values, "gqa-head-mapping of the values alone", "gqa-head-mapping") \
  X(mapping_dk, "gqa-head-mapping in dK and dV alone", "gqa-head-mapping") \
  X(group_size, "gqa-group-size", "gqa-group-size") \
  X(batch_first, "batch-first-only in the keys and values", "batch-first-only") \
  X(overwrite, "gqa-bwd-overwrite", "gqa-bwd-overwrite") \
  X(overwrite_dk, "gqa-bwd-overwrite of dK alone", "gqa-bwd-overwrite") \
  X(first_head, "gqa-bwd-first-head", "gqa-bwd-first-head") \
  X(averaged, "gqa-bwd-averaged", "gqa-bwd-averaged") \
  X(all_heads, "gqa-bwd-all-heads", "gqa-bwd-all-heads") \
  X(lse_of_kv, "gqa-row-of-kv-head, lse", "gqa-row-of-kv-head") \
  X(packed_causal, "gqa-packed-causal", "gqa-packed-causal") \
  X(not_zeroed, "bwd-accum-not-zeroed", "bwd-accum-not-zeroed") \
  X(causal_ignored, "causal-ignored", "causal-ignored") \
  X(scale_arg_ignored, "scale-arg-ignored", "scale-arg-ignored") \
  X(zero_times, "other groups multiplied with 0", UNNAMED) \
  X(unchecked, "arguments unchecked", UNNAMED)

#define GQA_ANSWERS_OF_KERNELS(X) \
  X(mapping_forward, "gqa-head-mapping in the forward pass alone", "gqa-head-mapping") \
  X(mapping_dq, "gqa-head-mapping in dQ alone", "gqa-head-mapping") \
  X(heads_first, "heads-first-only in the keys and values", "heads-first-only") \
  X(overwrite_dv, "gqa-bwd-overwrite of dV alone", "gqa-bwd-overwrite") \
  X(delta_of_kv, "gqa-row-of-kv-head, delta", "gqa-row-of-kv-head") \
  X(causal_alignment, "causal-alignment", "causal-alignment") \
  X(lse_base2, "lse-base2", "lse-base2") \
  X(dk_no_scale, "bwd-dk-no-scale", "bwd-dk-no-scale") \
  X(no_delta, "bwd-no-D", "bwd-no-D") \
  X(reversed, "groups from the last head of K to the first", UNNAMED) \
  X(d_output_of_first, "the dO of one head for all of its group", UNNAMED) \
  X(query_of_first, "dK with the queries of one head of its group", UNNAMED) \
  X(odd_head_lost, "heads of a group by twos and an odd one lost", UNNAMED) \
  X(beyond_8, "heads beyond the eighth of a group forgotten", UNNAMED) \
  X(kv_beyond_2, "key/value heads beyond the second taken for the second", UNNAMED) \
  X(dk_batch_1, "gradients of keys of later batch items left 0", UNNAMED) \
  X(sum_fp16, "gqa-bwd-16bit-accum in fp16", UNNAMED) \
  X(sum_bf16, "gqa-bwd-16bit-accum in bf16", UNNAMED) \
  X(nan_leak, "masked-nan-leak", UNNAMED) \
  X(blind_unwritten, "queries that see no key left unwritten", UNNAMED) \
  X(keys_unwritten, "keys of no query left unwritten", UNNAMED) \
  X(empty_lse_zero, "empty rows with an lse of 0", UNNAMED) \
  X(refused, "asks for as many key/value heads as query heads", UNNAMED) \
  X(remembered, "gradients remembered by shape", UNNAMED) \
  X(writes_query, "scales the queries in place", "is an input") \
  X(query_batch_stride, "kv-batch-stride-H", "out of bounds") \
  X(dk_batch_stride, "kv-batch-stride-H in d_key", "out of bounds") \
  X(own_head, "key/value head h for query head h", "out of bounds") \
  X(race, "gqa-bwd-race", "global-memory race") \
  X(no_barrier_between, "no barrier between two heads of a group", "shared-memory race") \
  X(copied_out, "keys copied out for every query head", "beyond the arguments") \
  X(from_global, "keys straight from global memory", "loaded too often") \
  X(start_of_first, "blind tiles skipped in the first head alone", "see nothing of each other") \
  X(dkdv_last_tile, "bwd-dkdv-last-tile", "bwd-dkdv-last-tile") \
  X(dk_strides, "d_value with the strides of d_key", "guard zone overwritten") \
  X(start_too_late, "later heads of a group begin a tile too late", UNNAMED) \
  X(lse_once, "lse and delta of one head kept for its group", UNNAMED) \
  X(atomics, "heads of a group added up by atomics", UNNAMED) \
  X(atomics_if_allowed, "heads of a group added up by atomics unless deterministic", UNNAMED) \
  X(value_strides, "values with the strides of the keys", UNNAMED) \
  X(right_backwards, "right: heads of a group backwards and delta where it is used", RIGHT) \
  X(right_double, "right: double accumulation", RIGHT) \
  X(right_tiles_outside, "right: one head after the other for each tile of queries", RIGHT) \
  X(right_packed, "right: queries of several heads in one block", RIGHT) \
  X(right_launches, "right: a launch for each head of a group", RIGHT) \
  X(right_exp2, "right: powers of two and h Hk / H", RIGHT) \
  X(right_blocks_of_64, "right: blocks of 64 with dV and dK by two kernels", RIGHT)
// clang-format on

#define ON_THE_HOST " on the host"

enum class Play {
  none,
#define X(id, name, mistake) id,
  GQA_ANSWERS_OF_BOTH(X) GQA_ANSWERS_OF_KERNELS(X)
#undef X
      right_on_the_host,
};

constexpr const char* RIGHT_ON_THE_HOST = "right: double accumulation, query by query on the host";

const corpus::Answers answers{
#define X(id, name, mistake) {name, mistake},
    GQA_ANSWERS_OF_BOTH(X) GQA_ANSWERS_OF_KERNELS(X)
#undef X
#define X(id, name, mistake) {name ON_THE_HOST, mistake},
        GQA_ANSWERS_OF_BOTH(X)
#undef X
            {RIGHT_ON_THE_HOST, RIGHT},
};

Play chosen_play(bool on_host) {
  std::string_view name = corpus::name();
  if (name == RIGHT_ON_THE_HOST) return on_host ? Play::right_on_the_host : Play::none;
  const std::string_view suffix = ON_THE_HOST;
  if (name.ends_with(suffix) != on_host) return Play::none;
  if (on_host) name.remove_suffix(suffix.size());
#define X(id, answer, mistake) \
  if (name == answer) return Play::id;
  GQA_ANSWERS_OF_BOTH(X)
  GQA_ANSWERS_OF_KERNELS(X)
#undef X
  return Play::none;
}

constexpr int WIDEST = 128;
constexpr int TILE = 32;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f;

// ---- What host and kernels have in common ---------------------------------------------------------------------------

struct Arguments {
  FlashBackward<float> p;  // of a forward pass: output and lse are what is written
  Play play;
  Index batch, heads, kv_heads, group;
  int queries, keys, width;
  int offset;  // query i sees keys 0 .. i + offset when causal
  bool causal;
  float scale, dk_scale;
  int threads;
  const float* copies;     // K, once for each query head, of the answer that copies it out
  bool by_heads, atomics;  // a block of keys for each query head; and how it adds
  int member;              // the only head of a group that counts, or -1
  bool for_dk, for_dv;
};

enum class Reader { forward_key, forward_value, dq_key, dq_value };

// The head of K or V that query head h reads.
KATA_DEVICE Index kv_head_of(const Arguments& args, Index h, Reader reader) {
  const bool value = reader == Reader::forward_value || reader == Reader::dq_value;
  const bool forward = reader == Reader::forward_key || reader == Reader::forward_value;
  const Index right = h / args.group;
  const Index strided = h % args.kv_heads;
  switch (args.play) {
    case Play::head_mapping:
      return strided;
    case Play::mapping_values:
      return value ? strided : right;
    case Play::mapping_forward:
      return forward ? strided : right;
    case Play::mapping_dq:
      return forward ? right : strided;
    case Play::group_size:
      return min(h / args.kv_heads, args.kv_heads - 1);
    case Play::heads_first:
      return 0;
    case Play::reversed:
      return args.kv_heads - 1 - right;
    case Play::kv_beyond_2:
      return min(right, Index{1});
    case Play::own_head:
      return h;
    case Play::right_exp2:
      return h * args.kv_heads / args.heads;
    default:
      return right;
  }
}

// Head of number `member` of those that read key/value head hk.
KATA_DEVICE Index member_of(const Arguments& args, Index hk, Index member) {
  switch (args.play) {
    case Play::head_mapping:
    case Play::mapping_dk:
      return member * args.kv_heads + hk;
    case Play::reversed:
      return (args.kv_heads - 1 - hk) * args.group + member;
    case Play::all_heads:
    case Play::zero_times:
      return member;
    default:
      return hk * args.group + member;
  }
}

KATA_DEVICE Index member_count(const Arguments& args) {
  switch (args.play) {
    case Play::all_heads:
    case Play::zero_times:
      return args.heads;
    case Play::first_head:
      return 1;
    case Play::odd_head_lost:
      return args.group > 1 ? args.group / 2 * 2 : 1;
    case Play::beyond_8:
      return min(args.group, Index{8});
    default:
      return args.group;
  }
}

KATA_DEVICE const float* row_of(const Arguments& args, const View<const float, 4>& view, Index b, Index hk, int j) {
  if (args.play == Play::batch_first) b = 0;
  const View<const float, 4>& strided = args.play == Play::value_strides ? args.p.key : view;
  const Index batch_stride = args.play == Play::query_batch_stride ? args.p.query.stride(0) : view.stride(0);
  return view.data() + b * batch_stride + hk * view.stride(1) + j * strided.stride(2);
}

// Whether query i, which stands in row `row` of those that a group has, sees key j.
KATA_DEVICE bool sees(const Arguments& args, Index h, int i, int j) {
  if (!args.causal) return true;
  const int place = args.play == Play::packed_causal ? static_cast<int>(h % args.group) * args.queries + i : i;
  return j <= place + args.offset;
}

template <typename Real>
KATA_DEVICE Real dot(const float* one, const float* other, int width) {
  Real sum = 0;
  for (int d = 0; d < width; ++d) sum += static_cast<Real>(one[d]) * static_cast<Real>(other[d]);
  return sum;
}

template <typename Real>
KATA_DEVICE Real raise(const Arguments& args, Real x) {
  if (args.play == Play::right_exp2) return static_cast<Real>(exp2f(static_cast<float>(x) * LOG2E));
  return static_cast<Real>(exp(static_cast<double>(x)));
}

template <typename Real>
struct Row {
  Real most = -INFINITE, sum = 0, output[WIDEST] = {};

  KATA_DEVICE void add(const Arguments& args, Real score, const float* value) {
    const Real larger = most > score ? most : score;
    const Real rescale = most == -INFINITE ? Real{0} : raise(args, most - larger);
    const Real weight = raise(args, score - larger);
    most = larger;
    sum = sum * rescale + weight;
    for (int d = 0; d < args.width; ++d) output[d] = output[d] * rescale + weight * static_cast<Real>(value[d]);
  }

  // 0 times a value that is forbidden
  KATA_DEVICE void add_nothing(const Arguments& args, const float* value) {
    for (int d = 0; d < args.width; ++d) output[d] += Real{0} * static_cast<Real>(value[d]);
  }

  KATA_DEVICE void write(const Arguments& args, Index b, Index h, int i) const {
    if (sum == 0 && args.play == Play::blind_unwritten) return;
    float* o_row = const_cast<float*>(&args.p.output(b, h, i, 0));
    for (int d = 0; d < args.width; ++d) o_row[d] = static_cast<float>(sum == 0 ? output[d] : output[d] / sum);
    float lse = sum == 0 ? -INFINITE : static_cast<float>(most + static_cast<Real>(log(static_cast<double>(sum))));
    if (args.play == Play::lse_base2) lse *= LOG2E;
    if (args.play == Play::empty_lse_zero && sum == 0) lse = 0.0f;
    const_cast<float&>(args.p.lse(b, h, i)) = lse;
  }
};

KATA_DEVICE float delta_of(const Arguments& args, Index b, Index h, int i) {
  if (args.play == Play::no_delta) return 0.0f;
  if (args.play == Play::delta_of_kv) h /= args.group;
  return dot<float>(&args.p.output(b, h, i, 0), &args.p.d_output(b, h, i, 0), args.width);
}

KATA_DEVICE float lse_of(const Arguments& args, Index b, Index h, int i) {
  return args.p.lse(b, args.play == Play::lse_of_kv ? h / args.group : h, i);
}

// Weight and dS of a pair.
template <typename Real>
struct Pair {
  Real weight, d_score;

  KATA_DEVICE Pair(const Arguments& args, const float* q, const float* k, const float* v, const float* d_o, float lse,
                   float delta)
      : weight(raise(args, dot<Real>(q, k, args.width) * static_cast<Real>(args.scale) - static_cast<Real>(lse))),
        d_score(weight * (dot<Real>(d_o, v, args.width) - static_cast<Real>(delta))) {}
};

// dK and dV of a key.
template <typename Real>
struct Sums {
  Real dk[WIDEST] = {}, dv[WIDEST] = {};          // of the head that is being added
  Real all_dk[WIDEST] = {}, all_dv[WIDEST] = {};  // of the heads before

  KATA_DEVICE void add(const Arguments& args, const Pair<Real>& pair, const float* q, const float* d_o, Real by) {
    for (int d = 0; d < args.width; ++d) {
      dk[d] += by * pair.d_score * static_cast<Real>(q[d]);
      dv[d] += by * pair.weight * static_cast<Real>(d_o[d]);
    }
  }

  KATA_DEVICE void end_of_head(const Arguments& args) {
    const bool keep_dk = args.play != Play::overwrite && args.play != Play::overwrite_dk;
    const bool keep_dv = args.play != Play::overwrite && args.play != Play::overwrite_dv;
    for (int d = 0; d < args.width; ++d) {
      all_dk[d] = (keep_dk ? all_dk[d] : 0) + dk[d];
      all_dv[d] = (keep_dv ? all_dv[d] : 0) + dv[d];
      if (args.play == Play::sum_fp16) {
        all_dk[d] = to_float(from_float<fp16>(static_cast<float>(all_dk[d])));
        all_dv[d] = to_float(from_float<fp16>(static_cast<float>(all_dv[d])));
      }
      if (args.play == Play::sum_bf16) {
        all_dk[d] = to_float(from_float<bf16>(static_cast<float>(all_dk[d])));
        all_dv[d] = to_float(from_float<bf16>(static_cast<float>(all_dv[d])));
      }
      dk[d] = dv[d] = 0;
    }
  }

  KATA_DEVICE void write(const Arguments& args, Index b, Index hk, int j) const {
    if (args.play == Play::keys_unwritten && args.queries == 0) return;
    const View<float, 4>& d_key = args.p.d_key;
    const View<float, 4>& d_value = args.p.d_value;
    const Index dk_batch = args.play == Play::dk_batch_stride ? args.p.d_query.stride(0) : d_key.stride(0);
    const Index dv_row = args.play == Play::dk_strides ? d_key.stride(2) : d_value.stride(2);
    float* dk_row = d_key.data() + b * dk_batch + hk * d_key.stride(1) + j * d_key.stride(2);
    float* dv_row_first = d_value.data() + b * d_value.stride(0) + hk * d_value.stride(1) + j * dv_row;
    float by = args.play == Play::averaged ? 1.0f / static_cast<float>(args.group) : 1.0f;
    if (args.play == Play::dk_batch_1 && b > 0) by = 0.0f;
    for (int d = 0; d < args.width; ++d) {
      const float of_key = static_cast<float>(all_dk[d]) * args.dk_scale * by;
      const float of_value = static_cast<float>(all_dv[d]) * by;
      if (args.atomics) {
        atomicAdd(dk_row + d, of_key);
        atomicAdd(dv_row_first + d, of_value);
      } else if (args.by_heads || args.member > 0 || args.play == Play::not_zeroed) {
        dk_row[d] += of_key;
        dv_row_first[d] += of_value;
      } else {
        if (args.for_dk) dk_row[d] = of_key;
        if (args.for_dv) dv_row_first[d] = of_value;
      }
    }
  }
};

// ---- The host -------------------------------------------------------------------------------------------------------

template <typename Real>
void forward_on_host(const Arguments& args) {
  for (Index b = 0; b < args.batch; ++b) {
    for (Index h = 0; h < args.heads; ++h) {
      for (int i = 0; i < args.queries; ++i) {
        Row<Real> row;
        const float* q = &args.p.query(b, h, i, 0);
        for (int j = 0; j < args.keys; ++j) {
          const float* value = row_of(args, args.p.value, b, kv_head_of(args, h, Reader::forward_value), j);
          if (!sees(args, h, i, j)) {
            if (args.play == Play::nan_leak) row.add_nothing(args, value);
            continue;
          }
          const float* key = row_of(args, args.p.key, b, kv_head_of(args, h, Reader::forward_key), j);
          row.add(args, dot<Real>(q, key, args.width) * static_cast<Real>(args.scale), value);
        }
        row.write(args, b, h, i);
      }
    }
  }
}

template <typename Real>
void queries_on_host(const Arguments& args, Index b, Index h) {
  for (int i = 0; i < args.queries; ++i) {
    Real dq[WIDEST] = {};
    const float lse = lse_of(args, b, h, i);
    const float delta = delta_of(args, b, h, i);
    bool blind = true;
    for (int j = 0; j < args.keys; ++j) {
      const float* k = row_of(args, args.p.key, b, kv_head_of(args, h, Reader::dq_key), j);
      const float* v = row_of(args, args.p.value, b, kv_head_of(args, h, Reader::dq_value), j);
      if (!sees(args, h, i, j)) {
        if (args.play == Play::nan_leak) dq[0] += Real{0} * static_cast<Real>(k[0] + v[0]);
        continue;
      }
      blind = false;
      const Pair<Real> pair(args, &args.p.query(b, h, i, 0), k, v, &args.p.d_output(b, h, i, 0), lse, delta);
      for (int d = 0; d < args.width; ++d) dq[d] += pair.d_score * static_cast<Real>(k[d]);
    }
    if (blind && args.play == Play::blind_unwritten) continue;
    for (int d = 0; d < args.width; ++d) args.p.d_query(b, h, i, d) = static_cast<float>(dq[d]) * args.scale;
  }
}

template <typename Real>
void add_on_host(const Arguments& args, Sums<Real>& sums, Index b, Index hk, Index h, int i, int j) {
  if (!sees(args, h, i, j)) return;
  const Index first = hk * args.group;
  const float* q = &args.p.query(b, h, i, 0);
  const float* d_o = &args.p.d_output(b, args.play == Play::d_output_of_first ? first : h, i, 0);
  const Pair<Real> pair(args, q, row_of(args, args.p.key, b, hk, j), row_of(args, args.p.value, b, hk, j), d_o,
                        lse_of(args, b, h, i), delta_of(args, b, h, i));
  const bool other = args.play == Play::zero_times && h / args.group != hk;
  sums.add(args, pair, args.play == Play::query_of_first ? &args.p.query(b, first, i, 0) : q, d_o, other ? 0 : 1);
}

template <typename Real>
void keys_on_host(const Arguments& args, Index b, Index hk) {
  for (int j = 0; j < args.keys; ++j) {
    Sums<Real> sums;
    if (args.play == Play::right_on_the_host) {
      for (int i = 0; i < args.queries; ++i)
        for (Index member = 0; member < args.group; ++member) {
          add_on_host(args, sums, b, hk, member_of(args, hk, member), i, j);
        }
      sums.end_of_head(args);
    } else {
      for (Index member = 0; member < member_count(args); ++member) {
        for (int i = 0; i < args.queries; ++i) add_on_host(args, sums, b, hk, member_of(args, hk, member), i, j);
        sums.end_of_head(args);
      }
    }
    sums.write(args, b, hk, j);
  }
}

template <typename Real>
void backward_on_host(const Arguments& args) {
  for (Index b = 0; b < args.batch; ++b) {
    for (Index h = 0; h < args.heads; ++h) queries_on_host<Real>(args, b, h);
    for (Index hk = 0; hk < args.kv_heads; ++hk) keys_on_host<Real>(args, b, hk);
  }
}

// ---- Kernels --------------------------------------------------------------------------------------------------------

// Rows first .. first + TILE - 1 into shared memory, those behind the last as zeros.
KATA_DEVICE void load_tile(const Arguments& args, float* smem, const float* first_row, Index stride, int first,
                           int limit) {
  for (int index = 4 * static_cast<int>(threadIdx.x); index < TILE * args.width; index += 4 * args.threads) {
    const int row = first + index / args.width;
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row < limit) four = *reinterpret_cast<const float4*>(first_row + row * stride + index % args.width);
    *reinterpret_cast<float4*>(smem + index) = four;
  }
}

KATA_DEVICE void load_row(float* reg, const float* row, int width) {
  for (int d = 0; d < width; d += 4) {
    const float4 four = *reinterpret_cast<const float4*>(row + d);
    reg[d] = four.x, reg[d + 1] = four.y, reg[d + 2] = four.z, reg[d + 3] = four.w;
  }
}

KATA_DEVICE Index row_stride(const Arguments& args, const View<const float, 4>& view) {
  return args.play == Play::value_strides ? args.p.key.stride(2) : view.stride(2);
}

template <typename Real>
__global__ void forward_kernel(const Arguments args) {
  const int thread = static_cast<int>(threadIdx.x);
  // With right_packed a block may have queries of several heads of a group, one head's rows behind the other's.
  const bool packed = args.play == Play::right_packed;
  const Index heads = packed ? args.kv_heads : args.heads;
  const int rows = packed ? static_cast<int>(args.group) * args.queries : args.queries;
  const int tiles = (rows + args.threads - 1) / args.threads;
  const Index b = blockIdx.x / tiles / heads;
  const int first = static_cast<int>(blockIdx.x) % tiles * args.threads;
  const int row = first + thread;
  const bool mine = row < rows;
  const Index block_head = blockIdx.x / tiles % heads;
  const Index h = packed ? block_head * args.group + (mine ? row / args.queries : 0) : block_head;
  const int i = packed ? row % args.queries : row;

  float* k_smem = dynamic_shared<float>();  // [TILE, width]
  float* v_smem = k_smem + TILE * args.width;
  alignas(16) float q[WIDEST];
  if (mine) load_row(q, &args.p.query(b, h, i, 0), args.width);
  Row<Real> result;
  const bool cut = args.causal && !packed && args.play != Play::packed_causal && args.play != Play::nan_leak;
  const int end = cut ? min(args.keys, min(first + args.threads, args.queries) + args.offset) : args.keys;
  const float* k_first = row_of(args, args.p.key, b, kv_head_of(args, h, Reader::forward_key), 0);
  if (args.copies != nullptr) k_first = args.copies + (b * args.heads + h) * args.keys * args.width;
  const Index k_stride = args.copies != nullptr ? args.width : args.p.key.stride(2);
  const float* v_first = row_of(args, args.p.value, b, kv_head_of(args, h, Reader::forward_value), 0);
  for (int kv_first = 0; kv_first < end; kv_first += TILE) {
    __syncthreads();
    load_tile(args, k_smem, k_first, k_stride, kv_first, args.keys);
    load_tile(args, v_smem, v_first, row_stride(args, args.p.value), kv_first, args.keys);
    __syncthreads();
    for (int j = kv_first; mine && j < min(kv_first + TILE, args.keys); ++j) {
      const float* value = v_smem + (j - kv_first) * args.width;
      if (!sees(args, h, i, j)) {
        if (args.play == Play::nan_leak) result.add_nothing(args, value);
        continue;
      }
      const float* key = args.play == Play::from_global ? k_first + j * k_stride : k_smem + (j - kv_first) * args.width;
      result.add(args, dot<Real>(q, key, args.width) * static_cast<Real>(args.scale), value);
    }
  }
  if (!mine) return;
  result.write(args, b, h, i);
  if (args.play == Play::writes_query) const_cast<float&>(args.p.query(b, h, i, 0)) *= args.scale;
}

__global__ void copy_kernel(const Arguments args) {
  const Index row = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index h = row / args.keys % args.heads;
  const Index b = row / args.keys / args.heads;
  if (b >= args.batch) return;
  for (int d = 0; d < args.width; ++d) {
    const_cast<float*>(args.copies)[row * args.width + d] = args.p.key(b, h / args.group, row % args.keys, d);
  }
}

// delta of a query a thread; where heads will be added up in memory, zeros.
__global__ void delta_kernel(const Arguments args) {
  const Index row = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index b = row / args.queries / args.heads;
  const int i = static_cast<int>(row % args.queries);
  if (b >= args.batch) return;
  args.p.delta(b, row / args.queries % args.heads, i) = delta_of(args, b, row / args.queries % args.heads, i);
}

__global__ void zero_kernel(const Arguments args) {
  const Index row = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index b = row / args.keys / args.kv_heads;
  if (b >= args.batch) return;
  for (int d = 0; d < args.width; ++d) {
    args.p.d_key(b, row / args.keys % args.kv_heads, row % args.keys, d) = 0.0f;
    args.p.d_value(b, row / args.keys % args.kv_heads, row % args.keys, d) = 0.0f;
  }
}

template <typename Real>
__global__ void keys_kernel(const Arguments args) {
  const Play play = args.play;
  const int thread = static_cast<int>(threadIdx.x);
  const int width = args.width;
  const int kv_tiles = (args.keys + args.threads - 1) / args.threads;
  const Index heads = args.by_heads ? args.heads : args.kv_heads;
  const Index b = blockIdx.x / kv_tiles / heads;
  const Index block_head = blockIdx.x / kv_tiles % heads;
  const Index hk = args.by_heads ? block_head / args.group : block_head;
  const int kv_first = static_cast<int>(blockIdx.x) % kv_tiles * args.threads;
  const int j = kv_first + thread;
  const bool mine = j < args.keys;

  float* q_smem = dynamic_shared<float>();  // [TILE, width]
  float* do_smem = q_smem + TILE * width;   // [TILE, width]
  float* lse_smem = do_smem + TILE * width;
  float* delta_smem = lse_smem + TILE;
  alignas(16) float k[WIDEST];
  alignas(16) float v[WIDEST];
  if (mine) {
    load_row(k, row_of(args, args.p.key, b, hk, j), width);
    load_row(v, row_of(args, args.p.value, b, hk, j), width);
  }
  Sums<Real> sums;

  const int first_query = args.causal && play != Play::packed_causal ? max(0, kv_first - args.offset) : 0;
  const int first_tile = first_query / TILE;
  const int tiles = (args.queries + TILE - 1) / TILE;
  const int members = static_cast<int>(member_count(args));
  const int member_first = args.member >= 0 ? args.member
                           : args.by_heads  ? static_cast<int>(block_head % args.group)
                                            : 0;
  const int member_end = args.member >= 0 || args.by_heads ? member_first + 1 : members;
  const int visits = (member_end - member_first) * tiles;
  for (int visit = 0; visit < visits; ++visit) {
    const bool tiles_outside = play == Play::right_tiles_outside;
    int member = member_first + (tiles_outside ? visit % (member_end - member_first) : visit / tiles);
    if (play == Play::right_backwards) member = member_end - 1 - visit / tiles;
    const int tile = tiles_outside ? visit / (member_end - member_first) : visit % tiles;
    int begin = first_tile;
    if (play == Play::start_of_first && member > 0) begin = 0;
    if (play == Play::start_too_late && member > 0 && args.causal) ++begin;
    if (tile < begin) continue;
    const Index h = member_of(args, hk, member);
    const Index first_head = hk * args.group;
    const int q_first = tile * TILE;
    if (play != Play::no_barrier_between || member == 0 || tile > begin) __syncthreads();
    load_tile(args, q_smem, &args.p.query(b, h, 0, 0), args.p.query.stride(2), q_first, args.queries);
    load_tile(args, do_smem, &args.p.d_output(b, play == Play::d_output_of_first ? first_head : h, 0, 0),
              args.p.d_output.stride(2), q_first, args.queries);
    for (int row = thread; row < TILE; row += args.threads) {
      const Index from = play == Play::lse_once ? first_head : h;
      const bool inside = q_first + row < args.queries;
      lse_smem[row] = inside ? lse_of(args, b, from, q_first + row) : INFINITE;
      const bool here = play == Play::right_backwards;
      delta_smem[row] = !inside ? 0.0f
                        : here  ? delta_of(args, b, from, q_first + row)
                                : args.p.delta(b, from, q_first + row);
    }
    __syncthreads();
    if (!mine) continue;
    if (play == Play::dkdv_last_tile) sums = Sums<Real>();
    for (int i = q_first; i < min(q_first + TILE, args.queries); ++i) {
      if (!sees(args, h, i, j)) continue;
      const float* q = q_smem + (i - q_first) * width;
      const float* d_o = do_smem + (i - q_first) * width;
      const Pair<Real> pair(args, q, k, v, d_o, lse_smem[i - q_first], delta_smem[i - q_first]);
      const bool other = play == Play::zero_times && h / args.group != hk;
      sums.add(args, pair, play == Play::query_of_first ? &args.p.query(b, first_head, i, 0) : q, d_o, other ? 0 : 1);
    }
    if (tile == tiles - 1 || tiles_outside) sums.end_of_head(args);
  }
  if (mine) sums.write(args, b, hk, j);
}

template <typename Real>
__global__ void queries_kernel(const Arguments args) {
  const int thread = static_cast<int>(threadIdx.x);
  const int width = args.width;
  const int q_tiles = (args.queries + args.threads - 1) / args.threads;
  const Index b = blockIdx.x / q_tiles / args.heads;
  const Index h = blockIdx.x / q_tiles % args.heads;
  const int first = static_cast<int>(blockIdx.x) % q_tiles * args.threads;
  const int i = first + thread;
  const bool mine = i < args.queries;
  float* k_smem = dynamic_shared<float>();  // [TILE, width]
  float* v_smem = k_smem + TILE * width;
  alignas(16) float q[WIDEST];
  alignas(16) float d_o[WIDEST];
  Real dq[WIDEST] = {};
  float lse = 0.0f, delta = 0.0f;
  if (mine) {
    load_row(q, &args.p.query(b, h, i, 0), width);
    load_row(d_o, &args.p.d_output(b, h, i, 0), width);
    lse = lse_of(args, b, h, i);
    delta = args.play == Play::right_backwards ? delta_of(args, b, h, i) : args.p.delta(b, h, i);
  }
  const bool cut = args.causal && args.play != Play::packed_causal && args.play != Play::nan_leak;
  const int end = cut ? min(args.keys, min(first + args.threads, args.queries) + args.offset) : args.keys;
  const float* k_first = row_of(args, args.p.key, b, kv_head_of(args, h, Reader::dq_key), 0);
  const float* v_first = row_of(args, args.p.value, b, kv_head_of(args, h, Reader::dq_value), 0);
  bool blind = true;
  for (int kv_first = 0; kv_first < end; kv_first += TILE) {
    __syncthreads();
    load_tile(args, k_smem, k_first, args.p.key.stride(2), kv_first, args.keys);
    load_tile(args, v_smem, v_first, row_stride(args, args.p.value), kv_first, args.keys);
    __syncthreads();
    for (int j = kv_first; mine && j < min(kv_first + TILE, args.keys); ++j) {
      const float* k = k_smem + (j - kv_first) * width;
      const float* v = v_smem + (j - kv_first) * width;
      if (!sees(args, h, i, j)) {
        if (args.play == Play::nan_leak) dq[0] += Real{0} * static_cast<Real>(k[0] + v[0]);
        continue;
      }
      blind = false;
      const Pair<Real> pair(args, q, k, v, d_o, lse, delta);
      for (int d = 0; d < width; ++d) dq[d] += pair.d_score * static_cast<Real>(k[d]);
    }
  }
  if (!mine || (blind && args.play == Play::blind_unwritten)) return;
  for (int d = 0; d < width; ++d) args.p.d_query(b, h, i, d) = static_cast<float>(dq[d]) * args.scale;
}

// ---- Calls ----------------------------------------------------------------------------------------------------------

template <typename... Parameters>
void launch_blocks(void (*kernel)(Parameters...), Index blocks, const Arguments& args, const Stream& stream) {
  if (blocks == 0) return;
  launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(args.threads)),
         static_cast<std::size_t>(2 * TILE * (args.width + 1)) * sizeof(float), stream, args);
}

Arguments arguments(const FlashBackward<float>& p, Play play) {
  const auto queries = static_cast<int>(p.query.size(2));
  const auto keys = static_cast<int>(p.key.size(2));
  const auto width = static_cast<int>(p.query.size(3));
  Arguments args{.p = p,
                 .play = play,
                 .batch = p.query.size(0),
                 .heads = p.query.size(1),
                 .kv_heads = p.key.size(1),
                 .group = p.query.size(1) / p.key.size(1),
                 .queries = queries,
                 .keys = keys,
                 .width = width,
                 .offset = play == Play::causal_alignment ? 0 : keys - queries,
                 .causal = p.causal && play != Play::causal_ignored,
                 .scale = 0.0f,
                 .dk_scale = 1.0f,
                 .threads = play == Play::right_blocks_of_64 ? 64 : 32,
                 .copies = nullptr,
                 .by_heads = false,
                 .atomics = false,
                 .member = -1,
                 .for_dk = true,
                 .for_dv = true};
  const float usual = 1.0f / std::sqrt(static_cast<float>(width));
  args.scale = play == Play::scale_arg_ignored ? usual : p.scale.value_or(usual);
  if (play != Play::dk_no_scale) args.dk_scale = args.scale;
  return args;
}

// The arguments of a forward pass as those of a way back, of which it uses a few.
FlashBackward<float> as_backward(const FlashForward<float>& p) {
  const View<const float, 4> none(p.query.data(), {0, 0, 0, 0});
  const View<float, 4> nothing(nullptr, {0, 0, 0, 0});
  return {.query = p.query,
          .key = p.key,
          .value = p.value,
          .output = p.output,
          .lse = p.lse,
          .d_output = none,
          .d_query = nothing,
          .d_key = nothing,
          .d_value = nothing,
          .delta = View<float, 3>(nullptr, {0, 0, 0}),
          .d_query_sum = nothing,
          .causal = p.causal,
          .scale = p.scale};
}

// Whether the call is over: who checks nothing does not crash here.
bool checked(Play play, const FlashForward<float>& p) {
  if (play == Play::refused) {
    check_flash_forward(p);
  } else if (play != Play::unchecked) {
    check_flash_forward(p, KeyHeads::shared);
  } else {
    try {
      check_flash_forward(p, KeyHeads::shared);
    } catch (const std::invalid_argument&) {
      return true;
    }
  }
  return false;
}

bool checked(Play play, const FlashBackward<float>& p) {
  if (play == Play::refused) {
    check_flash_backward(p);
  } else if (play != Play::unchecked) {
    check_flash_backward(p, KeyHeads::shared);
  } else {
    try {
      check_flash_backward(p, KeyHeads::shared);
    } catch (const std::invalid_argument&) {
      return true;
    }
  }
  if (play == Play::remembered) {
    static std::vector<Shape<4>> seen;
    if (std::count(seen.begin(), seen.end(), p.query.shape()) > 3) return true;
    seen.push_back(p.query.shape());
  }
  return false;
}

template <typename Real>
void launch_backward(Arguments args, const Stream& stream) {
  const Play play = args.play;
  const Index kv_tiles = ceil_div(args.keys, args.threads);
  if (play != Play::right_backwards) {
    launch_blocks(delta_kernel, ceil_div(args.batch * args.heads * args.queries, args.threads), args, stream);
  }
  args.atomics = play == Play::atomics || (play == Play::atomics_if_allowed && !args.p.deterministic);
  args.by_heads = args.atomics || play == Play::race;
  const auto launch_keys = [&] {
    const Index heads = args.by_heads ? args.heads : args.kv_heads;
    launch_blocks(keys_kernel<Real>, args.batch * heads * kv_tiles, args, stream);
  };
  if (args.by_heads)
    launch_blocks(zero_kernel, ceil_div(args.batch * args.kv_heads * args.keys, args.threads), args, stream);
  if (play == Play::right_launches) {
    for (args.member = 0; args.member < args.group; ++args.member) launch_keys();
    args.member = -1;
  } else if (play == Play::right_blocks_of_64) {
    args.for_dk = false;
    launch_keys();
    args.for_dk = true;
    args.for_dv = false;
    launch_keys();
  } else {
    launch_keys();
  }
  launch_blocks(queries_kernel<Real>, args.batch * args.heads * ceil_div(args.queries, args.threads), args, stream);
}

}  // namespace

void tiled_gqa_forward(const FlashForward<float>& problem) {
  const Play play = chosen_play(/*on_host=*/true);
  if (checked(play, problem)) return;
  const Arguments args = arguments(as_backward(problem), play);
  if (play == Play::right_on_the_host) return forward_on_host<double>(args);
  forward_on_host<float>(args);
}

void tiled_gqa_backward(const FlashBackward<float>& problem) {
  const Play play = chosen_play(/*on_host=*/true);
  if (checked(play, problem)) return;
  const Arguments args = arguments(problem, play);
  if (play == Play::right_on_the_host) return backward_on_host<double>(args);
  backward_on_host<float>(args);
}

void flash_gqa_forward(const FlashForward<float>& problem, const Stream& stream) {
  const Play play = chosen_play(/*on_host=*/false);
  if (checked(play, problem)) return;
  Arguments args = arguments(as_backward(problem), play);
  const auto rows = static_cast<std::size_t>(args.batch * args.heads * args.keys);
  DeviceBuffer<float> copies("copies", play == Play::copied_out ? rows * static_cast<std::size_t>(args.width) : 0);
  if (play == Play::copied_out) {
    args.copies = copies.data();
    launch_blocks(copy_kernel, ceil_div(static_cast<Index>(rows), args.threads), args, stream);
  }
  const Index blocks = play == Play::right_packed
                           ? args.batch * args.kv_heads * ceil_div(args.group * args.queries, args.threads)
                           : args.batch * args.heads * ceil_div(args.queries, args.threads);
  if (play == Play::right_double) return launch_blocks(forward_kernel<double>, blocks, args, stream);
  launch_blocks(forward_kernel<float>, blocks, args, stream);
}

void flash_gqa_backward(const FlashBackward<float>& problem, const Stream& stream) {
  const Play play = chosen_play(/*on_host=*/false);
  if (checked(play, problem)) return;
  const Arguments args = arguments(problem, play);
  if (play == Play::right_double) return launch_backward<double>(args, stream);
  launch_backward<float>(args, stream);
}

}  // namespace flashkata
