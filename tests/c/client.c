/*
 * A C client of libprivmem: the emulated agent from creation to the end, and
 * what the interface promises for bad arguments. Exits 0, or 1 with the line
 * that failed.
 *
 * SPDX-License-Identifier: MIT
 */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/mempolicy.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

#define PAGE 4096ull
#define PAGES 64ull

static bool all_are(const unsigned char *page, int value)
{
    for (size_t i = 0; i < PAGE; i++) {
        if (page[i] != value) {
            return false;
        }
    }
    return true;
}

static void null_is_an_error(void)
{
    struct privmem_vm *vm = NULL;
    struct privmem_region *region = NULL;
    struct privmem_info info;
    struct privmem_run run;
    uint64_t len = 1;
    char text[8];

    CHECK(privmem_vm_new_emulated(NULL) == -EINVAL);
    CHECK(strstr(privmem_last_error(), "NULL"));
    CHECK(privmem_vm_new_kvm(-1, &vm) == -EINVAL && vm == NULL);
    CHECK(privmem_vm_bind(NULL, NULL, 0, 0, PAGE) == -EINVAL);
    CHECK(privmem_vm_unbind(NULL, 0, PAGE) == -EINVAL);
    CHECK(privmem_vm_convert(NULL, 0, PAGE, true, &len) == -EINVAL);
    CHECK(privmem_vm_relocate(NULL, 0, 1, -1, 0) == -EINVAL);
    CHECK(privmem_vm_memory_fault(NULL, 0, PAGE, true) == -EINVAL);
    CHECK(privmem_vm_memory_failure(NULL, 0, true, true, NULL) == -EINVAL);
    CHECK(privmem_region_memory_failure(NULL, 0, true, true, NULL) == -EINVAL);
    CHECK(privmem_region_failure(NULL, 0, NULL) == -EINVAL);
    CHECK(privmem_region_new(NULL, "r", PAGE, NULL, &region) == -EINVAL);
    CHECK(privmem_vm_new_tdx(-1, &vm) == -EINVAL);
    CHECK(privmem_vm_new_snp(-1, -1, &vm) == -EINVAL);
    CHECK(privmem_vm_finalize(NULL) == -EINVAL);
    CHECK(privmem_vm_populate(NULL, 0, PAGE, NULL, 3) == -EINVAL);
    CHECK(privmem_vm_new_agent(-1, NULL, NULL) == -EINVAL);
    CHECK(privmem_region_shared_fd(NULL) == -EINVAL);
    CHECK(privmem_region_private_fd(NULL) == -EINVAL);
    CHECK(privmem_region_set_host_mapping(NULL, text) == -EINVAL);
    CHECK(privmem_region_slot_mapping(NULL, NULL) == -EINVAL);
    CHECK(privmem_vm_run_fault(NULL) == -EINVAL);
    CHECK(privmem_region_reset(NULL) == -EINVAL);
    CHECK(!privmem_region_host_access(NULL, 0, &len));
    CHECK(privmem_region_info(NULL, &info, sizeof(info)) == -EINVAL);
    CHECK(privmem_region_picture(NULL, text, sizeof(text)) == -EINVAL);
    CHECK(privmem_region_next_run(NULL, 0, &run) == -EINVAL);
    CHECK(privmem_region_binding(NULL, 0, NULL) == -EINVAL);
    privmem_vm_free(NULL);
    privmem_region_free(NULL);
}

/* Out-parameters and fds that are refused although the handle is good. */
static void bad_arguments_are_refused(const struct privmem_vm *vm,
                                      const struct privmem_region *region)
{
    struct privmem_vm *none = NULL;
    struct privmem_info info;
    uint64_t len = 3 * PAGE;
    void *mapping = NULL;

    CHECK(privmem_vm_new_kvm(privmem_region_shared_fd(region), &none) ==
          -ENOTTY);
    CHECK(none == NULL && strstr(privmem_last_error(), "KVM"));
    CHECK(privmem_region_info(region, NULL, sizeof(info)) == -EINVAL);
    CHECK(privmem_region_next_run(region, 0, NULL) == -EINVAL);
    CHECK(privmem_region_binding(region, 0, NULL) == -EINVAL);
    CHECK(privmem_region_picture(region, NULL, 8) == -EINVAL);
    CHECK(privmem_region_set_host_mapping(region, NULL) == -EINVAL);
    CHECK(!privmem_region_host_access(region, 0, NULL));
    /* The emulated agent keeps the host off nothing. */
    CHECK(convert(vm, 0, PAGE, true) == 0);
    CHECK(privmem_region_host_access(region, 0, &len) && len == 3 * PAGE);
    CHECK(convert(vm, 0, PAGE, false) == 0);
    CHECK(privmem_region_slot_mapping(region, &mapping) == -EOPNOTSUPP);
    CHECK(privmem_vm_run_fault(vm) == 0);
    CHECK(privmem_vm_memory_fault(vm, 0, PAGE, true) == 0);
    CHECK(privmem_vm_memory_fault(vm, 1, PAGE, false) == -EINVAL);
}

