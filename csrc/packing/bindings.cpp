// The buffer protocol in, bytes or a caller's buffer out. Python has checked every argument but the buffers' kind.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <vector>

#include "packing/byte_shuffle.h"
#include "packing/codes.h"

namespace py = pybind11;

namespace pgolf {
namespace {

// A contiguous buffer of bytes, held for the scope. PyObject_GetBuffer raises for anything else.
class Bytes {
 public:
  Bytes(py::handle object, bool writable) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
      throw py::error_already_set();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
  int64_t size() const { return view_.len; }

 private:
  Py_buffer view_{};
};

using Shuffle = void (*)(uint8_t*, const uint8_t*, int64_t, int, Tail);

// Writes prefix and shuffled data to `out` and returns it; with out = None, to a new bytes object.
py::object shuffle(Shuffle kernel, py::object out, py::handle data, std::string_view prefix, int stride,
                   bool appended) {
  const Bytes source(data, false);
  const int64_t n = source.size(), skip = static_cast<int64_t>(prefix.size());
  const bool fresh = out.is_none();
  if (fresh) {
    out = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, n + skip));
    if (!out) throw py::error_already_set();
  }
  // A new bytes object may be written to while nobody else has seen it.
  const auto run = [&](uint8_t* to) {
    const uint8_t* from = source.data();
    if (n > 0 && to < from + n && from < to + skip + n) throw py::value_error("out: overlaps data");
    py::gil_scoped_release release;
    std::copy(prefix.begin(), prefix.end(), to);
    kernel(to + skip, from, n, stride, appended ? Tail::appended : Tail::strided);
  };
  if (fresh) {
    run(reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(out.ptr())));
  } else {
    const Bytes target(out, true);
    if (target.size() != n + skip) throw py::value_error("out: wrong size");
    run(target.data());
  }
  return out;
}

using Address = std::tuple<uintptr_t, int64_t, int64_t>;  // of a row-major int8 matrix, rows, columns

template <class T>
std::vector<Matrix<T>> matrices_at(const std::vector<Address>& addresses) {
  std::vector<Matrix<T>> matrices;
  for (const auto& [data, rows, cols] : addresses) matrices.push_back({reinterpret_cast<T*>(data), rows, cols});
  return matrices;
}

template <std::vector<uint8_t> (*Encode)(const ConstMatrices&, int)>
py::bytes encode(const std::vector<Address>& addresses, int threads) {
  std::vector<uint8_t> data;
  {
    py::gil_scoped_release release;
    data = Encode(matrices_at<const int8_t>(addresses), threads);
  }
  return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

}  // namespace

void bind_packing(py::module_& m) {
  m.def("byte_shuffle", [](py::object out, py::handle data, std::string_view prefix, int stride, bool appended) {
    return shuffle(byte_shuffle, std::move(out), data, prefix, stride, appended);
  });
  m.def("byte_unshuffle", [](py::object out, py::handle data, int stride, bool appended) {
    return shuffle(byte_unshuffle, std::move(out), data, {}, stride, appended);
  });
  m.def("encode_static", &encode<encode_static>);
  m.def("encode_context", &encode<encode_context>);
  m.def("decode_static", [](py::handle data, const std::vector<Address>& addresses, int) {
    const Bytes source(data, false);
    py::gil_scoped_release release;
    decode_static(source.data(), source.size(), matrices_at<int8_t>(addresses));
  });
  m.def("decode_context", [](py::handle data, const std::vector<Address>& addresses, int threads) {
    const Bytes source(data, false);
    py::gil_scoped_release release;
    decode_context(source.data(), source.size(), matrices_at<int8_t>(addresses), threads);
  });
}

}  // namespace pgolf
