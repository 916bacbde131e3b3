#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "bench_grid.hpp"
#include "build.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "files.hpp"
#include "names.hpp"
#include "process.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

using Json = nlohmann::json;

std::string number(const char* format, double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), format, value);
  return text.data();
}

std::string right(const std::string& text, std::size_t width) {
  return text.size() >= width ? text : std::string(width - text.size(), ' ') + text;
}

using flashkata::bench::Ceilings;

/// The program that measures: our own, or Python's with PyTorch beside us.
class Worker {
 public:
  Worker(const Course& course, const std::string& against) : course_(course) {
    if (against.empty()) {
      build_own();
      argv_ = {(course.build / "benchmarks" / "bench_worker").string()};
      return;
    }
    const char* chosen = std::getenv("KATA_PYTHON");
    const std::string python = chosen != nullptr ? chosen : "python3";
    if (output_of({python, "-c", "import torch; print(torch.__version__)"}).empty()) {
      throw Failure("--against torch: " + python + " has no PyTorch",
                    "leave --against away; or install PyTorch, or name a Python that has it in KATA_PYTHON", 2);
    }
    build({"flashkata"}, "building your steps as a library");
    argv_ = {python, "-B", (course.source / "benchmarks" / "against_torch" / "bench_worker.py").string(),
             (course.build / "bindings" / "libflashkata.so").string()};
  }

  /// Asks `questions`, and calls on_answer with each answer as it comes and with the question's number. What a crash
  /// leaves unanswered is asked again of a new process, but for the question that it crashed on.
  template <typename OnAnswer, typename OnTick>
  void ask(const std::vector<Json>& questions, const OnAnswer& on_answer, const OnTick& on_tick) const {
    std::size_t next = 0;
    while (next < questions.size()) {
      Command command;
      command.argv = argv_;
      command.folder = course_.source;
      std::string last_words;
      const std::size_t first = next;
      for (std::size_t i = next; i < questions.size(); ++i) command.input += questions[i].dump() + "\n";
      command.on_line = [&](std::string_view line) {
        const Json answer = Json::parse(line, nullptr, false);
        if (!answer.is_object()) {
          if (!line.empty()) last_words = line;
          return;
        }
        on_answer(next, answer);
        ++next;
      };
      command.on_tick = [&](double) { on_tick(); };
      const Outcome outcome = run(command);
      if (!outcome.started) throw Failure("cannot start " + argv_.front(), "./kata doctor");
      if (next >= questions.size() || outcome.exit_code == 3) continue;
      if (outcome.signal == 0 && next == first) {
        throw Failure("nothing could be measured: " + last_words, "the program was " + argv_.front());
      }
      const std::string why = outcome.signal != 0 ? describe_signal(outcome.signal) : last_words;
      on_answer(next, Json{{"status", "crashed"}, {"why", why}});
      ++next;
    }
  }

 private:
  void build(const std::vector<std::string>& targets, const std::string& what) const {
    const auto result = build_targets(course_.build, targets, what);
    if (result.ok) return;
    const auto log = course_.logs() / "bench.log";
    try_write_file(log, result.log);
    throw Failure(what + " failed; the compiler's words are in " + course_.shown(log), "./kata test finds the step");
  }

  void build_own() const {
    const auto cache = read_file(course_.build / "CMakeCache.txt").value_or("");
    if (cache.find("\nKATA_BENCH:BOOL=ON") == std::string::npos && !configured("ON")) {
      configured("OFF");
      throw Failure("Google Benchmark, which measures on the CPU, is neither installed nor could it be fetched",
                    "apt-get install libbenchmark-dev, then again", 2);
    }
    build({"bench_worker"}, "building your steps for speed");
  }

  bool configured(const std::string& value) const {
    ProgressLine progress("configuring for benchmarks");
    Command command;
    command.argv = {"cmake", "-DKATA_BENCH=" + value, course_.build.string()};
    command.on_tick = [&](double) { progress.tick(); };
    return run(command).ok();
  }

  const Course& course_;
  std::vector<std::string> argv_;
};

/// The table of one step, printed row by row.
class Table {
 public:
  Table(const Step& step, const BenchProblem& first) : gpu_(first.gpu), decodes_(first.decodes()) {
    std::cout << "\n  " << bold(step.title()) << " · " << first.type << " · " << first.direction
              << (first.what.empty() ? "" : " · " + first.what) << "\n";
  }

  /// Whether a row of it belongs in the table that begins with the other.
  static bool same(const BenchProblem& one, const BenchProblem& other) {
    return one.direction == other.direction && one.type == other.type && one.what == other.what;
  }

