# Kernel files for the virtual GPU or for CUDA.
#
#   kata_add_kernel_library(NAME MODE fast|checked SOURCES a.cu b.cu ...)
#     An object library of kernel files.
#     fast      without instrumentation: numerics
#     checked   each memory access announced to the runtime: findings and profile
#     Under KATA_GPU=cuda nvcc compiles them, and MODE makes no difference.
#
# Both modes are linked against the same runtime, flashkata_gpu; a program is a checked one as soon as it contains a
# checked kernel file. So a suite is compiled once and linked twice: with the fast objects, and with the checked ones.

function(kata_add_kernel_library name)
  cmake_parse_arguments(PARSE_ARGV 1 KERNEL "" "MODE" "SOURCES")
  if(NOT KERNEL_MODE MATCHES "^(fast|checked)$")
    message(FATAL_ERROR "kata_add_kernel_library(${name}): MODE is '${KERNEL_MODE}', allowed is fast or checked")
  endif()
  add_library(${name} OBJECT ${KERNEL_SOURCES})
  target_link_libraries(${name} PUBLIC flashkata_gpu)

  if(KATA_GPU STREQUAL "cuda")
    # CMake before 3.26 does not know nvcc's C++20, hence the flag.
    target_compile_options(${name} PRIVATE --expt-relaxed-constexpr -std=c++20)
    return()
  endif()

  set_source_files_properties(${KERNEL_SOURCES} PROPERTIES LANGUAGE CXX)
  # Kernels spend their time in the runtime: what a better optimiser saves there it takes twice in compiling them.
  # A tail call would hide the line of a barrier that ends a kernel. #pragma unroll is nvcc's and clang's.
  target_compile_options(${name} PRIVATE -Og -fno-optimize-sibling-calls -Wno-unknown-pragmas)
  if(KERNEL_MODE STREQUAL "fast")
    target_compile_options(${name} PRIVATE -g1)
    return()
  endif()
  target_compile_definitions(${name} PRIVATE KATA_GPU_CHECKED_KERNEL)
  target_compile_options(${name} PRIVATE -g -gdwarf-4 -fsanitize=thread)
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    # Vectorised or merged accesses would not be those of the source, nor would "a read before a write need not count".
    target_compile_options(${name} PRIVATE -fsanitize=array-bounds,alignment -fno-vectorize -fno-slp-vectorize
                           "SHELL:-mllvm -tsan-instrument-func-entry-exit=0"
                           "SHELL:-mllvm -tsan-instrument-read-before-write=1")
  else()
    # Where local variables are at each instruction takes a third of the time to find out, and nobody asks.
    target_compile_options(${name} PRIVATE -fsanitize=bounds,alignment -fno-tree-sra -fno-var-tracking
                           "SHELL:--param tsan-instrument-func-entry-exit=0")
  endif()
endfunction()
