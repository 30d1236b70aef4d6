/* SPDX-License-Identifier: MIT */
#include "../tests/hostile/requests.h"

enum hostile_answer hostile_request(uint64_t *state, const struct hostile_field *field,
				    struct hostile_request *request);

enum hostile_answer hostile_request(uint64_t *state, const struct hostile_field *field,
				    struct hostile_request *request)
{
	return hostile_next(state, field, request);
}
