/*
 * A hostile guest on the C interface: two threads send requests of all kinds
 * (tests/hostile/requests.h) while others plug and unplug memory, reset, and
 * look at everything that can be asked for. Every request must end as it has
 * to, and in the end nothing may be missing, held twice or left behind.
 *
 *   hostile [REQUESTS [SEED]]
 *
 * SPDX-License-Identifier: MIT
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "../hostile/requests.h"
#include "check.h"

#define KiB (1ull << 10)
#define MiB (1ull << 20)

static const struct hostile_field field = {
    .base = 16 * MiB,
    .size = 16 * MiB,
    .ram_end = 32 * MiB,
    .plug_base = 4096 * MiB,
    .plug_size = 8 * MiB,
};

static struct privmem_vm *vm;
static struct privmem_region *ram, *dimm;
static volatile unsigned char *host;
static atomic_bool stop;

struct vcpu {
    pthread_t thread;
    uint64_t requests, seed, granted, refused;
};

static void *run_vcpu(void *opaque)
{
    struct vcpu *vcpu = opaque;
    struct hostile_request request;
    uint64_t state = vcpu->seed;

    for (uint64_t n = 0; n < vcpu->requests; n++) {
        enum hostile_answer expected = hostile_next(&state, &field, &request);
        uint64_t size;
        int ret = -1;

        if (!__builtin_mul_overflow(request.pages, HOSTILE_PAGE, &size)) {
            ret = convert(vm, request.gpa, size, hostile_is_private(&request));
        }
        if (!hostile_is_as_expected(expected, ret)) {
            fprintf(stderr, "seed %" PRIu64 ", request %" PRIu64 ": 0x%" PRIx64
                    " + %" PRIu64 " pages, attributes 0x%" PRIx64 ": %d (%s)\n",
                    vcpu->seed, n, request.gpa, request.pages,
                    request.attributes, ret, privmem_last_error());
            exit(1);
        }
        /* Whichever side it is on by now: it must be there. */
        host[field.base + hostile_draw(&state, field.size)] = n;
        vcpu->granted += ret == 0;
        vcpu->refused += ret != 0;
    }
    return NULL;
}

/* Unplugs while requests for it are under way, and plugs again. */
static void *plug(void *opaque)
{
    (void)opaque;
    while (!stop) {
        CHECK(privmem_vm_bind(vm, dimm, 0, field.plug_base, field.plug_size) == 0);
        CHECK(privmem_vm_unbind(vm, field.plug_base, field.plug_size) == 0);
        CHECK(privmem_region_reset(dimm) == 0);
        sched_yield();
    }
    return NULL;
}

static struct privmem_info info(const struct privmem_region *region)
{
    struct privmem_info info;

    CHECK(privmem_region_info(region, &info, sizeof(info)) == 0);
    return info;
}

/* Private bytes by the runs, which cover all of the region. */
static uint64_t private_in_runs(const struct privmem_region *region, uint64_t size)
{
    struct privmem_run run;
    uint64_t bytes = 0;

    for (uint64_t at = 0; at < size; at += run.size) {
        CHECK(privmem_region_next_run(region, at, &run) == 0);
        CHECK(run.offset == at && run.size != 0 && run.size <= size - at);
        bytes += run.is_private ? run.size : 0;
    }
    return bytes;
}

static void *monitor(void *opaque)
{
    struct privmem_failed_conversion failed;
    char picture[128];

    (void)opaque;
    while (!stop) {
        info(ram);
        info(dimm);
        private_in_runs(ram, field.ram_end);
        CHECK(privmem_region_picture(ram, picture, sizeof(picture)) == 0);
        privmem_vm_failed_conversion(vm, 0, &failed, sizeof(failed));
        sched_yield();
    }
    return NULL;
}

static unsigned open_files(void)
{
    DIR *dir = opendir("/proc/self/fd");
    unsigned count = 0;

    CHECK(dir != NULL);
    while (readdir(dir)) {
        count++;
    }
    closedir(dir);
    return count;
}

int main(int argc, char **argv)
{
    uint64_t requests = argc > 1 ? strtoull(argv[1], NULL, 0) : 10000;
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    struct vcpu vcpus[2] = {
        { .requests = requests / 2, .seed = 2 * seed + 1 },
        { .requests = requests - requests / 2, .seed = 2 * seed + 2 },
    };
    unsigned files = open_files();
    pthread_t others[2];
    struct privmem_info end;
    void *mapping;

    CHECK(privmem_vm_new_emulated(&vm) == 0);
    CHECK(privmem_region_new(vm, "ram", field.ram_end, NULL, &ram) == 0);
    mapping = mmap(NULL, field.ram_end, PROT_READ | PROT_WRITE, MAP_SHARED,
                   privmem_region_shared_fd(ram), 0);
    CHECK(mapping != MAP_FAILED);
    CHECK(privmem_region_set_host_mapping(ram, mapping) == 0);
    host = mapping;
    CHECK(privmem_region_new(vm, "dimm", field.plug_size, NULL, &dimm) == 0);
    /* As a PC has it: with the VGA window and ROMs in between. */
    CHECK(privmem_vm_bind(vm, ram, 0, 0, 640 * KiB) == 0);
    CHECK(privmem_vm_bind(vm, ram, MiB, MiB, field.ram_end - MiB) == 0);

    CHECK(pthread_create(&others[0], NULL, plug, NULL) == 0);
    CHECK(pthread_create(&others[1], NULL, monitor, NULL) == 0);
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_create(&vcpus[i].thread, NULL, run_vcpu, &vcpus[i]) == 0);
    }
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_join(vcpus[i].thread, NULL) == 0);
    }
    stop = true;
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_join(others[i], NULL) == 0);
    }

    end = info(ram);
    CHECK(end.private_bytes == private_in_runs(ram, field.ram_end));
    CHECK(end.held_twice == 0 || end.held_twice == PRIVMEM_UNKNOWN);
    CHECK(info(dimm).private_bytes == 0);
    CHECK(privmem_region_reset(ram) == 0);
    end = info(ram);
    CHECK(end.private_bytes == 0);
    CHECK(end.private_held == 0 || end.private_held == PRIVMEM_UNKNOWN);
    CHECK(munmap(mapping, field.ram_end) == 0);
    privmem_region_free(ram);
    privmem_region_free(dimm);
    privmem_vm_free(vm);
    CHECK(open_files() == files);
    printf("%" PRIu64 " requests granted, %" PRIu64 " refused, none otherwise than it has to be\n",
           vcpus[0].granted + vcpus[1].granted, vcpus[0].refused + vcpus[1].refused);
    return 0;
}
