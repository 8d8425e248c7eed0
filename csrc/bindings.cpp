// The Python module hne_kernels._C: functions that are not ops. Importing the module also registers the ops.
#include "build_info.h"
#include "cpu/fused_layers.h"
#include "cpu/quantized_layers.h"
#include "cpu/runtime/allocator.h"
#include "cpu/runtime/capability.h"
#include "python.h"
#include "state_record.h"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

int64_t integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw hne::PythonError{};
  return value;
}

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{ss ss ss ss ss ss ss ss ss}", "version", HNE_VERSION, "commit", HNE_COMMIT, "compiler",
                       kCompiler, "flags", HNE_FLAGS, "torch", HNE_TORCH, "torch_target", HNE_TORCH_TARGET,
                       "sanitizers", HNE_SANITIZERS, "cuda_targets", HNE_CUDA_TARGETS, "without_cuda",
                       HNE_WITHOUT_CUDA);
}

PyObject* cpu_capability(PyObject*, PyObject*) {
  return hne::call([] { return PyUnicode_FromString(hne::cpu_capability()); });
}

PyObject* cpu_capabilities_supported(PyObject*, PyObject*) {
  return PyUnicode_FromString(hne::cpu_capabilities_supported());
}

PyObject* cpu_vnni(PyObject*, PyObject*) {
  return hne::call([] { return PyBool_FromLong(hne::vnni()); });
}

PyObject* cpu_bfloat16(PyObject*, PyObject*) {
  return hne::call([] { return PyUnicode_FromString(hne::cpu_bfloat16()); });
}

PyObject* forget_layers(PyObject*, PyObject* handle) {
  return hne::call([&] {
    hne::forget_layers(integer(handle));
    return none();
  });
}

PyObject* forget_quantized_layers(PyObject*, PyObject* handle) {
  return hne::call([&] {
    hne::forget_quantized_layers(integer(handle));
    return none();
  });
}

PyObject* release_memory(PyObject*, PyObject*) {
  return hne::call([] { return PyLong_FromLongLong(hne::release_memory()); });
}

PyObject* poison_memory(PyObject*, PyObject* poisoned) {
  return hne::call([&] {
    hne::poison_memory(PyObject_IsTrue(poisoned) == 1);
    return none();
  });
}

PyMethodDef kFunctions[] = {
    {"build_info", build_info, METH_NOARGS, "How this library was compiled: dict of str to str."},
    {"cpu_capability", cpu_capability, METH_NOARGS, "Name of the instruction set that the kernels use."},
    {"cpu_capabilities_supported", cpu_capabilities_supported, METH_NOARGS,
     "Names of the instruction sets that this machine supports, comma separated, best last."},
    {"cpu_vnni", cpu_vnni, METH_NOARGS, "Whether the int8 kernels use vpdpbusd."},
    {"cpu_bfloat16", cpu_bfloat16, METH_NOARGS,
     "How bfloat16 is multiplied: by the name of the instructions, or widened to float32."},
    {"forget_layers", forget_layers, METH_O, "Free the layers that the op prepare_layers returned this number for."},
    {"forget_quantized_layers", forget_quantized_layers, METH_O,
     "Free the layers that the op prepare_quantized_layers returned this number for."},
    {"release_memory", release_memory, METH_NOARGS,
     "Return idle buffers of the CPU ops to the system; the number of bytes."},
    {"poison_memory", poison_memory, METH_O,
     "Whether the CPU ops fill large outputs with NaN before they write them (for tests)."},
    {}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, kFunctions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return hne::call([] {
    hne::Reference module(hne::checked(PyModule_Create(&kModule)));
    hne::add_state_record(module.get());
    return module.release();
  });
}
