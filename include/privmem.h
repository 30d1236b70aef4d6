/*
 * libprivmem: private guest memory behind an fd.
 *
 * A confidential guest keeps its RAM in an fd that the host cannot map. This
 * library owns that memory for a VMM: regions with a shared and a private
 * store, the map of what is private, and the one path that converts.
 *
 * Conventions
 *   Errors     A function that returns int returns 0, or a negative errno and
 *              leaves a message for privmem_last_error(). Out-parameters are
 *              written on success only.
 *   Threads    A const handle may be used by many threads at once. Creating
 *              and freeing belongs to one thread.
 *   Ownership  What a _new function hands out is given back to the matching
 *              _free function, once. File descriptors that are handed out stay
 *              the library's, those that are handed in stay the caller's.
 *   Callbacks  Only those of struct privmem_listener and struct privmem_agent,
 *              see there.
 *   Structs    Those that are handed in begin with their size. What an older
 *              caller does not have is zero; what a newer one has that this
 *              library does not know must be zero, or it is refused (-E2BIG).
 *   Numbers    Sizes, offsets and addresses are in bytes.
 *
 * Generated from src/ffi.rs by `cargo xtask header`; do not edit.
 *
 * SPDX-License-Identifier: MIT
 */

#ifndef PRIVMEM_H
#define PRIVMEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * How many failures of a region are remembered; older ones are only counted.
 */
#define REMEMBERED 16

/**
 * A figure that this kernel cannot tell, or an address that there is not.
 */
#define PRIVMEM_UNKNOWN UINT64_MAX

/**
 * Bytes of a message in a struct, with its NUL.
 */
#define PRIVMEM_MESSAGE_SIZE 256

/**
 * Words of a block of the state map: 16 MiB, whose bits fill eight cache lines.
 * (The checker takes 1, as it cannot look at many.)
 */
#define BLOCK_WORDS 64

/**
 * What a page of initial contents is to the trust agent.
 */
enum privmem_page_type {
  /**
   * Contents that are part of the measurement.
   */
  PRIVMEM_PAGE_NORMAL = 1,
  /**
   * Contents that are not.
   */
  PRIVMEM_PAGE_UNMEASURED = 2,
  /**
   * Zeroes, without a source; SEV-SNP only.
   */
  PRIVMEM_PAGE_ZERO = 3,
  /**
   * Where the firmware puts secrets for the guest; SEV-SNP only.
   */
  PRIVMEM_PAGE_SECRETS = 4,
  /**
   * The CPUID table; SEV-SNP only. One that the firmware refuses comes back
   * in the source, with the values that it would accept.
   */
  PRIVMEM_PAGE_CPUID = 5,
  /**
   * Registers of a vCPU at its start. -EOPNOTSUPP for SEV-SNP, where KVM adds
   * those of its vCPUs when the launch ends.
   */
  PRIVMEM_PAGE_VMSA = 6,
};

/**
 * A request to convert memory that is being done.
 */
struct privmem_conversion;

/**
 * Private-capable guest memory of fixed size.
 */
struct privmem_region;

/**
 * A VM: its trust agent, and which region its guest sees where.
 */
struct privmem_vm;

/**
 * A trust agent of the caller's: who keeps private contents from the host.
 *
 * The functions are called on the thread that converts, populates, discards or
 * resets, with the range locked: nobody converts it meanwhile. They must call
 * no function of this library that waits for a lock (see struct
 * privmem_listener), nor wait for a thread that does. Addresses are
 * guest-physical; all numbers are in bytes. Functions that may fail return 0
 * or a negative errno.
 */
struct privmem_agent {
  /**
   * `sizeof(struct privmem_agent)` as the caller was compiled.
   */
  size_t size;
  /**
   * Handed to the functions.
   */
  void *opaque;
  /**
   * In messages; copied.
   */
  const char *name;
  /**
   * Begins the time for initial contents. May be NULL, as all functions.
   */
  int (*prepare)(void *opaque);
  /**
   * Gives private pages their initial contents, in order of address; what is
   * interrupted is the agent's to repeat. `source` is NULL for
   * PRIVMEM_PAGE_ZERO.
   */
  int (*populate)(void *opaque,
                  uint64_t gpa,
                  uint64_t size,
                  void *source,
                  enum privmem_page_type page_type);
  /**
   * Ends the time for initial contents.
   */
  int (*finalize)(void *opaque);
  /**
   * The range is about to change side; if this fails, it does not.
   */
  int (*before_convert)(void *opaque, uint64_t gpa, uint64_t size, bool to_private);
  /**
   * The range is on this side now, for good or again after a failure: once
   * for every `before_convert` that succeeded.
   */
  void (*after_convert)(void *opaque, uint64_t gpa, uint64_t size, bool is_private);
  /**
   * Private pages of the range go without a conversion.
   */
  void (*invalidate)(void *opaque, uint64_t gpa, uint64_t size);
  /**
   * Moves private contents from one file to another, as many bytes, for
   * `privmem_vm_relocate`. Nobody writes to them meanwhile, and the new place
   * reads zero; it is emptied again if this fails. Called once for each
   * stretch. NULL, or absent in an older table: the agent moves nothing.
   */
  int (*relocate)(void *opaque,
                  uint64_t gpa,
                  uint64_t size,
                  int from_fd,
                  uint64_t from_offset,
                  int to_fd,
                  uint64_t to_offset);
  /**
   * The host has lost what the guest had in the range, on this side; the
   * pages are retired, after `invalidate` for private ones. May be NULL.
   */
  void (*memory_failure)(void *opaque, uint64_t gpa, uint64_t size, bool is_private);
  /**
   * Whether the guest says by its access which side it means (TDX's shared
   * bit, SEV's C-bit): see `privmem_vm_memory_fault`.
   */
  bool chooses_side;
};

