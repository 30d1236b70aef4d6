/*
 * The lab's own guest: it obeys one-line commands from COM1. A reply is one
 * line; lines before it that start with '#' are remarks. Numbers are decimal or 0x hex.
 *
 *   fill ADDR PAGES SEED                 write the pattern of SEED            -> ok
 *   check ADDR PAGES SEED|zero [AT]      compare every word; AT is where the
 *                                        pattern was written                  -> ok | bad ...
 *   convert ADDR PAGES private|shared    KVM_HC_MAP_GPA_RANGE                 -> ret N
 *   hypercall NR A B C                   any hypercall                        -> ret N
 *   churn BASE PAGES COUNT SEED          COUNT conversions, contents checked  -> churn ...
 *   unplug BASE PAGES COUNT SEED         churn, and whatever is to be unplugged
 *                                        goes meanwhile (pc)                  -> unplug ...
 *   smp                                  start the second vCPU                -> cpus 2
 *   disjoint BASE PAGES COUNT SEED       churn on two vCPUs, half each        -> disjoint ...
 *   halves BASE PAGES SEED               fill one half for each vCPU          -> ok
 *   mix COUNT                            COUNT conversions by each vCPU in its
 *                                        half, of all sizes, not all touched  -> mix ...
 *   settle                               check, and touch, all of both halves -> settle ...
 *   map                                  what is private in both halves: a hex
 *                                        digit has four pages, bit 0 the first -> map PAGES DIGITS
 *   overlap BASE PAGES COUNT SEED        two vCPUs convert the same pages     -> overlap ...
 *   chase BASE PAGES COUNT SEED          one converts what the other touches  -> chase ...
 *   hostile BASE PAGES OWN SEED END PLUG PLUGGED
 *                                        two vCPUs are to attack PAGES pages in
 *                                        RAM that ends at END, and PLUGGED ones
 *                                        at PLUG; OWN before BASE are filled,
 *                                        half for each vCPU                   -> ok
 *   attack COUNT                         COUNT requests of all kinds by each,
 *                                        some for its own pages; touches what
 *                                        is attacked, and ejects DIMM 0, now
 *                                        and then; cycles of the longest      -> attack ...
 *   calm                                 the attacked pages become private and
 *                                        shared again; all is checked         -> calm ...
 *   shadow                               run from a copy of the ROM in RAM    -> ok
 *   pam REGISTER VALUE                   q35: what 768 KiB to 1 MiB leads to  -> ok
 *   remap BASE PAGES COUNT SEED          churn on one, pam on the other vCPU  -> remap ...
 *   run-copy ADDR STEP                   copy ROM and data to 258 pages at
 *                                        ADDR, take a step here and there     -> ok | bad ...
 *   inflate ADDR PAGES                   gives pages to the virtio balloon    -> ok
 *   report ADDR PAGES                    reports them to it as free           -> ok
 *   pingpong ADDR STRIDE PLACES PAGES [touch]
 *                                        PAGES to private and back, at so many
 *                                        places; touch: and written on both
 *                                        sides; cycles, the median of places  -> pingpong ...
 *   assign                               find the edu device in slot 5        -> ok
 *   dma read|write ADDR                  it copies the page at ADDR to its
 *                                        buffer, or the buffer there          -> ok
 *   storm BASE COUNT SEED                COUNT conversions around pages that
 *                                        it reads and writes all the time     -> storm ...
 *   machine-checks                       turn them on, on the boot CPU        -> ok
 *   machine-check                        how many there were, and the last    -> machine-check ...
 *   events ADDR                          raise each kind of event, and use what
 *                                        KVM serves; private pages at ADDR     -> events ... | bad ...
 *   eject SLOT                           q35: the DIMM may be unplugged       -> ok
 *   suspend                              q35: to RAM (S3); the guest starts
 *                                        anew when it wakes up, and memory
 *                                        from 1 MiB on is as it was           -> no reply
 *   reboot                               q35: by the reset control register   -> no reply
 *   jump ADDR                            run what is there
 *   triple-fault                         which resets the machine
 *   exit STATUS                          leave through isa-debug-exit
 */
#include "machine.h"
#include "../../hostile/requests.h"

enum {
	WORDS = PAGE / 8,
	MAX_PAGES = 4096,
	LARGE = 512,			/* 2 MiB */
	MAX_REMARKS = 8,
	MAX_PLACES = 256,
	MAX_WORDS = 8,			/* of a command */
};

/* ---- the serial line; only the boot CPU uses it ---- */

static void get_line(char *line, size_t size)
{
	size_t n = 0;

	for (;;) {
		char c;

		while (!(inb(COM1 + 5) & 1))
			delay(20000);
		c = inb(COM1);
		if (c == '\n' || c == '\r')
			break;
		if (n < size - 1)
			line[n++] = c;
	}
	line[n] = 0;
}

/* ---- machine checks ---- */

enum {
	MSR_MCG_CAP = 0x179,
	MSR_MCG_STATUS = 0x17a,
	MSR_MC0_STATUS = 0x401,		/* then address and the next bank's, 4 MSRs each */
	CR4_MCE = 1 << 6,
	MACHINE_CHECK = 18,
};

#define STATUS_VALID		(1ull << 63)
#define STATUS_UNCORRECTED	(1ull << 61)
#define STATUS_HAS_ADDRESS	(1ull << 58)

static struct {
	u64 count, address, unclear;
} machine_checks;

extern char machine_check_stub[];

static inline u64 rdmsr(u32 msr)
{
	u32 low, high;

	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return (u64)high << 32 | low;
}

static inline void wrmsr(u32 msr, u64 value)
{
	asm volatile("wrmsr" : : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32)));
}

/* Remembers the address of an uncorrected error, and makes room for the next one. */
void machine_check(void)
{
	u32 banks = rdmsr(MSR_MCG_CAP) & 0xff;
	const u64 wanted = STATUS_VALID | STATUS_UNCORRECTED | STATUS_HAS_ADDRESS;
	bool found = false;

	for (u32 msr = MSR_MC0_STATUS; msr < MSR_MC0_STATUS + 4 * banks; msr += 4) {
		u64 status = rdmsr(msr);

		if ((status & wanted) == wanted) {
			machine_checks.address = rdmsr(msr + 1);
			found = true;
		}
		if (status & STATUS_VALID)
			wrmsr(msr, 0);
	}
	machine_checks.count++;
	machine_checks.unclear += !found;
	wrmsr(MSR_MCG_STATUS, 0);
}

