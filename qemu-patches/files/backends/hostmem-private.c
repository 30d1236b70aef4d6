/*
 * QEMU private memory backend
 *
 * Guest RAM with two stores: a memfd that host and guest reach, and an fd
 * that only the guest reaches (KVM's guest_memfd). libprivmem owns both.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <privmem.h>
#include "qapi/error.h"
#include "qapi/qapi-types-qom.h"
#include "qapi/visitor.h"
#include "qemu/error-report.h"
#include "qemu/memfd.h"
#include "qemu/mmap-alloc.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "qom/object_interfaces.h"
#include "hw/boards.h"
#include "hw/resettable.h"
#include "hw/vmstate-if.h"
#include "migration/blocker.h"
#include "migration/postcopy-ram.h"
#include "migration/vmstate.h"
#include "system/cpus.h"
#include "system/kvm.h"
#include "system/private-memory.h"
#include "system/reset.h"
#include "trace.h"

OBJECT_DECLARE_SIMPLE_TYPE(HostMemoryBackendPrivate, MEMORY_BACKEND_PRIVATE)

/* The library's. */
#define MAX_DMA_GRANULARITY (64 * MiB)

struct HostMemoryBackendPrivate {
    HostMemoryBackend parent_obj;

    bool emulate;
    PrivateMemoryInitialState initial_state;
    PrivateMemoryDiscard discard;
    bool hugetlb;
    uint64_t hugetlbsize;
    bool prefault;
    uint64_t dma_granularity;

    struct privmem_region *region;
    ResettableState reset_state;
    /* The shared store's, 0 without. */
    uint64_t huge_page;
    Error *migration_blocker;
    NotifierWithReturn postcopy_notifier;
    bool beside_no_pinner;
    bool discard_required;
    /* Which memory is private, while a machine is saved or loaded. */
    uint32_t saved_size;
    uint8_t *saved_state;
};

static void (*parent_complete)(UserCreatable *uc, Error **errp);

/* What cannot be had in this machine is refused before anything is made. */
static bool private_backend_check(HostMemoryBackendPrivate *m, const char *id,
                                  Error **errp)
{
    HostMemoryBackend *backend = MEMORY_BACKEND(m);
    MachineState *machine = MACHINE(qdev_get_machine());

    if (!backend->size ||
        !QEMU_IS_ALIGNED(backend->size, qemu_real_host_page_size())) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': property 'size' "
                   "is %" PRIu64 ": it must be a multiple of the host page "
                   "size (%zu) and not 0", id, backend->size,
                   (size_t)qemu_real_host_page_size());
        return false;
    }
    if (!backend->share) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': property 'share' "
                   "must be 'on': KVM, the host and other processes share the "
                   "fd of the shared store; leave the property out", id);
        return false;
    }
    if (m->dma_granularity &&
        (!is_power_of_2(m->dma_granularity) ||
         m->dma_granularity < qemu_real_host_page_size() ||
         m->dma_granularity > MAX_DMA_GRANULARITY)) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': property "
                   "'dma-granularity' is %" PRIu64 ": it must be a power of "
                   "two from %zu to %" PRIu64, id, m->dma_granularity,
                   (size_t)qemu_real_host_page_size(),
                   (uint64_t)MAX_DMA_GRANULARITY);
        return false;
    }
    if (private_memory_starts_shared()) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': property "
                   "'x-require-guest-memfd' of " TYPE_SW_PROTECTED_GUEST
                   " leaves all private memory to QEMU itself; leave the "
                   "property out, or use another memory backend", id);
        return false;
    }
    if (m->emulate && (machine->cgs || kvm_enabled())) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': property "
                   "'emulate' must be 'off' with %s: the emulated trust agent "
                   "protects nothing; leave the property out, or use -accel "
                   "tcg without confidential-guest-support", id,
                   machine->cgs ? "a confidential guest" : "KVM");
        return false;
    }
    if (!m->emulate && !kvm_enabled()) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': private memory "
                   "needs KVM: use -accel kvm with -object "
                   TYPE_SW_PROTECTED_GUEST ", or property 'emulate=on' for an "
                   "emulation that protects nothing", id);
        return false;
    }
    if (machine->cgs && !private_memory_is_launched() &&
        !object_dynamic_cast(OBJECT(machine->cgs), TYPE_SW_PROTECTED_GUEST)) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': a guest of type "
                   "'%s' keeps no private memory in an fd; use "
                   TYPE_SW_PROTECTED_GUEST ", tdx-guest or sev-snp-guest, or "
                   "another memory backend", id,
                   object_get_typename(OBJECT(machine->cgs)));
        return false;
    }
    if (private_memory_is_launched() &&
        m->initial_state == PRIVATE_MEMORY_INITIAL_STATE_SHARED) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': property "
                   "'initial-state' must not be 'shared': a guest of type "
                   "'%s' starts in private memory; leave the property out", id,
                   object_get_typename(OBJECT(machine->cgs)));
        return false;
    }
    return true;
}