/**
 * A page that the host lost.
 */
struct privmem_failure {
  /**
   * Offset of the page into the region, in bytes.
   */
  uint64_t offset;
  /**
   * Bytes of the page: the granule, or a huge page of the shared store.
   */
  uint64_t size;
  /**
   * Bytes of the guest's that are gone with it: 0 where the report came late;
   * of a huge page only what was shared.
   */
  uint64_t lost;
  /**
   * Guest-physical address of the first of them, or `PRIVMEM_UNKNOWN` if the
   * guest does not see it.
   */
  uint64_t gpa;
  /**
   * Bytes that a listener would not map again when the page was retired: its
   * device does not reach them until they have changed side.
   */
  uint64_t unmapped;
  /**
   * Whether it was a page of the private store.
   */
  bool is_private;
};

/**
 * What a region is made with. Zeroes but for `size` are the defaults: all
 * shared at first, in pages of 4096 bytes, with memory held for one side only.
 */
struct privmem_region_options {
  /**
   * `sizeof(struct privmem_region_options)` as the caller was compiled.
   */
  size_t size;
  /**
   * Bytes of a huge page (hugetlbfs) of the shared store, a power of two, or
   * 0. A huge page is given back once all of it is private. Not with the
   * emulated agent.
   */
  uint64_t huge_page_size;
  /**
   * Whether all of the region is private at first, and after a reset.
   */
  bool initially_private;
  /**
   * Whether the private store keeps pages, contents included, when memory
   * becomes shared: memory may be held twice then.
   */
  bool keep_private;
  /**
   * Whether the shared store keeps pages when memory becomes private.
   */
  bool keep_shared;
  /**
   * Whether `privmem_vm_prefault` maps memory of this region. Not with the
   * emulated agent.
   */
  bool prefault;
};

/**
 * A downstream mapper of a region's shared store, such as VFIO: told before
 * shared memory goes and after it has come. Offsets and sizes are in bytes of
 * the region; a conversion cuts runs at the multiples of 64 MiB of the region, and
 * nowhere else.
 *
 * The library knows what the listener maps: it is asked to give up only that, and
 * to map only what it does not. A discard may cover what was populated by several
 * calls and, without a granularity, a part of what was populated by one.
 *
 * The functions are called on the thread that converts, discards, loads, adds
 * or removes a listener, resets or frees the region, with locks held. They must call no
 * function of this library but `privmem_last_error`, `privmem_region_info`,
 * `privmem_region_next_run` and the like, which take no lock, and must not
 * wait for a thread that does.
 */
struct privmem_listener {
  /**
   * `sizeof(struct privmem_listener)` as the caller was compiled.
   */
  size_t size;
  /**
   * Handed to the functions; also tells this listener from others.
   */
  void *opaque;
  /**
   * Shared memory is about to go: on return no translation to it is left. It
   * was populated by `entries` calls (0 without a granularity). Returns 0, or a
   * negative errno with all of it still mapped: the conversion is undone then.
   */
  int (*discard)(void *opaque, uint64_t offset, uint64_t size, uint64_t entries);
  /**
   * Shared memory has come and is to be mapped, by one entry. Returns 0, or a
   * negative errno with none of it mapped: the conversion is undone then.
   */
  int (*populate)(void *opaque, uint64_t offset, uint64_t size);
  /**
   * Where that begins which the listener is told of: offset into the region, in
   * bytes.
   */
  uint64_t offset;
  /**
   * How many bytes of the region it is told of; 0, with offset 0, for all of it.
   */
  uint64_t length;
  /**
   * For a listener that can give up entries only as a whole: bytes of one, a
   * power of two, at most 64 MiB. Blocks of so many that become shared as a whole
   * are mapped by one entry each, and are refused (-EBUSY) to a conversion that
   * makes a part of one private; the rest is mapped page by page. A block that
   * the guest sees in two bindings is a whole to a request only where their
   * guest-physical addresses follow each other, too. 0 for a listener that can
   * give up any part of an entry: it is told run by run.
   */
  uint64_t granularity;
  /**
   * For a listener with a limited number of entries: how many more calls of
   * `populate` can succeed now. A request that needs more is refused (-ENOSPC)
   * before any of it is done. NULL, or absent in an older table: no limit.
   */
  uint64_t (*entries_left)(void *opaque);
  /**
   * Listeners for which this is the same share one limit, of any regions of the
   * VM. Only compared; NULL for a limit of this listener alone.
   */
  const void *limit;
};

/**
 * A request to convert memory that failed.
 */
struct privmem_failed_conversion {
  /**
   * Which one of all failed requests of the VM it is, from 1.
   */
  uint64_t number;
  /**
   * When, in nanoseconds since the beginning of 1970 (UTC).
   */
  uint64_t time;
  /**
   * Guest-physical address, as it was asked for.
   */
  uint64_t gpa;
  /**
   * In bytes, as it was asked for.
   */
  uint64_t size;
  /**
   * What the caller got: a negative errno.
   */
  int error;
  /**
   * Whether the range was to become private.
   */
  bool to_private;
  /**
   * What `privmem_last_error` said, cut to what fits, with NUL at its end.
   */
  char message[PRIVMEM_MESSAGE_SIZE];
};

/**
 * State and memory of a region. All sizes in bytes.
 */
