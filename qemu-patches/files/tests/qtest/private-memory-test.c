/*
 * memory-backend-private with the emulated trust agent
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/resource.h>
#include <glib/gstdio.h>
#include "libqtest.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qlist.h"
#include "qobject/qnum.h"
#include "qemu/units.h"

#define PAGE (4 * KiB)
#define RAM_SIZE (64 * MiB)

/*
 * Stands in for the firmware, which these tests do not need: QEMU wants some
 * file. Real-mode code that, forever, counts at 0x1500 and calls a routine at
 * 0x8000 that counts at 0x500; it also puts a routine that counts at 0x504 at
 * 0x9000.
 */
static const uint8_t firmware[] = {
    0xfa,                               /* cli */
    0x31, 0xc0,                         /* xor ax, ax */
    0x8e, 0xd8,                         /* mov ds, ax */
    0x8e, 0xd0,                         /* mov ss, ax */
    0xbc, 0x00, 0x70,                   /* mov sp, 0x7000 */
    0xbb, 0x00, 0x06,                   /* mov bx, 0x600 */
    0x31, 0xf6,                         /* xor si, si */
    0xc7, 0x06, 0x00, 0x80, 0xff, 0x06, /* 0x8000: inc word [0x500] */
    0xc7, 0x06, 0x02, 0x80, 0x00, 0x05,
    0xc6, 0x06, 0x04, 0x80, 0xcb,       /*         retf */
    0xc7, 0x06, 0x00, 0x90, 0xff, 0x06, /* 0x9000: inc word [0x504] */
    0xc7, 0x06, 0x02, 0x90, 0x04, 0x05,
    0xc6, 0x06, 0x04, 0x90, 0xcb,       /*         retf */
    0xff, 0x06, 0x00, 0x15,             /* again: inc word [0x1500] */
    0x9a, 0x00, 0x80, 0x00, 0x00,       /* call 0:0x8000 */
    0xeb, 0xf5,                         /* jmp again */
};
static const uint8_t reset_vector[] = { 0xea, 0x00, 0x00, 0x00, 0xf0 };

static char *firmware_file;

static void write_firmware(void)
{
    g_autofree uint8_t *image = g_malloc0(64 * KiB);
    int fd = g_file_open_tmp("private-memory-XXXXXX", &firmware_file, NULL);

    memcpy(image, firmware, sizeof(firmware));
    memcpy(image + 64 * KiB - 16, reset_vector, sizeof(reset_vector));
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(write(fd, image, 64 * KiB), ==, 64 * KiB);
    close(fd);
}

static QTestState *start_with(const char *more)
{
    return qtest_initf("-M q35 -nodefaults -bios %s -m 64M %s",
                       firmware_file, more);
}

static QTestState *start(void)
{
    return start_with("-machine memory-backend=ram0 "
                      "-object memory-backend-private,id=ram0,size=64M,"
                      "emulate=on");
}

/* An error whose text has all of the words that follow, up to NULL. */
static void assert_error(QDict *response, ...)
{
    QDict *error = qdict_get_qdict(response, "error");
    const char *desc, *word;
    va_list words;

    g_assert_nonnull(error);
    desc = qdict_get_str(error, "desc");
    va_start(words, response);
    while ((word = va_arg(words, const char *))) {
        if (!strstr(desc, word)) {
            g_error("no '%s' in: %s", word, desc);
        }
    }
    va_end(words);
    qobject_unref(response);
}

static QDict *convert(QTestState *qts, uint64_t address, uint64_t size,
                      bool private)
{
    return qtest_qmp(qts, "{ 'execute': 'x-private-memory-convert', "
                     "'arguments': { 'address': %" PRIu64 ", 'size': %" PRIu64
                     ", 'private': %i } }", address, size, private);
}

static void convert_ok(QTestState *qts, uint64_t address, uint64_t size,
                       bool private)
{
    QDict *response = convert(qts, address, size, private);

    g_assert_true(qdict_haskey(response, "return"));
    qobject_unref(response);
}

static QDict *query(QTestState *qts, const char *id)
{
    QDict *response = qtest_qmp(qts, "{ 'execute': 'query-private-memory' }");
    QListEntry *entry;
    QDict *info, *found = NULL;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(response, "return"), entry) {
        info = qobject_to(QDict, qlist_entry_obj(entry));
        if (!strcmp(qdict_get_str(info, "id"), id)) {
            found = qobject_ref(info);
        }
    }
    qobject_unref(response);
    return found;
}

static void assert_figure(QTestState *qts, const char *id, const char *name,
                          int64_t value)
{
    QDict *info = query(qts, id);

    g_assert_nonnull(info);
    g_assert_cmpint(qdict_get_int(info, name), ==, value);
    qobject_unref(info);
}

/* Arguments put together from text, which may not be a format. */
static QDict *execute(QTestState *qts, const char *command,
                      const char *arguments)
{
    return qtest_qmp(qts, "{ 'execute': %s, 'arguments': %p }", command,
                     qobject_from_json(arguments, &error_abort));
}

static QDict *add(QTestState *qts, const char *properties)
{
    g_autofree char *arguments = g_strdup_printf(
        "{ 'qom-type': 'memory-backend-private', 'id': 'm', %s }",
        properties);

    return execute(qts, "object-add", arguments);
}

/* What is known of 'ram0' with @limit extents from @start on. */
static QDict *query_page(QTestState *qts, uint64_t start, uint32_t limit)
{
    QDict *response = qtest_qmp(qts, "{ 'execute': 'query-private-memory', "
                                "'arguments': { 'id': 'ram0', 'start': %"
                                PRIu64 ", 'limit': %u } }", start, limit);
    QList *list = qdict_get_qlist(response, "return");
    QDict *info = qobject_to(QDict, qlist_peek(list));

    g_assert_cmpint(qlist_size(list), ==, 1);
    qobject_ref(info);
    qobject_unref(response);
    return info;
}

static void assert_page(QTestState *qts, uint64_t address, uint8_t value)
{
    g_autofree uint8_t *page = g_malloc(PAGE);

    qtest_memread(qts, address, page, PAGE);
    for (int i = 0; i < PAGE; i++) {
        g_assert_cmpint(page[i], ==, value);
    }
}

static void test_convert(void)
{
    QTestState *qts = start();
    QDict *info;

    qtest_memset(qts, 1 * MiB, 0x5a, 8 * PAGE);
    convert_ok(qts, 1 * MiB + 2 * PAGE, 3 * PAGE, true);
    assert_page(qts, 1 * MiB + 1 * PAGE, 0x5a);
    assert_page(qts, 1 * MiB + 2 * PAGE, 0);
    assert_page(qts, 1 * MiB + 4 * PAGE, 0);
    assert_page(qts, 1 * MiB + 5 * PAGE, 0x5a);
    assert_figure(qts, "ram0", "private", 3 * PAGE);
    assert_figure(qts, "ram0", "shared", RAM_SIZE - 3 * PAGE);

    qtest_memset(qts, 1 * MiB + 2 * PAGE, 0xa5, 3 * PAGE);
    assert_page(qts, 1 * MiB + 3 * PAGE, 0xa5);
    convert_ok(qts, 1 * MiB + 3 * PAGE, PAGE, false);
    assert_page(qts, 1 * MiB + 2 * PAGE, 0xa5);
    assert_page(qts, 1 * MiB + 3 * PAGE, 0);
    assert_page(qts, 1 * MiB + 4 * PAGE, 0xa5);

    /* What is on its side already keeps its contents. */
    convert_ok(qts, 1 * MiB + 2 * PAGE, 3 * PAGE, true);
    assert_page(qts, 1 * MiB + 2 * PAGE, 0xa5);

    info = query(qts, "ram0");
    g_assert_cmpstr(qdict_get_str(info, "agent"), ==, "emulated");
    g_assert_true(qdict_get_bool(info, "backend"));
    g_assert_cmpint(qdict_get_int(info, "conversions"), ==, 3);
    g_assert_cmpint(qdict_get_int(info, "failed-conversions"), ==, 0);
    g_assert_cmpint(qdict_get_int(info, "memory-failures"), ==, 0);
    g_assert_true(qlist_empty(qdict_get_qlist(info, "last-failures")));
    g_assert_cmpint(strlen(qdict_get_str(info, "picture")), ==, 64);
    g_assert_cmpint(qdict_get_str(info, "picture")[1], ==, '+');
    qobject_unref(info);
    qtest_quit(qts);
}

/* Extents come in order and whole, in pages of any size. */
static void test_extents(void)
{
    static const struct {
        uint64_t offset, size;
        bool private;
    } extents[] = {
        { 0, 1 * MiB, false },
        { 1 * MiB, PAGE, true },
        { 1 * MiB + PAGE, 2 * PAGE, false },
        { 1 * MiB + 3 * PAGE, 3 * MiB - 3 * PAGE, true },
        { 4 * MiB, RAM_SIZE - 4 * MiB - PAGE, false },
        { RAM_SIZE - PAGE, PAGE, true },
    };
    QTestState *qts = start();

    for (int i = 0; i < ARRAY_SIZE(extents); i++) {
        convert_ok(qts, extents[i].offset, extents[i].size,
                   extents[i].private);
    }
    for (uint32_t limit = 1; limit <= ARRAY_SIZE(extents) + 1; limit++) {
        uint64_t next = 0;
        int at = 0;

        while (at < ARRAY_SIZE(extents)) {
            QDict *info = query_page(qts, next, limit);
            QList *list = qdict_get_qlist(info, "extents");
            QListEntry *entry;

            g_assert_cmpint(qlist_size(list), ==,
                            MIN(limit, ARRAY_SIZE(extents) - at));
            QLIST_FOREACH_ENTRY(list, entry) {
                QDict *extent = qobject_to(QDict, qlist_entry_obj(entry));

                g_assert_cmpint(qdict_get_int(extent, "offset"), ==,
                                extents[at].offset);
                g_assert_cmpint(qdict_get_int(extent, "size"), ==,
                                extents[at].size);
                g_assert_cmpint(qdict_get_bool(extent, "private"), ==,
                                extents[at].private);
                at++;
            }
            next = qdict_get_try_int(info, "next", RAM_SIZE);
            g_assert_cmpint(qdict_haskey(info, "next"), ==,
                            at < ARRAY_SIZE(extents));
            qobject_unref(info);
        }
        g_assert_cmpint(next, ==, RAM_SIZE);
    }
    qtest_quit(qts);
}

