#include "flashkata.h"

#include <algorithm>
#include <string>
#include <vector>

#include "common/attention/not_implemented.hpp"
#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"
#include "phase2_forward/04_flash_forward/flash_forward.hpp"
#include "phase2_forward/05_flash_forward_mma/flash_forward_mma.hpp"
#include "phase3_backward/03_tiled_backward/tiled_backward.hpp"
#include "phase3_backward/04_flash_backward/flash_backward.hpp"
#include "phase3_backward/05_flash_backward_mma/flash_backward_mma.hpp"
#include "phase4_extensions/01_varlen/varlen.hpp"
#include "phase4_extensions/02_gqa/gqa.hpp"
#include "phase4_extensions/03_dropout/dropout.hpp"
#include "phase4_extensions/04_sliding_window/sliding_window.hpp"
#include "phase4_extensions/05_grouped/grouped.hpp"
#include "phase4_extensions/06_split_kv/split_kv.hpp"
#include "phase4_extensions/07_paged_kv/paged_kv.hpp"

namespace {

using namespace flashkata;

thread_local std::string message;

// Runs `work`; exceptions stop here, for C knows none.
template <typename Work>
int guarded(const Work& work) {
  message.clear();
  try {
    work();
    return FLASHKATA_OK;
  } catch (const NotImplemented& error) {
    message = error.file();
    return FLASHKATA_NOT_IMPLEMENTED;
  } catch (const std::invalid_argument& error) {
    message = error.what();
    return FLASHKATA_BAD_ARGUMENT;
  } catch (const std::exception& error) {
    message = error.what();
    return FLASHKATA_FAILED;
  }
}

template <typename T>
View<T, 4> view(const flashkata_tensor& tensor) {
  Shape<4> shape{};
  Shape<4> strides{};
  std::copy_n(tensor.shape, 4, shape.begin());
  std::copy_n(tensor.strides, 4, strides.begin());
  return {static_cast<T*>(tensor.data), shape, strides};
}

// One number for each query.
View<float, 3> rows(float* data, const flashkata_attention& p) {
  return {data, {p.query.shape[0], p.query.shape[1], p.query.shape[2]}};
}

void copy(const Tensor<float, 4>& from, const View<float, 4>& to, const char* name) {
  require(to.shape() == from.shape(), name, to_text(to.shape()), to_text(from.shape()));
  require(to.stride(3) == 1 || to.size(3) <= 1, name, "a last axis of stride " + std::to_string(to.stride(3)),
          "a contiguous last axis");
  for (Index b = 0; b < to.size(0); ++b)
    for (Index h = 0; h < to.size(1); ++h) as_matrix(to[b][h]) = as_matrix(from.view()[b][h]);
}

void dense_forward_on_cpu(const flashkata_attention& p) {
  const TiledResult result =
      tiled_forward(view<const float>(p.query), view<const float>(p.key), view<const float>(p.value),
                    {.causal = p.causal != 0, .scale = p.scale, .threads = p.threads});
  copy(result.output, view<float>(p.output), "output");
  std::copy_n(result.lse.data(), result.lse.count(), p.lse);
}

void dense_backward_on_cpu(const flashkata_attention& p) {
  const TiledGradients result = tiled_backward(
      view<const float>(p.query), view<const float>(p.key), view<const float>(p.value), view<const float>(p.output),
      rows(p.lse, p), view<const float>(p.d_output), {.causal = p.causal != 0, .scale = p.scale, .threads = p.threads});
  copy(result.query, view<float>(p.d_query), "d_query");
  copy(result.key, view<float>(p.d_key), "d_key");
  copy(result.value, view<float>(p.d_value), "d_value");
}

template <typename Call>
Stream stream_of(const Call& p) {
#if KATA_REAL_GPU
  return Stream::borrowed(static_cast<cudaStream_t>(p.stream));
#else
  require(p.stream == nullptr, "stream", "a stream", "null: the virtual GPU has only the default one");
  return {};
#endif
}

template <typename T>
FlashForward<T> forward_problem(const flashkata_attention& p) {
  return {.query = view<const T>(p.query),
          .key = view<const T>(p.key),
          .value = view<const T>(p.value),
          .output = view<T>(p.output),
          .lse = rows(p.lse, p),
          .causal = p.causal != 0,
          .scale = p.scale};
}

template <typename T>
FlashBackward<T> backward_problem(const flashkata_attention& p) {
  return {.query = view<const T>(p.query),
          .key = view<const T>(p.key),
          .value = view<const T>(p.value),
          .output = view<const T>(p.output),
          .lse = rows(p.lse, p),
          .d_output = view<const T>(p.d_output),
          .d_query = view<T>(p.d_query),
          .d_key = view<T>(p.d_key),
          .d_value = view<T>(p.d_value),
          .delta = rows(p.delta, p),
          .d_query_sum = View<float, 4>(p.d_query_sum, view<const T>(p.query).shape()),
          .causal = p.causal != 0,
          .scale = p.scale,
          .deterministic = p.deterministic != 0};
}

[[noreturn]] void refuse(std::string_view argument, const std::string& value, std::string_view allowed) {
  require(false, argument, value, allowed);
  throw std::logic_error("unreachable");
}

// Which of phase 4's steps is asked for.
enum class Extension { none, varlen, gqa, dropout, window, groups };

Extension extension_of(const flashkata_attention& p) {
  Extension found = Extension::none;
  std::string names;
  const auto ask = [&](bool asked, Extension extension, const char* name) {
    if (!asked) return;
    names += names.empty() ? name : std::string(" and ") + name;
    found = extension;
  };
  const bool grouped = p.groups != nullptr || p.group_count > 0;
  ask(p.cu_seqlens_q != nullptr || p.cu_seqlens_k != nullptr, Extension::varlen, "cu_seqlens");
  ask(p.key.shape[1] != p.query.shape[1] && !grouped, Extension::gqa, "fewer key/value heads than query heads");
  ask(p.dropout_p != 0.0f, Extension::dropout, "dropout_p");
  ask(p.window != nullptr || p.softcap != 0.0f, Extension::window, "window or softcap");
  ask(grouped, Extension::groups, "groups");
  require(names.find(" and ") == std::string::npos, "options", names, "one of them: each is a step of its own");
  return found;
}

Sequences sequences_of(const flashkata_attention& p) {
  const Shape<1> shape{p.sequences + 1};
  return {.cu_seqlens_q = View<const std::int32_t, 1>(p.cu_seqlens_q, shape),
          .cu_seqlens_k = View<const std::int32_t, 1>(p.cu_seqlens_k, shape),
          .max_seqlen_q = p.max_seqlen_q,
          .max_seqlen_k = p.max_seqlen_k};
}

Dropout dropout_of(const flashkata_attention& p) {
  return {.probability = p.dropout_p, .seed = p.dropout_seed, .offset = p.dropout_offset};
}

Window window_of(const flashkata_attention& p) {
  Window window{.softcap = p.softcap};
  if (p.window != nullptr && p.window[0] >= 0) window.left = p.window[0];
  if (p.window != nullptr && p.window[1] >= 0) window.right = p.window[1];
  return window;
}

std::vector<Group> groups_of(const flashkata_attention& p) {
  std::vector<Group> groups;
  for (int64_t g = 0; g < p.group_count; ++g) {
    const int64_t* bounds = p.groups + 4 * g;
    groups.push_back({.q_begin = bounds[0], .q_end = bounds[1], .k_begin = bounds[2], .k_end = bounds[3]});
  }
  return groups;
}

void forward_on_cpu(const flashkata_attention& p) {
  const Extension extension = extension_of(p);
  if (extension == Extension::none) return dense_forward_on_cpu(p);
  const auto problem = forward_problem<float>(p);
  switch (extension) {
    case Extension::varlen:
      return tiled_varlen_forward(problem, sequences_of(p));
    case Extension::gqa:
      return tiled_gqa_forward(problem);
    case Extension::dropout:
      return tiled_dropout_forward(problem, dropout_of(p));
    case Extension::window:
      return tiled_window_forward(problem, window_of(p));
    default:
      return tiled_grouped_forward(problem, groups_of(p));
  }
}

void backward_on_cpu(const flashkata_attention& p) {
  const Extension extension = extension_of(p);
  if (extension == Extension::none) return dense_backward_on_cpu(p);
  const auto problem = backward_problem<float>(p);
  switch (extension) {
    case Extension::varlen:
      return tiled_varlen_backward(problem, sequences_of(p));
    case Extension::gqa:
      return tiled_gqa_backward(problem);
    case Extension::dropout:
      return tiled_dropout_backward(problem, dropout_of(p));
    case Extension::window:
      return tiled_window_backward(problem, window_of(p));
    default:
      return tiled_grouped_backward(problem, groups_of(p));
  }
}

constexpr const char* GROUPS_WANT_16_BITS = "1 (float16) or 2 (bfloat16) with groups on the GPU";

void forward_in_float(const flashkata_attention& p) {
  const auto problem = forward_problem<float>(p);
  switch (extension_of(p)) {
    case Extension::none:
      return flash_forward(problem, stream_of(p));
    case Extension::varlen:
      return flash_varlen_forward(problem, sequences_of(p), stream_of(p));
    case Extension::gqa:
      return flash_gqa_forward(problem, stream_of(p));
    case Extension::dropout:
      return flash_dropout_forward(problem, dropout_of(p), stream_of(p));
    case Extension::window:
      return flash_window_forward(problem, window_of(p), stream_of(p));
    case Extension::groups:
      refuse("type", "0 (float32)", GROUPS_WANT_16_BITS);
  }
}

void backward_in_float(const flashkata_attention& p) {
  const auto problem = backward_problem<float>(p);
  switch (extension_of(p)) {
    case Extension::none:
      return flash_backward(problem, stream_of(p));
    case Extension::varlen:
      return flash_varlen_backward(problem, sequences_of(p), stream_of(p));
    case Extension::gqa:
      return flash_gqa_backward(problem, stream_of(p));
    case Extension::dropout:
      return flash_dropout_backward(problem, dropout_of(p), stream_of(p));
    case Extension::window:
      return flash_window_backward(problem, window_of(p), stream_of(p));
    case Extension::groups:
      refuse("type", "0 (float32)", GROUPS_WANT_16_BITS);
  }
}

[[noreturn]] void refuse_16_bits(const flashkata_attention& p) {
  refuse("type", std::to_string(p.type), "0 (float32) with cu_seqlens, dropout_p, window, softcap or shared heads");
}

template <typename T>
void forward_in_16_bits(const flashkata_attention& p) {
  const auto problem = forward_problem<T>(p);
  const Extension extension = extension_of(p);
  if (extension == Extension::none) return flash_forward_mma(problem, stream_of(p));
  if (extension == Extension::groups) return flash_grouped_forward(problem, groups_of(p), stream_of(p));
  refuse_16_bits(p);
}

template <typename T>
void backward_in_16_bits(const flashkata_attention& p) {
  const auto problem = backward_problem<T>(p);
  const Extension extension = extension_of(p);
  if (extension == Extension::none) return flash_backward_mma(problem, stream_of(p));
  if (extension == Extension::groups) return flash_grouped_backward(problem, groups_of(p), stream_of(p));
  refuse_16_bits(p);
}

template <typename T>
Decode<T> decode_problem(const flashkata_decoding& p) {
  const Index batch = p.query.shape[0], heads = p.query.shape[1], queries = p.query.shape[2], width = p.query.shape[3];
  Decode<T> problem{
      .query = view<const T>(p.query),
      .key = view<const T>(p.key),
      .value = view<const T>(p.value),
      .lengths = View<const std::int32_t, 1>(p.lengths, {batch}),
      .output = view<T>(p.output),
      .partial_output = View<float, 5>(p.partial_output, {p.splits, batch, heads, queries, width}),
      .partial_lse = View<float, 4>(p.partial_lse, {p.splits, batch, heads, queries}),
      .causal = p.causal != 0,
      .scale = p.scale,
  };
  if (p.lse != nullptr) problem.lse = View<float, 3>(p.lse, {batch, heads, queries});
  return problem;
}

template <typename T>
PagedDecode<T> paged_problem(const flashkata_decoding& p) {
  const Decode<T> d = decode_problem<T>(p);
  return {.query = d.query,
          .key_pages = d.key,
          .value_pages = d.value,
          .block_table = View<const std::int32_t, 2>(p.block_table, {p.query.shape[0], p.blocks}),
          .lengths = d.lengths,
          .output = d.output,
          .lse = d.lse,
          .partial_output = d.partial_output,
          .partial_lse = d.partial_lse,
          .causal = d.causal,
          .scale = d.scale};
}

void decode_on_cpu(const flashkata_decoding& p) {
  p.block_table != nullptr ? tiled_paged_decode(paged_problem<float>(p)) : tiled_decode(decode_problem<float>(p));
}

template <typename T>
void decode_on_gpu(const flashkata_decoding& p) {
  p.block_table != nullptr ? flash_paged_decode(paged_problem<T>(p), stream_of(p))
                           : flash_decode(decode_problem<T>(p), stream_of(p));
}

// Calls the one for the CPU, or for the GPU the one for p.type.
template <typename Call, typename OnCpu, typename InFloat, typename InFp16, typename InBf16>
int dispatch(const Call& p, OnCpu on_cpu, InFloat in_float, InFp16 in_fp16, InBf16 in_bf16) {
  return guarded([&] {
    if (p.gpu == 0 && p.type == FLASHKATA_FLOAT32) return on_cpu(p);
    if (p.gpu == 0) refuse("type", std::to_string(p.type), "0 (float32) on the CPU");
    switch (p.type) {
      case FLASHKATA_FLOAT32:
        return in_float(p);
      case FLASHKATA_FLOAT16:
        return in_fp16(p);
      case FLASHKATA_BFLOAT16:
        return in_bf16(p);
      default:
        refuse("type", std::to_string(p.type), "0 (float32), 1 (float16) or 2 (bfloat16)");
    }
  });
}

}  // namespace