static void turn_machine_checks_on(void)
{
	u64 cr4, stub = (u64)machine_check_stub;

	idt[MACHINE_CHECK] = (struct gate){ .low = stub, .selector = 0x18, .type = 0x8e, .middle = stub >> 16 };
	asm volatile("mov %%cr4, %0" : "=r"(cr4));
	asm volatile("mov %0, %%cr4" : : "r"(cr4 | CR4_MCE));
}

static void put_machine_check(void)
{
	put("machine-check");
	put_field("count", machine_checks.count);
	put_field("unclear", machine_checks.unclear);
	put_hex_field("address", machine_checks.address);
	put("\n");
}

/* ---- time ---- */

static inline u64 rdtsc(void)
{
	u32 low, high;

	asm volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (u64)high << 32 | low;
}

/* ---- contents ---- */

/* What the word at addr holds under seed; never 0. The driver computes the same. */
static u64 pattern(u64 addr, u64 seed)
{
	u64 x = (addr >> 3) ^ (seed * 0x9e3779b97f4a7c15);

	x ^= x >> 29;
	x *= 0xbf58476d1ce4e5b9;
	x ^= x >> 32;
	return x | 1;
}

static void fill(u64 addr, u64 pages, u64 seed)
{
	volatile u64 *p = (u64 *)addr;

	for (u64 i = 0; i < pages * WORDS; i++)
		p[i] = pattern((u64)&p[i], seed);
}

struct mismatch {
	u64 addr, expected, found;
};

/* Whether addr holds what was written at another address. Seed 0 stands for zeroes. */
static bool matches_moved(u64 addr, u64 at, u64 pages, u64 seed, struct mismatch *bad)
{
	volatile u64 *p = (u64 *)addr;

	for (u64 i = 0; i < pages * WORDS; i++) {
		u64 expected = seed ? pattern(at + i * sizeof(u64), seed) : 0;
		u64 found = p[i];

		if (found != expected) {
			*bad = (struct mismatch){ (u64)&p[i], expected, found };
			return false;
		}
	}
	return true;
}

static bool matches(u64 addr, u64 pages, u64 seed, struct mismatch *bad)
{
	return matches_moved(addr, addr, pages, seed, bad);
}

static void put_mismatch(const struct mismatch *bad)
{
	put("bad");
	put_hex_field("addr", bad->addr);
	put_hex_field("expected", bad->expected);
	put_hex_field("found", bad->found);
}

/* ---- churn: random conversions over a set of pages whose contents are known ---- */

struct churn {
	u64 base, pages, rng, last_seed;
	u64 conversions, failed, errors;
	struct { struct mismatch what; const char *when; } remarks[MAX_REMARKS];
	u32 seed[MAX_PAGES];
	bool private[MAX_PAGES];
};

static struct churn churns[2];

static u64 draw(u64 *rng, u64 below)
{
	*rng ^= *rng << 13;
	*rng ^= *rng >> 7;
	*rng ^= *rng << 17;
	return (*rng >> 11) % below;
}

static u64 page_at(const struct churn *c, u64 i)
{
	return c->base + i * PAGE;
}

static void expect(struct churn *c, u64 i, u64 seed, const char *when)
{
	struct mismatch bad;

	if (matches(page_at(c, i), 1, seed, &bad))
		return;
	if (c->errors < MAX_REMARKS) {
		c->remarks[c->errors].what = bad;
		c->remarks[c->errors].when = when;
	}
	c->errors++;
}

static void write_anew(struct churn *c, u64 i)
{
	c->seed[i] = ++c->last_seed;
	fill(page_at(c, i), 1, c->seed[i]);
}

static void churn_begin(struct churn *c, u64 base, u64 pages, u64 seed)
{
	*c = (struct churn){ .base = base, .pages = pages, .rng = seed * 2 + 1, .last_seed = seed << 20 };
	for (u64 i = 0; i < pages; i++)
		write_anew(c, i);
}

/* The page holds what it should; afterwards it has been touched and is not zero. */
static void visit(struct churn *c, u64 i, const char *when)
{
	expect(c, i, c->seed[i], when);
	if (!c->seed[i])
		write_anew(c, i);
}

/* The first and the last page of a request, and by chance one in so many of the others. */
static bool chosen(struct churn *c, u64 i, u64 first, u64 end, u64 one_in)
{
	return i == first || i == end - 1 || draw(&c->rng, one_in) == 0;
}

/*
 * One request over [first, end). Pages that change side read zero; those that
 * were there already keep what they hold, as do the neighbours; after a
 * refusal everything is as it was. Only chosen pages become touched.
 */
static void request(struct churn *c, u64 first, u64 end, u64 one_in)
{
	bool to_private = !c->private[first];
	bool done;

	for (u64 i = first; i < end; i++)
		if (chosen(c, i, first, end, one_in))
			visit(c, i, "before");
	done = convert(page_at(c, first), end - first, to_private) == 0;
	if (done)
		c->conversions++;
	else
		c->failed++;
	for (u64 i = first; i < end; i++) {
		bool changed = done && c->private[i] != to_private;

		if (changed) {
			c->private[i] = to_private;
			c->seed[i] = 0;
		}
		if (chosen(c, i, first, end, one_in)) {
			expect(c, i, c->seed[i], changed ? "changed-side" : "same-side");
			write_anew(c, i);
		}
	}
	if (first > 0 && c->seed[first - 1])
		expect(c, first - 1, c->seed[first - 1], "neighbour");
	if (end < c->pages && c->seed[end])
		expect(c, end, c->seed[end], "neighbour");
}

static u64 end_of(const struct churn *c, u64 first, u64 pages)
{
	return pages > c->pages - first ? c->pages : first + pages;
}

/* Most often a single page. All that it converts is touched. */
static void churn_step(struct churn *c)
{
	u64 first = draw(&c->rng, c->pages);
	u64 pages = draw(&c->rng, 8) ? 1 : 1 + draw(&c->rng, 64);

	request(c, first, end_of(c, first, pages), 1);
}

/*
 * Of all sizes, 2 MiB among them, aligned if the half is. Many pages come to
 * their side without being touched there.
 */
static void mix_step(struct churn *c)
{
	u64 kind = draw(&c->rng, 128);
	u64 first = draw(&c->rng, c->pages);

	if (kind == 0)
		request(c, first - first % LARGE, end_of(c, first - first % LARGE, LARGE), LARGE / 8);
	else if (kind < 8)
		request(c, first, end_of(c, first, 2 + draw(&c->rng, 99)), 16);
	else
		request(c, first, first + 1, 1);
}

static void churn_run(struct churn *c, u64 count)
{
	while (count--)
		churn_step(c);
	for (u64 i = 0; i < c->pages; i++)
		visit(c, i, "at-end");
}

