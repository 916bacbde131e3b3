/* The course's attention as a C library: forward and backward, on the CPU and on the GPU.
 *
 * Built over whichever answers a preset chooses: `cmake --build --preset learn --target flashkata` makes
 * build/learn/bindings/libflashkata.so of a student's own steps, `--preset solutions-cuda` of the hidden ones for a GPU.
 *
 * Which step answers:
 *                    CPU                              GPU
 *   float32          2.03 forward, 3.03 backward      2.04 forward, 3.04 backward
 *   float16, bf16    -                                2.05 forward, 3.05 backward
 *
 * In a build without CUDA the GPU is the virtual one, and its memory is the host's.
 */
#ifndef FLASHKATA_H
#define FLASHKATA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLASHKATA_API __attribute__((visibility("default")))

enum { FLASHKATA_FLOAT32 = 0, FLASHKATA_FLOAT16 = 1, FLASHKATA_BFLOAT16 = 2 };

/* What a call returns. Unless it is FLASHKATA_OK, flashkata_message() says more, and nothing has been written. */
enum {
  FLASHKATA_OK = 0,
  FLASHKATA_BAD_ARGUMENT = 1,    /* names the argument, its value and what is allowed */
  FLASHKATA_NOT_IMPLEMENTED = 2, /* the step's file is still a stub: the message is its path */
  FLASHKATA_FAILED = 3           /* out of memory, a GPU error, ... */
};

/* A tensor of four axes; strides count elements. Of the last axis the stride is 1. */
typedef struct {
  void* data;
  int64_t shape[4];
  int64_t strides[4];
} flashkata_tensor;

/* One attention problem, forward and backward. Forward reads query, key, value and writes output, lse; backward reads
 * all five and d_output and writes d_query, d_key, d_value. */
typedef struct {
  int32_t type;          /* of all tensors but lse */
  int32_t gpu;           /* 0: CPU steps, host memory; 1: kernels, the GPU's memory */
  int32_t causal;        /* key j is visible to query i when j <= i + Sk - Sq */
  int32_t deterministic; /* backward on the GPU: the same inputs give the same bits */
  float scale;           /* multiplies query key^T; 1 / sqrt(D) is the usual one, and is not chosen for you */
  int32_t threads;       /* on the CPU at most so many; 0: as many as there are cores */
  void* stream;          /* a cudaStream_t; null: the default stream */
  flashkata_tensor query;    /* [B, H, Sq, D] */
  flashkata_tensor key;      /* [B, H, Sk, D] */
  flashkata_tensor value;    /* [B, H, Sk, Dv]; on the GPU Dv = D, one of 16, 32, 64, 128 */
  flashkata_tensor output;   /* [B, H, Sq, Dv] */
  float* lse;                /* [B, H, Sq], one row after the other, natural logarithm */
  flashkata_tensor d_output; /* [B, H, Sq, Dv] */
  flashkata_tensor d_query;  /* like query */
  flashkata_tensor d_key;    /* like key */
  flashkata_tensor d_value;  /* like value */
  float* delta;              /* backward on the GPU: scratch [B, H, Sq] */
  float* d_query_sum;        /* backward on the GPU: scratch [B, H, Sq, D] */
} flashkata_attention;

FLASHKATA_API int flashkata_forward(const flashkata_attention* problem);
FLASHKATA_API int flashkata_backward(const flashkata_attention* problem);

/* What went wrong in this thread's last call. */
FLASHKATA_API const char* flashkata_message(void);

/* "cuda" or "virtual": where kernels run; and whose answers these are, the root of the filled files. */
FLASHKATA_API const char* flashkata_gpu(void);
FLASHKATA_API const char* flashkata_answers(void);

#ifdef __cplusplus
}
#endif

#endif
