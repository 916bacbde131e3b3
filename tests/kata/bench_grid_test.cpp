#include "bench_grid.hpp"

#include <doctest/doctest.h>

#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "failure.hpp"

using namespace kata;

namespace {

Step step(const std::string& number, const std::string& name) {
  Step result;
  result.number = number;
  result.name = name;
  return result;
}

const std::vector<Step> STEPS = {step("2.03", "tiled_forward"),
                                 step("2.04", "flash_forward"),
                                 step("2.05", "flash_forward_mma"),
                                 step("3.03", "tiled_backward"),
                                 step("3.04", "flash_backward"),
                                 step("3.05", "flash_backward_mma"),
                                 step("4.01", "varlen"),
                                 step("4.02", "gqa"),
                                 step("4.03", "dropout"),
                                 step("4.04", "sliding_window"),
                                 step("4.05", "grouped"),
                                 step("4.06", "split_kv"),
                                 step("4.07", "paged_kv")};

// A file that is gone when the test is over.
struct Scratch {
  std::filesystem::path path;
  explicit Scratch(const std::string& name) : path(std::filesystem::temp_directory_path() / name) {
    std::filesystem::remove(path);
  }
  ~Scratch() { std::filesystem::remove(path); }
};

double counted_pairs(const BenchProblem& problem) {
  double pairs = 0;
  for (std::int64_t i = 0; i < problem.queries; ++i) {
    for (std::int64_t j = 0; j < problem.length; ++j) pairs += problem.keys_of(i).has(j) ? 1 : 0;
  }
  return pairs;
}

}  // namespace

TEST_CASE("bench: every problem of a grid is possible, and none comes twice") {
  for (const Step& each : STEPS) {
    REQUIRE(is_benched(each));
    for (const std::string grid : {"quick", "full"}) {
      CAPTURE(each.number);
      CAPTURE(grid);
      const auto problems = bench_grid(each, grid);
      REQUIRE(!problems.empty());
      std::set<std::string> seen;
      for (const BenchProblem& problem : problems) {
        CHECK(problem.step == each.number);
        CHECK(problem.heads % problem.kv_heads == 0);
        CHECK(problem.queries >= 1);
        CHECK(problem.queries <= problem.length);
        CHECK(problem.operations() > 0);
        CHECK((problem.page == 0 || problem.length % problem.page == 0));
        for (const auto& [q_begin, q_end, k_begin, k_end] : problem.groups) {
          CHECK((0 <= q_begin && q_begin < q_end && q_end <= problem.queries));
          CHECK((0 <= k_begin && k_begin < k_end && k_end <= problem.length));
        }
        CHECK_MESSAGE(seen.insert(nlohmann::json(problem).dump()).second, problem.length, " ", problem.width);
      }
    }
  }
  CHECK_FALSE(is_benched(step("1.02", "attention")));
}

TEST_CASE("bench: the full grid is the one that was promised") {
  const auto problems = bench_grid(step("3.05", "flash_backward_mma"), "full");
  CHECK(problems.size() == (10 + 5) * 4 * 2);  // S 128 to 65536 backward, every second one for both passes; D, masks
  std::set<std::int64_t> lengths, widths;
  for (const auto& problem : problems) {
    lengths.insert(problem.length);
    widths.insert(problem.width);
  }
  CHECK(*lengths.begin() == 128);
  CHECK(*lengths.rbegin() == 65536);
  CHECK(widths == std::set<std::int64_t>{16, 32, 64, 128});
}

TEST_CASE("bench: who sees whom, and how many pairs that is") {
  BenchProblem problem{.heads = 4, .kv_heads = 2, .queries = 100, .length = 100};
  CHECK(problem.pairs() == 100 * 100);
  problem.causal = true;
  CHECK(problem.pairs() == 100 * 100 / 2.0);
  CHECK(problem.keys_of(99).count() == 100);
  problem.window = {9, 0};
  CHECK(problem.keys_of(99).first == 90);
  CHECK(problem.pairs() == counted_pairs(problem) - 50);
  problem.causal = false;
  problem.window = {10, 20};
  CHECK(problem.pairs() == counted_pairs(problem));
  problem.window = {-1, 0};
  CHECK(problem.pairs() == 100 * 101 / 2);

  problem.window.clear();
  problem.groups = {{0, 40, 0, 40}, {40, 100, 20, 100}};
  CHECK(problem.pairs() == 40 * 40 + 60 * 80);
  CHECK(problem.pairs() == counted_pairs(problem));
  problem.causal = true;
  CHECK(problem.keys_of(40).last == 41);
  CHECK(problem.keys_of(99).last == 100);
  CHECK(problem.pairs() == counted_pairs(problem) - 50);

  problem.causal = false;
  problem.type = "bfloat16";
  problem.direction = "forward";
  CHECK(problem.bytes() == 2 * (4 * 100 + 2 * 100) * 64 * 2.0);
  CHECK(problem.bytes(true) == 2 * (4 * 100 + 2 * 120) * 64 * 2.0);  // the slices have 40 and 80 keys
  problem.direction = "both";
  CHECK(problem.bytes() == 6 * (4 * 100 + 2 * 100) * 64 * 2.0);
  CHECK(problem.operations() == 7 * 2 * problem.pairs() * 4 * 64);
}

TEST_CASE("bench: a problem survives the way to its worker") {
  for (const BenchProblem& problem : bench_grid(step("4.05", "grouped"), "full")) {
    const auto back = nlohmann::json::parse(nlohmann::json(problem).dump()).get<BenchProblem>();
    CHECK(nlohmann::json(back) == nlohmann::json(problem));
    CHECK(back.operations() == problem.operations());
  }
  const auto few = nlohmann::json{{"step", "2.03"}, {"length", 64}, {"queries", 64}}.get<BenchProblem>();
  CHECK(few.pairs() == 64 * 64);  // what is not said is as usual
}

TEST_CASE("bench: what was measured is not measured again") {
  const Scratch scratch("kata_bench_test.csv");
  const auto problems = bench_grid(step("4.07", "paged_kv"), "full");
  const nlohmann::json time = {{"median", 2.0}, {"low", 1.5}, {"high", 2.5}, {"calls", 9}};
  {
    BenchRecord record(scratch.path, false);
    record.add(problems[0], "ours", "ok", time, 0.5, "a card, and more");
    record.add(problems[0], "FA2", "ok", time, 0.25, "a card, and more");
    record.add(problems[1], "ours", "out of memory", {}, 0, "a card");
    CHECK(record.has(problems[0], "ours"));
  }
  const BenchRecord again(scratch.path, false);
  CHECK(again.has(problems[0], "ours"));
  CHECK(again.has(problems[0], "FA2"));
  CHECK(again.has(problems[1], "ours"));
  for (std::size_t i = 2; i < problems.size(); ++i) CHECK_FALSE(again.has(problems[i], "ours"));
  CHECK_FALSE(BenchRecord(scratch.path, true).has(problems[0], "ours"));

  std::ofstream(scratch.path, std::ios::trunc) << "mine\n";
  CHECK_THROWS_AS(BenchRecord(scratch.path, false), Failure);
}
