#include "state_record.h"

#include <algorithm>
#include <cstring>
#include <optional>

namespace py = pybind11;

namespace hne {

namespace {

constexpr size_t kLine = 64;  // bytes of a sample: a cache line
constexpr size_t kLines = 5;  // samples of a tensor
constexpr size_t kAhead = 8;  // objects that are loaded into the cache in advance

// The C functions behind Tensor._version and Tensor.data_ptr. Calling them directly saves the look-up by name. Null if
// PyTorch defines these attributes in another way.
struct TensorFunctions {
  getter version = nullptr;
  void* closure = nullptr;
  PyCFunction data_ptr = nullptr;

  TensorFunctions() {
    const py::object base = py::module_::import("torch._C").attr("TensorBase");
    const py::object property = base.attr("_version"), method = base.attr("data_ptr");
    if (Py_IS_TYPE(property.ptr(), &PyGetSetDescr_Type)) {
      const PyGetSetDef* definition = reinterpret_cast<PyGetSetDescrObject*>(property.ptr())->d_getset;
      version = definition->get;
      closure = definition->closure;
    }
    if (Py_IS_TYPE(method.ptr(), &PyMethodDescr_Type)) {
      const PyMethodDef* definition = reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
      if (definition->ml_flags == METH_NOARGS) data_ptr = definition->ml_meth;
    }
  }
};

const TensorFunctions& tensor_functions() {
  static const TensorFunctions functions;
  return functions;
}

// The value of a new reference to an int. None for a RuntimeError: the tensor has no version counter or no memory.
std::optional<void*> take_int(PyObject* number) {
  if (number == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw py::error_already_set();
    PyErr_Clear();
    return std::nullopt;
  }
  void* value = PyLong_AsVoidPtr(number);
  Py_DECREF(number);
  if (PyErr_Occurred()) throw py::error_already_set();
  return value;
}

std::optional<void*> version_of(PyObject* tensor) {
  const TensorFunctions& functions = tensor_functions();
  return take_int(functions.version ? functions.version(tensor, functions.closure)
                                    : PyObject_GetAttrString(tensor, "_version"));
}

std::optional<void*> address_of(PyObject* tensor) {
  const TensorFunctions& functions = tensor_functions();
  return take_int(functions.data_ptr ? functions.data_ptr(tensor, nullptr)
                                     : PyObject_CallMethod(tensor, "data_ptr", nullptr));
}

// Loads the C++ object of a tensor into the cache. The word after the header of the Python object is its address; if
// another version of PyTorch keeps it elsewhere, that costs time and nothing else.
void prefetch_tensor(PyObject* tensor) {
  const std::byte* impl;
  std::memcpy(&impl, reinterpret_cast<const std::byte*>(tensor) + sizeof(PyObject), sizeof(impl));
  for (size_t line = 0; line < 4; ++line) __builtin_prefetch(impl + line * kLine);
}

Py_ssize_t size_of(PyObject* container) {
  return PyDict_Check(container) ? PyDict_GET_SIZE(container) : PyList_GET_SIZE(container);
}

}  // namespace

StateRecord::StateRecord(const py::list& containers, const py::list& ignored, const py::list& tensors,
                         const py::list& sizes) {
  if (ignored.size() != containers.size()) throw py::value_error("ignored: expected as many as containers");
  if (sizes.size() != tensors.size()) throw py::value_error("sizes: expected as many as tensors");
  for (size_t i = 0; i < containers.size(); ++i) {
    PyObject* container = keep(containers[i]);
    if (PyDict_Check(container)) {
      const py::object names = ignored[i];
      PyObject *key, *value;
      Py_ssize_t position = 0, next = 0;
      for (; PyDict_Next(container, &next, &key, &value); position = next) {
        if (!names.contains(py::handle(key))) entries_.push_back({keep(key), keep(value), position});
      }
    } else if (PyList_Check(container)) {
      for (Py_ssize_t j = 0; j < PyList_GET_SIZE(container); ++j) {
        entries_.push_back({nullptr, keep(PyList_GET_ITEM(container, j)), j});
      }
    } else {
      throw py::type_error("containers: expected dictionaries and lists");
    }
    containers_.push_back({container, size_of(container), entries_.size()});
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyObject* tensor = keep(tensors[i]);
    const auto version = version_of(tensor), address = address_of(tensor);
    if (!version || !address) {
      known_ = false;
      return;
    }
    tensors_.push_back({tensor, *address, *version});
    add_samples(static_cast<const std::byte*>(*address), sizes[i].cast<size_t>());
  }
}

PyObject* StateRecord::keep(py::handle object) {
  references_.append(object);
  return object.ptr();
}

void StateRecord::add_samples(const std::byte* address, size_t size) {
  const auto add = [&](size_t begin, size_t length) {
    samples_.push_back({address + begin, bytes_.size(), length});
    bytes_.insert(bytes_.end(), address + begin, address + begin + length);
  };
  if (size <= kLines * kLine) {
    if (size > 0) add(0, size);
    return;
  }
  // The first and the last bytes, and cache lines at equal distances between them.
  for (size_t line = 0; line + 1 < kLines; ++line) add(size / (kLines - 1) * line / kLine * kLine, kLine);
  add(size - kLine, kLine);
}

bool StateRecord::unchanged() const {
  // Memory is read last: it exists if the tensors still have the recorded addresses.
  return known_ && same_entries() && same_tensors() && same_memory();
}

bool StateRecord::same_entries() const {
  // No Python code runs in this loop, so references can be borrowed from the containers.
  size_t index = 0;
  for (size_t i = 0; i < containers_.size(); ++i) {
    if (i + kAhead < containers_.size()) __builtin_prefetch(containers_[i + kAhead].object);
    const auto [container, size, end] = containers_[i];
    if (size_of(container) != size) return false;
    for (; index < end; ++index) {
      const Entry& entry = entries_[index];
      if (entry.key == nullptr) {
        if (PyList_GET_ITEM(container, entry.position) != entry.value) return false;
        continue;
      }
      PyObject *key, *value;
      Py_ssize_t position = entry.position;
      if (!PyDict_Next(container, &position, &key, &value) || key != entry.key || value != entry.value) return false;
    }
  }
  return true;
}

bool StateRecord::same_tensors() const {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (i + kAhead < tensors_.size()) prefetch_tensor(tensors_[i + kAhead].tensor);
    const TensorState& state = tensors_[i];
    if (version_of(state.tensor) != state.version || address_of(state.tensor) != state.address) return false;
  }
  return true;
}