static u64 churn_private_pages(const struct churn *c)
{
	u64 n = 0;

	for (u64 i = 0; i < c->pages; i++)
		n += c->private[i];
	return n;
}

/* Pages that were touched since they came to their side, and so hold memory there. */
static u64 churn_touched(const struct churn *c, bool private)
{
	u64 n = 0;

	for (u64 i = 0; i < c->pages; i++)
		n += c->private[i] == private && c->seed[i];
	return n;
}

static void churn_remarks(const struct churn *c)
{
	for (u64 i = 0; i < c->errors && i < MAX_REMARKS; i++) {
		put("# ");
		put_mismatch(&c->remarks[i].what);
		put(" when=");
		put(c->remarks[i].when);
		put("\n");
	}
}

static void churn_report(const char *name, const struct churn *a, const struct churn *b)
{
	churn_remarks(a);
	churn_remarks(b);
	put(name);
	put_field("conversions", a->conversions + b->conversions);
	put_field("failed", a->failed + b->failed);
	put_field("errors", a->errors + b->errors);
	put_field("private_pages", churn_private_pages(a) + churn_private_pages(b));
	put_field("private_touched", churn_touched(a, true) + churn_touched(b, true));
	put_field("shared_touched", churn_touched(a, false) + churn_touched(b, false));
	put("\n");
}

static void churn(u64 base, u64 pages, u64 count, u64 seed)
{
	churn_begin(&churns[0], base, pages, seed);
	churns[1] = (struct churn){ 0 };
	churn_run(&churns[0], count);
	churn_report("churn", &churns[0], &churns[1]);
}

/* ACPI's registers for hotplug on the bus of a pc: which slots are to go. */
enum { PCI_DOWN = 0xae04, PCI_EJECT = 0xae08 };

static void unplug(u64 base, u64 pages, u64 count, u64 seed)
{
	churn_begin(&churns[0], base, pages, seed);
	churns[1] = (struct churn){ 0 };
	while (count--) {
		u32 down = inl(PCI_DOWN);

		if (down)
			outl(PCI_EJECT, down);
		churn_step(&churns[0]);
	}
	churn_report("unplug", &churns[0], &churns[1]);
}

/* ---- the second vCPU ---- */

enum { LAPIC_ICR_LOW = 0xfee00300, LAPIC_ICR_HIGH = 0xfee00310 };

static void (*volatile ap_job)(u64 count);
static volatile u64 ap_argument;
static volatile bool ap_alive;

static void write_lapic(u64 reg, u32 value)
{
	*(volatile u32 *)reg = value;
}

/* The second vCPU does one job, and halts. */
void ap_main(void)
{
	load_idt();
	ap_alive = true;
	if (ap_job)
		ap_job(ap_argument);
	barrier();
	ap_job = NULL;
}

static void start_ap(void)
{
	write_lapic(LAPIC_ICR_HIGH, 1 << 24);
	write_lapic(LAPIC_ICR_LOW, 0x4500);		/* INIT */
	write_lapic(LAPIC_ICR_LOW, 0x4600 | 0xf0);	/* start at 0xf0000 */
}

static void smp(void)
{
	if (!ap_alive)
		start_ap();
	while (!ap_alive)		/* the driver's deadline ends this if it never comes */
		asm volatile("pause" : : : "memory");
	put("cpus 2\n");
}

/* x86 keeps stores in order, so holding the compiler to it is enough. */
static void on_both(void (*boot)(u64), void (*ap)(u64), u64 argument)
{
	ap_argument = argument;
	ap_job = ap;
	barrier();
	start_ap();
	boot(argument);
	while (ap_job)
		asm volatile("pause" : : : "memory");
}

static void churn_first(u64 count)
{
	churn_run(&churns[0], count);
}

static void churn_second(u64 count)
{
	churn_run(&churns[1], count);
}

static void churn_halves(u64 base, u64 pages, u64 seed)
{
	u64 half = pages / 2;

	churn_begin(&churns[0], base, half, seed);
	churn_begin(&churns[1], base + half * PAGE, pages - half, seed + 1);
}

static void disjoint(u64 base, u64 pages, u64 count, u64 seed)
{
	churn_halves(base, pages, seed);
	on_both(churn_first, churn_second, count);
	churn_report("disjoint", &churns[0], &churns[1]);
}

static void mix_first(u64 count)
{
	while (count--)
		mix_step(&churns[0]);
}

static void mix_second(u64 count)
{
	while (count--)
		mix_step(&churns[1]);
}

static void mix(u64 count)
{
	on_both(mix_first, mix_second, count);
	churn_report("mix", &churns[0], &churns[1]);
}

static void settle(void)
{
	on_both(churn_first, churn_second, 0);
	churn_report("settle", &churns[0], &churns[1]);
}

static bool half_private(u64 i)
{
	return i < churns[0].pages ? churns[0].private[i] : churns[1].private[i - churns[0].pages];
}

static void map(void)
{
	u64 pages = churns[0].pages + churns[1].pages;

	put("map ");
	put_unsigned(pages);
	put_char(' ');
	for (u64 i = 0; i < pages; i += 4) {
		u32 digit = 0;

		for (u64 j = 0; j < 4 && i + j < pages; j++)
			digit |= half_private(i + j) << j;
		put_char("0123456789abcdef"[digit]);
	}
	put("\n");
}

/*
 * Both vCPUs convert and write the same pages. What a page holds meanwhile is
 * nobody's business, but a word is zero or was written by one of the two, and
 * the page before and the page after never change.
 */
static struct overlap {
	u64 base, pages;
	u64 rng[2], conversions[2], failed[2];
} over;

static void overlap_side(int cpu, u64 count)
{
	while (count--) {
		u64 first = draw(&over.rng[cpu], over.pages);
		u64 room = over.pages - first;
		u64 pages = 1 + draw(&over.rng[cpu], room < 32 ? room : 32);
		u64 addr = over.base + first * PAGE;

		fill(addr, 1, 1 + cpu);
		if (convert(addr, pages, draw(&over.rng[cpu], 2)) == 0)
			over.conversions[cpu]++;
		else
			over.failed[cpu]++;
	}
}

static void overlap_first(u64 count)
{
	overlap_side(0, count);
}

static void overlap_second(u64 count)
{
	overlap_side(1, count);
}

static u64 foreign_words(u64 addr, u64 pages, u64 seed, u64 other_seed)
{
	volatile u64 *p = (u64 *)addr;
	u64 n = 0;

	for (u64 i = 0; i < pages * WORDS; i++) {
		u64 found = p[i];

		n += found && found != pattern((u64)&p[i], seed) && found != pattern((u64)&p[i], other_seed);
	}
	return n;
}

