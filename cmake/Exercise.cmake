# The manifest of the course: add_exercise(), called once for each step, in course order.
#
#   add_exercise(02_attention
#                IDEA "scores, scale, mask, softmax, weights times value"   # the one new idea, in a line
#                KIND cpu                                                   # cpu, or cuda where there are kernels
#                FILES attention.cpp                                        # what the student fills
#                NEEDS phase1.01_softmax                                    # earlier steps that it may call
#                WATCHED phase1.01_softmax                                  # of those with kernels: in ..._check too
#                PROVIDED library.cpp)                                      # given to the student, in the step's folder
#
# Called from phaseN_name/CMakeLists.txt. Everything else follows from the names:
#   phase1.02_attention         the student's file, compiled (an object library); of a cuda step the .cu files
#   phase1.02_attention_host    of a cuda step the .cpp files, if it has any
#   phase1.02_attention_suite   02_attention/attention_test.cpp, compiled
#   phase1.02_attention_test    the two, linked; every TEST_CASE becomes a ctest test, labelled phase1
#   ..._check                   of a cuda step on the virtual GPU: the same with every memory access of the kernels watched
# write_course() then writes build/<preset>/course.json, which is all that the kata program knows of the course.
include_guard()

define_property(GLOBAL PROPERTY KATA_STEPS BRIEF_DOCS "The steps as JSON objects, in course order")

function(add_exercise folder)
  cmake_parse_arguments(PARSE_ARGV 1 STEP "" "IDEA;KIND" "FILES;NEEDS;WATCHED;PROVIDED")
  foreach(required IDEA KIND FILES)
    if(NOT STEP_${required})
      message(FATAL_ERROR "add_exercise(${folder}): ${required} is missing")
    endif()
  endforeach()
  if(NOT STEP_KIND MATCHES "^(cpu|cuda)$")
    message(FATAL_ERROR "add_exercise(${folder}): KIND is '${STEP_KIND}', allowed is cpu or cuda")
  endif()
  if(KATA_SANITIZE AND STEP_KIND STREQUAL "cuda")
    return()  # the address sanitizer cannot follow the virtual GPU's fibers; kernels have a checker of their own
  endif()
  if(NOT folder MATCHES "^([0-9][0-9])_(.+)$")
    message(FATAL_ERROR "add_exercise(${folder}): a step folder is named NN_name")
  endif()
  set(step_number ${CMAKE_MATCH_1})
  set(name ${CMAKE_MATCH_2})
  cmake_path(GET CMAKE_CURRENT_SOURCE_DIR FILENAME phase_folder)
  if(NOT phase_folder MATCHES "^phase([0-9])_(.+)$")
    message(FATAL_ERROR "add_exercise(${folder}): call it from a folder named phaseN_name, not from ${phase_folder}")
  endif()
  set(phase ${CMAKE_MATCH_1})
  set(phase_name ${CMAKE_MATCH_2})
  set(label phase${phase}.${folder})
  set(number ${phase}.${step_number})
  set(path ${phase_folder}/${folder})

  list(TRANSFORM STEP_FILES PREPEND ${KATA_ANSWERS}/${path}/ OUTPUT_VARIABLE answers)
  foreach(answer IN LISTS answers)
    if(NOT EXISTS ${answer})
      message(FATAL_ERROR "${label}: ${answer} does not exist; KATA_ANSWERS is ${KATA_ANSWERS}")
    endif()
  endforeach()

  set(host "")
  if(STEP_KIND STREQUAL "cuda")
    set(kernels ${answers})
    list(FILTER kernels INCLUDE REGEX "\\.cu$")
    list(FILTER answers EXCLUDE REGEX "\\.cu$")
    kata_add_kernel_library(${label} MODE fast SOURCES ${kernels})
    kata_reuse_kernel_headers(${label} fast)
    if(answers)
      set(host ${label}_host)
      add_library(${host} OBJECT ${answers})
      target_link_libraries(${host} PUBLIC flashkata_gpu)
      target_precompile_headers(${host} REUSE_FROM kata_host_headers)
      kata_configure_answer(${host} ${folder} "${STEP_NEEDS}")
    endif()
  else()
    add_library(${label} OBJECT ${answers})
    target_precompile_headers(${label} REUSE_FROM kata_answer_headers)
  endif()
  kata_configure_answer(${label} ${folder} "${STEP_NEEDS}")
  kata_objects(needs ${STEP_NEEDS})

  list(GET STEP_FILES 0 file)
  configure_file(${CMAKE_SOURCE_DIR}/cmake/step.cpp.in ${folder}/step.cpp @ONLY)
  list(TRANSFORM STEP_PROVIDED PREPEND ${folder}/)
  add_library(${label}_suite OBJECT ${folder}/${name}_test.cpp ${STEP_PROVIDED} ${CMAKE_CURRENT_BINARY_DIR}/${folder}/step.cpp)
  target_include_directories(${label}_suite PUBLIC ${CMAKE_CURRENT_SOURCE_DIR}/${folder})
  target_link_libraries(${label}_suite PUBLIC flashkata_testing)
  target_precompile_headers(${label}_suite REUSE_FROM kata_suite_headers)
  if(STEP_KIND STREQUAL "cuda")
    target_link_libraries(${label}_suite PUBLIC flashkata_kernel_testing)
  endif()
  kata_add_suite(${label}_test ${folder} phase${phase} ${label} ${host} ${needs} ${label}_suite)

  set(check "")
  if(STEP_KIND STREQUAL "cuda" AND KATA_GPU STREQUAL "virtual")
    kata_add_kernel_library(${label}_checked MODE checked SOURCES ${kernels})
    kata_reuse_kernel_headers(${label}_checked checked)
    kata_configure_answer(${label}_checked ${folder} "${STEP_NEEDS}")
    kata_watched(watched_needs "${STEP_WATCHED}" ${needs})
    kata_add_suite(${label}_check ${folder} phase${phase} ${label}_checked ${host} ${watched_needs} ${label}_suite)
    add_dependencies(${label}_test ${label}_check)  # whoever builds the one wants both
    set(check "${CMAKE_CURRENT_BINARY_DIR}/${folder}/${label}_check")
  endif()

  set_property(GLOBAL APPEND PROPERTY KATA_LABELS ${label})
  set_property(GLOBAL PROPERTY KATA_PATH_${label} ${path})
  set_property(GLOBAL PROPERTY KATA_KIND_${label} ${STEP_KIND})
  set_property(GLOBAL PROPERTY KATA_NEEDS_${label} ${STEP_NEEDS})
  set_property(GLOBAL PROPERTY KATA_WATCHED_${label} ${STEP_WATCHED})

  list(TRANSFORM STEP_FILES REPLACE "(.+)" "\"\\1\"" OUTPUT_VARIABLE files_json)
  list(JOIN files_json ", " files_json)
  list(TRANSFORM STEP_NEEDS REPLACE "(.+)" "\"\\1\"" OUTPUT_VARIABLE needs_json)
  list(JOIN needs_json ", " needs_json)
  set_property(GLOBAL APPEND PROPERTY KATA_STEPS "    { \"number\": \"${number}\", \"label\": \"${label}\", \
\"phase\": ${phase}, \"phase_name\": \"${phase_name}\", \"name\": \"${name}\", \"folder\": \"${path}\", \
\"idea\": \"${STEP_IDEA}\", \"kind\": \"${STEP_KIND}\", \"files\": [${files_json}], \"needs\": [${needs_json}], \
\"target\": \"${label}_test\", \"test\": \"${CMAKE_CURRENT_BINARY_DIR}/${folder}/${label}_test\", \"check\": \"${check}\" }")
endfunction()

