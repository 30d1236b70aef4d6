/*
 * Exceptions and interrupts that the guest handles by itself, each followed by an access that
 * KVM has to serve. A CPU that tells KVM a wrong EXITINTINFO shows up here: KVM delivers an
 * event twice, never, or as another one, or gives up ("KVM internal error. Suberror: 3").
 */
#pragma once

enum {
	EVENT_SOFT = 0x30,		/* INT 0x30 */
	EVENT_IRQ = 0x31,
	EVENT_VECTORS = 0x32,
	EVENT_STUB_SIZE = 16,

	DIVIDE = 0, DEBUG = 1, NMI = 2, BREAKPOINT = 3, INVALID_OPCODE = 6, NO_FPU = 7, DOUBLE_FAULT = 8,
	NOT_PRESENT = 11, PROTECTION = 13, PAGE_FAULT = 14,

	TRAP_FLAG = 1 << 8,
	CR0_TS = 1 << 3,
	PF_WRITE = 2,
	GATE_PRESENT = 0x80,
	BAD_SELECTOR = 0x1238,		/* behind the GDT */
	ERROR_IDT = 2,			/* an error code names a gate */

	LAPIC_EOI = 0xfee000b0,
	LAPIC_SPURIOUS = 0xfee000f0,
	ICR_SELF = 1 << 18,
	ICR_NMI = 4 << 8,

	EVENT_MMIO = 0xfea00000,	/* unassigned: QEMU reads zero */
};

/* No page table maps it. */
#define UNMAPPED	(1ull << 39)

/* What the handler has seen since event_expect(). */
static struct {
	volatile u64 count;
	u64 vector, error, rip, rsp;
} event;

/* A fault goes on behind its instruction, with the stack that was there before. */
static bool event_is_fault;
static u64 event_resume, event_stack;

static struct gate event_idt[EVENT_VECTORS];
static u8 event_warm_stack[1024] __attribute__((aligned(4096)));

asm(".balign 16\n"
    "event_stubs:\n"
    ".set i, 0\n"
    ".rept 0x32\n"
    ".balign 16\n"
    ".if !(i == 8 || (i >= 10 && i <= 14) || i == 17 || i == 21)\n"
    "	pushq $0\n"
    ".endif\n"
    "	pushq $i\n"
    "	jmp event_common\n"
    ".set i, i + 1\n"
    ".endr\n"
    "event_common:\n"
    "	pushq %rax; pushq %rcx; pushq %rdx; pushq %rsi; pushq %rdi\n"
    "	pushq %r8; pushq %r9; pushq %r10; pushq %r11\n"
    "	movq 72(%rsp), %rdi\n"
    "	leaq 80(%rsp), %rsi\n"
    "	cld\n"
    "	call event_handler\n"
    "	popq %r11; popq %r10; popq %r9; popq %r8\n"
    "	popq %rdi; popq %rsi; popq %rdx; popq %rcx; popq %rax\n"
    "	addq $16, %rsp\n"
    "	iretq\n");

extern char event_stubs[];

void event_handler(u64 vector, struct trap_frame *frame)
{
	event.vector = vector;
	event.error = frame->error;
	event.rip = frame->rip;
	event.rsp = frame->rsp;
	event.count++;
	frame->rflags &= ~(u64)TRAP_FLAG;
	if (vector == NO_FPU)
		asm volatile("clts");
	if (vector == EVENT_IRQ)
		write_lapic(LAPIC_EOI, 0);
	if (event_is_fault)
		frame->rip = event_resume;
}

/*
 * Runs code that raises an event, on another stack. The label 0 is the instruction that faults,
 * if one does. The code may change rax, rcx and rdx.
 */