/* base is the first converted page; the pages on both sides of the range are guards. */
static void overlap(u64 base, u64 pages, u64 count, u64 seed)
{
	struct mismatch bad;
	u64 errors = 0;

	over = (struct overlap){ .base = base, .pages = pages, .rng = { seed * 2 + 1, seed * 4 + 3 } };
	fill(base - PAGE, 1, 3);
	fill(base + pages * PAGE, 1, 4);
	fill(base, pages, 1);
	on_both(overlap_first, overlap_second, count);

	errors += foreign_words(base, pages, 1, 2);
	errors += !matches(base - PAGE, 1, 3, &bad);
	errors += !matches(base + pages * PAGE, 1, 4, &bad);
	over.failed[0] += convert(base, pages, true) != 0;
	fill(base, pages, 5);
	errors += !matches(base, pages, 5, &bad);
	over.failed[0] += convert(base, pages, false) != 0;
	errors += !matches(base, pages, 0, &bad);

	put("overlap");
	put_field("conversions", over.conversions[0] + over.conversions[1]);
	put_field("failed", over.failed[0] + over.failed[1]);
	put_field("errors", errors);
	put("\n");
}

/*
 * The boot CPU turns the whole range private and shared, over and over, while
 * the other one touches it. In the end it is shared: no access, however it
 * falls, takes back a conversion that was granted.
 */
static volatile bool chase_over;

static void chase_convert(u64 count)
{
	while (count--) {
		for (int to_private = 1; to_private >= 0; to_private--) {
			if (convert(over.base, over.pages, to_private) == 0)
				over.conversions[0]++;
			else
				over.failed[0]++;
		}
	}
	chase_over = true;
}

static void chase_touch(u64 count)
{
	(void)count;
	while (!chase_over) {
		u64 addr = over.base + draw(&over.rng[1], over.pages) * PAGE;

		*(volatile u64 *)addr = pattern(addr, 6);
	}
}

static void chase(u64 base, u64 pages, u64 count, u64 seed)
{
	over = (struct overlap){ .base = base, .pages = pages, .rng = { 0, seed * 2 + 1 } };
	chase_over = false;
	on_both(chase_convert, chase_touch, count);
	put("chase");
	put_field("conversions", over.conversions[0]);
	put_field("failed", over.failed[0]);
	put_field("errors", foreign_words(base, pages, 6, 6));
	put("\n");
}

/* ---- DIMMs ---- */

/* ACPI's registers for memory hotplug, where q35 has them. */
enum {
	DIMM_SELECT = 0xa00,
	DIMM_CONTROL = 0xa14,
	DIMM_EJECT = 1 << 3,
};

/* Says that we do without the DIMM that the VMM wants back. */
static void eject(u32 slot)
{
	outl(DIMM_SELECT, slot);
	outb(DIMM_CONTROL, DIMM_EJECT);
}

/* ---- sleep and reset ---- */

/* The q35's power management, placed where SeaBIOS has it. */
enum {
	LPC_CONFIG = 0x8000f800,	/* bus 0, device 31 */
	LPC_PMBASE = 0x40,
	LPC_ACPI_CONTROL = 0x44,
	ACPI_ENABLE = 0x80,
	PM_BASE = 0x600,
	PM1_CONTROL = PM_BASE + 4,
	SLEEP_TYPE_S3 = 1 << 10,
	SLEEP_ENABLE = 1 << 13,
	RESET_CONTROL = 0xcf9,
	RESET_ALL = 6,
};

static void halt(void)
{
	for (;;)
		asm volatile("cli; hlt");
}

static void suspend(void)
{
	outl(PCI_ADDRESS, LPC_CONFIG | LPC_PMBASE);
	outl(PCI_DATA, PM_BASE | 1);
	outl(PCI_ADDRESS, LPC_CONFIG | LPC_ACPI_CONTROL);
	outb(PCI_DATA, ACPI_ENABLE);
	outw(PM1_CONTROL, SLEEP_TYPE_S3 | SLEEP_ENABLE);
	halt();
}

static void reboot(void)
{
	outb(RESET_CONTROL, RESET_ALL);
	halt();
}

/* ---- a hostile guest ---- */

/*
 * Both vCPUs send requests of all kinds for the same field and for a DIMM, and
 * write there. In between each converts pages of its own, whose sides and
 * contents nothing that is asked for others may change.
 */
static struct hostile_field field;

enum {				/* one in so many requests ... */
	FOR_OWN_PAGES = 256,
	WITH_A_TOUCH = 64,
	WITH_AN_EJECTION = 128,
};

static struct attacker {
	u64 random, granted, refused, wrong, longest;
	struct { struct hostile_request what; int64_t ret; } remarks[MAX_REMARKS];
} attackers[2];

static void hostile(const u64 a[])
{
	field = (struct hostile_field){
		.base = a[0],
		.size = a[1] * PAGE,
		.ram_end = a[4],
		.plug_base = a[5],
		.plug_size = a[6] * PAGE,
	};
	churn_halves(a[0] - a[2] * PAGE, a[2], a[3]);
	for (int cpu = 0; cpu < 2; cpu++)
		attackers[cpu] = (struct attacker){ .random = 2 * a[3] + 1 + cpu };
}

static void ask_for_anything(struct attacker *attacker)
{
	struct hostile_request request;
	enum hostile_answer expected = hostile_next(&attacker->random, &field, &request);
	u64 start = rdtsc();
	int64_t ret = hypercall(HC_MAP_GPA_RANGE, request.gpa, request.pages, request.attributes);
	u64 cycles = rdtsc() - start;

	if (cycles > attacker->longest)
		attacker->longest = cycles;
	attacker->granted += ret == 0;
	attacker->refused += ret != 0;
	if (hostile_is_as_expected(expected, ret))
		return;
	if (attacker->wrong < MAX_REMARKS) {
		attacker->remarks[attacker->wrong].what = request;
		attacker->remarks[attacker->wrong].ret = ret;
	}
	attacker->wrong++;
}

/* Mostly RAM, whichever side it is on; else the DIMM, which may be going just now. */
static void touch_anything(struct attacker *attacker)
{
	bool plugged = draw(&attacker->random, 4) == 0;
	u64 base = plugged ? field.plug_base : field.base;
	u64 size = plugged ? field.plug_size : field.size;
	volatile u64 *word = (u64 *)base + draw(&attacker->random, size / sizeof(u64));

	*word = attacker->granted;
}

