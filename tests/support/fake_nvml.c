/* A libnvidia-ml.so.1 without GPUs: what it answers is said by environment variables, see tests/support/fake_nvml.py.
 *
 * GPU i sits at bus 0x10 + i. GPUs 2k and 2k+1 share a PCIe switch; the first half is on NUMA node 0, the second on 1.
 * -DOLD_DRIVER leaves out what drivers of 2020 lack, -DANCIENT_DRIVER also nvmlInitWithFlags.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef int R;
typedef struct dev { int gpu, instance; } *D; /* instance: -1 for the whole GPU */
typedef struct { char legacy[16]; u32 domain, bus, device, pciDeviceId, pciSubSystemId; char busId[32]; } Pci;
typedef struct { u64 total, free, used; } Mem;
typedef struct { u32 version; u64 total, reserved, free, used; } Mem2;
typedef struct { u32 gpu, memory; } Util;
typedef struct { u32 pid; u64 used; u32 gi, ci; } Proc;
typedef struct { u32 fieldId, scopeId; long long timestamp, latency; u32 type; R rc; u64 value; } Field;

enum { OK = 0, UNINIT = 1, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, SMALL = 7, LOST = 15 };
#define MOST 128
#define INSTANCES 3 /* 3g.40gb, and two compute instances of one 3g.40gb */
static const u64 GIB = 1ULL << 30, MIB = 1ULL << 20;
static struct dev gpus[MOST], instances[MOST][INSTANCES];
static int count, initialised;

static int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text && *text ? atoi(text) : otherwise;
}
static int is_mode(const char *name, const char *wanted) {
    const char *text = getenv(name);
    return text && !strcmp(text, wanted);
}
static R check(D d) {
    if (!initialised) return UNINIT;
    if (!d || d->gpu < 0 || d->gpu >= count) return INVALID;
    return setting("FAKE_NVML_LOST", -1) == d->gpu ? LOST : OK;
}
#define CHECK(d) do { R rc_ = check(d); if (rc_) return rc_; } while (0)
#define WHOLE(d) do { CHECK(d); if ((d)->instance >= 0) return NOT_SUPPORTED; } while (0)

static void pci(int i, Pci *p) {
    memset(p, 0, sizeof *p);
    p->bus = 0x10 + i;
    p->pciDeviceId = 0x233010de;
    sprintf(p->busId, "00000000:%02X:00.0", p->bus);
    sprintf(p->legacy, "0000:%02X:00.0", p->bus);
}