/*
 * Saving and loading a machine, which the emulated agent can do: RAM goes as
 * ever, the visible side of it, and then comes which of it is private.
 */

static int private_backend_pre_save(void *opaque)
{
    HostMemoryBackendPrivate *m = opaque;

    m->saved_state = g_malloc(m->saved_size);
    if (privmem_region_save_state(m->region, m->saved_state, m->saved_size)) {
        error_report(TYPE_MEMORY_BACKEND_PRIVATE ": %s", privmem_last_error());
        return -EINVAL;
    }
    return 0;
}

static int private_backend_post_save(void *opaque)
{
    HostMemoryBackendPrivate *m = opaque;

    g_clear_pointer(&m->saved_state, g_free);
    return 0;
}

static int private_backend_pre_load(void *opaque)
{
    HostMemoryBackendPrivate *m = opaque;

    /* There is one where loading failed before. */
    g_free(m->saved_state);
    m->saved_state = g_malloc(m->saved_size);
    return 0;
}

static int private_backend_post_load(void *opaque, int version_id)
{
    HostMemoryBackendPrivate *m = opaque;
    int ret = privmem_region_load_state(m->region, m->saved_state,
                                        m->saved_size);

    g_clear_pointer(&m->saved_state, g_free);
    if (ret) {
        error_report(TYPE_MEMORY_BACKEND_PRIVATE " '%s': cannot load which "
                     "memory is private: %s",
                     object_get_canonical_path_component(OBJECT(m)),
                     privmem_last_error());
    }
    return ret;
}

static const VMStateDescription vmstate_private_backend = {
    .name = TYPE_MEMORY_BACKEND_PRIVATE,
    .version_id = 1,
    .minimum_version_id = 1,
    .pre_save = private_backend_pre_save,
    .post_save = private_backend_post_save,
    .pre_load = private_backend_pre_load,
    .post_load = private_backend_post_load,
    .fields = (const VMStateField[]) {
        VMSTATE_UINT32_EQUAL(saved_size, HostMemoryBackendPrivate,
                             "'size' differs"),
        VMSTATE_VBUFFER_UINT32(saved_state, HostMemoryBackendPrivate, 1, NULL,
                               saved_size),
        VMSTATE_END_OF_LIST()
    },
};

static char *private_backend_get_id(VMStateIf *obj)
{
    return g_strdup(object_get_canonical_path_component(OBJECT(obj)));
}

/* Conversions replace the mapping, and the userfaultfd that waits for it. */
static int private_backend_postcopy(NotifierWithReturn *notifier, void *opaque,
                                    Error **errp)
{
    struct PostcopyNotifyData *data = opaque;

    if (data->reason == POSTCOPY_NOTIFY_PROBE) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE ": memory that changes "
                   "sides cannot be fetched by post-copy migration; use "
                   "pre-copy");
        return -ENOTSUP;
    }
    return 0;
}

