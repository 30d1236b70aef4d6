/*
 * Private guest memory behind an fd (libprivmem)
 *
 * What QEMU's own files need to know of memory-backend-private: which memory
 * slot gets which fd, whether the host may touch a page, and where a guest's
 * request to convert memory goes. Decisions are the library's; see privmem.h.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SYSTEM_PRIVATE_MEMORY_H
#define SYSTEM_PRIVATE_MEMORY_H

#include "qemu/stats64.h"
#include "system/hostmem.h"
/* What differs between lines. */
#if QEMU_VERSION_MAJOR == 10 && QEMU_VERSION_MINOR == 0
#include "exec/address-spaces.h"
#include "exec/ramblock.h"
typedef void ClassInitData;
#define PRIVATE_MEMORY_VOID_REPLAY
#define private_memory_block_cpr(reason, errp)                            \
    migrate_add_blocker_modes(reason, errp, MIG_MODE_CPR_REBOOT,          \
                              MIG_MODE_CPR_TRANSFER, -1)
#else
#include "system/address-spaces.h"
#include "system/ramblock.h"
typedef const void ClassInitData;
#define private_memory_block_cpr(reason, errp)                            \
    migrate_add_blocker_modes(reason, BIT(MIG_MODE_CPR_REBOOT) |          \
                              BIT(MIG_MODE_CPR_TRANSFER) |                \
                              BIT(MIG_MODE_CPR_EXEC), errp)
#endif

#define TYPE_MEMORY_BACKEND_PRIVATE "memory-backend-private"
#define TYPE_SW_PROTECTED_GUEST "sw-protected-guest"

/* What the mappings of private-capable memory are in a container of VFIO. */
typedef struct PrivateMemoryDma {
    /* A part of a mapping can be given up without a gap in the rest of it. */
    bool splits;
    /* How many mappings there can be, 0 without a limit; and are. Atomic. */
    uint32_t limit, mappings;
} PrivateMemoryDma;

#ifdef CONFIG_PRIVATE_MEMORY

#include "qapi/qapi-types-private-memory.h"

struct privmem_region;
struct privmem_vm;

/*
 * Tells the fd of the KVM VM, once it exists. The fd stays KVM's and stays
 * open until QEMU ends.
 */
void private_memory_set_kvm_vm(int vm_fd);

/*
 * Tells that the KVM VM is a TDX or an SEV-SNP guest, before there is any
 * backend; @sev_fd is /dev/sev and stays open until QEMU ends.
 */
void private_memory_use_tdx(void);
void private_memory_use_snp(int sev_fd);

/*
 * The library's VM, made by the first call: with KVM (@emulate false) or with
 * the emulated trust agent. NULL and @errp where the VM has no private memory.
 */
struct privmem_vm *private_memory_vm(bool emulate, Error **errp);

/* The VM if there is one, and who keeps its private contents. */
struct privmem_vm *private_memory_current_vm(void);
PrivateMemoryAgent private_memory_agent(void);

/* Requests that took from 2^(i-1) ns up to 2^i ns, by i; the last and longer */
#define PRIVATE_MEMORY_LATENCIES 40

/* Written on any thread. */
typedef struct PrivateMemoryStats {
    Stat64 faults;
    /* Messages that private_memory_report() did not print. */
    Stat64 suppressed;
    Stat64 latency[PRIVATE_MEMORY_LATENCIES];
} PrivateMemoryStats;

extern PrivateMemoryStats private_memory_stats;

/* Of one place in the code; zeroed at first. */
typedef struct PrivateMemoryMessages {
    GMutex lock;
    /* When the last of the messages so far is paid for, at one a minute. */
    int64_t paid_ns;
    uint64_t suppressed;
} PrivateMemoryMessages;

/*
 * Whether a message may be printed now. If some were suppressed before it,
 * prints how many. Any thread.
 */
bool private_memory_may_report(PrivateMemoryMessages *messages);

/*
 * For messages that a guest can cause as often as it likes: ten of each place
 * in the code, and one more a minute. @report is error_report or warn_report.
 */
#define private_memory_report(report, ...)                                \
    do {                                                                  \
        static PrivateMemoryMessages messages_;                           \
                                                                          \
        if (private_memory_may_report(&messages_)) {                      \
            report(__VA_ARGS__);                                          \
        }                                                                 \
    } while (0)