#define RAISE(stack, at, code, ...)							\
	asm volatile("lea 1f(%%rip), %%rax\n\t"				\
		     "mov %%rax, %[resume]\n\t"				\
		     "lea 0f(%%rip), %[address]\n\t"				\
		     "mov %%rsp, %[saved]\n\t"					\
		     "mov %[to], %%rsp\n\t"					\
		     code "\n"							\
		     "1:\tmov %[saved], %%rsp"					\
		     : [address] "=&r"(at), [resume] "=m"(event_resume), [saved] "+m"(event_stack) \
		     : [to] "r"(stack), ##__VA_ARGS__				\
		     : "rax", "rcx", "rdx", "memory", "cc")

enum raise { BY_DIVIDING, BY_STEPPING, BY_NMI, BY_INT3, BY_UD2, BY_FPU, BY_BAD_SELECTOR, BY_READING,
	BY_WRITING, BY_INT, BY_IPI, BY_ABSENT_GATE, BY_DOUBLE_FAULT };

static const struct event_kind {
	const char *name;
	enum raise by;
	bool is_fault;			/* its address is that of its instruction */
	u8 vector;
	u64 error;
} event_kinds[] = {
	{ "divide", BY_DIVIDING, true, DIVIDE, 0 },
	{ "step", BY_STEPPING, false, DEBUG, 0 },
	{ "nmi", BY_NMI, false, NMI, 0 },
	{ "int3", BY_INT3, false, BREAKPOINT, 0 },
	{ "ud2", BY_UD2, true, INVALID_OPCODE, 0 },
	{ "fpu", BY_FPU, true, NO_FPU, 0 },
	{ "bad-selector", BY_BAD_SELECTOR, true, PROTECTION, BAD_SELECTOR & ~3 },
	{ "read-fault", BY_READING, true, PAGE_FAULT, 0 },
	{ "write-fault", BY_WRITING, true, PAGE_FAULT, PF_WRITE },
	{ "int", BY_INT, false, EVENT_SOFT, 0 },
	{ "ipi", BY_IPI, false, EVENT_IRQ, 0 },
	/* What is delivered instead of an event that cannot be. */
	{ "absent-gate", BY_ABSENT_GATE, true, NOT_PRESENT, EVENT_SOFT * 8 + ERROR_IDT },
	{ "double-fault", BY_DOUBLE_FAULT, true, DOUBLE_FAULT, 0 },
};

static void gate_present(int vector, bool present)
{
	event_idt[vector].type = present ? 0x8e : 0x0e;
}

/* Gives the address of the instruction that faults. */
static u64 event_raise(const struct event_kind *kind, u64 stack)
{
	u64 at = 0;

	event.count = 0;
	event_is_fault = kind->is_fault;
	switch (kind->by) {
	case BY_DIVIDING:
		RAISE(stack, at, "xor %%ecx, %%ecx; xor %%edx, %%edx\n0:\tdiv %%ecx");
		break;
	case BY_STEPPING:
		RAISE(stack, at, "pushfq; orq $0x100, (%%rsp); popfq\n0:\tnop");
		break;
	case BY_NMI:
		RAISE(stack, at, "0:\tmovl %[icr], (%[lapic])",
		      [icr] "i"(ICR_SELF | ICR_NMI), [lapic] "r"((u64)LAPIC_ICR_LOW));
		break;
	case BY_INT3:
		RAISE(stack, at, "0:\tint3");
		break;
	case BY_UD2:
		RAISE(stack, at, "0:\tud2");
		break;
	case BY_FPU:
		RAISE(stack, at, "mov %%cr0, %%rax; or %[ts], %%rax; mov %%rax, %%cr0\n0:\tfninit",
		      [ts] "i"(CR0_TS));
		break;
	case BY_BAD_SELECTOR:
		RAISE(stack, at, "mov %[bad], %%eax\n0:\tmov %%eax, %%es", [bad] "i"(BAD_SELECTOR));
		break;
	case BY_DOUBLE_FAULT:
		gate_present(PAGE_FAULT, false);
		/* fallthrough */
	case BY_READING:
		RAISE(stack, at, "0:\tmov (%[bad]), %%eax", [bad] "r"(UNMAPPED));
		break;
	case BY_WRITING:
		RAISE(stack, at, "0:\tmov %%eax, (%[bad])", [bad] "r"(UNMAPPED));
		break;
	case BY_ABSENT_GATE:
		gate_present(EVENT_SOFT, false);
		/* fallthrough */
	case BY_INT:
		RAISE(stack, at, "0:\tint %[vector]", [vector] "i"(EVENT_SOFT));
		break;
	case BY_IPI:
		RAISE(stack, at, "0:\tmovl %[icr], (%[lapic])\n\tsti\n2:\tpause\n\tcmpq $0, %[count]\n\tje 2b\n\tcli",
		      [icr] "i"(ICR_SELF | EVENT_IRQ), [lapic] "r"((u64)LAPIC_ICR_LOW),
		      [count] "m"(event.count));
		break;
	}
	gate_present(PAGE_FAULT, true);
	gate_present(EVENT_SOFT, true);
	return at;
}

