// A record of Python objects, tensors and memory, to notice changed parameters quickly.
#pragma once

#include <cstddef>
#include <vector>

#include "python.h"

namespace hne {

class StateRecord {
 public:
  // Each argument is a list.
  // containers: dictionaries and lists, whose lengths and entries are recorded (the identity of the objects).
  // ignored: for each container a frozenset of keys whose entries are not recorded.
  // tensors: their addresses and version counters are recorded,
  // sizes: and samples of so many bytes of memory; 0 for tensors whose memory cannot be read.
  StateRecord(PyObject* containers, PyObject* ignored, PyObject* tensors, PyObject* sizes);

  // Whether nothing has changed; false if a tensor has no version counter.
  bool unchanged() const;

  // For Python's garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Container {
    PyObject* object;
    Py_ssize_t size;
    size_t end;  // of its entries in entries_
  };
  struct Entry {
    PyObject* key;  // null in a list
    PyObject* value;
    Py_ssize_t position;
  };
  struct TensorState {
    PyObject* tensor;
    void* address;
    void* version;
  };
  struct Sample {
    const std::byte* address;
    size_t offset;  // of the copy in bytes_
    size_t size;
  };

  void add_container(PyObject* container, PyObject* ignored);
  PyObject* keep(PyObject* object);
  void add_samples(const std::byte* address, size_t size);
  bool same_entries() const;
  bool same_tensors() const;
  bool same_memory() const;

  Reference references_;  // a list, which keeps all objects alive, to which the other members refer
  std::vector<Container> containers_;
  std::vector<Entry> entries_;
  std::vector<TensorState> tensors_;
  std::vector<Sample> samples_;
  std::vector<std::byte> bytes_;
  bool known_ = true;  // whether all tensors have an address and a version
};

// Adds the class to the Python module.
void add_state_record(PyObject* module);

}  // namespace hne