struct privmem_info {
  /**
   * Size of the region.
   */
  uint64_t size;
  /**
   * Unit in which memory changes side.
   */
  uint64_t granule;
  /**
   * Private by the state map.
   */
  uint64_t private_bytes;
  /**
   * Shared by the state map.
   */
  uint64_t shared_bytes;
  /**
   * Held by the private store, or `PRIVMEM_UNKNOWN`.
   */
  uint64_t private_held;
  /**
   * Held by the shared store, or `PRIVMEM_UNKNOWN`.
   */
  uint64_t shared_held;
  /**
   * Held by a store for granules on the other side, or `PRIVMEM_UNKNOWN`.
   */
  uint64_t held_twice;
  /**
   * Requests that touched the region and succeeded.
   */
  uint64_t conversions;
  /**
   * Requests that touched the region and failed.
   */
  uint64_t failed_conversions;
  /**
   * Private contents, kept ones included, that `privmem_vm_relocate` moved
   * elsewhere than in the private store.
   */
  uint64_t relocated;
  /**
   * Of these, on a disk; not in `private_held`.
   */
  uint64_t swapped;
  /**
   * Pages that the host lost and that were retired; the last ones are told
   * by `privmem_region_failure`.
   */
  uint64_t memory_failures;
  /**
   * How old the oldest part of `private_held` and `held_twice` is, in nanoseconds:
   * pages of a large region are counted in turn. `PRIVMEM_UNKNOWN`, as these two
   * are, before all have been counted once: call it again.
   */
  uint64_t held_age;
};

/**
 * Neighbouring bytes of a region that are all private or all shared.
 */
struct privmem_run {
  /**
   * Offset into the region, in bytes.
   */
  uint64_t offset;
  /**
   * Length in bytes.
   */
  uint64_t size;
  /**
   * Whether the run is private.
   */
  bool is_private;
};

/**
 * A stretch of a region that the guest sees.
 */