bool StateRecord::same_memory() const {
  return std::all_of(samples_.begin(), samples_.end(), [this](const Sample& sample) {
    return std::memcmp(sample.address, bytes_.data() + sample.offset, sample.size) == 0;
  });
}

int StateRecord::traverse(visitproc visit, void* arg) const {
  Py_VISIT(references_.ptr());
  return 0;
}

void StateRecord::clear() {
  known_ = false;  // the pointers are not valid any more
  references_ = py::list();
}

void bind_state_record(py::module_& module) {
  tensor_functions();  // not in a call, where threads could wait for each other
  const auto collected = [](PyHeapTypeObject* heap_type) {
    PyTypeObject* type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      if (!py::detail::is_holder_constructed(self)) return 0;
      return py::cast<StateRecord&>(py::handle(self)).traverse(visit, arg);
    };
    type->tp_clear = [](PyObject* self) {
      if (py::detail::is_holder_constructed(self)) py::cast<StateRecord&>(py::handle(self)).clear();
      return 0;
    };
  };
  py::class_<StateRecord>(module, "StateRecord", py::custom_type_setup(collected))
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&>(), py::arg("containers"),
           py::arg("ignored"), py::arg("tensors"), py::arg("sizes"))
      .def("unchanged", &StateRecord::unchanged);
}

}  // namespace hne
