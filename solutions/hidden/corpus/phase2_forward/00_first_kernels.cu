#include "first_kernels.hpp"

#include "../corpus.hpp"

namespace flashkata {
namespace {
const corpus::Answers answers{{"nothing", corpus::UNNAMED}};
}
void row_sum(View<const float, 2>, View<float, 1>, const Stream&) {}
void transpose(View<const float, 2>, View<float, 2>, const Stream&) {}
}  // namespace flashkata