struct privmem_binding {
  /**
   * Guest-physical address.
   */
  uint64_t gpa;
  /**
   * Length in bytes.
   */
  uint64_t size;
  /**
   * Offset into the region, in bytes.
   */
  uint64_t offset;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Version of this library as "major.minor.patch". Static; never NULL.
 */
const char *privmem_version(void);

/**
 * Message of the last function that failed on this thread; "" before any did.
 *
 * The string belongs to the library and stays valid until the next failure on
 * this thread, or its end. Never NULL.
 */
const char *privmem_last_error(void);

/**
 * Makes a VM whose private memory KVM keeps (`guest_memfd`).
 *
 * `vm_fd` is the fd of a KVM VM that has private memory, such as one of type
 * KVM_X86_SW_PROTECTED_VM. It stays the caller's, and stays open until the VM
 * and all its regions are freed. `vm` receives a handle for
 * `privmem_vm_free`.
 *
 * Errors: -EOPNOTSUPP where the VM has no private memory; the message says
 * which capabilities are missing and which VM types this KVM has. Source:
 * Documentation/virt/kvm/api.rst, KVM_CAP_GUEST_MEMFD and
 * KVM_CAP_MEMORY_ATTRIBUTES.
 *
 * # Safety
 * `vm` is NULL or valid for writing; `vm_fd` stays open as said above.
 */
int privmem_vm_new_kvm(int vm_fd, struct privmem_vm **vm);

/**
 * Makes a VM with the emulated trust agent: no KVM, two memfds a region, and
 * the visible one mapped in place. It protects nothing; it is for TCG and for
 * tests.
 *
 * `vm` receives a handle for `privmem_vm_free`.
 *
 * # Safety
 * `vm` is NULL or valid for writing.
 */
int privmem_vm_new_emulated(struct privmem_vm **vm);

/**
 * Makes a VM with the TDX module as its trust agent, through KVM: for a VM fd
 * of type KVM_X86_TDX_VM; KVM_TDX_INIT_VM comes before initial contents. Like
 * `privmem_vm_new_kvm` otherwise. Source: Documentation/virt/kvm/x86/intel-tdx.rst.
 *
 * # Safety
 * `vm` is NULL or valid for writing; `vm_fd` stays open until the VM and all
 * its regions are freed.
 */
int privmem_vm_new_tdx(int vm_fd, struct privmem_vm **vm);

/**
 * Tells the TDX agent the fd of a vCPU, after KVM_TDX_INIT_VCPU: initial
 * contents are a command of a vCPU.
 *
 * Errors: -EINVAL for NULL, a negative fd, or a VM with another agent.
 *
 * # Safety
 * `vm` is NULL or a live handle; `vcpu_fd` stays open until the VM and all its
 * regions are freed.
 */
int privmem_vm_set_tdx_vcpu(const struct privmem_vm *vm, int vcpu_fd);

/**
 * Makes a VM with the SEV-SNP firmware as its trust agent, through KVM: for a
 * VM fd of type KVM_X86_SNP_VM, after KVM_SEV_INIT2, and /dev/sev. Like
 * `privmem_vm_new_kvm` otherwise. Source:
 * Documentation/virt/kvm/x86/amd-memory-encryption.rst.
 *
 * # Safety
 * `vm` is NULL or valid for writing; both fds stay open until the VM and all
 * its regions are freed.
 */
int privmem_vm_new_snp(int vm_fd, int sev_fd, struct privmem_vm **vm);

/**
 * With what `privmem_vm_prepare` is to begin the launch of an SEV-SNP guest: a
 * `struct kvm_sev_snp_launch_start` of <linux/kvm.h>; the policy 0x30000 by
 * default.
 *
 * Errors: -EINVAL for NULL, another size, or a VM with another agent.
 *
 * # Safety
 * `vm` is NULL or a live handle; `start` is NULL or valid for reading
 * `start_size` bytes.
 */
int privmem_vm_snp_set_start(const struct privmem_vm *vm, const void *start, size_t start_size);

/**
 * With what `privmem_vm_finalize` is to end the launch of an SEV-SNP guest: a
 * `struct kvm_sev_snp_launch_finish` of <linux/kvm.h>; zeroes by default.
 *
 * Errors: -EINVAL for NULL, another size, or a VM with another agent.
 *
 * # Safety
 * `vm` is NULL or a live handle; `finish` is NULL or valid for reading
 * `finish_size` bytes; what the addresses in it point to stays valid until
 * `privmem_vm_finalize` has returned.
 */
int privmem_vm_snp_set_finish(const struct privmem_vm *vm, const void *finish, size_t finish_size);

/**
 * Makes a VM with a trust agent of the caller's. With `vm_fd`, KVM changes the
 * side of memory (see `privmem_vm_new_kvm`); with -1 the VMM's mapping does
 * (see `privmem_vm_new_emulated`). The table is copied.
 *
 * Errors: -EINVAL for NULL or a table that is too small; -E2BIG for one with fields
 * that are not zero and that only a newer library has; those of the two functions.
 *
 * # Safety
 * `vm` is NULL or valid for writing; `vm_fd` stays open as said there; `agent`
 * is NULL or a table with a C string as its name, whose functions may be
 * called with its `opaque`, from any thread, until the VM and all its regions
 * are freed.
 */
int privmem_vm_new_agent(int vm_fd, const struct privmem_agent *agent, struct privmem_vm **vm);

/**
 * Begins the time for initial contents: KVM_SEV_SNP_LAUNCH_START, or nothing
 * for other agents. To be called once, before any are given, unless the VMM has
 * done so by itself.
 *
 * Errors: -EPERM the second time; what the kernel returned: it may be called
 * again then.
 *
 * # Safety
 * `vm` is NULL or a live handle.
 */
int privmem_vm_prepare(const struct privmem_vm *vm);

/**
 * Gives `size` bytes at guest-physical `gpa` their initial contents, before the
 * guest runs, from `source`: as many bytes at a multiple of the granule, NULL
 * for PRIVMEM_PAGE_ZERO. All of the range must be bound; what is not private
 * becomes so first. Interruptions are repeated. The order of calls is that of
 * the measurement. `page_type` is one of `enum privmem_page_type`.
 *
 * Errors: -EINVAL for bad numbers, a source that does not fit, memory that is
 * not bound, or a type that the agent does not know; -EPERM after
 * `privmem_vm_finalize`; -EOPNOTSUPP for a software-protected VM, which has no
 * initial contents; what the kernel returned, with the page and the status of
 * the firmware in the message. The pages before it are done then.
 *
 * # Safety
 * `vm` is NULL or a live handle; `source` is NULL or valid for reading and
 * writing `size` bytes, and nobody else touches it meanwhile.
 */
int privmem_vm_populate(const struct privmem_vm *vm,
                        uint64_t gpa,
                        uint64_t size,
                        void *source,
                        uint32_t page_type);

/**
 * Ends the time for initial contents: KVM_TDX_FINALIZE_VM,
 * KVM_SEV_SNP_LAUNCH_FINISH, or nothing for other agents. What the shared
 * stores hold where memory is private is freed then, so that sources may lie
 * there.
 *
 * Errors: -EPERM the second time; what the kernel returned: it may be called
 * again then.
 *
 * # Safety
 * `vm` is NULL or a live handle.
 */
int privmem_vm_finalize(const struct privmem_vm *vm);

/**
 * Frees the handle of a VM; NULL is ignored. Regions of the VM stay usable
 * until they are freed themselves.
 *
 * # Safety
 * `vm` is NULL or a handle of this library that nobody uses now or later.
 */
void privmem_vm_free(struct privmem_vm *vm);

/**
 * Says that the guest sees `size` bytes of `region`, from `offset`, at
 * guest-physical address `gpa`, and gives KVM the state of that stretch.
 *
 * Call it before the memory slot is made. All three numbers are in bytes and
 * multiples of the granule. Any thread; waits for conversions that run.
 *
 * Errors: -EINVAL for numbers that are unaligned, empty or beyond the region;
 * -EEXIST where the guest-physical range, or that part of the region, is
 * bound already; what KVM_SET_MEMORY_ATTRIBUTES returned. Nothing is bound
 * then.
 *
 * # Safety
 * `vm` and `region` are NULL or live handles; the region is one of this VM.
 */
int privmem_vm_bind(const struct privmem_vm *vm,
                    const struct privmem_region *region,
                    uint64_t offset,
                    uint64_t gpa,
                    uint64_t size);

/**
 * Ends the binding of exactly `size` bytes at `gpa`. The region keeps its
 * state, and a later binding brings it back; for KVM the range is shared
 * again.
 *
 * Call it after the memory slot is gone. Any thread; waits for conversions
 * that run. Errors: -ENOENT where no such binding exists; what
 * KVM_SET_MEMORY_ATTRIBUTES returned, the binding has ended then nevertheless.
 *
 * # Safety
 * `vm` is NULL or a live handle.
 */
int privmem_vm_unbind(const struct privmem_vm *vm, uint64_t gpa, uint64_t size);

/**
 * Makes `size` bytes at guest-physical `gpa` private, or shared; or as many
 * from the start as can be done in bounded time. `*done` receives the number
 * of bytes done, never 0: repeat the call for the rest, if any, and let others
 * run in between. `privmem_conversion_new` is for callers that want all of a
 * request done, or nothing of it.
 *
 * What is on that side already stays as it is; what changes side reads zero, or
 * what a store has kept (`keep_private`, `keep_shared`),
 * afterwards. To become private the whole range must be bound; to become
 * shared, what is not bound is passed over, as it is shared anyway (guests
 * ask so for MMIO). The numbers come from the guest and may be anything.
 *
 * Any thread; may sleep. Requests for overlapping memory wait for each other,
 * about in order of arrival; none waits for ever.
 *
 * Errors: -EINVAL for a range that is unaligned, empty, wraps, or is not all
 * bound; -EBUSY where it takes a part of a listener's block; -ENOSPC where a
 * listener has not enough entries left for all of it. Nothing has changed then.
 * Otherwise what the kernel, the trust agent or a listener returned: the call is
 * undone, but calls before it are not. Where memory has lost its contents or could
 * not be put back, the message says how many bytes.
 *
 * # Safety
 * `vm` is NULL or a live handle; `done` is NULL or valid for writing.
 */
int privmem_vm_convert(const struct privmem_vm *vm,
                       uint64_t gpa,
                       uint64_t size,
                       bool to_private,
                       uint64_t *done);

/**
 * Begins a request to make `size` bytes at guest-physical `gpa` private, or shared,
 * which is done by calls of `privmem_conversion_step`. `conversion` receives a
 * handle for `privmem_conversion_free`. The numbers come from the guest and may be
 * anything; what they may be is said at `privmem_vm_convert`.
 *
 * Errors: -EINVAL for NULL and for a range that is unaligned, empty or wraps.
 *
 * # Safety
 * `vm` is NULL or a live handle; `conversion` is NULL or valid for writing.
 */
int privmem_conversion_new(const struct privmem_vm *vm,
                           uint64_t gpa,
                           uint64_t size,
                           bool to_private,
                           struct privmem_conversion **conversion);

/**
 * Does the next step of a request, in bounded time. `*left` receives how many bytes
 * are left, 0 at the end: call it again for these, and let others run in between.
 *
 * Where a step fails, those before it are undone, by further steps, which `*left`
 * asks for as well; the last one of these returns the error. All that the request has
 * changed is on its old side again then. What does not come back are the contents
 * that the steps had freed: that memory reads zero, and the message says how many
 * bytes that is, and how many could not be put back. A request that is refused
 * beforehand, for the reasons given at `privmem_vm_convert`, has changed nothing.
 *
 * Any thread, one at a time; may sleep. Requests for overlapping memory wait for
 * each other, step by step; what two requests for the same side have both asked for
 * goes back with the one that fails. Memory slots may change between steps.
 *
 * Errors: those of `privmem_vm_convert`. There is nothing left to do then.
 *
 * # Safety
 * `conversion` is NULL or a live handle; `left` is NULL or valid for writing.
 */
int privmem_conversion_step(struct privmem_conversion *conversion, uint64_t *left);

/**
 * Frees the handle of a request; NULL is ignored. What is done of a request that is
 * not at its end stays as it is.
 *
 * # Safety
 * `conversion` is NULL or a handle of this library that nobody uses now or later.
 */
void privmem_conversion_free(struct privmem_conversion *conversion);

/**
 * Maps for the guest what it may reach of `size` bytes at guest-physical `gpa`,
 * where the region was made with `prefault`, and takes pages for it; for memory
 * that has just become private and will be used. One call for all of it costs
 * less than the guest's faults, page by page. Does nothing where no region wants it.
 *
 * To be called on the thread of the vCPU whose fd is `vcpu_fd`. Ends at the first
 * page that cannot be had, or when the vCPU is kicked: the guest's access takes
 * what is left, so that the error may be ignored.
 *
 * Errors: -EINVAL for a range that is unaligned, empty or wraps; what
 * KVM_PRE_FAULT_MEMORY returned, such as -EINTR or -ENOMEM.
 *
 * # Safety
 * `vm` is NULL or a live handle; `vcpu_fd` stays open until the call returns.
 */
int privmem_vm_prefault(const struct privmem_vm *vm, int vcpu_fd, uint64_t gpa, uint64_t size);

/**
 * Answers a KVM_RUN that failed with EFAULT, but not with KVM_EXIT_MEMORY_FAULT: 0 if
 * the vCPU may run on and try again. That happens where its access to shared memory
 * meets a conversion half-way, with `privmem_region_slot_mapping`.
 *
 * To be called on the vCPU's own thread, as it counts how often the fault comes back.
 *
 * Errors: -EINVAL for NULL; -EFAULT where trying again does not help.
 *
 * # Safety
 * `vm` is NULL or a live handle.
 */
int privmem_vm_run_fault(const struct privmem_vm *vm);

/**
 * Answers KVM_EXIT_MEMORY_FAULT with EFAULT for `size` bytes at guest-physical
 * `gpa`, which the vCPU touched as private if `is_private`
 * (KVM_MEMORY_EXIT_FLAG_PRIVATE): 0 if it may run on and try again.
 *
 * Where the guest chooses a side by its access, as those of TDX and SEV-SNP,
 * the memory is converted to that side, as by `privmem_vm_convert`. A
 * software-protected guest does not: the fault met a conversion, or the end of
 * a binding, half-way, and asks for none. May sleep.
 *
 * To be called on the vCPU's own thread, as it counts how often the same
 * fault comes back.
 *
 * Errors: -EINVAL for a range that is unaligned, empty or wraps, or that
 * cannot be private; -EFAULT where trying again does not help; those of a
 * conversion; what KVM_SET_MEMORY_ATTRIBUTES returned.
 *
 * # Safety
 * `vm` is NULL or a live handle.
 */
int privmem_vm_memory_fault(const struct privmem_vm *vm,
                            uint64_t gpa,
                            uint64_t size,
                            bool is_private);

/**
 * The host has lost the page that the guest sees at guest-physical `gpa`, of
 * the private store if `is_private`: for KVM_EXIT_MEMORY_FAULT with EHWPOISON,
 * whose flags tell the side. `failure` says what the guest loses with it.
 *
 * With `retire`, whoever maps the page unmaps it, and another comes in its
 * place at the next access, zeroed: deliver the guest a machine check that
 * names it before it runs on. Without, the page stays as it is for now: where
 * the guest cannot be told, stop it first. `lost` is 0 where the memory has
 * changed side since, or the report comes late otherwise: then the guest may
 * just run on.
 *
 * A failure that two vCPUs have met is reported by both: tell both.
 *
 * Any thread; waits for conversions of the page.
 *
 * Errors, after which the guest must not run on: -EINVAL for NULL; -ENOENT
 * where nothing is bound at `gpa`; what fallocate or madvise returned where
 * the page could not be retired (it is not used again, listeners do not map
 * it), or where there is no memory to take in its place.
 *
 * # Safety
 * `vm` is NULL or a live handle; `failure` is NULL or valid for writing.
 */
int privmem_vm_memory_failure(const struct privmem_vm *vm,
                              uint64_t gpa,
                              bool is_private,
                              bool retire,
                              struct privmem_failure *failure);

/**
 * As `privmem_vm_memory_failure`, for the byte at `offset` of a region: for
 * SIGBUS (BUS_MCEERR_AR) at that offset of the mapping of the shared store.
 *
 * Errors: as there; -EINVAL for an offset beyond the region.
 *
 * # Safety
 * `region` is NULL or a live handle; `failure` is NULL or valid for writing.
 */
int privmem_region_memory_failure(const struct privmem_region *region,
                                  uint64_t offset,
                                  bool is_private,
                                  bool retire,
                                  struct privmem_failure *failure);

/**
 * A failure of a region whose page was retired: number `index`, the latest (0)
 * first. -ENOENT after the last that is remembered: 16 are, `memory_failures`
 * of `privmem_region_info` counts all. Any thread.
 *
 * # Safety
 * `region` is NULL or a live handle; `failure` is NULL or valid for writing.
 */
int privmem_region_failure(const struct privmem_region *region,
                           size_t index,
                           struct privmem_failure *failure);

/**
 * Moves private contents to another place while the guest runs; it sees the
 * same contents throughout, and who writes to them waits meanwhile.
 *
 * `level` is KVM's: 1, 2 or 3 for 4 KiB, 2 MiB or 1 GiB at guest-physical
 * `gpa`, a multiple of that. All of it must be private, and one stretch of one
 * region. The new place is at `offset` of the file `fd`: a memfd, or one on a
 * disk, whose pages leave memory then and are read again when touched (they
 * are swapped out). It is open for reading and writing, large enough, and the
 * region's alone; what it held is lost. It is duplicated. With -1 contents
 * move home, to the region's private store; `offset` is ignored.
 *
 * Once the memory is converted, discarded or reset it is at home again, and its
 * place is punched; so it is when the region is freed. A disk that fails when
 * the memory is touched is SIGBUS for the thread that touches it.
 *
 * Any thread; waits for requests for the same memory. The caller must not touch
 * memory of the guest's in a thread that this one waits for.
 *
 * Errors: -EINVAL for bad numbers, memory that is not bound or shared, or a bad
 * file; -EBUSY where the place, or a part, holds private memory of this VM
 * already, or another userfaultfd watches the memory; -EOPNOTSUPP for an agent
 * that cannot, such as all with KVM; what the kernel or the agent returned.
 * -EPERM means that the host keeps userfaultfd(2) from this process; the
 * message says what allows it. All is where it was then, unless the message
 * says otherwise.
 *
 * # Safety
 * `vm` is NULL or a live handle; `fd` is -1 or open.
 */
int privmem_vm_relocate(const struct privmem_vm *vm,
                        uint64_t gpa,
                        uint32_t level,
                        int fd,
                        uint64_t offset);

/**
 * Makes a region of `size` bytes (a multiple of the granule of 4096 bytes),
 * with its two stores. Memory is taken when it is touched.
 *
 * `name` appears in messages and in /proc/PID/fd; it is copied, as are
 * `options`, which may be NULL for the defaults. `region` receives a handle
 * for `privmem_region_free`.
 *
 * KVM makes the fd of a private store without close-on-exec, which the library adds
 * right after: a thread that forks and executes a program at that moment leaves
 * the fd to it.
 *
 * Errors: -EINVAL for a bad size or bad options; -E2BIG for options with fields that
 * are not zero and that only a newer library has; -EMFILE, -ENFILE, -ENOMEM,
 * -EFBIG as memfd_create, ftruncate or KVM_CREATE_GUEST_MEMFD return them.
 *
 * # Safety
 * `vm` is NULL or a live handle, `name` is NULL or a C string, `options` is
 * NULL or valid for reading, `region` is NULL or valid for writing.
 */
int privmem_region_new(const struct privmem_vm *vm,
                       const char *name,
                       uint64_t size,
                       const struct privmem_region_options *options,
                       struct privmem_region **region);

/**
 * Takes the memory of all that there is now, with `threads` at once, and from
 * now on that of whatever changes side before it does: a conversion for which
 * there is no memory fails, instead of the guest's access. Waits for
 * conversions that run.
 *
 * Errors: -EINVAL for 0 threads; what fallocate returned, such as -ENOMEM or
 * -ENOSPC. Some of the memory may have been taken then.
 *
 * # Safety
 * `region` is NULL or a live handle.
 */
int privmem_region_preallocate(const struct privmem_region *region, size_t threads);

/**
 * Says on which NUMA nodes memory of the private store is taken, and that it
 * is taken when memory becomes private, because at the guest's access it
 * would follow the policy of the vCPU's thread. Takes what is private already,
 * with `threads` at once. (The shared store follows the policy of its mapping,
 * mbind(2).) Once for each region; waits for conversions that run.
 *
 * `mode` is MPOL_BIND, MPOL_PREFERRED or another one of set_mempolicy(2);
 * `nodes` are `words` unsigned longs with one bit a node.
 *
 * Errors: -EINVAL for NULL, no threads, and what set_mempolicy refuses; -EBUSY
 * for a region that has a policy; what set_mempolicy or fallocate returned.
 *
 * # Safety
 * `region` is NULL or a live handle; `nodes` is NULL or valid for reading
 * `words` unsigned longs.
 */
int privmem_region_set_numa_policy(const struct privmem_region *region,
                                   int mode,
                                   const unsigned long *nodes,
                                   size_t words,
                                   size_t threads);

/**
 * Frees the memory of `size` bytes at `offset`, on whichever side they are;
 * they read zero from now on. For a balloon. Any thread; waits for conversions
 * of the range.
 *
 * Errors: -EINVAL for a range that is unaligned, empty or beyond the region;
 * what fallocate or a listener returned.
 *
 * # Safety
 * `region` is NULL or a live handle.
 */
int privmem_region_discard(const struct privmem_region *region, uint64_t offset, uint64_t size);

/**
 * Writes which memory is private, to be saved with a machine: one bit a
 * granule, from the lowest bit of the first byte. `buffer_size` is the number
 * of granules divided by 8, rounded up. vCPUs do not run meanwhile.
 *
 * Errors: -EINVAL for NULL or another size.
 *
 * # Safety
 * `region` is NULL or a live handle; `buffer` is NULL or valid for writing
 * `buffer_size` bytes.
 */
int privmem_region_save_state(const struct privmem_region *region,
                              uint8_t *buffer,
                              size_t buffer_size);

/**
 * Puts all memory on the side that `privmem_region_save_state` told, contents
 * included: those of the visible side, as they were loaded, go along. vCPUs do
 * not run meanwhile.
 *
 * Errors: -EINVAL for NULL or a state of another size; -EOPNOTSUPP with KVM:
 * only the emulated agent gives contents out; what the kernel or a listener
 * returned. Part of the memory may have moved then.
 *
 * # Safety
 * `region` is NULL or a live handle; `buffer` is NULL or valid for reading
 * `buffer_size` bytes.
 */
int privmem_region_load_state(const struct privmem_region *region,
                              const uint8_t *buffer,
                              size_t buffer_size);

/**
 * Takes all that is shared from the listeners of a region, ends its bindings,
 * closes its fds and frees it; NULL is ignored.
 *
 * Memory slots of the region must be gone, and no other thread may use it.
 *
 * # Safety
 * `region` is NULL or a handle of this library that nobody uses now or later.
 */
void privmem_region_free(struct privmem_region *region);

/**
 * The memfd of the shared store, to be mapped shared, whole, from offset 0.
 *
 * The fd stays the region's: duplicate it to keep it. -EINVAL for NULL.
 *
 * # Safety
 * `region` is NULL or a live handle.
 */
int privmem_region_shared_fd(const struct privmem_region *region);

/**
 * The fd of the private store, for KVM_SET_USER_MEMORY_REGION2: a
 * `guest_memfd`, or with the emulated agent a memfd.
 *
 * The fd stays the region's. The offset of a slot is the offset of its
 * binding. -EINVAL for NULL.
 *
 * # Safety
 * `region` is NULL or a live handle.
 */
int privmem_region_private_fd(const struct privmem_region *region);

/**
 * Registers a downstream mapper: it is told of all that is shared now, before
 * this function returns, and of what goes and comes from then on. The table is
 * copied. Waits for conversions that run.
 *
 * Errors: -EINVAL for NULL, a table that is too small, lacks a function, or has a
 * range or a granularity that cannot be; -E2BIG for one with fields that are not
 * zero and that only a newer library has; -EEXIST where one with this `opaque` is
 * registered; what the listener returned, which is not registered then.
 *
 * # Safety
 * `region` is NULL or a live handle; `listener` is NULL or a table whose
 * functions may be called with its `opaque`, from any thread, until
 * `privmem_region_remove_listener` returns.
 */
int privmem_region_add_listener(const struct privmem_region *region,
                                const struct privmem_listener *listener);

/**
 * Takes all that is shared from the listener with this `opaque`, and forgets
 * it, also where it fails to give that up, which is returned. Waits for
 * conversions that run. -ENOENT where there is none.
 *
 * # Safety
 * `region` is NULL or a live handle.
 */
int privmem_region_remove_listener(const struct privmem_region *region, void *opaque);

/**
 * Puts all of a region on the side where it began, and frees all private
 * pages, as at the reset of a machine. vCPUs do not run meanwhile. May sleep.
 * Listeners with a granularity map what is shared by as few entries as if they
 * were added now.
 *
 * Errors: -EPERM after a launch with initial contents, which nobody could give
 * again; nothing has changed then. Otherwise what the kernel or a listener
 * returned: all that could be done is done, the message says what is not, and the
 * machine must not run on. Private contents are gone unless the message says that
 * some may be left; the reset may be tried again.
 *
 * # Safety
 * `region` is NULL or a live handle.
 */
int privmem_region_reset(const struct privmem_region *region);

/**
 * Tells where the shared store is mapped, so that the emulated agent can map
 * the visible store in its place. To be called once, before any conversion.
 *
 * Errors: -EINVAL for NULL or an address that is not a multiple of the
 * granule; -EBUSY where it comes too late.
 *
 * # Safety
 * `region` is NULL or a live handle. `host` is a mapping of the region's size
 * that belongs to the caller, who lets the region replace it and keeps it
 * until the region is freed.
 */
int privmem_region_set_host_mapping(const struct privmem_region *region, void *host);

/**
 * Gives, in `*address`, where the shared store is mapped for KVM's memory slots:
 * `userspace_addr` of a slot is this plus the offset of its binding.
 *
 * KVM reads and writes guest memory by that address whatever the memory attributes
 * say, for example where a guest tells it to keep a clock in a private page. In the
 * caller's own mapping that takes a page of the shared store, and the guest has memory
 * held twice. In this one, which the library makes at the first call, such accesses
 * fail. Nobody but KVM may access it; SIGBUS may name an address in it. It lives until
 * the region is freed.
 *
 * With it, `privmem_vm_run_fault` must answer KVM_RUN.
 *
 * Errors: -EINVAL for NULL; -EOPNOTSUPP where the kernel cannot do that (before Linux
 * 6.15), for huge pages and with the emulated agent: slots take the address of the
 * caller's mapping then; what the kernel returned.
 *
 * # Safety
 * `region` is NULL or a live handle; `address` is NULL or valid for writing.
 */
int privmem_region_slot_mapping(const struct privmem_region *region, void **address);

/**
 * Whether the host may touch the byte at `offset` through its mapping, and,
 * in `*len`, for how many of the `*len` bytes from there that answer holds.
 *
 * What is private is out of the host's reach: touching the mapping there
 * finds zeroes and takes a second page. The emulated agent protects nothing
 * and always says yes. Any thread; takes no lock. False for NULL.
 *
 * # Safety
 * `region` is NULL or a live handle; `len` is NULL or valid for reading and
 * writing.
 */
bool privmem_region_host_access(const struct privmem_region *region,
                                uint64_t offset,
                                uint64_t *len);

/**
 * The failed request that came `index` before the last one of a VM, from 0.
 * Some of the last are kept: those of `privmem_vm_convert`, and of
 * `privmem_conversion_step` with all that was asked for. `failed_size` is
 * `sizeof(struct privmem_failed_conversion)` as the caller was compiled. Any thread.
 *
 * Errors: -ENOENT where there is none or it is not kept; -EINVAL for NULL or a
 * size that is too small.
 *
 * # Safety
 * `vm` is NULL or a live handle; `failed` is NULL or valid for writing
 * `failed_size` bytes.
 */
int privmem_vm_failed_conversion(const struct privmem_vm *vm,
                                 size_t index,
                                 struct privmem_failed_conversion *failed,
                                 size_t failed_size);

/**
 * State and memory of a region, from the kernel's own counts where it has
 * them. `info_size` is `sizeof(struct privmem_info)` as the caller was
 * compiled: later versions may append fields, and fill as many as there are.
 *
 * Any thread; takes no lock that a conversion takes, so that figures taken while
 * conversions run are of slightly different moments. The kernel counts the pages of
 * a `guest_memfd` one by one: a call counts for about 50 ms, a few GiB at least, and
 * takes over the rest from the calls before it, see `held_age`.
 *
 * # Safety
 * `region` is NULL or a live handle; `info` is NULL or valid for writing
 * `info_size` bytes.
 */
int privmem_region_info(const struct privmem_region *region,
                        struct privmem_info *info,
                        size_t info_size);

/**
 * One line that shows which parts of the region are private.
 *
 * It has up to `buffer_size - 1` cells, each for the same number of bytes: `.`
 * shared, `#` private, `+` some of both; then NUL.
 *
 * # Safety
 * `region` is NULL or a live handle; `buffer` is NULL or valid for writing
 * `buffer_size` bytes.
 */
int privmem_region_picture(const struct privmem_region *region, char *buffer, size_t buffer_size);

/**
 * The run of private or shared bytes that starts at `offset`, up to where the
 * state changes or the region ends. Any thread; takes no lock.
 *
 * Errors: -EINVAL for an offset that is unaligned or beyond the region; at
 * its end, so that `offset += run.size` walks over all of it.
 *
 * # Safety
 * `region` is NULL or a live handle; `run` is NULL or valid for writing.
 */
int privmem_region_next_run(const struct privmem_region *region,
                            uint64_t offset,
                            struct privmem_run *run);

/**
 * Binding number `index` (from 0) of a region, in order of guest-physical
 * address. -ENOENT after the last. Any thread.
 *
 * # Safety
 * `region` is NULL or a live handle; `binding` is NULL or valid for writing.
 */
int privmem_region_binding(const struct privmem_region *region,
                           size_t index,
                           struct privmem_binding *binding);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PRIVMEM_H */