static R start(void) {
    int rc = setting("FAKE_NVML_INIT", 0);
    if (rc) return rc;
    count = setting("FAKE_NVML_COUNT", 4);
    for (int i = 0; i < MOST; i++) {
        gpus[i] = (struct dev){i, -1};
        for (int k = 0; k < INSTANCES; k++) instances[i][k] = (struct dev){i, k};
    }
    initialised = 1;
    return OK;
}
#ifndef ANCIENT_DRIVER
R nvmlInitWithFlags(u32 flags) { (void)flags; return start(); }
#endif
R nvmlInit_v2(void) { return start(); }
R nvmlShutdown(void) { initialised = 0; return OK; }
const char *nvmlErrorString(R rc) { return rc == LOST ? "GPU is lost" : rc == NO_PERMISSION ? "Insufficient Permissions" : "fake"; }
R nvmlSystemGetDriverVersion(char *b, u32 n) { snprintf(b, n, "580.00-fake"); return OK; }
R nvmlSystemGetCudaDriverVersion_v2(int *v) { *v = 13000; return OK; }
R nvmlDeviceGetCount_v2(u32 *c) { if (!initialised) return UNINIT; *c = count; return OK; }
R nvmlDeviceGetHandleByIndex_v2(u32 i, D *d) {
    if (!initialised) return UNINIT;
    if (i >= (u32)count) return INVALID;
    if (setting("FAKE_NVML_DENIED", -1) == (int)i) return NO_PERMISSION;
    if (setting("FAKE_NVML_GONE", -1) == (int)i) return LOST;
    *d = &gpus[i];
    return OK;
}
R nvmlDeviceGetName(D d, char *b, u32 n) {
    CHECK(d);
    const char *name = getenv("FAKE_NVML_NAME");
    snprintf(b, n, "%s%s", name ? name : "NVIDIA H100 80GB HBM3", d->instance < 0 ? "" : d->instance ? " MIG 1c.3g.40gb" : " MIG 3g.40gb");
    return OK;
}
R nvmlDeviceGetUUID(D d, char *b, u32 n) { /* known of a lost GPU, too: the driver remembers it */
    if (!initialised) return UNINIT;
    if (d->instance < 0) snprintf(b, n, "GPU-%08x-0000-0000-0000-%012d", d->gpu * 0x1111, d->gpu);
    else snprintf(b, n, "MIG-%08x-0000-0000-0000-%012d", d->gpu * 0x1111 + d->instance, d->instance);
    return OK;
}
static void memory(D d, u64 *total, u64 *reserved, u64 *used) {
    *total = (d->instance < 0 ? 80 : 40) * GIB;
    *reserved = d->instance < 0 ? 512 * MIB : 0;
    *used = 2 * MIB;
    const char *held = getenv("FAKE_NVML_HELD"); /* gpu:pid:MiB,... ; MiB -1: hidden; pid 0: nobody is named */
    for (; held && *held; held = strchr(held, ',') ? strchr(held, ',') + 1 : "") {
        int gpu, pid, size;
        if (sscanf(held, "%d:%d:%d", &gpu, &pid, &size) == 3 && gpu == d->gpu && d->instance < 1)
            *used += (size < 0 ? 700 : size) * MIB;
    }
}
R nvmlDeviceGetMemoryInfo(D d, Mem *m) {
    CHECK(d);
    u64 reserved;
    memory(d, &m->total, &reserved, &m->used);
    m->used += reserved;
    m->free = m->total - m->used;
    return OK;
}
R nvmlDeviceGetPciInfo_v3(D d, Pci *p) { if (!initialised) return UNINIT; pci(d->gpu, p); return OK; }
R nvmlDeviceGetCudaComputeCapability(D d, int *major, int *minor) { WHOLE(d); *major = 9; *minor = 0; return OK; }
R nvmlDeviceGetUtilizationRates(D d, Util *u) { WHOLE(d); u->gpu = 10 * d->gpu; u->memory = 5; return OK; }
R nvmlDeviceGetCpuAffinity(D d, u32 n, u64 *s) {
    WHOLE(d);
    memset(s, 0, n * sizeof *s);
    s[0] = d->gpu < count / 2 ? 0x0f : 0xf0;
    return OK;
}
R nvmlDeviceGetMaxPcieLinkGeneration(D d, u32 *g) { WHOLE(d); *g = 5; return OK; }
R nvmlDeviceGetCurrPcieLinkGeneration(D d, u32 *g) { WHOLE(d); *g = 1; return OK; }
R nvmlDeviceGetMaxPcieLinkWidth(D d, u32 *w) { WHOLE(d); *w = 16; return OK; }
R nvmlDeviceGetCurrPcieLinkWidth(D d, u32 *w) { WHOLE(d); *w = 16; return OK; }
R nvmlDeviceGetTopologyCommonAncestor(D a, D b, u32 *l) {
    WHOLE(a); WHOLE(b);
    if (is_mode("FAKE_NVML_TOPOLOGY", "none")) return NOT_SUPPORTED;
    *l = a->gpu == b->gpu ? 0 : a->gpu / 2 == b->gpu / 2 ? 10 : (a->gpu < count / 2) == (b->gpu < count / 2) ? 30 : 50;
    return OK;
}
/* nvlink: 4 lanes between 2k and 2k+1; nvswitch: 18 lanes of each into 4 switches */
static int lanes(void) { return is_mode("FAKE_NVML_WIRES", "nvlink") ? 4 : is_mode("FAKE_NVML_WIRES", "nvswitch") ? 18 : 0; }
R nvmlDeviceGetP2PStatus(D a, D b, u32 capability, u32 *s) {
    WHOLE(a); WHOLE(b);
    *s = setting("FAKE_NVML_P2P", 0);
    int wired = is_mode("FAKE_NVML_WIRES", "nvswitch") || (lanes() && a->gpu / 2 == b->gpu / 2);
    if (capability == 2) *s = wired && !is_mode("FAKE_NVML_FABRIC", "down") ? 0 : 5;
    return OK;
}
R nvmlDeviceGetNvLinkState(D d, u32 l, u32 *s) {
    WHOLE(d);
    if (!lanes()) return NOT_SUPPORTED;
    if (l >= 18) return INVALID;
    *s = l < (u32)lanes();
    return OK;
}
R nvmlDeviceGetNvLinkVersion(D d, u32 l, u32 *v) { WHOLE(d); if (l >= (u32)lanes()) return NOT_SUPPORTED; *v = 6; return OK; }
R nvmlDeviceGetNvLinkRemotePciInfo_v2(D d, u32 l, Pci *p) {
    WHOLE(d);
    if (l >= (u32)lanes()) return NOT_SUPPORTED;
    pci(is_mode("FAKE_NVML_WIRES", "nvswitch") ? 0x80 + (int)l % 4 : d->gpu ^ 1, p);
    return OK;
}
R nvmlDeviceGetNvLinkRemoteDeviceType(D d, u32 l, u32 *t) {
    WHOLE(d);
    if (l >= (u32)lanes()) return NOT_SUPPORTED;
    *t = is_mode("FAKE_NVML_WIRES", "nvswitch") ? 2 : 0;
    return OK;
}
R nvmlDeviceGetTotalEccErrors(D d, u32 kind, u32 counter, u64 *n) {
    (void)counter;
    WHOLE(d);
    *n = setting("FAKE_NVML_ECC", -1) == d->gpu ? (kind ? 2 : 7) : 0;
    return OK;
}
R nvmlDeviceGetRetiredPages(D d, u32 cause, u32 *n, u64 *pages) { WHOLE(d); (void)cause; (void)pages; *n = 0; return OK; }
R nvmlDeviceGetRetiredPagesPendingStatus(D d, u32 *p) { WHOLE(d); *p = 0; return OK; }