/* A list may start within an extent; without 'id' it is of each backend. */
static void test_extents_of_some(void)
{
    QTestState *qts = start();
    QDict *info, *extent, *response;
    QListEntry *entry;
    int backends = 0;

    convert_ok(qts, 1 * MiB, 4 * PAGE, true);
    info = query_page(qts, 1 * MiB + PAGE, 1);
    extent = qobject_to(QDict, qlist_peek(qdict_get_qlist(info, "extents")));
    g_assert_cmpint(qdict_get_int(extent, "offset"), ==, 1 * MiB + PAGE);
    g_assert_cmpint(qdict_get_int(extent, "size"), ==, 3 * PAGE);
    g_assert_cmpint(qdict_get_int(info, "next"), ==, 1 * MiB + 4 * PAGE);
    qobject_unref(info);

    /* The next page tells of its own moment. */
    convert_ok(qts, 1 * MiB, RAM_SIZE - 1 * MiB, true);
    info = query_page(qts, 1 * MiB + 4 * PAGE, 2);
    g_assert_cmpint(qlist_size(qdict_get_qlist(info, "extents")), ==, 1);
    g_assert_false(qdict_haskey(info, "next"));
    extent = qobject_to(QDict, qlist_peek(qdict_get_qlist(info, "extents")));
    g_assert_cmpint(qdict_get_int(extent, "offset"), ==, 1 * MiB + 4 * PAGE);
    g_assert_true(qdict_get_bool(extent, "private"));
    qobject_unref(info);

    info = query(qts, "ram0");
    g_assert_false(qdict_haskey(info, "extents"));
    g_assert_false(qdict_haskey(info, "next"));
    qobject_unref(info);

    response = add(qts, "'emulate': true, 'size': 4096");
    g_assert_true(qdict_haskey(response, "return"));
    qobject_unref(response);
    response = qtest_qmp(qts, "{ 'execute': 'query-private-memory', "
                         "'arguments': { 'limit': 1 } }");
    QLIST_FOREACH_ENTRY(qdict_get_qlist(response, "return"), entry) {
        info = qobject_to(QDict, qlist_entry_obj(entry));
        g_assert_cmpint(qlist_size(qdict_get_qlist(info, "extents")), ==, 1);
        g_assert_cmpint(qdict_haskey(info, "next"), ==,
                        !strcmp(qdict_get_str(info, "id"), "ram0"));
        backends++;
    }
    g_assert_cmpint(backends, ==, 2);
    qobject_unref(response);
    qtest_quit(qts);
}

static void test_bad_queries(void)
{
    static const struct {
        const char *arguments, *word;
    } queries[] = {
        { "'id': 'ram1'", "'ram1'" },
        { "'id': 'other', 'limit': 1", "'other'" },
        { "'limit': 0", "'limit' is 0: it must be from 1 to 65536" },
        { "'limit': 65537", "'limit' is 65537" },
        { "'id': 'ram0', 'start': 1, 'limit': 1", "multiple of the granule" },
        { "'id': 'ram0', 'start': 67108864, 'limit': 1",
          "less than the size of 'ram0' (0x4000000)" },
        { "'id': 'ram0', 'start': 18446744073709547520, 'limit': 1",
          "less than the size" },
        { "'id': 'ram0', 'start': 4096", "'limit'" },
        { "'start': 4096, 'limit': 1", "'id'" },
    };
    QTestState *qts = start_with(
        "-machine memory-backend=ram0 "
        "-object memory-backend-private,id=ram0,size=64M,emulate=on "
        "-object memory-backend-ram,id=other,size=64M");

    for (int i = 0; i < ARRAY_SIZE(queries); i++) {
        g_autofree char *arguments = g_strdup_printf("{ %s }",
                                                     queries[i].arguments);

        assert_error(execute(qts, "query-private-memory", arguments),
                     queries[i].word, NULL);
    }
    qtest_quit(qts);
}

static bool can_tell_held(QTestState *qts)
{
    QDict *info = query(qts, "ram0");
    bool known = qdict_haskey(info, "held-twice");

    qobject_unref(info);
    return known;
}

static void test_held(void)
{
    QTestState *qts = start();

    if (can_tell_held(qts)) {
        qtest_memset(qts, 2 * MiB, 1, 16 * PAGE);
        assert_figure(qts, "ram0", "shared-held", 16 * PAGE);
        convert_ok(qts, 2 * MiB, 16 * PAGE, true);
        assert_figure(qts, "ram0", "shared-held", 0);
        qtest_memset(qts, 2 * MiB, 1, 4 * PAGE);
        assert_figure(qts, "ram0", "private-held", 4 * PAGE);
        assert_figure(qts, "ram0", "held-twice", 0);
    } else {
        g_test_skip("this kernel has no cachestat(2)");
    }
    qtest_quit(qts);
}

static void test_bad_conversions(void)
{
    static const struct {
        uint64_t address, size;
        const char *word;
        bool shared_is_no_op;
    } requests[] = {
        { 1 * MiB + 1, PAGE, "multiple of the granule", false },
        { 1 * MiB, PAGE - 1, "multiple of the granule", false },
        { 1 * MiB, 0, "empty", false },
        { UINT64_MAX - PAGE + 1, PAGE, "beyond the 64-bit", false },
        { PAGE, UINT64_MAX - PAGE + 1, "beyond the 64-bit", false },
        { RAM_SIZE, PAGE, "0x4000000 cannot be private", true },
        { RAM_SIZE - PAGE, 2 * PAGE, "0x4000000 cannot be private", true },
        { 1ull << 60, PAGE, "cannot be private", true },
        { 0xffff0000, PAGE, "ROM", true },
        { 0xfee00000, PAGE, "MMIO", true },
    };
    QTestState *qts = start();

    qtest_memset(qts, RAM_SIZE - PAGE, 0x77, PAGE);
    for (int i = 0; i < ARRAY_SIZE(requests); i++) {
        uint64_t address = requests[i].address, size = requests[i].size;

        assert_error(convert(qts, address, size, true), requests[i].word,
                     NULL);
        if (requests[i].shared_is_no_op) {
            convert_ok(qts, address, size, false);
        } else {
            assert_error(convert(qts, address, size, false),
                         requests[i].word, NULL);
        }
    }
    assert_page(qts, RAM_SIZE - PAGE, 0x77);
    assert_figure(qts, "ram0", "private", 0);
    assert_figure(qts, "ram0", "failed-conversions", 1);
    qtest_quit(qts);
}

static void test_bad_objects(void)
{
    QTestState *qts = start();

    assert_error(add(qts, "'emulate': true, 'size': 0"), "'size'",
                 "memory-backend-private", NULL);
    assert_error(add(qts, "'emulate': true, 'size': 5000"), "'m'", "'size'",
                 "multiple of the host page size", NULL);
    assert_error(add(qts, "'emulate': true, 'size': 4096, 'share': false"),
                 "'m'", "'share'", "leave the property out", NULL);
    assert_error(add(qts, "'size': 4096"), "'m'", "emulate=on", "-accel kvm",
                 NULL);
    assert_error(add(qts, "'emulate': true, 'size': 4096, 'discard': 'all'"),
                 "'discard'", "'all'", NULL);
    assert_error(add(qts, "'emulate': true, 'size': 4096, 'prefault': true"),
                 "'m'", "emulated agent", "'prefault'", NULL);
    for (int i = 0; i < 3; i++) {
        const uint32_t sizes[] = { 2048, 12288, 134217728 };
        g_autofree char *props = g_strdup_printf("'emulate': true, "
            "'size': 4096, 'dma-granularity': %" PRIu32, sizes[i]);

        assert_error(add(qts, props), "'m'", "'dma-granularity'",
                     "power of two", NULL);
    }
    assert_error(add(qts, "'emulate': true, 'size': 4194304, 'hugetlb': true, "
                     "'hugetlbsize': 2097152"), "'m'", "emulated agent",
                 "huge pages", NULL);
    assert_error(add(qts, "'emulate': true, 'size': 1152921504606846976"),
                 "'m'", "'size'", "smaller", NULL);
    g_assert_null(query(qts, "m"));
    qtest_quit(qts);
}

static void test_object_add_del(void)
{
    QTestState *qts = start();
    QDict *response;

    assert_error(qtest_qmp(qts, "{ 'execute': 'object-del', "
                           "'arguments': { 'id': 'ram0' } }"), "in use", NULL);
    for (int i = 0; i < 3; i++) {
        response = add(qts, "'emulate': true, 'size': 1048576");
        g_assert_true(qdict_haskey(response, "return"));
        qobject_unref(response);
        assert_figure(qts, "m", "size", 1 * MiB);
        qtest_qmp_assert_success(qts, "{ 'execute': 'object-del', "
                                 "'arguments': { 'id': 'm' } }");
        g_assert_null(query(qts, "m"));
    }
    qtest_quit(qts);
}

static QDict *qom_set(QTestState *qts, const char *path, const char *property,
                      const char *value)
{
    g_autofree char *arguments = g_strdup_printf(
        "{ 'path': '%s', 'property': '%s', 'value': %s }", path, property,
        value);

    return execute(qts, "qom-set", arguments);
}

