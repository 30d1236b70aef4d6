/*
 * The machine as ROMs of ours see it: ports, the serial line, exceptions, hypercalls.
 * Each image is one C file that includes this.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

enum {
	PAGE = 4096,
	COM1 = 0x3f8,
	UART_FIFO = 16,
	DEBUG_EXIT = 0xf4,
	PCI_ADDRESS = 0xcf8,
	PCI_DATA = 0xcfc,
	TRAP_STATUS = 0x7f,
	ENOSYS = 38,
	HC_MAP_GPA_RANGE = 12,
	MAP_PRIVATE = 0x10,
};

/* ---- the machine ---- */

static inline void outb(u16 port, u8 value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void outl(u16 port, u32 value)
{
	asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline void outw(u16 port, u16 value)
{
	asm volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static inline u32 inl(u16 port)
{
	u32 value;

	asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline u16 inw(u16 port)
{
	u16 value;

	asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline u8 inb(u16 port)
{
	u8 value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline void cpuid(u32 leaf, u32 r[4])
{
	asm volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(0));
}

static inline void delay(u32 rounds)
{
	while (rounds--)
		asm volatile("" : : : "memory");
}

static inline void leave(u8 status)
{
	outb(DEBUG_EXIT, status);
	for (;;)
		asm volatile("cli; hlt");
}

static inline bool same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

/* gcc calls this even for freestanding code. */
void *memset(void *to, int byte, size_t n)
{
	void *p = to;

	asm volatile("rep stosb" : "+D"(p), "+c"(n) : "a"(byte) : "memory");
	return to;
}

static inline void barrier(void)
{
	asm volatile("" : : : "memory");
}

/* ---- the serial line ---- */

/* Each access to a port is an exit to QEMU: an empty FIFO takes several characters at once. */
static void put_char(char c)
{
	static u8 room;

	while (!room) {
		if (inb(COM1 + 5) & 0x20)
			room = UART_FIFO;
		else
			delay(1000);
	}
	outb(COM1, c);
	room--;
}

static inline void put(const char *s)
{
	while (*s)
		put_char(*s++);
}

static inline void put_unsigned(u64 n)
{
	char text[21];
	char *p = text + sizeof(text) - 1;

	*p = 0;
	do {
		*--p = '0' + n % 10;
		n /= 10;
	} while (n);
	put(p);
}

static inline void put_signed(int64_t n)
{
	if (n < 0)
		put_char('-');
	put_unsigned(n < 0 ? -(u64)n : (u64)n);
}

static inline void put_hex(u64 n)
{
	int shift = 60;

	put("0x");
	while (shift && !(n >> shift))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		put_char("0123456789abcdef"[(n >> shift) & 15]);
}

static inline void put_field(const char *name, u64 n)
{
	put_char(' ');
	put(name);
	put_char('=');
	put_unsigned(n);
}

static inline void put_hex_field(const char *name, u64 n)
{
	put_char(' ');
	put(name);
	put_char('=');
	put_hex(n);
}

/* ---- exceptions ---- */

struct gate {
	u16 low, selector;
	u8 ist, type;
	u16 middle;
	u32 high, zero;
};

struct trap_frame {
	u64 error, rip, cs, rflags, rsp, ss;
};

static struct gate idt[32];
extern char trap_stubs[];

static inline void load_idt_of(const struct gate *gates, u16 size)
{
	struct __attribute__((packed)) {
		u16 limit;
		u64 base;
	} pointer = { size - 1, (u64)gates };

	asm volatile("lidt %0" : : "m"(pointer));
}

static inline void load_idt(void)
{
	load_idt_of(idt, sizeof(idt));
}

static inline void build_idt(void)
{
	for (int i = 0; i < 32; i++) {
		u64 stub = (u64)trap_stubs + 16 * i;

		idt[i] = (struct gate){ .low = stub, .selector = 0x18, .type = 0x8e, .middle = stub >> 16 };
	}
}

void trap(u64 vector, struct trap_frame *frame)
{
	u64 cr2;

	asm volatile("mov %%cr2, %0" : "=r"(cr2));
	put("\ntrap");
	put_field("vector", vector);
	put_hex_field("rip", frame->rip);
	put_hex_field("error", frame->error);
	put_hex_field("cr2", cr2);
	put("\n");
	leave(TRAP_STATUS);
}

/* ---- hypercalls ---- */

static bool is_intel, under_kvm;

static inline void detect(void)
{
	u32 r[4];

	cpuid(0, r);
	is_intel = r[1] == 0x756e6547;		/* "Genu" */
	cpuid(0x40000000, r);
	under_kvm = r[1] == 0x4b4d564b;		/* "KVMK" */
}

static inline int64_t hypercall(u64 nr, u64 a, u64 b, u64 c)
{
	int64_t ret;

	if (!under_kvm)
		return -ENOSYS;			/* the instruction would be an invalid opcode */
	if (is_intel)
		asm volatile("vmcall" : "=a"(ret) : "a"(nr), "b"(a), "c"(b), "d"(c) : "memory");
	else
		asm volatile("vmmcall" : "=a"(ret) : "a"(nr), "b"(a), "c"(b), "d"(c) : "memory");
	return ret;
}

static inline int64_t convert(u64 addr, u64 pages, bool private)
{
	return hypercall(HC_MAP_GPA_RANGE, addr, pages, private ? MAP_PRIVATE : 0);
}
