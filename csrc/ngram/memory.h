#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pgolf::ngram {

// Zeroed memory that the system hands out page by page as it is touched, in huge pages where it has them: random
// accesses then miss the TLB far less. Contents must be plain numbers for which all zero bits is a value.
template <class T>
class ZeroedArray {
 public:
  ZeroedArray() = default;
  explicit ZeroedArray(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(T)) {
    if (count == 0) return;
#if defined(__linux__)
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, bytes_, MADV_HUGEPAGE);
#else
    void* memory = std::calloc(bytes_, 1);
    if (memory == nullptr) throw std::bad_alloc();
#endif
    data_ = static_cast<T*>(memory);
  }
  ZeroedArray(ZeroedArray&& other) noexcept { swap(other); }
  ZeroedArray& operator=(ZeroedArray&& other) noexcept {
    ZeroedArray taken(std::move(other));
    swap(taken);
    return *this;
  }
  ~ZeroedArray() {
    if (data_ == nullptr) return;
#if defined(__linux__)
    munmap(data_, bytes_);
#else
    std::free(data_);
#endif
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  void swap(ZeroedArray& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  T* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace pgolf::ngram