static bool private_backend_can_migrate(HostMemoryBackendPrivate *m,
                                        const char *id, Error **errp)
{
    if (!m->emulate) {
        error_setg(&m->migration_blocker, TYPE_MEMORY_BACKEND_PRIVATE " '%s': "
                   "private memory cannot be migrated or saved", id);
        return migrate_add_blocker(&m->migration_blocker, errp) >= 0;
    }
    error_setg(&m->migration_blocker, TYPE_MEMORY_BACKEND_PRIVATE " '%s': the "
               "private store cannot be passed on (cpr); use migration mode "
               "'normal'", id);
    if (private_memory_block_cpr(&m->migration_blocker, errp) < 0) {
        return false;
    }
    m->saved_size = DIV_ROUND_UP(MEMORY_BACKEND(m)->size, 4 * KiB * 8);
    m->postcopy_notifier.notify = private_backend_postcopy;
    postcopy_add_notifier(&m->postcopy_notifier);
    return vmstate_register_with_alias_id(VMSTATE_IF(m), 0,
                                          &vmstate_private_backend, m, -1, 0,
                                          errp) == 0;
}

/*
 * Two stores that change sides cannot be moved by what exists, nor be pinned by
 * who is not told of it. Who listens to the RamDiscardManager is.
 */
static bool private_backend_block(HostMemoryBackendPrivate *m, const char *id,
                                  Error **errp)
{
    if (!private_backend_can_migrate(m, id, errp)) {
        return false;
    }
    m->beside_no_pinner = private_memory_add_backend();
    if (!m->beside_no_pinner || ram_block_coordinated_discard_require(true)) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': cannot be used "
                   "beside devices that pin guest memory, shared or not, such "
                   "as a VFIO device behind a virtual IOMMU; remove these "
                   "devices", id);
        return false;
    }
    m->discard_required = true;
    return true;
}

/* Maps the shared store as the RAM of the backend. */
static bool private_backend_map(HostMemoryBackendPrivate *m, const char *id,
                                Error **errp)
{
    ERRP_GUARD();
    HostMemoryBackend *backend = MEMORY_BACKEND(m);
    g_autofree char *name = host_memory_backend_get_name(backend);
    uint32_t ram_flags = RAM_SHARED | (backend->reserve ? 0 : RAM_NORESERVE);

    if (!private_memory_map(&backend->mr, OBJECT(backend), name, backend->size,
                            ram_flags, m->region, errp)) {
        error_prepend(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': cannot map "
                      "property 'size' (%" PRIu64 ") of shared memory, a "
                      "smaller one may do: ", id, backend->size);
        return false;
    }
    backend->aligned = true;
    memory_region_set_ram_discard_manager(&backend->mr,
                                          RAM_DISCARD_MANAGER(m));
    return true;
}

/*
 * Code that was translated from what a reset changes must not run any more, and
 * a migration must send it: what is not on its first side, or all of it where
 * that is the private one. Shared memory keeps its contents. Before the reset,
 * which makes them forget, and under the BQL, which a migration takes to see
 * what has changed.
 */
static void private_backend_invalidate(HostMemoryBackendPrivate *m,
                                       const char *id)
{
    bool all = m->initial_state == PRIVATE_MEMORY_INITIAL_STATE_PRIVATE;
    MemoryRegion *mr = &MEMORY_BACKEND(m)->mr;
    struct privmem_run run;
    uint64_t at = 0;

    while (!privmem_region_next_run(m->region, at, &run)) {
        if (all || run.is_private) {
            trace_private_backend_invalidate(id, run.offset, run.size);
            memory_region_invalidate_code(mr, run.offset, run.size);
        }
        at += run.size;
    }
}

static ResettableState *private_backend_reset_state(Object *obj)
{
    return &MEMORY_BACKEND_PRIVATE(obj)->reset_state;
}

/*
 * Runs before ROMs and firmware are written to RAM again, which is in the same
 * phase. A guest that wakes up from suspend to RAM (S3) finds its memory as it
 * left it. All other types that reset a machine (RESET_TYPE_COLD, whatever
 * asked for it, and RESET_TYPE_SNAPSHOT_LOAD, after which contents are loaded)
 * put memory back. RESET_TYPE_S390_CPU_* reset a CPU and do not come here.
 */