/*
 * What a property is for is done when the object is made: it cannot be set
 * later, but for the two that QEMU passes on to the host at any time, and the
 * name of RAM for migration, which no backend refuses. All properties that
 * there are must be listed here.
 */
static void test_set_properties(void)
{
    static const struct {
        const char *name, *value;
        bool settable;
    } properties[] = {
        { "emulate", "false" },
        { "initial-state", "'private'" },
        { "discard", "'none'" },
        { "hugetlb", "true" },
        { "hugetlbsize", "2097152" },
        { "prefault", "true" },
        { "dma-granularity", "4096" },
        { "size", "4096" },
        { "share", "false" },
        { "reserve", "false" },
        { "prealloc", "true" },
        { "prealloc-threads", "2" },
        { "prealloc-context", "'/objects/t'" },
        { "policy", "'bind'" },
        { "host-nodes", "[ 0 ]" },
        { "merge", "false", true },
        { "dump", "false", true },
        { "x-use-canonical-path-for-ramblock-id", "true", true },
    };
    QTestState *qts = start_with(
        "-machine memory-backend=ram0 "
        "-object memory-backend-private,id=ram0,size=64M,emulate=on "
        "-object thread-context,id=t -object sw-protected-guest,id=cgs0 "
        "-device private-memory-testdev,id=l,memdev=ram0");
    QDict *response;
    QListEntry *entry;

    response = qtest_qmp(qts, "{ 'execute': 'qom-list', 'arguments': "
                         "{ 'path': '/objects/ram0' } }");
    QLIST_FOREACH_ENTRY(qdict_get_qlist(response, "return"), entry) {
        QDict *item = qobject_to(QDict, qlist_entry_obj(entry));
        const char *name = qdict_get_str(item, "name");
        bool known = !strcmp(name, "type") ||
                     g_str_has_prefix(qdict_get_str(item, "type"), "child<");

        for (int i = 0; i < ARRAY_SIZE(properties); i++) {
            known |= !strcmp(name, properties[i].name);
        }
        if (!known) {
            g_error("nothing says whether '%s' can be set", name);
        }
    }
    qobject_unref(response);

    for (int i = 0; i < ARRAY_SIZE(properties); i++) {
        response = qom_set(qts, "/objects/ram0", properties[i].name,
                           properties[i].value);
        if (properties[i].settable) {
            g_assert_true(qdict_haskey(response, "return"));
            qobject_unref(response);
        } else {
            assert_error(response, "cannot change property", NULL);
        }
    }
    assert_error(qom_set(qts, "/objects/cgs0", "x-require-guest-memfd", "true"),
                 "cannot change property 'x-require-guest-memfd'", NULL);
    assert_error(qom_set(qts, "/machine/peripheral/l", "memdev",
                         "'/objects/ram0'"), "memdev", NULL);
    /* The next backend is made as the first was. */
    response = add(qts, "'emulate': true, 'size': 4096");
    g_assert_true(qdict_haskey(response, "return"));
    qobject_unref(response);
    qtest_quit(qts);
}

static bool is_open(QTestState *qts, int fd)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/fd/%d", qtest_pid(qts),
                                            fd);

    return g_file_test(path, G_FILE_TEST_IS_SYMLINK);
}

/* The limit of open files that leaves @free more of them. */
static int limit_with_free(QTestState *qts, int free)
{
    int fd = 0;

    while (is_open(qts, fd) || free-- > 0) {
        fd++;
    }
    return fd;
}

/* Each of the three fds that an object needs may be the one too many. */
static void test_fd_limit(void)
{
    QTestState *qts = start();
    int pid = qtest_pid(qts);
    int before = limit_with_free(qts, 8);
    struct rlimit old, few;
    QDict *response;

    g_assert_cmpint(prlimit(pid, RLIMIT_NOFILE, NULL, &old), ==, 0);
    for (int free = 0; free < 3; free++) {
        few = (struct rlimit) { limit_with_free(qts, free), old.rlim_max };
        g_assert_cmpint(prlimit(pid, RLIMIT_NOFILE, &few, NULL), ==, 0);
        assert_error(add(qts, "'emulate': true, 'size': 4096"), "'m'",
                     "raise the limit of open files", "RLIMIT_NOFILE", NULL);
        /* None leaked. */
        g_assert_cmpint(limit_with_free(qts, 8), ==, before);
    }
    g_assert_cmpint(prlimit(pid, RLIMIT_NOFILE, &old, NULL), ==, 0);
    response = add(qts, "'emulate': true, 'size': 4096");
    g_assert_true(qdict_haskey(response, "return"));
    qobject_unref(response);
    qtest_quit(qts);
}

/* One request over two backends, refused where a third is ordinary RAM. */
static void test_numa(void)
{
    QTestState *qts = start_with(
        "-smp 3 "
        "-object memory-backend-private,id=a,size=16M,emulate=on "
        "-object memory-backend-private,id=b,size=16M,emulate=on "
        "-object memory-backend-ram,id=c,size=32M "
        "-numa node,memdev=a -numa node,memdev=b -numa node,memdev=c");

    qtest_memset(qts, 16 * MiB - PAGE, 0x11, 2 * PAGE);
    convert_ok(qts, 16 * MiB - PAGE, 2 * PAGE, true);
    assert_page(qts, 16 * MiB - PAGE, 0);
    assert_page(qts, 16 * MiB, 0);
    assert_figure(qts, "a", "private", PAGE);
    assert_figure(qts, "b", "private", PAGE);
    assert_error(convert(qts, 32 * MiB - PAGE, 2 * PAGE, true),
                 "0x2000000 cannot be private: it is MMIO, ROM, ordinary RAM "
                 "or nothing at all", NULL);
    assert_figure(qts, "b", "private", PAGE);
    qtest_quit(qts);
}

static QDict *relocate(QTestState *qts, uint64_t address, uint64_t size,
                       const char *more)
{
    g_autofree char *arguments = g_strdup_printf(
        "{ 'address': %" PRIu64 ", 'size': %" PRIu64 " %s }",
        address, size, more);

    return execute(qts, "x-private-memory-relocate", arguments);
}

static void test_relocate(void)
{
    g_autofree char *filename = NULL, *file = NULL, *beyond = NULL;
    int fd = g_file_open_tmp("private-memory-test-XXXXXX", &filename, NULL);
    QTestState *qts = start();
    QDict *response;
    char *text;

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, 4 * MiB), ==, 0);
    file = g_strdup_printf(", 'filename': '%s', 'offset': 4096", filename);
    beyond = g_strdup_printf(", 'filename': '%s', 'offset': 4194304",
                             filename);

    assert_error(relocate(qts, 4 * MiB, PAGE, ""), "0x400000", "shared", NULL);
    convert_ok(qts, 4 * MiB, 4 * MiB, true);
    qtest_memset(qts, 4 * MiB, 0x21, 4 * MiB);
    assert_error(relocate(qts, 4 * MiB, 3 * PAGE, ""), "4 KiB, 2 MiB or 1 GiB",
                 NULL);
    assert_error(relocate(qts, 4 * MiB + PAGE, 2 * MiB, file), "multiple",
                 NULL);
    assert_error(relocate(qts, 4 * MiB, PAGE, ", 'offset': 0"), "'filename'",
                 NULL);
    assert_error(relocate(qts, 4 * MiB, PAGE, ", 'filename': '/nowhere/f'"),
                 "/nowhere/f", NULL);
    assert_error(relocate(qts, 4 * MiB, PAGE, beyond), "beyond the file",
                 NULL);

    response = relocate(qts, 4 * MiB, 2 * MiB, file);
    if (qdict_haskey(response, "error")) {
        /* A host may keep userfaultfd(2) from QEMU. */
        assert_error(response, "userfaultfd", NULL);
        g_test_skip("this host lets no memory move");
    } else {
        qobject_unref(response);
        assert_figure(qts, "ram0", "relocated", 2 * MiB);
        text = qtest_hmp(qts, "info private-memory");
        g_assert_nonnull(strstr(text, "relocated          2 MiB"));
        g_free(text);
        assert_page(qts, 4 * MiB, 0x21);
        qtest_memset(qts, 6 * MiB - PAGE, 0x43, PAGE);
        assert_error(relocate(qts, 6 * MiB, PAGE, file), "already", NULL);
        convert_ok(qts, 4 * MiB, PAGE, false);
        assert_page(qts, 4 * MiB, 0);
        assert_figure(qts, "ram0", "relocated", 2 * MiB - PAGE);

        response = relocate(qts, 6 * MiB - PAGE, PAGE, "");
        g_assert_true(qdict_haskey(response, "return"));
        qobject_unref(response);
        assert_page(qts, 6 * MiB - PAGE, 0x43);
        assert_page(qts, 6 * MiB - 2 * PAGE, 0x21);
        assert_figure(qts, "ram0", "relocated", 2 * MiB - 2 * PAGE);
        qtest_qmp_assert_success(qts, "{ 'execute': 'system_reset' }");
        qtest_qmp_eventwait(qts, "RESET");
        assert_figure(qts, "ram0", "relocated", 0);
        assert_page(qts, 6 * MiB - PAGE, 0);
    }
    qtest_quit(qts);
    close(fd);
    unlink(filename);
}

/* ACPI's registers of the q35 machine, placed where SeaBIOS has them. */
#define PM_BASE 0x600
#define TCO_BASE (PM_BASE + 0x60)
#define LPC_CONFIG 0x8000f800       /* bus 0, device 31, function 0 */

static void enable_acpi(QTestState *qts)
{
    qtest_outl(qts, 0xcf8, LPC_CONFIG | 0x40);
    qtest_outl(qts, 0xcfc, PM_BASE | 1);
    qtest_outl(qts, 0xcf8, LPC_CONFIG | 0x44);
    qtest_outb(qts, 0xcfc, 0x80);
}

