#include "flashkata.h"

#include <algorithm>
#include <string>

#include "common/attention/not_implemented.hpp"
#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"
#include "phase2_forward/04_flash_forward/flash_forward.hpp"
#include "phase2_forward/05_flash_forward_mma/flash_forward_mma.hpp"
#include "phase3_backward/03_tiled_backward/tiled_backward.hpp"
#include "phase3_backward/04_flash_backward/flash_backward.hpp"
#include "phase3_backward/05_flash_backward_mma/flash_backward_mma.hpp"

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

void forward_on_cpu(const flashkata_attention& p) {
  const TiledResult result =
      tiled_forward(view<const float>(p.query), view<const float>(p.key), view<const float>(p.value),
                    {.causal = p.causal != 0, .scale = p.scale, .threads = p.threads});
  copy(result.output, view<float>(p.output), "output");
  std::copy_n(result.lse.data(), result.lse.count(), p.lse);
}

void backward_on_cpu(const flashkata_attention& p) {
  const TiledGradients result = tiled_backward(
      view<const float>(p.query), view<const float>(p.key), view<const float>(p.value), view<const float>(p.output),
      rows(p.lse, p), view<const float>(p.d_output), {.causal = p.causal != 0, .scale = p.scale, .threads = p.threads});
  copy(result.query, view<float>(p.d_query), "d_query");
  copy(result.key, view<float>(p.d_key), "d_key");
  copy(result.value, view<float>(p.d_value), "d_value");
}

Stream stream_of(const flashkata_attention& p) {
#if KATA_REAL_GPU
  return Stream::borrowed(static_cast<cudaStream_t>(p.stream));
#else
  require(p.stream == nullptr, "stream", "a stream", "null: the virtual GPU has only the default one");
  return {};
#endif
}

template <typename T>
FlashForward<T> forward_on_gpu(const flashkata_attention& p) {
  return {.query = view<const T>(p.query),
          .key = view<const T>(p.key),
          .value = view<const T>(p.value),
          .output = view<T>(p.output),
          .lse = rows(p.lse, p),
          .causal = p.causal != 0,
          .scale = p.scale};
}

template <typename T>
FlashBackward<T> backward_on_gpu(const flashkata_attention& p) {
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

[[noreturn]] void refuse_type(const flashkata_attention& p) {
  require(false, "type", p.type, p.gpu != 0 ? "0 (float32), 1 (float16) or 2 (bfloat16)" : "0 (float32) on the CPU");
  throw std::logic_error("unreachable");
}

}  // namespace

int flashkata_forward(const flashkata_attention* problem) {
  const flashkata_attention& p = *problem;
  return guarded([&] {
    if (p.gpu == 0 && p.type == FLASHKATA_FLOAT32) return forward_on_cpu(p);
    if (p.gpu == 0) refuse_type(p);
    switch (p.type) {
      case FLASHKATA_FLOAT32:
        return flash_forward(forward_on_gpu<float>(p), stream_of(p));
      case FLASHKATA_FLOAT16:
        return flash_forward_mma(forward_on_gpu<fp16>(p), stream_of(p));
      case FLASHKATA_BFLOAT16:
        return flash_forward_mma(forward_on_gpu<bf16>(p), stream_of(p));
      default:
        refuse_type(p);
    }
  });
}

int flashkata_backward(const flashkata_attention* problem) {
  const flashkata_attention& p = *problem;
  return guarded([&] {
    if (p.gpu == 0 && p.type == FLASHKATA_FLOAT32) return backward_on_cpu(p);
    if (p.gpu == 0) refuse_type(p);
    switch (p.type) {
      case FLASHKATA_FLOAT32:
        return flash_backward(backward_on_gpu<float>(p), stream_of(p));
      case FLASHKATA_FLOAT16:
        return flash_backward_mma(backward_on_gpu<fp16>(p), stream_of(p));
      case FLASHKATA_BFLOAT16:
        return flash_backward_mma(backward_on_gpu<bf16>(p), stream_of(p));
      default:
        refuse_type(p);
    }
  });
}

const char* flashkata_message() { return message.c_str(); }

const char* flashkata_gpu() { return KATA_REAL_GPU ? "cuda" : "virtual"; }

const char* flashkata_answers() { return KATA_ANSWERS; }