  void row(const BenchProblem& p, const Json& answer, double of_roofline) {
    std::string line =
        right(std::to_string(p.length), 8) + right(std::to_string(p.width), 6) + right(p.causal ? "causal" : "full", 8);
    const std::string heads = std::to_string(p.heads) + (p.kv_heads != p.heads ? "/" + std::to_string(p.kv_heads) : "");
    line += gpu_ ? right(std::to_string(p.batch) + " x " + heads, 12)
                 : right(p.threads == 0 ? "all" : std::to_string(p.threads), 12);
    const std::string status = answer.value("status", "failed");
    if (status != "ok") {
      std::cout << line << "   " << red(status) << " " << dim(wrapped(answer.value("why", ""), 40)) << "\n"
                << std::flush;
      return;
    }
    const Json& times = answer.at("times");
    head(times, answer.value("refused", Json::object()));
    const Json& ours = times.at("ours");
    const double ms = ours.at("median");
    const double spread = (ours.at("high").get<double>() - ours.at("low").get<double>()) / 2.0 / ms;
    line += right(number(ms < 10 ? "%.3f" : "%.1f", ms), 10) + right(number("%.0f %%", 100 * spread), 7);
    line += right(rate(p, ms), 10) + right(number("%.0f %%", 100 * of_roofline), 10);
    for (const auto& who : peers_) {
      if (!times.contains(who)) {
        line += right("-", 16);
        continue;
      }
      const double other = times.at(who).at("median");
      line += right(rate(p, other), 8) + " " + right("(" + number("%.2f", other / ms) + ")", 7);
      ratios_[who].push_back(other / ms);
    }
    std::cout << line << "\n" << std::flush;
  }

  ~Table() {
    for (const auto& [who, ratios] : ratios_) {
      const auto [low, high] = std::minmax_element(ratios.begin(), ratios.end());
      std::cout << dim("  " + who + ": " + number("%.2f", *low) + " to " + number("%.2f", *high) +
                       " times as fast as it")
                << "\n";
      refusals_.erase(who);
    }
    for (const auto& [who, why] : refusals_) std::cout << dim("  " + who + " refused: " + why) << "\n";
  }

 private:
  // TFLOP/s; where nearly all of the time goes into reading, TB/s.
  std::string rate(const BenchProblem& p, double ms) const {
    const double tera = (decodes_ ? p.bytes() : p.operations()) / ms * 1e-9;
    return number(tera < 10 ? "%.3f" : "%.1f", tera);
  }

  void head(const Json& times, const Json& refused) {
    if (headed_) return;
    headed_ = true;
    for (const auto& [who, time] : times.items()) {
      if (who != "ours") peers_.insert(who);
    }
    for (const auto& [who, why] : refused.items()) {
      peers_.insert(who);
      refusals_[who] = why;
    }
    std::string line = right("S", 8) + right("D", 6) + right("mask", 8) + right(gpu_ ? "B x H" : "threads", 12) +
                       right("ms", 10) + right("+-", 7) + right(decodes_ ? "TB/s" : "TFLOP/s", 10) +
                       right("roofline", 10);
    for (const auto& who : peers_) line += right(who, 16);
    std::cout << dim(line) << "\n";
  }

  bool gpu_, decodes_;
  bool headed_ = false;
  std::set<std::string> peers_;
  std::map<std::string, std::string> refusals_;
  std::map<std::string, std::vector<double>> ratios_;
};

/// "about 2 min left", from what the same kind of work has taken so far.
class Clock {
 public:
  Clock(std::size_t total, ProgressLine& line) : total_(total), line_(line) {}
  void done() { ++done_; }
  void tick() {
    std::string text = std::to_string(done_) + "/" + std::to_string(total_);
    if (done_ > 0) {
      const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
      const double left = elapsed / static_cast<double>(done_) * static_cast<double>(total_ - done_);
      text += left < 90 ? number(", about %.0f s left", left) : number(", about %.0f min left", left / 60);
    }
    line_.say(text);
    line_.tick();
  }

 private:
  std::size_t total_, done_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  ProgressLine& line_;
};

/// The steps that can be measured here; says why the others cannot.
std::vector<const Step*> measurable(const Course& course, const std::string& which, const std::string& on) {
  std::vector<const Step*> steps;
  std::string without_speed, without_tensors;
  const auto list = [](std::string& text, const Step& step) { text += (text.empty() ? "" : ", ") + step.number; };
  const bool has_gpu = course.preset.find("cuda") != std::string::npos;
  const auto chosen = find_steps(course, which);
  for (const Step* step : chosen) {
    if (!on.empty() && on != (step->kind == "cuda" ? "gpu" : "cpu")) continue;
    if (!is_benched(*step)) {
      list(without_tensors, *step);
    } else if (step->kind == "cuda" && !has_gpu) {
      list(without_speed, *step);
    } else {
      steps.push_back(step);
    }
  }
  if (steps.empty() && without_speed.empty()) {
    std::string all;
    for (const Step& each : course.steps) {
      if (is_benched(each)) list(all, each);
    }
    const std::string why = without_tensors.empty()
                                ? which + ": nothing of it runs on the " + on
                                : "nothing to measure in " + without_tensors + ": no attention over whole tensors";
    throw Failure(why, "./kata bench with one of " + all, 2);
  }
  if (!without_tensors.empty()) std::cout << field("not timed", without_tensors + ": no attention over whole tensors");
  if (!without_speed.empty()) {
    const std::string one = chosen.size() == 1 ? chosen.front()->number : "STEP";
    std::cout << field("not timed", without_speed + ": the virtual GPU has no speed")
              << field("instead", bold("./kata profile " + one) + "   counts what it moves")
              << field("on a GPU", bold("./kata --preset learn-cuda bench " + which));
  }
  return steps;
}

}  // namespace

