#include "process.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "failure.hpp"
#include "files.hpp"
#ifdef __linux__
#include <sys/prctl.h>
#endif

namespace kata {
namespace {

volatile std::sig_atomic_t caught_signal = 0;

void remember(int signal) { caught_signal = signal; }

// A student's endless print loop must not eat the machine's memory; what is beyond this is read and dropped.
constexpr std::size_t MAX_OUTPUT = 16u << 20;

struct Pipe {
  int read_end = -1;
  int write_end = -1;

  Pipe() {
    std::array<int, 2> ends{};
    if (::pipe(ends.data()) != 0)
      throw Failure("cannot open a pipe: " + std::string(std::strerror(errno)), "try again");
    read_end = ends[0];
    write_end = ends[1];
    ::fcntl(read_end, F_SETFD, FD_CLOEXEC);
    ::fcntl(write_end, F_SETFD, FD_CLOEXEC);
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  ~Pipe() {
    close_read();
    close_write();
  }
  void close_read() { shut(read_end); }
  void close_write() { shut(write_end); }

 private:
  static void shut(int& end) {
    if (end >= 0) ::close(end);
    end = -1;
  }
};

// Between fork and exec only async-signal-safe calls are made: everything that allocates was prepared by the parent.
[[noreturn]] void become(const Command& command, char* const* argv, char* const* env, const std::string& folder,
                         int output, int input, int report) {
  ::setpgid(0, 0);
#ifdef __linux__
  ::prctl(PR_SET_PDEATHSIG, SIGTERM);
#endif
  struct sigaction standard {};
  standard.sa_handler = SIG_DFL;
  for (const int signal : {SIGINT, SIGTERM, SIGPIPE}) ::sigaction(signal, &standard, nullptr);
  bool ready = folder.empty() || ::chdir(folder.c_str()) == 0;
  if (ready && output >= 0) {
    const int nowhere = command.errors_apart ? ::open("/dev/null", O_WRONLY) : output;
    ready = ::dup2(output, STDOUT_FILENO) >= 0 && ::dup2(nowhere, STDERR_FILENO) >= 0;
  }
  if (ready) ready = ::dup2(input, STDIN_FILENO) >= 0;
  if (ready) {
    environ = const_cast<char**>(env);
    ::execvp(argv[0], argv);
  }
  const int error = errno;
  [[maybe_unused]] const auto written = ::write(report, &error, sizeof error);
  ::_exit(127);
}

std::vector<std::string> environment_with(const std::vector<std::pair<std::string, std::string>>& setting) {
  std::vector<std::string> all;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    bool replaced = false;
    for (const auto& [name, value] : setting) replaced |= text.starts_with(name + "=");
    if (!replaced) all.emplace_back(text);
  }
  for (const auto& [name, value] : setting) all.push_back(name + "=" + value);
  return all;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (auto& text : texts) result.push_back(text.data());
  result.push_back(nullptr);
  return result;
}

int open_input(const std::string& text) {
  if (text.empty()) return ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  // A file without a name, rather than a pipe that somebody would have to keep feeding.
  const std::string folder = temporary_folder().string();
  std::string path = folder + "/kata.XXXXXX";
  const int file = ::mkstemp(path.data());
  if (file >= 0) ::unlink(path.c_str());
  const auto size = static_cast<ssize_t>(text.size());
  if (file < 0 || ::write(file, text.data(), text.size()) != size) {
    const std::string why = std::strerror(errno);
    if (file >= 0) ::close(file);
    throw Failure("cannot write to " + folder + ": " + why, "make room there, or set TMPDIR");
  }
  ::lseek(file, 0, SEEK_SET);
  ::fcntl(file, F_SETFD, FD_CLOEXEC);
  return file;
}

class Lines {
 public:
  explicit Lines(const std::function<void(std::string_view)>& on_line) : on_line_(on_line) {}
  void add(std::string_view text) {
    if (!on_line_) return;
    pending_ += text;
    std::size_t start = 0;
    for (std::size_t end; (end = pending_.find('\n', start)) != std::string::npos; start = end + 1) {
      on_line_(std::string_view(pending_).substr(start, end - start));
    }
    pending_.erase(0, start);
  }

