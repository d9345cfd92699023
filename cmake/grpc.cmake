# gRPC, Protobuf and Abseil, linked statically: the CMake packages of Debian and Ubuntu name the
# shared libraries, and the static ones lie beside them. So none of them has to be on the machine
# that runs the program. gloam_grpc is what to link; it leaves out TLS, and with it OpenSSL.

# Points imported shared libraries at their static twins.
function(gloam_use_static_archives)
  foreach(target ${ARGN})
    get_target_property(type ${target} TYPE)
    if(NOT type STREQUAL "SHARED_LIBRARY")
      continue()
    endif()
    get_target_property(config ${target} IMPORTED_CONFIGURATIONS)
    get_target_property(shared ${target} IMPORTED_LOCATION_${config})
    string(REGEX REPLACE "\\.so[.0-9]*$" ".a" archive "${shared}")
    if(NOT EXISTS ${archive})
      message(FATAL_ERROR "${target}: there is no static library ${archive}")
    endif()
    set_target_properties(${target} PROPERTIES
      IMPORTED_LOCATION_${config} ${archive}
      IMPORTED_SONAME_${config} "")
  endforeach()
endfunction()

set(Protobuf_USE_STATIC_LIBS ON)
set(ZLIB_USE_STATIC_LIBS ON)
find_package(Protobuf REQUIRED)
find_package(ZLIB REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_library(cares_archive libcares.a REQUIRED)
find_library(re2_archive libre2.a REQUIRED)

get_property(absl_targets DIRECTORY PROPERTY IMPORTED_TARGETS)
list(FILTER absl_targets INCLUDE REGEX "^absl::")
gloam_use_static_archives(${absl_targets}
  gRPC::address_sorting gRPC::gpr gRPC::upb gRPC::grpc_unsecure gRPC::grpc++_unsecure)

# gRPC's package finds these two as shared libraries only.
get_target_property(grpc_libraries gRPC::grpc_unsecure INTERFACE_LINK_LIBRARIES)
list(TRANSFORM grpc_libraries REPLACE "^c-ares::cares$" ${cares_archive})
list(TRANSFORM grpc_libraries REPLACE "^re2::re2$" ${re2_archive})
set_target_properties(gRPC::grpc_unsecure PROPERTIES
  INTERFACE_LINK_LIBRARIES "${grpc_libraries}")

# The reflection library asks for gRPC with TLS, but uses nothing of it.
get_target_property(config gRPC::grpc++_reflection IMPORTED_CONFIGURATIONS)
gloam_use_static_archives(gRPC::grpc++_reflection)
get_target_property(reflection_archive gRPC::grpc++_reflection IMPORTED_LOCATION_${config})

add_library(gloam_grpc INTERFACE)
target_link_libraries(gloam_grpc INTERFACE
  ${reflection_archive} gRPC::grpc++_unsecure protobuf::libprotobuf)
