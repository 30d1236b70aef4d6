/*
 * Private guest memory: QMP, HMP and query-stats
 *
 * Translates the library's figures; see privmem.h for what they are.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <privmem.h>
#include "qapi/error.h"
#include "qapi/qapi-commands-private-memory.h"
#include "qemu/cutils.h"
#include "qemu/module.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "monitor/hmp.h"
#include "monitor/monitor.h"
#include "qobject/qdict.h"
#include "qom/object_interfaces.h"
#include "system/private-memory.h"
#include "system/stats.h"

/* Cells of the picture in query-private-memory, and of the monitor's bar. */
#define PICTURE_WIDTH 64
#define CELLS_MAX 4096
/* The guest decides how many extents there are; they are listed in pages. */
#define EXTENTS_MAX 65536

static struct privmem_vm *find_vm(Error **errp)
{
    struct privmem_vm *vm = private_memory_current_vm();

    if (!vm) {
        error_setg(errp, "there is no " TYPE_MEMORY_BACKEND_PRIVATE
                   " in this VM; add one with -object");
    }
    return vm;
}

void qmp_x_private_memory_convert(uint64_t address, uint64_t size,
                                  bool private, Error **errp)
{
    if (find_vm(errp)) {
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
    struct privmem_vm *vm = find_vm(errp);
    uint32_t level = level_of(size);
    int fd = -1;

    if (!vm) {
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
    if (privmem_vm_relocate(vm, address, level, fd, has_offset ? offset : 0)) {
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

/* One region: a backend's, or one of RAM that the board made by itself. */
typedef struct Region {
    const char *id;
    bool is_backend;
    struct privmem_region *region;
} Region;

/* What is done with each; another value than 0 ends the walk. */
typedef struct Walk {
    int (*visit)(const Region *region, void *opaque);
    void *opaque;
} Walk;

static int walk_object(Object *obj, void *opaque)
{
    Walk *walk = opaque;
    Region region = { .is_backend = true };

    if (!object_dynamic_cast(obj, TYPE_MEMORY_BACKEND_PRIVATE)) {
        return 0;
    }
    region.id = object_get_canonical_path_component(obj);
    region.region = host_memory_backend_get_memory(MEMORY_BACKEND(obj))
        ->ram_block->privmem;
    return region.region ? walk->visit(&region, walk->opaque) : 0;
}

static int walk_block(RAMBlock *block, void *opaque)
{
    Walk *walk = opaque;
    Region region = { .id = block->idstr, .region = block->privmem };
    Object *owner = memory_region_owner(block->mr);

    if (!region.region ||
        object_dynamic_cast(owner, TYPE_MEMORY_BACKEND_PRIVATE)) {
        return 0;
    }
    return walk->visit(&region, walk->opaque);
}

/* Backends first. With the BQL. */
static void foreach_region(int (*visit)(const Region *, void *), void *opaque)
{
    Walk walk = { .visit = visit, .opaque = opaque };

    if (!object_child_foreach(object_get_objects_root(), walk_object, &walk)) {
        qemu_ram_foreach_block(walk_block, &walk);
    }
}

static PrivateMemoryInfo *query_region(const Region *of)
{
    struct privmem_region *region = of->region;
    PrivateMemoryInfo *info = g_new0(PrivateMemoryInfo, 1);
    char picture[PICTURE_WIDTH + 1] = "";
    struct privmem_info now;

    /* Fails only for NULL. */
    privmem_region_info(region, &now, sizeof(now));
    privmem_region_picture(region, picture, sizeof(picture));

    info->id = g_strdup(of->id);
    info->backend = of->is_backend;
    info->agent = private_memory_agent();
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

struct Query {
    /* The only one that is asked for, or NULL. */
    const char *id;
    uint64_t start;
    /* 0: no extents are asked for. */
    uint32_t limit;
    PrivateMemoryInfoList **tail;
    Error **errp;
};

static bool check_start(const PrivateMemoryInfo *info, uint64_t start,
                        Error **errp)
{
    if (!QEMU_IS_ALIGNED(start, info->granule) || start >= info->size) {
        error_setg(errp, "'start' is 0x%" PRIx64 ": it must be a multiple of "
                   "the granule (0x%" PRIx64 ") and less than the size of '%s' "
                   "(0x%" PRIx64 ")", start, info->granule, info->id,
                   info->size);
        return false;
    }
    return true;
}

static int query_one(const Region *region, void *opaque)
{
    struct Query *query = opaque;
    g_autoptr(PrivateMemoryInfo) info = NULL;

    if (query->id && strcmp(query->id, region->id)) {
        return 0;
    }
    info = query_region(region);
    if (!check_start(info, query->start, query->errp)) {
        return -EINVAL;
    }
    if (query->limit) {
        query_extents(info, region->region, query->start, query->limit);
    }
    QAPI_LIST_APPEND(query->tail, g_steal_pointer(&info));
    return query->id != NULL;
}

PrivateMemoryInfoList *qmp_query_private_memory(const char *id, bool has_start,
                                                uint64_t start, bool has_limit,
                                                uint32_t limit, Error **errp)
{
    ERRP_GUARD();
    PrivateMemoryInfoList *list = NULL;
    struct Query query = { .id = id, .start = start, .limit = limit,
                           .tail = &list, .errp = errp };

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
    foreach_region(query_one, &query);
    if (id && !list && !*errp) {
        error_setg(errp, "there is no " TYPE_MEMORY_BACKEND_PRIVATE " '%s'; "
                   "leave out 'id' to see all there are", id);
    }
    return list;
}

PrivateMemoryFailedConversionList *
qmp_query_private_memory_failed_conversions(Error **errp)
{
    struct privmem_vm *vm = private_memory_current_vm();
    PrivateMemoryFailedConversionList *list = NULL, **tail = &list;
    struct privmem_failed_conversion failed;

    for (size_t i = 0; vm && !privmem_vm_failed_conversion(vm, i, &failed,
                                                           sizeof(failed));
         i++) {
        PrivateMemoryFailedConversion *item =
            g_new0(PrivateMemoryFailedConversion, 1);

        item->number = failed.number;
        item->time = failed.time;
        item->address = failed.gpa;
        item->size = failed.size;
        item->q_private = failed.to_private;
        item->error = g_strdup(failed.message);
        QAPI_LIST_APPEND(tail, item);
    }
    return list;
}

static void print_bytes(Monitor *mon, const char *what, bool known,
                        uint64_t bytes)
{
    g_autofree char *text = known ? size_to_str(bytes) : g_strdup("unknown");

    monitor_printf(mon, "  %-18s %s\n", what, text);
}

struct Printer {
    Monitor *mon;
    /* Of the bar; what fits a terminal is not known. */
    uint64_t cells;
    bool printed;
};

static int print_region(const Region *region, void *opaque)
{
    struct Printer *printer = opaque;
    Monitor *mon = printer->mon;
    g_autoptr(PrivateMemoryInfo) info = query_region(region);
    g_autofree char *bar = g_malloc0(printer->cells + 1);

    monitor_printf(mon, "%s (%s%s%s)\n", info->id,
                   PrivateMemoryAgent_str(info->agent),
                   info->agent == PRIVATE_MEMORY_AGENT_EMULATED ?
                   ", protects nothing" : "",
                   info->backend ? "" : ", the board's own");
    /* Fails only for NULL, and for no cells. */
    privmem_region_picture(region->region, bar, printer->cells + 1);
    monitor_printf(mon, "  [%s]\n", bar);
    monitor_printf(mon, "  # private  . shared  + both\n");
    print_bytes(mon, "size", true, info->size);
    print_bytes(mon, "private", true, info->q_private);
    print_bytes(mon, "shared", true, info->shared);
    print_bytes(mon, "private held", info->has_private_held,
                info->private_held);
    print_bytes(mon, "shared held", info->has_shared_held, info->shared_held);
    print_bytes(mon, "held twice", info->has_held_twice, info->held_twice);
    if (info->relocated) {
        print_bytes(mon, "relocated", true, info->relocated);
        print_bytes(mon, "of that swapped", true, info->swapped);
    }
    monitor_printf(mon, "  %-18s %" PRIu64 " done, %" PRIu64 " failed\n",
                   "conversions", info->conversions, info->failed_conversions);
    monitor_printf(mon, "  %-18s %" PRIu64 "\n", "memory failures",
                   info->memory_failures);
    printer->printed = true;
    return 0;
}

static void print_failed_conversions(Monitor *mon)
{
    g_autoptr(PrivateMemoryFailedConversionList) list =
        qmp_query_private_memory_failed_conversions(NULL);
    uint64_t now = g_get_real_time() * 1000;

    if (list) {
        monitor_printf(mon, "last failed conversions:\n");
    }
    for (PrivateMemoryFailedConversionList *item = list; item;
         item = item->next) {
        PrivateMemoryFailedConversion *failed = item->value;
        uint64_t age = now > failed->time ? now - failed->time : 0;
        uint64_t seconds = age / NANOSECONDS_PER_SECOND;

        monitor_printf(mon, "  %" PRIu64 " s ago: 0x%" PRIx64 "+0x%" PRIx64
                       " to %s\n    %s\n", seconds,
                       failed->address, failed->size,
                       failed->q_private ? "private" : "shared",
                       failed->error);
    }
}

static void hmp_info_private_memory(Monitor *mon, const QDict *qdict)
{
    int64_t cells = qdict_get_try_int(qdict, "cells", PICTURE_WIDTH);
    struct Printer printer = { .mon = mon, .cells = cells };

    if (cells < 1 || cells > CELLS_MAX) {
        monitor_printf(mon, "Error: there can be 1 to %d cells\n", CELLS_MAX);
        return;
    }
    foreach_region(print_region, &printer);
    if (!printer.printed) {
        monitor_printf(mon, "No " TYPE_MEMORY_BACKEND_PRIVATE "\n");
    }
    print_failed_conversions(mon);
}

static void hmp_x_private_memory_convert(Monitor *mon, const QDict *qdict)
{
    const char *text = qdict_get_str(qdict, "size");
    Error *err = NULL;
    uint64_t size;

    /* The monitor's own type of a size takes plain numbers for MiB. */
    if (qemu_strtosz(text, NULL, &size)) {
        error_setg(&err, "'size' is '%s': it must be a number of bytes, or one "
                   "with a suffix such as k, M or G", text);
    } else {
        qmp_x_private_memory_convert(qdict_get_int(qdict, "address"), size,
                                     qdict_get_bool(qdict, "private"), &err);
    }
    hmp_handle_error(mon, err);
}

/* query-stats */

static const struct {
    const char *name;
    StatsType type;
    bool is_bytes;
} figures[] = {
    { "conversions", STATS_TYPE_CUMULATIVE, false },
    { "failed-conversions", STATS_TYPE_CUMULATIVE, false },
    { "memory-failures", STATS_TYPE_CUMULATIVE, false },
    { "private", STATS_TYPE_INSTANT, true },
    { "shared", STATS_TYPE_INSTANT, true },
    { "private-held", STATS_TYPE_INSTANT, true },
    { "shared-held", STATS_TYPE_INSTANT, true },
};

#define FAULTS "faults"
#define SUPPRESSED "suppressed-messages"
#define LATENCY "conversion-latency"

static int sum_region(const Region *region, void *opaque)
{
    uint64_t *sums = opaque;
    struct privmem_info now;

    /* Fails only for NULL. */
    privmem_region_info(region->region, &now, sizeof(now));
    const uint64_t values[ARRAY_SIZE(figures)] = {
        now.conversions, now.failed_conversions, now.memory_failures,
        now.private_bytes, now.shared_bytes, now.private_held,
        now.shared_held,
    };
    for (int i = 0; i < ARRAY_SIZE(figures); i++) {
        bool known = values[i] != PRIVMEM_UNKNOWN &&
                     sums[i] != PRIVMEM_UNKNOWN;

        sums[i] = known ? sums[i] + values[i] : PRIVMEM_UNKNOWN;
    }
    return 0;
}

/*
 * 'info stats' looks for each result from where the schema has the one before:
 * both lists must have the same order.
 */

static StatsList **add_value(StatsList **tail, strList *names,
                             const char *name, StatsValue value)
{
    Stats *stats;

    if (apply_str_list_filter(name, names)) {
        stats = g_new0(Stats, 1);
        stats->name = g_strdup(name);
        stats->value = g_memdup2(&value, sizeof(value));
        QAPI_LIST_APPEND(tail, stats);
    }
    return tail;
}

static StatsList **add_scalar(StatsList **tail, strList *names,
                              const char *name, uint64_t scalar)
{
    StatsValue value = { .type = QTYPE_QNUM, .u.scalar = scalar };

    return add_value(tail, names, name, value);
}

static StatsList **add_latency(StatsList **tail, strList *names)
{
    StatsValue value = { .type = QTYPE_QLIST };

    if (!apply_str_list_filter(LATENCY, names)) {
        return tail;
    }
    for (int i = PRIVATE_MEMORY_LATENCIES - 1; i >= 0; i--) {
        QAPI_LIST_PREPEND(value.u.list,
                          stat64_get(&private_memory_stats.latency[i]));
    }
    return add_value(tail, names, LATENCY, value);
}

/* Of all together; query-private-memory tells of each. */
static void stats_cb(StatsResultList **result, StatsTarget target,
                     strList *names, strList *targets, Error **errp)
{
    uint64_t sums[ARRAY_SIZE(figures)] = { 0 };
    StatsList *list = NULL, **tail = &list;

    if (target != STATS_TARGET_VM || !private_memory_current_vm()) {
        return;
    }
    foreach_region(sum_region, sums);
    for (int i = 0; i < ARRAY_SIZE(figures); i++) {
        if (sums[i] != PRIVMEM_UNKNOWN) {
            tail = add_scalar(tail, names, figures[i].name, sums[i]);
        }
    }
    tail = add_scalar(tail, names, FAULTS,
                      stat64_get(&private_memory_stats.faults));
    tail = add_scalar(tail, names, SUPPRESSED,
                      stat64_get(&private_memory_stats.suppressed));
    add_latency(tail, names);
    if (list) {
        add_stats_entry(result, STATS_PROVIDER_PRIVATE_MEMORY, NULL, list);
    }
}

static StatsSchemaValueList **add_schema(StatsSchemaValueList **tail,
                                         const char *name, StatsType type,
                                         int unit)
{
    StatsSchemaValue *value = g_new0(StatsSchemaValue, 1);

    value->name = g_strdup(name);
    value->type = type;
    value->has_unit = unit >= 0;
    value->unit = value->has_unit ? unit : 0;
    if (unit == STATS_UNIT_SECONDS) {
        value->has_base = true;
        value->base = 10;
        value->exponent = -9;
    }
    QAPI_LIST_APPEND(tail, value);
    return tail;
}

static void schemas_cb(StatsSchemaList **result, Error **errp)
{
    StatsSchemaValueList *list = NULL, **tail = &list;

    for (int i = 0; i < ARRAY_SIZE(figures); i++) {
        tail = add_schema(tail, figures[i].name, figures[i].type,
                          figures[i].is_bytes ? STATS_UNIT_BYTES : -1);
    }
    tail = add_schema(tail, FAULTS, STATS_TYPE_CUMULATIVE, -1);
    tail = add_schema(tail, SUPPRESSED, STATS_TYPE_CUMULATIVE, -1);
    add_schema(tail, LATENCY, STATS_TYPE_LOG2_HISTOGRAM, STATS_UNIT_SECONDS);
    add_stats_schema(result, STATS_PROVIDER_PRIVATE_MEMORY, STATS_TARGET_VM,
                     list);
}

static void register_commands(void)
{
    monitor_register_hmp("private-memory", true, hmp_info_private_memory);
    monitor_register_hmp("x_private_memory_convert", false,
                         hmp_x_private_memory_convert);
    add_stats_callbacks(STATS_PROVIDER_PRIVATE_MEMORY, stats_cb, schemas_cb);
}

type_init(register_commands);