/*
 * True where guests' requests to convert memory are the library's to answer.
 * Any thread.
 */
bool private_memory_enabled(void);

/*
 * True where the guest expects all memory to be private when it starts, with
 * initial contents that are measured.
 */
bool private_memory_is_launched(void);

/*
 * True where RAM has a guest_memfd of QEMU's own and the guest expects all of
 * it to be shared when it starts: 'x-require-guest-memfd'.
 */
bool private_memory_starts_shared(void);

/*
 * Makes @mr RAM of @region: its shared store, mapped. The region stays the
 * caller's.
 */
bool private_memory_map(MemoryRegion *mr, Object *owner, const char *name,
                        uint64_t size, uint32_t ram_flags,
                        struct privmem_region *region, Error **errp);

/* Out of line part of private_memory_host_access(). */
bool private_memory_host_access_block(RAMBlock *block, hwaddr offset,
                                      hwaddr *len);

/*
 * Fails, naming the page, where any of the guest-physical range is private
 * and so out of the host's reach.
 */
bool private_memory_check_host_access(hwaddr gpa, uint64_t size, Error **errp);

/*
 * Where *@len bytes of private-capable memory at @addr of @as, or as many as
 * are in one piece, lie in QEMU, for who discards them: not to be touched. NULL
 * for other memory; holds a reference to the MemoryRegion otherwise.
 */
void *private_memory_place(AddressSpace *as, hwaddr addr, hwaddr *len);

/*
 * A device is about to be added that pins guest memory and is not told when it
 * becomes private. Fails beside memory-backend-private, of which none can be
 * added later either; @what and @way_out are for the message. With the BQL.
 */
bool private_memory_add_pinner(const char *what, const char *way_out,
                               Error **errp);

/*
 * A memory-backend-private is about to be added, which fails beside such
 * devices; and is gone. With the BQL.
 */
bool private_memory_add_backend(void);
void private_memory_del_backend(void);

/*
 * A VFIO device is about to get the address space @as, which makes it such a
 * device if a virtual IOMMU is in between; and has lost it. With the BQL.
 */
bool private_memory_dma_attach(AddressSpace *as, Error **errp);
void private_memory_dma_detach(AddressSpace *as);

/* Drops translated code of @len bytes of @mr at @offset. In physmem.c. */
void memory_region_invalidate_code(MemoryRegion *mr, hwaddr offset, hwaddr len);

static inline bool memory_region_is_private_capable(const MemoryRegion *mr)
{
    return mr->ram_block && mr->ram_block->privmem;
}

/*
 * Whether the host may touch @mr at @offset; cuts @len to where the answer
 * holds. Touching what is private would find zeroes and take a second page.
 * Any thread, no lock.
 */
static inline bool private_memory_host_access(MemoryRegion *mr, hwaddr offset,
                                              hwaddr *len)
{
    return likely(!memory_region_is_private_capable(mr)) ||
           private_memory_host_access_block(mr->ram_block, offset, len);
}

#else /* !CONFIG_PRIVATE_MEMORY */

static inline void private_memory_set_kvm_vm(int vm_fd)
{
}

static inline void private_memory_use_tdx(void)
{
}

static inline void private_memory_use_snp(int sev_fd)
{
}

/* Macros, so that the calls below are dropped without optimization, too. */
#define private_memory_enabled() (0)
#define private_memory_starts_shared() (0)
#define memory_region_is_private_capable(mr) (0)

static inline bool private_memory_check_host_access(hwaddr gpa, uint64_t size,
                                                    Error **errp)
{
    return true;
}

static inline bool private_memory_host_access(MemoryRegion *mr, hwaddr offset,
                                              hwaddr *len)
{
    return true;
}

static inline void *private_memory_place(AddressSpace *as, hwaddr addr,
                                         hwaddr *len)
{
    return NULL;
}

static inline bool private_memory_add_pinner(const char *what,
                                             const char *way_out, Error **errp)
{
    return true;
}

static inline bool private_memory_dma_attach(AddressSpace *as, Error **errp)
{
    return true;
}

static inline void private_memory_dma_detach(AddressSpace *as)
{
}

#endif /* CONFIG_PRIVATE_MEMORY */

