# How everything is compiled: one standard, one set of warnings, paths relative to the root in every message.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
option(KATA_WERROR "Treat warnings as errors (continuous integration does)" OFF)

add_library(kata_compiler INTERFACE)
# g++ 12 sees overlapping copies where a string is put together (its bug 105651).
set(kata_warnings -Wall -Wextra $<$<BOOL:${KATA_WERROR}>:-Werror> $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>
                  -fmacro-prefix-map=${CMAKE_SOURCE_DIR}/= -fmacro-prefix-map=${KATA_ANSWERS}/=)
target_compile_options(kata_compiler INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${kata_warnings}>")
if(KATA_GPU STREQUAL "cuda")
  target_compile_options(kata_compiler INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra;-Xcompiler=-fmacro-prefix-map=${CMAKE_SOURCE_DIR}/=;-Xcompiler=-fmacro-prefix-map=${KATA_ANSWERS}/=>")
endif()
target_include_directories(kata_compiler INTERFACE ${CMAKE_SOURCE_DIR})
# What an answer is compiled with besides: a stub uses none of its parameters yet.
add_library(kata_answer INTERFACE)
target_compile_options(kata_answer INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-unused-parameter>
                                             $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wno-unused-parameter>)
if(KATA_SANITIZE)
  target_compile_options(kata_compiler INTERFACE -fsanitize=address,undefined -fno-sanitize-recover=all
                                                 -fno-omit-frame-pointer -g1)
  target_link_options(kata_compiler INTERFACE -fsanitize=address,undefined)
endif()
