/*
 * Software-protected guest: KVM_X86_SW_PROTECTED_VM
 *
 * KVM keeps private memory from the host by software alone, with the very
 * code that serves TDX and SEV-SNP. For development and testing: the kernel's
 * documentation says that it must not be relied on for protection.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "hw/boards.h"
#include "hw/i386/x86.h"
#include "qom/object_interfaces.h"
#include "system/private-memory.h"
#include "standard-headers/asm-x86/kvm_para.h"
#include <linux/kvm.h>
#include <linux/kvm_para.h>
#include "../confidential-guest.h"
#include "kvm_i386.h"

OBJECT_DECLARE_SIMPLE_TYPE(SwProtectedGuest, SW_PROTECTED_GUEST)

struct SwProtectedGuest {
    X86ConfidentialGuest parent_obj;

    /* Memory backends are made after it: what they ask of it stays. */
    bool is_complete;
};

static int sw_protected_kvm_init(ConfidentialGuestSupport *cgs, Error **errp)
{
    X86MachineState *x86ms = X86_MACHINE(qdev_get_machine());
    const char *id = object_get_canonical_path_component(OBJECT(cgs));

    /*
     * SMRAM is a second view of RAM, and KVM binds each place of a guest_memfd
     * to one slot only.
     */
    if (x86ms->smm == ON_OFF_AUTO_ON) {
        error_setg(errp, TYPE_SW_PROTECTED_GUEST " '%s' does not support "
                   "SMM: use -machine smm=off", id);
        return -EINVAL;
    }
    x86ms->smm = ON_OFF_AUTO_OFF;

    if (!cgs->require_guest_memfd && !private_memory_vm(false, errp)) {
        return -EOPNOTSUPP;
    }
    if (!kvm_enable_hypercall(BIT_ULL(KVM_HC_MAP_GPA_RANGE))) {
        error_setg(errp, TYPE_SW_PROTECTED_GUEST " '%s' needs a KVM with "
                   "KVM_CAP_EXIT_HYPERCALL for KVM_HC_MAP_GPA_RANGE: "
                   "use a newer host kernel", id);
        return -EOPNOTSUPP;
    }
    cgs->ready = true;
    return 0;
}

static const char *const vm_type_names[] = {
    "default", "sw-protected", "sev", "sev-es", "snp", "tdx",
};

static int sw_protected_kvm_type(X86ConfidentialGuest *cg)
{
    KVMState *s = KVM_STATE(current_machine->accelerator);
    g_autoptr(GString) types = g_string_new(NULL);

    if (!kvm_is_vm_type_supported(KVM_X86_SW_PROTECTED_VM)) {
        for (int i = 0; i < ARRAY_SIZE(vm_type_names); i++) {
            if (kvm_is_vm_type_supported(i)) {
                g_string_append_printf(types, " %s (%d)", vm_type_names[i], i);
            }
        }
        error_report(TYPE_SW_PROTECTED_GUEST " '%s' needs KVM VM type "
                     "sw-protected (%d); this host's KVM has:%s, with "
                     "KVM_CAP_GUEST_MEMFD=%d and KVM_CAP_MEMORY_ATTRIBUTES="
                     "0x%x; use a host kernel with CONFIG_KVM_SW_PROTECTED_VM "
                     "and the TDP MMU",
                     object_get_canonical_path_component(OBJECT(cg)),
                     KVM_X86_SW_PROTECTED_VM, types->str,
                     kvm_check_extension(s, KVM_CAP_GUEST_MEMFD),
                     kvm_check_extension(s, KVM_CAP_MEMORY_ATTRIBUTES));
        exit(1);
    }
    return KVM_X86_SW_PROTECTED_VM;
}

static void sw_protected_complete(UserCreatable *uc, Error **errp)
{
    SW_PROTECTED_GUEST(uc)->is_complete = true;
}

static bool sw_protected_get_require_guest_memfd(Object *o, Error **errp)
{
    return CONFIDENTIAL_GUEST_SUPPORT(o)->require_guest_memfd;
}

static void sw_protected_set_require_guest_memfd(Object *o, bool value,
                                                 Error **errp)
{
    if (SW_PROTECTED_GUEST(o)->is_complete) {
        error_setg(errp, "cannot change property 'x-require-guest-memfd' of "
                   TYPE_SW_PROTECTED_GUEST);
        return;
    }
    CONFIDENTIAL_GUEST_SUPPORT(o)->require_guest_memfd = value;
}

static void sw_protected_guest_class_init(ObjectClass *oc, ClassInitData *data)
{
    CONFIDENTIAL_GUEST_SUPPORT_CLASS(oc)->kvm_init = sw_protected_kvm_init;
    X86_CONFIDENTIAL_GUEST_CLASS(oc)->kvm_type = sw_protected_kvm_type;
    USER_CREATABLE_CLASS(oc)->complete = sw_protected_complete;

    object_class_property_add_bool(oc, "x-require-guest-memfd",
                                   sw_protected_get_require_guest_memfd,
                                   sw_protected_set_require_guest_memfd);
    object_class_property_set_description(oc, "x-require-guest-memfd",
        "Private memory of QEMU's own for all RAM, to compare with "
        "memory-backend-private");
}

static const TypeInfo sw_protected_guest_info = {
    .name = TYPE_SW_PROTECTED_GUEST,
    .parent = TYPE_X86_CONFIDENTIAL_GUEST,
    .instance_size = sizeof(SwProtectedGuest),
    .class_init = sw_protected_guest_class_init,
    .interfaces = (InterfaceInfo[]) {
        { TYPE_USER_CREATABLE },
        { }
    },
};

static void register_types(void)
{
    type_register_static(&sw_protected_guest_info);
}

type_init(register_types);
