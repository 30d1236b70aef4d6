/*
 * QEMU's own tracking of private memory without the rest of QEMU: the object
 * files of system/ram-block-attributes.c, util/bitmap.c and util/bitops.c are
 * those of a QEMU build. What they call of the rest is here, and does what it
 * does there, as far as a memory region of its own has it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/module.h"
#include "system/memory.h"
#include "system/ramblock.h"

uint64_t memory_region_size(MemoryRegion *mr)
{
    return int128_get64(mr->size);
}

int memory_region_set_ram_discard_manager(MemoryRegion *mr,
                                          RamDiscardManager *rdm)
{
    mr->rdm = rdm;
    return 0;
}

MemoryRegionSection *memory_region_section_new_copy(MemoryRegionSection *s)
{
    return g_memdup2(s, sizeof(*s));
}

void memory_region_section_free_copy(MemoryRegionSection *s)
{
    g_free(s);
}

static const TypeInfo discard_manager_info = {
    .parent = TYPE_INTERFACE,
    .name = TYPE_RAM_DISCARD_MANAGER,
    .class_size = sizeof(RamDiscardManagerClass),
};

static void register_types(void)
{
    type_register_static(&discard_manager_info);
}

type_init(register_types);

typedef struct Tracking {
    MemoryRegion mr;
    RAMBlock ram_block;
    RamBlockAttributes *attributes;
    RamDiscardListener listener;
    uint64_t calls;
} Tracking;

Tracking *tracking_new(uint64_t size);
void tracking_free(Tracking *t);
int tracking_change(Tracking *t, uint64_t offset, uint64_t size,
                    bool to_private);
void tracking_listen(Tracking *t);
uint64_t tracking_calls(Tracking *t);
uint64_t tracking_shared_extents(Tracking *t, uint64_t *bytes);

/* All of it private, as QEMU begins. */
Tracking *tracking_new(uint64_t size)
{
    static gsize once;
    Tracking *t = g_new0(Tracking, 1);

    if (g_once_init_enter(&once)) {
        module_call_init(MODULE_INIT_QOM);
        g_once_init_leave(&once, 1);
    }
    t->mr.size = int128_make64(size);
    t->mr.ram_block = &t->ram_block;
    t->ram_block.mr = &t->mr;
    t->attributes = ram_block_attributes_create(&t->ram_block);
    g_assert(t->attributes);
    return t;
}

void tracking_free(Tracking *t)
{
    ram_block_attributes_destroy(t->attributes);
    g_free(t);
}

int tracking_change(Tracking *t, uint64_t offset, uint64_t size,
                    bool to_private)
{
    return ram_block_attributes_state_change(t->attributes, offset, size,
                                             to_private);
}

static int on_populate(RamDiscardListener *listener, MemoryRegionSection *s)
{
    container_of(listener, Tracking, listener)->calls++;
    return 0;
}

static int on_discard(RamDiscardListener *listener, MemoryRegionSection *s)
{
    container_of(listener, Tracking, listener)->calls++;
    return 0;
}

static MemoryRegionSection whole(Tracking *t)
{
    return (MemoryRegionSection) { .mr = &t->mr, .size = t->mr.size };
}

/* Counts from now on what a listener is told, runs that are shared included. */
void tracking_listen(Tracking *t)
{
    RamDiscardManager *rdm = RAM_DISCARD_MANAGER(t->attributes);
    MemoryRegionSection section = whole(t);

    ram_discard_listener_init(&t->listener, on_populate, on_discard, true);
    RAM_DISCARD_MANAGER_GET_CLASS(rdm)->register_listener(rdm, &t->listener,
                                                          &section);
}

uint64_t tracking_calls(Tracking *t)
{
    return t->calls;
}

typedef struct Extents {
    uint64_t number;
    uint64_t bytes;
} Extents;

static int on_extent(MemoryRegionSection *section, void *opaque)
{
    Extents *extents = opaque;

    extents->number++;
    extents->bytes += int128_get64(section->size);
    return 0;
}

uint64_t tracking_shared_extents(Tracking *t, uint64_t *bytes)
{
    RamDiscardManager *rdm = RAM_DISCARD_MANAGER(t->attributes);
    MemoryRegionSection section = whole(t);
    Extents extents = {};

    RAM_DISCARD_MANAGER_GET_CLASS(rdm)->replay_populated(rdm, &section,
                                                         on_extent, &extents);
    *bytes = extents.bytes;
    return extents.number;
}