static void attack_side(int cpu, u64 count)
{
	struct attacker *attacker = &attackers[cpu];

	while (count--) {
		if (draw(&attacker->random, FOR_OWN_PAGES) == 0)
			churn_step(&churns[cpu]);
		else
			ask_for_anything(attacker);
		if (draw(&attacker->random, WITH_A_TOUCH) == 0)
			touch_anything(attacker);
		if (cpu == 0 && draw(&attacker->random, WITH_AN_EJECTION) == 0)
			eject(0);
	}
}

static void attack_first(u64 count)
{
	attack_side(0, count);
}

static void attack_second(u64 count)
{
	attack_side(1, count);
}

static void attack_remarks(const struct attacker *attacker)
{
	for (u64 i = 0; i < attacker->wrong && i < MAX_REMARKS; i++) {
		put("# wrong answer");
		put_hex_field("gpa", attacker->remarks[i].what.gpa);
		put_hex_field("pages", attacker->remarks[i].what.pages);
		put_hex_field("attributes", attacker->remarks[i].what.attributes);
		put(" ret=");
		put_signed(attacker->remarks[i].ret);
		put("\n");
	}
}

static void attack(u64 count)
{
	u64 longest;

	on_both(attack_first, attack_second, count);
	attack_remarks(&attackers[0]);
	attack_remarks(&attackers[1]);
	churn_remarks(&churns[0]);
	churn_remarks(&churns[1]);
	longest = attackers[0].longest;
	if (attackers[1].longest > longest)
		longest = attackers[1].longest;
	put("attack");
	put_field("conversions", churns[0].conversions + churns[1].conversions);
	put_field("failed", churns[0].failed + churns[1].failed);
	put_field("errors", churns[0].errors + churns[1].errors);
	put_field("granted", attackers[0].granted + attackers[1].granted);
	put_field("refused", attackers[0].refused + attackers[1].refused);
	put_field("wrong", attackers[0].wrong + attackers[1].wrong);
	put_field("longest", longest);
	put("\n");
}

static void calm(void)
{
	struct mismatch bad;
	u64 pages = field.size / PAGE;

	for (int to_private = 1; to_private >= 0; to_private--) {
		churns[0].failed += convert(field.base, pages, to_private) != 0;
		churns[0].errors += to_private == 0 && !matches(field.base, pages, 0, &bad);
	}
	on_both(churn_first, churn_second, 0);
	churn_report("calm", &churns[0], &churns[1]);
}

/* ---- how long conversions take ---- */

static void touch(u64 addr, u64 pages)
{
	for (u64 i = 0; i < pages; i++)
		*(volatile u64 *)(addr + i * PAGE) = 1;
}

/* Sorts them; whatever takes its time now and then, such as a host's other work, does not count. */
static u64 median(u64 *values, u64 n)
{
	for (u64 i = 1; i < n; i++) {
		u64 value = values[i], j = i;

		for (; j && values[j - 1] > value; j--)
			values[j] = values[j - 1];
		values[j] = value;
	}
	return values[n / 2];
}

static u64 converting[2][MAX_PLACES], touching[2][MAX_PLACES];

static void pingpong(u64 base, u64 stride, u64 places, u64 pages, bool touched)
{
	u64 failed = 0;

	for (u64 i = 0; i < 2 * places; i++) {
		u64 place = i / 2, addr = base + place * stride;
		bool to_private = i % 2 == 0;
		u64 start = rdtsc(), end;

		failed += convert(addr, pages, to_private) != 0;
		end = rdtsc();
		converting[to_private][place] = end - start;
		if (touched)
			touch(addr, pages);
		touching[to_private][place] = touched ? rdtsc() - end : 0;
	}
	put("pingpong");
	put_field("conversions", 2 * places - failed);
	put_field("failed", failed);
	put_field("to_private", median(converting[true], places));
	put_field("to_shared", median(converting[false], places));
	put_field("touch_private", median(touching[true], places));
	put_field("touch_shared", median(touching[false], places));
	put("\n");
}

/* ---- memory slots that come and go ---- */

/*
 * The q35 host bridge's PAM registers: whether accesses to 768 KiB to 1 MiB end
 * in RAM (bit 0: reads, bit 1: writes) or in ROM and nothing. The first one
 * rules in its high nibble over our own code at 960 KiB, each other one over
 * two times 16 KiB from 768 KiB on.
 */
enum {
	PAM_FIRST = 0x90,
	PAM_LAST = 0x96,
	ROM_BASE = 0xf0000,
	ROM_SIZE = 0x10000,
};

static const u64 rom_at_top = 0xffff0000;
static bool shadowed;

static inline void pam(u8 reg, u8 value)
{
	outl(PCI_ADDRESS, 0x80000000 | (reg & ~3));
	outb(PCI_DATA + (reg & 3), value);
}

static void copy_rom(void)
{
	void *to = (void *)ROM_BASE;
	const void *from = (const void *)rom_at_top;
	u64 n = ROM_SIZE;

	pam(PAM_FIRST, 0x30);
	asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
}

/*
 * Puts RAM with the same contents where our code runs, so that PAM_FIRST can
 * change. The copy itself runs from the ROM's other place, below 4 GiB, and
 * before there is a second vCPU.
 */
static void shadow(void)
{
	void (*volatile copy)(void) = (void (*)(void))((u64)copy_rom - ROM_BASE + rom_at_top);

	copy();
	shadowed = true;
}

static void pam_all_ram(void)
{
	pam(PAM_FIRST, 0x30);
	for (u8 reg = PAM_FIRST + 1; reg <= PAM_LAST; reg++)
		pam(reg, 0x33);
}

/*
 * The boot CPU converts, and checks all contents, while the other one changes
 * what is RAM below 1 MiB: the VMM deletes and creates memory slots, those of
 * main RAM and of low RAM among them, because there is one slot for both as
 * long as all PAM registers say RAM. Each does at least COUNT steps, and ends
 * only when both have.
 */
static struct {
	u64 rng;
	volatile u64 count;
	volatile bool converted;
} remaps;

static void remap_convert(u64 count)
{
	while (churns[0].conversions + churns[0].failed < count || remaps.count < count)
		churn_step(&churns[0]);
	churn_run(&churns[0], 0);
	remaps.converted = true;
}

static void remap_slots(u64 count)
{
	while (!remaps.converted || remaps.count < count) {
		u8 reg = PAM_LAST - draw(&remaps.rng, PAM_LAST - PAM_FIRST + 1);
		u8 value = 0x11 * draw(&remaps.rng, 4);

		if (draw(&remaps.rng, 4) == 0)
			pam_all_ram();
		else
			pam(reg, reg == PAM_FIRST ? value & 0x10 ? 0x30 : 0 : value);
		remaps.count++;
	}
	pam_all_ram();
}

