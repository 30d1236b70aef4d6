/*
 * Private guest memory behind an fd (libprivmem)
 *
 * Owns the library's VM and translates: memory slots and sections become
 * bindings, guests' requests become conversions, the library's figures become
 * QAPI. Locking is the library's; see privmem.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <privmem.h>
#include "qapi/error.h"
#include "qapi/qapi-commands-private-memory.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/host-utils.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "hw/qdev-core.h"
#include "migration/vmstate.h"
#include "monitor/hmp.h"
#include "monitor/monitor.h"
#include "qom/object_interfaces.h"
#include "system/accel-blocker.h"
#include "system/private-memory.h"
#include "trace.h"

/* Cells of the picture in query-private-memory. */
#define PICTURE_WIDTH 64
/* The guest decides how many extents there are; they are listed in pages. */
#define EXTENTS_MAX 65536

/* Made once, before vCPUs run, and kept until QEMU ends. */
static struct privmem_vm *privmem_vm;
static PrivateMemoryAgent agent = PRIVATE_MEMORY_AGENT_SW_PROTECTED;
static int kvm_vm_fd = -1;
static int sev_device_fd = -1;

void private_memory_set_kvm_vm(int vm_fd)
{
    kvm_vm_fd = vm_fd;
}

void private_memory_use_tdx(void)
{
    agent = PRIVATE_MEMORY_AGENT_TDX;
}

void private_memory_use_snp(int sev_fd)
{
    agent = PRIVATE_MEMORY_AGENT_SEV_SNP;
    sev_device_fd = sev_fd;
}

static bool is_emulated(void)
{
    return agent == PRIVATE_MEMORY_AGENT_EMULATED;
}

bool private_memory_enabled(void)
{
    return privmem_vm && !is_emulated();
}

bool private_memory_is_launched(void)
{
    return agent == PRIVATE_MEMORY_AGENT_TDX ||
           agent == PRIVATE_MEMORY_AGENT_SEV_SNP;
}

/*
 * Without KVM no memory slots tell where the guest sees a region: the memory
 * listener does.
 */
static void emulated_region_add(MemoryListener *listener,
                                MemoryRegionSection *section)
{
    MemoryRegion *mr = section->mr;
    hwaddr gpa = section->offset_within_address_space;

    if (memory_region_is_private_capable(mr) &&
        privmem_vm_bind(privmem_vm, mr->ram_block->privmem,
                        section->offset_within_region, gpa,
                        int128_get64(section->size))) {
        /* A second view of RAM, such as SMRAM: conversions use the first. */
        trace_emulated_region_add(gpa, privmem_last_error());
    }
}

static void emulated_region_del(MemoryListener *listener,
                                MemoryRegionSection *section)
{
    if (memory_region_is_private_capable(section->mr)) {
        /* Fails only for what emulated_region_add() could not bind. */
        privmem_vm_unbind(privmem_vm, section->offset_within_address_space,
                          int128_get64(section->size));
    }
}

static MemoryListener emulated_listener = {
    .name = "private-memory",
    .region_add = emulated_region_add,
    .region_del = emulated_region_del,
};

static int new_vm(void)
{
    switch (agent) {
    case PRIVATE_MEMORY_AGENT_EMULATED:
        return privmem_vm_new_emulated(&privmem_vm);
    case PRIVATE_MEMORY_AGENT_TDX:
        return privmem_vm_new_tdx(kvm_vm_fd, &privmem_vm);
    case PRIVATE_MEMORY_AGENT_SEV_SNP:
        return privmem_vm_new_snp(kvm_vm_fd, sev_device_fd, &privmem_vm);
    default:
        return privmem_vm_new_kvm(kvm_vm_fd, &privmem_vm);
    }
}

/* One guest's private memory is all the library's, or all QEMU's own. */
static int check_block(RAMBlock *block, void *opaque)
{
    Error **errp = opaque;

    if (block->guest_memfd < 0) {
        return 0;
    }
    error_setg(errp, "the RAM of '%s' is private by other means; make all RAM "
               "of the machine " TYPE_MEMORY_BACKEND_PRIVATE, block->idstr);
    return -EEXIST;
}

struct privmem_vm *private_memory_vm(bool emulate, Error **errp)
{
    if (privmem_vm) {
        return privmem_vm;
    }
    if (emulate) {
        agent = PRIVATE_MEMORY_AGENT_EMULATED;
    }
    if (qemu_ram_foreach_block(check_block, errp)) {
        return NULL;
    }
    if (new_vm()) {
        error_setg(errp, "%s; start the VM with -object "
                   TYPE_SW_PROTECTED_GUEST ",id=cgs0 and -machine "
                   "confidential-guest-support=cgs0", privmem_last_error());
        return NULL;
    }
    if (emulate) {
        memory_listener_register(&emulated_listener, &address_space_memory);
    }
    return privmem_vm;
}

