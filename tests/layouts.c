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
