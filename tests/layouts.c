/*
 * The kernel's structs that the library defines itself, because kvm-bindings
 * does not have them, against a header of the kernel that does.
 *
 * SPDX-License-Identifier: MIT
 */

#include <stddef.h>
#include <stdint.h>
/* As QEMU's source lays out the kernel's headers. */
#include <asm-x86/kvm.h>
#include <linux/userfaultfd.h>

#define IS(what, value) _Static_assert((what) == (value), #what)

/* TdxCommand, TdxInitMemRegion and the numbers beside them in src/kernel.rs. */
IS(KVM_TDX_INIT_MEM_REGION, 3);
IS(KVM_TDX_FINALIZE_VM, 4);
IS(KVM_TDX_MEASURE_MEMORY_REGION, 1);
IS(sizeof(struct kvm_tdx_cmd), 24);
IS(offsetof(struct kvm_tdx_cmd, id), 0);
IS(offsetof(struct kvm_tdx_cmd, flags), 4);
IS(offsetof(struct kvm_tdx_cmd, data), 8);
IS(offsetof(struct kvm_tdx_cmd, hw_error), 16);
IS(sizeof(struct kvm_tdx_init_mem_region), 24);
IS(offsetof(struct kvm_tdx_init_mem_region, source_addr), 0);
IS(offsetof(struct kvm_tdx_init_mem_region, gpa), 8);
IS(offsetof(struct kvm_tdx_init_mem_region, nr_pages), 16);

/* What is said of userfaultfd(2) there. */
IS(UFFD_API, 0xaa);
IS(USERFAULTFD_IOC_NEW, _IO(0xaa, 0x00));
IS(UFFD_EVENT_REMAP, 0x14);
IS(UFFD_FEATURE_EVENT_REMAP, 1 << 2);
IS(UFFD_FEATURE_MISSING_SHMEM, 1 << 5);
IS(UFFD_FEATURE_MINOR_SHMEM, 1 << 10);
IS(UFFD_FEATURE_WP_HUGETLBFS_SHMEM, 1 << 12);
IS(UFFDIO_REGISTER_MODE_MISSING, 1 << 0);
IS(UFFDIO_REGISTER_MODE_WP, 1 << 1);
IS(UFFDIO_REGISTER_MODE_MINOR, 1 << 2);
IS(UFFDIO_WRITEPROTECT_MODE_WP, 1 << 0);
IS(UFFDIO_REGISTER, 0xc020aa00);
IS(UFFDIO_UNREGISTER, 0x8010aa01);
IS(UFFDIO_WAKE, 0x8010aa02);
IS(UFFDIO_WRITEPROTECT, 0xc018aa06);
IS(UFFDIO_API, 0xc018aa3f);
IS(sizeof(struct uffd_msg), 32);
IS(offsetof(struct uffd_msg, event), 0);
IS(sizeof(struct uffdio_range), 16);
IS(offsetof(struct uffdio_range, len), 8);
IS(sizeof(struct uffdio_api), 24);
IS(offsetof(struct uffdio_api, features), 8);
IS(sizeof(struct uffdio_register), 32);
IS(offsetof(struct uffdio_register, mode), 16);
IS(sizeof(struct uffdio_writeprotect), 24);
IS(offsetof(struct uffdio_writeprotect, mode), 16);