bool private_memory_map(MemoryRegion *mr, Object *owner, const char *name,
                        uint64_t size, uint32_t ram_flags,
                        struct privmem_region *region, Error **errp)
{
    int fd = qemu_dup(privmem_region_shared_fd(region));

    if (fd < 0) {
        error_setg_errno(errp, errno, "cannot duplicate the fd of the shared "
                         "store; raise the limit of open files "
                         "(RLIMIT_NOFILE)");
        return false;
    }
    /* The RAMBlock takes over the fd. */
    if (!memory_region_init_ram_from_fd(mr, owner, name, size, ram_flags, fd,
                                        0, errp)) {
        close(fd);
        return false;
    }
    if (privmem_region_set_host_mapping(region, mr->ram_block->host)) {
        error_setg(errp, "%s", privmem_last_error());
        return false;
    }
    mr->ram_block->privmem = region;
    return true;
}

/* The region stays until QEMU ends, as the board's RAM does. */
bool private_memory_init_ram(MemoryRegion *mr, Object *owner, const char *name,
                             uint64_t size, Error **errp)
{
    ERRP_GUARD();
    struct privmem_region_options options = {
        .size = sizeof(options),
        .initially_private = true,
    };
    struct privmem_region *region;

    if (privmem_region_new(privmem_vm, name, size, &options, &region)) {
        error_setg(errp, "RAM '%s': %s", name, privmem_last_error());
        return false;
    }
    if (!private_memory_map(mr, owner, name, size, RAM_SHARED, region, errp)) {
        error_prepend(errp, "RAM '%s': ", name);
        privmem_region_free(region);
        return false;
    }
    vmstate_register_ram(mr, DEVICE(owner));
    return true;
}

int private_memory_slot_add(RAMBlock *block, hwaddr offset, hwaddr gpa,
                            hwaddr size)
{
    if (privmem_vm_bind(privmem_vm, block->privmem, offset, gpa, size)) {
        error_report_once("%s at 0x%" HWADDR_PRIx " cannot be a memory slot: "
                          "%s", block->idstr, gpa, privmem_last_error());
        return -1;
    }
    return privmem_region_private_fd(block->privmem);
}

void private_memory_slot_del(RAMBlock *block, hwaddr gpa, hwaddr size)
{
    if (privmem_vm_unbind(privmem_vm, gpa, size)) {
        warn_report_once("%s at 0x%" HWADDR_PRIx ": %s", block->idstr, gpa,
                         privmem_last_error());
    }
}

/* Code that was translated from the other side must not run any more. */
static void invalidate_code(hwaddr gpa, uint64_t size)
{
    hwaddr end = gpa + size;

    while (gpa < end) {
        MemoryRegionSection section = memory_region_find(get_system_memory(),
                                                         gpa, end - gpa);
        if (!section.mr) {
            return;
        }
        if (memory_region_is_private_capable(section.mr)) {
            memory_region_invalidate_code(section.mr,
                                          section.offset_within_region,
                                          int128_get64(section.size));
        }
        gpa = section.offset_within_address_space + int128_get64(section.size);
        memory_region_unref(section.mr);
    }
}

int private_memory_convert(hwaddr gpa, uint64_t size, bool to_private,
                           Error **errp)
{
    uint64_t done = 0, step = 0;
    int ret;

    do {
        /* Slots that are made anew in between would lose the request. */
        accel_ioctl_begin();
        ret = privmem_vm_convert(privmem_vm, gpa + done, size - done,
                                 to_private, &step);
        accel_ioctl_end();
        done += ret ? 0 : step;
    } while (!ret && done < size);

    trace_private_memory_convert(gpa, size, to_private, ret);
    if (is_emulated() && ret != -EINVAL) {
        /* What was done, and what was undone at the cost of its contents. */
        invalidate_code(gpa, size);
    }
    if (ret) {
        error_setg(errp, "cannot make 0x%" HWADDR_PRIx "+0x%" PRIx64 " %s "
                   "(0x%" PRIx64 " bytes are done): %s", gpa, size,
                   to_private ? "private" : "shared", done,
                   privmem_last_error());
    }
    return ret;
}

