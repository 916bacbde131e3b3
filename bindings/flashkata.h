/* The course's attention as a C library: forward and backward, on the CPU and on the GPU.
 *
 * Built over whichever answers a preset chooses: `cmake --build --preset learn --target flashkata` makes
 * build/learn/bindings/libflashkata.so of a student's own steps, `--preset solutions-cuda` of the hidden ones for a
 * GPU.
 *
 * Which step answers:
 *                    CPU                              GPU
 *   float32          2.03 forward, 3.03 backward      2.04 forward, 3.04 backward
 *   float16, bf16    -                                2.05 forward, 3.05 backward
 *   what phase 4 adds: 4.01 cu_seqlens, 4.02 fewer key/value heads, 4.03 dropout, 4.04 window and soft-cap (float32),
 *   4.05 groups (CPU float32, GPU float16 and bf16), 4.06 and 4.07 decoding
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
  int32_t type;              /* of all tensors but lse */
  int32_t gpu;               /* 0: CPU steps, host memory; 1: kernels, the GPU's memory */
  int32_t causal;            /* key j is visible to query i when j <= i + Sk - Sq */
  int32_t deterministic;     /* backward on the GPU: the same inputs give the same bits */
  float scale;               /* multiplies query key^T; 1 / sqrt(D) is the usual one, and is not chosen for you */
  int32_t threads;           /* on the CPU at most so many; 0: as many as there are cores */
  void* stream;              /* a cudaStream_t; null: the default stream */
  flashkata_tensor query;    /* [B, H, Sq, D]; packed, [1, H, Tq, D] */
  flashkata_tensor key;      /* [B, H, Sk, D]; with steps 4.02 and 4.05 [B, Hk, Sk, D], Hk a divisor of H */
  flashkata_tensor value;    /* [B, H, Sk, Dv]; on the GPU Dv = D, one of 16, 32, 64, 128 */
  flashkata_tensor output;   /* [B, H, Sq, Dv] */
  float* lse;                /* [B, H, Sq], one row after the other, natural logarithm */
  flashkata_tensor d_output; /* [B, H, Sq, Dv] */
  flashkata_tensor d_query;  /* like query */
  flashkata_tensor d_key;    /* like key */
  flashkata_tensor d_value;  /* like value */
  float* delta;              /* backward on the GPU: scratch [B, H, Sq] */
  float* d_query_sum;        /* backward on the GPU: scratch [B, H, Sq, D] */

  /* What phase 4 adds. Each is a step of its own: at most one of them in a call. All zeros: none. */
  const int32_t* cu_seqlens_q; /* 4.01: [sequences + 1], in the memory of the tensors; null: not packed */
  const int32_t* cu_seqlens_k;
  int64_t sequences, max_seqlen_q, max_seqlen_k;
  float dropout_p; /* 4.03: the part of the weights that is dropped, in [0, 1) */
  uint64_t dropout_seed, dropout_offset;
  const int64_t* window; /* 4.04: so many keys before a query's own and after it, -1: no limit; null: no window */
  float softcap;         /* 4.04: scores become softcap tanh(score / softcap); 0: they do not */
  const int64_t* groups; /* 4.05: q_begin, q_end, k_begin, k_end of each, in host memory; null: no groups */
  int64_t group_count;
} flashkata_attention;

FLASHKATA_API int flashkata_forward(const flashkata_attention* problem);
FLASHKATA_API int flashkata_backward(const flashkata_attention* problem);

/* One step of decoding: the attention of few queries over the keys that a cache holds. 4.06, or with a block
 * table 4.07. */
typedef struct {
  int32_t type;   /* of query, key, value and output; on the CPU float32 */
  int32_t gpu;    /* as above */
  int32_t causal; /* query i sees key j when j <= i + length - Sq */
  float scale;
  void* stream;
  flashkata_tensor query;     /* [B, H, Sq, D], Sq 1 to 16, D one of 16, 32, 64, 128 */
  flashkata_tensor key;       /* [B, Hk, capacity, D]; with a block table [pages, Hk, page_size, D] */
  flashkata_tensor value;     /* like key */
  const int32_t* lengths;     /* [B]: keys in use, in the memory of the tensors */
  const int32_t* block_table; /* [B, blocks], one row after the other; null: a cache in one piece */
  int64_t blocks;
  flashkata_tensor output; /* [B, H, Sq, D] */
  float* lse;              /* [B, H, Sq]; null: not wanted */
  int64_t splits;          /* parts that the keys are cut into, at least 1 */
  float* partial_output;   /* scratch [splits, B, H, Sq, D] */
  float* partial_lse;      /* scratch [splits, B, H, Sq] */
} flashkata_decoding;

FLASHKATA_API int flashkata_decode(const flashkata_decoding* problem);

/* The number of parts that step 4.06 would choose. */
FLASHKATA_API int flashkata_choose_splits(int64_t batch, int64_t kv_heads, int64_t longest, int32_t multiprocessors,
                                          int64_t* splits);

/* Step 4.07's PagedCache as a bookkeeper: which page belongs to which sequence. Keys and values lie elsewhere. */
typedef struct flashkata_cache flashkata_cache;
FLASHKATA_API int flashkata_cache_create(int64_t pages, int64_t page_size, flashkata_cache** cache);
FLASHKATA_API void flashkata_cache_destroy(flashkata_cache* cache);
FLASHKATA_API int flashkata_cache_add(flashkata_cache* cache, int32_t* sequence);
/* Room for so many tokens more. FLASHKATA_FAILED if there are not enough pages, and nothing has changed. */
FLASHKATA_API int flashkata_cache_append(flashkata_cache* cache, int32_t sequence, int64_t tokens);
FLASHKATA_API int flashkata_cache_release(flashkata_cache* cache, int32_t sequence);
FLASHKATA_API int flashkata_cache_free_pages(flashkata_cache* cache, int64_t* pages);
/* The row of a block table: its first `blocks` entries, -1 behind the sequence's last page; and its length. */
FLASHKATA_API int flashkata_cache_pages(flashkata_cache* cache, int32_t sequence, int64_t blocks, int32_t* pages,
                                        int32_t* length);

/* What went wrong in this thread's last call. */
FLASHKATA_API const char* flashkata_message(void);

/* "cuda" or "virtual": where kernels run; and whose answers these are, the root of the filled files. */
FLASHKATA_API const char* flashkata_gpu(void);
FLASHKATA_API const char* flashkata_answers(void);

#ifdef __cplusplus
}
#endif

#endif
