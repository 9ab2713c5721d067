// Every op of the extension: its schema, in one table. The list of what chatterbox_fast::* can do.
// Backends register their kernels in cpu/OP.cpp and cuda/OP.cpp, each with TORCH_LIBRARY_IMPL.
#include <torch/library.h>

TORCH_LIBRARY(chatterbox_fast, library) {
  library.def(
      "cfg_sample(Tensor logits, Tensor(a!) seen, Tensor params, Tensor(b!) flags, "
      "Tensor(c!)? philox=None, Tensor? stop_action=None, Generator? generator=None, *, "
      "int stop_token, bool turbo=False, int forget=-1, int philox_threads=0) -> Tensor");
  library.def(
      "skinny_linear(Tensor x, Tensor weight, Tensor? scale=None, Tensor? norm=None, "
      "Tensor? residual=None, *, float eps=0., bool gated=False) -> Tensor");
  library.def(
      "decode_attention(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor position, "
      "Tensor(c!) flags, Tensor? cos=None, Tensor? sin=None, Tensor? watched=None, "
      "Tensor(d!)? probabilities=None, Tensor(e!)? arrivals=None, *, int splits=0) -> Tensor");
  library.def(
      "resample(Tensor waveform, Tensor filters, Tensor? first=None, *, int stride, int left, "
      "SymInt length) -> Tensor");
  library.def("istft(Tensor spectrum, Tensor window, float limit) -> Tensor");
  library.def("padded_attention(Tensor qkv, Tensor lengths, int heads) -> Tensor");
  library.def(
      "add_norm(Tensor x, Tensor weight, Tensor bias, Tensor(a!)? residual=None, "
      "Tensor? offset=None, Tensor? shift=None, *, float eps, bool mish=False, "
      "ScalarType? dtype=None) -> Tensor");
  library.def(
      "snake(Tensor x, Tensor alpha, Tensor inverse, Tensor(a!)? residual=None, "
      "Tensor? offset=None) -> Tensor");
}
