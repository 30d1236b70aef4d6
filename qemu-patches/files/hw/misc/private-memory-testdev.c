/*
 * A downstream mapper for tests of memory-backend-private
 *
 * Listens to the backend as VFIO does, keeps count of what it has mapped, and
 * can refuse a call. Maps nothing.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/module.h"
#include "hw/qdev-properties.h"
#include "system/private-memory.h"

#define TYPE_PRIVATE_MEMORY_TESTDEV "private-memory-testdev"
OBJECT_DECLARE_SIMPLE_TYPE(PrivateMemoryTestdev, PRIVATE_MEMORY_TESTDEV)

struct PrivateMemoryTestdev {
    DeviceState parent_obj;

    HostMemoryBackend *memdev;
    RamDiscardListener listener;
    /* Number of the call to populate, from 1, that is refused; 0 for none. */
    uint32_t refuse;
    /* The same for the call to discard. */
    uint32_t cling;
    uint64_t populates, discards, mapped;
};

/* Calls come from vCPUs too; each range is locked, the counters are not. */
static int testdev_populate(RamDiscardListener *rdl,
                            MemoryRegionSection *section)
{
    PrivateMemoryTestdev *s = container_of(rdl, PrivateMemoryTestdev, listener);

    if (qatomic_inc_fetch(&s->populates) == s->refuse) {
        return -ENOSPC;
    }
    qatomic_add(&s->mapped, int128_get64(section->size));
    return 0;
}

static int testdev_discard(RamDiscardListener *rdl,
                           MemoryRegionSection *section)
{
    PrivateMemoryTestdev *s = container_of(rdl, PrivateMemoryTestdev, listener);

    if (qatomic_inc_fetch(&s->discards) == s->cling) {
        return -EIO;
    }
    qatomic_sub(&s->mapped, int128_get64(section->size));
    return 0;
}

static RamDiscardManager *testdev_manager(PrivateMemoryTestdev *s)
{
    MemoryRegion *mr = host_memory_backend_get_memory(s->memdev);

    return memory_region_get_ram_discard_manager(mr);
}

static void testdev_realize(DeviceState *dev, Error **errp)
{
    PrivateMemoryTestdev *s = PRIVATE_MEMORY_TESTDEV(dev);
    MemoryRegionSection section = {};

    if (!s->memdev ||
        !object_dynamic_cast(OBJECT(s->memdev), TYPE_MEMORY_BACKEND_PRIVATE)) {
        error_setg(errp, TYPE_PRIVATE_MEMORY_TESTDEV ": property 'memdev' must "
                   "name a " TYPE_MEMORY_BACKEND_PRIVATE);
        return;
    }
    section.mr = host_memory_backend_get_memory(s->memdev);
    section.size = int128_make64(memory_region_size(section.mr));
    ram_discard_listener_init(&s->listener, testdev_populate, testdev_discard,
                              true);
    ram_discard_manager_register_listener(testdev_manager(s), &s->listener,
                                          &section);
}

static void testdev_unrealize(DeviceState *dev)
{
    PrivateMemoryTestdev *s = PRIVATE_MEMORY_TESTDEV(dev);

    ram_discard_manager_unregister_listener(testdev_manager(s), &s->listener);
}

static void testdev_init(Object *obj)
{
    PrivateMemoryTestdev *s = PRIVATE_MEMORY_TESTDEV(obj);

    object_property_add_uint64_ptr(obj, "populates", &s->populates,
                                   OBJ_PROP_FLAG_READ);
    object_property_add_uint64_ptr(obj, "discards", &s->discards,
                                   OBJ_PROP_FLAG_READ);
    object_property_add_uint64_ptr(obj, "mapped", &s->mapped,
                                   OBJ_PROP_FLAG_READ);
    object_property_add_uint32_ptr(obj, "refuse", &s->refuse,
                                   OBJ_PROP_FLAG_READWRITE);
    object_property_add_uint32_ptr(obj, "cling", &s->cling,
                                   OBJ_PROP_FLAG_READWRITE);
}

static const Property testdev_properties[] = {
    DEFINE_PROP_LINK("memdev", PrivateMemoryTestdev, memdev,
                     TYPE_MEMORY_BACKEND, HostMemoryBackend *),
};

static void testdev_class_init(ObjectClass *oc, ClassInitData *data)
{
    DeviceClass *dc = DEVICE_CLASS(oc);

    dc->desc = "Listener of memory-backend-private, for tests";
    dc->realize = testdev_realize;
    dc->unrealize = testdev_unrealize;
    device_class_set_props(dc, testdev_properties);
    set_bit(DEVICE_CATEGORY_MISC, dc->categories);
}

static const TypeInfo testdev_info = {
    .name = TYPE_PRIVATE_MEMORY_TESTDEV,
    .parent = TYPE_DEVICE,
    .instance_size = sizeof(PrivateMemoryTestdev),
    .instance_init = testdev_init,
    .class_init = testdev_class_init,
};

static void register_types(void)
{
    type_register_static(&testdev_info);
}

type_init(register_types);
