// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Linux as a guest whose memory is private: all but the swiotlb pool, which is
 * shared before there are devices. They bounce through it what they transfer,
 * and have in it what they and their drivers both use.
 *
 * Told "private_guest swiotlb=4096,force" on the command line (pool of 8 MiB),
 * and that devices are virtio's with iommu_platform=on. Whoever loaded the
 * kernel has made its memory private.
 */
#include <linux/device.h>
#include <linux/init.h>
#include <linux/moduleparam.h>
#include <linux/swiotlb.h>
#include <uapi/linux/kvm_para.h>
#include <asm/kvm_para.h>

static bool private_guest __initdata;
core_param(private_guest, private_guest, bool, 0);

/* Devices have a pointer to the pool, which is swiotlb's own otherwise. */
static struct device any_device __initdata;

static int __init share_pool(void)
{
	struct io_tlb_mem *mem;
	struct io_tlb_pool *pool;
	unsigned long pages;
	long ret;

	if (!private_guest)
		return 0;
	if (!kvm_para_available())
		panic("private_guest: there is no KVM to ask");
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
	return 0;
}
core_initcall(share_pool);