static void private_backend_reset_hold(Object *obj, ResetType type)
{
    HostMemoryBackendPrivate *m = MEMORY_BACKEND_PRIVATE(obj);
    const char *id = object_get_canonical_path_component(obj);
    int ret;

    if (type == RESET_TYPE_WAKEUP) {
        return;
    }
    if (!cpus_are_resettable()) {
        /* A new machine whose memory has its initial contents already. */
        return;
    }
    if (m->emulate) {
        private_backend_invalidate(m, id);
    }
    ret = privmem_region_reset(m->region);
    trace_private_backend_reset(id, ret);
    if (ret) {
        private_memory_report(error_report, TYPE_MEMORY_BACKEND_PRIVATE " '%s':"
                              " cannot be reset: %s", id, privmem_last_error());
    }
}

/* The shared store's size of huge pages is by default the host's. */
static bool private_backend_huge_page(HostMemoryBackendPrivate *m, Error **errp)
{
    int fd;

    m->huge_page = m->hugetlb ? m->hugetlbsize : 0;
    if (m->hugetlb && !m->hugetlbsize) {
        fd = qemu_memfd_create("huge-page-size", 0, true, 0, 0, errp);
        if (fd < 0) {
            return false;
        }
        m->huge_page = qemu_fd_getpagesize(fd);
        close(fd);
    }
    return true;
}

/* Bytes that a device is to have in one mapping, 0 to be decided later. */
static uint64_t private_backend_entry(HostMemoryBackendPrivate *m)
{
    return m->dma_granularity ?: MIN(m->huge_page, MAX_DMA_GRANULARITY);
}

static bool private_backend_new_region(HostMemoryBackendPrivate *m,
                                       struct privmem_vm *vm, const char *id,
                                       Error **errp)
{
    uint64_t size = MEMORY_BACKEND(m)->size;
    struct privmem_region_options options = {
        .size = sizeof(options),
        .initially_private = private_memory_is_launched() ||
            m->initial_state == PRIVATE_MEMORY_INITIAL_STATE_PRIVATE,
        .keep_private = m->discard == PRIVATE_MEMORY_DISCARD_SHARED ||
                        m->discard == PRIVATE_MEMORY_DISCARD_NONE,
        .keep_shared = m->discard == PRIVATE_MEMORY_DISCARD_PRIVATE ||
                       m->discard == PRIVATE_MEMORY_DISCARD_NONE,
        .prefault = m->prefault,
    };

    if (!private_backend_huge_page(m, errp)) {
        return false;
    }
    options.huge_page_size = m->huge_page;
    trace_private_backend_new_region(id, size, options.initially_private,
                                     options.huge_page_size);
    if (privmem_region_new(vm, id, size, &options, &m->region)) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s' (property 'size' "
                   "is %" PRIu64 "): %s", id, size, privmem_last_error());
        return false;
    }
    if (m->prefault) {
        private_memory_use_prefault();
    }
    if (private_backend_entry(m) > qemu_real_host_page_size()) {
        private_memory_use_large_mappings();
    }
    return true;
}

static bool private_backend_memory_alloc(HostMemoryBackend *backend,
                                         Error **errp)
{
    ERRP_GUARD();
    HostMemoryBackendPrivate *m = MEMORY_BACKEND_PRIVATE(backend);
    const char *id = object_get_canonical_path_component(OBJECT(m));
    struct privmem_vm *vm;

    if (!private_backend_check(m, id, errp)) {
        return false;
    }
    vm = private_memory_vm(m->emulate, errp);
    if (!vm) {
        error_prepend(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': ", id);
        return false;
    }
    if (!private_backend_new_region(m, vm, id, errp) ||
        !private_backend_block(m, id, errp) ||
        !private_backend_map(m, id, errp)) {
        return false;
    }
    qemu_register_resettable(OBJECT(m));
    return true;
}

/* The private store's part of 'host-nodes', 'policy' and 'prealloc'. */
static bool private_backend_take(HostMemoryBackendPrivate *m, bool prealloc,
                                 Error **errp)
{
    HostMemoryBackend *backend = MEMORY_BACKEND(m);
    uint32_t threads = backend->prealloc_threads;
    const char *what = "property 'host-nodes'";
    int ret = 0;

    if (backend->policy != HOST_MEM_POLICY_DEFAULT) {
        ret = privmem_region_set_numa_policy(m->region, backend->policy,
                                             backend->host_nodes,
                                             BITS_TO_LONGS(MAX_NODES),
                                             threads);
    }
    if (!ret && prealloc) {
        what = "property 'prealloc'";
        ret = privmem_region_preallocate(m->region, threads);
    }
    if (ret) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': %s: %s",
                   object_get_canonical_path_component(OBJECT(m)), what,
                   privmem_last_error());
    }
    return !ret;
}