/* PM1_CNT: SLP_TYP 1 is suspend to RAM (S3), and SLP_EN. */
static void suspend(QTestState *qts)
{
    enable_acpi(qts);
    qtest_outw(qts, PM_BASE + 4, 1 << 10 | 1 << 13);
    qtest_qmp_eventwait(qts, "SUSPEND");
}

static void system_reset(QTestState *qts)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'system_reset' }");
}

static void reset_while_suspended(QTestState *qts)
{
    suspend(qts);
    system_reset(qts);
}

/* The host bridge's reset control register. */
static void guest_reset(QTestState *qts)
{
    qtest_outb(qts, 0xcf9, 6);
}

static void keyboard_reset(QTestState *qts)
{
    qtest_outb(qts, 0x64, 0xfe);
}

/*
 * The chipset's watchdog, after 4 ticks of 0.6 s, twice. The clock must not
 * have to go on from there: a machine that stops stops it.
 */
static void watchdog_expires(QTestState *qts)
{
    enable_acpi(qts);
    /* GCS: without NO_REBOOT, which QEMU 10.0 sets. */
    qtest_outl(qts, 0xcf8, LPC_CONFIG | 0xf0);
    qtest_outl(qts, 0xcfc, 0xfed1c001);
    qtest_writel(qts, 0xfed1c000 + 0x3410, 0);
    qtest_outw(qts, TCO_BASE + 0x12, 4);
    qtest_outw(qts, TCO_BASE, 4);
    qtest_outw(qts, TCO_BASE + 8, 0);
    qtest_clock_step(qts, 2 * 4 * 600 * 1000 * 1000LL);
}

static void guest_panics(QTestState *qts)
{
    qtest_outb(qts, 0x505, 1);
}

/* How memory is before whatever happens to the machine, and is to stay. */
static void fill_both_sides(QTestState *qts, uint64_t private)
{
    convert_ok(qts, 1 * MiB, 2 * PAGE, true);
    convert_ok(qts, 1 * MiB + 2 * PAGE, 2 * PAGE, false);
    qtest_memset(qts, 1 * MiB, 0x34, 2 * PAGE);
    qtest_memset(qts, 1 * MiB + 2 * PAGE, 0x12, 2 * PAGE);
    assert_figure(qts, "ram0", "private", private);
}

static void assert_kept(QTestState *qts, uint64_t private)
{
    assert_figure(qts, "ram0", "private", private);
    for (int page = 0; page < 4; page++) {
        assert_page(qts, 1 * MiB + page * PAGE, page < 2 ? 0x34 : 0x12);
    }
}

/* Whatever resets the machine, memory begins anew on its side. */
static void test_resets(void)
{
    static const struct {
        const char *options;
        void (*reset)(QTestState *qts);
        const char *reason;
    } resets[] = {
        { "", system_reset, "host-qmp-system-reset" },
        { "", reset_while_suspended, "host-qmp-system-reset" },
        { "", guest_reset, "guest-reset" },
        { "", keyboard_reset, "guest-reset" },
        { "-action watchdog=reset", watchdog_expires, "guest-reset" },
    };

    for (int i = 0; i < 2 * ARRAY_SIZE(resets); i++) {
        const char *state = i % 2 ? "private" : "shared";
        uint64_t others = i % 2 ? RAM_SIZE - 4 * PAGE : 0;
        g_autofree char *options = g_strdup_printf(
            "%s -machine memory-backend=ram0 -object memory-backend-private,"
            "id=ram0,size=64M,emulate=on,initial-state=%s",
            resets[i / 2].options, state);
        QTestState *qts = start_with(options);
        QDict *event;

        fill_both_sides(qts, others + 2 * PAGE);
        resets[i / 2].reset(qts);
        event = qtest_qmp_eventwait_ref(qts, "RESET");
        g_assert_cmpstr(qdict_get_str(qdict_get_qdict(event, "data"),
                                      "reason"), ==, resets[i / 2].reason);
        qobject_unref(event);
        assert_figure(qts, "ram0", "private", i % 2 ? RAM_SIZE : 0);
        for (int page = 0; page < 4; page++) {
            assert_page(qts, 1 * MiB + page * PAGE,
                        page >= 2 && i % 2 == 0 ? 0x12 : 0);
        }
        qtest_quit(qts);
    }
}

/* The sum of the sizes in what was traced as @event, and how often it was. */
static uint64_t traced(const char *file, const char *event, int *count)
{
    g_autofree char *text = NULL;
    uint64_t sum = 0;
    char *at;

    *count = 0;
    if (!g_file_get_contents(file, &text, NULL, NULL)) {
        return 0;
    }
    for (at = text; (at = strstr(at, event)); at++) {
        sum += g_ascii_strtoull(strstr(at, " size ") + strlen(" size "), NULL,
                                0);
        (*count)++;
    }
    return sum;
}

/*
 * What a reset costs follows what was private: TCG is told of that only. (Not
 * so where memory begins private, as it all becomes zero.)
 */
static void test_reset_invalidates(void)
{
    g_autofree char *file = g_strdup_printf("%s.trace", firmware_file);
    g_autofree char *options = g_strdup_printf(
        "-d trace:private_backend_invalidate -D %s "
        "-machine memory-backend=ram0 "
        "-object memory-backend-private,id=ram0,size=64M,emulate=on", file);
    QTestState *qts = start_with(options);
    uint64_t size;
    int count;

    convert_ok(qts, 1 * MiB, 3 * PAGE, true);
    convert_ok(qts, 32 * MiB, 5 * PAGE, true);
    convert_ok(qts, RAM_SIZE - PAGE, PAGE, true);
    system_reset(qts);
    qtest_qmp_eventwait(qts, "RESET");
    size = traced(file, "private_backend_invalidate", &count);
    g_assert_cmpint(count, ==, 3);
    g_assert_cmpint(size, ==, 9 * PAGE);

    /* Nothing is private now. */
    system_reset(qts);
    qtest_qmp_eventwait(qts, "RESET");
    traced(file, "private_backend_invalidate", &count);
    g_assert_cmpint(count, ==, 3);
    qtest_quit(qts);
    unlink(file);
}

/* Suspended to RAM, and awake again: sides and contents are as they were. */
static void test_wakeup(void)
{
    for (int i = 0; i < 2; i++) {
        QTestState *qts = start_with(
            i ? "-machine memory-backend=ram0 -object memory-backend-private,"
                "id=ram0,size=64M,emulate=on,initial-state=private"
              : "-machine memory-backend=ram0 -object memory-backend-private,"
                "id=ram0,size=64M,emulate=on");
        uint64_t private = (i ? RAM_SIZE - 4 * PAGE : 0) + 2 * PAGE;

        fill_both_sides(qts, private);
        for (int round = 0; round < 2; round++) {
            suspend(qts);
            assert_kept(qts, private);
            qtest_qmp_assert_success(qts, "{ 'execute': 'system_wakeup' }");
            qtest_qmp_eventwait(qts, "WAKEUP");
            assert_kept(qts, private);
        }
        convert_ok(qts, 1 * MiB, PAGE, false);
        assert_page(qts, 1 * MiB, 0);
        assert_page(qts, 1 * MiB + PAGE, 0x34);
        qtest_quit(qts);
    }
}

/* What stops the machine without a reset leaves memory to be looked at. */
static void test_stops(void)
{
    static const struct {
        const char *options;
        void (*stop)(QTestState *qts);
        const char *event;
    } stops[] = {
        { "-action reboot=shutdown,shutdown=pause", guest_reset, "SHUTDOWN" },
        { "-action watchdog=pause", watchdog_expires, "WATCHDOG" },
        { "-device pvpanic -action panic=pause", guest_panics,
          "GUEST_PANICKED" },
    };

    for (int i = 0; i < ARRAY_SIZE(stops); i++) {
        g_autofree char *options = g_strdup_printf(
            "%s -machine memory-backend=ram0 -object memory-backend-private,"
            "id=ram0,size=64M,emulate=on", stops[i].options);
        QTestState *qts;

        if (strstr(options, "pvpanic") && !qtest_has_device("pvpanic")) {
            g_test_message("this QEMU has no pvpanic");
            continue;
        }
        qts = start_with(options);
        fill_both_sides(qts, 2 * PAGE);
        stops[i].stop(qts);
        qtest_qmp_eventwait(qts, stops[i].event);
        qtest_qmp_eventwait(qts, "STOP");
        assert_kept(qts, 2 * PAGE);
        qtest_qmp_assert_success(qts, "{ 'execute': 'set-action', "
                                 "'arguments': { 'reboot': 'reset' } }");
        system_reset(qts);
        qtest_qmp_eventwait(qts, "RESET");
        assert_figure(qts, "ram0", "private", 0);
        assert_page(qts, 1 * MiB, 0);
        qtest_quit(qts);
    }
}

static void test_hmp(void)
{
    QTestState *qts = start();
    char *text;

    convert_ok(qts, 0x100000, PAGE, true);
    text = qtest_hmp(qts, "info private-memory");
    g_assert_nonnull(strstr(text, "ram0 (emulated, protects nothing)"));
    g_assert_nonnull(strstr(text, "[.+"));
    g_assert_nonnull(strstr(text, "1 done, 0 failed"));
    g_assert_nonnull(strstr(text, "memory failures    0"));
    g_assert_null(strstr(text, "last failed"));
    g_free(text);
    qtest_quit(qts);
}

