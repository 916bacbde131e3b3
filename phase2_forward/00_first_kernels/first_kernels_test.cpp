#include "first_kernels.hpp"

#include <bit>
#include <cmath>
#include <limits>
#include <optional>
#include <random>

#include "common/testing/kernel.hpp"
#include "common/testing/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
const Axes ROW = {"row"};
const Axes SOURCE = {"row", "column"};
const Axes TARGET = {"row of transposed", "column of transposed"};

// -- The inputs -------------------------------------------------------------------------------------------------------

enum class Numbers { normal, negative, huge, one_huge };

// A numbered input of both kernels. Its number is its seed and never changes; new ones go to the end.
struct MatrixCase {
  const char* why;
  Index rows;
  Index columns;
  Index gap = 0;     // NaN floats between two rows of the matrix
  Index offset = 0;  // NaN floats in front of the matrix, so that it begins at an odd address
  Numbers numbers = Numbers::normal;
  int number = 0;

  std::string text() const {
    std::string result = std::string(why) + ": " + std::to_string(rows) + " rows, " + std::to_string(columns) +
                         (columns == 1 ? " column" : " columns");
    if (gap > 0) result += ", rows " + std::to_string(columns + gap) + " floats apart";
    if (offset > 0) result += ", " + std::to_string(offset) + " floats into its buffer";
    return result;
  }
};

const std::vector<MatrixCase>& matrix_cases() {
  static const std::vector<MatrixCase> cases = [] {
    std::vector<MatrixCase> list{
        {"one element", 1, 1},
        {"a row of a warp less one", 1, 31},
        {"a row as wide as a warp", 1, 32},
        {"a row of a warp and one more", 1, 33},
        {"a column", 33, 1},
        {"a tile less one", 31, 31},
        {"one tile", 32, 32},
        {"a tile and one more", 33, 33},
        {"two tiles less a row", 63, 64},
        {"two tiles less a column", 64, 63},
        {"two tiles and one more", 65, 65},
        {"whole tiles", 128, 96},
        {"ragged both ways", 127, 129},
        {"wide", 5, 200},
        {"tall", 200, 5},
        {"no rows", 0, 7},
        {"no columns", 7, 0},
        {"a slice of a wider matrix", 40, 70, 10},
        {"a slice at an odd address", 70, 40, 3, 5},
        {"a slice of whole tiles", 64, 64, 32},
        {"packed at an odd address", 32, 64, 0, 1},
        {"nothing but negative numbers", 20, 50, 0, 0, Numbers::negative},
        {"huge numbers", 20, 50, 0, 0, Numbers::huge},
        {"one huge number in each row", 37, 41, 0, 0, Numbers::one_huge},
        {"long rows", 3, 1000},
        {"longer rows", 2, 4099},
        {"rows of three warps and a bit", 9, 100},
        {"many tiles both ways", 200, 230},
    };
    for (std::size_t i = 0; i < list.size(); ++i) list[i].number = static_cast<int>(i) + 1;
    return list;
  }();
  return cases;
}

const MatrixCase& matrix_case(int number) { return matrix_cases()[static_cast<std::size_t>(number) - 1]; }

void for_each_matrix(const std::function<void(const MatrixCase&)>& body) {
  for (const MatrixCase& c : matrix_cases()) run_case(c.number, c.text(), [&] { body(c); });
}

// Row-major, without the gaps.
std::vector<float> make_values(const MatrixCase& c) {
  std::mt19937 random(static_cast<unsigned>(c.number));
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(c.rows * c.columns));
  for (float& value : values) {
    value = normal(random);
    if (c.numbers == Numbers::negative) value = -std::abs(value) - 0.5f;
    if (c.numbers == Numbers::huge) value *= 1e30f;
  }
  if (c.numbers == Numbers::one_huge) {
    for (Index row = 0; row < c.rows; ++row) values[static_cast<std::size_t>(row * c.columns + row)] = 1e6f;
  }
  return values;
}

// 1 + row * columns + column: every element says where it comes from. Exact up to 2^24 elements.
std::vector<float> position_coded(Index rows, Index columns) {
  std::vector<float> values(static_cast<std::size_t>(rows * columns));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i + 1);
  return values;
}

