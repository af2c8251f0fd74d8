/* A driver and an NVRTC that only say what a test wants to hear: ELLECI_STUB names the fault. Not a line of it computes. */
#include <stdlib.h>
#include <string.h>

#ifdef NVRTC
int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
#else
static int fault(const char *name) {
    const char *asked = getenv("ELLECI_STUB");
    return asked && strcmp(asked, name) == 0;
}

int cuDriverGetVersion(int *version) { *version = fault("old driver") ? 12040 : 13000; return 0; }
#ifndef BROKEN
int cuInit(unsigned flags) { (void)flags; return fault("no device") ? 100 : fault("mismatch") ? 803 : 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? (fault("old card") ? 7 : 8) : fault("old card") ? 5 : 0; /* 75 and 76: the compute capability */
    return 0;
}
int cuDeviceGetName(char *name, int len, int device) { (void)device; strncpy(name, "stub", (size_t)len); return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = context; return fault("taken") ? 46 : 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return 0; }
int cuCtxSetCurrent(void *context) { (void)context; return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    *total = 8ul << 30;
    *free = fault("small card") ? 1ul << 28 : 6ul << 30;
    return fault("ecc") ? 214 : 0;
}
int cuGetErrorName(int error, const char **name) { (void)error; *name = "STUB"; return 0; }
int cuGetErrorString(int error, const char **text) { (void)error; *text = "a fault of the stub"; return 0; }
#endif
#endif
