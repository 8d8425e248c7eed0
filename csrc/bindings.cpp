// The Python module hne_kernels._C: functions that are not ops. Importing the module also registers the ops.
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "cpu/fused_layers.h"
#include "cpu/quantized_layers.h"
#include "cpu/runtime/allocator.h"
#include "cpu/runtime/capability.h"
#include "state_record.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

py::dict build_info() {
  py::dict info;
  info["version"] = HNE_VERSION;
  info["commit"] = HNE_COMMIT;
  info["compiler"] = kCompiler;
  info["flags"] = HNE_FLAGS;
  info["torch"] = HNE_TORCH;
  info["torch_target"] = HNE_TORCH_TARGET;
  info["sanitizers"] = HNE_SANITIZERS;
  info["cuda_targets"] = HNE_CUDA_TARGETS;
  info["without_cuda"] = HNE_WITHOUT_CUDA;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info, "How this library was compiled: dict of str to str.");
  module.def("cpu_capability", &hne::cpu_capability, "Name of the instruction set that the kernels use.");
  module.def("cpu_capabilities_supported", &hne::cpu_capabilities_supported,
             "Names of the instruction sets that this machine supports, comma separated, best last.");
  module.def("forget_layers", &hne::forget_layers,
             "Free the layers that the op prepare_layers returned this number for.");
  module.def("forget_quantized_layers", &hne::forget_quantized_layers,
             "Free the layers that the op prepare_quantized_layers returned this number for.");
  module.def("cpu_vnni", &hne::vnni, "Whether the int8 kernels use vpdpbusd.");
  module.def("release_memory", &hne::release_memory,
             "Return idle buffers of the CPU ops to the system; the number of bytes.");
  module.def("poison_memory", &hne::poison_memory,
             "Whether the CPU ops fill large outputs with NaN before they write them (for tests).");
  hne::bind_state_record(module);
}
