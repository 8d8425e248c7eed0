// Python's C API, limited to the part that is the same in every version from 3.10 on: one library serves them all.
#pragma once

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <exception>
#include <utility>

namespace hne {

// Thrown after a call of Python has failed and left Python's error behind.
struct PythonError {};

// The result of a call of Python, which is null after an error.
inline PyObject* checked(PyObject* result) {
  if (result == nullptr) throw PythonError{};
  return result;
}

// An owned reference to an object, or null.
class Reference {
 public:
  explicit Reference(PyObject* owned) : object_(owned) {}
  Reference(Reference&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Reference& operator=(Reference&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Reference() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// Returns f(); a C++ exception becomes Python's error.
template <typename F>
PyObject* call(const F& f) noexcept {
  try {
    return f();
  } catch (const PythonError&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace hne
