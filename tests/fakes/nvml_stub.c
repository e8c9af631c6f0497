/* A stand-in for libnvidia-ml.so.1, below the real binding (pynvml). Its world is the file that NVML_STUB_STATE names, read
 * anew at a call when it is another one: tests change it by renaming a new file over it:
 *
 *     driver 570.86.15
 *     init 9                                  nvmlInit answers this code (9 not loaded, 18 versions differ)
 *     all 1                                   every other call answers this code
 *     hang nvmlDeviceGetTemperature           that call (or `*`) does not return for as long as this line stands there
 *     fails nvmlDeviceGetFieldValues 999      that call answers this code
 *     event 1 0 79                            number (counting up), GPU, Xid: given once to whoever waits for events
 *     gpu 0 uuid GPU-...                      and so on; a figure without a line is NOT_SUPPORTED
 *     gpu 0 fails 15                          every call on that GPU answers this code (15 lost, 16 reset required)
 *
 * Lines of a GPU: uuid pci name memory(total free reserved, MiB) process(pid MiB; several) graphics(pid MiB; several)
 * temperature power(mW) clocks utilization pstate capability(major minor) ecc(corrected uncorrected) retired remapped(corrected
 * uncorrected pending failed) field(id value; several) fabric(state status) pcie(gen width maxgen maxwidth) mig(uuid total
 * free; several). Layouts are those of the binding.
 */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef unsigned int u32;
typedef unsigned long long u64;
enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, TIMEOUT = 10, VERSION = 25 };
enum { GPUS = 64, PARTS = 8 };

struct device { int gpu, part; };
static struct device devices[GPUS], parts[GPUS][PARTS];
struct set { char wanted[GPUS]; long seen; };
static struct set sets[16];
static int sets_used, inited;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread char text[1 << 17];

static void load(void) {
    static __thread struct stat known;
    struct stat now;
    const char *path = getenv("NVML_STUB_STATE");
    if (path && !stat(path, &now)) { /* another file each time: what the stub costs should not be what the driver is thought to cost */
        if (now.st_ino == known.st_ino && now.st_mtim.tv_nsec == known.st_mtim.tv_nsec && now.st_mtim.tv_sec == known.st_mtim.tv_sec) return;
        known = now;
    }
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    size_t have = 0;
    ssize_t got;
    while (fd >= 0 && have < sizeof text - 1 && (got = read(fd, text + have, sizeof text - 1 - have)) > 0) have += (size_t)got;
    text[have] = 0;
    if (fd >= 0) close(fd);
}

/* What stands behind `prefix` in its nth line; NULL for none. */
static const char *nth(const char *prefix, int n) {
    size_t size = strlen(prefix);
    for (const char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
        if (!strncmp(line, prefix, size) && (line[size] == ' ' || line[size] == '\n') && n-- == 0) return line + size + (line[size] == ' ');
    return NULL;
}

static const char *of(int gpu, const char *key, int n) {
    char prefix[128];
    snprintf(prefix, sizeof prefix, "gpu %d %s", gpu, key);
    return nth(prefix, n);
}

static int number(const char *prefix) {
    const char *found = nth(prefix, 0);
    return found ? atoi(found) : 0;
}

static void nap(long ms) {
    struct timespec wait = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&wait, NULL);
}

static int hangs(const char *call) {
    char one[128];
    snprintf(one, sizeof one, "hang %s", call);
    return nth(one, 0) != NULL || nth("hang *", 0) != NULL;
}

static int enter_any(const char *call) {
    char one[128];
    for (load(); hangs(call); load()) nap(20);
    snprintf(one, sizeof one, "fails %s", call);
    return number(one);
}

static int enter(const char *call) {
    int code = enter_any(call);
    if (!inited) return UNINITIALIZED;
    return code ? code : number("all");
}

static int enter_gpu(const char *call, struct device *device) {
    int code = enter(call);
    if (code) return code;
    if (!device) return INVALID;
    const char *fails = of(device->gpu, "fails", 0);
    return fails ? atoi(fails) : OK;
}

static int word(const char *from, char *to, u32 size) {
    u32 at = 0;
    if (!from) return NOT_SUPPORTED;
    while (from[at] && from[at] != '\n' && at + 1 < size) to[at] = from[at], at++;
    to[at] = 0;
    return OK;
}

