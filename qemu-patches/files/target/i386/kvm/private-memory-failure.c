/*
 * Memory of a memory-backend-private that the host has lost
 *
 * KVM tells on the vCPU that touches it: KVM_RUN fails with EHWPOISON where it
 * is private, and raises SIGBUS where it is shared. The library retires the
 * page, and another one, zeroed, comes in its place. So either the guest gets
 * a machine check that names the page, on the vCPU that touched it, or the VM
 * stops before the page is retired. (Until the guest has dealt with a machine
 * check, its other vCPUs may find zeroes.)
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <privmem.h>
#include "qapi/qapi-events-private-memory.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "block/aio.h"
#include "cpu.h"
#include "exec/cpu-common.h"
#include "system/hw_accel.h"
#include "system/kvm_int.h"
#include "system/private-memory.h"
#include "system/runstate.h"
#include "kvm_i386.h"
#include "trace.h"

/* The bank that kvm_mce_inject() reports in. */
#define MCE_BANK 9

/* A place in RAM that has failed. */
typedef struct Failed {
    RAMBlock *block;
    hwaddr offset;
    /* PRIVMEM_UNKNOWN where the guest does not see it. */
    hwaddr gpa;
    bool is_private;
    /* What the library has told of it; before that, the page alone. */
    struct privmem_failure told;
} Failed;

static void failed_event(const Failed *failed,
                         PrivateMemoryFailureAction action)
{
    Object *backend = failed->block->mr->owner;
    /* RAM of the board has no owner. */
    const char *id = backend ? object_get_canonical_path_component(backend)
                             : failed->block->idstr;

    trace_private_memory_failure(id, failed->told.offset, failed->is_private,
                                 PrivateMemoryFailureAction_str(action));
    qapi_event_send_private_memory_failure(id, failed->told.offset,
                                           failed->told.size,
                                           failed->gpa != PRIVMEM_UNKNOWN,
                                           failed->gpa, failed->is_private,
                                           action);
}

static Failed failed_at(RAMBlock *block, hwaddr offset, hwaddr gpa,
                        bool is_private)
{
    size_t size = is_private ? qemu_real_host_page_size()
                             : qemu_ram_pagesize(block);

    return (Failed) {
        .block = block,
        .offset = offset,
        .gpa = gpa,
        .is_private = is_private,
        .told = {
            .offset = QEMU_ALIGN_DOWN(offset, size),
            .size = size,
        },
    };
}

/* What is lost; with @retire, there is another page in its place by then. */
static bool failed_ask(Failed *failed, bool retire)
{
    if (privmem_region_memory_failure(failed->block->privmem, failed->offset,
                                      failed->is_private, retire,
                                      &failed->told)) {
        return false;
    }
    if (failed->told.unmapped) {
        warn_report("%s: a device does not reach 0x%" PRIx64 " bytes at 0x%"
                    PRIx64 ", which have failed, until they change sides",
                    failed->block->idstr, failed->told.unmapped,
                    failed->told.offset);
    }
    return true;
}

/* Why the guest cannot be told of what it has lost; NULL if it can. */
static const char *failed_untold(const Failed *failed, X86CPU *cpu)
{
    CPUX86State *env = &cpu->env;

    if (failed->gpa == PRIVMEM_UNKNOWN) {
        return "it does not see the page";
    }
    if (!failed->is_private &&
        qemu_ram_pagesize(failed->block) > qemu_real_host_page_size()) {
        return "a huge page is lost, and a machine check names 4 KiB";
    }
    if (KVM_STATE(current_accel())->guest_state_protected) {
        return "its state is protected";
    }
    cpu_synchronize_state(CPU(cpu));
    if (!(env->mcg_cap & MCG_SER_P)) {
        return "its CPU has no recovery from machine checks (MCG_SER_P)";
    }
    if (!(env->cr[4] & CR4_MCE_MASK)) {
        return "it has machine checks turned off (CR4.MCE)";
    }
    if (env->mcg_status & MCG_STATUS_MCIP) {
        return "it has not done with the one before (MCG_STATUS.MCIP)";
    }
    if (((env->mcg_cap & MCG_CTL_P) && env->mcg_ctl != UINT64_MAX) ||
        env->mce_banks[4 * MCE_BANK] != UINT64_MAX) {
        return "it has turned their reports off (MCG_CTL, MC9_CTL)";
    }
    return NULL;
}

