// Temporary buffers of a pass in one allocation, each aligned to a cache line.
//
// A plan is a function that takes every buffer from a Carver. Run over a null base it adds up the bytes; run over the
// allocation it sets the pointers. So sizes are written once.
#pragma once
#include <stdint.h>

namespace prefopt {

class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

template <class Plan>
int64_t bytes_of(const Plan& plan) {
  Carver sizes(nullptr);
  plan(sizes);
  return sizes.bytes();
}

class Scratchpad {
 public:
  template <class Plan>
  explicit Scratchpad(const Plan& plan) : storage_(new char[static_cast<uint64_t>(bytes_of(plan)) + 63]) {
    Carver buffers(storage_ + (64 - reinterpret_cast<uintptr_t>(storage_) % 64) % 64);
    plan(buffers);
  }
  ~Scratchpad() { delete[] storage_; }
  Scratchpad(const Scratchpad&) = delete;
  Scratchpad& operator=(const Scratchpad&) = delete;

 private:
  char* storage_;
};

}  // namespace prefopt
