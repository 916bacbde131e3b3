#include "build.hpp"

#include "compile_errors.hpp"
#include "files.hpp"
#include "process.hpp"
#include "records.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

// The ninja that configured the folder, wherever it is installed.
std::string ninja_of(const fs::path& folder) {
  const auto cache = read_file(folder / "CMakeCache.txt").value_or("");
  const std::string key = "\nCMAKE_MAKE_PROGRAM:FILEPATH=";
  const auto at = cache.find(key);
  if (at == std::string::npos) return "ninja";
  const auto start = at + key.size();
  return cache.substr(start, cache.find('\n', start) - start);
}

}  // namespace

std::string ninja_progress(std::string_view line) {
  const auto slash = line.find('/');
  const auto close = line.find(']');
  if (!line.starts_with('[') || close == std::string_view::npos || slash > close) return {};
  const auto last = line.substr(line.find_last_of(" /") + 1);
  std::string file(last);
  if (file.ends_with(".o")) file.resize(file.size() - 2);
  return std::string(line.substr(1, close - 1)) + " " + file;
}

BuildResult build_targets(const fs::path& folder, const std::vector<std::string>& targets, const std::string& what,
                          bool keep_going, const std::function<bool()>& give_up) {
  const FolderLock lock(folder);
  ProgressLine progress(what);
  Command command;
  command.argv = {ninja_of(folder), "-C", folder.string()};
  if (keep_going) command.argv.insert(command.argv.end(), {"-k", "0"});
  command.argv.insert(command.argv.end(), targets.begin(), targets.end());
  command.setting = {{"NINJA_STATUS", "[%f/%t] "}};
  command.on_line = [&](std::string_view line) {
    if (const auto text = ninja_progress(line); !text.empty()) progress.say(text);
  };
  command.on_tick = [&](double) { progress.tick(); };
  command.give_up = give_up;
  auto outcome = run(command);
  if (!outcome.started) outcome.output = "cannot start " + command.argv[0] + ": ./kata doctor says what is missing\n";
  return {outcome.ok(), outcome.given_up, outcome.seconds, std::move(outcome.output)};
}

void renew_times(const Course& course, const std::vector<const Step*>& steps) {
  const auto record = course.logs() / "contents.json";
  std::error_code error;
  const auto recorded = fs::last_write_time(record, error);  // its least value where there is none
  auto records = read_records(record);
  auto& known = records["contents"];
  auto files = code_below(course.source / "common");
  for (const Step* step : steps) {
    for (const Step* each : course.with_needs(*step)) {
      for (const auto& file : course.filled(*each)) files.push_back(file);
      for (const auto& file : code_below(course.source / each->folder)) files.push_back(file);
    }
  }
  bool news = false;
  for (const auto& file : files) {
    Hash hash;
    hash.add(read_file(file).value_or(""));
    auto& entry = known[file.string()];
    if (entry == hash.hex()) continue;
    const bool looks_old = !entry.empty() && fs::last_write_time(file, error) <= recorded;
    if (looks_old) fs::last_write_time(file, fs::file_time_type::clock::now(), error);
    entry = hash.hex();
    news = true;
  }
  if (news) try_write_records(record, records);
}

StepBuild build_step(const Course& course, const Step& step, const std::function<bool()>& give_up) {
  renew_times(course, {&step});
  const auto result = build_targets(course.build, {step.target}, "building " + step.title(), false, give_up);
  StepBuild build{result.ok, result.given_up, false, result.seconds, {}};
  if (result.ok || result.given_up) return build;
  const auto log = course.logs() / (step.label + ".log");
  const bool kept = try_write_file(log, result.log);
  std::vector<fs::path> files;
  for (const Step* each : course.with_needs(step)) {
    for (const auto& path : course.filled(*each)) files.push_back(path);
  }
  const auto report = read_build_log(result.log, files);
  build.own_error = !report.mine.empty() || !report.link.empty();
  build.errors = shown(report, course.source);
  if (kept) build.errors += "\n" + field("log", course.shown(log));
  return build;
}

}  // namespace kata