static void remap(u64 base, u64 pages, u64 count, u64 seed)
{
	churn_begin(&churns[0], base, pages, seed);
	churns[1] = (struct churn){ 0 };
	remaps.rng = seed * 2 + 1;
	remaps.count = 0;
	remaps.converted = false;
	on_both(remap_convert, remap_slots, count);
	churn_report("remap", &churns[0], &churns[1]);
}

/* ---- what KVM intercepts, from a copy of our code ---- */

enum {
	LOW_MEMORY = 0x100000,		/* our data and the ROM lie below */
	SCRATCH = COM1 + 7,
	MTRR_PHYSBASE0 = 0x200,
	CR4_DE = 1 << 3,
	LAPIC_VERSION = 0xfee00030,
	LAPIC_LOGICAL = 0xfee000d0,
	HPET_ID = 0xfed00000,
	HPET_COUNTER = 0xfed000f0,	/* stands still until it is enabled */
};

extern char __bss_start[], __bss_end[];

/* Two pages after the copy: code across their border, or data. */
static u64 spare_pages;

static u32 read_32(u64 addr)
{
	return *(volatile u32 *)addr;
}

static void write_32(u64 addr, u32 value)
{
	*(volatile u32 *)addr = value;
}

static u64 step_cpuid(u64 salt)
{
	u32 vendor[4], hypervisor[4];

	(void)salt;
	cpuid(0, vendor);
	cpuid(0x40000000, hypervisor);
	return ((u64)vendor[1] << 32 | vendor[2]) ^ ((u64)hypervisor[1] << 8 | hypervisor[3]);
}

static u64 step_rdmsr(u64 salt)
{
	(void)salt;
	return rdmsr(0x1b);		/* IA32_APIC_BASE */
}

static u64 step_wrmsr(u64 salt)
{
	wrmsr(MTRR_PHYSBASE0, salt << 12 | 6);
	return rdmsr(MTRR_PHYSBASE0) ^ salt << 12;
}

static u64 step_pio(u64 salt)
{
	outb(SCRATCH, salt);
	outl(PCI_ADDRESS, 0x80000000);
	return (u64)inl(PCI_DATA) << 8 | (inb(SCRATCH) ^ salt);
}

/* What was written before is gone, and what is written then is there. */
static u64 step_hypercall(u64 salt)
{
	volatile u64 *page = (u64 *)(spare_pages + PAGE);
	u64 failed, kept;

	failed = convert((u64)page, 1, false) != 0;
	*page = salt;
	failed += convert((u64)page, 1, true) != 0;
	kept = *page;
	*page = salt;
	return failed << 32 | kept << 16 | (*page ^ salt);
}

static u64 step_lapic(u64 salt)
{
	write_32(LAPIC_LOGICAL, salt << 24);
	return (u64)read_32(LAPIC_VERSION) << 32 | (read_32(LAPIC_LOGICAL) ^ salt << 24);
}

static u64 step_hpet(u64 salt)
{
	write_32(HPET_COUNTER, salt);
	asm volatile("orl $0x100, (%0)" : : "r"((u64)HPET_COUNTER) : "memory");
	return (u64)read_32(HPET_ID) << 32 | (read_32(HPET_COUNTER) ^ salt);
}

static u64 step_across_pages(u64 salt)
{
	u8 *code = (u8 *)(spare_pages + PAGE - 1);
	u32 (*volatile read)(u64 addr) = (u32 (*)(u64))code;

	code[0] = 0x8b;			/* mov (%rdi), %eax */
	code[1] = 0x07;
	code[2] = 0xc3;			/* ret */
	write_32(HPET_COUNTER, salt);
	return read(HPET_COUNTER) ^ salt;
}

static u64 step_cr4(u64 salt)
{
	u64 before, changed;

	(void)salt;
	asm volatile("mov %%cr4, %0\n\t"
		     "mov %0, %%r9\n\t"
		     "xor %2, %%r9\n\t"
		     "mov %%r9, %%cr4\n\t"
		     "mov %%cr4, %1\n\t"
		     "mov %0, %%cr4"
		     : "=&r"(before), "=&r"(changed) : "i"(CR4_DE) : "r9", "memory");
	return before ^ changed;
}

static u64 step_dr(u64 salt)
{
	u64 found;

	asm volatile("mov %1, %%r10\n\t"
		     "mov %%r10, %%dr3\n\t"
		     "mov %%dr3, %0" : "=r"(found) : "r"(salt) : "r10");
	return found ^ salt;
}

static const struct {
	const char *name;
	u64 (*run)(u64 salt);
} steps[] = {
	{ "cpuid", step_cpuid }, { "rdmsr", step_rdmsr }, { "wrmsr", step_wrmsr }, { "pio", step_pio },
	{ "hypercall", step_hypercall }, { "lapic", step_lapic }, { "hpet", step_hpet },
	{ "across-pages", step_across_pages }, { "cr4", step_cr4 }, { "dr", step_dr },
};

static void copy(u64 to, u64 from, u64 n)
{
	asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
}

/*
 * Code has the same effect wherever it lies. It finds its data at a distance
 * from itself, so that comes along. Each run has another salt, so that what one
 * leaves behind does not pass for the other's.
 */
static bool run_copy(u64 addr, const char *name)
{
	for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
		u64 (*volatile there)(u64) = (u64 (*)(u64))((u64)steps[i].run + addr);
		u64 found, expected;

		if (!same(steps[i].name, name))
			continue;
		spare_pages = addr + LOW_MEMORY;
		copy(addr + (u64)__bss_start, (u64)__bss_start, __bss_end - __bss_start);
		copy(addr + ROM_BASE, ROM_BASE, ROM_SIZE);
		expected = steps[i].run(0x5a);
		found = there(0x25);
		put(found == expected ? "ok" : "bad");
		if (found != expected) {
			put_hex_field("expected", expected);
			put_hex_field("found", found);
		}
		put("\n");
		return true;
	}
	return false;
}

#include "events.h"

/* ---- a legacy virtio balloon in slot 4, the simplest of its kind ---- */

enum {
	BALLOON_CONFIG = 0x80002000,	/* bus 0, device 4 */
	BALLOON_PORT = 0xc000,
	BALLOON_MAX = 64,
	QUEUE_INFLATE = 0,
	QUEUE_REPORT = 3,
	QUEUE_MAX = 1024,
	FEATURE_REPORTING = 1 << 5,
	DESCRIPTOR_WRITE = 2,
};

static struct {
	struct {
		u64 address;
		u32 length;
		u16 flags, next;
	} descriptors[QUEUE_MAX];
	u8 rest[4 * PAGE];
} __attribute__((aligned(4096))) queue;

