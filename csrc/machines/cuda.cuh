// A GPU as a Machine for the kernels of csrc/kernels: each of its functions is an instruction or a few.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../core/gpu_plan.h"
#include "../kernels/machine.h"

namespace dia::cuda {

// Packs are moved by instructions spelt out: left to the compiler, a pack made or used element by element became as
// many narrow accesses.
template <class T>
class Shared {
 public:
  __device__ __forceinline__ explicit Shared(unsigned begin) : begin_(begin) {}
  __device__ __forceinline__ T& operator[](int index) const {
    return *static_cast<T*>(__cvta_shared_to_generic(address(index)));
  }
  __device__ __forceinline__ Pack<T> pack(int index) const {
    Pack<T> pack;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
                 : "r"(address(index))
                 : "memory");
    return pack;
  }
  __device__ __forceinline__ unsigned address(int index) const {
    return begin_ + static_cast<unsigned>(index) * static_cast<unsigned>(sizeof(T));
  }

 private:
  unsigned begin_;
};

// kLaunchesNext: whether the kernel behind this one may be launched while this one runs. That is done as soon as the
// one before is over, so that of all kernels at most two run at a time, and what a third wrote is there.
template <bool kLaunchesNext>
class Machine {
 public:
  // Nothing is kept that a special register or a kernel's argument tells: registers are what is scarce.
  __device__ __forceinline__ explicit Machine(char* shared)
      : shared_(static_cast<unsigned>(__cvta_generic_to_shared(shared))) {}

  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int threads() const { return blockDim.x; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / 32; }
  __device__ __forceinline__ int warps() const { return blockDim.x / 32; }
  __device__ __forceinline__ int block() const { return blockIdx.x; }
  __device__ __forceinline__ int blocks() const { return gridDim.x; }

  __device__ __forceinline__ void sync_warp() { __syncwarp(); }
  __device__ __forceinline__ void sync_block() { __syncthreads(); }
  // Both halves order all memory, between the blocks of a cluster.
  __device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

  __device__ __forceinline__ static void wait_for_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if constexpr (kLaunchesNext) asm volatile("griddepcontrol.launch_dependents;");
#endif
  }

  template <class V>
  __device__ __forceinline__ static V warp_sum(V value, int stride = 1, int width = 32) {
    for (int step = width / 2; step >= stride; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
  }

  template <class T>
  __device__ __forceinline__ Shared<T> shared(int64_t count) {
    const Shared<T> array(shared_);
    shared_ += (static_cast<unsigned>(count) * static_cast<unsigned>(sizeof(T)) + 15u) / 16u * 16u;
    return array;
  }

  // Copies that pass no register, from sm_80 on.
  template <int kCount, class Array>
  __device__ __forceinline__ static void copy(const Array& array, int index, const float* from, int there) {
    static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#if __CUDA_ARCH__ >= 800
    if constexpr (kCount == 4)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(array.address(index)), "l"(from),
                   "r"(4 * there)
                   : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(array.address(index)), "l"(from),
                   "n"(4 * kCount), "r"(4 * there)
                   : "memory");
#else
#pragma unroll
    for (int k = 0; k < kCount; ++k) array[index + k] = k < there ? from[k] : 0.0f;
#endif
  }
  __device__ __forceinline__ static void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  template <int kPending>
  __device__ __forceinline__ static void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
  }

  template <class T>
  __device__ __forceinline__ static std::remove_const_t<T> load(T* from) {
    return *from;
  }
  template <class T>
  __device__ __forceinline__ static void store(T* to, T value) {
    *to = value;
  }
  template <class T>
  __device__ __forceinline__ static Pack<std::remove_const_t<T>> load_pack(T* from) {
    Pack<std::remove_const_t<T>> pack;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
                 : "l"(from));
    return pack;
  }
  template <class T>
  __device__ __forceinline__ static void store_pack(T* to, const Pack<T>& pack) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(pack.words[0]), "r"(pack.words[1]),
                 "r"(pack.words[2]), "r"(pack.words[3])
                 : "memory");
  }

  __device__ __forceinline__ static float widen(float value) { return value; }
  __device__ __forceinline__ static float widen(BFloat16 value) {
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
  }
  __device__ __forceinline__ static float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
  template <class T>
  __device__ __forceinline__ static T narrow(float value) {
    if constexpr (std::is_same_v<T, float>)
      return value;
    else if constexpr (std::is_same_v<T, BFloat16>)
      return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
    else
      return {__half_as_ushort(__float2half_rn(value))};
  }
  // Products on the tensor cores in tf32, whose eleven digits a value is split into twice: of the four products of the
  // parts the smallest is left out, 2^-22 of the whole. The large parts and the rest are added up apart, so that they
  // need not wait for each other. What is not finite may become NaN.
#if __CUDA_ARCH__ >= 800
  template <int kCount>
  struct Split {
    uint32_t high[kCount], low[kCount];

    __device__ __forceinline__ void set(int k, float value) {
      const uint32_t bits = __float_as_uint(value) & 0xffffe000u;
      high[k] = bits, low[k] = __float_as_uint(value - __uint_as_float(bits));
    }
  };
  using Left = Split<4>;
  using Right = Split<2>;
  template <class Array>
  __device__ __forceinline__ Left left(const Array& memory, int at, int element, int term) const {
    Left left;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      left.set(k, memory[at + (lane() % 4 + k / 2 * 4) * term + (lane() / 4 + k % 2 * 8) * element]);
    return left;
  }
  template <class Array>
  __device__ __forceinline__ Right right(const Array& memory, int at, int element, int term) const {
    Right right;
#pragma unroll
    for (int k = 0; k < 2; ++k) right.set(k, memory[at + (lane() % 4 + k * 4) * term + lane() / 4 * element]);
    return right;
  }
  __device__ __forceinline__ static void multiply(float (&large)[4], float (&small)[4], const Left& left,
                                                  const Right& right) {
    multiply(small, left.low, right.high);
    multiply(small, left.high, right.low);
    multiply(large, left.high, right.high);
  }
#else
  using Left = kernels::PlainSide;
  using Right = kernels::PlainSide;
  template <class Array>
  __device__ __forceinline__ Left left(const Array& memory, int at, int element, int term) const {
    return kernels::plain_side(memory, at + kernels::piece_row(*this, 0) * element,
                               at + kernels::piece_row(*this, 2) * element, term);
  }
  template <class Array>
  __device__ __forceinline__ Right right(const Array& memory, int at, int element, int term) const {
    return kernels::plain_side(memory, at + kernels::piece_column(*this, 0) * element,
                               at + kernels::piece_column(*this, 1) * element, term);
  }
  __device__ __forceinline__ static void multiply(float (&large)[4], float (&)[4], const Left& left,
                                                  const Right& right) {
    kernels::plain_multiply(large, left, right);
  }
#endif
  __device__ __forceinline__ static float exp(float value) { return expf(value); }
  __device__ __forceinline__ static float tanh(float value) { return tanhf(value); }
  __device__ __forceinline__ static float sqrt(float value) { return sqrtf(value); }

 private:
#if __CUDA_ARCH__ >= 800
  __device__ __forceinline__ static void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif

  unsigned shared_;  // where the next array begins: shared addresses have 32 bits
};

}  // namespace dia::cuda