/*
 * A downstream mapper that counts the bytes and entries that it maps, up to a
 * limit, and may keep what it maps.
 */
struct mapper {
    uint64_t mapped, limit, entries;
    bool clings;
};

static int mapper_discard(void *opaque, uint64_t offset, uint64_t size,
                          uint64_t entries)
{
    struct mapper *mapper = opaque;

    (void)offset;
    if (mapper->clings) {
        return -EIO;
    }
    mapper->mapped -= size;
    mapper->entries -= entries;
    return 0;
}

static int mapper_populate(void *opaque, uint64_t offset, uint64_t size)
{
    struct mapper *mapper = opaque;

    (void)offset;
    if (mapper->mapped + size > mapper->limit) {
        return -ENOSPC;
    }
    mapper->mapped += size;
    mapper->entries++;
    return 0;
}

static uint64_t mapper_entries_left(void *opaque)
{
    struct mapper *mapper = opaque;

    return mapper->limit / PAGE - mapper->entries;
}

static void listeners_are_told(const struct privmem_vm *vm,
                               const struct privmem_region *region)
{
    struct mapper mapper = { .limit = PAGES * PAGE };
    struct privmem_listener listener = {
        .size = sizeof(listener),
        .opaque = &mapper,
        .discard = mapper_discard,
        .populate = mapper_populate,
    }, bad = listener;

    bad.populate = NULL;
    CHECK(privmem_region_add_listener(NULL, &listener) == -EINVAL);
    CHECK(privmem_region_add_listener(region, NULL) == -EINVAL);
    CHECK(privmem_region_add_listener(region, &bad) == -EINVAL);
    bad = listener;
    bad.size = 8;
    CHECK(privmem_region_add_listener(region, &bad) == -EINVAL);
    bad = listener;
    bad.granularity = 3 * PAGE;
    CHECK(privmem_region_add_listener(region, &bad) == -EINVAL);
    bad = listener;
    bad.length = (PAGES + 1) * PAGE;
    CHECK(privmem_region_add_listener(region, &bad) == -EINVAL);
    CHECK(privmem_region_remove_listener(region, &mapper) == -ENOENT);

    CHECK(convert(vm, 0, PAGES * PAGE, false) == 0);
    CHECK(privmem_region_add_listener(region, &listener) == 0);
    CHECK(mapper.mapped == PAGES * PAGE && mapper.entries == 1);
    CHECK(privmem_region_add_listener(region, &listener) == -EEXIST);
    CHECK(convert(vm, 0, 2 * PAGE, true) == 0);
    CHECK(mapper.mapped == (PAGES - 2) * PAGE);
    mapper.limit = mapper.mapped;
    CHECK(convert(vm, 0, 2 * PAGE, false) == -ENOSPC);
    CHECK(strstr(privmem_last_error(), "listener"));
    mapper.limit += 2 * PAGE;
    CHECK(convert(vm, 0, 2 * PAGE, false) == 0);
    mapper.clings = true;
    CHECK(convert(vm, 0, 2 * PAGE, true) == -EIO);
    CHECK(mapper.mapped == PAGES * PAGE);
    mapper.clings = false;
    CHECK(privmem_region_remove_listener(region, &mapper) == 0);
    CHECK(mapper.mapped == 0);

    /* One that gives up whole entries only, of a part of the region. */
    mapper.entries = 0;
    listener.granularity = 4 * PAGE;
    listener.offset = 2 * PAGE;
    listener.length = 8 * PAGE;
    CHECK(privmem_region_add_listener(region, &listener) == 0);
    CHECK(mapper.mapped == 8 * PAGE && mapper.entries == 2 + 1 + 2);
    CHECK(convert(vm, 4 * PAGE, PAGE, true) == -EBUSY);
    CHECK(strstr(privmem_last_error(), "dma-granularity"));
    CHECK(convert(vm, 3 * PAGE, 5 * PAGE, true) == 0);
    CHECK(mapper.mapped == 3 * PAGE && mapper.entries == 3);
    CHECK(privmem_region_remove_listener(region, &mapper) == 0);
    CHECK(mapper.mapped == 0 && mapper.entries == 0);

    /* One that says how many entries are left: it is not asked for more. */
    CHECK(convert(vm, 0, PAGES * PAGE, false) == 0);
    listener.granularity = PAGE;
    listener.offset = listener.length = 0;
    mapper.limit = PAGES * PAGE;
    /* As a caller has it that was compiled before there was that function. */
    listener.size = offsetof(struct privmem_listener, entries_left);
    CHECK(privmem_region_add_listener(region, &listener) == 0);
    CHECK(privmem_region_remove_listener(region, &mapper) == 0);
    listener.size = sizeof(listener);
    listener.entries_left = mapper_entries_left;
    CHECK(privmem_region_add_listener(region, &listener) == 0);
    CHECK(convert(vm, 0, 4 * PAGE, true) == 0);
    mapper.limit -= PAGE;
    CHECK(convert(vm, 0, 4 * PAGE, false) == -ENOSPC);
    CHECK(strstr(privmem_last_error(), "no DMA mapping is left"));
    CHECK(convert(vm, 0, 3 * PAGE, false) == 0);
    CHECK(mapper.entries == PAGES - 1);
    CHECK(privmem_region_remove_listener(region, &mapper) == 0);
    CHECK(convert(vm, 0, PAGES * PAGE, false) == 0);
}