/*
 * The parent sets the policy of the shared store's mapping. It must not
 * preallocate: it would touch the mapping, whatever side is visible.
 */
static void private_backend_complete(UserCreatable *uc, Error **errp)
{
    ERRP_GUARD();
    HostMemoryBackend *backend = MEMORY_BACKEND(uc);
    bool prealloc = backend->prealloc;

    if (backend->prealloc_context) {
        error_setg(errp, TYPE_MEMORY_BACKEND_PRIVATE " '%s': property "
                   "'prealloc-context' is not supported; 'host-nodes' places "
                   "memory whichever CPU takes it",
                   object_get_canonical_path_component(OBJECT(uc)));
        return;
    }
    backend->prealloc = false;
    parent_complete(uc, errp);
    backend->prealloc = prealloc;
    if (!*errp) {
        private_backend_take(MEMORY_BACKEND_PRIVATE(uc), prealloc, errp);
    }
}

/*
 * RamDiscardManager: what is shared is populated, what is private discarded.
 *
 * Listeners run on the thread that converts, mostly a vCPU without the BQL, as
 * they do for QEMU's own private memory. They must not take it: whoever holds
 * it may wait for the conversion.
 */

/* The part of @section that lies within @size bytes from @offset, if any. */
static bool section_part(const MemoryRegionSection *section, uint64_t offset,
                         uint64_t size, MemoryRegionSection *part)
{
    uint64_t first = section->offset_within_region;
    uint64_t start = MAX(offset, first);
    uint64_t end = MIN(offset + size, first + int128_get64(section->size));

    if (start >= end) {
        return false;
    }
    *part = *section;
    part->offset_within_address_space += start - first;
    part->offset_within_region = start;
    part->size = int128_make64(end - start);
    return true;
}

static int listener_discard(void *opaque, uint64_t offset, uint64_t size,
                            uint64_t entries)
{
    RamDiscardListener *rdl = opaque;
    PrivateMemoryDma *dma = rdl->private_dma;
    MemoryRegionSection part;
    int ret = 0;

    if (section_part(rdl->section, offset, size, &part)) {
        ret = rdl->notify_discard(rdl, &part);
    }
    if (!ret && dma && dma->limit) {
        qatomic_sub(&dma->mappings, entries);
    }
    return ret;
}

static int listener_populate(void *opaque, uint64_t offset, uint64_t size)
{
    RamDiscardListener *rdl = opaque;
    PrivateMemoryDma *dma = rdl->private_dma;
    bool is_limited = dma && dma->limit;
    MemoryRegionSection part;
    int ret = 0;

    if (is_limited && qatomic_fetch_inc(&dma->mappings) >= dma->limit) {
        ret = -ENOSPC;
    } else if (section_part(rdl->section, offset, size, &part)) {
        ret = rdl->notify_populate(rdl, &part);
    }
    if (ret && is_limited) {
        qatomic_dec(&dma->mappings);
    }
    return ret;
}

/* What a mapping is of, see the property 'dma-granularity'; 0: of any run. */
static uint64_t listener_granularity(HostMemoryBackendPrivate *m,
                                     const PrivateMemoryDma *dma)
{
    uint64_t page = qemu_real_host_page_size();

    if (!dma || dma->splits) {
        return 0;
    }
    if (private_backend_entry(m)) {
        return private_backend_entry(m);
    }
    return dma->limit && MEMORY_BACKEND(m)->size / page > dma->limit ? 2 * MiB
                                                                     : page;
}

