#include "files.hpp"

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <string>

#include "failure.hpp"

using namespace kata;

TEST_SUITE("files") {
  TEST_CASE("a stub is unfilled until its marker is gone or commented out") {
    CHECK(is_unfilled("int f() { throw NotImplemented(__FILE__); }"));
    CHECK(is_unfilled("int f() {\n  throw NotImplemented(\n      __FILE__);\n}"));
    CHECK(is_unfilled("/* done */ int f() { throw NotImplemented(__FILE__); } // half"));
    CHECK_FALSE(is_unfilled("int f() { return 1; }"));
    CHECK_FALSE(is_unfilled("// throw NotImplemented(__FILE__);\nint f() { return 1; }"));
    CHECK_FALSE(is_unfilled("/* throw NotImplemented(__FILE__); */ int f() { return 1; }"));
    CHECK_FALSE(is_unfilled(""));
  }

  TEST_CASE("comments go, literals stay") {
    CHECK(without_comments("a // b\nc") == "a \nc");
    CHECK(without_comments("a /* b \n c */ d") == "a   d");
    CHECK(without_comments("\"// no\" x") == "\"// no\" x");
    CHECK(without_comments("\"\\\"// no\" // yes") == "\"\\\"// no\" ");
    CHECK(without_comments("R\"(// no)\" // yes") == "R\"(// no)\" ");
    CHECK(without_comments("R\"x(// no )\" )x\" // yes") == "R\"x(// no )\" )x\" ");
    CHECK(without_comments("'\"' // yes") == "'\"' ");
    CHECK(without_comments("1'000'000 // yes") == "1'000'000 ");
    CHECK(without_comments("\"unclosed\n// yes") == "\"unclosed\n");
    CHECK(without_comments("/* unclosed") == " ");
  }

  TEST_CASE("what an answer includes is found from the root and beside it, through others, and once") {
    const ScratchFolder folder;
    const auto root = folder.path();
    write_file(root / "hidden/step/answer.cu",
               "#include \"hidden/tile.cuh\"\n  #  include \"beside.hpp\"\n#include \"contract.hpp\"\n");
    write_file(root / "hidden/tile.cuh", "#include \"hidden/vector.cuh\"\n// #include \"hidden/unused.cuh\"\n");
    write_file(root / "hidden/vector.cuh", "#include <hidden/unused.cuh>\n#include \"hidden/tile.cuh\"\n");
    write_file(root / "hidden/unused.cuh", "");
    write_file(root / "hidden/step/beside.hpp", "#include \"common/shape.hpp\"\n#include \"../vector.cuh\"\n");
    write_file(root / "common/shape.hpp", "#include \"hidden/unused.cuh\"\n");
    const auto found = included_below(root / "hidden", {root / "hidden/step/answer.cu"}, root);
    CHECK(found ==
          std::vector<fs::path>{root / "hidden/tile.cuh", root / "hidden/vector.cuh", root / "hidden/step/beside.hpp"});
    CHECK(included_below(root / "hidden", {root / "absent.cu", root / "hidden/unused.cuh"}, root).empty());
  }

  TEST_CASE("a hash sees every byte and where texts end") {
    const auto of = [](std::initializer_list<std::string> texts) {
      Hash hash;
      for (const auto& text : texts) hash.add(text);
      return hash.hex();
    };
    CHECK(of({"ab", "c"}) == of({"ab", "c"}));
    CHECK(of({"ab", "c"}) != of({"a", "bc"}));
    CHECK(of({"ab"}) != of({"ab", ""}));
    CHECK(of({"a"}) != of({"b"}));
  }

  TEST_CASE("a file is replaced whole, keeps its mode, and leaves no draft") {
    const ScratchFolder folder;
    const auto file = folder.path() / "new" / "file";
    write_file(file, "one");
    CHECK(read_file(file) == "one");
    ::chmod(file.c_str(), 0600);
    write_file(file, "two");
    CHECK(read_file(file) == "two");
    struct stat status {};
    REQUIRE(::stat(file.c_str(), &status) == 0);
    CHECK((status.st_mode & 0777) == 0600);
    CHECK(std::distance(fs::directory_iterator(file.parent_path()), fs::directory_iterator()) == 1);
  }

  TEST_CASE("a link is written through") {
    const ScratchFolder folder;
    write_file(folder.path() / "real", "one");
    fs::create_symlink(folder.path() / "real", folder.path() / "link");
    write_file(folder.path() / "link", "two");
    CHECK(fs::is_symlink(folder.path() / "link"));
    CHECK(read_file(folder.path() / "real") == "two");
  }

  TEST_CASE("what cannot be written is a failure that names the path, and nothing is changed") {
    const ScratchFolder folder;
    write_file(folder.path() / "file", "one");
    CHECK_THROWS_WITH_AS(write_file(folder.path() / "file" / "below", "two"),
                         doctest::Contains((folder.path() / "file" / "below").c_str()), Failure);
    CHECK_THROWS_AS(write_file("/dev/full", "two"), Failure);
    CHECK(fs::is_character_file("/dev/full"));
    CHECK(read_file(folder.path() / "file") == "one");
    CHECK_FALSE(read_file(folder.path()));  // a folder is no file
    CHECK_FALSE(read_file(folder.path() / "absent"));
  }

  TEST_CASE("paths are shown as typed from the root") {
    CHECK(relative_to("/course/a/b.cpp", "/course") == "a/b.cpp");
    CHECK(relative_to("/course/x/../a/b.cpp", "/course") == "a/b.cpp");
    CHECK(relative_to("/elsewhere/b.cpp", "/course") == "/elsewhere/b.cpp");
  }
}
