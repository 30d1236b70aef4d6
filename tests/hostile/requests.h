/*
 * What a hostile guest sends as requests to convert memory, and what must come
 * of each. Used by the lab's guest, by a C client (tests/c/hostile.c) and by the
 * fuzz target; freestanding.
 *
 * SPDX-License-Identifier: MIT
 */
#ifndef HOSTILE_REQUESTS_H
#define HOSTILE_REQUESTS_H

#include <stdbool.h>
#include <stdint.h>

/* Documentation/virt/kvm/x86/hypercalls.rst, KVM_HC_MAP_GPA_RANGE */
#define HOSTILE_PRIVATE 0x10ull

enum { HOSTILE_PAGE = 4096 };

/* Where a guest may do as it likes. */
struct hostile_field {
	/* RAM that may change side, in bytes; a multiple of the page each. */
	uint64_t base, size;
	/* The end of this RAM; nothing private-capable lies behind it. */
	uint64_t ram_end;
	/* RAM that somebody plugs and unplugs; size 0 if nobody does. */
	uint64_t plug_base, plug_size;
};

struct hostile_request {
	uint64_t gpa, pages, attributes;
};

enum hostile_answer {
	HOSTILE_REFUSED,
	HOSTILE_GRANTED,
	/* It depends on what others do at the same moment. */
	HOSTILE_EITHER,
};

static inline bool hostile_is_private(const struct hostile_request *request)
{
	return request->attributes & HOSTILE_PRIVATE;
}

static inline bool hostile_is_as_expected(enum hostile_answer expected, int64_t ret)
{
	return expected == HOSTILE_EITHER || (ret == 0) == (expected == HOSTILE_GRANTED);
}

/* A generator of no special quality (xorshift); its state is never 0. */
static inline uint64_t hostile_random(uint64_t *state)
{
	uint64_t x = *state;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return *state = x;
}

/* The upper bits are the better ones. */
static inline uint64_t hostile_draw(uint64_t *state, uint64_t below)
{
	return (hostile_random(state) >> 16) % below;
}

/* Nothing private-capable is there: to be shared is all that can be asked of it. */
static inline enum hostile_answer hostile_elsewhere(const struct hostile_request *request)
{
	return hostile_is_private(request) ? HOSTILE_REFUSED : HOSTILE_GRANTED;
}

/* The next request, from the words of `state`. */
static inline enum hostile_answer hostile_next(uint64_t *state, const struct hostile_field *field,
					       struct hostile_request *request)
{
	/*
	 * q35: ECAM, I/O APIC, HPET, local APIC, flash, option ROMs, the BIOS. Not the
	 * VGA window: without a VGA there is RAM.
	 */
	static const uint64_t holes[] = {
		0xb0000000, 0xfec00000, 0xfed00000, 0xfee00000, 0xffff0000, 0xc0000, 0xf0000,
	};
	uint64_t pages = field->size / HOSTILE_PAGE;
	uint64_t first = hostile_draw(state, pages);
	uint64_t few = hostile_draw(state, 4) ? 1 : 1 + hostile_draw(state, 8);
	uint64_t side = hostile_draw(state, 2) ? HOSTILE_PRIVATE : 0;
	uint64_t rest = pages - first;

	*request = (struct hostile_request){
		.gpa = field->base + first * HOSTILE_PAGE,
		.pages = few < rest ? few : rest,
		.attributes = side,
	};
	switch (hostile_draw(state, 20)) {
	case 0:		/* all that is left */
		request->pages = rest;
		return HOSTILE_GRANTED;
	case 1:
		request->pages = 0;
		return HOSTILE_REFUSED;
	case 2:
		request->gpa += 1 + hostile_draw(state, HOSTILE_PAGE - 1);
		return HOSTILE_REFUSED;
	case 3:		/* as many bytes do not fit into 64 bits */
		request->pages = (1ull << 52) + hostile_draw(state, 1ull << 40);
		return HOSTILE_REFUSED;
	case 4:		/* the bytes wrap */
		request->gpa = -few * HOSTILE_PAGE;
		request->pages = few + hostile_draw(state, 1ull << 40);
		return HOSTILE_REFUSED;
	case 5:		/* huge, and not all there: the field is, and what is shared already */
		request->pages = 1ull << (36 + hostile_draw(state, 12));
		return hostile_elsewhere(request);
	case 6:		/* over the end of RAM */
		request->gpa = field->ram_end - few * HOSTILE_PAGE;
		request->pages = few + 1 + hostile_draw(state, 100);
		return hostile_elsewhere(request);
	case 7:
		request->gpa = holes[hostile_draw(state, sizeof(holes) / sizeof(holes[0]))];
		return hostile_elsewhere(request);
	case 8:		/* more than any CPU has of physical address bits */
		request->gpa = 1ull << (52 + hostile_draw(state, 11));
		return hostile_elsewhere(request);
	case 9:		/* bits that mean nothing here, and page sizes */
		request->attributes |= hostile_random(state) & ~HOSTILE_PRIVATE;
		return HOSTILE_GRANTED;
	case 10:	/* the numbers of the pages wrap */
		request->pages = -few;
		return HOSTILE_REFUSED;
	case 11:	/* what comes and goes */
		if (field->plug_size) {
			request->gpa = field->plug_base + first * HOSTILE_PAGE % field->plug_size;
			return HOSTILE_EITHER;
		}
		return HOSTILE_GRANTED;
	case 12:
	case 13:
	case 14:
	case 15:
	case 16:	/* any bits, none of them a page's address */
		request->gpa = hostile_random(state) | 1;
		request->pages = hostile_random(state);
		request->attributes = hostile_random(state);
		return HOSTILE_REFUSED;
	default:
		return HOSTILE_GRANTED;
	}
}

#endif