static void private_backend_register_listener(RamDiscardManager *rdm,
                                              RamDiscardListener *rdl,
                                              MemoryRegionSection *section)
{
    HostMemoryBackendPrivate *m = MEMORY_BACKEND_PRIVATE(rdm);
    struct privmem_listener listener = {
        .size = sizeof(listener),
        .opaque = rdl,
        .discard = listener_discard,
        .populate = listener_populate,
        .offset = section->offset_within_region,
        .length = int128_get64(section->size),
        .granularity = listener_granularity(m, rdl->private_dma),
    };

    rdl->section = memory_region_section_new_copy(section);
    rdl->refused = privmem_region_add_listener(m->region, &listener);
    if (rdl->refused) {
        private_memory_report(error_report, TYPE_MEMORY_BACKEND_PRIVATE " '%s':"
                              " a device cannot map what is shared, and reaches"
                              " no guest memory: %s; remove it and add it again "
                              "once it can",
                              object_get_canonical_path_component(OBJECT(m)),
                              privmem_last_error());
    }
}

static void private_backend_unregister_listener(RamDiscardManager *rdm,
                                                RamDiscardListener *rdl)
{
    HostMemoryBackendPrivate *m = MEMORY_BACKEND_PRIVATE(rdm);

    if (!rdl->refused && privmem_region_remove_listener(m->region, rdl)) {
        private_memory_report(error_report, TYPE_MEMORY_BACKEND_PRIVATE " '%s':"
                              " %s",
                              object_get_canonical_path_component(OBJECT(m)),
                              privmem_last_error());
    }
    memory_region_section_free_copy(rdl->section);
    rdl->section = NULL;
}

static uint64_t
private_backend_get_min_granularity(const RamDiscardManager *rdm,
                                    const MemoryRegion *mr)
{
    return qemu_real_host_page_size();
}

/* Calls @fn for every run of @section on one side, until it fails. */
static int replay(const RamDiscardManager *rdm,
                  const MemoryRegionSection *section, bool is_private,
                  int (*fn)(MemoryRegionSection *section, void *opaque),
                  void *opaque)
{
    HostMemoryBackendPrivate *m = MEMORY_BACKEND_PRIVATE(rdm);
    uint64_t first = section->offset_within_region;
    uint64_t end = first + int128_get64(section->size);
    uint64_t at = ROUND_DOWN(first, qemu_real_host_page_size());
    MemoryRegionSection part;
    struct privmem_run run;
    int ret = 0;

    while (!ret && at < end && !privmem_region_next_run(m->region, at, &run)) {
        if (run.is_private == is_private &&
            section_part(section, run.offset, run.size, &part)) {
            ret = fn(&part, opaque);
        }
        at += run.size;
    }
    return ret;
}

static int found(MemoryRegionSection *section, void *opaque)
{
    return 1;
}

static bool private_backend_is_populated(const RamDiscardManager *rdm,
                                         const MemoryRegionSection *section)
{
    return !replay(rdm, section, true, found, NULL);
}

#ifdef PRIVATE_MEMORY_VOID_REPLAY

struct VoidReplay {
    ReplayRamDiscard fn;
    void *opaque;
};

static int void_replay(MemoryRegionSection *section, void *opaque)
{
    struct VoidReplay *inner = opaque;

    inner->fn(section, inner->opaque);
    return 0;
}

static int private_backend_replay_populated(const RamDiscardManager *rdm,
                                            MemoryRegionSection *section,
                                            ReplayRamPopulate fn,
                                            void *opaque)
{
    return replay(rdm, section, false, fn, opaque);
}

static void private_backend_replay_discarded(const RamDiscardManager *rdm,
                                             MemoryRegionSection *section,
                                             ReplayRamDiscard fn,
                                             void *opaque)
{
    struct VoidReplay inner = { fn, opaque };

    replay(rdm, section, true, void_replay, &inner);
}

#else

static int private_backend_replay_populated(const RamDiscardManager *rdm,
                                            MemoryRegionSection *section,
                                            ReplayRamDiscardState fn,
                                            void *opaque)
{
    return replay(rdm, section, false, fn, opaque);
}

static int private_backend_replay_discarded(const RamDiscardManager *rdm,
                                            MemoryRegionSection *section,
                                            ReplayRamDiscardState fn,
                                            void *opaque)
{
    return replay(rdm, section, true, fn, opaque);
}

#endif

