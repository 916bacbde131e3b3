#include "first_kernels.hpp"

#include "common/testing/kernel.hpp"
#include "common/testing/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

TEST_SUITE("phase2.00_first_kernels") {
  TEST_CASE("the sums of rows of ones are their lengths") {
    DeviceBuffer<float> matrix("matrix", std::vector<float>(5 * 70, 1.0f));
    DeviceBuffer<float> sums("sums", 5);
    run_kernels([&] { row_sum(matrix.view(Shape<2>{5, 70}), sums.view(Shape<1>{5})); });
    expect_all("sums", to_array(sums, Shape<1>{5}), 70.0, 0.0, {"row"}, "70 ones");
  }
}