/* The bar has as many cells as are asked for; lines fit narrow terminals. */
static void test_hmp_width(void)
{
    QTestState *qts = start();
    char *text;

    convert_ok(qts, 16 * MiB, 48 * MiB, true);
    text = qtest_hmp(qts, "info private-memory 8");
    g_assert_nonnull(strstr(text, "  [..######]\r\n"));
    for (char *line = strtok(text, "\r\n"); line; line = strtok(NULL, "\r\n")) {
        g_assert_cmpuint(strlen(line), <=, 40);
    }
    g_free(text);
    text = qtest_hmp(qts, "info private-memory 200");
    g_assert_cmpuint(strcspn(strchr(text, '['), "]"), ==, 201);
    g_free(text);
    for (int i = 0; i < 2; i++) {
        text = qtest_hmp(qts, "info private-memory %d", i * 5000);
        g_assert_nonnull(strstr(text, "1 to 4096 cells"));
        g_free(text);
    }
    qtest_quit(qts);
}

/* Sizes are in bytes, as the manual says, or have a suffix. */
static void test_hmp_convert(void)
{
    static const struct {
        const char *arguments, *says;
        /* Pages that are private then. */
        int pages;
    } commands[] = {
        { "0x100000 4096 on", "", 1 },
        { "0x100000 0x3000 on", "", 3 },
        { "0x100000 2M on", "", 512 },
        { "0x100000 4k off", "", 511 },
        { "0x100000 64K off", "", 496 },
        { "0x200000-4096 4096B off", "", 495 },
        { "0x100000 1 on", "multiple of the granule", 495 },
        { "0x100000 on off", "'size' is 'on'", 495 },
        { "0x100000 4096x on", "'size' is '4096x'", 495 },
        { "0xfee00000 4k on", "cannot be private", 495 },
    };
    QTestState *qts = start();

    for (int i = 0; i < ARRAY_SIZE(commands); i++) {
        g_autofree char *text = qtest_hmp(qts, "x_private_memory_convert %s",
                                          commands[i].arguments);

        if (*commands[i].says) {
            g_assert_nonnull(strstr(text, commands[i].says));
        } else {
            g_assert_cmpstr(text, ==, "");
        }
        assert_figure(qts, "ram0", "private", commands[i].pages * PAGE);
    }
    qtest_quit(qts);
}

/* What failed is kept, shown, and told as an event, one a second at most. */
static void test_failed_conversions(void)
{
    QTestState *qts = start();
    QDict *response, *event, *failed;
    QList *list;
    char *text;

    for (int i = 0; i < 20; i++) {
        assert_error(convert(qts, RAM_SIZE + i * PAGE, PAGE, true),
                     "cannot be private", NULL);
    }
    event = qtest_qmp_eventwait_ref(qts, "PRIVATE_MEMORY_CONVERSION_FAILED");
    failed = qdict_get_qdict(event, "data");
    g_assert_cmpint(qdict_get_int(failed, "address"), ==, RAM_SIZE);
    g_assert_cmpint(qdict_get_int(failed, "size"), ==, PAGE);
    g_assert_true(qdict_get_bool(failed, "private"));
    g_assert_nonnull(strstr(qdict_get_str(failed, "error"),
                            "cannot be private"));
    qobject_unref(event);
    /* Those that were held back are told in one: the last. */
    qtest_clock_step(qts, 1000 * 1000 * 1000);
    event = qtest_qmp_eventwait_ref(qts, "PRIVATE_MEMORY_CONVERSION_FAILED");
    failed = qdict_get_qdict(event, "data");
    g_assert_cmpint(qdict_get_int(failed, "address"), ==,
                    RAM_SIZE + 19 * PAGE);
    qobject_unref(event);

    response = qtest_qmp(qts, "{ 'execute': "
                         "'query-private-memory-failed-conversions' }");
    list = qdict_get_qlist(response, "return");
    g_assert_cmpuint(qlist_size(list), ==, 8);
    failed = qobject_to(QDict, qlist_peek(list));
    g_assert_cmpint(qdict_get_int(failed, "number"), ==, 20);
    g_assert_cmpint(qdict_get_int(failed, "address"), ==,
                    RAM_SIZE + 19 * PAGE);
    qobject_unref(response);

    text = qtest_hmp(qts, "info private-memory");
    g_assert_nonnull(strstr(text, "last failed conversions:"));
    g_assert_nonnull(strstr(text, "0x4013000+0x1000 to private"));
    g_free(text);
    qtest_quit(qts);
}

/* A figure of query-stats, or the sum of a histogram. */
static int64_t statistic(QTestState *qts, const char *name)
{
    QDict *response = qtest_qmp(qts, "{ 'execute': 'query-stats', 'arguments': "
                                "{ 'target': 'vm', 'providers': [ "
                                "{ 'provider': 'private-memory', "
                                "'names': [ %s ] } ] } }", name);
    QDict *result = qobject_to(QDict, qlist_peek(qdict_get_qlist(response,
                                                                 "return")));
    QDict *found = qobject_to(QDict, qlist_peek(qdict_get_qlist(result,
                                                                "stats")));
    QList *histogram = qdict_get_qlist(found, "value");
    int64_t value = 0;
    QListEntry *entry;

    g_assert_cmpstr(qdict_get_str(found, "name"), ==, name);
    if (!histogram) {
        value = qdict_get_int(found, "value");
    } else {
        QLIST_FOREACH_ENTRY(histogram, entry) {
            value += qnum_get_int(qobject_to(QNum, qlist_entry_obj(entry)));
        }
    }
    qobject_unref(response);
    return value;
}

static void test_stats(void)
{
    QTestState *qts = start();
    QDict *response;

    convert_ok(qts, 1 * MiB, 3 * PAGE, true);
    convert_ok(qts, 1 * MiB, PAGE, false);
    assert_error(convert(qts, RAM_SIZE - PAGE, 2 * PAGE, true),
                 "cannot be private", NULL);
    g_assert_cmpint(statistic(qts, "conversions"), ==, 2);
    g_assert_cmpint(statistic(qts, "failed-conversions"), ==, 1);
    g_assert_cmpint(statistic(qts, "private"), ==, 2 * PAGE);
    g_assert_cmpint(statistic(qts, "shared"), ==, RAM_SIZE - 2 * PAGE);
    g_assert_cmpint(statistic(qts, "faults"), ==, 0);
    g_assert_cmpint(statistic(qts, "suppressed-messages"), ==, 0);
    g_assert_cmpint(statistic(qts, "memory-failures"), ==, 0);
    g_assert_cmpint(statistic(qts, "conversion-latency"), ==, 3);

    response = qtest_qmp(qts, "{ 'execute': 'query-stats-schemas', "
                         "'arguments': { 'provider': 'private-memory' } }");
    g_assert_cmpuint(qlist_size(qdict_get_qlist(qobject_to(QDict, qlist_peek(
                         qdict_get_qlist(response, "return"))), "stats")),
                     ==, 10);
    qobject_unref(response);
    qtest_quit(qts);
}

/* The names that 'info stats vm @arguments' shows, each with a figure. */
static char *shown_stats(QTestState *qts, const char *arguments)
{
    g_autofree char *text = qtest_hmp(qts, "info stats vm %s", arguments);
    g_auto(GStrv) lines = g_strsplit(text, "\r\n", -1);
    g_autoptr(GString) names = g_string_new(NULL);

    for (char **line = lines; *line; line++) {
        if (**line && !g_str_has_prefix(*line, "provider: ")) {
            g_assert_nonnull(strstr(*line, "): "));
            g_string_append_printf(names, "%s%.*s", names->len ? " " : "",
                                   (int)strcspn(*line + 4, " "), *line + 4);
        }
    }
    return g_string_free(g_steal_pointer(&names), false);
}

/* 'info stats vm' with no name, one and several, with a provider and without */
static void test_hmp_stats(void)
{
    static const char all[] = "conversions failed-conversions memory-failures "
        "private shared private-held shared-held faults suppressed-messages "
        "conversion-latency";
    static const struct {
        const char *arguments, *shown;
    } queries[] = {
        { "", all },
        { "*", all },
        { "* private-memory", all },
        { "private-held", "private-held" },
        { "conversions private-memory", "conversions" },
        { "conversion-latency,faults,private private-memory",
          "private faults conversion-latency" },
        { "none-of-these", "" },
    };
    QTestState *qts = start();
    g_autofree char *text = NULL;

    if (!can_tell_held(qts)) {
        g_test_skip("this kernel has no cachestat(2)");
        qtest_quit(qts);
        return;
    }
    convert_ok(qts, 1 * MiB, 3 * PAGE, true);
    for (int i = 0; i < ARRAY_SIZE(queries); i++) {
        g_autofree char *shown = shown_stats(qts, queries[i].arguments);

        g_assert_cmpstr(shown, ==, queries[i].shown);
    }
    text = qtest_hmp(qts, "info stats vm");
    g_assert_nonnull(strstr(text, "provider: private-memory\r\n"));
    g_assert_nonnull(strstr(text, "  conversions (cumulative): 1\r\n"));
    g_assert_nonnull(strstr(text, "  private (instant, B): 12288\r\n"));
    qtest_quit(qts);
}

/* Waits for @status of query-migrate. */
static void wait_for_migration(QTestState *qts, const char *status)
{
    /* The deadline only ends a test that has failed. */
    gint64 deadline = g_get_monotonic_time() + 60 * G_TIME_SPAN_SECOND;
    bool reached;

    do {
        QDict *response = qtest_qmp(qts, "{ 'execute': 'query-migrate' }");
        QDict *info = qdict_get_qdict(response, "return");
        const char *now = qdict_get_try_str(info, "status") ?: "none";

        g_assert_cmpstr(now, !=, "failed");
        g_assert_cmpint(g_get_monotonic_time(), <, deadline);
        reached = !strcmp(now, status);
        qobject_unref(response);
    } while (!reached);
}