int flashkata_forward(const flashkata_attention* problem) {
  return dispatch(*problem, forward_on_cpu, forward_in_float, forward_in_16_bits<fp16>, forward_in_16_bits<bf16>);
}

int flashkata_backward(const flashkata_attention* problem) {
  return dispatch(*problem, backward_on_cpu, backward_in_float, backward_in_16_bits<fp16>, backward_in_16_bits<bf16>);
}

int flashkata_decode(const flashkata_decoding* problem) {
  return dispatch(*problem, decode_on_cpu, decode_on_gpu<float>, decode_on_gpu<fp16>, decode_on_gpu<bf16>);
}

int flashkata_choose_splits(int64_t batch, int64_t kv_heads, int64_t longest, int32_t multiprocessors,
                            int64_t* splits) {
  return guarded([&] { *splits = choose_splits(batch, kv_heads, longest, multiprocessors); });
}

// Tokens of one number, which nobody reads: what counts is where they would lie.
struct flashkata_cache {
  PagedCache pages;
};

int flashkata_cache_create(int64_t pages, int64_t page_size, flashkata_cache** cache) {
  return guarded([&] { *cache = new flashkata_cache{PagedCache(pages, 1, page_size, 1)}; });
}

void flashkata_cache_destroy(flashkata_cache* cache) { delete cache; }

