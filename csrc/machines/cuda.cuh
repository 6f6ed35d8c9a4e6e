// A GPU as a Machine for the kernels of csrc/kernels: each of its functions is an instruction or a few.
//
// A team is a block, a cluster (compute capability 9.0 and later), or blocks that meet at a counter in global memory.
// The counters belong to one call: zero when the kernel starts, and such a kernel is launched cooperatively, so that
// all blocks of a team are resident. Fences: a barrier in global memory releases before it counts and acquires after it
// has seen all; the barriers of a block and of a cluster do both by themselves.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../kernels/machine.h"

namespace dia::cuda {

enum class Team { block, cluster, grid };

// Packs are moved by instructions spelt out: left to the compiler, a pack made or used element by element became as
// many narrow accesses.
template <class T>
__device__ __forceinline__ uint4 words_of(const Pack<T>& pack) {
  uint4 words;
  memcpy(&words, &pack, sizeof(words));
  return words;
}
template <class T>
__device__ __forceinline__ Pack<T> pack_of(const uint4& words) {
  Pack<T> pack;
  memcpy(&pack, &words, sizeof(pack));
  return pack;
}

template <class T>
class Shared {
 public:
  __device__ __forceinline__ explicit Shared(T* data) : data_(data) {}
  __device__ __forceinline__ T& operator[](int64_t index) const { return data_[index]; }
  __device__ __forceinline__ Pack<T> pack(int64_t index) const {
    uint4 words;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(address(index))
                 : "memory");
    return pack_of<T>(words);
  }
  __device__ __forceinline__ void set_pack(int64_t index, const Pack<T>& pack) const {
    const uint4 words = words_of(pack);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address(index)), "r"(words.x), "r"(words.y),
                 "r"(words.z), "r"(words.w)
                 : "memory");
  }

 private:
  __device__ __forceinline__ unsigned address(int64_t index) const {
    return static_cast<unsigned>(__cvta_generic_to_shared(data_ + index));
  }

  T* data_;
};

template <Team kTeam>
class Machine {
 public:
  // `counters`: one for each team, zero; read by teams of blocks that meet in global memory.
  __device__ __forceinline__ Machine(int ranks, char* shared, unsigned* counters)
      : ranks_(kTeam == Team::block ? 1 : ranks),
        rank_(blockIdx.x % ranks_),
        team_(blockIdx.x / ranks_),
        shared_(shared),
        counter_(kTeam == Team::grid ? counters + team_ : nullptr) {}

  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int threads() const { return blockDim.x; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / 32; }
  __device__ __forceinline__ int warps() const { return blockDim.x / 32; }
  __device__ __forceinline__ int rank() const { return rank_; }
  __device__ __forceinline__ int ranks() const { return ranks_; }
  __device__ __forceinline__ int team() const { return team_; }
  __device__ __forceinline__ int teams() const { return gridDim.x / ranks_; }

  __device__ __forceinline__ void sync_warp() { __syncwarp(); }
  __device__ __forceinline__ void sync_block() { __syncthreads(); }
  __device__ __forceinline__ void sync_team() {
    if constexpr (kTeam == Team::block) {
      __syncthreads();
    } else if constexpr (kTeam == Team::cluster) {
#if __CUDA_ARCH__ >= 900
      asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
      __trap();  // never launched: the plan knows which GPUs have clusters
#endif
    } else {
      __syncthreads();
      if (threadIdx.x == 0) {
        awaited_ += ranks_;
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        atomicAdd(counter_, 1u);
        unsigned seen;
        do {
          asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter_) : "memory");
        } while (seen < awaited_);
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ static float warp_sum(float value, int stride = 1) {
    for (int step = 16; step >= stride; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
  }

  template <class T>
  __device__ __forceinline__ Shared<T> shared(int64_t count) {
    T* data = reinterpret_cast<T*>(shared_);
    shared_ += (count * sizeof(T) + 15) / 16 * 16;
    return Shared<T>(data);
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
    uint4 words;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from));
    return pack_of<std::remove_const_t<T>>(words);
  }
  template <class T>
  __device__ __forceinline__ static void store_pack(T* to, const Pack<T>& pack) {
    const uint4 words = words_of(pack);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
                 "r"(words.w)
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
  __device__ __forceinline__ static float exp(float value) { return expf(value); }
  __device__ __forceinline__ static float tanh(float value) { return tanhf(value); }
  __device__ __forceinline__ static float sqrt(float value) { return sqrtf(value); }

 private:
  int ranks_, rank_, team_;
  char* shared_;
  unsigned* counter_;
  unsigned awaited_ = 0;
};

}  // namespace dia::cuda