/* What the guest does next, at a place where nobody has been. */
enum follow_up { DOES_NOTHING, READS_MMIO, READS_PORT, CONVERTS, USES_PRIVATE, FOLLOW_UPS };

static const char *const follow_up_names[] = { "nothing", "mmio", "port", "conversion", "private" };

static bool follow_up(enum follow_up next, u64 mmio, u64 page)
{
	switch (next) {
	case READS_MMIO:
		return *(volatile u32 *)mmio == 0;
	case READS_PORT:
		return inb(COM1 + 5) & 0x20;
	case CONVERTS:
		return convert(page, 1, false) == 0;
	case USES_PRIVATE:
		return *(volatile u64 *)page == 0;
	default:
		return true;
	}
}

/*
 * Each kind of event, on a stack that is in use, and on a new private page, so that its delivery
 * is interrupted; each followed by something that KVM serves. Needs two private pages for each.
 */
static void events(u64 page)
{
	u64 mmio = EVENT_MMIO, done = 0;

	for (int i = 0; i < EVENT_VECTORS; i++) {
		u64 stub = (u64)event_stubs + EVENT_STUB_SIZE * i;

		event_idt[i] = (struct gate){ .low = stub, .selector = 0x18, .type = 0x8e, .middle = stub >> 16 };
	}
	load_idt_of(event_idt, sizeof(event_idt));
	write_lapic(LAPIC_SPURIOUS, 0x1ff);		/* on */
	for (size_t i = 0; i < sizeof(event_kinds) / sizeof(event_kinds[0]); i++) {
		const struct event_kind *kind = &event_kinds[i];

		for (int next = DOES_NOTHING; next < FOLLOW_UPS; next++) {
			for (int cold = 0; cold < 2; cold++) {
				u64 stack = cold ? page + PAGE : (u64)event_warm_stack + sizeof(event_warm_stack);
				u64 at = event_raise(kind, stack);
				bool served = follow_up(next, mmio, page + PAGE);

				if (event.count != 1 || event.vector != kind->vector ||
				    event.error != kind->error || (kind->is_fault && event.rip != at) ||
				    event.rsp != stack || !served) {
					put("bad event=");
					put(kind->name);
					put(" next=");
					put(follow_up_names[next]);
					put_field("new-stack", cold);
					put_field("served", served);
					put_field("count", event.count);
					put_field("vector", event.vector);
					put_hex_field("error", event.error);
					put_hex_field("rip", event.rip);
					put_hex_field("expected-rip", at);
					put_hex_field("rsp", event.rsp);
					put_hex_field("expected-rsp", stack);
					put("\n");
					load_idt();
					return;
				}
				mmio += PAGE;
				page += 2 * PAGE;
				done++;
			}
		}
	}
	load_idt();
	put("events");
	put_field("done", done);
	put("\n");
}