uint64_t private_memory_hypercall(uint64_t gpa, uint64_t pages,
                                  bool to_private)
{
    g_autoptr(Error) err = NULL;
    uint64_t size;
    int ret;

    if (umul64_overflow(pages, 4 * KiB, &size)) {
        return -EINVAL;
    }
    ret = private_memory_convert(gpa, size, to_private, &err);
    if (ret && ret != -EINVAL) {
        /* Not the guest's fault; but a guest must not fill the log. */
        warn_report_once("%s", error_get_pretty(err));
    }
    return ret;
}

int private_memory_fault(hwaddr gpa, uint64_t size, bool is_private)
{
    int ret;

    accel_ioctl_begin();
    ret = privmem_vm_memory_fault(privmem_vm, gpa, size, is_private);
    accel_ioctl_end();

    trace_private_memory_fault(gpa, size, is_private, ret);
    if (ret) {
        error_report("KVM cannot provide guest memory at 0x%" HWADDR_PRIx
                     ": %s", gpa, privmem_last_error());
    }
    return ret;
}

int private_memory_discard(RAMBlock *block, ram_addr_t offset, size_t length)
{
    int ret = privmem_region_discard(block->privmem, offset, length);

    if (ret) {
        error_report("%s: cannot discard 0x%zx bytes at 0x" RAM_ADDR_FMT
                     ": %s", block->idstr, length, offset,
                     privmem_last_error());
    }
    if (is_emulated()) {
        memory_region_invalidate_code(block->mr, offset, length);
    }
    return ret;
}

void *private_memory_place(AddressSpace *as, hwaddr addr, hwaddr *len)
{
    MemoryRegionSection section;

    /* With emulation others can map it; address spaces change under the BQL */
    if (!private_memory_enabled() || !bql_locked()) {
        return NULL;
    }
    section = memory_region_find(as->root, addr, *len);
    if (!section.mr) {
        return NULL;
    }
    if (!memory_region_is_private_capable(section.mr) ||
        section.offset_within_address_space != addr) {
        memory_region_unref(section.mr);
        return NULL;
    }
    *len = int128_get64(section.size);
    return (uint8_t *)memory_region_get_ram_ptr(section.mr) +
           section.offset_within_region;
}

bool private_memory_host_access_block(RAMBlock *block, hwaddr offset,
                                      hwaddr *len)
{
    return privmem_region_host_access(block->privmem, offset, len);
}

bool private_memory_check_host_access(hwaddr gpa, uint64_t size, Error **errp)
{
    hwaddr end = size > UINT64_MAX - gpa ? UINT64_MAX : gpa + size;

    while (private_memory_enabled() && gpa < end) {
        MemoryRegionSection section = memory_region_find(get_system_memory(),
                                                         gpa, end - gpa);
        hwaddr len = int128_get64(section.size);
        bool reachable;

        if (!section.mr) {
            break;
        }
        gpa = section.offset_within_address_space;
        reachable = private_memory_host_access(section.mr,
                                               section.offset_within_region,
                                               &len);
        memory_region_unref(section.mr);
        if (!reachable) {
            error_setg(errp, "guest-physical memory at 0x%" HWADDR_PRIx " is "
                       "private: the host cannot read it; 'info "
                       "private-memory' shows what is shared", gpa);
            return false;
        }
        gpa += len;
    }
    return true;
}

/* QMP and HMP */

static bool check_vm(Error **errp)
{
    if (!privmem_vm) {
        error_setg(errp, "there is no " TYPE_MEMORY_BACKEND_PRIVATE
                   " in this VM; add one with -object");
    }
    return privmem_vm;
}

void qmp_x_private_memory_convert(uint64_t address, uint64_t size,
                                  bool private, Error **errp)
{
    if (check_vm(errp)) {
        private_memory_convert(address, size, private, errp);
    }
}

/* The library's level of that size, 0 for none. */
static uint32_t level_of(uint64_t size)
{
    switch (size) {
    case 4 * KiB:
        return 1;
    case 2 * MiB:
        return 2;
    case 1 * GiB:
        return 3;
    default:
        return 0;
    }
}

