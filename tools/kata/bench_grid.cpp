#include "bench_grid.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <ctime>
#include <fstream>

#include "failure.hpp"

namespace kata {
namespace {

using Problems = std::vector<BenchProblem>;

// ---- The shapes that a problem is measured in -----------------------------------------------------------------------

// 16384 tokens in all, as many channels in all heads as a large model has. From 16384 on so much fewer heads that a
// call has no more to compute than at 8192, or the longest sequences would take all of the time.
Problems dense(BenchProblem problem, const std::vector<int>& widths, std::int64_t shortest, std::int64_t longest,
               int step) {
  Problems problems;
  for (const int width : widths) {
    for (std::int64_t length = shortest; length <= longest; length *= step) {
      const std::int64_t times = std::max<std::int64_t>(1, length / 8192);
      const std::int64_t channels = length <= 8192 ? 2048 : 2 * 2048 / (times * times);
      problem.width = width;
      problem.length = problem.queries = length;
      problem.batch = std::max<std::int64_t>(1, 16384 / length);
      problem.heads = problem.kv_heads = std::max<std::int64_t>(1, channels / width);
      problems.push_back(problem);
    }
  }
  return problems;
}

// One batch item of 8 heads, by one thread and by all.
Problems on_cpu(BenchProblem problem, bool full) {
  Problems problems;
  problem.heads = problem.kv_heads = 8;
  for (const int width : full ? std::vector{16, 32, 64, 128} : std::vector{64, 128}) {
    for (int length = full ? 128 : 1024; length <= (full ? 16384 : 4096); length *= full ? 2 : 4) {
      for (const int threads : {1, 0}) {
        if (!full && width == 128 && length != 1024) continue;
        problem.width = width;
        problem.length = problem.queries = length;
        problem.threads = threads;
        problems.push_back(problem);
      }
    }
  }
  return problems;
}

// The heads of Llama-3 8B and 70B.
Problems llama(BenchProblem problem, bool full) {
  Problems problems;
  problem.width = 128;
  problem.kv_heads = 8;
  for (const int heads : full ? std::vector{32, 64} : std::vector{32}) {
    for (int length = 8192; length <= (full ? 65536 : 8192); length *= 2) {
      problem.heads = heads;
      problem.length = problem.queries = length;
      problems.push_back(problem);
    }
  }
  return problems;
}

// One new query of each sequence, and a long cache.
Problems caches(BenchProblem problem, bool full) {
  Problems problems;
  problem.width = 128;
  problem.heads = 32;
  for (const int kv_heads : full ? std::vector{8, 32} : std::vector{8}) {
    for (const int batch : {1, 8, 64}) {
      for (const int length : {4096, 32768, 131072}) {
        problem.kv_heads = kv_heads;
        problem.batch = batch;
        problem.length = length;
        problems.push_back(problem);
      }
    }
  }
  return problems;
}

// ---- What phase 4 adds ----------------------------------------------------------------------------------------------

// Sequences one behind the other, each a group of its own.
void pack(BenchProblem& problem, const std::vector<std::int64_t>& lengths) {
  std::int64_t begin = 0;
  for (const std::int64_t length : lengths) {
    problem.groups.push_back({begin, begin + length, begin, begin + length});
    begin += length;
  }
  problem.length = problem.queries = begin;
  problem.batch = 1;
  problem.packed = problem.type == "float32";
}

void uniform(BenchProblem& problem) { pack(problem, std::vector<std::int64_t>(8, 2048)); }
void ragged(BenchProblem& problem) {
  pack(problem, {777, 4096, 20, 2311, 500, 1900, 7, 1024, 2777, 100, 640, 50, 1503, 217, 333, 129});
}

// `count` groups of queries, one chunk each. Causal: they see the keys up to the end of their chunk, as context
// parallelism has it; otherwise all keys.
template <std::int64_t count>
void chunks(BenchProblem& problem) {
  const std::int64_t chunk = problem.length / count;
  for (std::int64_t g = 0; g < count; ++g) {
    const std::int64_t end = (g + 1) * chunk;
    problem.groups.push_back({g * chunk, end, 0, problem.causal ? end : problem.length});
  }
}

template <std::int64_t size>
void in_pages(BenchProblem& problem) {
  problem.page = size;
}

void four_to_one(BenchProblem& problem) { problem.kv_heads = problem.heads / 4; }
void one_of_all(BenchProblem& problem) { problem.kv_heads = 1; }
void a_tenth_falls(BenchProblem& problem) { problem.dropout = 0.1; }
void a_thousand_back(BenchProblem& problem) { problem.window = {1023, 0}; }
void both_sides(BenchProblem& problem) { problem.window = {512, 512}; }

// ---- The steps ------------------------------------------------------------------------------------------------------

const std::vector<std::string> FORWARD{"forward"}, BACKWARD{"backward", "both"}, EACH{"forward", "backward"},
    DECODE{"decode"};
const std::vector<bool> BOTH_MASKS{false, true}, FULL{false}, CAUSAL{true};

// What is measured of a step: problems of these shapes, with what phase 4 adds to them.
struct Benched {
  std::string step, type;
  std::vector<std::string> directions;
  enum Shapes { GPU, CPU, SOME, LONG, PACKED, LLAMA, CACHE } shapes;
  std::string what = "";
  std::vector<bool> masks = BOTH_MASKS;
  void (*add)(BenchProblem&) = [](BenchProblem&) {};
  bool in_quick = true;
};

const std::vector<Benched>& benched_steps() {
  static const std::vector<Benched> steps{
      {"tiled_forward", "float32", FORWARD, Benched::CPU},
      {"flash_forward", "float32", FORWARD, Benched::GPU},
      {"flash_forward_mma", "bfloat16", FORWARD, Benched::GPU},
      {"tiled_backward", "float32", BACKWARD, Benched::CPU},
      {"flash_backward", "float32", BACKWARD, Benched::GPU},
      {"flash_backward_mma", "bfloat16", BACKWARD, Benched::GPU},
      {"varlen", "float32", EACH, Benched::PACKED, "8 x 2048", BOTH_MASKS, uniform, false},
      {"varlen", "float32", EACH, Benched::PACKED, "ragged", BOTH_MASKS, ragged},
      {"gqa", "float32", EACH, Benched::SOME, "4 to 1", BOTH_MASKS, four_to_one},
      {"gqa", "float32", EACH, Benched::SOME, "all to 1", BOTH_MASKS, one_of_all, false},
      {"dropout", "float32", EACH, Benched::SOME, "p = 0.1", BOTH_MASKS, a_tenth_falls},
      {"sliding_window", "float32", EACH, Benched::LONG, "1024 back", CAUSAL, a_thousand_back},
      {"sliding_window", "float32", EACH, Benched::LONG, "512 each way", FULL, both_sides, false},
      {"grouped", "bfloat16", EACH, Benched::LLAMA, "2 chunks", CAUSAL, chunks<2>, false},
      {"grouped", "bfloat16", EACH, Benched::LLAMA, "4 chunks", CAUSAL, chunks<4>},
      {"grouped", "bfloat16", EACH, Benched::LLAMA, "2 on all", FULL, chunks<2>, false},
      {"grouped", "bfloat16", EACH, Benched::LLAMA, "4 on all", FULL, chunks<4>},
      {"grouped", "bfloat16", EACH, Benched::PACKED, "8 x 2048", BOTH_MASKS, uniform, false},
      {"grouped", "bfloat16", EACH, Benched::PACKED, "ragged", BOTH_MASKS, ragged},
      {"split_kv", "bfloat16", DECODE, Benched::CACHE, "", FULL},
      {"paged_kv", "bfloat16", DECODE, Benched::CACHE, "pages of 16", FULL, in_pages<16>},
      {"paged_kv", "bfloat16", DECODE, Benched::CACHE, "pages of 256", FULL, in_pages<256>, false},
  };
  return steps;
}

Problems shapes_of(const Benched& benched, const BenchProblem& problem, bool full) {
  const std::vector<int> large{64, 128}, widths = full ? std::vector{16, 32, 64, 128} : large;
  switch (benched.shapes) {
    case Benched::CPU:
      return on_cpu(problem, full);
    case Benched::GPU:
      if (!full) return dense(problem, widths, 512, 8192, 4);
      return dense(problem, widths, 128, 65536, problem.direction == "both" ? 4 : 2);
    case Benched::SOME:
      return full ? dense(problem, large, 2048, 8192, 4) : dense(problem, large, 2048, 2048, 2);
    case Benched::LONG:
      return full ? dense(problem, large, 2048, 32768, 4) : dense(problem, large, 8192, 8192, 2);
    case Benched::PACKED:  // 16384 tokens, of which `add` makes sequences
      return dense(problem, widths, 8192, 8192, 2);
    case Benched::LLAMA:
      return llama(problem, full);
    default:
      return caches(problem, full);
  }
}

constexpr const char* HEADER =
    "step,what,type,direction,device,causal,batch,heads,kv_heads,length,width,threads,who,status,ms,low_ms,high_ms,"
    "calls,"
    "tflops,gb,of_roofline,date,machine";
constexpr int KEY_COLUMNS = 13;  // up to `who`

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::array<char, 16> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%d", std::localtime(&now));
  return text.data();
}

}  // namespace