int bench(const Course& course, const BenchOptions& options) {
  const auto steps = measurable(course, options.which.empty() ? "all" : options.which, options.on);
  if (steps.empty()) return 2;
  const bool kept = !options.csv.empty();
  BenchRecord record(kept ? options.csv : course.state() / "bench" / "last.csv", !kept);
  const Worker worker(course, options.against);

  std::map<std::string, Ceilings> ceilings;  // of "gpu", of "1" thread, of "0", all
  const auto place = [](const BenchProblem& p) { return p.gpu ? std::string("gpu") : std::to_string(p.threads); };
  std::map<const Step*, std::vector<BenchProblem>> problems;
  std::size_t total = 0, there = 0;
  for (const Step* step : steps) {
    for (auto& problem : bench_grid(*step, options.grid)) {
      if (record.has(problem, "ours")) {
        ++there;
        continue;
      }
      ceilings[place(problem)];
      problems[step].push_back(std::move(problem));
      ++total;
    }
  }
  if (there > 0) {
    std::cout << "\n  " << there << " of " << there + total << " are in " << course.shown(record.path())
              << " already\n";
  }
  std::vector<Json> questions;
  for (const auto& [name, each] : ceilings) {
    questions.push_back({{"ceilings", name == "gpu" ? Json(name) : Json(std::stoi(name))}});
  }
  {
    ProgressLine line("measuring what the machine can do at most");
    auto name = ceilings.begin();
    worker.ask(
        questions,
        [&](std::size_t, const Json& answer) {
          if (answer.contains("copy_gb_s")) name->second = answer.get<Ceilings>();
          ++name;
        },
        [&] { line.tick(); });
  }
  for (const auto& [name, each] : ceilings) {
    if (each.name.empty()) continue;
    std::cout << field(
        "ceilings", each.name + ": copies " + number("%.0f GB/s", each.copy_gb_s) + ", fp32 " +
                        number("%.2f TFLOP/s", each.float32_tflops) +
                        (each.tensor_tflops > 0 ? ", tensor cores " + number("%.0f TFLOP/s", each.tensor_tflops) : ""));
  }

  ProgressLine line("measuring");
  Clock clock(total, line);
  std::size_t failed = 0;
  try {
    for (const Step* step : steps) {
      const auto& mine = problems[step];
      std::optional<Table> table;
      const BenchProblem* last = nullptr;
      questions.clear();
      for (const auto& problem : mine) questions.emplace_back(problem);
      worker.ask(
          questions,
          [&](std::size_t index, const Json& answer) {
            const BenchProblem& problem = mine[index];
            const Ceilings& most = ceilings[place(problem)];
            line.clear();
            if (last == nullptr || !Table::same(*last, problem)) {
              table.reset();
              table.emplace(*step, problem);
            }
            last = &problem;
            const std::string status = answer.value("status", "failed");
            const Json times = answer.value("times", Json::object());
            const auto of_roof = [&](const Json& time) {
              const double roof = most.roof(problem);
              return roof > 0 ? problem.operations() / time.at("median").get<double>() * 1e-9 / roof : 0.0;
            };
            if (status != "ok") {
              if (status != "out of memory") ++failed;  // what does not fit is an answer, too
              record.add(problem, "ours", status, {}, 0, most.name);
            }
            for (const auto& [who, time] : times.items()) {
              record.add(problem, who, "ok", time, of_roof(time), most.name);
            }
            table->row(problem, answer, times.contains("ours") ? of_roof(times.at("ours")) : 0.0);
            clock.done();
          },
          [&] { clock.tick(); });
    }
  } catch (const Interrupted&) {
    line.clear();
    std::string again = course.preset == "learn" ? "./kata bench" : "./kata --preset " + course.preset + " bench";
    if (!options.which.empty()) again += " " + options.which;
    again += " --grid " + options.grid;
    if (!options.on.empty()) again += " --on " + options.on;
    if (!options.against.empty()) again += " --against " + options.against;
    std::cout << "\n  stopped; what was measured is in " << course.shown(record.path()) << "\n"
              << field("go on", bold(again + " --csv " + course.shown(record.path())));
    throw;
  }
  line.clear();
  std::cout << field("kept in", course.shown(record.path()));
  return failed == 0 ? 0 : 1;
}

}  // namespace kata
