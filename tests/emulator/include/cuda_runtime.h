// The part of the CUDA runtime that generated kernels and their launchers use.
#pragma once

#include <string>

#include "emulator/arithmetic.h"
#include "emulator/collective.h"
#include "emulator/launch.h"
#include "emulator/matrix.h"
#include "emulator/mbarrier.h"
#include "emulator/memory.h"
#include "emulator/warpgroup.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(2) uchar2 { unsigned char x, y; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(16) longlong2 { long long x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorCudartUnloading = 4, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulated {
inline std::string last_error;
}

inline const char* cudaGetErrorString(cudaError_t) { return emulated::last_error.c_str(); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
template <typename Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <typename... Params>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                                      Params... arguments) {
  try {
    // Clusters along x alone.
    unsigned ctas = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
    emulated::launch(config->gridDim, config->blockDim, ctas, config->dynamicSmemBytes,
                     [=] { kernel(arguments...); });
  } catch (const emulated::KernelError& error) {
    emulated::last_error = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// Whether threads, warps and CTAs run in descending order.
extern "C" __attribute__((visibility("default"), used)) inline void emulated_descending(int value) {
  emulated::descending = value != 0;
}
