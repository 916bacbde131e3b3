// The primitives, one by one: conversions, tensor core, copies, shuffles, launches, buffers. Runs fast, checked and on
// a GPU; a machine without one skips.
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "common/virtual_gpu/findings.hpp"
#include "tests/virtual_gpu/unit_kernels.hpp"

namespace {

using namespace flashkata;

bool skip_without_gpu() {
  if (gpu_available()) return false;
  MESSAGE("skipped: ", gpu_missing_reason());
  return true;
}

float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// The value of a 16-bit pattern from its definition, in double.
double exact_value(std::uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits >> 15 != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

struct Format {
  const char* name;
  int exponent_bits;
  int mantissa_bits;
  float (*to_float)(std::uint16_t);
  std::uint16_t (*from_float)(float);
};

const Format FORMATS[] = {
    {"fp16", 5, 10, [](std::uint16_t x) { return to_float(fp16{x}); }, [](float x) { return to_fp16(x).x; }},
    {"bf16", 8, 7, [](std::uint16_t x) { return to_float(bf16{x}); }, [](float x) { return to_bf16(x).x; }},
};

/// Nearest representable value, ties to even mantissa, by exact comparison with the two neighbours of `candidate`.
bool is_correctly_rounded(const Format& format, float value, std::uint16_t got) {
  const auto magnitude = static_cast<std::uint16_t>(got & 0x7fff);
  const std::uint16_t infinity = static_cast<std::uint16_t>(((1 << format.exponent_bits) - 1) << format.mantissa_bits);
  if ((got >> 15 != 0) != std::signbit(value)) return false;
  const double target = std::abs(static_cast<double>(value));
  // What infinity would be if the exponents went on: rounding overflows from half way to there.
  const auto value_of = [&](std::uint16_t bits) {
    if (bits != infinity) return exact_value(bits, format.exponent_bits, format.mantissa_bits);
    return std::ldexp(1.0, 1 << (format.exponent_bits - 1));
  };
  if (std::isinf(value)) return magnitude == infinity;
  const double distance = std::abs(value_of(magnitude) - target);
  for (const int step : {-1, 1}) {
    const int neighbour = magnitude + step;
    if (neighbour < 0 || neighbour > infinity) continue;
    const double other = std::abs(value_of(static_cast<std::uint16_t>(neighbour)) - target);
    if (other < distance && !(magnitude == infinity && target >= value_of(infinity))) return false;
    if (other == distance && magnitude % 2 != 0) return false;
  }
  return true;
}

}  // namespace

TEST_SUITE("virtual_gpu.unit") {
  TEST_CASE("every 16-bit pattern means what its format says, and survives the way back") {
    for (const Format& format : FORMATS) {
      CAPTURE(format.name);
      int wrong = 0;
      for (int pattern = 0; pattern < 0x10000; ++pattern) {
        const auto bits = static_cast<std::uint16_t>(pattern);
        const double exact = exact_value(bits, format.exponent_bits, format.mantissa_bits);
        const float got = format.to_float(bits);
        if (std::isnan(exact)) {
          wrong += !(std::isnan(got) && format.from_float(got) == 0x7fff);
        } else {
          wrong += !(got == exact && std::signbit(got) == std::signbit(exact) && format.from_float(got) == bits);
        }
      }
      CHECK(wrong == 0);
    }
  }

  TEST_CASE("rounding is to the nearest, ties to even: around every value of the format") {
    for (const Format& format : FORMATS) {
      CAPTURE(format.name);
      int wrong = 0;
      for (int pattern = 0; pattern < 0x7fff; ++pattern) {
        const auto low = static_cast<std::uint16_t>(pattern);
        const float value = format.to_float(low);
        if (!std::isfinite(value)) continue;
        const double next =
            exact_value(static_cast<std::uint16_t>(pattern + 1), format.exponent_bits, format.mantissa_bits);
        const auto middle = static_cast<float>((static_cast<double>(value) + (std::isfinite(next) ? next : value)) / 2);
        for (const float start : {value, middle}) {
          for (const float x : {start, std::nextafter(start, 0.0f), std::nextafter(start, INFINITY)}) {
            wrong += !is_correctly_rounded(format, x, format.from_float(x));
            wrong += !is_correctly_rounded(format, -x, format.from_float(-x));
          }
        }
      }
      // And a walk through all exponents of float, with arbitrary mantissas.
      for (std::uint64_t bits = 0; bits < 0x7f800000u; bits += 4099) {
        const float x = bits_to_float(static_cast<std::uint32_t>(bits));
        wrong += !is_correctly_rounded(format, x, format.from_float(x));
      }
      CHECK(wrong == 0);
      CHECK(format.from_float(INFINITY) ==
            static_cast<std::uint16_t>(((1 << format.exponent_bits) - 1) << format.mantissa_bits));
    }
    CHECK(to_fp16(65519.0f).x == 0x7bff);
    CHECK(to_fp16(65520.0f).x == 0x7c00);
    CHECK(to_bf16(std::numeric_limits<float>::max()).x == 0x7f80);
  }

  TEST_CASE("the device converts like the host") {
    if (skip_without_gpu()) return;
    std::vector<float> values;
    for (std::uint64_t bits = 0; bits <= 0xffffffffu; bits += 99991) {
      values.push_back(bits_to_float(static_cast<std::uint32_t>(bits)));
    }
    std::vector<std::uint16_t> bf;
    std::vector<std::uint16_t> fp;
    for (const float value : values) {
      bf.push_back(to_bf16(value).x);
      fp.push_back(to_fp16(value).x);
    }
    CHECK(unit::to_bf16_on_device(values) == bf);
    CHECK(unit::to_fp16_on_device(values) == fp);
    std::vector<std::uint16_t> patterns(0x7c00);
    for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<std::uint16_t>(i);
    const std::vector<float> floats = unit::from_fp16_on_device(patterns);
    int wrong = 0;
    for (std::size_t i = 0; i < patterns.size(); ++i) wrong += floats[i] != to_float(fp16{patterns[i]});
    CHECK(wrong == 0);
  }

  TEST_CASE("mma: one-hot inputs come out where the fragment layout says") {
    if (skip_without_gpu()) return;
    for (const auto multiply : {unit::multiply_bf16, unit::multiply_fp16}) {
      // A has a single 1 at [row, k]; B[k, col] is coded by its position: row `row` of D is row k of B, the rest is C.
      std::vector<float> b(16 * 8);
      std::vector<float> c(16 * 8);
      for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i + 1);
      for (std::size_t i = 0; i < c.size(); ++i) c[i] = 1000.0f * static_cast<float>(i);
      for (int row = 0; row < 16; row += 5) {
        for (int k = 0; k < 16; ++k) {
          std::vector<float> a(16 * 16, 0.0f);
          a[static_cast<std::size_t>(row * 16 + k)] = 1.0f;
          const std::vector<float> d = multiply(a, b, c);
          for (int i = 0; i < 16 * 8; ++i) {
            const auto at = static_cast<std::size_t>(i);
            const float want = c[at] + (i / 8 == row ? b[static_cast<std::size_t>(k * 8 + i % 8)] : 0.0f);
            CHECK(d[at] == want);
          }
        }
      }
    }
  }

