/*
 * What a device's mappings of private-capable memory are
 *
 * VFIO type 1 gives up whole mappings only and has a limited number of them.
 * iommufd can be told to split mappings where it must, without a gap in what
 * stays; that is part of its compatibility with type 1.
 *
 * Devices whose mappings do not follow conversions are refused.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/ioctl.h>
#include <linux/iommufd.h>
#include <linux/vfio.h>
#include "qapi/error.h"
#include "system/private-memory.h"

/*
 * Mappings that stay free for other RAM and for BARs, which cannot be refused
 * when the machine runs: as many as there are memory slots without KVM.
 */
#define OTHER_MAPPINGS 512

/* Devices that pin guest memory and are not told of conversions. */
static unsigned int pinners;
/* Backends, beside which there must be none of these. */
static unsigned int backends;

bool private_memory_add_backend(void)
{
    if (pinners) {
        return false;
    }
    backends++;
    return true;
}

void private_memory_del_backend(void)
{
    backends--;
}

bool private_memory_add_pinner(const char *what, const char *way_out,
                               Error **errp)
{
    if (backends) {
        error_setg(errp, "%s cannot be used beside "
                   TYPE_MEMORY_BACKEND_PRIVATE ": memory that it has pinned "
                   "would stay pinned when it becomes private; %s", what,
                   way_out);
        return false;
    }
    pinners++;
    return true;
}

/*
 * What the guest maps in a virtual IOMMU, VFIO maps for the device at once, and
 * until the guest unmaps it: VFIO consults the RamDiscardManager only for a
 * device that sees guest-physical memory. See vfio_iommu_map_notify().
 */
bool private_memory_dma_attach(AddressSpace *as, Error **errp)
{
    return as == &address_space_memory ||
           private_memory_add_pinner("a VFIO device behind a virtual IOMMU",
                                     "put it on a bus that bypasses the IOMMU "
                                     "(-machine default-bus-bypass-iommu=on)",
                                     errp);
}

void private_memory_dma_detach(AddressSpace *as)
{
    if (as != &address_space_memory) {
        pinners--;
    }
}

/* Some backend wants mappings that are larger than a page. */
static bool large_mappings;

void private_memory_use_large_mappings(void)
{
    large_mappings = true;
}

void private_memory_dma_set_limit(PrivateMemoryDma *dma, uint32_t mappings)
{
    dma->limit = mappings - MIN(mappings / 2, OTHER_MAPPINGS);
}

/*
 * The IOMMU's own pages are small then: larger ones could not be split. See
 * iopt_area_split() in drivers/iommu/iommufd/io_pagetable.c.
 */
bool private_memory_dma_can_split(int iommufd, uint32_t ioas_id)
{
    struct iommu_option option = {
        .size = sizeof(option),
        .option_id = IOMMU_OPTION_HUGE_PAGES,
        .op = IOMMU_OPTION_OP_SET,
        .object_id = ioas_id,
        .val64 = 0,
    };

    return !large_mappings && !ioctl(iommufd, IOMMU_OPTION, &option);
}

int private_memory_dma_unmap(int iommufd, uint32_t ioas_id, hwaddr iova,
                             uint64_t size)
{
    /* The IOAS that the second call is about is a property of the fd. */
    static GMutex lock;
    struct iommu_vfio_ioas ioas = {
        .size = sizeof(ioas),
        .ioas_id = ioas_id,
        .op = IOMMU_VFIO_IOAS_SET,
    };
    struct vfio_iommu_type1_dma_unmap unmap = {
        .argsz = sizeof(unmap),
        .iova = iova,
        .size = size,
    };
    int ret = 0;

    g_mutex_lock(&lock);
    if (ioctl(iommufd, IOMMU_VFIO_IOAS, &ioas) ||
        ioctl(iommufd, VFIO_IOMMU_UNMAP_DMA, &unmap)) {
        ret = -errno;
    }
    g_mutex_unlock(&lock);
    /* Nothing was mapped, as older kernels say it. */
    return ret == -ENOENT ? 0 : ret;
}
