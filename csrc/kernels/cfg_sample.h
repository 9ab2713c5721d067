// The arguments and the launcher of cfg_sample.cuh, as a host's compiler may see them. For what
// they mean see there.
#pragma once

#include "types.h"

namespace chatterbox_fast {

template <typename T>
struct CfgSampleArgs {
  const T* logits;
  bool* seen;
  const float* params;
  int* flags;
  long long* philox;
  const int* stop_action;  // null: no row has one
  long long* token;
  int rows, vocabulary, stop_token, forget, philox_threads;
  bool guided, turbo;
};

// Compiled for every dtype by cfg_sample.cu.
template <typename T>
rt::Error launch_cfg_sample(const CfgSampleArgs<T>& args, rt::Stream stream);

}  // namespace chatterbox_fast