int flashkata_cache_add(flashkata_cache* cache, int32_t* sequence) {
  return guarded([&] { *sequence = cache->pages.add_sequence(); });
}

int flashkata_cache_append(flashkata_cache* cache, int32_t sequence, int64_t tokens) {
  return guarded([&] {
    require(tokens >= 0, "tokens", tokens, "at least 0");
    const std::vector<float> numbers(static_cast<std::size_t>(tokens));
    const View<const float, 3> token(numbers.data(), {1, tokens, 1});
    cache->pages.append(sequence, token, token);
  });
}

int flashkata_cache_release(flashkata_cache* cache, int32_t sequence) {
  return guarded([&] { cache->pages.release(sequence); });
}

int flashkata_cache_free_pages(flashkata_cache* cache, int64_t* pages) {
  return guarded([&] { *pages = cache->pages.free_pages(); });
}

int flashkata_cache_pages(flashkata_cache* cache, int32_t sequence, int64_t blocks, int32_t* pages, int32_t* length) {
  return guarded([&] {
    const int one[] = {sequence};
    const Tensor<std::int32_t, 2> table = cache->pages.block_table(one);
    require(table.size(1) <= blocks, "blocks", blocks, "at least " + std::to_string(table.size(1)));
    for (Index block = 0; block < blocks; ++block) pages[block] = block < table.size(1) ? table(0, block) : -1;
    *length = cache->pages.lengths(one)(0);
  });
}

const char* flashkata_message() { return message.c_str(); }

const char* flashkata_gpu() { return KATA_REAL_GPU ? "cuda" : "virtual"; }

const char* flashkata_answers() { return KATA_ANSWERS; }