/* The rest is only called where memory is enabled or private-capable. */

/*
 * Converts guest-physical memory. 0, or a negative errno and @errp. Any
 * thread, with or without the BQL; with the emulated agent, with the BQL.
 * Keeps memory slots as they are for one step of a long request at a time.
 */
int private_memory_convert(hwaddr gpa, uint64_t size, bool to_private,
                           Error **errp);

/*
 * RAM of a board that the guest expects to be private when it starts, such as
 * its firmware's. QEMU reaches the shared side of it; what is there becomes
 * private with private_memory_tdx_populate() or private_memory_snp_populate().
 */
bool private_memory_init_ram(MemoryRegion *mr, Object *owner, const char *name,
                             uint64_t size, Error **errp);

/*
 * Initial contents of a TDX guest, by a vCPU's fd, in the order of the
 * measurement: see KVM_TDX_INIT_MEM_REGION.
 */
bool private_memory_tdx_populate(int vcpu_fd, hwaddr gpa, void *source,
                                 uint64_t size, bool measured, Error **errp);

/* Initial contents of an SEV-SNP guest; @type is KVM_SEV_SNP_PAGE_TYPE_*. */
bool private_memory_snp_populate(hwaddr gpa, void *source, uint64_t size,
                                 int type, Error **errp);

/*
 * Ends the time for initial contents. @snp_finish is a struct
 * kvm_sev_snp_launch_finish, or NULL for a TDX guest.
 */
bool private_memory_finalize(const void *snp_finish, size_t finish_size,
                             Error **errp);

/*
 * KVM_HC_MAP_GPA_RANGE, on the vCPU's thread: arguments as the guest gave them.
 * Returns what the guest finds in its register: 0 or a negative errno.
 */
uint64_t private_memory_hypercall(uint64_t gpa, uint64_t pages,
                                  bool to_private);

/* Memory of some backend is mapped as soon as the guest has made it private. */
void private_memory_use_prefault(void);

/*
 * KVM_EXIT_MEMORY_FAULT on an access to private memory, or to shared. 0 if the
 * vCPU may run on, else a negative errno: the error has been reported and no
 * retry can help.
 */
int private_memory_fault(hwaddr gpa, uint64_t size, bool is_private);

/*
 * KVM_EXIT_MEMORY_FAULT with EHWPOISON: the host has lost what a vCPU touched
 * at @gpa. On its thread, with the BQL. EXCP_INTERRUPT if it may run on, with a
 * machine check, else -1: the VM stops, and why has been reported.
 */
int private_memory_failure(CPUState *cpu, hwaddr gpa, bool is_private);

/*
 * SIGBUS for memory at @addr that the host has lost. False where it is not of
 * a memory-backend-private. With the BQL; BUS_MCEERR_AR on the vCPU's thread.
 */
bool private_memory_sigbus(CPUState *cpu, int code, void *addr);

/*
 * A memory slot for @size bytes of @block, from @offset, is about to appear at
 * @gpa. Returns the fd that goes into the slot, or -1 where there must be no
 * slot: the guest's accesses then come to QEMU, one by one.
 */
int private_memory_slot_add(RAMBlock *block, hwaddr offset, hwaddr gpa,
                            hwaddr size);

/*
 * Frees the memory of @length bytes of @block at @offset, on whichever side
 * they are. 0 or a negative errno; the error has been reported.
 */
int private_memory_discard(RAMBlock *block, ram_addr_t offset, size_t length);

/* The slot of private_memory_slot_add() is gone. */
void private_memory_slot_del(RAMBlock *block, hwaddr gpa, hwaddr size);

/* A backend wants mappings larger than a page: containers will not split. */
void private_memory_use_large_mappings(void);

/* Of so many @mappings that the kernel has left, 0 without a limit. */
void private_memory_dma_set_limit(PrivateMemoryDma *dma, uint32_t mappings);

/* For an IOAS in which nothing is mapped yet. */
bool private_memory_dma_can_split(int iommufd, uint32_t ioas_id);

/* Of an IOAS that can split; what is not mapped is passed over. -errno. */
int private_memory_dma_unmap(int iommufd, uint32_t ioas_id, hwaddr iova,
                             uint64_t size);

#endif /* SYSTEM_PRIVATE_MEMORY_H */
