/*
 * Starts a Linux whose RAM is all private: a ROM that makes it so, fetches kernel,
 * initrd, command line and ACPI's tables from QEMU (fw_cfg), and enters the kernel
 * as PVH has it. QEMU is told, beside `-bios` with this ROM:
 *
 *   -fw_cfg name=opt/privmem/kernel,file=VMLINUX
 *   -fw_cfg name=opt/privmem/initrd,file=INITRD
 *   -fw_cfg name=opt/privmem/cmdline,string=...
 *
 * QEMU can write to shared memory only, so all of it comes through a window that is
 * shared as long as that takes. (String instructions, the other way, would have KVM
 * write to private memory, which it cannot.)
 */
#include "machine.h"

#define packed __attribute__((packed))

enum {
	FW_CFG_DMA = 0x514,
	DIRECTORY = 0x19,
	DMA_ERROR = 1,
	DMA_READ = 2,
	DMA_SKIP = 4,
	DMA_SELECT = 8,
	NAME = 56,

	RAM = 1,			/* types of memory, as the BIOS has them */
	RESERVED = 2,
	ACPI = 3,

	LOW_END = 0xa0000,		/* then devices and ROM */
	MEGABYTE = 0x100000,
	TABLES_SIZE = MEGABYTE,		/* the last one of the RAM below 4 GiB */
	WINDOW = 0x200000,		/* below all that is loaded */
	WINDOW_SIZE = 0x40000,
};

static void fail(const char *why, const char *what)
{
	put("loader: ");
	put(why);
	put(what);
	put("\n");
	leave(1);
}

/* ---- memory ---- */

static struct {
	struct packed {
		u64 address, size;
		u32 type;
	} map[32];			/* QEMU's */
	u32 count;
	u64 low_end;			/* of the RAM below 4 GiB */
} memory;

void *memcpy(void *to, const void *from, size_t n)
{
	void *p = to;

	asm volatile("rep movsb" : "+D"(p), "+S"(from), "+c"(n) : : "memory");
	return to;
}

static void must_convert(u64 address, u64 end, bool private)
{
	int64_t ret = convert(address, (end - address) / PAGE, private);

	if (!ret)
		return;
	put("loader: a hypercall to convert memory returned ");
	put_signed(ret);
	fail("", ": this must be a guest of sw-protected-guest");
}

/* ---- fw_cfg ---- */

static volatile struct {
	u32 control, length;
	u64 address;
} *const request = (void *)WINDOW;

static u8 *const data = (u8 *)(WINDOW + PAGE);

struct file {
	u32 size;
	u16 select, reserved;
	char name[NAME];
};

static struct {
	u32 count;
	struct file files[64];
} directory;

static void ask(u32 control, u32 length)
{
	request->address = __builtin_bswap64((u64)data);
	request->length = __builtin_bswap32(length);
	request->control = __builtin_bswap32(control);
	barrier();
	outl(FW_CFG_DMA, 0);
	outl(FW_CFG_DMA + 4, __builtin_bswap32(WINDOW));
	while (request->control & ~__builtin_bswap32(DMA_ERROR))
		barrier();
	if (request->control)
		fail("fw_cfg cannot be read", "");
}

/* Goes on where the last one ended. */
static void fetch(void *to, u64 size)
{
	while (size) {
		u64 part = size < WINDOW_SIZE - PAGE ? size : WINDOW_SIZE - PAGE;

		ask(DMA_READ, part);
		memcpy(to, data, part);
		to = (u8 *)to + part;
		size -= part;
	}
}

static void begin(void *to, u64 size, u16 select, u32 offset)
{
	ask((u32)select << 16 | DMA_SELECT | DMA_SKIP, offset);
	fetch(to, size);
}

static void read_directory(void)
{
	begin(&directory.count, sizeof(directory.count), DIRECTORY, 0);
	directory.count = __builtin_bswap32(directory.count);
	if (directory.count > sizeof(directory.files) / sizeof(directory.files[0]))
		fail("fw_cfg has too many files", "");
	fetch(directory.files, directory.count * sizeof(directory.files[0]));
	for (u32 i = 0; i < directory.count; i++) {
		struct file *file = &directory.files[i];

		file->size = __builtin_bswap32(file->size);
		file->select = __builtin_bswap16(file->select);
		file->name[NAME - 1] = 0;
	}
}

static const struct file *find(const char *name)
{
	for (u32 i = 0; i < directory.count; i++)
		if (same(directory.files[i].name, name))
			return &directory.files[i];
	fail("QEMU was not told -fw_cfg name=", name);
	__builtin_unreachable();
}

/* ---- all memory becomes private ---- */

static void find_memory(void)
{
	const struct file *file = find("etc/e820");

	if (file->size > sizeof(memory.map))
		fail("there are too many kinds of memory", "");
	begin(memory.map, file->size, file->select, 0);
	memory.count = file->size / sizeof(memory.map[0]);
	for (u32 i = 0; i < memory.count; i++)
		if (memory.map[i].type == RAM && !memory.map[i].address)
			memory.low_end = memory.map[i].size;
	if (memory.low_end < 64 * MEGABYTE || memory.low_end > 1ull << 32)
		fail("there should be 64 MiB of RAM", "");
}

