// The arguments and the launcher of padded_attention.cuh, as a host's compiler may see them. For
// what they mean see there.
#pragma once

#include "types.h"

namespace chatterbox_fast {

constexpr int kPaddedHead = 64;  // elements

template <typename T>
struct PaddedAttentionArgs {
  const T* qkv;
  const int* lengths;
  T* out;
  int rows, positions, heads;
  int tiles;  // blocks a row and head; set by launch_padded_attention
};

// Compiled for every dtype by padded_attention.cu.
template <typename T, bool kTensor = sizeof(T) == 2>
rt::Error launch_padded_attention(PaddedAttentionArgs<T> args, rt::Stream stream);

}  // namespace chatterbox_fast