/* Whether the object is not made yet; sets @errp otherwise. */
static bool can_set(Object *o, const char *name, Error **errp)
{
    if (host_memory_backend_mr_inited(MEMORY_BACKEND(o))) {
        error_setg(errp, "cannot change property '%s' of %s", name,
                   object_get_typename(o));
        return false;
    }
    return true;
}

static bool private_backend_get_emulate(Object *o, Error **errp)
{
    return MEMORY_BACKEND_PRIVATE(o)->emulate;
}

static void private_backend_set_emulate(Object *o, bool value, Error **errp)
{
    if (can_set(o, "emulate", errp)) {
        MEMORY_BACKEND_PRIVATE(o)->emulate = value;
    }
}

static int private_backend_get_initial_state(Object *o, Error **errp)
{
    return MEMORY_BACKEND_PRIVATE(o)->initial_state;
}

static void private_backend_set_initial_state(Object *o, int value,
                                              Error **errp)
{
    if (can_set(o, "initial-state", errp)) {
        MEMORY_BACKEND_PRIVATE(o)->initial_state = value;
    }
}

static int private_backend_get_discard(Object *o, Error **errp)
{
    return MEMORY_BACKEND_PRIVATE(o)->discard;
}

static void private_backend_set_discard(Object *o, int value, Error **errp)
{
    if (can_set(o, "discard", errp)) {
        MEMORY_BACKEND_PRIVATE(o)->discard = value;
    }
}

static bool private_backend_get_hugetlb(Object *o, Error **errp)
{
    return MEMORY_BACKEND_PRIVATE(o)->hugetlb;
}

static void private_backend_set_hugetlb(Object *o, bool value, Error **errp)
{
    if (can_set(o, "hugetlb", errp)) {
        MEMORY_BACKEND_PRIVATE(o)->hugetlb = value;
    }
}

static void private_backend_get_hugetlbsize(Object *o, Visitor *v,
                                            const char *name, void *opaque,
                                            Error **errp)
{
    visit_type_size(v, name, &MEMORY_BACKEND_PRIVATE(o)->hugetlbsize, errp);
}

static void private_backend_set_hugetlbsize(Object *o, Visitor *v,
                                            const char *name, void *opaque,
                                            Error **errp)
{
    uint64_t value;

    if (can_set(o, name, errp) && visit_type_size(v, name, &value, errp)) {
        MEMORY_BACKEND_PRIVATE(o)->hugetlbsize = value;
    }
}

static bool private_backend_get_prefault(Object *o, Error **errp)
{
    return MEMORY_BACKEND_PRIVATE(o)->prefault;
}

static void private_backend_set_prefault(Object *o, bool value, Error **errp)
{
    if (can_set(o, "prefault", errp)) {
        MEMORY_BACKEND_PRIVATE(o)->prefault = value;
    }
}

static void private_backend_get_dma_granularity(Object *o, Visitor *v,
                                                const char *name, void *opaque,
                                                Error **errp)
{
    visit_type_size(v, name, &MEMORY_BACKEND_PRIVATE(o)->dma_granularity, errp);
}

static void private_backend_set_dma_granularity(Object *o, Visitor *v,
                                                const char *name, void *opaque,
                                                Error **errp)
{
    uint64_t value;

    if (can_set(o, name, errp) && visit_type_size(v, name, &value, errp)) {
        MEMORY_BACKEND_PRIVATE(o)->dma_granularity = value;
    }
}

static void private_backend_instance_init(Object *obj)
{
    MEMORY_BACKEND(obj)->share = true;
}

/*
 * The id may be used again from now on, though the object stays for as long as
 * anybody maps its RAM.
 */
static void private_backend_unparent(Object *obj)
{
    vmstate_unregister(VMSTATE_IF(obj), &vmstate_private_backend,
                       MEMORY_BACKEND_PRIVATE(obj));
}

/* By now nobody maps the RAM any more: the last user held a reference. */
static void private_backend_instance_finalize(Object *obj)
{
    HostMemoryBackendPrivate *m = MEMORY_BACKEND_PRIVATE(obj);

    qemu_unregister_resettable(obj);
    g_free(m->saved_state);
    if (m->postcopy_notifier.notify) {
        postcopy_remove_notifier(&m->postcopy_notifier);
    }
    if (m->discard_required) {
        ram_block_coordinated_discard_require(false);
    }
    if (m->beside_no_pinner) {
        private_memory_del_backend();
    }
    migrate_del_blocker(&m->migration_blocker);
    privmem_region_free(m->region);
}

