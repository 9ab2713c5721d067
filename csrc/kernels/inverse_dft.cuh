// inverse_dft16: 16 real samples from the 9 bins of their spectrum, as torch.fft.irfft(n=16) makes.
//
//   16 x[n] = re[0] + (-1)^n re[8]
//             + 2 (sum over k = 1 .. 7 of re[k] cos(2 pi k n / 16) - im[k] sin(2 pi k n / 16))
//
// Number: float, or a vector of floats, a transform a lane. im[0] and im[8] are not read.
// Arithmetic: the sums over even and odd bins, of cosines and sines, are made for n <= 4; all other
// samples are their sums and differences. The same operations in the same order wherever it runs.
#pragma once

// Where the CPU op calls it from a function compiled for several CPUs, it must be compiled into it.
#ifdef __CUDACC__
#define CBF_ANYWHERE __host__ __device__ __forceinline__
#else
#define CBF_ANYWHERE __attribute__((always_inline)) inline
#endif

namespace chatterbox_fast {

constexpr int kDftSize = 16;
constexpr int kDftBins = kDftSize / 2 + 1;

constexpr float kCos1 = 0.92387953251128674f;  // cos(pi / 8)
constexpr float kCos2 = 0.70710678118654752f;  // cos(2 pi / 8)
constexpr float kCos3 = 0.38268343236508977f;  // cos(3 pi / 8)

// sums[n] = re[0] / 2 + (-1)^n re[8] / 2 + sum over k = 1 .. 7 of re[k] cos(2 pi k n / 16), n <= 8
template <typename Number>
CBF_ANYWHERE void cosine_sums(const Number (&re)[kDftBins], Number (&sums)[kDftBins]) {
  const Number ends = 0.5f * (re[0] + re[8]), between = 0.5f * (re[0] - re[8]);
  const Number near = re[2] + re[6], far = kCos2 * (re[2] - re[6]);
  const Number even[5] = {(ends + re[4]) + near, between + far, ends - re[4], between - far,
                          (ends + re[4]) - near};
  const Number outer = re[1] + re[7], inner = re[3] + re[5];
  const Number out = re[1] - re[7], in = re[3] - re[5];
  const Number odd[4] = {outer + inner, kCos1 * out + kCos3 * in, kCos2 * (outer - inner),
                         kCos3 * out - kCos1 * in};
  for (int n = 0; n < 4; ++n) {
    sums[n] = even[n] + odd[n];
    sums[8 - n] = even[n] - odd[n];
  }
  sums[4] = even[4];
}

// sums[n] = sum over k = 1 .. 7 of im[k] sin(2 pi k n / 16), for n = 1 .. 7
template <typename Number>
CBF_ANYWHERE void sine_sums(const Number (&im)[kDftBins], Number (&sums)[kDftBins - 1]) {
  const Number near = kCos2 * (im[2] + im[6]);
  const Number even[4] = {Number(), near + im[4], im[2] - im[6], near - im[4]};
  const Number outer = im[1] + im[7], inner = im[3] + im[5];
  const Number out = im[1] - im[7], in = im[3] - im[5];
  const Number odd[4] = {Number(), kCos3 * outer + kCos1 * inner, kCos2 * (out + in),
                         kCos1 * outer - kCos3 * inner};
  for (int n = 1; n < 4; ++n) {
    sums[n] = odd[n] + even[n];
    sums[8 - n] = odd[n] - even[n];
  }
  sums[4] = out - in;
}

template <typename Number>
CBF_ANYWHERE void inverse_dft16(const Number (&re)[kDftBins], const Number (&im)[kDftBins],
                                Number (&x)[kDftSize]) {
  constexpr float kScale = 2.0f / kDftSize;
  Number cosines[kDftBins], sines[kDftBins - 1];
  cosine_sums(re, cosines);
  sine_sums(im, sines);
  x[0] = kScale * cosines[0];
  x[8] = kScale * cosines[8];
  for (int n = 1; n < 8; ++n) {
    x[n] = kScale * (cosines[n] - sines[n]);
    x[16 - n] = kScale * (cosines[n] + sines[n]);
  }
}

}  // namespace chatterbox_fast