static void set_bandwidth(QTestState *qts, uint64_t bytes)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate-set-parameters', "
                             "'arguments': { 'max-bandwidth': %" PRIu64 " } }",
                             bytes);
}

/* Contents and state go along, those that change meanwhile included. */
static void test_migration(void)
{
    QTestState *from = start(), *to;
    g_autofree char *file = g_strdup_printf("%s.migration", firmware_file);
    g_autofree char *uri = g_strdup_printf("file:%s", file);
    g_autofree char *picture = NULL;
    QDict *info;

    qtest_memset(from, 1 * MiB, 0x11, 8 * PAGE);
    convert_ok(from, 1 * MiB + PAGE, 3 * PAGE, true);
    qtest_memset(from, 1 * MiB + PAGE, 0x22, 2 * PAGE);
    qtest_memset(from, 8 * MiB, 0x33, 4 * MiB);
    convert_ok(from, 9 * MiB, 1 * MiB, true);
    qtest_memset(from, 9 * MiB, 0x44, 1 * MiB);

    /* So slow that it does not end by itself. */
    set_bandwidth(from, 16 * KiB);
    qtest_qmp_assert_success(from, "{ 'execute': 'migrate', "
                             "'arguments': { 'uri': %s } }", uri);
    wait_for_migration(from, "active");
    convert_ok(from, 1 * MiB + PAGE, PAGE, false);
    convert_ok(from, 1 * MiB + 6 * PAGE, PAGE, true);
    qtest_memset(from, 1 * MiB + 6 * PAGE, 0x55, PAGE);
    convert_ok(from, 10 * MiB, 1 * MiB, true);
    set_bandwidth(from, 1 * GiB);
    wait_for_migration(from, "completed");
    info = query(from, "ram0");
    picture = g_strdup(qdict_get_str(info, "picture"));
    qobject_unref(info);
    qtest_quit(from);

    to = start_with("-machine memory-backend=ram0 -object "
                    "memory-backend-private,id=ram0,size=64M,emulate=on "
                    "-incoming defer");
    qtest_qmp_assert_success(to, "{ 'execute': 'migrate-incoming', "
                             "'arguments': { 'uri': %s } }", uri);
    wait_for_migration(to, "completed");
    info = query(to, "ram0");
    g_assert_cmpstr(qdict_get_str(info, "picture"), ==, picture);
    g_assert_cmpint(qdict_get_int(info, "private"), ==, 3 * PAGE + 2 * MiB);
    qobject_unref(info);
    assert_page(to, 1 * MiB, 0x11);
    assert_page(to, 1 * MiB + PAGE, 0);
    assert_page(to, 1 * MiB + 2 * PAGE, 0x22);
    assert_page(to, 1 * MiB + 3 * PAGE, 0);
    assert_page(to, 1 * MiB + 5 * PAGE, 0x11);
    assert_page(to, 1 * MiB + 6 * PAGE, 0x55);
    assert_page(to, 9 * MiB - PAGE, 0x33);
    assert_page(to, 9 * MiB, 0x44);
    assert_page(to, 10 * MiB, 0);
    assert_page(to, 11 * MiB, 0x33);
    /* What was private is so for the library, too. */
    convert_ok(to, 1 * MiB, 8 * PAGE, false);
    assert_page(to, 1 * MiB, 0x11);
    assert_page(to, 1 * MiB + 2 * PAGE, 0);
    qtest_quit(to);
    unlink(file);
}

static void test_migration_refused(void)
{
    QTestState *qts = start();

    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate-set-parameters', "
                             "'arguments': { 'mode': 'cpr-reboot' } }");
    assert_error(qtest_qmp(qts, "{ 'execute': 'migrate', 'arguments': "
                           "{ 'uri': 'exec:cat > /dev/null' } }"),
                 "ram0", "cpr", "normal", NULL);
    assert_error(qtest_qmp(qts, "{ 'execute': 'migrate-set-capabilities', "
                           "'arguments': { 'capabilities': [ { 'capability': "
                           "'background-snapshot', 'state': true } ] } }"),
                 "not compatible with guest memory", NULL);
    qtest_quit(qts);

    qts = start_with("-machine memory-backend=ram0 -object "
                     "memory-backend-private,id=ram0,size=64M,emulate=on "
                     "-incoming defer");
    assert_error(qtest_qmp(qts, "{ 'execute': 'migrate-set-capabilities', "
                           "'arguments': { 'capabilities': [ { 'capability': "
                           "'postcopy-ram', 'state': true } ] } }"),
                 "Postcopy", NULL);
    qtest_quit(qts);
}

static void wait_for_job(QTestState *qts)
{
    gint64 deadline = g_get_monotonic_time() + 60 * G_TIME_SPAN_SECOND;
    bool concluded;

    do {
        QDict *response = qtest_qmp(qts, "{ 'execute': 'query-jobs' }");
        QList *jobs = qdict_get_qlist(response, "return");
        QDict *job = qobject_to(QDict, qlist_entry_obj(qlist_first(jobs)));

        g_assert_cmpstr(qdict_get_try_str(job, "error"), ==, NULL);
        g_assert_cmpint(g_get_monotonic_time(), <, deadline);
        concluded = !strcmp(qdict_get_str(job, "status"), "concluded");
        qobject_unref(response);
    } while (!concluded);
    qtest_qmp_assert_success(qts, "{ 'execute': 'job-dismiss', "
                             "'arguments': { 'id': 'job' } }");
}

/* A node 'disk' that can hold snapshots, in @file. */
static void add_disk(QTestState *qts, const char *file)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'blockdev-create', "
                             "'arguments': { 'job-id': 'job', 'options': "
                             "{ 'driver': 'file', 'filename': %s, "
                             "'size': 0 } } }", file);
    wait_for_job(qts);
    qtest_qmp_assert_success(qts, "{ 'execute': 'blockdev-add', "
                             "'arguments': { 'driver': 'file', "
                             "'node-name': 'file', 'filename': %s } }", file);
    qtest_qmp_assert_success(qts, "{ 'execute': 'blockdev-create', "
                             "'arguments': { 'job-id': 'job', 'options': "
                             "{ 'driver': 'qcow2', 'file': 'file', "
                             "'size': 1048576 } } }");
    wait_for_job(qts);
    qtest_qmp_assert_success(qts, "{ 'execute': 'blockdev-add', "
                             "'arguments': { 'driver': 'qcow2', "
                             "'node-name': 'disk', 'file': 'file' } }");
}

static void snapshot(QTestState *qts, const char *command)
{
    qtest_qmp_assert_success(qts, "{ 'execute': %s, 'arguments': "
                             "{ 'job-id': 'job', 'tag': 'tag', "
                             "'vmstate': 'disk', 'devices': [ 'disk' ] } }",
                             command);
    wait_for_job(qts);
}

/* Loading a snapshot brings back state and contents of both sides. */
static void test_snapshot(void)
{
    QTestState *qts = start();
    g_autofree char *file = g_strdup_printf("%s.qcow2", firmware_file);

    add_disk(qts, file);
    qtest_memset(qts, 1 * MiB, 0x11, 8 * PAGE);
    convert_ok(qts, 1 * MiB + PAGE, 3 * PAGE, true);
    qtest_memset(qts, 1 * MiB + PAGE, 0x22, 3 * PAGE);
    snapshot(qts, "snapshot-save");

    convert_ok(qts, 1 * MiB + 2 * PAGE, 4 * PAGE, false);
    convert_ok(qts, 1 * MiB + 5 * PAGE, 2 * PAGE, true);
    qtest_memset(qts, 1 * MiB, 0x33, 8 * PAGE);
    snapshot(qts, "snapshot-load");
    assert_figure(qts, "ram0", "private", 3 * PAGE);
    for (int page = 0; page < 8; page++) {
        assert_page(qts, 1 * MiB + page * PAGE,
                    page >= 1 && page < 4 ? 0x22 : 0x11);
    }
    convert_ok(qts, 1 * MiB, 8 * PAGE, false);
    assert_page(qts, 1 * MiB + 3 * PAGE, 0);
    assert_page(qts, 1 * MiB + 4 * PAGE, 0x11);
    qtest_quit(qts);
    unlink(file);
}

static QTestState *start_ram0(const char *properties)
{
    g_autofree char *more = g_strdup_printf(
        "-machine memory-backend=ram0 -object memory-backend-private,"
        "id=ram0,size=64M,emulate=on,%s", properties);

    return start_with(more);
}

static void test_initial_state(void)
{
    QTestState *qts = start_ram0("initial-state=private");

    assert_figure(qts, "ram0", "private", RAM_SIZE);
    qtest_memset(qts, 1 * MiB, 0x11, 2 * PAGE);
    convert_ok(qts, 1 * MiB, PAGE, false);
    assert_page(qts, 1 * MiB, 0);
    qtest_memset(qts, 1 * MiB, 0x22, PAGE);
    assert_page(qts, 1 * MiB + PAGE, 0x11);
    qtest_qmp_assert_success(qts, "{ 'execute': 'system_reset' }");
    qtest_qmp_eventwait(qts, "RESET");
    assert_figure(qts, "ram0", "private", RAM_SIZE);
    assert_page(qts, 1 * MiB, 0);
    assert_page(qts, 1 * MiB + PAGE, 0);
    qtest_quit(qts);
}

/* A store that is not to discard shows old contents again. */
static void test_discard(void)
{
    static const struct {
        const char *discard;
        uint8_t private_again, shared_again;
    } modes[] = {
        { "discard=both", 0, 0 },
        { "discard=private", 0, 0x11 },
        { "discard=shared", 0x22, 0 },
        { "discard=none", 0x22, 0x11 },
    };

    for (int i = 0; i < ARRAY_SIZE(modes); i++) {
        QTestState *qts = start_ram0(modes[i].discard);

        qtest_memset(qts, 1 * MiB, 0x11, PAGE);
        convert_ok(qts, 1 * MiB, PAGE, true);
        assert_page(qts, 1 * MiB, 0);
        qtest_memset(qts, 1 * MiB, 0x22, PAGE);
        convert_ok(qts, 1 * MiB, PAGE, false);
        assert_page(qts, 1 * MiB, modes[i].shared_again);
        convert_ok(qts, 1 * MiB, PAGE, true);
        assert_page(qts, 1 * MiB, modes[i].private_again);
        qtest_quit(qts);
    }
}