static u32 balloon_pages[BALLOON_MAX];

static void balloon_start(u16 number)
{
	outl(PCI_ADDRESS, BALLOON_CONFIG | 0x10);
	outl(PCI_DATA, BALLOON_PORT);
	outl(PCI_ADDRESS, BALLOON_CONFIG | 4);
	outw(PCI_DATA, 5);			/* I/O space, bus master */
	outb(BALLOON_PORT + 0x12, 0);
	outb(BALLOON_PORT + 0x12, 3);
	outl(BALLOON_PORT + 4, FEATURE_REPORTING);
	outw(BALLOON_PORT + 0xe, number);
	memset(&queue, 0, sizeof(queue));
	outl(BALLOON_PORT + 8, (u64)&queue / PAGE);
	outb(BALLOON_PORT + 0x12, 7);
}

/* Hands over one buffer, and waits until it is used. */
static void balloon_send(u16 number, u64 address, u32 length, u16 flags)
{
	u16 size;
	volatile u16 *avail, *used;

	balloon_start(number);
	size = inw(BALLOON_PORT + 0xc);
	if (size > QUEUE_MAX) {
		put("bad queue\n");
		return;
	}
	avail = (u16 *)&queue.descriptors[size];
	used = (u16 *)(((u64)(avail + 3 + size) + PAGE - 1) & ~(u64)(PAGE - 1));
	queue.descriptors[0].address = address;
	queue.descriptors[0].length = length;
	queue.descriptors[0].flags = flags;
	barrier();
	avail[1] = 1;
	barrier();
	outw(BALLOON_PORT + 0x10, number);
	while (!used[1])		/* the driver's deadline ends this if it never comes */
		asm volatile("pause" : : : "memory");
	put("ok\n");
}

static void inflate(u64 addr, u64 pages)
{
	for (u64 i = 0; i < pages && i < BALLOON_MAX; i++)
		balloon_pages[i] = addr / PAGE + i;
	balloon_send(QUEUE_INFLATE, (u64)balloon_pages, pages * 4, 0);
}

/* ---- an assigned device in slot 5: QEMU's edu, for its DMA engine ---- */

enum {
	EDU_CONFIG = 0x80002800,	/* bus 0, device 5 */
	EDU_ID = 0x11e81234,
	EDU_DMA_SOURCE = 0x80,
	EDU_DMA_DESTINATION = 0x88,
	EDU_DMA_COUNT = 0x90,
	EDU_DMA_COMMAND = 0x98,
	EDU_DMA_RUN = 1,
	EDU_DMA_TO_MEMORY = 2,
	EDU_BUFFER = 0x40000,
	EDU_CHECK = 0x04,		/* gives back what was written, inverted */
	STORM_PAGES = 64,
	STORM_TRANSFERS = 32,		/* at least */
};

static const u64 edu_bar = 0xe0000000;

static volatile u64 *edu(u64 at)
{
	return (u64 *)(edu_bar + at);
}

static bool assign(void)
{
	outl(PCI_ADDRESS, EDU_CONFIG);
	if (inl(PCI_DATA) != EDU_ID)
		return false;
	outl(PCI_ADDRESS, EDU_CONFIG | 0x10);
	outl(PCI_DATA, edu_bar);
	outl(PCI_ADDRESS, EDU_CONFIG | 4);
	outw(PCI_DATA, 6);			/* memory space, bus master */
	write_32(edu_bar + EDU_CHECK, 0x12345678);
	return read_32(edu_bar + EDU_CHECK) == ~0x12345678u;
}

static bool dma_runs(void)
{
	return *edu(EDU_DMA_COMMAND) & EDU_DMA_RUN;
}

static void dma_wait(void)
{
	while (dma_runs())
		asm volatile("pause" : : : "memory");
}

static void dma_start(u64 addr, bool to_memory)
{
	*edu(EDU_DMA_SOURCE) = to_memory ? EDU_BUFFER : addr;
	*edu(EDU_DMA_DESTINATION) = to_memory ? addr : EDU_BUFFER;
	*edu(EDU_DMA_COUNT) = PAGE;
	*edu(EDU_DMA_COMMAND) = EDU_DMA_RUN | (to_memory ? EDU_DMA_TO_MEMORY : 0);
}

static void dma(u64 addr, bool to_memory)
{
	dma_start(addr, to_memory);
	dma_wait();
}

/*
 * Every other of STORM_PAGES is converted and checked all the time. Each of the
 * rest is a neighbour on both sides: now one, then another is read by the device,
 * cleared, and written by it, and must then hold what it held.
 */
static struct {
	u64 base, page, transfers, lost;
	bool to_memory;
} device;

static void device_begin(u64 base)
{
	device.base = base;
	device.transfers = device.lost = 0;
	device.to_memory = false;
	for (u64 i = 1; i < STORM_PAGES; i += 2)
		fill(base + i * PAGE, 1, i);
	device.page = 1;
	dma_start(base + PAGE, false);
}

/* Once the transfer in flight is over, judges it and starts the next. */
static void device_step(void)
{
	u64 addr = device.base + device.page * PAGE;
	struct mismatch bad;

	if (dma_runs())
		return;
	device.transfers++;
	if (device.to_memory) {
		device.lost += !matches(addr, 1, device.page, &bad);
		device.page = (device.page + 2) % STORM_PAGES;
		addr = device.base + device.page * PAGE;
	} else {
		memset((void *)addr, 0, PAGE);
	}
	device.to_memory = !device.to_memory;
	dma_start(addr, device.to_memory);
}

static void storm(u64 base, u64 count, u64 seed)
{
	struct churn *c = &churns[0];

	churn_begin(c, base, STORM_PAGES, seed);
	for (u64 i = 1; i < STORM_PAGES; i += 2)
		c->seed[i] = 0;			/* not looked at as a neighbour: the device's */
	device_begin(base);
	while (c->conversions + c->failed < count || device.transfers < STORM_TRANSFERS) {
		u64 page = 2 * draw(&c->rng, STORM_PAGES / 2);

		request(c, page, page + 1, 1);
		device_step();
	}
	dma_wait();
	for (u64 i = 0; i < STORM_PAGES; i += 2)
		visit(c, i, "at-end");
	churn_remarks(c);
	put("storm");
	put_field("conversions", c->conversions);
	put_field("failed", c->failed);
	put_field("errors", c->errors);
	put_field("transfers", device.transfers);
	put_field("lost", device.lost);
	put_field("private_pages", churn_private_pages(c));
	put("\n");
}

/* ---- commands ---- */