std::vector<double> doubles(const std::vector<float>& values) { return {values.begin(), values.end()}; }

Array as_array(const std::vector<float>& values, Index rows, Index columns) {
  return {{rows, columns}, doubles(values)};
}

bool same_bits(float one, float other) {
  return std::bit_cast<std::uint32_t>(one) == std::bit_cast<std::uint32_t>(other);
}

// -- Memory on the GPU ------------------------------------------------------------------------------------------------

// A matrix on the GPU, as a slice of something larger: NaN in front of it and between its rows, and behind it the end
// of the buffer.
class Source {
 public:
  Source(const std::vector<float>& values, Index rows, Index columns, Index gap = 0, Index offset = 0)
      : shape_{rows, columns},
        strides_{columns + gap, 1},
        offset_(offset),
        memory_(spread(values)),
        buffer_("matrix", memory_) {}
  explicit Source(const MatrixCase& c) : Source(make_values(c), c.rows, c.columns, c.gap, c.offset) {}

  View<const float, 2> view() const { return {buffer_.data() + offset_, shape_, strides_}; }
  Index rows() const { return shape_[0]; }
  Index columns() const { return shape_[1]; }

  void replace(const std::vector<float>& values) {
    memory_ = spread(values);
    buffer_.upload(memory_);
  }

  void expect_unchanged() const {
    const std::vector<float> now = buffer_.download();
    for (std::size_t i = 0; i < now.size(); ++i) {
      if (same_bits(now[i], memory_[i])) continue;
      finding("matrix", "was written to: it is the input, and yours to read only");
      return;
    }
  }

 private:
  std::vector<float> spread(const std::vector<float>& values) const {
    const auto [rows, columns] = shape_;
    if (values.empty()) return {};
    std::vector<float> memory(static_cast<std::size_t>(offset_ + (rows - 1) * strides_[0] + columns), NOT_A_NUMBER);
    for (Index row = 0; row < rows; ++row) {
      for (Index column = 0; column < columns; ++column) {
        memory[static_cast<std::size_t>(offset_ + row * strides_[0] + column)] =
            values[static_cast<std::size_t>(row * columns + column)];
      }
    }
    return memory;
  }

  Shape<2> shape_;
  Shape<2> strides_;
  Index offset_;
  std::vector<float> memory_;
  DeviceBuffer<float> buffer_;
};

constexpr Index MARGIN = 64;

// Where an answer is written: the middle of a larger buffer, which is NaN at first and must stay so around the answer.
class Target {
 public:
  Target(const char* name, Index rows, Index columns, Index gap = 0)
      : name_(name),
        shape_{rows, columns},
        strides_{columns + gap, 1},
        buffer_(name, static_cast<std::size_t>(MARGIN + rows * strides_[0] + MARGIN)) {}

  View<float, 2> view() { return {buffer_.data() + MARGIN, shape_, strides_}; }

  std::vector<float> values() const {
    const std::vector<float> memory = buffer_.download();
    std::vector<float> result;
    for (Index row = 0; row < shape_[0]; ++row) {
      const auto begin = memory.begin() + MARGIN + row * strides_[0];
      result.insert(result.end(), begin, begin + shape_[1]);
    }
    return result;
  }

  void expect_rest_untouched() const {
    const std::vector<float> memory = buffer_.download();
    Index written = 0;
    std::string first;
    for (Index i = 0; i < static_cast<Index>(memory.size()); ++i) {
      const Index place = i - MARGIN;
      const Index row = strides_[0] == 0 ? shape_[0] : place / strides_[0];
      const bool inside = place >= 0 && row < shape_[0] && place % strides_[0] < shape_[1];
      if (inside || std::isnan(memory[static_cast<std::size_t>(i)])) continue;
      ++written;
      if (!first.empty()) continue;
      if (place < 0) {
        first = std::to_string(-place) + " before its begin";
      } else if (row >= shape_[0]) {
        first = std::to_string(place - shape_[0] * strides_[0] + 1) + " behind its end";
      } else {
        first =
            std::to_string(place % strides_[0] - shape_[1] + 1) + " behind the end of its row " + std::to_string(row);
      }
    }
    expect(written == 0, name_,
           std::to_string(written) + " floats that belong to others were written, the first " + first);
  }