# What every compilation of a step's answer has: the step's folder, the headers of the steps it may call.
function(kata_configure_answer target folder needs)
  target_include_directories(${target} PUBLIC ${CMAKE_CURRENT_SOURCE_DIR}/${folder})
  target_link_libraries(${target} PUBLIC flashkata_attention PRIVATE kata_answer)
  foreach(need IN LISTS needs)
    target_include_directories(${target} PUBLIC $<TARGET_PROPERTY:${need},INTERFACE_INCLUDE_DIRECTORIES>)
  endforeach()
endfunction()

# The headers that kernel files include, compiled once; nvcc has no such thing.
function(kata_reuse_kernel_headers target mode)
  if(KATA_GPU STREQUAL "virtual")
    target_precompile_headers(${target} REUSE_FROM kata_kernel_headers_${mode})
  endif()
endfunction()

# The object libraries of these steps, for linking.
function(kata_objects result)
  set(objects ${ARGN})
  foreach(label IN LISTS ARGN)
    if(TARGET ${label}_host)
      list(APPEND objects ${label}_host)
    endif()
  endforeach()
  set(${result} ${objects} PARENT_SCOPE)
endfunction()

# The same objects, with the watched kernels in place of the fast ones where `watched` lists the step. What fast kernels
# write, nobody has seen being written: a step whose own kernels read it needs them watched.
function(kata_watched result watched)
  set(objects ${ARGN})
  foreach(label IN LISTS watched)
    list(TRANSFORM objects REPLACE "^${label}$" "${label}_checked")
  endforeach()
  set(${result} ${objects} PARENT_SCOPE)
endfunction()

# An executable of a step's suite, and a ctest test for each of its test cases.
function(kata_add_suite target folder phase)
  add_executable(${target})
  set_target_properties(${target} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/${folder})
  target_link_libraries(${target} PRIVATE ${ARGN})
  string(REGEX REPLACE "_test$" "" prefix ${target})
  set(seconds 120)
  if(KATA_GPU STREQUAL "cuda")
    set(seconds 300)  # long sequences, of which the reference takes its time
  endif()
  doctest_discover_tests(${target} TEST_PREFIX "${prefix}/" TEST_LIST ${target}_cases
                         PROPERTIES LABELS ${phase} TIMEOUT ${seconds} SKIP_REGULAR_EXPRESSION "\\[skipped\\]")
  # Those whose names begin with "stress:" can be chosen, or left out, by a label. They look at how much of the GPU's
  # memory is taken, so nobody else may run.
  set(script ${CMAKE_CURRENT_BINARY_DIR}/${folder}/${target}_labels.cmake)
  file(WRITE ${script} "foreach(case IN LISTS ${target}_cases)
  if(case MATCHES \"/stress:\")
    set_tests_properties(\"\${case}\" PROPERTIES LABELS \"${phase};stress\" RUN_SERIAL ON)
  endif()
endforeach()
")
  set_property(DIRECTORY APPEND PROPERTY TEST_INCLUDE_FILES ${script})
endfunction()

function(write_course)
  get_property(steps GLOBAL PROPERTY KATA_STEPS)
  list(JOIN steps ",\n" steps)
  cmake_path(GET CMAKE_BINARY_DIR FILENAME preset)
  file(CONFIGURE OUTPUT course.json @ONLY CONTENT "{
  \"source\": \"${CMAKE_SOURCE_DIR}\",
  \"build\": \"${CMAKE_BINARY_DIR}\",
  \"preset\": \"${preset}\",
  \"answers\": \"${KATA_ANSWERS}\",
  \"steps\": [
${steps}
  ]
}
")
endfunction()