  TEST_CASE("mma: a full product of small integers is exact") {
    if (skip_without_gpu()) return;
    std::vector<float> a(256);
    std::vector<float> b(128);
    std::vector<float> c(128);
    for (std::size_t i = 0; i < 256; ++i) a[i] = static_cast<float>(static_cast<int>(i * 7 % 13) - 6);
    for (std::size_t i = 0; i < 128; ++i) b[i] = static_cast<float>(static_cast<int>(i * 5 % 11) - 5);
    for (std::size_t i = 0; i < 128; ++i) c[i] = static_cast<float>(i);
    std::vector<float> want = c;
    for (std::size_t row = 0; row < 16; ++row) {
      for (std::size_t col = 0; col < 8; ++col) {
        for (std::size_t k = 0; k < 16; ++k) want[row * 8 + col] += a[row * 16 + k] * b[k * 8 + col];
      }
    }
    CHECK(unit::multiply_bf16(a, b, c) == want);
    CHECK(unit::multiply_fp16(a, b, c) == want);
  }

  TEST_CASE("ldmatrix: position-coded matrices arrive where the fragment layout says") {
    if (skip_without_gpu()) return;
    using unit::MatrixLoad;
    for (const MatrixLoad which : {MatrixLoad::x4, MatrixLoad::x4_trans, MatrixLoad::x2, MatrixLoad::x2_trans}) {
      const bool transposed = which == MatrixLoad::x4_trans || which == MatrixLoad::x2_trans;
      const unsigned matrices = which == MatrixLoad::x4 || which == MatrixLoad::x4_trans ? 4 : 2;
      const std::vector<std::uint32_t> got = unit::load_matrices(which);
      for (unsigned m = 0; m < 4; ++m) {
        for (unsigned lane = 0; lane < 32; ++lane) {
          const unsigned group = lane / 4;
          const unsigned pair = lane % 4 * 2;
          const unsigned first = m % matrices * 64 + (transposed ? pair * 8 + group : group * 8 + pair);
          const unsigned second = first + (transposed ? 8 : 1);
          CHECK(got[m * 32 + lane] == (first | second << 16));
        }
      }
    }
  }