/* All but the window. What lies below 640 KiB is private already, if that was granted. */
static void make_private(void)
{
	must_convert(0, LOW_END, true);
	must_convert(MEGABYTE, WINDOW, true);
	must_convert(WINDOW + WINDOW_SIZE, memory.low_end, true);
	for (u32 i = 0; i < memory.count; i++) {
		u64 address = memory.map[i].address;

		if (memory.map[i].type == RAM && address)
			must_convert(address, address + memory.map[i].size, true);
	}
}

/* ---- ACPI ---- */

/* QEMU's own little language: where its tables go, and what in them follows from that. */
struct packed command {
	u32 command;
	union packed {
		struct packed {
			char file[NAME];
			u32 align;
			u8 zone;
		} allocate;
		struct packed {
			char file[NAME], target[NAME];
			u32 offset;
			u8 size;
		} pointer;
		struct packed {
			char file[NAME];
			u32 offset, start, length;
		} checksum;
		u8 size[124];
	};
};

enum { ALLOCATE = 1, ADD_POINTER, ADD_CHECKSUM, WRITE_POINTER };

static struct {
	struct command commands[64];
	struct {
		const char *name;
		u64 address, size;
	} files[8];
	u32 count;
	u64 next;
} tables;

static void allocate(const char *name, u32 align)
{
	const struct file *file = find(name);
	u64 address = (tables.next + align - 1) & -(u64)align;

	if (tables.count == 8 || address + file->size > memory.low_end)
		fail("there is no room for ", name);
	tables.files[tables.count].name = name;
	tables.files[tables.count].address = address;
	tables.files[tables.count++].size = file->size;
	tables.next = address + file->size;
	begin((void *)address, file->size, file->select, 0);
}

/* Where something in a file lies that has been allocated. */
static u64 place(const char *name, u64 offset, u64 size)
{
	for (u32 i = 0; i < tables.count; i++)
		if (same(tables.files[i].name, name) && offset + size <= tables.files[i].size)
			return tables.files[i].address + offset;
	fail("ACPI's tables do not fit together: ", name);
	return 0;
}

static void add_pointer(const char *name, const char *target, u32 offset, u8 size)
{
	void *at = (void *)place(name, offset, size);
	u64 value = 0;

	memcpy(&value, at, size);
	value += place(target, 0, 0);
	memcpy(at, &value, size);
}

static void add_checksum(const char *name, u32 offset, u32 start, u32 length)
{
	const u8 *p = (const u8 *)place(name, start, length);
	u8 sum = 0;

	while (length--)
		sum += *p++;
	*(u8 *)place(name, offset, 1) -= sum;	/* which lies among what was summed */
}

static void obey(struct command *c)
{
	switch (c->command) {
	case ALLOCATE:
		allocate(c->allocate.file, c->allocate.align);
		break;
	case ADD_POINTER:
		add_pointer(c->pointer.file, c->pointer.target, c->pointer.offset, c->pointer.size);
		break;
	case ADD_CHECKSUM:
		add_checksum(c->checksum.file, c->checksum.offset, c->checksum.start, c->checksum.length);
		break;
	case WRITE_POINTER:
		fail("QEMU wants to know where it is: ", c->pointer.target);
	}
}

static void pci_write(u32 device, u8 reg, u32 value)
{
	outl(PCI_ADDRESS, 0x80000000 | device << 11 | reg);
	outl(PCI_DATA, value);
}

/* The tables say where ACPI's own registers are, which is for firmware to choose. */
static u64 load_tables(void)
{
	const struct file *file = find("etc/table-loader");

	pci_write(0x1f, 0x40, 0x601);		/* q35, PMBASE */
	pci_write(0x1f, 0x44, 0x80);		/* ACPI_CNTL: on */
	if (file->size > sizeof(tables.commands))
		fail("there are too many commands in ", file->name);
	begin(tables.commands, file->size, file->select, 0);
	tables.next = memory.low_end - TABLES_SIZE;
	for (u32 i = 0; i < file->size / sizeof(tables.commands[0]); i++)
		obey(&tables.commands[i]);
	return place("etc/acpi/rsdp", 0, 0);
}

/* ---- the kernel ---- */

enum { LOAD = 1, NOTE = 4, PHYS32_ENTRY = 18 };

struct elf {
	u8 ident[16];
	u16 type, machine;
	u32 version;
	u64 entry, segments, sections;
	u32 flags;
	u16 size, segment_size, segment_count;
};

struct segment {
	u32 type, flags;
	u64 offset, virtual, address, file_size, size, align;
};

struct note {
	u32 name_size, size, type;
};

