#include "bench_grid.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <map>

#include "failure.hpp"

namespace kata {
namespace {

// Of a step: where it runs, in which types, in which directions.
struct Benched {
  bool gpu;
  std::vector<std::string> types;
  std::vector<std::string> directions;
};

const std::map<std::string, Benched>& benched_steps() {
  static const std::map<std::string, Benched> steps = {
      {"tiled_forward", {false, {"float32"}, {"forward"}}},
      {"flash_forward", {true, {"float32"}, {"forward"}}},
      {"flash_forward_mma", {true, {"bfloat16"}, {"forward"}}},
      {"tiled_backward", {false, {"float32"}, {"backward", "both"}}},
      {"flash_backward", {true, {"float32"}, {"backward", "both"}}},
      {"flash_backward_mma", {true, {"bfloat16"}, {"backward", "both"}}},
  };
  return steps;
}

constexpr const char* HEADER =
    "step,type,direction,device,causal,batch,heads,length,width,threads,who,status,ms,low_ms,high_ms,calls,tflops,"
    "of_roofline,date,machine";

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::array<char, 16> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%d", std::localtime(&now));
  return text.data();
}

}  // namespace

bool is_benched(const Step& step) { return benched_steps().count(step.name) > 0; }

std::vector<BenchProblem> bench_grid(const Step& step, const std::string& grid) {
  const Benched& benched = benched_steps().at(step.name);
  const bool full = grid == "full";
  std::vector<BenchProblem> problems;
  BenchProblem problem{.step = step.number, .gpu = benched.gpu};
  for (const auto& type : benched.types) {
    for (const auto& direction : benched.directions) {
      problem.type = type;
      problem.direction = direction;
      if (!full && direction == "both") continue;
      for (const int width : full ? std::vector{16, 32, 64, 128} : std::vector{64, 128}) {
        for (const bool causal : {false, true}) {
          problem.width = width;
          problem.causal = causal;
          if (benched.gpu) {  // 16384 tokens in all, as many channels in all heads as a large model has
            for (int length = full ? 128 : 512; length <= (full ? 65536 : 8192); length *= full ? 2 : 4) {
              problem.length = length;
              problem.batch = std::max(1, 16384 / length);
              problem.heads = 2048 / width;
              problems.push_back(problem);
            }
            continue;
          }
          for (int length = full ? 128 : 1024; length <= (full ? 16384 : 4096); length *= full ? 2 : 4) {
            for (const int threads : {1, 0}) {
              if (!full && width == 128 && length != 1024) continue;
              problem.length = length;
              problem.batch = 1;
              problem.heads = 8;
              problem.threads = threads;
              problems.push_back(problem);
            }
          }
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
    while (std::getline(file, line)) {  // everything up to `who` is the key
      std::size_t end = 0;
      for (int column = 0; column < 11 && end != std::string::npos; ++column) {
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
  std::string text = p.step + "," + p.type + "," + p.direction + "," + (p.gpu ? "gpu" : "cpu") + ",";
  text += p.causal ? "1" : "0";
  for (const std::int64_t number : {p.batch, p.heads, p.length, p.width, std::int64_t{p.threads}})
    text += "," + std::to_string(number);
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
            number("%.4f", of_roofline);
  } else {
    line += ",,,,,";
  }
  line += "," + today() + ",\"" + machine + "\"";
  std::ofstream out(path_, std::ios::app);
  out << line << "\n" << std::flush;
  if (!out) throw Failure("cannot write " + path_.string(), "is the disk full?");
  keys_.insert(key(problem, who));
}

}  // namespace kata
