#include "records.hpp"

#include <doctest/doctest.h>

#include "files.hpp"

using namespace kata;

TEST_SUITE("records") {
  TEST_CASE("what was written is read again, odd bytes and all") {
    const ScratchFolder folder;
    const Records records = {{"a", {{"state", "done"}, {"name", "\"quoted\"\n\u2501"}}}, {"b", {}}};
    REQUIRE(try_write_records(folder.path() / "file", records));
    CHECK(read_records(folder.path() / "file") == Records{{"a", records.at("a")}});  // an empty record says nothing
    CHECK(try_write_records(folder.path() / "file", {{"a", {{"name", "\xff"}}}}));
  }

  TEST_CASE("absent and damaged files hold nothing") {
    const ScratchFolder folder;
    CHECK(read_records(folder.path() / "absent").empty());
    for (const char* text : {"", "[", "[1]", "7", "{\"a\": 1}", "{\"a\": {\"b\": 1}}", "{\"a\": {\"b\": \"c\""}) {
      write_file(folder.path() / "file", text);
      CHECK(read_records(folder.path() / "file").empty());
    }
  }

  TEST_CASE("numbers are read with care") {
    CHECK(number_in({{"n", "12"}}, "n") == 12);
    CHECK(number_in({{"n", "x"}}, "n") == 0);
    CHECK(number_in({}, "n") == 0);
  }
}
