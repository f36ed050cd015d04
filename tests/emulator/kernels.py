"""CUDA source of small kernels for the emulator's own tests, with launchers as TVM writes them."""

from __future__ import annotations

__all__ = ["kernel", "register_kernel", "source"]

_PROLOGUE = """
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
"""
_TYPES = {"r": "uint32_t", "f": "float"}


def source(*kernels: str) -> str:
    """One translation unit."""
    return _PROLOGUE + "\n".join(kernels)


def kernel(name: str, body: str, threads: int = 32, cluster: int = 1, shared: int = 0) -> str:
    """A kernel over words ``in`` and ``out``, in which ``row`` numbers the threads of the grid.

    It is called with two int32 tensors, ``[rows, n]`` for each. ``cluster`` CTAs are a cluster, and
    have ``shared`` bytes of dynamic shared memory.
    """
    return f"""
extern "C" __global__ void __launch_bounds__({threads}) {name}_kernel(
    const uint32_t* in, uint32_t* out, int inputs, int outputs) {{
  int row = int(blockIdx.x) * {threads} + int(threadIdx.x);
  int lane = row & 31;
{body}
}}
static void {name}_launch(tvm::ffi::TensorView in, tvm::ffi::TensorView out) {{
  cudaLaunchConfig_t config = {{}};
  config.gridDim = dim3(unsigned(in.size(0) / {threads}), 1, 1);
  config.blockDim = dim3({threads}, 1, 1);
  config.dynamicSmemBytes = {shared};
  cudaLaunchAttribute attrs[1] = {{}};
  config.attrs = attrs;
  attrs[0].id = cudaLaunchAttributeClusterDimension;
  attrs[0].val.clusterDim.x = {cluster};
  attrs[0].val.clusterDim.y = attrs[0].val.clusterDim.z = 1;
  config.numAttrs = 1;
  cudaError_t error = cudaLaunchKernelEx(
      &config, {name}_kernel, (const uint32_t*)in.data_ptr(), (uint32_t*)out.data_ptr(),
      int(in.size(1)), int(out.size(1)));
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
}}
TVM_FFI_DLL_EXPORT_TYPED_FUNC({name}, {name}_launch);
"""


def register_kernel(name: str, instruction: str, outputs: str, inputs: str) -> str:
    """A kernel of one instruction on registers, given by a letter of constraint each."""
    registers = [
        *((f"d{i}", _TYPES[c] + "&", f'"={c}"') for i, c in enumerate(outputs)),
        *((f"a{i}", _TYPES[c], f'"{c}"') for i, c in enumerate(inputs)),
    ]
    parameters = ", ".join(f"{kind} {register}" for register, kind, _ in registers)
    operands = [f"{constraint}({register})" for register, _, constraint in registers]
    bound = f"{', '.join(operands[: len(outputs)])} : {', '.join(operands[len(outputs) :])}"
    lines = [f"  {_TYPES[c]} d{i};" for i, c in enumerate(outputs)]
    for i, c in enumerate(inputs):
        lines += [f"  {_TYPES[c]} a{i};", f"  memcpy(&a{i}, &in[row * inputs + {i}], 4);"]
    lines.append(f"  {name}_helper({', '.join(register for register, _, _ in registers)});")
    lines += [f"  memcpy(&out[row * outputs + {i}], &d{i}, 4);" for i in range(len(outputs))]
    helper = (
        f"__forceinline__ __device__ void {name}_helper({parameters}) {{\n"
        f'  asm volatile("{instruction}" : {bound});\n}}\n'
    )
    return helper + kernel(name, "\n".join(lines))
