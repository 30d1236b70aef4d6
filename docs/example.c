/*
 * The smallest VMM: a region of the emulated agent whose middle becomes private.
 *
 *     cc -o example example.c $(pkg-config --cflags --libs privmem)
 *
 * SPDX-License-Identifier: MIT
 */

#include <privmem.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define SIZE (1024 * 1024ull)

static void check(int result)
{
    if (result < 0) {
        fprintf(stderr, "%s\n", privmem_last_error());
        exit(1);
    }
}

int main(void)
{
    struct privmem_vm *vm;
    struct privmem_region *region;
    struct privmem_conversion *conversion;
    uint64_t left;
    char picture[65];
    void *host;

    check(privmem_vm_new_emulated(&vm));
    check(privmem_region_new(vm, "ram", SIZE, NULL, &region));
    host = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
                privmem_region_shared_fd(region), 0);
    if (host == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    check(privmem_region_set_host_mapping(region, host));
    check(privmem_vm_bind(vm, region, 0, 0, SIZE));

    /* What the guest asks for may take several steps. */
    check(privmem_conversion_new(vm, SIZE / 4, SIZE / 4, true, &conversion));
    do {
        check(privmem_conversion_step(conversion, &left));
    } while (left != 0);
    privmem_conversion_free(conversion);
    check(privmem_region_picture(region, picture, sizeof(picture)));
    printf("[%s]\n", picture);

    check(privmem_vm_unbind(vm, 0, SIZE));
    privmem_region_free(region);
    privmem_vm_free(vm);
    return munmap(host, SIZE) == 0 ? 0 : 1;
}