static int numbers(struct device *device, const char *key, int n, u64 *out, int count) {
    const char *at = of(device->gpu, key, n);
    if (!at) return NOT_SUPPORTED;
    for (int i = 0; i < count; i++) {
        char *end;
        out[i] = strtoull(at, &end, 0);
        at = end;
    }
    return OK;
}

static int one(const char *call, struct device *device, const char *key, int at, u32 *out) {
    u64 found[4] = {0};
    int code = enter_gpu(call, device);
    if (!code && !(code = numbers(device, key, 0, found, 4))) *out = (u32)found[at];
    return code;
}

static int gpu_count(void) {
    int count = 0;
    while (count < GPUS && of(count, "uuid", 0)) count++;
    return count;
}

int nvmlInitWithFlags(u32 flags) {
    (void)flags;
    int code = enter_any("nvmlInit");
    if (!code) code = number("init");
    if (code) return code;
    for (int i = 0; i < GPUS; i++) {
        devices[i] = (struct device){i, -1};
        for (int j = 0; j < PARTS; j++) parts[i][j] = (struct device){i, j};
    }
    inited++;
    return OK;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return inited ? inited--, OK : UNINITIALIZED; }
const char *nvmlErrorString(int code) { (void)code; return "stub"; }
int nvmlSystemGetDriverVersion(char *out, u32 size) { int code = enter(__func__); return code ? code : word(nth("driver", 0), out, size); }
int nvmlDeviceGetCount_v2(u32 *out) { int code = enter("nvmlDeviceGetCount"); if (!code) *out = (u32)gpu_count(); return code; }

int nvmlDeviceGetHandleByIndex_v2(u32 index, struct device **out) {
    int code = enter("nvmlDeviceGetHandleByIndex");
    if (code) return code;
    if ((int)index >= gpu_count()) return INVALID;
    if ((code = enter_gpu("nvmlDeviceGetHandleByIndex", &devices[index]))) return code;
    *out = &devices[index];
    return OK;
}

int nvmlDeviceGetIndex(struct device *device, u32 *out) { int code = enter_gpu(__func__, device); if (!code) *out = (u32)device->gpu; return code; }
int nvmlDeviceGetName(struct device *device, char *out, u32 size) { int code = enter_gpu(__func__, device); return code ? code : word(of(device->gpu, "name", 0), out, size); }

int nvmlDeviceGetUUID(struct device *device, char *out, u32 size) {
    int code = enter_gpu(__func__, device);
    if (code) return code;
    code = word(of(device->gpu, device->part < 0 ? "uuid" : "mig", device->part < 0 ? 0 : device->part), out, size);
    if (!code && device->part >= 0) out[strcspn(out, " ")] = 0;
    return code;
}

struct pci { char legacy[16]; u32 domain, bus, device, id, sub; char bus_id[32]; };
int nvmlDeviceGetPciInfo_v3(struct device *device, struct pci *out) {
    int code = enter_gpu("nvmlDeviceGetPciInfo", device);
    if (code || (code = word(of(device->gpu, "pci", 0), out->bus_id, sizeof out->bus_id))) return code;
    sscanf(out->bus_id, "%x:%x:%x", &out->domain, &out->bus, &out->device);
    snprintf(out->legacy, sizeof out->legacy, "%04X:%02X:%02X.0", out->domain & 0xffff, out->bus & 0xff, out->device & 0xff);
    return OK;
}

