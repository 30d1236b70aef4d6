/*
 * Private guest memory behind an fd (libprivmem)
 *
 * Owns the library's VM and translates: memory slots and sections become
 * bindings, guests' requests become conversions. Locking is the library's; see
 * privmem.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <privmem.h>
#include "qapi/error.h"
#include "qapi/qapi-events-private-memory.h"
#include "qemu/error-report.h"
#include "qemu/host-utils.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "hw/boards.h"
#include "hw/qdev-core.h"
#include "migration/vmstate.h"
#include "system/accel-blocker.h"
#include "system/private-memory.h"
#include "system/qtest.h"
#include "trace.h"

/* Made once, before vCPUs run, and kept until QEMU ends. */
static struct privmem_vm *privmem_vm;
static PrivateMemoryAgent agent = PRIVATE_MEMORY_AGENT_SW_PROTECTED;
static int kvm_vm_fd = -1;
static int sev_device_fd = -1;
/* For good, once a backend wants it. */
static bool prefault;

PrivateMemoryStats private_memory_stats;

/* Of private_memory_report(). */
#define MESSAGES_AT_ONCE 10
#define MESSAGES_EVERY_NS (60 * NANOSECONDS_PER_SECOND)

/* A guest may have as many requests fail as it likes: one a second is told. */
static struct {
    QEMUTimer *timer;
    bool is_due;
    int64_t last_ns;
} failed_event = { .last_ns = -NANOSECONDS_PER_SECOND };

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

