/*
 * Initial contents of TDX and SEV-SNP guests, through libprivmem
 *
 * What tdx.c and sev.c measure goes to the library, in their order, where the
 * guest's RAM is a memory-backend-private.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <privmem.h>
#include "qapi/error.h"
#include "system/private-memory.h"
#include "trace.h"
#include <linux/kvm.h>

static bool populate(hwaddr gpa, void *source, uint64_t size,
                     enum privmem_page_type type, Error **errp)
{
    int ret = privmem_vm_populate(private_memory_current_vm(), gpa, size,
                                  source, type);

    trace_private_memory_populate(gpa, size, type, ret);
    if (ret) {
        error_setg(errp, "initial contents of guest memory: %s",
                   privmem_last_error());
        return false;
    }
    return true;
}

bool private_memory_tdx_populate(int vcpu_fd, hwaddr gpa, void *source,
                                 uint64_t size, bool measured, Error **errp)
{
    if (privmem_vm_set_tdx_vcpu(private_memory_current_vm(), vcpu_fd)) {
        error_setg(errp, "%s", privmem_last_error());
        return false;
    }
    return populate(gpa, source, size,
                    measured ? PRIVMEM_PAGE_NORMAL : PRIVMEM_PAGE_UNMEASURED,
                    errp);
}

bool private_memory_snp_populate(hwaddr gpa, void *source, uint64_t size,
                                 int type, Error **errp)
{
    switch (type) {
    case KVM_SEV_SNP_PAGE_TYPE_NORMAL:
        return populate(gpa, source, size, PRIVMEM_PAGE_NORMAL, errp);
    case KVM_SEV_SNP_PAGE_TYPE_ZERO:
        return populate(gpa, NULL, size, PRIVMEM_PAGE_ZERO, errp);
    case KVM_SEV_SNP_PAGE_TYPE_UNMEASURED:
        return populate(gpa, source, size, PRIVMEM_PAGE_UNMEASURED, errp);
    case KVM_SEV_SNP_PAGE_TYPE_SECRETS:
        return populate(gpa, source, size, PRIVMEM_PAGE_SECRETS, errp);
    case KVM_SEV_SNP_PAGE_TYPE_CPUID:
        return populate(gpa, source, size, PRIVMEM_PAGE_CPUID, errp);
    default:
        error_setg(errp, "initial contents of type %d for guest memory at 0x%"
                   HWADDR_PRIx " are not known", type, gpa);
        return false;
    }
}

bool private_memory_finalize(const void *snp_finish, size_t finish_size,
                             Error **errp)
{
    struct privmem_vm *vm = private_memory_current_vm();
    int ret = 0;

    if (snp_finish) {
        ret = privmem_vm_snp_set_finish(vm, snp_finish, finish_size);
    }
    if (!ret) {
        ret = privmem_vm_finalize(vm);
    }
    trace_private_memory_finalize(ret);
    if (ret) {
        error_setg(errp, "end of the guest's launch: %s",
                   privmem_last_error());
        return false;
    }
    return true;
}
