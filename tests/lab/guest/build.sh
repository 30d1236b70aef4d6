#!/bin/sh
# Builds the lab's own guest: build.sh OUT [FLAGS] writes the ROM image OUT for `qemu -bios`. With
# -DSTART_PRIVATE it is for a machine whose RAM is private at first.
set -eu
here=$(dirname "$0")
out=${1:?usage: build.sh OUT [FLAGS]}
shift
"${CC:-gcc}" -std=gnu11 -O2 -Wall -Wextra -Werror -m64 -ffreestanding -fno-pic -no-pie -static \
    -nostdlib -mno-red-zone -mgeneral-regs-only -fno-stack-protector -fcf-protection=none \
    -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns \
    -Wl,--build-id=none,-z,max-page-size=4096,--no-warn-rwx-segments -T "$here/guest.ld" \
    "$@" -o "$out.elf" "$here/start.S" "$here/main.c"
"${OBJCOPY:-objcopy}" -O binary --only-section=.text --only-section=.reset "$out.elf" "$out"
rm "$out.elf"
