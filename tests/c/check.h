/*
 * What C clients of libprivmem that test it have in common.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef CHECK_H
#define CHECK_H

#include <privmem.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(what)                                                     \
    do {                                                                \
        if (!(what)) {                                                  \
            fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__,     \
                    #what, privmem_last_error());                       \
            exit(1);                                                    \
        }                                                               \
    } while (0)

/* All of a request, step by step: each must get on. */
static int convert(const struct privmem_vm *vm, uint64_t gpa, uint64_t size,
                   bool to_private)
{
    uint64_t step;
    int ret;

    do {
        step = 0;
        ret = privmem_vm_convert(vm, gpa, size, to_private, &step);
        CHECK(ret != 0 || (step != 0 && step <= size));
        gpa += step;
        size -= step;
    } while (ret == 0 && size != 0);
    return ret;
}

#endif