/* MIG */
static int is_divided(D d) { return setting("FAKE_NVML_MIG", -1) == d->gpu; }
R nvmlDeviceGetMigMode(D d, u32 *now, u32 *then) { WHOLE(d); *now = *then = is_divided(d); return OK; }
R nvmlDeviceGetMaxMigDeviceCount(D d, u32 *n) { WHOLE(d); *n = is_divided(d) ? 7 : 0; return OK; }
R nvmlDeviceGetMigDeviceHandleByIndex(D d, u32 i, D *instance) {
    WHOLE(d);
    if (!is_divided(d)) return INVALID;
    if (i == 1 || i > INSTANCES) return NOT_FOUND; /* number 1 is free */
    *instance = &instances[d->gpu][i ? i - 1 : 0];
    return OK;
}
R nvmlDeviceGetGpuInstanceId(D d, u32 *id) { CHECK(d); if (d->instance < 0) return INVALID; *id = d->instance ? 2 : 1; return OK; }
R nvmlDeviceGetComputeInstanceId(D d, u32 *id) { CHECK(d); if (d->instance < 0) return INVALID; *id = d->instance == 2; return OK; }

static R processes(D d, u32 *n, Proc *found, int only_size) {
    CHECK(d);
    u32 have = 0;
    const char *held = getenv("FAKE_NVML_HELD");
    for (; held && *held; held = strchr(held, ',') ? strchr(held, ',') + 1 : "") {
        int gpu, pid, size;
        if (sscanf(held, "%d:%d:%d", &gpu, &pid, &size) != 3 || gpu != d->gpu || !pid || d->instance > 0) continue;
        if (!only_size && have < *n) found[have] = (Proc){pid, size < 0 ? ~0ULL : size * MIB, 0, 0};
        have++;
    }
    R rc = have > *n || (only_size && have) ? SMALL : OK;
    *n = have;
    return rc;
}
R nvmlDeviceGetComputeRunningProcesses_v2(D d, u32 *n, Proc *p) { return processes(d, n, p, !p); }
R nvmlSystemGetProcessName(u32 pid, char *b, u32 n) {
    if (pid == 99) return NO_PERMISSION;
    snprintf(b, n, "/usr/bin/program-%u --with arguments", pid);
    return OK;
}

#if !defined(OLD_DRIVER) && !defined(ANCIENT_DRIVER)
R nvmlDeviceGetComputeRunningProcesses_v3(D d, u32 *n, Proc *p) { return processes(d, n, p, !p); }
R nvmlDeviceGetGraphicsRunningProcesses_v3(D d, u32 *n, Proc *p) { CHECK(d); (void)p; *n = 0; return OK; }
R nvmlDeviceGetMemoryInfo_v2(D d, Mem2 *m) {
    CHECK(d);
    memory(d, &m->total, &m->reserved, &m->used);
    m->free = m->total - m->used - m->reserved;
    return OK;
}
R nvmlDeviceGetNumaNodeId(D d, int *n) { WHOLE(d); *n = d->gpu >= count / 2; return OK; }
R nvmlDeviceGetRemappedRows(D d, u32 *corrected, u32 *uncorrected, u32 *pending, u32 *failed) {
    WHOLE(d);
    int worn = setting("FAKE_NVML_ROWS", -1) == d->gpu;
    *corrected = worn ? 3 : 0;
    *uncorrected = worn;
    *pending = worn;
    *failed = 0;
    return OK;
}
R nvmlDeviceGetFieldValues(D d, int n, Field *values) {
    WHOLE(d);
    for (int i = 0; i < n; i++) {
        values[i].rc = OK;
        values[i].value = setting("FAKE_NVML_WANTS_RESET", -1) == d->gpu;
    }
    return OK;
}
#endif
