#include "common/testing/ranks.hpp"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <thread>

#include "common/testing/options.hpp"
#ifdef KATA_MPIEXEC
#include "common/distributed/mpi.hpp"
#endif

namespace flashkata::testing {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
namespace fs = std::filesystem;

std::function<void(Communicator&, RankReport&)>& registered() {
  static std::function<void(Communicator&, RankReport&)> instance;
  return instance;
}

#ifdef KATA_MPIEXEC

constexpr std::chrono::milliseconds RUN_LIMIT = 25s;  // of all ranks together; more where one has much patience
constexpr auto LAST_WORDS = 1s;                       // for the others to say so too, before all are ended
constexpr std::string_view OPTION = "--as-rank-in=";

// ---- Reports as files: written by ranks, read by their parent -------------------------------------------------------

void put(std::ostream& out, std::int64_t number) { out.write(reinterpret_cast<const char*>(&number), sizeof number); }

void put(std::ostream& out, const std::string& text) {
  put(out, static_cast<std::int64_t>(text.size()));
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
}

std::int64_t get_number(std::istream& in) {
  std::int64_t number = 0;
  in.read(reinterpret_cast<char*>(&number), sizeof number);
  return number;
}

std::string get_text(std::istream& in) {
  std::string text(static_cast<std::size_t>(get_number(in)), '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  return text;
}

fs::path report_file(const fs::path& folder, int rank) { return folder / ("rank" + std::to_string(rank)); }
fs::path saved_file(const fs::path& folder, int rank) { return folder / ("saved" + std::to_string(rank)); }

// Written beside its place and moved there: it is there whole or not at all.
void write_report(const fs::path& file, const RankReport& report) {
  const fs::path beside = file.string() + ".part";
  {
    std::ofstream out(beside, std::ios::binary);
    put(out, report.doing);
    put(out, report.error);
    put(out, static_cast<std::int64_t>(report.missing.size()));
    for (const auto& [what, missing] : report.missing) {
      put(out, what);
      put(out, missing);
    }
    put(out, static_cast<std::int64_t>(report.findings.size()));
    for (const auto& [name, sentence] : report.findings) {
      put(out, name);
      put(out, sentence);
    }
    put(out, static_cast<std::int64_t>(report.arrays.size()));
    for (const auto& [name, array] : report.arrays) {
      put(out, name);
      put(out, static_cast<std::int64_t>(array.shape.size()));
      for (const Index length : array.shape) put(out, length);
      put(out, static_cast<std::int64_t>(array.count()));
      out.write(reinterpret_cast<const char*>(array.values.data()),
                static_cast<std::streamsize>(array.count() * sizeof(double)));
    }
  }
  fs::rename(beside, file);
}

bool read_report(const fs::path& file, RankReport& report) {
  std::ifstream in(file, std::ios::binary);
  if (!in) return false;
  report.doing = get_text(in);
  report.error = get_text(in);
  for (std::int64_t count = get_number(in); count-- > 0;) {
    std::string what = get_text(in);
    report.missing[std::move(what)] = get_text(in);
  }
  for (std::int64_t count = get_number(in); count-- > 0;) {
    std::string name = get_text(in);
    report.findings.emplace_back(std::move(name), get_text(in));
  }
  for (std::int64_t count = get_number(in); count-- > 0;) {
    Array& array = report.arrays[get_text(in)];
    array.shape.resize(static_cast<std::size_t>(get_number(in)));
    for (Index& length : array.shape) length = get_number(in);
    array.values.resize(static_cast<std::size_t>(get_number(in)));
    in.read(reinterpret_cast<char*>(array.values.data()), static_cast<std::streamsize>(array.count() * sizeof(double)));
  }
  return true;
}

// ---- A rank ---------------------------------------------------------------------------------------------------------

[[noreturn]] void be_a_rank(const fs::path& folder) {
  RankReport report;
  Index patience = 0;
  {
    std::ifstream task(folder / "task");
    task >> patience >> std::ws;
    std::getline(task, report.task);
  }
  auto communicator = connect_by_mpi(std::chrono::milliseconds(patience));
  const int ranks = communicator->size();
  report.save = [&] { write_report(saved_file(folder, communicator->rank()), report); };
  try {
    registered()(*communicator, report);
  } catch (const std::exception& error) {
    report.error = error.what();
  }
  write_report(report_file(folder, communicator->rank()), report);
  if (report.error.empty()) {
    try {
      communicator->barrier();  // nobody's farewell before everybody's report
      communicator.reset();
      std::_Exit(0);
    } catch (const CommunicationError&) {
    }
  }
  const auto all_have_reported = [&] {
    for (int rank = 0; rank < ranks; ++rank) {
      if (!fs::exists(report_file(folder, rank))) return false;
    }
    return true;
  };
  const auto limit = Clock::now() + LAST_WORDS;
  while (!all_have_reported() && Clock::now() < limit) std::this_thread::sleep_for(10ms);
  abort_all_ranks(1);
}

const ExtendMain extend_main({.why_skip = {},
                              .option =
                                  [](std::string_view argument) {
                                    if (!argument.starts_with(OPTION)) return false;
                                    be_a_rank(fs::path(argument.substr(OPTION.size())));
                                  },
                              .at_end = {},
                              .remark = {}});

// ---- Their parent ---------------------------------------------------------------------------------------------------

class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "kata-ranks-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr)
      throw std::runtime_error("cannot make a folder in " + fs::temp_directory_path().string());
    path_ = name;
  }
  ~Folder() {
    std::error_code error;
    fs::remove_all(path_, error);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

// Ranks of one machine, more than it has cores, also for root (in a container). Whatever a user has set stays.
void prepare_environment() {
  constexpr std::array<std::pair<const char*, const char*>, 13> settings{{
      {"OMPI_ALLOW_RUN_AS_ROOT", "1"},
      {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
      {"OMPI_MCA_rmaps_base_oversubscribe", "1"},
      {"OMPI_MCA_mpi_yield_when_idle", "1"},
      {"OMPI_MCA_hwloc_base_binding_policy", "none"},
      {"OMPI_MCA_plm", "isolated"},
      {"OMPI_MCA_pml", "ob1"},
      {"OMPI_MCA_btl", "self,vader"},
      {"OMPI_MCA_btl_vader_single_copy_mechanism", "none"},  // containers forbid it
      // The same for version 5.
      {"PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"},
      {"PRTE_MCA_hwloc_default_binding_policy", "none"},
      {"OMPI_MCA_btl_sm_single_copy_mechanism", "none"},
      {"HWLOC_COMPONENTS", "-pci"},  // nobody wants to know what devices there are: each rank would look at all
  }};
  for (const auto& [name, value] : settings) setenv(name, value, 0);
}

// mpiexec of the ranks, in a process group of its own. Returns its wait status, or -1 if it had to be stopped.
int run_mpiexec(int ranks, const fs::path& folder, std::chrono::milliseconds limit) {
  const std::string program = fs::read_symlink("/proc/self/exe").string();
  const std::string argument = std::string(OPTION) + folder.string();
  const std::string count = std::to_string(ranks);
  const std::string output = (folder / "output").string();
  prepare_environment();
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("cannot start another process");
  if (child == 0) {
    setpgid(0, 0);
    const int in = open("/dev/null", O_RDONLY);
    const int out = open(output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    dup2(in, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    dup2(out, STDERR_FILENO);
    execl(KATA_MPIEXEC, KATA_MPIEXEC, "-n", count.c_str(), program.c_str(), argument.c_str(), nullptr);
    _exit(127);
  }
  const auto wait_until = [child](Clock::time_point limit, int& status) {
    while (Clock::now() < limit) {
      if (waitpid(child, &status, WNOHANG) == child) return true;
      std::this_thread::sleep_for(5ms);
    }
    return false;
  };
  int status = 0;
  if (wait_until(Clock::now() + limit, status)) return status;
  kill(child, SIGTERM);  // mpiexec ends its ranks
  if (!wait_until(Clock::now() + 3s, status)) {
    kill(-child, SIGKILL);
    waitpid(child, &status, 0);
  }
  return -1;
}

// What mpiexec says of a rank that died: "rank 1 exited on signal 9 (Killed)"; empty if it says nothing of the kind.
std::string death(const fs::path& folder) {
  std::ifstream in(folder / "output");
  for (std::string line; std::getline(in, line);) {
    const std::size_t rank = line.find("rank "), end = line.find("exited on signal");
    if (rank < end && end != std::string::npos) {
      const std::size_t last = line.find_last_not_of(". ");
      return line.substr(rank, line.find(' ', rank + 5) - rank) + ' ' + line.substr(end, last + 1 - end);
    }
  }
  return "";
}

std::string first_line_of_output(const fs::path& folder) {
  std::ifstream in(folder / "output");
  for (std::string line; std::getline(in, line);) {
    if (line.find_first_not_of("- \t") != std::string::npos) return line;
  }
  return "it said nothing";
}

std::string failure_of(const std::vector<RankReport>& reports, const std::vector<bool>& reported, int status,
                       std::chrono::milliseconds limit, const fs::path& folder) {
  std::string text = death(folder);
  const auto add = [&](const std::string& sentence) { text += (text.empty() ? "" : "; ") + sentence; };
  for (std::size_t rank = 0; rank < reports.size(); ++rank) {
    const std::string name = "rank " + std::to_string(rank);
    const std::string where = reports[rank].doing.empty() ? "" : " in " + reports[rank].doing;
    std::ostringstream sentence;
    if (!reported[rank] && status == -1) {
      sentence << name << " was still busy after " << limit / 1s << " s" << where;
    } else if (!reported[rank]) {
      sentence << name << " was ended" << where;
    } else if (!reports[rank].error.empty()) {
      sentence << name << where << ": " << reports[rank].error;
    }
    if (!sentence.str().empty()) add(sentence.str());
  }
  const bool nobody = std::none_of(reported.begin(), reported.end(), [](bool one) { return one; });
  if (status > 0 && (text.empty() || (nobody && death(folder).empty()))) {
    add("mpiexec: " + first_line_of_output(folder));
  }
  return text;
}

RanksOutcome run(int ranks, const std::string& task, std::chrono::milliseconds patience) {
  const Folder folder;
  std::ofstream(folder.path() / "task") << patience.count() << ' ' << task << '\n';
  const std::chrono::milliseconds limit = std::max(RUN_LIMIT, 3 * patience);
  const int status = run_mpiexec(ranks, folder.path(), limit);
  RanksOutcome outcome;
  outcome.ranks.resize(static_cast<std::size_t>(ranks));
  std::vector<bool> reported;
  for (int rank = 0; rank < ranks; ++rank) {
    RankReport& report = outcome.ranks[static_cast<std::size_t>(rank)];
    reported.push_back(read_report(report_file(folder.path(), rank), report));
    if (!reported.back()) read_report(saved_file(folder.path(), rank), report);
  }
  outcome.failure = failure_of(outcome.ranks, reported, status, limit, folder.path());
  return outcome;
}

#else

RanksOutcome run(int, const std::string&, std::chrono::milliseconds) { throw std::runtime_error(why_no_ranks()); }

#endif

}  // namespace

RankWork::RankWork(std::function<void(Communicator&, RankReport&)> work) { registered() = std::move(work); }

std::string why_no_ranks() {
#ifdef KATA_MPIEXEC
  if (access(KATA_MPIEXEC, X_OK) == 0) return "";
#endif
  return "needs MPI: apt-get install libopenmpi-dev openmpi-bin, then once cmake --preset learn";
}

const RanksOutcome& on_ranks(int ranks, const std::string& task, std::chrono::milliseconds patience) {
  static std::map<std::pair<int, std::string>, RanksOutcome> outcomes;
  const std::pair<int, std::string> wanted{ranks, task};
  auto found = outcomes.find(wanted);
  if (found == outcomes.end()) {
    if (ranks == 1) {  // needs nobody
      RanksOutcome alone;
      alone.ranks.resize(1);
      alone.ranks.front().task = task;
      OneRank communicator;
      try {
        registered()(communicator, alone.ranks.front());
      } catch (const std::exception& error) {
        alone.failure = "one rank in " + alone.ranks.front().doing + ": " + error.what();
      }
      found = outcomes.emplace(wanted, std::move(alone)).first;
    } else {
      found = outcomes.emplace(wanted, run(ranks, task, patience)).first;
    }
  }
  return found->second;
}

}  // namespace flashkata::testing