constexpr double MOST_OPERATIONS = 1.2e14;  // a third of a second for a good kernel on a large GPU

bool is_benched(const Step& step) {
  const auto& steps = benched_steps();
  return std::any_of(steps.begin(), steps.end(), [&](const Benched& benched) { return benched.step == step.name; });
}

std::vector<BenchProblem> bench_grid(const Step& step, const std::string& grid) {
  const bool full = grid == "full";
  Problems problems;
  for (const std::string direction : {"forward", "backward", "both", "decode"}) {
    if (!full && direction == "both") continue;
    for (const Benched& benched : benched_steps()) {
      const auto& directions = benched.directions;
      if (benched.step != step.name || (!full && !benched.in_quick)) continue;
      if (std::find(directions.begin(), directions.end(), direction) == directions.end()) continue;
      for (const bool causal : benched.masks) {
        const BenchProblem problem{.step = step.number,
                                   .type = benched.type,
                                   .direction = direction,
                                   .what = benched.what,
                                   .gpu = benched.shapes != Benched::CPU,
                                   .causal = causal,
                                   .seconds = full ? 0.02 : 0.5};
        for (BenchProblem& each : shapes_of(benched, problem, full)) {
          benched.add(each);
          if (each.operations() < MOST_OPERATIONS) problems.push_back(std::move(each));
        }
      }
    }
  }
  return problems;
}

