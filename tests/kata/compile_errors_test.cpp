#include "compile_errors.hpp"

#include <doctest/doctest.h>
#include <unistd.h>

#include <fstream>

using namespace kata;

namespace {

const std::vector<std::filesystem::path> MINE = {"/r/phase1_eager/02_attention/attention.cpp"};

std::string text_for(const std::string& log) { return shown(read_build_log(log, MINE), "/r"); }

struct SourceFile {
  explicit SourceFile(const std::string& text)
      : path(std::filesystem::temp_directory_path() / ("kata_source_" + std::to_string(getpid()) + ".cu")) {
    std::ofstream(path) << text;
  }
  ~SourceFile() { std::filesystem::remove(path); }
  std::filesystem::path path;
};

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_SUITE("compile errors") {
  TEST_CASE("g++: first error first, its lines and its note, paths from the root, nothing of ninja") {
    const std::string log =
        "[1/3] Building CXX object a.o\n"
        "FAILED: a.o \n"
        "/usr/bin/c++ -I/r -c /r/phase1_eager/02_attention/attention.cpp\n"
        "/r/phase1_eager/02_attention/attention.cpp: In function 'int f()':\n"
        "/r/phase1_eager/02_attention/attention.cpp:12:5: error: 'foo' was not declared in this scope\n"
        "   12 |     foo();\n"
        "      |     ^~~\n"
        "/r/phase1_eager/02_attention/attention.cpp:3:5: note: 'bar' declared here\n"
        "    3 | int bar();\n"
        "/usr/include/c++/12/cmath:9:1: note: somewhere else\n"
        "    9 | not ours\n"
        "/r/phase1_eager/02_attention/attention.cpp:20:1: error: expected '}'\n"
        "ninja: build stopped: subcommand failed.\n";
    const CompileReport report = read_build_log(log, MINE);
    REQUIRE(report.mine.size() == 2);
    CHECK(report.mine[0].line == 12);
    CHECK(report.mine[0].column == 5);
    CHECK(report.mine[0].message == "'foo' was not declared in this scope");
    CHECK(report.mine[1].line == 20);
    const std::string text = text_for(log);
    CHECK(contains(text, "  phase1_eager/02_attention/attention.cpp:12:5: error: 'foo'"));
    CHECK(contains(text, "   12 |     foo();"));
    CHECK(contains(text, "line 3: 'bar' declared here"));
    CHECK_FALSE(contains(text, "not ours"));
    CHECK_FALSE(contains(text, "FAILED"));
    CHECK_FALSE(contains(text, "/usr/bin/c++"));
  }

  TEST_CASE("colours are taken out before reading") {
    const auto report = read_build_log(
        "\033[01m\033[K/r/phase1_eager/02_attention/attention.cpp:12:5:\033[m\033[K \033[01;31m\033[Kerror: "
        "\033[m\033[Kbad\n",
        MINE);
    REQUIRE(report.mine.size() == 1);
    CHECK(report.mine[0].message == "bad");
  }

  TEST_CASE("g++: an error inside a library is the student's where his line led to it, and is said once") {
    const std::string once =
        "In file included from /usr/include/eigen3/Eigen/Core:1,\n"
        "                 from /r/phase1_eager/02_attention/attention.cpp:1:\n"
        "/usr/include/eigen3/Eigen/Product.h: In instantiation of 'struct X':\n"
        "/r/phase1_eager/02_attention/attention.cpp:14:20:   required from here\n"
        "/usr/include/eigen3/Eigen/Product.h:99:7: error: static assertion failed: SIZES\n"
        "   99 | assert\n";
    const auto report = read_build_log(once + once, MINE);
    REQUIRE(report.mine.size() == 1);
    CHECK(report.others.empty());
    CHECK(report.mine[0].line == 14);
    CHECK(contains(report.mine[0].message, "SIZES"));
    CHECK(contains(report.mine[0].message, "Product.h"));
  }

  TEST_CASE("clang++: the note that says who asked for it leads back to the student") {
    const auto report = read_build_log(
        "/usr/include/eigen3/Eigen/Product.h:99:7: error: static_assert failed SIZES\n"
        "      assert\n"
        "      ^\n"
        "/r/phase1_eager/02_attention/attention.cpp:14:20: note: in instantiation of member function 'f' requested "
        "here\n"
        "  f();\n"
        "  ^\n"
        "1 error generated.\n",
        MINE);
    REQUIRE(report.mine.size() == 1);
    CHECK(report.mine[0].line == 14);
  }

  TEST_CASE("nvcc writes its lines in brackets") {
    const auto report = read_build_log(
        "/r/phase1_eager/02_attention/attention.cpp(7): error: identifier \"x\" is undefined\n    x = 1;\n    ^\n",
        MINE);
    REQUIRE(report.mine.size() == 1);
    CHECK(report.mine[0].line == 7);
    CHECK(report.mine[0].context.size() == 2);
  }

  TEST_CASE("a path relative to the build folder is recognised, another file of that name is not") {
    CHECK(read_build_log("../../phase1_eager/02_attention/attention.cpp:1:1: error: x\n", MINE).mine.size() == 1);
    const auto other = read_build_log("/other/attention.cpp:1:1: error: x\n", MINE);
    CHECK(other.mine.empty());
    CHECK(other.others.size() == 1);
  }

  TEST_CASE("an error elsewhere is shown as such") {
    CHECK(contains(text_for("/r/common/a.hpp:1:1: error: x\n"), "outside your file"));
  }

  TEST_CASE("warnings are no errors, and their lines belong to nobody") {
    const auto report = read_build_log(
        "/r/phase1_eager/02_attention/attention.cpp:2:1: error: x\n"
        "/r/phase1_eager/02_attention/attention.cpp:5:1: warning: unused\n"
        "    5 | int y;\n",
        MINE);
    REQUIRE(report.mine.size() == 1);
    CHECK(report.mine[0].context.empty());
  }

  TEST_CASE("what the linker misses is said once, without a page of types") {
    const std::string line = "/usr/bin/ld: a.o: undefined reference to `flashkata::attention(Eigen::Ref<A>, B)'\n";
    const std::string log = "[2/2] Linking\n" + line + line + "collect2: error: ld returned 1 exit status\n";
    const auto report = read_build_log(log, MINE);
    CHECK(report.link == std::vector<std::string>{"undefined reference to `flashkata::attention(...)'"});
    CHECK(contains(text_for(log), "must be defined once"));
    CHECK_FALSE(contains(text_for(log), "collect2"));
  }

  TEST_CASE("a function without a linkage keeps its name when the linker misses it") {
    const auto report =
        read_build_log("a.cpp:1: undefined reference to `flashkata::(anonymous namespace)::f(int)'\n", MINE);
    CHECK(report.link == std::vector<std::string>{"undefined reference to `flashkata::(anonymous namespace)::f(...)'"});
  }

  TEST_CASE("extern __shared__, which only the linker misses, is shown at its line, with what to write instead") {
    const std::string log =
        "/usr/bin/ld: a.o: in function `flashkata::(anonymous namespace)::k(float*)':\n"
        "a.cu:(.text+0xa): undefined reference to `__tls_init'\n"
        "/usr/bin/ld: a.cu:(.text+0x11): undefined reference to `flashkata::(anonymous "
        "namespace)::s[abi:kata_shared]'\n"
        "collect2: error: ld returned 1 exit status\n";
    const SourceFile file(
        "// extern __shared__ float no[];\n__global__ void k(float* out) {\n  extern __shared__ float s[];\n}\n");
    const auto report = read_build_log(log, {file.path});
    REQUIRE(report.mine.size() == 1);
    CHECK(report.mine[0].line == 3);
    CHECK(report.mine[0].column == 3);
    const std::string text = shown(report, file.path.parent_path());
    CHECK(contains(text, ":3:3: error:"));
    CHECK(contains(text, "    3 |   extern __shared__ float s[];"));
    CHECK(contains(text, "dynamic_shared<float>()"));
    CHECK_FALSE(contains(text, "__tls_init"));
    CHECK_FALSE(contains(text, "must be defined once"));

    // Where a macro hides it.
    const std::string elsewhere = text_for(log);
    CHECK(contains(elsewhere, "s[abi:kata_shared]"));
    CHECK(contains(elsewhere, "dynamic_shared<float>()"));
    CHECK_FALSE(contains(elsewhere, "__tls_init"));
    CHECK_FALSE(contains(elsewhere, "must be defined once"));
  }

  TEST_CASE("kernel<<<...>>>() is one error, with the launch to write instead") {
    const auto complaint = [](int line, const std::string& message, const std::string& source) {
      return "/r/phase1_eager/02_attention/attention.cpp:" + std::to_string(line) + ":7: error: " + message + "\n   " +
             std::to_string(line) + " | " + source + "\n      |       ^\n";
    };
    const std::string log =
        complaint(7, "expected primary-expression before '<' token", "  k<<<grid, 32>>>(out);") +
        complaint(7, "expected primary-expression before '>' token", "  k<<<grid, 32>>>(out);") +
        complaint(9, "expected expression", "  k<<<grid,") + complaint(10, "expected expression", "      32>>>(out);") +
        complaint(12, "expected primary-expression before ')' token", "  f(1, );  // not k<<<1, 1>>>");
    const auto report = read_build_log(log, MINE);
    REQUIRE(report.mine.size() == 3);
    CHECK(contains(report.mine[0].hint, "launch(kernel, grid, block, shared_bytes, stream, arguments...)"));
    CHECK(report.mine[1].line == 9);
    CHECK(report.mine[1].hint == report.mine[0].hint);
    CHECK(report.mine[2].line == 12);
    CHECK(report.mine[2].hint.empty());
    CHECK(contains(text_for(log), "shared_bytes"));
  }

  TEST_CASE("__noinline__ has another name") {
    const auto report = read_build_log(
        "/r/phase1_eager/02_attention/attention.cpp:7:1: error: '__noinline__' does not name a type\n", MINE);
    REQUIRE(report.mine.size() == 1);
    CHECK(contains(report.mine[0].hint, "__attribute__((noinline))"));
  }

  TEST_CASE("only the first errors are shown, and how many more there are") {
    std::string log;
    for (int i = 1; i <= 10; ++i) {
      log +=
          "/r/phase1_eager/02_attention/attention.cpp:" + std::to_string(i) + ":1: error: e" + std::to_string(i) + "\n";
    }
    CHECK(contains(text_for(log), "and 7 more errors"));
    CHECK_FALSE(contains(text_for(log), "e4"));
  }

  TEST_CASE("a log that says nothing known is shown by its end") {
    CHECK(contains(text_for("ninja: error: manifest is odd\n"), "manifest is odd"));
    CHECK(contains(text_for("c++: fatal error: Killed signal terminated program cc1plus\n"), "Killed"));
    CHECK(text_for("").empty());
  }
}