bool private_memory_starts_shared(void)
{
    return machine_require_guest_memfd(current_machine) &&
           !private_memory_is_launched();
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

/* As the monitor has it: tests can step the clock. */
static QEMUClockType event_clock(void)
{
    return qtest_enabled() ? QEMU_CLOCK_VIRTUAL : QEMU_CLOCK_REALTIME;
}

bool private_memory_may_report(PrivateMemoryMessages *messages)
{
    int64_t now = qemu_clock_get_ns(event_clock());
    uint64_t suppressed = 0;
    bool may;

    g_mutex_lock(&messages->lock);
    messages->paid_ns = MAX(messages->paid_ns, now);
    may = messages->paid_ns <= now + (MESSAGES_AT_ONCE - 1) * MESSAGES_EVERY_NS;
    if (may) {
        messages->paid_ns += MESSAGES_EVERY_NS;
        suppressed = messages->suppressed;
        messages->suppressed = 0;
    } else {
        messages->suppressed++;
    }
    g_mutex_unlock(&messages->lock);
    if (!may) {
        stat64_add(&private_memory_stats.suppressed, 1);
    }
    if (suppressed) {
        warn_report("%" PRIu64 " messages like the next one were suppressed",
                    suppressed);
    }
    return may;
}

static void send_failed_event(void *opaque)
{
    struct privmem_failed_conversion last;

    qatomic_set(&failed_event.last_ns, qemu_clock_get_ns(event_clock()));
    /* One that fails from here on is told now, or sets the timer again. */
    qatomic_set_mb(&failed_event.is_due, false);
    if (!privmem_vm_failed_conversion(privmem_vm, 0, &last, sizeof(last))) {
        qapi_event_send_private_memory_conversion_failed(last.gpa, last.size,
                                                         last.to_private,
                                                         last.message);
    }
}

/*
 * The main loop sends the event. The monitor's own limit of rates is for those
 * who hold the BQL: it asserts that its timer has not fired meanwhile. vCPUs
 * come here without.
 */
static void arm_failed_event(void)
{
    if (!qatomic_xchg(&failed_event.is_due, true)) {
        timer_mod_ns(failed_event.timer, NANOSECONDS_PER_SECOND +
                     qatomic_read(&failed_event.last_ns));
    }
}

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

struct privmem_vm *private_memory_current_vm(void)
{
    return privmem_vm;
}

PrivateMemoryAgent private_memory_agent(void)
{
    return agent;
}

/* One guest's private memory is all the library's, or all QEMU's own. */
static int check_block(RAMBlock *block, void *opaque)
{
    Error **errp = opaque;

    if (block->guest_memfd < 0) {
        return 0;
    }
    error_setg(errp, "the RAM of '%s' is private by other means; make all RAM "
               "of the machine " TYPE_MEMORY_BACKEND_PRIVATE,
               memory_region_name(block->mr));
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
    failed_event.timer = timer_new_ns(event_clock(), send_failed_event, NULL);
    trace_private_memory_vm(PrivateMemoryAgent_str(agent));
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
    trace_private_memory_slot_add(block->idstr, offset, gpa, size);
    if (privmem_vm_bind(privmem_vm, block->privmem, offset, gpa, size)) {
        private_memory_report(error_report, "%s at 0x%" HWADDR_PRIx " cannot "
                              "be a memory slot: %s", block->idstr, gpa,
                              privmem_last_error());
        return -1;
    }
    return privmem_region_private_fd(block->privmem);
}

void private_memory_slot_del(RAMBlock *block, hwaddr gpa, hwaddr size)
{
    trace_private_memory_slot_del(block->idstr, gpa, size);
    if (privmem_vm_unbind(privmem_vm, gpa, size)) {
        private_memory_report(warn_report, "%s at 0x%" HWADDR_PRIx ": %s",
                              block->idstr, gpa, privmem_last_error());
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

/* Counts a request by the time that it took. */
static void count_latency(int64_t ns)
{
    int bucket = ns > 0 ? 64 - clz64(ns) : 0;

    bucket = MIN(bucket, PRIVATE_MEMORY_LATENCIES - 1);
    stat64_add(&private_memory_stats.latency[bucket], 1);
}

int private_memory_convert(hwaddr gpa, uint64_t size, bool to_private,
                           Error **errp)
{
    int64_t start = get_clock();
    uint64_t done = 0, step = 0;
    int ret;

    trace_private_memory_convert_begin(gpa, size, to_private);
    do {
        /* Slots that are made anew in between would lose the request. */
        accel_ioctl_begin();
        ret = privmem_vm_convert(privmem_vm, gpa + done, size - done,
                                 to_private, &step);
        accel_ioctl_end();
        done += ret ? 0 : step;
    } while (!ret && done < size);

    trace_private_memory_convert(gpa, size, to_private, ret);
    if (is_emulated() && (done || ret != -EINVAL)) {
        /* What was done, and what was undone at the cost of its contents. */
        invalidate_code(gpa, size);
    }
    count_latency(get_clock() - start);
    if (ret) {
        arm_failed_event();
        error_setg(errp, "cannot make 0x%" HWADDR_PRIx "+0x%" PRIx64 " %s "
                   "(0x%" PRIx64 " bytes are done): %s", gpa, size,
                   to_private ? "private" : "shared", done,
                   privmem_last_error());
    }
    return ret;
}

void private_memory_use_prefault(void)
{
    qatomic_set(&prefault, true);
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
        /* Not the guest's fault. */
        private_memory_report(warn_report, "%s", error_get_pretty(err));
    }
    if (!ret && to_private && qatomic_read(&prefault)) {
        /* What cannot be had now is taken when the guest touches it. */
        ret = privmem_vm_prefault(privmem_vm, current_cpu->kvm_fd, gpa, size);
        trace_private_memory_prefault(gpa, size, ret);
        return 0;
    }
    return ret;
}

int private_memory_fault(hwaddr gpa, uint64_t size, bool is_private)
{
    int ret;

    accel_ioctl_begin();
    ret = privmem_vm_memory_fault(privmem_vm, gpa, size, is_private);
    accel_ioctl_end();

    stat64_add(&private_memory_stats.faults, 1);
    trace_private_memory_fault(gpa, size, is_private, ret);
    if (ret) {
        private_memory_report(error_report, "KVM cannot provide guest memory "
                              "at 0x%" HWADDR_PRIx ": %s", gpa,
                              privmem_last_error());
    }
    return ret;
}

int private_memory_discard(RAMBlock *block, ram_addr_t offset, size_t length)
{
    int ret = privmem_region_discard(block->privmem, offset, length);

    if (ret) {
        private_memory_report(error_report, "%s: cannot discard 0x%zx bytes at "
                              "0x" RAM_ADDR_FMT ": %s", block->idstr, length,
                              offset, privmem_last_error());
    }
    trace_private_memory_discard(block->idstr, offset, length, ret);
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
