/*
 * What a device's mappings of private-capable memory are
 *
 * VFIO type 1 gives up whole mappings only and has a limited number of them.
 * iommufd can be told to split mappings where it must, without a gap in what
 * stays; that is part of its compatibility with type 1.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/ioctl.h>
#include <linux/iommufd.h>
#include <linux/vfio.h>
#include "system/private-memory.h"

/*
 * Mappings that stay free for other RAM and for BARs, which cannot be refused
 * when the machine runs: as many as there are memory slots without KVM.
 */
#define OTHER_MAPPINGS 512

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