static int memory(struct device *device, u64 *total, u64 *reserved, u64 *free_, u64 *used) {
    u64 found[3] = {0};
    const char *part = device->part >= 0 ? of(device->gpu, "mig", device->part) : NULL;
    if (part) {
        sscanf(part + strcspn(part, " "), "%llu %llu", &found[0], &found[1]);
    } else if (numbers(device, "memory", 0, found, 3)) return NOT_SUPPORTED;
    *total = found[0] << 20, *free_ = found[1] << 20, *reserved = found[2] << 20;
    *used = *total - *free_ - *reserved;
    return OK;
}
struct memory1 { u64 total, free, used; };
struct memory2 { u32 version; u64 total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo(struct device *device, struct memory1 *out) {
    u64 reserved;
    int code = enter_gpu(__func__, device);
    if (!code && !(code = memory(device, &out->total, &reserved, &out->free, &out->used))) out->used += reserved;
    return code;
}
int nvmlDeviceGetMemoryInfo_v2(struct device *device, struct memory2 *out) {
    int code = enter_gpu("nvmlDeviceGetMemoryInfo", device);
    if (code) return code;
    return out->version != (2u << 24 | sizeof *out) ? VERSION : memory(device, &out->total, &out->reserved, &out->free, &out->used);
}

struct process { u32 pid; u64 used; u32 gi, ci; };
static int processes(const char *call, struct device *device, const char *key, u32 *count, struct process *out) {
    u32 have = 0, room = *count;
    u64 found[2] = {0};
    int code = enter_gpu(call, device);
    if (code) return code;
    for (; !numbers(device, key, (int)have, found, 2); have++)
        if (out && have < room) out[have] = (struct process){(u32)found[0], found[1] ? found[1] << 20 : ~0ull, ~0u, ~0u};
    *count = have;
    return have > room || (!out && have) ? TOO_SMALL : OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(struct device *d, u32 *n, struct process *out) { return processes("nvmlDeviceGetComputeRunningProcesses", d, "process", n, out); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(struct device *d, u32 *n, struct process *out) { return processes("nvmlDeviceGetGraphicsRunningProcesses", d, "graphics", n, out); }

int nvmlDeviceGetTemperature(struct device *d, int sensor, u32 *out) { (void)sensor; return one(__func__, d, "temperature", 0, out); }
int nvmlDeviceGetPowerUsage(struct device *d, u32 *out) { return one(__func__, d, "power", 0, out); }
int nvmlDeviceGetPerformanceState(struct device *d, u32 *out) { return one(__func__, d, "pstate", 0, out); }
int nvmlDeviceGetCurrPcieLinkGeneration(struct device *d, u32 *out) { return one(__func__, d, "pcie", 0, out); }
int nvmlDeviceGetCurrPcieLinkWidth(struct device *d, u32 *out) { return one(__func__, d, "pcie", 1, out); }
int nvmlDeviceGetMaxPcieLinkGeneration(struct device *d, u32 *out) { return one(__func__, d, "pcie", 2, out); }
int nvmlDeviceGetMaxPcieLinkWidth(struct device *d, u32 *out) { return one(__func__, d, "pcie", 3, out); }

static int clocks(struct device *device, u64 *out) {
    int code = enter_gpu("nvmlDeviceGetCurrentClocksEventReasons", device);
    return code ? code : numbers(device, "clocks", 0, out, 1);
}
int nvmlDeviceGetCurrentClocksThrottleReasons(struct device *d, u64 *out) { return clocks(d, out); }
int nvmlDeviceGetCurrentClocksEventReasons(struct device *d, u64 *out) { return clocks(d, out); }
int nvmlDeviceGetUtilizationRates(struct device *d, u32 *out) { out[1] = 0; return one(__func__, d, "utilization", 0, out); }
int nvmlDeviceGetCudaComputeCapability(struct device *d, int *major, int *minor) { int code = one(__func__, d, "capability", 0, (u32 *)major); return code ? code : one(__func__, d, "capability", 1, (u32 *)minor); }

int nvmlDeviceGetTotalEccErrors(struct device *device, int kind, int counter, u64 *out) {
    u64 found[2] = {0};
    (void)counter;
    int code = enter_gpu(__func__, device);
    if (!code && !(code = numbers(device, "ecc", 0, found, 2))) *out = found[kind & 1];
    return code;
}

int nvmlDeviceGetRetiredPages(struct device *device, int source, u32 *count, u64 *out) {
    u64 have = 0;
    u32 room = *count;
    int code = enter_gpu(__func__, device);
    if (code || (code = numbers(device, "retired", 0, &have, 1))) return code;
    if (source == 1) have = 0; /* all of them by the first cause */
    *count = (u32)have;
    for (u32 i = 0; out && i < have && i < room; i++) out[i] = i << 12;
    return have > room ? TOO_SMALL : OK;
}

int nvmlDeviceGetRemappedRows(struct device *device, u32 *corrected, u32 *uncorrected, u32 *pending, u32 *failed) {
    u64 found[4] = {0};
    int code = enter_gpu(__func__, device);
    if (code || (code = numbers(device, "remapped", 0, found, 4))) return code;
    *corrected = (u32)found[0], *uncorrected = (u32)found[1], *pending = (u32)found[2], *failed = (u32)found[3];
    return OK;
}

struct field { u32 id, scope; long long at, latency; u32 type; int result; union { double d; u32 ui; u64 ull; } value; };
int nvmlDeviceGetFieldValues(struct device *device, int count, struct field *out) {
    int code = enter_gpu(__func__, device);
    for (int i = 0; !code && i < count; i++) {
        char key[32];
        u64 found = 0;
        snprintf(key, sizeof key, "field %u", out[i].id);
        out[i].result = numbers(device, key, 0, &found, 1);
        out[i].type = out[i].id == 230 ? 1 : 3; /* unsigned int; unsigned long long */
        out[i].value.ull = found;
    }
    return code;
}

struct fabric { u32 version; unsigned char uuid[16]; int status; u32 clique; unsigned char state; u32 health; };
int nvmlDeviceGetGpuFabricInfoV(struct device *device, struct fabric *out) {
    u64 found[2] = {0};
    int code = enter_gpu(__func__, device);
    if (code || (code = numbers(device, "fabric", 0, found, 2))) return code;
    if (out->version != (2u << 24 | 36)) return VERSION;
    out->state = (unsigned char)found[0], out->status = (int)found[1];
    return OK;
}

int nvmlDeviceGetMigMode(struct device *device, u32 *now, u32 *pending) {
    int code = enter_gpu(__func__, device);
    if (!code) *now = *pending = of(device->gpu, "mig", 0) != NULL;
    return code;
}
int nvmlDeviceGetMaxMigDeviceCount(struct device *d, u32 *out) { int code = enter_gpu(__func__, d); *out = PARTS; return code; }
int nvmlDeviceGetMigDeviceHandleByIndex(struct device *device, u32 index, struct device **out) {
    int code = enter_gpu(__func__, device);
    if (code) return code;
    if (index >= PARTS || !of(device->gpu, "mig", (int)index)) return NOT_FOUND;
    *out = &parts[device->gpu][index];
    return OK;
}

int nvmlDeviceGetSupportedEventTypes(struct device *d, u64 *out) { int code = enter_gpu(__func__, d); *out = 0x1f; return code; }

int nvmlEventSetCreate(struct set **out) {
    int code = enter(__func__);
    if (code) return code;
    pthread_mutex_lock(&lock);
    *out = &sets[sets_used++ % 16];
    memset(*out, 0, sizeof **out);
    pthread_mutex_unlock(&lock);
    const char *event; /* what came before is missed, as with the real one */
    for (int n = 0; (event = nth("event", n)); n++) (*out)->seen = atol(event);
    return OK;
}
int nvmlDeviceRegisterEvents(struct device *d, u64 types, struct set *set) { int code = enter_gpu(__func__, d); if (!code && types & 8) set->wanted[d->gpu] = 1; return code; }
int nvmlEventSetFree(struct set *set) { (void)set; return enter(__func__); }

/* Waits without a wake-up, as the real one does, until the state's file is another one. -1 when it cannot: then it looks now and then. */
static int watch_state(void) {
    const char *path = getenv("NVML_STUB_STATE");
    char folder[4096];
    int fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    snprintf(folder, sizeof folder, "%s", path ? path : "/");
    if (strrchr(folder, '/')) *strrchr(folder, '/') = 0;
    if (fd >= 0 && inotify_add_watch(fd, folder, IN_MOVED_TO) < 0) close(fd), fd = -1;
    return fd;
}

static long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

struct event { struct device *device; u64 type, data; u32 gi, ci; };
static int next_event(struct set *set, struct event *out) {
    const char *line;
    long id;
    int gpu;
    u64 xid;
    for (int n = 0; (line = nth("event", n)); n++)
        if (sscanf(line, "%ld %d %llu", &id, &gpu, &xid) == 3 && id > set->seen) {
            set->seen = id;
            if (gpu < 0 || gpu >= GPUS || !set->wanted[gpu]) continue;
            *out = (struct event){&devices[gpu], 8, xid, ~0u, ~0u};
            return 1;
        }
    return 0;
}

int nvmlEventSetWait_v2(struct set *set, struct event *out, u32 timeout_ms) {
    long end = now_ms() + (long)timeout_ms, left;
    int fd = watch_state(), code, found = 0;
    char drained[4096];
    while (!(code = enter("nvmlEventSetWait")) && !(found = next_event(set, out)) && (left = end - now_ms()) > 0) {
        struct pollfd changed = {fd, POLLIN, 0};
        if (fd < 0) nap(5);
        else if (poll(&changed, 1, (int)left) > 0 && read(fd, drained, sizeof drained) < 0) nap(1);
    }
    if (fd >= 0) close(fd);
    return code ? code : found ? OK : TIMEOUT;
}