 private:
  const char* name_;
  Shape<2> shape_;
  Shape<2> strides_;
  DeviceBuffer<float> buffer_;
};

// -- Running the two kernels ------------------------------------------------------------------------------------------

struct Run {
  std::vector<float> values;
  std::vector<KernelProfile> profiles;  // of checked kernels
};

Run run_row_sum(const Source& matrix, const Stream& stream = {}) {
  Target sums("sums", 1, matrix.rows());
  const auto profiles = run_kernels([&] { row_sum(matrix.view(), sums.view()[0], stream); });
  sums.expect_rest_untouched();
  matrix.expect_unchanged();
  return {sums.values(), profiles};
}

Array row_sums(const Source& matrix) { return {{matrix.rows()}, doubles(run_row_sum(matrix).values)}; }

Run run_transpose(const Source& matrix, Index target_gap = 0, const Stream& stream = {}) {
  Target transposed("transposed", matrix.columns(), matrix.rows(), target_gap);
  const auto profiles = run_kernels([&] { transpose(matrix.view(), transposed.view(), stream); });
  transposed.expect_rest_untouched();
  matrix.expect_unchanged();
  return {transposed.values(), profiles};
}

Array transposed_of(const Source& matrix, Index target_gap = 0) {
  return as_array(run_transpose(matrix, target_gap).values, matrix.columns(), matrix.rows());
}

// -- What they should give, on the host -------------------------------------------------------------------------------

Array true_sums(const std::vector<float>& values, Index rows, Index columns, bool of_magnitudes = false) {
  Array sums{{rows}, std::vector<double>(static_cast<std::size_t>(rows))};
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double value = static_cast<double>(values[i]);
    sums.values[i / static_cast<std::size_t>(columns)] += of_magnitudes ? std::abs(value) : value;
  }
  return sums;
}

Array true_transpose(const std::vector<float>& values, Index rows, Index columns) {
  Array transposed{{columns, rows}, std::vector<double>(values.size())};
  for (Index row = 0; row < rows; ++row) {
    for (Index column = 0; column < columns; ++column) {
      transposed.values[static_cast<std::size_t>(column * rows + row)] =
          static_cast<double>(values[static_cast<std::size_t>(row * columns + column)]);
    }
  }
  return transposed;
}

// Case n through row_sum is number n, through transpose number 100 + n. A kernel that is still a stub counts as right,
// so that the other one can be recognised.
constexpr int TRANSPOSE = 100;

std::vector<int> recognised_numbers() {
  std::vector<int> result;
  for (const MatrixCase& c : matrix_cases()) {
    result.push_back(c.number);
    result.push_back(TRANSPOSE + c.number);
  }
  return result;
}

const Recognise recognise_first_kernels(recognised_numbers(), [](int number) -> std::vector<Array> {
  const MatrixCase& c = matrix_case(number % TRANSPOSE);
  const std::vector<float> values = make_values(c);
  const bool transposes = number > TRANSPOSE;
  try {
    const Source matrix(c);
    Target sums("sums", 1, c.rows);
    Target transposed("transposed", c.columns, c.rows);
    run_unwatched([&] {
      if (transposes) {
        transpose(matrix.view(), transposed.view());
      } else {
        row_sum(matrix.view(), sums.view()[0]);
      }
    });
    const std::vector<double> got = doubles(transposes ? transposed.values() : sums.values());
    return {Array{{static_cast<Index>(got.size())}, got}};
  } catch (const NotImplemented&) {
    return {transposes ? true_transpose(values, c.rows, c.columns) : true_sums(values, c.rows, c.columns)};
  }
});

// -- How the kernels use memory ---------------------------------------------------------------------------------------

