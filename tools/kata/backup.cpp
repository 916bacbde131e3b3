#include "backup.hpp"

#include <sstream>
#include <vector>

#include "failure.hpp"
#include "files.hpp"
#include "process.hpp"

namespace kata {
namespace {

fs::path kept_stub(const Course& course, const fs::path& file) { return course.state() / "stubs" / course.shown(file); }

}  // namespace

std::optional<std::string> git(const Course& course, std::vector<std::string> arguments) {
  Command command;
  command.argv = {"git", "--no-pager"};
  command.argv.insert(command.argv.end(), arguments.begin(), arguments.end());
  command.folder = course.source;
  command.errors_apart = true;
  auto outcome = run(command);
  if (!outcome.ok()) return std::nullopt;
  return std::move(outcome.output);
}

std::optional<Stub> find_stub(const Course& course, const fs::path& file) {
  const std::string path = "./" + course.shown(file);
  if (auto text = git(course, {"show", "HEAD:" + path}); text && is_unfilled(*text)) return Stub{*text, "HEAD"};
  // Students commit their answers, as they should; the stub is then further back.
  std::istringstream commits(git(course, {"log", "--format=%h %cs", "HEAD", "--", path}).value_or(""));
  for (std::string hash, day; commits >> hash >> day;) {
    auto text = git(course, {"show", hash + ":" + path});
    if (text && is_unfilled(*text)) return Stub{*text, "commit " + hash + " of " + day};
  }
  const auto kept = kept_stub(course, file);
  if (auto text = read_file(kept)) return Stub{*text, course.shown(kept)};
  return std::nullopt;
}

void keep_stub_without_git(const Course& course, const Step& step) {
  if (fs::exists(course.source / ".git")) return;
  for (const auto& file : course.filled(step)) {
    const auto text = read_file(file);
    const auto copy = kept_stub(course, file);
    // The first look is the purest: later the stub may be half filled.
    if (text && is_unfilled(*text) && !fs::exists(copy)) try_write_file(copy, *text);
  }
}

fs::path back_up(const Course& course, const Step& step) {
  const auto folder = course.state() / "backups" / step.label;
  const auto stamp = utc_timestamp();
  auto target = folder / stamp;
  for (int again = 2; fs::exists(target); ++again) target = folder / (stamp + "-" + std::to_string(again));
  for (const auto& file : course.filled(step)) {
    if (!fs::exists(file)) continue;
    const auto text = read_file(file);
    if (!text) throw Failure("cannot read " + course.shown(file), "look at its permissions; nothing was changed");
    const auto copy = target / file.filename();
    write_file(copy, *text);
    if (read_file(copy) != text) {
      throw Failure(
          "the backup " + course.shown(copy) + " is not what was written",
          "copy " + course.shown(file) + " somewhere safe by hand, then look at the disk; nothing was changed");
    }
  }
  return target;
}

}  // namespace kata