void qmp_x_private_memory_relocate(uint64_t address, uint64_t size,
                                   const char *filename, bool has_offset,
                                   uint64_t offset, Error **errp)
{
    uint32_t level = level_of(size);
    int fd = -1;

    if (!check_vm(errp)) {
        return;
    }
    if (!level) {
        error_setg(errp, "'size' is 0x%" PRIx64 ": it must be 4 KiB, 2 MiB or "
                   "1 GiB", size);
        return;
    }
    if (has_offset && !filename) {
        error_setg(errp, "'offset' means nothing without 'filename'");
        return;
    }
    if (filename) {
        fd = qemu_open(filename, O_RDWR, errp);
        if (fd < 0) {
            return;
        }
    }
    if (privmem_vm_relocate(privmem_vm, address, level, fd,
                            has_offset ? offset : 0)) {
        error_setg(errp, "%s", privmem_last_error());
    }
    if (fd >= 0) {
        qemu_close(fd);
    }
}

static PrivateMemorySlotList *query_slots(struct privmem_region *region)
{
    PrivateMemorySlotList *list = NULL, **tail = &list;
    struct privmem_binding binding;

    for (size_t i = 0; !privmem_region_binding(region, i, &binding); i++) {
        PrivateMemorySlot *slot = g_new0(PrivateMemorySlot, 1);

        slot->address = binding.gpa;
        slot->size = binding.size;
        slot->offset = binding.offset;
        QAPI_LIST_APPEND(tail, slot);
    }
    return list;
}

static PrivateMemoryFailureList *query_failures(struct privmem_region *region)
{
    PrivateMemoryFailureList *list = NULL, **tail = &list;
    struct privmem_failure failure;

    for (size_t i = 0; !privmem_region_failure(region, i, &failure); i++) {
        PrivateMemoryFailure *item = g_new0(PrivateMemoryFailure, 1);

        item->offset = failure.offset;
        item->size = failure.size;
        item->lost = failure.lost;
        item->has_address = failure.gpa != PRIVMEM_UNKNOWN;
        item->address = failure.gpa;
        item->q_private = failure.is_private;
        QAPI_LIST_APPEND(tail, item);
    }
    return list;
}

static PrivateMemoryInfo *query_region(Object *obj,
                                       struct privmem_region *region)
{
    PrivateMemoryInfo *info = g_new0(PrivateMemoryInfo, 1);
    char picture[PICTURE_WIDTH + 1] = "";
    struct privmem_info now;

    /* Fails only for NULL. */
    privmem_region_info(region, &now, sizeof(now));
    privmem_region_picture(region, picture, sizeof(picture));

    info->id = g_strdup(object_get_canonical_path_component(obj));
    info->agent = agent;
    info->size = now.size;
    info->granule = now.granule;
    info->q_private = now.private_bytes;
    info->shared = now.shared_bytes;
    info->has_private_held = now.private_held != PRIVMEM_UNKNOWN;
    info->private_held = now.private_held;
    info->has_shared_held = now.shared_held != PRIVMEM_UNKNOWN;
    info->shared_held = now.shared_held;
    info->has_held_twice = now.held_twice != PRIVMEM_UNKNOWN;
    info->held_twice = now.held_twice;
    info->relocated = now.relocated;
    info->swapped = now.swapped;
    info->conversions = now.conversions;
    info->failed_conversions = now.failed_conversions;
    info->memory_failures = now.memory_failures;
    info->last_failures = query_failures(region);
    info->private_fd = privmem_region_private_fd(region);
    info->shared_fd = privmem_region_shared_fd(region);
    info->slots = query_slots(region);
    info->picture = g_strdup(picture);
    return info;
}

/*
 * Lists up to @limit extents from @start on. Each ends behind where it starts,
 * whatever the guest converts meanwhile, so that pages come to an end, too.
 */
static void query_extents(PrivateMemoryInfo *info,
                          struct privmem_region *region, uint64_t start,
                          uint32_t limit)
{
    PrivateMemoryExtentList **tail = &info->extents;
    struct privmem_run run;

    info->has_extents = true;
    info->next = start;
    while (limit-- && !privmem_region_next_run(region, info->next, &run)) {
        PrivateMemoryExtent *extent = g_new0(PrivateMemoryExtent, 1);

        extent->offset = run.offset;
        extent->size = run.size;
        extent->q_private = run.is_private;
        QAPI_LIST_APPEND(tail, extent);
        info->next = run.offset + run.size;
    }
    info->has_next = info->next < info->size;
}

static struct privmem_region *object_region(Object *obj)
{
    if (!object_dynamic_cast(obj, TYPE_MEMORY_BACKEND_PRIVATE)) {
        return NULL;
    }
    return host_memory_backend_get_memory(MEMORY_BACKEND(obj))
        ->ram_block->privmem;
}

struct Query {
    uint64_t start;
    /* 0: no extents are asked for. */
    uint32_t limit;
    PrivateMemoryInfoList **tail;
};