// What `run` moves is what must move, in whole sectors, without scratch memory. Where rows begin at whole sectors
// (`aligned`) the least possible can be reached; elsewhere a row of a tile may touch a sector more at either end.
void expect_frugal(const std::function<Run()>& run, const char* output, Index loads, std::optional<Index> stores,
                   bool aligned) {
  constexpr Index BYTES = sizeof(float);
  reset_peak_device_bytes();
  const std::size_t input_bytes = device_bytes();
  const CountLines lines;
  const Run result = run();
  const std::size_t own = (result.values.size() + 2 * MARGIN) * BYTES;  // Target's
  const std::size_t allocated = peak_device_bytes() - input_bytes;
  expect(allocated <= own, "memory", std::to_string(allocated - own) + " bytes of device memory were allocated");
  if (!kernels_are_judged()) return;
  const auto expect_moved = [&](std::string_view name, const char* verb, Index bytes, Index floats) {
    expect(bytes == floats * BYTES, name,
           "kernels " + std::string(verb) + " " + std::to_string(bytes) + " bytes; " + std::to_string(floats) +
               " floats of " + std::to_string(BYTES) + " bytes are there");
  };
  if (aligned) expect_moved("matrix", "load", bytes_loaded(result.profiles, "matrix"), loads);
  if (stores) expect_moved(output, "store", bytes_stored(result.profiles, output), *stores);
  for (const KernelProfile& profile : result.profiles) {
    for (const TensorTraffic& tensor : profile.tensors) {
      expect(tensor.name == "matrix" || tensor.name == output, tensor.name,
             "is used by " + profile.kernel + ", on the way");
    }
  }
  expect_sectors_below(result.profiles, aligned ? 1.9 : 3.0);
  expect_bank_conflicts_below(result.profiles, 2.5);
}

}  // namespace

