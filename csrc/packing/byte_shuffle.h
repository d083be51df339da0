// Byte transposition of an array of fixed-size items: plane b holds byte b of every item.
#pragma once
#include <cstdint>

namespace pgolf {

constexpr int kMaxStride = 16;

// Where the n % stride last bytes go: `strided` gives them to the first planes (out = in[0::s], in[1::s], ...),
// `appended` leaves them behind the planes.
enum class Tail { strided, appended };

// dst and src hold n bytes each and do not overlap; 1 <= stride <= kMaxStride.
void byte_shuffle(uint8_t* dst, const uint8_t* src, int64_t n, int stride, Tail tail);
void byte_unshuffle(uint8_t* dst, const uint8_t* src, int64_t n, int stride, Tail tail);

}  // namespace pgolf