static int query_object(Object *obj, void *opaque)
{
    struct privmem_region *region = object_region(obj);
    struct Query *query = opaque;
    PrivateMemoryInfo *info;

    if (region) {
        info = query_region(obj, region);
        if (query->limit) {
            query_extents(info, region, query->start, query->limit);
        }
        QAPI_LIST_APPEND(query->tail, info);
    }
    return 0;
}

/* The only object that is asked for; NULL where it cannot be listed so. */
static Object *query_find(const char *id, uint64_t start, Error **errp)
{
    Object *obj = object_resolve_path_component(object_get_objects_root(), id);
    struct privmem_region *region = obj ? object_region(obj) : NULL;
    struct privmem_info now;

    if (!region) {
        error_setg(errp, "there is no " TYPE_MEMORY_BACKEND_PRIVATE " '%s'; "
                   "leave out 'id' to see all there are", id);
        return NULL;
    }
    /* Fails only for NULL. */
    privmem_region_info(region, &now, sizeof(now));
    if (!QEMU_IS_ALIGNED(start, now.granule) || start >= now.size) {
        error_setg(errp, "'start' is 0x%" PRIx64 ": it must be a multiple of "
                   "the granule (0x%" PRIx64 ") and less than the size of '%s' "
                   "(0x%" PRIx64 ")", start, now.granule, id, now.size);
        return NULL;
    }
    return obj;
}

PrivateMemoryInfoList *qmp_query_private_memory(const char *id, bool has_start,
                                                uint64_t start, bool has_limit,
                                                uint32_t limit, Error **errp)
{
    PrivateMemoryInfoList *list = NULL;
    struct Query query = { .start = start, .limit = limit, .tail = &list };
    Object *obj;

    if (has_limit && (limit < 1 || limit > EXTENTS_MAX)) {
        error_setg(errp, "'limit' is %" PRIu32 ": it must be from 1 to %d",
                   limit, EXTENTS_MAX);
        return NULL;
    }
    if (has_start && (!id || !has_limit)) {
        error_setg(errp, "'start' means nothing without 'id' and 'limit'; add "
                   "them, or leave it out");
        return NULL;
    }
    if (!id) {
        object_child_foreach(object_get_objects_root(), query_object, &query);
        return list;
    }
    obj = query_find(id, start, errp);
    if (obj) {
        query_object(obj, &query);
    }
    return list;
}

static void print_bytes(Monitor *mon, const char *what, bool known,
                        uint64_t bytes)
{
    g_autofree char *text = known ? size_to_str(bytes) : g_strdup("unknown");

    monitor_printf(mon, "  %-18s %s\n", what, text);
}

static void hmp_info_private_memory(Monitor *mon, const QDict *qdict)
{
    g_autoptr(PrivateMemoryInfoList) list =
        qmp_query_private_memory(NULL, false, 0, false, 0, NULL);

    if (!list) {
        monitor_printf(mon, "No " TYPE_MEMORY_BACKEND_PRIVATE "\n");
    }
    for (PrivateMemoryInfoList *item = list; item; item = item->next) {
        PrivateMemoryInfo *info = item->value;

        monitor_printf(mon, "%s (%s%s)\n", info->id,
                       PrivateMemoryAgent_str(info->agent),
                       info->agent == PRIVATE_MEMORY_AGENT_EMULATED ?
                       ", protects nothing" : "");
        monitor_printf(mon, "  [%s]  # private  . shared  + both\n",
                       info->picture);
        print_bytes(mon, "size", true, info->size);
        print_bytes(mon, "private", true, info->q_private);
        print_bytes(mon, "shared", true, info->shared);
        print_bytes(mon, "private held", info->has_private_held,
                    info->private_held);
        print_bytes(mon, "shared held", info->has_shared_held,
                    info->shared_held);
        print_bytes(mon, "held twice", info->has_held_twice,
                    info->held_twice);
        if (info->relocated) {
            print_bytes(mon, "relocated", true, info->relocated);
            print_bytes(mon, "of that swapped", true, info->swapped);
        }
        monitor_printf(mon, "  %-18s %" PRIu64 " done, %" PRIu64 " failed\n",
                       "conversions", info->conversions,
                       info->failed_conversions);
        monitor_printf(mon, "  %-18s %" PRIu64 "\n", "memory failures",
                       info->memory_failures);
    }
}

static void register_hmp(void)
{
    monitor_register_hmp("private-memory", true, hmp_info_private_memory);
}

type_init(register_hmp);