TEST_SUITE("phase2.00_first_kernels") {
  TEST_CASE("the examples that the README works with a pencil") {
    ask("Follow the README's pictures with your own indices. Which is the first number that yours differs from?");
    const Source matrix({1, 2, 3, 4, 5, 6}, 1, 6);
    expect_all("sums", row_sums(matrix), 21.0, 0.0, ROW, "1 + 2 + 3 + 4 + 5 + 6");
    const Source two_rows({1, 2, 3, 4, 5, 6}, 2, 3);
    const Array transposed{{3, 2}, {1, 4, 2, 5, 3, 6}};
    expect_same_bits("transposed", transposed_of(two_rows), transposed, TARGET, "against the README");
  }

  // -- row_sum --------------------------------------------------------------------------------------------------------

  TEST_CASE("a row of ones adds up to its length") {
    ask("List the columns that lane 0 visits, and those of lane 31. Is every column on exactly one list?");
    for (const Index columns : {1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 1000}) {
      const Source matrix(std::vector<float>(static_cast<std::size_t>(5 * columns), 1.0f), 5, columns);
      const std::string what = "the sum of " + std::to_string(columns) + (columns == 1 ? " one" : " ones");
      if (!expect_all("sums", row_sums(matrix), static_cast<double>(columns), 0.0, ROW, what)) return;
    }
  }

  TEST_CASE("a single number is found in whatever column it stands") {
    ask("In row r only column r is not 0. Which lane reads it, and on what way does its partial sum reach the output?");
    for (const Index size : {1, 40, 130}) {
      std::vector<float> values(static_cast<std::size_t>(size * size), 0.0f);
      Array want{{size}, {}};
      for (Index i = 0; i < size; ++i) {
        values[static_cast<std::size_t>(i * size + i)] = static_cast<float>(i + 1);
        want.values.push_back(static_cast<double>(i + 1));
      }
      const Array got = row_sums(Source(values, size, size));
      if (!expect_close("sums", got, want, {0.0, want}, ROW)) return;
    }
  }

  TEST_CASE("powers of two show which columns were added") {
    ask("Each column holds another power of two. Write the sum in binary: what does a 0 in it mean?");
    constexpr Index WINDOW = 24;  // as many bits as a float keeps
    constexpr Index COLUMNS = 90;
    constexpr Index ROWS = COLUMNS - WINDOW + 1;
    std::vector<float> values(static_cast<std::size_t>(ROWS * COLUMNS), 0.0f);
    for (Index row = 0; row < ROWS; ++row) {
      for (Index bit = 0; bit < WINDOW; ++bit) {
        values[static_cast<std::size_t>(row * COLUMNS + row + bit)] = static_cast<float>(1 << bit);
      }
    }
    const Array got = row_sums(Source(values, ROWS, COLUMNS));
    for (Index row = 0; row < ROWS; ++row) {
      const double sum = got.values[static_cast<std::size_t>(row)];
      const double full = static_cast<double>((1 << WINDOW) - 1);
      if (sum == full) continue;
      std::string sentence = "row " + std::to_string(row) + " adds up to " + std::to_string(sum) + ", want 2^24 - 1";
      if (sum >= 0.0 && sum < full && sum == std::floor(sum)) {
        sentence += "; missing are the columns";
        const int lost = static_cast<int>(full - sum);
        for (Index bit = 0; bit < WINDOW; ++bit) {
          if ((lost >> bit & 1) != 0) sentence += " " + std::to_string(row + bit);
        }
      }
      finding("sums", sentence);
      return;
    }
  }

  TEST_CASE("what one row holds stays in that row") {
    ask("Row 2 holds NaN, and its neighbours do not. Which of your threads reads from row 2, and for which sum?");
    for (const Index columns : {1, 30, 33, 100}) {
      for (const float poison : {NOT_A_NUMBER, INF, -INF}) {
        std::vector<float> values(static_cast<std::size_t>(9 * columns), 2.0f);
        std::fill_n(values.begin() + 2 * columns, columns, poison);
        Array got = row_sums(Source(values, 9, columns));
        if (!expect(!std::isfinite(got.values[2]), "sums", "row 2 holds nothing finite, but its sum is")) return;
        got.values.erase(got.values.begin() + 2);
        got.shape = {8};
        if (!expect_all("sums", got, static_cast<double>(2 * columns), 0.0, {"row without row 2"},
                        "the sum of " + std::to_string(columns) + " twos")) {
          return;
        }
      }
    }
  }

  TEST_CASE("agrees with the float64 sums") {
    ask("Which rows are off, and what do they have in common: their place, their length, where they lie in memory?");
    for_each_matrix([](const MatrixCase& c) {
      const std::vector<float> values = make_values(c);
      const Array want = true_sums(values, c.rows, c.columns);
      const Array magnitude = true_sums(values, c.rows, c.columns, true);
      expect_close("sums", row_sums(Source(c)), want, fp32_bound(magnitude, 0.0), ROW);
    });
  }

  TEST_CASE("the same matrix gives the same sums to the last bit") {
    ask("Is (a + b) + c always a + (b + c)? Who decides in which order your additions happen?");
    const Source matrix(make_values({"", 67, 1000, 0, 0, Numbers::normal, 7}), 67, 1000);
    const Array first = row_sums(matrix);
    expect(!first.values.empty() && std::isfinite(first.values.back()), "sums", "the last sum is not a number");
    for (unsigned call = 2; call <= 4; ++call) {
      const AnotherOrder order(call);
      if (!expect_same_bits("sums", row_sums(matrix), first, ROW, "in call " + std::to_string(call))) return;
    }
  }

  TEST_CASE("row_sum reads every element once and neighbours together") {
    ask("Lanes 0 and 1 read at the same moment. How far apart in memory are the two floats that they read?");
    for (const int number : {12, 13, 20}) {
      const MatrixCase& c = matrix_case(number);
      run_case(number, c.text(), [&] {
        const Source matrix(c);
        expect_frugal([&] { return run_row_sum(matrix); }, "sums", c.rows * c.columns, {}, c.columns % 8 == 0);
      });
    }
  }

  // -- transpose ------------------------------------------------------------------------------------------------------

  TEST_CASE("every element arrives at its mirror place") {
    ask("Take the first element that is off. Which block, and which thread of it, should have written it?");
    for_each_matrix([](const MatrixCase& c) {
      const std::vector<float> values = position_coded(c.rows, c.columns);
      const Source matrix(values, c.rows, c.columns, c.gap, c.offset);
      const Array want = true_transpose(values, c.rows, c.columns);
      expect_close("transposed", transposed_of(matrix), want, {0.0, want}, TARGET);
    });
  }

  TEST_CASE("a transposed slice leaves its neighbours alone") {
    ask("The rows of transposed lie further apart than they are long. Who told your kernel, and what lies between?");
    for_each_matrix([](const MatrixCase& c) {
      const std::vector<float> values = position_coded(c.rows, c.columns);
      const Source matrix(values, c.rows, c.columns, c.gap, c.offset);
      const Array want = true_transpose(values, c.rows, c.columns);
      expect_close("transposed", transposed_of(matrix, c.rows % 8 == 0 ? 8 : 7), want, {0.0, want}, TARGET);
    });
  }

  TEST_CASE("transposing twice gives the matrix back") {
    ask("Mirror a matrix twice. Where does element (3, 40) stand after the first time, and after the second?");
    for_each_matrix([](const MatrixCase& c) {
      const std::vector<float> values = make_values(c);
      const Source once(run_transpose(Source(c)).values, c.columns, c.rows);
      const Array twice = transposed_of(once);
      expect_same_bits("matrix", twice, as_array(values, c.rows, c.columns), SOURCE, "after two transpositions");
    });
  }

  TEST_CASE("transpose moves bits and computes nothing") {
    ask("Which operations could change the sign of a zero, or a number that is not one?");
    const std::vector<float> strange{-0.0f,  0.0f,        INF,     -INF,
                                     1e-45f, -1e-40f,     3.4e38f, 1.0f + 0x1p-23f,
                                     -1.0f,  16777217.0f, 0.1f,    std::bit_cast<float>(0x7fc12345u)};
    constexpr Index ROWS = 35;
    constexpr Index COLUMNS = 37;
    std::vector<float> values(static_cast<std::size_t>(ROWS * COLUMNS));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = strange[i % strange.size()];
    const std::vector<float> transposed = run_transpose(Source(values, ROWS, COLUMNS)).values;
    for (Index row = 0; row < ROWS; ++row) {
      for (Index column = 0; column < COLUMNS; ++column) {
        const float want = values[static_cast<std::size_t>(row * COLUMNS + column)];
        const float got = transposed[static_cast<std::size_t>(column * ROWS + row)];
        if (same_bits(want, got)) continue;
        finding("transposed", std::to_string(want) + " at [row " + std::to_string(row) + ", column " +
                                  std::to_string(column) + "] became " + std::to_string(got) + ", not bit for bit");
        return;
      }
    }
  }

  TEST_CASE("transpose reads and writes neighbours together and through different banks") {
    ask("The 32 lanes of a warp read one column of the tile. By how many floats do their addresses differ, and what "
        "does that leave modulo 32?");
    for (const int number : {12, 13, 20}) {
      const MatrixCase& c = matrix_case(number);
      run_case(number, c.text(), [&] {
        const Source matrix(c);
        expect_frugal([&] { return run_transpose(matrix); }, "transposed", c.rows * c.columns, c.rows * c.columns,
                      c.columns % 8 == 0);
      });
    }
  }

  // -- both -----------------------------------------------------------------------------------------------------------

  TEST_CASE("a matrix may be very tall or very wide") {
    ask("How many blocks may a grid have along x, and how many along y? How many does this matrix need?");
    const Index many = kernels_are_checked() ? 3000 : 66000;
    for (const auto& [rows, columns] : {Shape<2>{many, 2}, Shape<2>{2, many}}) {
      const std::vector<float> values = position_coded(rows, columns);
      const Source matrix(values, rows, columns);
      const Array sums = true_sums(values, rows, columns);
      expect_close("sums", row_sums(matrix), sums, fp32_bound(sums, 0.0), ROW);
      const Array transposed = true_transpose(values, rows, columns);
      expect_close("transposed", transposed_of(matrix), transposed, {0.0, transposed}, TARGET);
    }
  }

  TEST_CASE("a second call sees what the matrix holds by then") {
    ask("Does anything of the first call live on into the second?");
    constexpr Index ROWS = 34;
    constexpr Index COLUMNS = 40;
    Source matrix(std::vector<float>(ROWS * COLUMNS, 1.0f), ROWS, COLUMNS);
    run_row_sum(matrix);
    run_transpose(matrix);
    matrix.replace(std::vector<float>(ROWS * COLUMNS, 3.0f));
    expect_all("sums", row_sums(matrix), 120.0, 0.0, ROW, "3 times 40");
    expect_all("transposed", transposed_of(matrix), 3.0, 0.0, TARGET, "every element is 3 by now");
  }

  TEST_CASE("a stream of the caller's serves as well") {
    ask("Which argument of launch says where the kernel runs, and what do you pass there?");
    const Stream stream = Stream::create();
    const std::vector<float> values = position_coded(40, 50);
    const Source matrix(values, 40, 50);
    const Array sums = true_sums(values, 40, 50);
    expect_close("sums", {{40}, doubles(run_row_sum(matrix, stream).values)}, sums, fp32_bound(sums, 0.0), ROW);
    const Array transposed = true_transpose(values, 40, 50);
    const Array got = as_array(run_transpose(matrix, 0, stream).values, 50, 40);
    expect_close("transposed", got, transposed, {0.0, transposed}, TARGET);
  }

  TEST_CASE("a matrix without columns has sums of 0 and one without rows has none") {
    ask("How many blocks do you launch for 0 rows? And what is the sum of no numbers?");
    for (const Index columns : {0, 1, 40}) {
      expect(row_sums(Source({}, 0, columns)).values.empty(), "sums", "there are no rows to add up");
      expect(transposed_of(Source({}, 0, columns)).values.empty(), "transposed", "there is nothing to transpose");
    }
    expect_all("sums", row_sums(Source({}, 41, 0)), 0.0, 0.0, ROW, "the sum of no numbers");
    expect(transposed_of(Source({}, 41, 0)).values.empty(), "transposed", "there is nothing to transpose");
  }

  TEST_CASE("says what is wrong with bad arguments") {
    ask("Does the first line of both functions still stand where it stood?");
    const Source matrix(position_coded(8, 5), 8, 5);
    run_row_sum(matrix);  // these are right
    run_transpose(matrix);
    DeviceBuffer<float> buffer("anything", 200);
    float* const memory = buffer.data();
    const auto rows_of = [&](Index count, Index stride) { return View<float, 1>(memory, {count}, {stride}); };
    const auto matrix_of = [&](Index rows, Index columns, Index row_stride, Index column_stride) {
      return View<float, 2>(memory, {rows, columns}, {row_stride, column_stride});
    };
    expect_rejected("a sum too few", "sums", [&] { row_sum(matrix.view(), rows_of(7, 1)); });
    expect_rejected("a sum for each column", "sums", [&] { row_sum(matrix.view(), rows_of(5, 1)); });
    expect_rejected("a sum too many", "sums", [&] { row_sum(matrix.view(), rows_of(9, 1)); });
    expect_rejected("sums with gaps", "sums", [&] { row_sum(matrix.view(), rows_of(8, 2)); });
    expect_rejected("columns with gaps", "matrix", [&] { row_sum(matrix_of(8, 5, 10, 2), rows_of(8, 1)); });
    expect_rejected("transposed like matrix", "transposed", [&] { transpose(matrix.view(), matrix_of(8, 5, 5, 1)); });
    expect_rejected("transposed a column short", "transposed",
                    [&] { transpose(matrix.view(), matrix_of(5, 7, 7, 1)); });
    expect_rejected("transposed a row short", "transposed", [&] { transpose(matrix.view(), matrix_of(4, 8, 8, 1)); });
    expect_rejected("columns of matrix with gaps", "matrix",
                    [&] { transpose(matrix_of(8, 5, 10, 2), matrix_of(5, 8, 8, 1)); });
    expect_rejected("columns of transposed with gaps", "transposed",
                    [&] { transpose(matrix.view(), matrix_of(5, 8, 16, 2)); });
    expect_rejected("rows of transposed upon each other", "transposed",
                    [&] { transpose(matrix.view(), matrix_of(5, 8, 4, 1)); });
    for (const float value : buffer.download()) {
      if (std::isnan(value)) continue;
      finding("anything", "something was written although an argument was wrong");
      return;
    }
  }
}
