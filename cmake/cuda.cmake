# The CUDA toolkit and FlashInfer's headers, where they are: deploy/install-deps --cuda brings what a
# machine lacks. Sets GLOAM_CUDA to ON or OFF.
#
# The runtime is linked statically. cuBLASLt is loaded when the backend first needs it
# (kernels/cuda/gemm/cublas_lt.cc), so that the program also runs where there is no GPU.

set(GLOAM_FLASHINFER_DIR ${PROJECT_SOURCE_DIR}/third_party/flashinfer)
# third_party/cuda exists only where no other toolkit was new enough.
find_program(GLOAM_NVCC nvcc
  NO_CACHE HINTS ${PROJECT_SOURCE_DIR}/third_party/cuda/bin
  PATHS /usr/local/cuda/bin)
if(GLOAM_CUDA STREQUAL "AUTO")
  if(GLOAM_NVCC AND EXISTS ${GLOAM_FLASHINFER_DIR})
    set(GLOAM_CUDA ON)
  else()
    message(STATUS "Without the CUDA backend: deploy/install-deps --cuda brings what it needs")
    set(GLOAM_CUDA OFF)
  endif()
endif()
if(NOT GLOAM_CUDA)
  return()
endif()
if(NOT GLOAM_NVCC OR NOT EXISTS ${GLOAM_FLASHINFER_DIR})
  message(FATAL_ERROR "no nvcc or no third_party/flashinfer: run deploy/install-deps --cuda")
endif()
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  set(CMAKE_CUDA_COMPILER ${GLOAM_NVCC})
endif()

if(CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
# Chosen by flags below: CMake 3.25 does not know them all.
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
# The property CXX_STANDARD holds for CUDA too, and CMake 3.25 does not know nvcc's flag for it.
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
find_package(CUDAToolkit 12.8 REQUIRED)
# Where programs of the build folder load cuBLASLt from; installed ones have it beside them.
set(CMAKE_BUILD_RPATH ${CUDAToolkit_LIBRARY_DIR})

set(GLOAM_CUDA_FLAGS
  -DFMT_USE_CONSTEXPR=1  # fmt 9 is half constexpr under nvcc otherwise
  --expt-relaxed-constexpr --extended-lambda -Xcompiler=-Wall,-Wextra)
# Everything that only CUDA builds have: tests and benches.
add_custom_target(gloam_cuda_all)

# gloam_cuda_test(NAME SOURCES ... LIBS ... [LABELS ...]): a test that needs a GPU. Without one its
# main() ends with status 77 and it counts as skipped.
function(gloam_cuda_test name)
  cmake_parse_arguments(ARG "" "" "SOURCES;LIBS;LABELS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS})
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
  set(labels cuda ${ARG_LABELS})
  set_tests_properties(${name} PROPERTIES SKIP_RETURN_CODE 77 LABELS "${labels}")
  add_dependencies(gloam_cuda_all ${name})
endfunction()

# gloam_use_cuda(TARGET [ARCHITECTURE ...]): compiles the .cu files of TARGET for these GPUs, without
# any for all chosen ones, and links the runtime.
function(gloam_use_cuda target)
  set(flags ${GLOAM_CUDA_FLAGS})
  set(architectures ${ARGN})
  if(NOT architectures)
    set(architectures ${GLOAM_CUDA_ARCHITECTURES})
  endif()
  foreach(arch ${architectures})
    list(APPEND flags "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
  endforeach()
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${flags}>)
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  target_include_directories(${target} SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
endfunction()

# FlashInfer's headers, with the CUTLASS and CCCL that they need: newer than the toolkit's. Files
# that include them take up to 3 GB to compile: one at a time.
set_property(GLOBAL PROPERTY JOB_POOLS flashinfer=1)
function(gloam_use_flashinfer target)
  target_include_directories(${target} BEFORE PRIVATE ${GLOAM_FLASHINFER_DIR}/cccl)
  target_include_directories(${target} SYSTEM PRIVATE
    ${GLOAM_FLASHINFER_DIR}/include
    ${GLOAM_FLASHINFER_DIR}/cutlass
    ${GLOAM_FLASHINFER_DIR}/cutlass_util)
  set_target_properties(${target} PROPERTIES JOB_POOL_COMPILE flashinfer)
endfunction()