 private:
  const std::function<void(std::string_view)>& on_line_;
  std::string pending_;
};

}  // namespace

void catch_interrupts() {
  struct sigaction action {};
  action.sa_handler = remember;  // no SA_RESTART: whoever sleeps in poll wakes up and looks
  // Also where a shell started us with SIGINT ignored, as it does with "&": kill -INT must still end us in good order.
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
  struct sigaction hangup {};
  ::sigaction(SIGHUP, nullptr, &hangup);
  if (hangup.sa_handler != SIG_IGN) ::sigaction(SIGHUP, &action, nullptr);  // nohup stays nohup
}

bool interrupted() { return caught_signal != 0; }

void throw_if_interrupted() {
  if (interrupted()) throw Interrupted();
}

Outcome run(const Command& command) {
  throw_if_interrupted();
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  auto arguments = command.argv;
  auto environment = environment_with(command.setting);
  auto argv = pointers(arguments);
  auto env = pointers(environment);
  const std::string folder = command.folder.string();
  // One at a time up to exec: a child of another thread would take along the ends of pipes that are being made.
  static std::mutex starting;
  std::unique_lock<std::mutex> alone(starting);
  Pipe output;
  Pipe report;
  const int input = open_input(command.input);

  Outcome outcome;
  const pid_t child = ::fork();
  if (child < 0) {
    ::close(input);
    throw Failure("cannot start " + command.argv[0] + ": " + std::strerror(errno), "close some programs and try again");
  }
  if (child == 0) {
    become(command, argv.data(), env.data(), folder, command.capture ? output.write_end : -1, input, report.write_end);
  }
  ::close(input);
  ::setpgid(child, child);  // here too: whichever of the two comes first
  output.close_write();
  report.close_write();
  int error = 0;
  outcome.started = ::read(report.read_end, &error, sizeof error) == 0;  // closed unwritten by a successful exec
  alone.unlock();

  Lines lines(command.on_line);
  std::array<char, 1 << 16> buffer{};
  const auto drain = [&](int wait_ms) {
    pollfd ready{output.read_end, POLLIN, 0};
    if (output.read_end < 0 || !command.capture) {
      ::poll(nullptr, 0, wait_ms);
      return false;
    }
    if (::poll(&ready, 1, wait_ms) <= 0) return false;
    const auto count = ::read(output.read_end, buffer.data(), buffer.size());
    if (count <= 0) {
      if (count == 0) output.close_read();
      return false;
    }
    const std::string_view text(buffer.data(), static_cast<std::size_t>(count));
    if (outcome.output.size() < MAX_OUTPUT) outcome.output += text;
    lines.add(text);
    return true;
  };

  int status = 0;
  auto asked_to_end = Clock::time_point::max();
  auto last_tick = start;
  for (;;) {
    const bool silent = !drain(5);
    const auto now = Clock::now();
    outcome.seconds = std::chrono::duration<double>(now - start).count();
    if (silent && ::waitpid(child, &status, WNOHANG) == child) break;
    const bool unwanted = interrupted() || outcome.given_up;
    if (unwanted && command.ends_politely && asked_to_end == Clock::time_point::max()) {
      ::kill(-child, SIGINT);
      asked_to_end = now;
    }
    const bool patient = command.ends_politely && (!unwanted || now - asked_to_end < std::chrono::seconds(3));
    if (outcome.timed_out || (unwanted && !patient)) ::kill(-child, SIGKILL);
    if (now - last_tick < std::chrono::milliseconds(50)) continue;
    last_tick = now;
    if (command.on_tick) command.on_tick(outcome.seconds);
    if (command.limit_s > 0 && outcome.seconds > command.limit_s) outcome.timed_out = true;
    if (command.give_up && command.give_up()) outcome.given_up = true;
  }
  while (drain(0)) {
  }
  // Nothing that it started may outlive it and hold on to a file or a processor.
  ::kill(-child, SIGKILL);
  if (WIFEXITED(status) && outcome.started) outcome.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) outcome.signal = WTERMSIG(status);
  throw_if_interrupted();
  return outcome;
}

std::string output_of(std::vector<std::string> argv, const std::filesystem::path& folder) {
  Command command;
  command.argv = std::move(argv);
  command.folder = folder;
  command.errors_apart = true;
  command.limit_s = 20;
  auto outcome = run(command);
  if (!outcome.ok()) return {};
  if (outcome.output.ends_with('\n')) outcome.output.pop_back();
  return std::move(outcome.output);
}

std::string describe_signal(int signal) {
  switch (signal) {
    case SIGSEGV:
      return "SIGSEGV (it touched memory that is not its own: an index beyond its matrix?)";
    case SIGBUS:
      return "SIGBUS (it touched memory that does not exist)";
    case SIGABRT:
      return "SIGABRT (an assertion failed, an exception was not caught, or freed memory was damaged)";
    case SIGFPE:
      return "SIGFPE (an integer was divided by zero)";
    case SIGILL:
      return "SIGILL (it ran into code that is none: a function that ends without its return?)";
    case SIGKILL:
      return "SIGKILL (somebody killed it: out of memory?)";
    default:
      return "signal " + std::to_string(signal) + " (" + ::strsignal(signal) + ")";
  }
}

}  // namespace kata
