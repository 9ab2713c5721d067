// Philox4x32-10 against the known-answer vectors of its authors' library (Random123, kat_vectors).
#include <cstdio>

#include "kernels/common.cuh"

using chatterbox_fast::philox4x32_10;
using chatterbox_fast::Uint2;
using chatterbox_fast::Uint4;

namespace {

struct Case {
  Uint4 counter;
  Uint2 key;
  Uint4 expected;
};

constexpr Case kCases[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

}  // namespace

int main() {
  int failures = 0;
  for (const Case& c : kCases) {
    const Uint4 got = philox4x32_10(c.key, c.counter);
    const bool equal = got.x == c.expected.x && got.y == c.expected.y && got.z == c.expected.z &&
                       got.w == c.expected.w;
    if (!equal) {
      std::printf("philox4x32_10: got %08x %08x %08x %08x, expected %08x %08x %08x %08x\n", got.x,
                  got.y, got.z, got.w, c.expected.x, c.expected.y, c.expected.z, c.expected.w);
      ++failures;
    }
  }
  return failures == 0 ? 0 : 1;
}
