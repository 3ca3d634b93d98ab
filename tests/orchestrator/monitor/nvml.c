/* The part of NVIDIA's management library that is asked: two GPUs of 80 GiB. Of the second one nothing is known while
   the file that FAKE_NVML_LOST names exists. */
#include <stdlib.h>
#include <unistd.h>

struct memory { unsigned long long total, free, used; };

int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "GPU is lost"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(long)(index + 1); return 0; }

int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
    const char *lost = getenv("FAKE_NVML_LOST");
    if ((long)device == 2 && lost && access(lost, F_OK) == 0)
        return 15; /* NVML_ERROR_GPU_IS_LOST */
    memory->total = 80ULL << 30;
    memory->used = (unsigned long long)(long)device << 30;
    memory->free = memory->total - memory->used;
    return 0;
}
