// GLOAM_HOST_DEVICE marks inline functions that CUDA kernels call too.
#pragma once

#ifdef __CUDACC__
#define GLOAM_HOST_DEVICE __host__ __device__
#else
#define GLOAM_HOST_DEVICE
#endif
