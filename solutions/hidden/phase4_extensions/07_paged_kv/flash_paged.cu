// flash_paged_decode: output = softmax(scale query key^T) value for a few queries and a long cache in pages.
//
// The kernels are those of step 06, in decode_kernel.cuh. New here: where the rows of a key/value head lie. Key j is in
// slot j % page_size of page block_table[j / page_size].
// Try        ./kata test 4.07    ./kata profile 4.07
#include "paged_kv.hpp"

#include "solutions/hidden/phase4_extensions/decode_kernel.cuh"

namespace flashkata {
namespace {

// Where pages are multiples of 16 slots (WHOLE_TILES), as they mostly are, one look into the table is enough for the 16
// keys of a warp's tile.
template <typename T, bool WHOLE_TILES>
struct Pages {
  View<const T, 4> key_pages, value_pages;  // [pages, Hk, page_size, D]
  View<const std::int32_t, 2> block_table;  // [B, blocks]

  struct Head {
    const T *key, *value;       // slot 0 of page 0
    const std::int32_t* table;  // the sequence's
    Index table_stride;
    Index key_page, value_page, key_slot, value_slot;  // strides
    unsigned page_size;

    KATA_DEVICE int page_of(unsigned block) const { return table[block * table_stride]; }

    // 64 bits: pages times their stride is the size of the whole cache.
    KATA_DEVICE const T* key_row(int j) const {
      const unsigned block = static_cast<unsigned>(j) / page_size;
      return key + page_of(block) * key_page + (static_cast<unsigned>(j) - block * page_size) * key_slot;
    }
    KATA_DEVICE const T* value_row(int j) const {
      const unsigned block = static_cast<unsigned>(j) / page_size;
      return value + page_of(block) * value_page + (static_cast<unsigned>(j) - block * page_size) * value_slot;
    }

    KATA_DEVICE auto tile(int first, bool exists) const {
      if constexpr (WHOLE_TILES) {
        const unsigned block = exists ? static_cast<unsigned>(first) / page_size : 0;
        const Index page = exists ? page_of(block) : 0;
        const Index slot = first - static_cast<int>(block * page_size);
        return decode::EvenRows<T>{key + page * key_page + slot * key_slot,
                                   value + page * value_page + slot * value_slot, key_slot, value_slot};
      } else {
        struct Tile {
          Head head;
          int first;

          KATA_DEVICE const T* key_row(int i) const { return head.key_row(first + i); }
          KATA_DEVICE const T* value_row(int i) const { return head.value_row(first + i); }
        };
        return Tile{*this, first};
      }
    }
  };

  KATA_DEVICE Head head(int b, int kv_head) const {
    return {&key_pages(0, kv_head, 0, 0),
            &value_pages(0, kv_head, 0, 0),
            &block_table(b, 0),
            block_table.stride(1),
            key_pages.stride(0),
            value_pages.stride(0),
            key_pages.stride(2),
            value_pages.stride(2),
            static_cast<unsigned>(key_pages.size(2))};
  }
};

template <bool WHOLE_TILES, typename T>
void launch_decode(const PagedDecode<T>& p, const Stream& stream) {
  decode::decode<T>(p, Pages<T, WHOLE_TILES>{p.key_pages, p.value_pages, p.block_table}, p.key_pages.size(1), stream);
}

template <typename T>
void launch_decode_in_16_bits(const PagedDecode<T>& p, const Stream& stream) {
  if (p.key_pages.size(2) % 16 == 0) return launch_decode<true>(p, stream);
  launch_decode<false>(p, stream);
}

}  // namespace

void flash_paged_decode(const PagedDecode<float>& problem, const Stream& stream) {
  check_paged_decode(problem);
  launch_decode<false>(problem, stream);  // whose warps have no tiles
}

void flash_paged_decode(const PagedDecode<fp16>& problem, const Stream& stream) {
  check_paged_decode(problem);
  launch_decode_in_16_bits(problem, stream);
}

void flash_paged_decode(const PagedDecode<bf16>& problem, const Stream& stream) {
  check_paged_decode(problem);
  launch_decode_in_16_bits(problem, stream);
}

}  // namespace flashkata