/* All memory is taken at first, and stays taken whichever side it is on. */
static void test_prealloc(void)
{
    QTestState *qts = start_ram0("prealloc=on,prealloc-threads=2");

    if (can_tell_held(qts)) {
        assert_figure(qts, "ram0", "shared-held", RAM_SIZE);
        assert_figure(qts, "ram0", "private-held", 0);
        convert_ok(qts, 1 * MiB, 5 * PAGE, true);
        assert_figure(qts, "ram0", "shared-held", RAM_SIZE - 5 * PAGE);
        assert_figure(qts, "ram0", "private-held", 5 * PAGE);
        assert_figure(qts, "ram0", "held-twice", 0);
    } else {
        g_test_skip("this kernel has no cachestat(2)");
    }
    qtest_quit(qts);
}

/* A machine that is loaded holds all of its memory as well. */
static void test_prealloc_loaded(void)
{
    g_autofree char *file = g_strdup_printf("%s.migration", firmware_file);
    g_autofree char *uri = g_strdup_printf("file:%s", file);
    QTestState *qts = start();

    if (!can_tell_held(qts)) {
        g_test_skip("this kernel has no cachestat(2)");
        qtest_quit(qts);
        return;
    }
    convert_ok(qts, 16 * MiB, 16 * MiB, true);
    qtest_memset(qts, 16 * MiB, 0x11, 5 * PAGE);
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate', "
                             "'arguments': { 'uri': %s } }", uri);
    wait_for_migration(qts, "completed");
    qtest_quit(qts);

    qts = start_ram0("prealloc=on -incoming defer");
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate-incoming', "
                             "'arguments': { 'uri': %s } }", uri);
    wait_for_migration(qts, "completed");
    assert_figure(qts, "ram0", "private", 16 * MiB);
    assert_figure(qts, "ram0", "private-held", 16 * MiB);
    assert_figure(qts, "ram0", "shared-held", RAM_SIZE - 16 * MiB);
    assert_figure(qts, "ram0", "held-twice", 0);
    assert_page(qts, 16 * MiB, 0x11);
    assert_page(qts, 32 * MiB - PAGE, 0);
    qtest_quit(qts);
    unlink(file);
}

/*
 * A legacy virtio balloon, which wants no more than I/O ports.
 */
#define BALLOON_PORT 0xc000
#define QUEUE_PAGE 1024             /* 4 MiB, shared */
#define QUEUE (QUEUE_PAGE * PAGE)
#define BUFFER (QUEUE + 16 * PAGE)

static void balloon_start(QTestState *qts, uint16_t queue, uint32_t features)
{
    /* Bus 0, device 4: I/O BAR, I/O space and bus master. */
    qtest_outl(qts, 0xcf8, 0x80002010);
    qtest_outl(qts, 0xcfc, BALLOON_PORT);
    qtest_outl(qts, 0xcf8, 0x80002004);
    qtest_outw(qts, 0xcfc, 5);

    qtest_outb(qts, BALLOON_PORT + 0x12, 0);
    qtest_outb(qts, BALLOON_PORT + 0x12, 3);
    qtest_outl(qts, BALLOON_PORT + 0x04, features);
    qtest_outw(qts, BALLOON_PORT + 0x0e, queue);
    qtest_memset(qts, QUEUE, 0, 16 * PAGE);
    qtest_outl(qts, BALLOON_PORT + 0x08, QUEUE_PAGE);
    qtest_outb(qts, BALLOON_PORT + 0x12, 7);
}

/* Hands over one buffer; it has been used on return. */
static void balloon_send(QTestState *qts, uint16_t queue, uint64_t address,
                         uint32_t length, bool is_write)
{
    uint16_t size = qtest_inw(qts, BALLOON_PORT + 0x0c);
    uint64_t avail = QUEUE + size * 16;
    uint64_t used = ROUND_UP(avail + 6 + size * 2, PAGE);
    uint16_t index = qtest_readw(qts, avail + 2);

    qtest_writeq(qts, QUEUE, address);
    qtest_writel(qts, QUEUE + 8, length);
    qtest_writew(qts, QUEUE + 12, is_write ? 2 : 0);
    qtest_writew(qts, avail + 4 + index % size * 2, 0);
    qtest_writew(qts, avail + 2, index + 1);
    qtest_outw(qts, BALLOON_PORT + 0x10, queue);
    g_assert_cmpint(qtest_readw(qts, used + 2), ==, (uint16_t)(index + 1));
}

/* Pages that the guest gives away, or reports as free, go on either side. */
static void test_balloon(void)
{
    QTestState *qts = start_with(
        "-machine memory-backend=ram0 -object "
        "memory-backend-private,id=ram0,size=64M,emulate=on "
        "-device virtio-balloon-pci,disable-modern=on,addr=4,"
        "free-page-reporting=on");

    qtest_memset(qts, 8 * MiB, 0x11, 8 * PAGE);
    convert_ok(qts, 8 * MiB + 2 * PAGE, 4 * PAGE, true);
    qtest_memset(qts, 8 * MiB + 2 * PAGE, 0x22, 4 * PAGE);

    balloon_start(qts, 0, 0);
    qtest_writel(qts, BUFFER, 8 * MiB / PAGE + 1);
    qtest_writel(qts, BUFFER + 4, 8 * MiB / PAGE + 2);
    balloon_send(qts, 0, BUFFER, 8, false);
    assert_page(qts, 8 * MiB, 0x11);
    assert_page(qts, 8 * MiB + PAGE, 0);
    assert_page(qts, 8 * MiB + 2 * PAGE, 0);
    assert_page(qts, 8 * MiB + 3 * PAGE, 0x22);

    balloon_start(qts, 3, 1 << 5);
    balloon_send(qts, 3, 8 * MiB + 4 * PAGE, 3 * PAGE, true);
    assert_page(qts, 8 * MiB + 3 * PAGE, 0x22);
    assert_page(qts, 8 * MiB + 4 * PAGE, 0);
    assert_page(qts, 8 * MiB + 5 * PAGE, 0);
    assert_page(qts, 8 * MiB + 6 * PAGE, 0);
    assert_page(qts, 8 * MiB + 7 * PAGE, 0x11);
    assert_figure(qts, "ram0", "private", 4 * PAGE);
    if (can_tell_held(qts)) {
        assert_figure(qts, "ram0", "held-twice", 0);
    }
    qtest_quit(qts);
}

static uint64_t listener_figure(QTestState *qts, const char *name)
{
    QDict *response = qtest_qmp(qts, "{ 'execute': 'qom-get', 'arguments': "
                                "{ 'path': '/machine/peripheral/l', "
                                "'property': %s } }", name);
    uint64_t value = qdict_get_int(response, "return");

    qobject_unref(response);
    return value;
}

static void set_listener(QTestState *qts, const char *name, uint64_t value)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'qom-set', 'arguments': "
                             "{ 'path': '/machine/peripheral/l', "
                             "'property': %s, 'value': %" PRIu64 " } }", name,
                             value);
}

/* A listener maps what is shared, is called per run, and may refuse. */
static void test_listener(void)
{
    QTestState *qts = start_with(
        "-machine memory-backend=ram0 "
        "-object memory-backend-private,id=ram0,size=64M,emulate=on "
        "-device private-memory-testdev,id=l,memdev=ram0");
    uint64_t calls;

    g_assert_cmpint(listener_figure(qts, "mapped"), ==, RAM_SIZE);
    for (int run = 0; run < 4; run++) {
        convert_ok(qts, 1 * MiB + run * 4 * PAGE, 2 * PAGE, true);
        qtest_memset(qts, 1 * MiB + run * 4 * PAGE, 0x66, 2 * PAGE);
    }
    g_assert_cmpint(listener_figure(qts, "mapped"), ==, RAM_SIZE - 8 * PAGE);
    g_assert_cmpint(listener_figure(qts, "discards"), ==, 4);

    /* The third of four runs is refused: nothing changes, not even contents. */
    calls = listener_figure(qts, "populates");
    set_listener(qts, "refuse", calls + 3);
    assert_error(convert(qts, 1 * MiB, 16 * PAGE, false), "listener",
                 "No space left", NULL);
    g_assert_cmpint(listener_figure(qts, "mapped"), ==, RAM_SIZE - 8 * PAGE);
    assert_figure(qts, "ram0", "private", 8 * PAGE);
    for (int run = 0; run < 4; run++) {
        assert_page(qts, 1 * MiB + run * 4 * PAGE, 0x66);
    }

    convert_ok(qts, 1 * MiB, 16 * PAGE, false);
    g_assert_cmpint(listener_figure(qts, "mapped"), ==, RAM_SIZE);
    g_assert_cmpint(listener_figure(qts, "populates"), ==, calls + 3 + 4);

    /* What it does not give up stays shared, and is as it was. */
    convert_ok(qts, 1 * MiB + 4 * PAGE, PAGE, true);
    qtest_memset(qts, 1 * MiB, 0x77, 4 * PAGE);
    set_listener(qts, "cling", listener_figure(qts, "discards") + 2);
    assert_error(convert(qts, 1 * MiB, 8 * PAGE, true), "listener",
                 "Input/output error", NULL);
    g_assert_cmpint(listener_figure(qts, "mapped"), ==, RAM_SIZE - PAGE);
    assert_figure(qts, "ram0", "private", PAGE);
    assert_page(qts, 1 * MiB, 0x77);
    convert_ok(qts, 1 * MiB, 8 * PAGE, true);
    g_assert_cmpint(listener_figure(qts, "mapped"), ==, RAM_SIZE - 8 * PAGE);
    qtest_quit(qts);
}

