// The plans of the GPU step, as JSON, for `python -m dia_kernels info --plan`. Needs neither a GPU nor torch.
#include <cstring>
#include <sstream>
#include <string>

#include "../core/gpu_plan.h"

// The names of the GPUs that plans are known for, one a line.
extern "C" __attribute__((visibility("default"))) const char* dia_kernels_gpus() {
  static const std::string text = [] {
    std::string names;
    for (const dia::GpuLimits& gpu : dia::kGpus) names += std::string(names.empty() ? "" : "\n") + gpu.name;
    return names;
  }();
  return text.c_str();
}

// The plan for a problem, see core/gpu_plan.h. Null where no GPU has that name. The text is the calling thread's until
// its next call.
extern "C" __attribute__((visibility("default"))) const char* dia_kernels_plan(
    const char* gpu_name, int64_t samples, int64_t channels, int64_t positions, int64_t bottleneck, int element_bytes,
    int interleaved, int aligned, int combined, int masked, int backward, int tf32, int norm, int layouts) {
  for (const dia::GpuLimits& gpu : dia::kGpus) {
    if (std::strcmp(gpu.name, gpu_name) != 0) continue;
    const dia::GpuPlan plan =
        dia::plan_step({samples, channels, positions, bottleneck, element_bytes, interleaved != 0, aligned != 0,
                        combined != 0, backward != 0, tf32 != 0, static_cast<dia::GpuNorm>(norm), masked != 0},
                       gpu, static_cast<dia::GpuLayouts>(layouts));
    std::ostringstream json;
    json.precision(17);
    static constexpr const char* kCells[] = {"tiles", "products", "clusters"};
    json << "{\"cell\": \"" << kCells[static_cast<int>(plan.cell)] << "\", \"chunk\": " << plan.chunk
         << ", \"together\": " << plan.together << ", \"launches\": " << plan.launches
         << ", \"passes\": " << plan.passes << ", \"bytes\": " << plan.bytes << ", \"seconds\": " << plan.seconds
         << ", \"ideal_seconds\": " << plan.ideal << "}";
    static thread_local std::string text;
    text = json.str();
    return text.c_str();
  }
  return nullptr;
}
