# count_allocations(phase2.03_tiled_forward): that step's suite may ask how much memory a call takes
# (common/testing/allocations.hpp).
include_guard()

function(count_allocations label)
  target_sources(${label}_suite PRIVATE ${CMAKE_SOURCE_DIR}/common/testing/allocations.cpp)
  foreach(name malloc calloc realloc aligned_alloc posix_memalign free)
    target_link_options(${label}_suite INTERFACE LINKER:--wrap=${name})
  endforeach()
endfunction()
