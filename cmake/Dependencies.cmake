# Packages: the installed one where there is one, otherwise this version, fetched and checked against its hash.
include(FetchContent)
set(FETCHCONTENT_QUIET ON)
set(CMAKE_POLICY_DEFAULT_CMP0135 NEW)

# kata_package(NAME URL SHA256 [find_package arguments])
macro(kata_package name url sha256)
  FetchContent_Declare(${name} URL ${url} URL_HASH SHA256=${sha256} SYSTEM FIND_PACKAGE_ARGS ${ARGN})
  FetchContent_MakeAvailable(${name})
endmacro()

set(EIGEN_BUILD_DOC OFF)
set(EIGEN_BUILD_TESTING OFF)
set(DOCTEST_WITH_TESTS OFF)
set(BENCHMARK_ENABLE_TESTING OFF)
set(BENCHMARK_ENABLE_INSTALL OFF)

# Matrices for the CPU steps.
kata_package(Eigen3 https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.gz
             8586084f71f9bde545ee7fa6d00288b264a2b7ac3607b974e54d13e7162c1c72 NO_MODULE)
# Every suite.
kata_package(doctest https://github.com/doctest/doctest/archive/refs/tags/v2.4.11.tar.gz
             632ed2c05a7f53fa961381497bf8069093f0d6628c5f26286161fbd32a560186)
# Fingerprints of known mistakes, verdicts, the kata program's state.
kata_package(nlohmann_json https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz
             d6c65aca6b1ed68e7a182f4757257b107ae403032760ed6ef121c9d55e81757d)
if(KATA_PROGRAM)
  # The command line of the kata program.
  kata_package(CLI11 https://github.com/CLIUtils/CLI11/archive/refs/tags/v2.4.1.tar.gz
               73b7ec52261ce8fe980a29df6b4ceb66243bb0b779451dbd3d014cfec9fdbb58)
endif()

# doctest_discover_tests(): one ctest test for each TEST_CASE.
if(doctest_SOURCE_DIR)
  include(${doctest_SOURCE_DIR}/scripts/cmake/doctest.cmake)
else()
  include(${doctest_DIR}/doctest.cmake)
endif()
