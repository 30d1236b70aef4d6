// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Linux as a guest whose memory is private: all but the swiotlb pool, which is
 * shared before there are devices. They bounce through it what they transfer,
 * and have in it what they and their drivers both use.
 *
 * Told "private_guest swiotlb=4096,force" on the command line (pool of 8 MiB),
 * and that devices are virtio's with iommu_platform=on. Whoever loaded the
 * kernel has made its memory private. Memory that comes later is made so here.
 */
#include <linux/device.h>
#include <linux/dma-mapping.h>
#include <linux/init.h>
#include <linux/memory.h>
#include <linux/moduleparam.h>
#include <linux/swiotlb.h>
#include <linux/version.h>
#include <linux/virtio.h>
#include <linux/virtio_anchor.h>
#include <linux/virtio_config.h>
#include <uapi/linux/kvm_para.h>
#include <uapi/linux/virtio_ids.h>
#include <asm/kvm_para.h>

static bool private_guest __initdata;
core_param(private_guest, private_guest, bool, 0);

/* Devices have a pointer to the pool, which is swiotlb's own otherwise. */
static struct device any_device __initdata;

static void __init share_pool(void)
{
	struct io_tlb_mem *mem;
	struct io_tlb_pool *pool;
	unsigned long pages;
	long ret;

	device_initialize(&any_device);
	mem = any_device.dma_io_tlb_mem;
	pool = &mem->defpool;
	if (!pool->nslabs)
		panic("private_guest: there is no pool: say swiotlb=4096,force");

	pages = PFN_DOWN(pool->end - pool->start);
	ret = kvm_hypercall3(KVM_HC_MAP_GPA_RANGE, pool->start, pages,
			     KVM_MAP_GPA_RANGE_DECRYPTED);
	if (ret)
		panic("private_guest: the pool cannot be shared: %ld", ret);
	mem->force_bounce = true;
	mem->for_alloc = true;
	pr_info("private_guest: %lu pages at %pa are shared\n", pages, &pool->start);
}

/* ---- memory that is plugged in ---- */

static int make_private(struct notifier_block *nb, unsigned long action, void *data)
{
	const struct memory_notify *memory = data;
	long ret;

	/* Nobody has used it yet: what it contains may go. */
	if (action != MEM_GOING_ONLINE)
		return NOTIFY_DONE;
	ret = kvm_hypercall3(KVM_HC_MAP_GPA_RANGE, PFN_PHYS(memory->start_pfn),
			     memory->nr_pages, KVM_MAP_GPA_RANGE_ENCRYPTED);
	if (ret)
		pr_err("private_guest: memory that was added cannot be private: %ld\n", ret);
	return notifier_from_errno(ret);
}

/* ---- virtio's devices ---- */

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 18, 0)
/*
 * A balloon reports pages that are free as if the device wrote to them. Nobody
 * does: it is their own addresses that count, and no copies of them. All else
 * goes through the pool, as with other devices.
 */
static dma_addr_t balloon_map_page(union virtio_map map, struct page *page,
				   unsigned long offset, size_t size,
				   enum dma_data_direction dir, unsigned long attrs)
{
	if (dir == DMA_FROM_DEVICE)
		return page_to_phys(page) + offset;
	return dma_map_page_attrs(map.dma_dev, page, offset, size, dir, attrs);
}

static void balloon_unmap_page(union virtio_map map, dma_addr_t addr, size_t size,
			       enum dma_data_direction dir, unsigned long attrs)
{
	if (dir != DMA_FROM_DEVICE)
		dma_unmap_page_attrs(map.dma_dev, addr, size, dir, attrs);
}

static void balloon_sync_for_cpu(union virtio_map map, dma_addr_t addr, size_t size,
				 enum dma_data_direction dir)
{
	dma_sync_single_for_cpu(map.dma_dev, addr, size, dir);
}

static void balloon_sync_for_device(union virtio_map map, dma_addr_t addr, size_t size,
				    enum dma_data_direction dir)
{
	dma_sync_single_for_device(map.dma_dev, addr, size, dir);
}

static void *balloon_alloc(union virtio_map map, size_t size, dma_addr_t *addr, gfp_t gfp)
{
	return dma_alloc_coherent(map.dma_dev, size, addr, gfp);
}

static void balloon_free(union virtio_map map, size_t size, void *vaddr, dma_addr_t addr,
			 unsigned long attrs)
{
	dma_free_attrs(map.dma_dev, size, vaddr, addr, attrs);
}

static bool balloon_need_sync(union virtio_map map, dma_addr_t addr)
{
	return dma_need_sync(map.dma_dev, addr);
}

static int balloon_mapping_error(union virtio_map map, dma_addr_t addr)
{
	return dma_mapping_error(map.dma_dev, addr);
}

static size_t balloon_max_mapping_size(union virtio_map map)
{
	return dma_max_mapping_size(map.dma_dev);
}

static const struct virtio_map_ops balloon_map = {
	.map_page = balloon_map_page,
	.unmap_page = balloon_unmap_page,
	.sync_single_for_cpu = balloon_sync_for_cpu,
	.sync_single_for_device = balloon_sync_for_device,
	.alloc = balloon_alloc,
	.free = balloon_free,
	.need_sync = balloon_need_sync,
	.mapping_error = balloon_mapping_error,
	.max_mapping_size = balloon_max_mapping_size,
};

/* Its driver has just declined the feature, for the sake of those addresses. */
static void give_pool_to_balloon(struct virtio_device *vdev)
{
	u64 offered[VIRTIO_FEATURES_U64S];

	virtio_get_features(vdev, offered);
	if (!virtio_features_test_bit(offered, VIRTIO_F_ACCESS_PLATFORM))
		return;
	__virtio_set_bit(vdev, VIRTIO_F_ACCESS_PLATFORM);
	vdev->map = &balloon_map;
	if (vdev->config->finalize_features(vdev))
		__virtio_clear_bit(vdev, VIRTIO_F_ACCESS_PLATFORM);
}
#else
/* There is nothing to map its pages with: it stays refused. */
static void give_pool_to_balloon(struct virtio_device *vdev)
{
}
#endif

/* Asked before a device is used. Those that would not use the pool are refused. */
static bool must_use_pool(struct virtio_device *vdev)
{
	if (vdev->id.device == VIRTIO_ID_BALLOON)
		give_pool_to_balloon(vdev);
	return true;
}

static int __init be_private_guest(void)
{
	if (!private_guest)
		return 0;
	if (!kvm_para_available())
		panic("private_guest: there is no KVM to ask");
	share_pool();
	virtio_set_mem_acc_cb(must_use_pool);
	return hotplug_memory_notifier(make_private, 0);
}
core_initcall(be_private_guest);