/* The address of the note that says where PVH enters; 0 where it says nothing. */
static u32 pvh_entry(const u8 *notes, u64 size)
{
	const u8 *end = notes + size;

	while (notes + sizeof(struct note) <= end) {
		const struct note *note = (const struct note *)notes;
		const u8 *name = notes + sizeof(*note);
		const u8 *value = name + ((note->name_size + 3) & ~3u);

		if (note->type == PHYS32_ENTRY && same((const char *)name, "Xen"))
			return *(const u32 *)value;
		notes = value + ((note->size + 3) & ~3u);
	}
	return 0;
}

static struct {
	u64 address, size;
} initrd;

/* Below ACPI's tables. */
static void load_initrd(void)
{
	const struct file *file = find("opt/privmem/initrd");

	initrd.size = file->size;
	initrd.address = (memory.low_end - TABLES_SIZE - file->size) & -(u64)PAGE;
	if (file->size > memory.low_end / 2)
		fail("there is not enough RAM for the initrd", "");
	begin((void *)initrd.address, file->size, file->select, 0);
}

static struct {
	struct elf elf;
	struct segment segments[16];
	u8 notes[PAGE];
} kernel;

static void load_segment(const struct file *file, const struct segment *s)
{
	u8 *to = (u8 *)s->address;

	if (s->address < WINDOW + WINDOW_SIZE || s->address + s->size > initrd.address)
		fail("there is not enough RAM for the kernel", "");
	begin(to, s->file_size, file->select, s->offset);
	memset(to + s->file_size, 0, s->size - s->file_size);
}

static u32 read_notes(const struct file *file, const struct segment *s)
{
	if (s->file_size > sizeof(kernel.notes))
		fail("the kernel has too many notes", "");
	begin(kernel.notes, s->file_size, file->select, s->offset);
	return pvh_entry(kernel.notes, s->file_size);
}

/* Its parts come to where they run, and to nowhere else: memory once used stays in use. */
static u32 load_kernel(void)
{
	const struct file *file = find("opt/privmem/kernel");
	const struct elf *elf = &kernel.elf;
	u32 entry = 0;

	begin(&kernel.elf, sizeof(kernel.elf), file->select, 0);
	if (*(const u32 *)elf->ident != 0x464c457f || elf->ident[4] != 2 ||
	    elf->segment_size != sizeof(kernel.segments[0]) || elf->segment_count > 16)
		fail("the kernel should be a vmlinux, an ELF file of 64 bit", "");
	begin(kernel.segments, elf->segment_count * sizeof(kernel.segments[0]), file->select,
	      elf->segments);
	for (u32 i = 0; i < elf->segment_count; i++) {
		const struct segment *s = &kernel.segments[i];

		if (s->type == NOTE && !entry)
			entry = read_notes(file, s);
		if (s->type == LOAD)
			load_segment(file, s);
	}
	if (!entry)
		fail("the kernel has no PVH entry: it needs CONFIG_PVH", "");
	return entry;
}

/* ---- what PVH tells the kernel ---- */

static struct {
	u32 magic, version, flags, modules;
	u64 module_list, command_line, rsdp, map;
	u32 map_count, reserved;
} start_info;

static struct {
	u64 address, size, command_line, reserved;
} module;

static struct {
	u64 address, size;
	u32 type, reserved;
} map[40];

static char command_line[2048];

static void add_memory(u64 address, u64 end, u32 type)
{
	u32 i = start_info.map_count++;

	map[i].address = address;
	map[i].size = end - address;
	map[i].type = type;
}

static void describe(u64 rsdp)
{
	const struct file *file = find("opt/privmem/cmdline");

	if (file->size >= sizeof(command_line))
		fail("the command line is too long", "");
	begin(command_line, file->size, file->select, 0);

	add_memory(0, LOW_END, RAM);
	add_memory(0xf0000, MEGABYTE, RESERVED);
	add_memory(MEGABYTE, memory.low_end - TABLES_SIZE, RAM);
	add_memory(memory.low_end - TABLES_SIZE, memory.low_end, ACPI);
	for (u32 i = 0; i < memory.count; i++)
		if (memory.map[i].address)
			add_memory(memory.map[i].address, memory.map[i].address + memory.map[i].size,
				   memory.map[i].type);
	module.address = initrd.address;
	module.size = initrd.size;
	start_info.magic = 0x336ec578;
	start_info.version = 1;
	start_info.modules = 1;
	start_info.module_list = (u64)&module;
	start_info.command_line = (u64)command_line;
	start_info.rsdp = rsdp;
	start_info.map = (u64)map;
}

void enter_kernel(u64 entry, u64 start_info);

void ap_main(void)			/* Linux starts its CPUs elsewhere */
{
	leave(1);
}

void boot_main(void)
{
	u64 rsdp;
	u32 entry;

	build_idt();
	load_idt();
	detect();
	outb(COM1 + 2, 1);		/* FIFO on */
	must_convert(WINDOW, WINDOW + WINDOW_SIZE, false);
	read_directory();
	find_memory();
	make_private();
	rsdp = load_tables();
	load_initrd();
	entry = load_kernel();
	describe(rsdp);
	must_convert(WINDOW, WINDOW + WINDOW_SIZE, true);
	put("loader: all RAM is private, starting Linux\n");
	enter_kernel(entry, (u64)&start_info);
}