static int64_t dump_size(QTestState *qts, const char *file)
{
    GStatBuf status;

    qtest_qmp_assert_success(qts, "{ 'execute': 'dump-guest-memory', "
                             "'arguments': { 'paging': false, "
                             "'protocol': %s } }", file);
    g_assert_cmpint(g_stat(file + strlen("file:"), &status), ==, 0);
    return status.st_size;
}

/* A dump leaves private memory out, and takes no page for it. */
static void test_dump(void)
{
    QTestState *qts = start();
    g_autofree char *file = g_strdup_printf("file:%s.dump", firmware_file);
    int64_t all, less;

    all = dump_size(qts, file);
    convert_ok(qts, 16 * MiB, 16 * MiB, true);
    less = dump_size(qts, file);
    unlink(file + strlen("file:"));
    /* The gap costs one more header. */
    g_assert_cmpint(all - less, <=, 16 * MiB);
    g_assert_cmpint(all - less, >, 16 * MiB - PAGE);
    assert_figure(qts, "ram0", "held-twice", 0);
    qtest_quit(qts);
}

/* QEMU ends at once, with a message that has the words up to a NULL. */
static void G_GNUC_NULL_TERMINATED assert_no_start(const char *options, ...)
{
    g_autofree char *command = g_strdup_printf(
        "%s -M q35 -nodefaults -display none -accel qtest -m 64M -bios %s %s",
        g_getenv("QTEST_QEMU_BINARY"), firmware_file, options);
    g_autofree char *text = NULL;
    const char *word;
    va_list words;
    int status;

    g_assert_true(g_spawn_command_line_sync(command, NULL, &text, &status,
                                            NULL));
    g_assert_true(WIFEXITED(status));
    g_assert_cmpint(WEXITSTATUS(status), ==, 1);
    va_start(words, options);
    while ((word = va_arg(words, const char *))) {
        if (!strstr(text, word)) {
            g_error("no '%s' in: %s", word, text);
        }
    }
    va_end(words);
}

static void test_bad_command_lines(void)
{
    assert_no_start("-object sw-protected-guest,id=cgs0 "
                    "-machine confidential-guest-support=cgs0,"
                    "memory-backend=ram0 -object "
                    "memory-backend-private,id=ram0,size=64M,emulate=on",
                    "'ram0'", "'emulate'", "confidential guest", "leave", NULL);
    assert_no_start("-object "
                    "sw-protected-guest,id=cgs0,x-require-guest-memfd=on "
                    "-machine confidential-guest-support=cgs0,"
                    "memory-backend=ram0 "
                    "-object memory-backend-private,id=ram0,size=64M",
                    "'ram0'", "'x-require-guest-memfd'", "leave",
                    "another memory backend", NULL);
    assert_no_start("-smp 2 -object "
                    "memory-backend-private,id=ram0,size=32M,emulate=on "
                    "-numa node,memdev=ram0 -numa node,memdev=ram0",
                    "ram0", "multiple times", NULL);
    assert_no_start("-m 64M,maxmem=1G -object "
                    "memory-backend-private,id=p0,size=64M,emulate=on "
                    "-device virtio-mem-pci,memdev=p0",
                    "'memdev'", "memory-backend-private",
                    "another memory backend", NULL);
}

static uint16_t wait_for_change(QTestState *qts, uint64_t address,
                                uint16_t from)
{
    /* The deadline only ends a test that has failed. */
    gint64 deadline = g_get_monotonic_time() + 60 * G_TIME_SPAN_SECOND;
    uint16_t now;

    do {
        now = qtest_readw(qts, address);
        g_assert_cmpint(g_get_monotonic_time(), <, deadline);
    } while (now == from);
    return now;
}

/*
 * The page of the routine at 0x8000 becomes private: zeroes, which do nothing
 * and lead to the routine at 0x9000. Code translated before must not run.
 */
static void test_translated_code(void)
{
    QTestState *qts;
    uint16_t count;

    if (!qtest_has_accel("tcg")) {
        g_test_skip("this QEMU has no TCG");
        return;
    }
    qts = start_with("-accel tcg -machine memory-backend=ram0 -object "
                     "memory-backend-private,id=ram0,size=64M,emulate=on");
    wait_for_change(qts, 0x500, 0);
    g_assert_cmpint(qtest_readw(qts, 0x504), ==, 0);
    qtest_qmp_assert_success(qts, "{ 'execute': 'stop' }");
    count = qtest_readw(qts, 0x500);
    convert_ok(qts, 0x8000, PAGE, true);
    qtest_qmp_assert_success(qts, "{ 'execute': 'cont' }");
    wait_for_change(qts, 0x504, 0);
    /* A call that had begun may end as it began. */
    g_assert_cmpint((uint16_t)(qtest_readw(qts, 0x500) - count), <=, 1);
    qtest_quit(qts);
}

/* How far the two counters are apart; the VM is stopped. */
static uint16_t apart(QTestState *qts)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'stop' }");
    return qtest_readw(qts, 0x1500) - qtest_readw(qts, 0x500);
}

/* One counter moves while the guest counts there, and loses nothing. */
static void test_relocate_while_running(void)
{
    g_autofree char *filename = NULL, *file = NULL;
    uint16_t before, change;
    QTestState *qts;
    QDict *response;
    int fd;

    if (!qtest_has_accel("tcg")) {
        g_test_skip("this QEMU has no TCG");
        return;
    }
    fd = g_file_open_tmp("private-memory-test-XXXXXX", &filename, NULL);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, PAGE), ==, 0);
    file = g_strdup_printf(", 'filename': '%s'", filename);
    qts = start_with("-accel tcg -machine memory-backend=ram0 -object "
                     "memory-backend-private,id=ram0,size=64M,emulate=on");
    wait_for_change(qts, 0x500, 0);
    convert_ok(qts, 0, PAGE, true);
    wait_for_change(qts, 0x500, 0);
    before = apart(qts);
    qtest_qmp_assert_success(qts, "{ 'execute': 'cont' }");
    for (int i = 0; i < 100; i++) {
        response = relocate(qts, 0, PAGE, i % 2 ? "" : file);
        if (!i && qdict_haskey(response, "error")) {
            /* A host may keep userfaultfd(2) from QEMU. */
            assert_error(response, "userfaultfd", NULL);
            g_test_skip("this host lets no memory move");
            break;
        }
        g_assert_true(qdict_haskey(response, "return"));
        qobject_unref(response);
        wait_for_change(qts, 0x500, qtest_readw(qts, 0x500));
    }
    /* A round that had begun may have counted at one of them only. */
    change = apart(qts) - before;
    g_assert_cmpint((uint16_t)(change + 1), <=, 2);
    qtest_quit(qts);
    close(fd);
    unlink(filename);
}

int main(int argc, char **argv)
{
    int ret;

    g_test_init(&argc, &argv, NULL);
    write_firmware();
    qtest_add_func("/private-memory/convert", test_convert);
    qtest_add_func("/private-memory/extents", test_extents);
    qtest_add_func("/private-memory/extents-of-some", test_extents_of_some);
    qtest_add_func("/private-memory/bad-queries", test_bad_queries);
    qtest_add_func("/private-memory/held", test_held);
    qtest_add_func("/private-memory/bad-conversions", test_bad_conversions);
    qtest_add_func("/private-memory/bad-objects", test_bad_objects);
    qtest_add_func("/private-memory/object-add-del", test_object_add_del);
    qtest_add_func("/private-memory/set-properties", test_set_properties);
    qtest_add_func("/private-memory/fd-limit", test_fd_limit);
    qtest_add_func("/private-memory/numa", test_numa);
    qtest_add_func("/private-memory/relocate", test_relocate);
    qtest_add_func("/private-memory/relocate-while-running",
                   test_relocate_while_running);
    qtest_add_func("/private-memory/resets", test_resets);
    qtest_add_func("/private-memory/reset-invalidates",
                   test_reset_invalidates);
    qtest_add_func("/private-memory/wakeup", test_wakeup);
    qtest_add_func("/private-memory/stops", test_stops);
    qtest_add_func("/private-memory/hmp", test_hmp);
    qtest_add_func("/private-memory/hmp-width", test_hmp_width);
    qtest_add_func("/private-memory/hmp-convert", test_hmp_convert);
    qtest_add_func("/private-memory/failed-conversions",
                   test_failed_conversions);
    qtest_add_func("/private-memory/stats", test_stats);
    qtest_add_func("/private-memory/hmp-stats", test_hmp_stats);
    qtest_add_func("/private-memory/migration", test_migration);
    qtest_add_func("/private-memory/migration-refused",
                   test_migration_refused);
    qtest_add_func("/private-memory/snapshot", test_snapshot);
    qtest_add_func("/private-memory/initial-state", test_initial_state);
    qtest_add_func("/private-memory/discard", test_discard);
    qtest_add_func("/private-memory/prealloc", test_prealloc);
    qtest_add_func("/private-memory/prealloc-loaded", test_prealloc_loaded);
    qtest_add_func("/private-memory/balloon", test_balloon);
    qtest_add_func("/private-memory/listener", test_listener);
    qtest_add_func("/private-memory/dump", test_dump);
    qtest_add_func("/private-memory/bad-command-lines",
                   test_bad_command_lines);
    qtest_add_func("/private-memory/translated-code", test_translated_code);
    ret = g_test_run();
    unlink(firmware_file);
    g_free(firmware_file);
    return ret;
}
