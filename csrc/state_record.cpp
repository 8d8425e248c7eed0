#include "state_record.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>

namespace hne {

namespace {

constexpr size_t kLine = 64;  // bytes of a sample: a cache line
constexpr size_t kLines = 5;  // samples of a tensor
constexpr size_t kAhead = 8;  // objects that are loaded into the cache in advance

// The C functions behind Tensor._version and Tensor.data_ptr. Calling them directly saves the look-up by name. Null if
// PyTorch defines these attributes in another way.
struct TensorFunctions {
  PyObject* version = nullptr;  // never freed
  descrgetfunc get_version = nullptr;
  PyCFunction data_ptr = nullptr;

  TensorFunctions() {
    const Reference torch(checked(PyImport_ImportModule("torch")));
    const Reference tensor(checked(PyObject_CallMethod(torch.get(), "empty", "i", 0)));
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.get()));
    version = checked(PyObject_GetAttrString(type, "_version"));
    get_version = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(version), Py_tp_descr_get));
    const Reference method(checked(PyObject_GetAttrString(tensor.get(), "data_ptr")));
    if (PyCFunction_GetFlags(method.get()) == METH_NOARGS) data_ptr = PyCFunction_GetFunction(method.get());
    PyErr_Clear();  // of a method that is not a C function
  }
};

const TensorFunctions& tensor_functions() {
  static const TensorFunctions functions;
  return functions;
}

// The value of a new reference to an int. None for a RuntimeError: the tensor has no version counter or no memory.
std::optional<void*> take_int(PyObject* result) {
  if (result == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw PythonError{};
    PyErr_Clear();
    return std::nullopt;
  }
  const Reference number(result);
  void* value = PyLong_AsVoidPtr(result);
  if (value == nullptr && PyErr_Occurred()) throw PythonError{};
  return value;
}

std::optional<void*> version_of(PyObject* tensor) {
  const TensorFunctions& functions = tensor_functions();
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return take_int(functions.get_version ? functions.get_version(functions.version, tensor, type)
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
  return PyDict_Check(container) ? PyDict_Size(container) : PyList_Size(container);
}

[[noreturn]] void fail(PyObject* type, const char* message) {
  PyErr_SetString(type, message);
  throw PythonError{};
}

}  // namespace

StateRecord::StateRecord(PyObject* containers, PyObject* ignored, PyObject* tensors, PyObject* sizes)
    : references_(checked(PyList_New(0))) {
  const Py_ssize_t container_count = PyList_Size(containers), tensor_count = PyList_Size(tensors);
  if (PyList_Size(ignored) != container_count) fail(PyExc_ValueError, "ignored: expected as many as containers");
  if (PyList_Size(sizes) != tensor_count) fail(PyExc_ValueError, "sizes: expected as many as tensors");
  for (Py_ssize_t i = 0; i < container_count; ++i) {
    add_container(keep(PyList_GetItem(containers, i)), PyList_GetItem(ignored, i));
  }
  for (Py_ssize_t i = 0; i < tensor_count; ++i) {
    PyObject* tensor = keep(PyList_GetItem(tensors, i));
    const auto version = version_of(tensor), address = address_of(tensor);
    if (!version || !address) {
      known_ = false;
      return;
    }
    const size_t size = PyLong_AsSize_t(PyList_GetItem(sizes, i));
    if (PyErr_Occurred()) throw PythonError{};
    tensors_.push_back({tensor, *address, *version});
    add_samples(static_cast<const std::byte*>(*address), size);
  }
}

void StateRecord::add_container(PyObject* container, PyObject* ignored) {
  if (PyDict_Check(container)) {
    PyObject *key, *value;
    Py_ssize_t position = 0, next = 0;
    for (; PyDict_Next(container, &next, &key, &value); position = next) {
      const int skip = PySequence_Contains(ignored, key);
      if (skip < 0) throw PythonError{};
      if (!skip) entries_.push_back({keep(key), keep(value), position});
    }
  } else if (PyList_Check(container)) {
    for (Py_ssize_t j = 0; j < PyList_Size(container); ++j) {
      entries_.push_back({nullptr, keep(PyList_GetItem(container, j)), j});
    }
  } else {
    fail(PyExc_TypeError, "containers: expected dictionaries and lists");
  }
  containers_.push_back({container, size_of(container), entries_.size()});
}

PyObject* StateRecord::keep(PyObject* object) {
  if (PyList_Append(references_.get(), object) != 0) throw PythonError{};
  return object;
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
        if (PyList_GetItem(container, entry.position) != entry.value) return false;
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
  Py_VISIT(references_.get());
  return 0;
}

void StateRecord::clear() {
  known_ = false;  // the pointers are not valid any more
  references_ = Reference(nullptr);
}

namespace {

// The Python object.
struct Object {
  PyObject_HEAD StateRecord* record;  // null until it is complete
};

StateRecord* record_of(PyObject* self) { return reinterpret_cast<Object*>(self)->record; }

PyObject* create(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  return call([&] {
    const char* names[] = {"containers", "ignored", "tensors", "sizes", nullptr};
    PyObject *containers, *ignored, *tensors, *sizes;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!O!O!O!", const_cast<char**>(names), &PyList_Type, &containers,
                                     &PyList_Type, &ignored, &PyList_Type, &tensors, &PyList_Type, &sizes)) {
      throw PythonError{};
    }
    auto record = std::make_unique<StateRecord>(containers, ignored, tensors, sizes);
    const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    PyObject* self = checked(allocate(type, 0));
    reinterpret_cast<Object*>(self)->record = record.release();
    return self;
  });
}

void destroy(PyObject* self) {
  PyObject_GC_UnTrack(self);
  delete record_of(self);
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return record_of(self) == nullptr ? 0 : record_of(self)->traverse(visit, arg);
}

int clear(PyObject* self) {
  if (record_of(self) != nullptr) record_of(self)->clear();
  return 0;
}

PyObject* unchanged(PyObject* self, PyObject*) {
  return call([&] { return PyBool_FromLong(record_of(self)->unchanged()); });
}

}  // namespace

void add_state_record(PyObject* module) {
  tensor_functions();  // not in a call, where threads could wait for each other
  static PyMethodDef methods[] = {{"unchanged", unchanged, METH_NOARGS, "Whether nothing has changed."}, {}};
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(create)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                                {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
                                {Py_tp_clear, reinterpret_cast<void*>(clear)},
                                {Py_tp_methods, methods},
                                {}};
  static PyType_Spec spec = {"hne_kernels._C.StateRecord", sizeof(Object), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                             slots};
  const Reference type(checked(PyType_FromSpec(&spec)));
  if (PyModule_AddObjectRef(module, "StateRecord", type.get()) != 0) throw PythonError{};
}

}  // namespace hne