static void *convert_own_part(void *vm)
{
    static int number;
    uint64_t gpa = (uint64_t)__atomic_fetch_add(&number, 1, __ATOMIC_RELAXED) *
                   16 * PAGE;

    for (int i = 0; i < 200; i++) {
        CHECK(convert(vm, gpa, 16 * PAGE, i % 2 == 0) == 0);
    }
    return NULL;
}

static void convert_in_threads(const struct privmem_vm *vm)
{
    pthread_t threads[4];

    for (int i = 0; i < 4; i++) {
        CHECK(pthread_create(&threads[i], NULL, convert_own_part,
                             (void *)vm) == 0);
    }
    for (int i = 0; i < 4; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
}

/* A trust agent of ours: counts what it is told, and refuses one page. */
struct agent {
    int before, after, invalidated, prepared, populated, finalized, moved;
    uint64_t refused, failed;
};

static int agent_prepare(void *opaque)
{
    /* Not at the first time. */
    return ((struct agent *)opaque)->prepared++ ? 0 : -EAGAIN;
}

static int agent_populate(void *opaque, uint64_t gpa, uint64_t size,
                          void *source, enum privmem_page_type page_type)
{
    struct agent *agent = opaque;

    if (page_type == PRIVMEM_PAGE_ZERO) {
        return source == NULL && size == PAGE ? 0 : -EINVAL;
    }
    agent->populated += *(unsigned char *)source;
    return gpa == agent->refused ? -EACCES : 0;
}

static int agent_finalize(void *opaque)
{
    ((struct agent *)opaque)->finalized++;
    return 0;
}

static int agent_before(void *opaque, uint64_t gpa, uint64_t size,
                        bool to_private)
{
    struct agent *agent = opaque;

    (void)size;
    agent->before += to_private ? 1 : 100;
    return gpa == agent->refused ? -EACCES : 0;
}

static void agent_after(void *opaque, uint64_t gpa, uint64_t size,
                        bool is_private)
{
    (void)gpa;
    (void)size;
    ((struct agent *)opaque)->after += is_private ? 1 : 100;
}

static void agent_invalidate(void *opaque, uint64_t gpa, uint64_t size)
{
    (void)gpa;
    ((struct agent *)opaque)->invalidated += size / PAGE;
}

static int agent_relocate(void *opaque, uint64_t gpa, uint64_t size,
                          int from_fd, uint64_t from_offset,
                          int to_fd, uint64_t to_offset)
{
    struct agent *agent = opaque;
    unsigned char page[PAGE];

    CHECK(size == PAGE);
    if (gpa == agent->refused) {
        return -EACCES;
    }
    CHECK(pread(from_fd, page, PAGE, from_offset) == PAGE);
    CHECK(pwrite(to_fd, page, PAGE, to_offset) == PAGE);
    agent->moved++;
    return 0;
}

/* The agent of a client moves contents; an older one has no function for it. */
static void an_agent_moves_pages(struct agent *agent, struct privmem_vm *vm,
                                 struct privmem_region *region)
{
    unsigned char page[PAGE] = { 0 };
    int private_fd = privmem_region_private_fd(region);
    int fd = memfd_create("elsewhere", MFD_CLOEXEC);

    CHECK(fd >= 0 && ftruncate(fd, 2 * PAGE) == 0);
    CHECK(convert(vm, 2 * PAGE, PAGE, true) == 0);
    memset(page, 9, PAGE);
    CHECK(pwrite(private_fd, page, PAGE, 2 * PAGE) == PAGE);
    CHECK(privmem_vm_relocate(vm, 2 * PAGE, 1, fd, PAGE) == 0);
    CHECK(agent->moved == 1);
    CHECK(pread(fd, page, PAGE, PAGE) == PAGE && all_are(page, 9));
    CHECK(pread(private_fd, page, PAGE, 2 * PAGE) == PAGE && all_are(page, 0));
    agent->refused = 2 * PAGE;
    CHECK(privmem_vm_relocate(vm, 2 * PAGE, 1, -1, 0) == -EACCES);
    CHECK(pread(fd, page, PAGE, PAGE) == PAGE && all_are(page, 9));
    agent->refused = 7 * PAGE;
    CHECK(privmem_vm_relocate(vm, 2 * PAGE, 1, -1, 0) == 0);
    CHECK(pread(private_fd, page, PAGE, 2 * PAGE) == PAGE && all_are(page, 9));
    close(fd);
}

static void an_older_agent_moves_nothing(struct privmem_agent table)
{
    struct privmem_vm *vm = NULL;

    table.size = offsetof(struct privmem_agent, relocate);
    CHECK(privmem_vm_new_agent(-1, &table, &vm) == 0);
    CHECK(privmem_vm_relocate(vm, 0, 1, -1, 0) == -EOPNOTSUPP);
    CHECK(strstr(privmem_last_error(), "'ours'") != NULL);
    privmem_vm_free(vm);
    table.size--;
    CHECK(privmem_vm_new_agent(-1, &table, &vm) == -EINVAL);
}

static void agent_memory_failure(void *opaque, uint64_t gpa, uint64_t size,
                                 bool is_private)
{
    struct agent *agent = opaque;

    CHECK(size == PAGE);
    agent->failed = gpa + is_private;
}

/* The host loses a page of either side. The guest chooses sides by its access. */
static void pages_fail(const struct privmem_vm *vm,
                       const struct privmem_region *region,
                       const struct agent *agent)
{
    struct privmem_failure failure;
    struct privmem_info info;

    CHECK(privmem_vm_memory_fault(vm, 9 * PAGE, PAGE, true) == 0);
    CHECK(pwrite(privmem_region_private_fd(region), "x", 1, 9 * PAGE) == 1);
    CHECK(pwrite(privmem_region_shared_fd(region), "x", 1, 10 * PAGE) == 1);
    CHECK(privmem_vm_memory_failure(vm, 9 * PAGE, true, true, NULL) == -EINVAL);
    CHECK(privmem_vm_memory_failure(vm, PAGES * PAGE, true, true, &failure) ==
          -ENOENT);
    for (int retire = 0; retire <= 1; retire++) {
        CHECK(agent->failed == 0);
        CHECK(privmem_vm_memory_failure(vm, 9 * PAGE, true, retire, &failure) == 0);
        CHECK(failure.offset == 9 * PAGE && failure.size == PAGE);
        CHECK(failure.lost == PAGE && failure.gpa == 9 * PAGE);
        CHECK(failure.unmapped == 0 && failure.is_private);
    }
    CHECK(agent->failed == 9 * PAGE + 1);
    CHECK(privmem_vm_memory_fault(vm, 9 * PAGE, PAGE, false) == 0);

    CHECK(privmem_region_memory_failure(region, 10 * PAGE, true, true, NULL) ==
          -EINVAL);
    CHECK(privmem_region_memory_failure(region, PAGES * PAGE, true, true,
                                        &failure) == -EINVAL);
    CHECK(privmem_region_memory_failure(region, 10 * PAGE, true, true,
                                        &failure) == 0);
    CHECK(failure.lost == 0 && failure.gpa == PRIVMEM_UNKNOWN);
    CHECK(privmem_region_memory_failure(region, 10 * PAGE, false, true,
                                        &failure) == 0);
    CHECK(agent->failed == 10 * PAGE);

    CHECK(privmem_region_info(region, &info, sizeof(info)) == 0);
    CHECK(info.memory_failures == 2);
    /* A client that was compiled before there was this figure. */
    info.memory_failures = 77;
    CHECK(privmem_region_info(region, &info,
                              offsetof(struct privmem_info, memory_failures)) == 0);
    CHECK(info.memory_failures == 77);
    CHECK(privmem_region_failure(region, 1, &failure) == 0);
    CHECK(failure.offset == 9 * PAGE);
    CHECK(privmem_region_failure(region, 0, NULL) == -EINVAL);
    CHECK(privmem_region_failure(region, 2, &failure) == -ENOENT);
}

static void a_client_brings_its_own_agent(void)
{
    static unsigned char source[2 * PAGE] __attribute__((aligned(4096)));
    struct agent agent = { .refused = 7 * PAGE };
    struct privmem_agent table = {
        .size = sizeof(table),
        .opaque = &agent,
        .name = "ours",
        .prepare = agent_prepare,
        .populate = agent_populate,
        .finalize = agent_finalize,
        .before_convert = agent_before,
        .after_convert = agent_after,
        .invalidate = agent_invalidate,
        .relocate = agent_relocate,
        .memory_failure = agent_memory_failure,
        .chooses_side = true,
    };
    struct {
        struct privmem_agent table;
        uint64_t unknown;
    } newer = { .unknown = UINT64_C(1) << 63 };
    struct privmem_vm *vm = NULL;
    struct privmem_region *region = NULL;

    CHECK(privmem_vm_new_agent(-1, NULL, &vm) == -EINVAL);
    an_older_agent_moves_nothing(table);
    CHECK(privmem_vm_new_agent(-2, &table, &vm) == -EINVAL);
    newer.table = table;
    newer.table.size = sizeof(newer);
    CHECK(privmem_vm_new_agent(-1, &newer.table, &vm) == -E2BIG);
    memset(&newer.table.chooses_side, 0xff, sizeof(bool));
    newer.table.size = sizeof(table);
    CHECK(privmem_vm_new_agent(-1, &newer.table, &vm) == -EINVAL);
    CHECK(strstr(privmem_last_error(), "chooses_side is 255"));
    CHECK(privmem_vm_new_agent(-1, &table, &vm) == 0);
    CHECK(privmem_vm_set_tdx_vcpu(vm, 0) == -EINVAL);
    CHECK(privmem_vm_snp_set_start(vm, source, 64) == -EINVAL);
    CHECK(privmem_vm_snp_set_finish(vm, source, 64) == -EINVAL);
    CHECK(privmem_region_new(vm, "ram", PAGES * PAGE, NULL, &region) == 0);
    CHECK(privmem_vm_bind(vm, region, 0, 0, PAGES * PAGE) == 0);

    CHECK(convert(vm, PAGE, 2 * PAGE, true) == 0);
    CHECK(convert(vm, PAGE, PAGE, false) == 0);
    CHECK(agent.before == 101 && agent.after == 101);
    CHECK(convert(vm, 7 * PAGE, PAGE, true) == -EACCES);
    CHECK(strstr(privmem_last_error(), "ours") != NULL);
    CHECK(agent.before == 102 && agent.after == 101);
    CHECK(privmem_region_discard(region, 0, 8 * PAGE) == 0);
    CHECK(agent.invalidated == 1);
    pages_fail(vm, region, &agent);

    CHECK(privmem_vm_prepare(vm) == -EAGAIN);
    CHECK(privmem_vm_prepare(vm) == 0 && agent.prepared == 2);
    CHECK(privmem_vm_prepare(vm) == -EPERM);
    memset(source, 3, PAGE);
    memset(source + PAGE, 4, PAGE);
    CHECK(privmem_vm_populate(vm, 0, PAGE, source, 0) == -EINVAL);
    CHECK(privmem_vm_populate(vm, 0, PAGE, source, 7) == -EINVAL);
    CHECK(strstr(privmem_last_error(), "7 is no type of a page"));
    CHECK(privmem_vm_populate(vm, 0, PAGE, source, UINT32_MAX) == -EINVAL);
    CHECK(privmem_vm_populate(vm, 0, UINT64_MAX, source, 1) == -EINVAL);
    CHECK(privmem_vm_populate(vm, 0, PAGE, NULL, PRIVMEM_PAGE_NORMAL) == -EINVAL);
    CHECK(privmem_vm_populate(vm, 0, PAGE, NULL, PRIVMEM_PAGE_ZERO) == 0);
    CHECK(privmem_vm_populate(vm, 0, PAGE, source + PAGE,
                              PRIVMEM_PAGE_UNMEASURED) == 0);
    CHECK(agent.populated == 4);
    an_agent_moves_pages(&agent, vm, region);
    CHECK(privmem_vm_finalize(vm) == 0 && agent.finalized == 1);
    CHECK(privmem_vm_finalize(vm) == -EPERM);
    CHECK(privmem_vm_populate(vm, 0, PAGE, source, PRIVMEM_PAGE_NORMAL) == -EPERM);
    CHECK(privmem_region_reset(region) == -EPERM);
    privmem_region_free(region);
    privmem_vm_free(vm);
}

/* What went wrong is still known later. */
static void failed_conversions_are_kept(void)
{
    struct privmem_vm *vm = NULL;
    struct privmem_failed_conversion failure;
    size_t size = sizeof(failure);

    CHECK(privmem_vm_new_emulated(&vm) == 0);
    CHECK(privmem_vm_failed_conversion(NULL, 0, &failure, size) == -EINVAL);
    CHECK(privmem_vm_failed_conversion(vm, 0, &failure, size - 1) == -EINVAL);
    CHECK(privmem_vm_failed_conversion(vm, 0, &failure, size) == -ENOENT);
    CHECK(convert(vm, 7 * PAGE, PAGE, true) == -EINVAL);
    CHECK(convert(vm, 3, PAGE, false) == -EINVAL);
    CHECK(privmem_vm_failed_conversion(vm, 0, NULL, size) == -EINVAL);
    CHECK(privmem_vm_failed_conversion(vm, 1, &failure, size) == 0);
    CHECK(failure.number == 1 && failure.gpa == 7 * PAGE && failure.to_private);
    CHECK(failure.size == PAGE && failure.error == -EINVAL && failure.time != 0);
    CHECK(strstr(failure.message, "0x7000") != NULL);
    CHECK(privmem_vm_failed_conversion(vm, 0, &failure, size) == 0);
    CHECK(failure.number == 2 && !failure.to_private);
    CHECK(privmem_vm_failed_conversion(vm, 2, &failure, size) == -ENOENT);
    privmem_vm_free(vm);
}

/* Contents move while they are mapped; nothing else may be where they go. */
static void private_memory_moves(const struct privmem_vm *vm,
                                 const struct privmem_region *region,
                                 unsigned char *host)
{
    struct privmem_info info;
    int fd = memfd_create("elsewhere", MFD_CLOEXEC);

    CHECK(fd >= 0 && ftruncate(fd, 8 * PAGE) == 0);
    CHECK(convert(vm, 0, 2 * PAGE, true) == 0);
    memset(host, 5, 2 * PAGE);
    CHECK(privmem_vm_relocate(vm, 0, 0, fd, 0) == -EINVAL);
    CHECK(privmem_vm_relocate(vm, 0, 2, fd, 0) == -EINVAL);
    CHECK(privmem_vm_relocate(vm, PAGE, 3, fd, 0) == -EINVAL);
    CHECK(privmem_vm_relocate(vm, 0, 1, -2, 0) == -EINVAL);
    CHECK(privmem_vm_relocate(vm, 0, 1, fd, 8 * PAGE) == -EINVAL);
    CHECK(privmem_vm_relocate(vm, 2 * PAGE, 1, fd, 0) == -EINVAL);
    if (privmem_vm_relocate(vm, 0, 1, fd, 7 * PAGE) != 0) {
        /* A host may keep userfaultfd(2) from this process. */
        CHECK(strstr(privmem_last_error(), "userfaultfd"));
        printf("skipped: moving memory: %s\n", privmem_last_error());
        close(fd);
        return;
    }
    CHECK(privmem_vm_relocate(vm, PAGE, 1, fd, 7 * PAGE) == -EBUSY);
    CHECK(all_are(host, 5) && all_are(host + PAGE, 5));
    CHECK(privmem_region_info(region, &info, sizeof(info)) == 0);
    CHECK(info.relocated == PAGE && info.swapped == 0);
    info.relocated = 77;
    CHECK(privmem_region_info(region, &info,
                              offsetof(struct privmem_info, relocated)) == 0);
    CHECK(info.relocated == 77);
    CHECK(privmem_vm_relocate(vm, 0, 1, -1, 0) == 0);
    CHECK(all_are(host, 5));
    close(fd);
}

/* Options, memory taken beforehand, and a state that is saved and loaded. */
static void regions_have_options(void)
{
    struct privmem_region_options options = {
        .size = sizeof(options) - 1,
        .initially_private = true,
    };
    struct {
        struct privmem_region_options options;
        uint64_t unknown;
    } newer;
    const unsigned long node_0 = 1, nowhere = 0;
    unsigned char state[PAGES / 8], again[PAGES / 8];
    struct privmem_vm *vm = NULL;
    struct privmem_region *region = NULL;
    struct privmem_info info;

    CHECK(privmem_vm_new_emulated(&vm) == 0);
    CHECK(privmem_region_new(vm, "o", PAGES * PAGE, &options, &region) == -EINVAL);
    options.size++;
    options.huge_page_size = 3 * PAGE;
    CHECK(privmem_region_new(vm, "o", PAGES * PAGE, &options, &region) == -EINVAL);
    options.huge_page_size = 0;
    options.prefault = true;
    CHECK(privmem_region_new(vm, "o", PAGES * PAGE, &options, &region) == -EINVAL);
    /* Never set: whatever was there. */
    memset(&options.prefault, 2, sizeof(options.prefault));
    CHECK(privmem_region_new(vm, "o", PAGES * PAGE, &options, &region) == -EINVAL);
    CHECK(strstr(privmem_last_error(), "prefault is 2"));
    options.prefault = false;
    newer.options = options;
    newer.options.size = sizeof(newer);
    newer.unknown = 1;
    CHECK(privmem_region_new(vm, "o", PAGES * PAGE, &newer.options, &region) ==
          -E2BIG);
    CHECK(strstr(privmem_last_error(), "older than its caller"));
    newer.unknown = 0;
    CHECK(privmem_region_new(vm, "o", PAGES * PAGE, &newer.options, &region) == 0);
    privmem_region_free(region);
    CHECK(privmem_region_new(vm, "o", PAGES * PAGE, &options, &region) == 0);
    CHECK(privmem_vm_bind(vm, region, 0, 0, PAGES * PAGE) == 0);
    CHECK(privmem_region_info(region, &info, sizeof(info)) == 0);
    CHECK(info.private_bytes == PAGES * PAGE);
    CHECK(privmem_vm_prefault(vm, -1, 0, PAGE) == -EINVAL);
    CHECK(privmem_vm_prefault(vm, 0, 0, PAGE) == 0);

    CHECK(privmem_region_preallocate(region, 0) == -EINVAL);
    CHECK(privmem_region_preallocate(region, 3) == 0);
    CHECK(privmem_region_info(region, &info, sizeof(info)) == 0);
    CHECK(info.private_held == PAGES * PAGE
          || info.private_held == PRIVMEM_UNKNOWN);
    CHECK(privmem_region_set_numa_policy(region, MPOL_BIND, NULL, 1, 1) == -EINVAL);
    CHECK(privmem_region_set_numa_policy(region, MPOL_BIND, &node_0, 1, 0) == -EINVAL);
    CHECK(privmem_region_set_numa_policy(region, MPOL_BIND, &nowhere, 1, 1) < 0);
    CHECK(privmem_region_set_numa_policy(region, 77, &node_0, 1, 1) < 0);

    CHECK(convert(vm, 3 * PAGE, PAGE, false) == 0);
    CHECK(privmem_region_save_state(region, NULL, sizeof(state)) == -EINVAL);
    CHECK(privmem_region_save_state(region, state, sizeof(state) - 1) == -EINVAL);
    CHECK(privmem_region_save_state(region, state, sizeof(state)) == 0);
    CHECK(state[0] == 0xf7 && state[1] == 0xff);
    state[0] = 0xef;
    CHECK(privmem_region_load_state(region, NULL, sizeof(state)) == -EINVAL);
    CHECK(privmem_region_load_state(region, state, 1) == -EINVAL);
    CHECK(privmem_region_load_state(region, state, sizeof(state)) == 0);
    CHECK(privmem_region_save_state(region, again, sizeof(again)) == 0);
    CHECK(memcmp(state, again, sizeof(state)) == 0);
    privmem_region_free(region);
    privmem_vm_free(vm);
}

static void requests_are_done_in_steps(const struct privmem_vm *vm)
{
    struct privmem_conversion *conversion = NULL;
    struct privmem_failed_conversion failed;
    uint64_t left = 1;

    CHECK(privmem_conversion_new(NULL, 0, PAGE, true, &conversion) == -EINVAL);
    CHECK(privmem_conversion_new(vm, 0, PAGE, true, NULL) == -EINVAL);
    CHECK(privmem_conversion_new(vm, 0, 7, true, &conversion) == -EINVAL);
    CHECK(privmem_conversion_step(NULL, &left) == -EINVAL);
    CHECK(conversion == NULL);
    privmem_conversion_free(NULL);

    CHECK(privmem_conversion_new(vm, 0, 2 * PAGE, true, &conversion) == 0);
    CHECK(privmem_conversion_step(conversion, NULL) == -EINVAL);
    CHECK(privmem_conversion_step(conversion, &left) == 0 && left == 0);
    privmem_conversion_free(conversion);
    CHECK(convert(vm, 0, 2 * PAGE, false) == 0);

    /* Not all of it is bound. */
    CHECK(privmem_conversion_new(vm, 0, (PAGES + 1) * PAGE, true,
                                 &conversion) == 0);
    CHECK(privmem_conversion_step(conversion, &left) == -EINVAL);
    CHECK(privmem_vm_failed_conversion(vm, 0, &failed, sizeof(failed)) == 0);
    CHECK(failed.gpa == 0 && failed.size == (PAGES + 1) * PAGE);
    CHECK(privmem_conversion_step(conversion, &left) == 0 && left == 0);
    privmem_conversion_free(conversion);
}

int main(void)
{
    struct privmem_vm *vm = NULL, *other_vm = NULL;
    struct privmem_region *region = NULL;
    struct privmem_info info;
    struct privmem_run run;
    struct privmem_binding binding;
    struct mapper last = { .limit = PAGES * PAGE };
    struct privmem_listener last_listener = {
        .size = sizeof(last_listener),
        .opaque = &last,
        .discard = mapper_discard,
        .populate = mapper_populate,
    };
    char picture[PAGES + 1];
    unsigned char *host;

    null_is_an_error();
    a_client_brings_its_own_agent();
    failed_conversions_are_kept();
    regions_have_options();
    CHECK(privmem_version()[0] != '\0');

    CHECK(privmem_vm_new_emulated(&vm) == 0);
    CHECK(privmem_region_new(vm, "ram", 0, NULL, &region) == -EINVAL);
    CHECK(privmem_region_new(vm, "ram", PAGE + 1, NULL, &region) == -EINVAL);
    CHECK(privmem_region_new(vm, NULL, PAGE, NULL, &region) == -EINVAL);
    CHECK(privmem_region_new(vm, "ram", PAGES * PAGE, NULL, NULL) == -EINVAL);
    CHECK(region == NULL);
    CHECK(privmem_region_new(vm, "ram", PAGES * PAGE, NULL, &region) == 0);

    host = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
                privmem_region_shared_fd(region), 0);
    CHECK(host != MAP_FAILED);
    CHECK(privmem_region_set_host_mapping(region, host + 1) == -EINVAL);
    CHECK(privmem_region_set_host_mapping(region, host) == 0);
    CHECK(privmem_region_set_host_mapping(region, host) == -EBUSY);

    CHECK(privmem_vm_new_emulated(&other_vm) == 0);
    CHECK(privmem_vm_bind(other_vm, region, 0, 0, PAGE) == -EINVAL);
    privmem_vm_free(other_vm);
    CHECK(privmem_vm_bind(vm, region, 0, 0, PAGES * PAGE) == 0);
    CHECK(privmem_vm_bind(vm, region, 0, PAGES * PAGE, PAGE) == -EEXIST);
    CHECK(privmem_region_binding(region, 0, &binding) == 0);
    CHECK(binding.gpa == 0 && binding.size == PAGES * PAGE);
    CHECK(privmem_region_binding(region, 1, &binding) == -ENOENT);

    memset(host, 7, PAGES * PAGE);
    CHECK(convert(vm, 4 * PAGE, 2 * PAGE, true) == 0);
    CHECK(all_are(host + 3 * PAGE, 7) && all_are(host + 4 * PAGE, 0));
    CHECK(all_are(host + 5 * PAGE, 0) && all_are(host + 6 * PAGE, 7));

    CHECK(privmem_vm_convert(vm, 0, PAGE, true, NULL) == -EINVAL);
    CHECK(convert(vm, 1, PAGE, true) == -EINVAL);
    CHECK(convert(vm, 0, 0, true) == -EINVAL);
    CHECK(convert(vm, UINT64_MAX - PAGE + 1, PAGE, false) ==
          -EINVAL);
    CHECK(convert(vm, PAGES * PAGE, PAGE, true) == -EINVAL);
    CHECK(strstr(privmem_last_error(), "0x40000"));
    CHECK(convert(vm, PAGES * PAGE, PAGE, false) == 0);

    CHECK(privmem_region_next_run(region, 0, &run) == 0);
    CHECK(run.size == 4 * PAGE && !run.is_private);
    CHECK(privmem_region_next_run(region, run.size, &run) == 0);
    CHECK(run.offset == 4 * PAGE && run.size == 2 * PAGE && run.is_private);
    CHECK(privmem_region_next_run(region, PAGES * PAGE, &run) == -EINVAL);
    CHECK(privmem_region_next_run(region, UINT64_MAX, &run) == -EINVAL);

    CHECK(privmem_region_info(region, &info, 8) == -EINVAL);
    CHECK(privmem_region_info(region, &info, sizeof(info)) == 0);
    CHECK(info.private_bytes == 2 * PAGE);
    CHECK(info.shared_bytes == (PAGES - 2) * PAGE);
    CHECK(info.conversions == 1 && info.failed_conversions == 0);
    CHECK(privmem_region_picture(region, picture, sizeof(picture)) == 0);
    CHECK(strncmp(picture, "....##..", 8) == 0 && strlen(picture) == PAGES);
    CHECK(privmem_region_picture(region, picture, 1) == -EINVAL);

    bad_arguments_are_refused(vm, region);
    convert_in_threads(vm);
    listeners_are_told(vm, region);
    requests_are_done_in_steps(vm);
    private_memory_moves(vm, region, host);
    CHECK(convert(vm, 0, PAGES * PAGE, true) == 0);
    CHECK(privmem_region_reset(region) == 0);
    CHECK(privmem_region_info(region, &info, sizeof(info)) == 0);
    CHECK(info.private_bytes == 0);
    CHECK(privmem_vm_unbind(vm, 0, PAGE) == -ENOENT);
    CHECK(privmem_vm_unbind(vm, 0, PAGES * PAGE) == 0);

    /* A region takes leave of its listeners. */
    CHECK(privmem_region_add_listener(region, &last_listener) == 0);
    CHECK(last.mapped == PAGES * PAGE);
    /* And of its bindings. */
    CHECK(privmem_vm_bind(vm, region, 0, 0, PAGES * PAGE) == 0);
    /* A VM handle may go before its regions. */
    privmem_vm_free(vm);
    privmem_region_free(region);
    CHECK(last.mapped == 0);
    munmap(host, PAGES * PAGE);
    return 0;
}