BenchRecord::BenchRecord(std::filesystem::path path, bool fresh) : path_(std::move(path)) {
  if (path_.has_parent_path()) {
    std::error_code error;
    std::filesystem::create_directories(path_.parent_path(), error);
  }
  if (fresh) std::ofstream(path_, std::ios::trunc).flush();
  std::ifstream file(path_);
  std::string line;
  if (std::getline(file, line)) {
    if (line != HEADER) {
      throw Failure(path_.string() + " is no file of benchmark results", "choose another --csv", 2);
    }
    while (std::getline(file, line)) {
      std::size_t end = 0;
      for (int column = 0; column < KEY_COLUMNS && end != std::string::npos; ++column) {
        end = line.find(',', column == 0 ? 0 : end + 1);
      }
      if (end != std::string::npos) keys_.insert(line.substr(0, end));
    }
    return;
  }
  std::ofstream out(path_, std::ios::app);
  out << HEADER << "\n" << std::flush;
  if (!out) throw Failure("cannot write " + path_.string(), "is its folder there, and is the disk full?", 2);
}

std::string BenchRecord::key(const BenchProblem& p, const std::string& who) {
  std::string text = p.step + "," + p.what + "," + p.type + "," + p.direction + "," + (p.gpu ? "gpu" : "cpu") + ",";
  text += p.causal ? "1" : "0";
  for (const std::int64_t number : {p.batch, p.heads, p.kv_heads, p.length, p.width, std::int64_t{p.threads}}) {
    text += "," + std::to_string(number);
  }
  return text + "," + who;
}

bool BenchRecord::has(const BenchProblem& problem, const std::string& who) const {
  return keys_.count(key(problem, who)) > 0;
}

void BenchRecord::add(const BenchProblem& problem, const std::string& who, const std::string& status,
                      const nlohmann::json& time, double of_roofline, const std::string& machine) {
  const auto number = [](const char* format, double value) {
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), format, value);
    return std::string(text.data());
  };
  std::string line = key(problem, who) + "," + status + ",";
  if (time.is_object()) {
    const double ms = time.at("median");
    line += number("%.6g", ms) + "," + number("%.6g", time.at("low")) + "," + number("%.6g", time.at("high")) + "," +
            std::to_string(time.at("calls").get<int>()) + "," + number("%.5g", problem.operations() / ms * 1e-9) + "," +
            number("%.5g", problem.bytes(who == "separate") * 1e-9) + "," + number("%.4f", of_roofline);
  } else {
    line += ",,,,,,";
  }
  line += "," + today() + ",\"" + machine + "\"";
  std::ofstream out(path_, std::ios::app);
  out << line << "\n" << std::flush;
  if (!out) throw Failure("cannot write " + path_.string(), "is the disk full?");
  keys_.insert(key(problem, who));
}

}  // namespace kata