static u64 number(const char *s)
{
	u64 base = 10, n = 0;

	if (s[0] == '0' && s[1] == 'x') {
		base = 16;
		s += 2;
	}
	for (; *s; s++)
		n = n * base + (*s <= '9' ? *s - '0' : *s - 'a' + 10);
	return n;
}

static int split(char *line, char *word[], int max)
{
	int n = 0;

	while (n < max) {
		while (*line == ' ')
			line++;
		if (!*line)
			break;
		word[n++] = line;
		while (*line && *line != ' ')
			line++;
		if (*line)
			*line++ = 0;
	}
	return n;
}

static void check(u64 addr, u64 pages, const char *what, u64 at)
{
	struct mismatch bad;

	if (matches_moved(addr, at, pages, same(what, "zero") ? 0 : number(what), &bad))
		put("ok");
	else
		put_mismatch(&bad);
	put("\n");
}

static void put_ret(int64_t ret)
{
	put("ret ");
	put_signed(ret);
	put("\n");
}

/* An exception for which there is no handler, nor one for the double fault. */
static void triple_fault(void)
{
	struct __attribute__((packed)) {
		u16 limit;
		u64 base;
	} none = { 0, 0 };

	asm volatile("lidt %0; ud2" : : "m"(none));
}

static bool obey(char *word[], int n)
{
	u64 a[MAX_WORDS - 1] = { 0 };

	for (int i = 1; i < n; i++)
		a[i - 1] = number(word[i]);
	if (n == 3 && same(word[0], "inflate") && a[1] <= BALLOON_MAX) {
		inflate(a[0], a[1]);
	} else if (n == 3 && same(word[0], "report")) {
		balloon_send(QUEUE_REPORT, a[0], a[1] * PAGE, DESCRIPTOR_WRITE);
	} else if (n == 4 && same(word[0], "fill")) {
		fill(a[0], a[1], a[2]);
		put("ok\n");
	} else if ((n == 4 || n == 5) && same(word[0], "check")) {
		check(a[0], a[1], word[3], n == 5 ? a[3] : a[0]);
	} else if (n == 4 && same(word[0], "convert")) {
		put_ret(convert(a[0], a[1], same(word[3], "private")));
	} else if (n == 5 && same(word[0], "hypercall")) {
		put_ret(hypercall(a[0], a[1], a[2], a[3]));
	} else if (n == 5 && same(word[0], "churn") && a[1] && a[1] <= MAX_PAGES) {
		churn(a[0], a[1], a[2], a[3]);
	} else if (n == 5 && same(word[0], "unplug") && a[1] && a[1] <= MAX_PAGES) {
		unplug(a[0], a[1], a[2], a[3]);
	} else if (n == 1 && same(word[0], "smp")) {
		smp();
	} else if (n == 5 && same(word[0], "disjoint") && ap_alive && a[1] > 1 && a[1] <= MAX_PAGES) {
		disjoint(a[0], a[1], a[2], a[3]);
	} else if (n == 4 && same(word[0], "halves") && ap_alive && a[1] > 1 && a[1] <= 2 * MAX_PAGES) {
		churn_halves(a[0], a[1], a[2]);
		put("ok\n");
	} else if (n == 2 && same(word[0], "mix") && churns[1].pages) {
		mix(a[0]);
	} else if (n == 1 && same(word[0], "settle") && churns[1].pages) {
		settle();
	} else if (n == 1 && same(word[0], "map") && churns[1].pages) {
		map();
	} else if (n == 5 && same(word[0], "overlap") && ap_alive && a[1]) {
		overlap(a[0], a[1], a[2], a[3]);
	} else if (n == 5 && same(word[0], "chase") && ap_alive && a[1]) {
		chase(a[0], a[1], a[2], a[3]);
	} else if (n == 8 && same(word[0], "hostile") && ap_alive && a[1] &&
		   a[2] > 1 && a[2] <= 2 * MAX_PAGES) {
		hostile(a);
		put("ok\n");
	} else if (n == 2 && same(word[0], "attack") && field.size) {
		attack(a[0]);
	} else if (n == 1 && same(word[0], "calm") && field.size) {
		calm();
	} else if (n == 1 && same(word[0], "shadow") && !ap_alive) {
		shadow();
		put("ok\n");
	} else if (n == 3 && same(word[0], "pam") && (a[0] != PAM_FIRST || shadowed)) {
		pam(a[0], a[1]);
		put("ok\n");
	} else if (n == 5 && same(word[0], "remap") && ap_alive && shadowed && a[1] && a[1] <= MAX_PAGES) {
		remap(a[0], a[1], a[2], a[3]);
	} else if ((n == 5 || (n == 6 && same(word[5], "touch"))) && same(word[0], "pingpong") &&
		   a[2] && a[2] <= MAX_PLACES) {
		pingpong(a[0], a[1], a[2], a[3], n == 6);
	} else if (n == 1 && same(word[0], "assign")) {
		put(assign() ? "ok\n" : "no edu\n");
	} else if (n == 3 && same(word[0], "dma")) {
		dma(a[1], same(word[1], "write"));
		put("ok\n");
	} else if (n == 4 && same(word[0], "storm")) {
		storm(a[0], a[1], a[2]);
	} else if (n == 3 && same(word[0], "run-copy")) {
		return run_copy(a[0], word[2]);
	} else if (n == 1 && same(word[0], "machine-checks")) {
		turn_machine_checks_on();
		put("ok\n");
	} else if (n == 1 && same(word[0], "machine-check")) {
		put_machine_check();
	} else if (n == 2 && same(word[0], "events")) {
		events(a[0]);
	} else if (n == 2 && same(word[0], "eject")) {
		eject(a[0]);
		put("ok\n");
	} else if (n == 1 && same(word[0], "suspend")) {
		suspend();
	} else if (n == 1 && same(word[0], "reboot")) {
		reboot();
	} else if (n == 2 && same(word[0], "jump")) {
		((void (*)(void))a[0])();
	} else if (n == 1 && same(word[0], "triple-fault")) {
		triple_fault();
	} else if (n == 2 && same(word[0], "exit")) {
		leave(a[0]);
	} else {
		return false;
	}
	return true;
}

void boot_main(void)
{
	char line[128];
	char *word[MAX_WORDS];

	build_idt();
	load_idt();
	detect();
	outb(COM1 + 2, 1);		/* FIFO on */
	put("guest ready vendor=");
	put(is_intel ? "intel" : "amd");
	put_field("kvm", under_kvm);
	put("\n");
	for (;;) {
		get_line(line, sizeof(line));
		if (!obey(word, split(line, word, MAX_WORDS)))
			put("unknown command\n");
	}
}