  TEST_CASE("cp.async copies what it is told and fills the rest with zeros") {
    if (skip_without_gpu()) return;
    for (const int bytes : {4, 8, 16}) {
      for (int source_bytes = 0; source_bytes <= bytes; ++source_bytes) {
        const std::vector<std::uint8_t> got = unit::copy_with_zero_fill(bytes, source_bytes);
        for (int i = 0; i < 16; ++i) {
          const int want = i >= bytes ? 0xff : i < source_bytes ? i + 1 : 0;
          CHECK(got[static_cast<std::size_t>(i)] == want);
        }
      }
    }
  }

  TEST_CASE("shuffles stay within their groups") {
    if (skip_without_gpu()) return;
    for (const int width : {32, 16, 8, 4}) {
      for (const int argument : {0, 1, 2, 3}) {
        const std::vector<int> got = unit::shuffles(argument, width);
        for (int lane = 0; lane < 32; ++lane) {
          const int first = lane / width * width;
          const auto at = [&](int row) { return got[static_cast<std::size_t>(row * 32 + lane)]; };
          CHECK(at(0) == first + argument % width);
          CHECK(at(1) == (lane ^ argument));
          CHECK(at(2) == (lane + argument < first + width ? lane + argument : lane));
          CHECK(at(3) == (lane - argument >= first ? lane - argument : lane));
        }
      }
    }
  }

  TEST_CASE("matches and reductions, of a warp and of half a warp") {
    if (skip_without_gpu()) return;
    std::vector<int> values(32);
    for (std::size_t i = 0; i < 32; ++i) values[i] = static_cast<int>(i % 5) * 1000000007 - 3;  // wraps around
    const std::vector<unsigned> got = unit::matches_and_reductions(values);
    for (std::size_t lane = 0; lane < 32; ++lane) {
      CAPTURE(lane);
      unsigned equal = 0;
      unsigned sum = 0;
      unsigned half_sum = 0;
      unsigned all = ~0u;
      unsigned some = 0;
      unsigned odd = 0;
      for (std::size_t i = 0; i < 32; ++i) {
        const auto bits = static_cast<unsigned>(values[i]);
        equal |= values[i] == values[lane] ? 1u << i : 0;
        sum += bits;
        half_sum += i / 16 == lane / 16 ? bits : 0;
        all &= bits;
        some |= bits;
        odd ^= bits;
      }
      const auto least = static_cast<unsigned>(*std::min_element(values.begin(), values.end()));
      const auto most = static_cast<unsigned>(*std::max_element(values.begin(), values.end()));
      const auto as_unsigned = [](int a, int b) { return static_cast<unsigned>(a) < static_cast<unsigned>(b); };
      const auto least_bits = static_cast<unsigned>(*std::min_element(values.begin(), values.end(), as_unsigned));
      const auto most_bits = static_cast<unsigned>(*std::max_element(values.begin(), values.end(), as_unsigned));
      const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
      const std::vector<unsigned> want = {equal, equal,     equal, sum,  sum, least,        least_bits,
                                          most,  most_bits, all,   some, odd, equal & half, half_sum};
      const auto first = got.begin() + static_cast<std::ptrdiff_t>(lane * unit::MATCH_RESULTS);
      CHECK(std::vector<unsigned>(first, first + unit::MATCH_RESULTS) == want);
    }
  }