/* In the main loop: only there vCPUs are known to stand. */
static void failed_stop(void *opaque)
{
    g_autofree Failed *failed = opaque;

    vm_stop(RUN_STATE_INTERNAL_ERROR);
    if (!failed_ask(failed, true)) {
        error_report("%s", privmem_last_error());
    }
    failed_event(failed, PRIVATE_MEMORY_FAILURE_ACTION_STOP);
    memory_region_unref(failed->block->mr);
}

/* Whether the vCPU may run on; else the VM stops. With the BQL, on the vCPU. */
static bool failed_handle(Failed *failed, X86CPU *cpu)
{
    const char *side = failed->is_private ? "private" : "shared";
    const char *untold = failed_untold(failed, cpu);
    bool known = failed_ask(failed, !untold);

    if (known && !failed->told.lost) {
        failed_event(failed, PRIVATE_MEMORY_FAILURE_ACTION_IGNORE);
        return true;
    }
    if (known && !untold) {
        kvm_mce_inject(cpu, failed->gpa, BUS_MCEERR_AR);
        failed_event(failed, PRIVATE_MEMORY_FAILURE_ACTION_MACHINE_CHECK);
        warn_report("%s guest memory at 0x%" HWADDR_PRIx " has failed; the "
                    "guest gets a machine check", side, failed->gpa);
        return true;
    }
    error_report("%s guest memory at 0x%" HWADDR_PRIx " has failed; the VM "
                 "stops and must be reset, as %s%s", side, failed->gpa,
                 known ? "the guest cannot get a machine check: " : "",
                 known ? untold : privmem_last_error());
    memory_region_ref(failed->block->mr);
    aio_bh_schedule_oneshot(qemu_get_aio_context(), failed_stop,
                            g_memdup2(failed, sizeof(*failed)));
    return false;
}

int private_memory_failure(CPUState *cs, hwaddr gpa, bool is_private)
{
    MemoryRegionSection section = memory_region_find(get_system_memory(), gpa,
                                                     1);
    bool runs_on = false;

    if (section.mr && memory_region_is_private_capable(section.mr)) {
        Failed failed = failed_at(section.mr->ram_block,
                                  section.offset_within_region, gpa,
                                  is_private);

        runs_on = failed_handle(&failed, X86_CPU(cs));
    } else {
        error_report("memory at 0x%" HWADDR_PRIx ", which is none of a "
                     TYPE_MEMORY_BACKEND_PRIVATE ", has failed", gpa);
    }
    if (section.mr) {
        memory_region_unref(section.mr);
    }
    /* The machine check is delivered outside of KVM_RUN. */
    return runs_on ? EXCP_INTERRUPT : -1;
}

bool private_memory_sigbus(CPUState *cs, int code, void *addr)
{
    X86CPU *cpu = X86_CPU(cs);
    hwaddr gpa = PRIVMEM_UNKNOWN;
    ram_addr_t offset;
    RAMBlock *block = addr ? qemu_ram_block_from_host(addr, false, &offset)
                           : NULL;
    Failed failed;

    if (!block || !block->privmem) {
        return false;
    }
    kvm_physical_memory_addr_from_host(cs->kvm_state, addr, &gpa);
    failed = failed_at(block, offset, gpa, false);
    if (code == BUS_MCEERR_AR) {
        if (!failed_handle(&failed, cpu)) {
            vm_stop(RUN_STATE_INTERNAL_ERROR);
        }
        return true;
    }
    /* Nobody has touched it yet, and who does so finds out. */
    if (gpa != PRIVMEM_UNKNOWN && !failed_untold(&failed, cpu)) {
        kvm_mce_inject(cpu, gpa, code);
    }
    failed_event(&failed, PRIVATE_MEMORY_FAILURE_ACTION_IGNORE);
    return true;
}
