/* libcuda.so.1 without a GPU: what Triton's driver and launcher call, where a launch is noted and nothing runs.
   bench/fake_gpu.py builds it, loads it in the place of NVIDIA's, and reads `launches`. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef uint64_t Word;

enum { PARAMETERS = 192, FUNCTIONS = 1 << 16, FIRST_FUNCTION = 0x1000 };

typedef struct {
  Word function, stream;
  uint32_t grid[3], block[3], shared, count;
  Word parameters[PARAMETERS]; /* the first bytes of each, 8 at most */
} Launch;

long launched;   /* since the process began */
int recording;   /* whether launches are kept, too */
int shared_limit = 232448, multiprocessors = 132;
long n_launches; /* kept */
Launch* launches;

static long room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t functions;
static uint32_t counts[FUNCTIONS];
static uint8_t sizes[FUNCTIONS][PARAMETERS];

/* How many parameters a function has, and the bytes of each. */
int describe(Word function, uint32_t count, const uint8_t* of_each) {
  const Word i = (function - FIRST_FUNCTION) / 16;
  if (i >= functions || count > PARAMETERS) return 1;
  memcpy(sizes[i], of_each, count);
  counts[i] = count;
  return 0;
}

void forget(void) { n_launches = 0; }

typedef struct {
  uint32_t grid[3], block[3], shared;
  Word stream;
} Config; /* the beginning of CUlaunchConfig */

Result cuLaunchKernelEx(const Config* config, Word function, void** parameters, void** extra) {
  __atomic_add_fetch(&launched, 1, __ATOMIC_RELAXED);
  if (!recording) return 0;
  pthread_mutex_lock(&lock);
  if (n_launches == room) {
    room = room ? 2 * room : 64;
    launches = realloc(launches, room * sizeof(Launch));
  }
  Launch* l = &launches[n_launches++];
  memset(l, 0, sizeof(Launch));
  memcpy(l->grid, config->grid, sizeof l->grid);
  memcpy(l->block, config->block, sizeof l->block);
  l->shared = config->shared, l->stream = config->stream, l->function = function;
  const Word i = (function - FIRST_FUNCTION) / 16;
  l->count = i < functions ? counts[i] : 0;
  for (uint32_t k = 0; k < l->count; ++k) memcpy(&l->parameters[k], parameters[k], sizes[i][k]);
  pthread_mutex_unlock(&lock);
  return 0;
}

Result cuModuleGetFunction(Word* function, void* module, const char* name) {
  if (functions == FUNCTIONS) return 2; /* CUDA_ERROR_OUT_OF_MEMORY */
  *function = FIRST_FUNCTION + 16 * (Word)functions++;
  return 0;
}

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 8: *value = 49152; break;    /* shared memory of a block without opting in */
    case 10: *value = 32; break;      /* threads of a warp */
    case 16: *value = multiprocessors; break;
    default: *value = shared_limit; break; /* 97: shared memory of a block */
  }
  return 0;
}

/* Refuses what a driver refuses (CUDA driver API, cuTensorMapEncodeTiled). The map begins with the address that it describes,
   for `parameters`. */
Result cuTensorMapEncodeTiled(
    void* map, int type, uint32_t rank, void* address, const Word* sizes, const Word* strides, const uint32_t* box,
    const uint32_t* steps, int interleave, int swizzle, int promotion, int fill) {
  static const uint8_t bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}; /* of a CUtensorMapDataType */
  if (type < 0 || type > 12 || rank < 1 || rank > 5 || (Word)address % 16) return 1; /* CUDA_ERROR_INVALID_VALUE */
  for (uint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > (Word)1 << 32 || box[i] < 1 || box[i] > 256) return 1;
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= (Word)1 << 40)) return 1;
  }
  const uint32_t row = box[0] * bytes[type];
  if (row % 16 || (swizzle && row > 16u << swizzle)) return 1; /* 32, 64, 128 bytes */
  memset(map, 0, 128);
  memcpy(map, &address, sizeof address);
  return 0;
}

Result cuTensorMapEncodeIm2col(void* map, ...) { return 801; /* CUDA_ERROR_NOT_SUPPORTED: nobody here asks for it */ }

Result cuFuncGetAttribute(int* value, int attribute, Word function) { return *value = attribute == 0 ? 1024 : 0, 0; }
Result cuGetErrorString(Result error, const char** text) { return *text = "an error of the fake libcuda", 0; }
Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int* version) { return *version = 13000, 0; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
Result cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, 0; }
Result cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
Result cuCtxSetCurrent(void* context) { return 0; }
Result cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuModuleLoadData(void** module, const void* image) { return *module = (void*)2, 0; }
Result cuFuncSetCacheConfig(Word function, int config) { return 0; }
Result cuFuncSetAttribute(Word function, int attribute, int value) { return 0; }
Result cuOccupancyMaxActiveClusters(int* clusters, Word function, const Config* config) { return *clusters = 1, 0; }
Result cuPointerGetAttribute(void* value, int attribute, Word pointer) { return memcpy(value, &pointer, sizeof pointer), 0; }