  TEST_CASE("barriers that vote") {
    if (skip_without_gpu()) return;
    for (const std::size_t threads : {1, 32, 50, 128}) {
      CAPTURE(threads);
      std::vector<int> values(threads, -7);
      values.back() = 5;
      const std::vector<int> got = unit::barrier_votes(values);
      const int all = static_cast<int>(threads);
      const int want[9] = {1, 1, all, 1, threads == 1 ? 1 : 0, 1, 0, 0, 0};
      for (std::size_t call = 0; call < 9; ++call) {
        for (std::size_t thread = 0; thread < threads; ++thread) {
          const int vote = got[call * threads + thread];
          CHECK((call % 3 == 2 ? vote : vote != 0) == want[call]);
        }
      }
    }
  }

  TEST_CASE("atomic functions of integers") {
    if (skip_without_gpu()) return;
    using unit::Atomic;
    std::vector<int> values(64);
    unsigned long long sum = 0;
    unsigned odd = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<int>(i * 37 % 101);
      sum += static_cast<unsigned>(values[i]);
      odd ^= static_cast<unsigned>(values[i]);
    }
    const unsigned long long start = 0x1234567890ull;
    const unsigned long long high = start & ~0xffffffffull;
    const auto low = static_cast<unsigned>(start);
    CHECK(unit::atomics(Atomic::subtract_int, start, values) == (high | (low - static_cast<unsigned>(sum))));
    CHECK(unit::atomics(Atomic::subtract_unsigned, high, values) == (high | (0u - static_cast<unsigned>(sum))));
    const unsigned long long wide = odd;
    CHECK(unit::atomics(Atomic::exclusive_or, start, values) == (start ^ wide ^ wide << 32 ^ wide << 20));
    CHECK(unit::atomics(Atomic::increment, high, values) == (high | 4));  // 64 steps in a circle of 10
    CHECK(unit::atomics(Atomic::decrement, high | 9, values) == (high | 5));
    CHECK(unit::atomics(Atomic::increment, 1000, values) == 3);  // beyond the limit: 0 is next
    CHECK(unit::atomics(Atomic::decrement, 1000, values) == 6);  // beyond the limit: the limit is next
    const auto largest = static_cast<unsigned long long>(*std::max_element(values.begin(), values.end()));
    CHECK(unit::atomics(Atomic::largest_by_compare_and_swap, 1, values) == largest << 33);
  }

  TEST_CASE("floats become integers in four directions, and stay within their range") {
    if (skip_without_gpu()) return;
    const std::vector<float> values = {
        0.0f,          -0.0f,         0.5f,    -0.5f,    1.5f,     2.5f,          -1.5f,         -2.5f,
        0.25f,         7.75f,         -7.75f,  1.0e9f,   -1.0e9f,  2147483520.0f, 2147483648.0f, -2147483648.0f,
        4294967040.0f, 4294967296.0f, 1.0e20f, -1.0e20f, 1.0e-40f, INFINITY,      -INFINITY,     NAN};
    const std::vector<unsigned> got = unit::float_functions(values);
    double (*const directions[])(double) = {std::rint, std::trunc, std::floor, std::ceil};
    for (std::size_t i = 0; i < values.size(); ++i) {
      const auto at = [&](std::size_t function) { return got[function * values.size() + i]; };
      const double x = values[i];
      CAPTURE(x);
      for (std::size_t d = 0; d < 4; ++d) {
        const double whole = std::isnan(x) ? 0.0 : directions[d](x);
        CHECK(at(d) == static_cast<unsigned>(static_cast<int>(std::clamp(whole, -2147483648.0, 2147483647.0))));
        CHECK(at(4 + d) == static_cast<unsigned>(std::clamp(whole, 0.0, 4294967295.0)));
      }
      const auto inverse_root = static_cast<float>(1.0L / std::sqrt(static_cast<long double>(x)));
      if (std::isnan(inverse_root)) {
        CHECK(std::isnan(bits_to_float(at(8))));
      } else {
        CHECK(bits_to_float(at(8)) == inverse_root);
      }
      CHECK(at(9) == (std::isnan(x) ? 1 : 0));
      CHECK(at(10) == (std::isinf(x) ? 1 : 0));
      CHECK(at(11) == (std::isfinite(x) ? 1 : 0));
    }
  }

  TEST_CASE("rounded sums, products and quotients; loads and stores past a cache") {
    if (skip_without_gpu()) return;
    const std::vector<float> a = {1.0f, 1.0f / 3.0f, 16777216.0f, -3.0e38f, 1.0e-30f, 0.1f};
    const std::vector<float> b = {3.0f, 3.0f, 1.0f, 3.0e38f, 7.0f, -0.3f};
    const std::vector<float> got = unit::float_pairs(a, b);
    for (std::size_t i = 0; i < a.size(); ++i) {
      const auto at = [&](std::size_t function) { return got[function * a.size() + i]; };
      const double x = a[i];
      const double y = b[i];
      CHECK(at(0) == static_cast<float>(x + y));
      CHECK(at(1) == static_cast<float>(x - y));
      CHECK(at(2) == static_cast<float>(x * y));
      CHECK(at(3) == static_cast<float>(x / y));
      for (std::size_t load = 4; load < 7; ++load) CHECK(at(load) == a[i]);
      CHECK(at(7) == doctest::Approx(x / y).epsilon(1e-6));
    }
  }

  TEST_CASE("bits and high products of integers") {
    if (skip_without_gpu()) return;
    const std::vector<unsigned long long> values = {
        0, 1, 2, 0x80000000ull, 0xffffffffull, 1ull << 63, 0x123456789abcdef0ull, ~0ull};
    const std::vector<long long> got = unit::integer_functions(values);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const unsigned long long value = values[i];
      const auto low = static_cast<unsigned>(value);
      CAPTURE(value);
      const auto at = [&](std::size_t function) { return got[function * values.size() + i]; };
      unsigned reversed = 0;
      for (int bit = 0; bit < 32; ++bit) reversed |= (low >> bit & 1u) << (31 - bit);
      CHECK(at(0) == std::popcount(value));
      CHECK(at(1) == std::countl_zero(value));
      CHECK(at(2) == (value == 0 ? 0 : std::countr_zero(value) + 1));
      CHECK(at(3) == (low == 0 ? 0 : std::countr_zero(low) + 1));
      CHECK(at(4) == reversed);
      CHECK(at(5) == static_cast<long long>(static_cast<unsigned long long>(low) * 0x9e3779b9u >> 32));
      CHECK(at(6) ==
            static_cast<long long>(std::floor(static_cast<double>(static_cast<int>(low)) * -12345.0 / 4294967296.0)));
    }
  }

  TEST_CASE("min and max of mixed types, and CUDA's constants") {
    if (skip_without_gpu()) return;
    CHECK(unit::mixed_types() == std::vector<int>(8, 1));
  }

  TEST_CASE("threads know who they are") {
    if (skip_without_gpu()) return;
    const std::array<unsigned, 3> grid{3, 2, 2};
    const std::array<unsigned, 3> block{4, 3, 5};
    const auto got = unit::identities(grid, block);
    std::size_t i = 0;
    for (unsigned bz = 0; bz < grid[2]; ++bz)
      for (unsigned by = 0; by < grid[1]; ++by)
        for (unsigned bx = 0; bx < grid[0]; ++bx)
          for (unsigned tz = 0; tz < block[2]; ++tz)
            for (unsigned ty = 0; ty < block[1]; ++ty)
              for (unsigned tx = 0; tx < block[0]; ++tx) {
                CHECK(got[i++] == std::array<unsigned, 6>{bx, by, bz, tx, ty, tz});
              }
  }

  TEST_CASE("impossible launches are refused, with the kernel's name") {
    if (skip_without_gpu()) return;
    CHECK_THROWS_AS(unit::launch_shape({1, 1, 1}, {1025, 1, 1}, 0), GpuError);
    CHECK_THROWS_AS(unit::launch_shape({0, 1, 1}, {32, 1, 1}, 0), GpuError);
    CHECK_THROWS_AS(unit::launch_shape({1, 70000, 1}, {32, 1, 1}, 0), GpuError);
    CHECK_THROWS_AS(unit::launch_shape({1, 1, 1}, {1, 1, 65}, 0), GpuError);
    CHECK_THROWS_AS(unit::launch_shape({1, 1, 1}, {32, 1, 1}, 300 * 1024), GpuError);
    std::string message;
    try {
      unit::launch_shape({1, 1, 1}, {32, 64, 1}, 0);
    } catch (const GpuError& error) {
      message = error.what();
    }
    CHECK(message.find("nothing_kernel") != std::string::npos);
    CHECK(message.find("invalid") !=
          std::string::npos);  // which argument is CUDA's to say, and changes with its version
    CHECK_NOTHROW(unit::launch_shape({2, 2, 2}, {32, 1, 1}, 0));
  }

  TEST_CASE("more than 48 KiB of dynamic shared memory can be asked for") {
    if (skip_without_gpu()) return;
    DeviceBuffer<float> out("out", 1);
    unit::use_dynamic_memory(out.data(), 96 * 1024);
    CHECK(out.download()[0] == 5.0f);
  }

  TEST_CASE("buffers begin as NaN, know their sizes and count what is allocated") {
    if (skip_without_gpu()) return;
    const std::size_t before = device_bytes();
    reset_peak_device_bytes();
    {
      DeviceBuffer<float> a("a", 1000);
      DeviceBuffer<bf16> b("b", 100);
      DeviceBuffer<float> empty("empty", 0);
      CHECK(device_bytes() == before + 4200);
      CHECK(empty.download().empty());
      const std::vector<float> values = a.download();
      CHECK(std::all_of(values.begin(), values.end(), [](float x) { return std::isnan(x); }));
      a.fill_zero();
      CHECK(a.download() == std::vector<float>(1000, 0.0f));
      a.poison();
      CHECK(std::isnan(a.download()[999]));
      CHECK_THROWS_AS(a.upload(std::vector<float>(999)), std::invalid_argument);
      CHECK(a.view(Shape<2>{10, 100}).stride(0) == 100);
      CHECK_THROWS_AS(a.view(Shape<2>{10, 101}), std::invalid_argument);
      DeviceBuffer<float> moved(std::move(a));
      CHECK(moved.size() == 1000);
      CHECK(device_bytes() == before + 4200);
    }
    CHECK(device_bytes() == before);
    CHECK(peak_device_bytes() == before + 4200);
  }

  TEST_CASE("events measure time") {
    if (skip_without_gpu()) return;
    const Stream stream = Stream::create();
    Event start;
    Event stop;
    start.record(stream);
    unit::launch_shape({100, 1, 1}, {128, 1, 1}, 0);
    stop.record(stream);
    CHECK(Event::elapsed_ms(start, stop) >= 0.0f);
    stream.synchronize();
  }
}