static void private_backend_class_init(ObjectClass *oc, ClassInitData *data)
{
    HostMemoryBackendClass *bc = MEMORY_BACKEND_CLASS(oc);
    UserCreatableClass *ucc = USER_CREATABLE_CLASS(oc);
    RamDiscardManagerClass *rdmc = RAM_DISCARD_MANAGER_CLASS(oc);
    ResettableClass *rc = RESETTABLE_CLASS(oc);

    oc->unparent = private_backend_unparent;
    bc->alloc = private_backend_memory_alloc;
    parent_complete = ucc->complete;
    ucc->complete = private_backend_complete;
    VMSTATE_IF_CLASS(oc)->get_id = private_backend_get_id;
    rc->get_state = private_backend_reset_state;
    rc->phases.hold = private_backend_reset_hold;
    rdmc->get_min_granularity = private_backend_get_min_granularity;
    rdmc->is_populated = private_backend_is_populated;
    rdmc->replay_populated = private_backend_replay_populated;
    rdmc->replay_discarded = private_backend_replay_discarded;
    rdmc->register_listener = private_backend_register_listener;
    rdmc->unregister_listener = private_backend_unregister_listener;

    object_class_property_add_bool(oc, "emulate", private_backend_get_emulate,
                                   private_backend_set_emulate);
    object_class_property_set_description(oc, "emulate",
        "Emulate private memory without KVM, for TCG and tests; "
        "protects nothing");
    object_class_property_add_enum(oc, "initial-state",
                                   "PrivateMemoryInitialState",
                                   &PrivateMemoryInitialState_lookup,
                                   private_backend_get_initial_state,
                                   private_backend_set_initial_state);
    object_class_property_set_description(oc, "initial-state",
        "Where memory is at first and after a reset: auto (default; what the "
        "type of the guest expects), private or shared");
    object_class_property_add_enum(oc, "discard", "PrivateMemoryDiscard",
                                   &PrivateMemoryDiscard_lookup,
                                   private_backend_get_discard,
                                   private_backend_set_discard);
    object_class_property_set_description(oc, "discard",
        "Which store gives memory back that goes to the other side: both "
        "(default), private, shared or none");
    object_class_property_add_bool(oc, "hugetlb", private_backend_get_hugetlb,
                                   private_backend_set_hugetlb);
    object_class_property_set_description(oc, "hugetlb",
        "Use huge pages for the shared store");
    object_class_property_add(oc, "hugetlbsize", "int",
                              private_backend_get_hugetlbsize,
                              private_backend_set_hugetlbsize, NULL, NULL);
    object_class_property_set_description(oc, "hugetlbsize",
        "Huge page size (default: the host's)");
    object_class_property_add_bool(oc, "prefault",
                                   private_backend_get_prefault,
                                   private_backend_set_prefault);
    object_class_property_set_description(oc, "prefault",
        "Map memory as soon as the guest has made it private, before it is "
        "touched");
    object_class_property_add(oc, "dma-granularity", "int",
                              private_backend_get_dma_granularity,
                              private_backend_set_dma_granularity, NULL, NULL);
    object_class_property_set_description(oc, "dma-granularity",
        "Bytes of shared memory that an assigned device has in one mapping, "
        "and that become private as a whole only");
}

static const TypeInfo private_backend_info = {
    .name = TYPE_MEMORY_BACKEND_PRIVATE,
    .parent = TYPE_MEMORY_BACKEND,
    .instance_size = sizeof(HostMemoryBackendPrivate),
    .instance_init = private_backend_instance_init,
    .instance_finalize = private_backend_instance_finalize,
    .class_init = private_backend_class_init,
    .interfaces = (InterfaceInfo[]) {
        { TYPE_RAM_DISCARD_MANAGER },
        { TYPE_VMSTATE_IF },
        { TYPE_RESETTABLE_INTERFACE },
        { }
    },
};

static void register_types(void)
{
    type_register_static(&private_backend_info);
}

type_init(register_types);
