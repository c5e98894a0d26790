/*
 * Each exported function with arguments that it must refuse: NULL, no or broken GUIDs, paths of 4095 bytes and more, paths
 * that are not UTF-8, short buffers, objects that are closed or of another origin. Each call answers with an error, writes no
 * file, leaves no descriptor open, and touches nothing behind the buffer that it was given.
 *
 * Usage: hostile EMPTY-FOLDER SYMBOL...     a symbol without a row in the table below is a failure
 * With $HOSTILE_PANIC each function of a debug build panics instead, and the caller gets an error and lives.
 */
#include "../common.h"

#include <dirent.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>

/* What a function returns when it refuses. */
enum answer {
    CODE,    /* a positive SYSEXIT code */
    NONZERO, /* anything but 0: -1, 1 or a code */
    MINUS,   /* -1 */
    NO,      /* 0 */
    NOTHING, /* NULL */
    ANY,     /* what it does has no error, or no result */
};

/*
 * Arguments, a letter each:
 *   d object, must be there          D object, may be NULL
 *   p path, name or text, must be there    q may be NULL (a hostile one is refused)    f may be anything
 *   g GUID, must be there            h GUID, may be NULL            c name of at most 63 bytes of UTF-8, may be NULL
 *   v GUID, is judged
 *   b buffer, followed by
 *   l   its size                     o place for a result, must be there    O may be NULL
 *   s struct of parameters           i number    n the number -1    z the number 0
 */
static const struct row {
    const char *name, *arguments;
    enum answer answer;
} rows[] = {
    {"check_dd", "dh", CODE},
    {"check_deltas_same", "pp", CODE},
    {"create_snapshot", "ppz", CODE},
    {"find_image_by_guid", "dg", NOTHING},
    {"find_level_by_delta", "ppo", CODE},
    {"find_snapshot_by_guid", "dg", MINUS},
    {"get_balloon", "pOO", CODE},
    {"get_delta_info", "ps", CODE},
    {"guidcmp", "pp", ANY},
    {"is_valid_guid", "v", NO},
    {"make_images_list", "dgz", NOTHING},
    {"merge_image", "qzzzzop", CODE},
    {"mntn2str", "i", ANY},
    {"ploop_balloon_change_size", "pni", CODE},
    {"ploop_balloon_check_and_repair", "ppz", CODE},
    {"ploop_balloon_clear_state", "p", CODE},
    {"ploop_balloon_complete", "p", CODE},
    {"ploop_balloon_get_state", "po", CODE},
    {"ploop_cancel_operation", "", ANY},
    {"ploop_change_fmt_version", "dii", CODE},
    {"ploop_check", "pno", CODE},
    {"ploop_close_dd", "D", ANY},
    {"ploop_complete_running_operation", "f", ANY},
    {"ploop_convert_image", "dnz", NONZERO},
    {"ploop_copy_receive", "s", CODE},
    {"ploop_copy_send", "s", CODE},
    {"ploop_create_dd", "ps", CODE},
    {"ploop_create_image", "s", CODE},
    {"ploop_create_snapshot", "ds", CODE},
    {"ploop_create_temporary_snapshot", "dsO", CODE},
    {"ploop_delete_snapshot", "dg", CODE},
    {"ploop_delete_top_delta", "d", CODE},
    {"ploop_discard", "ds", NONZERO},
    {"ploop_discard_by_dev", "ppiiO", NONZERO},
    {"ploop_discard_get_stat", "do", CODE},
    {"ploop_discard_get_stat_by_dev", "ppo", CODE},
    {"ploop_find_dev", "qpbl", NONZERO},
    {"ploop_find_parent_by_guid", "dg", NOTHING},
    {"ploop_find_top_delta_name_and_format", "pblbl", CODE},
    {"ploop_free_array", "D", ANY},
    {"ploop_free_diskdescriptor", "D", ANY},
    {"ploop_get_attr", "ppo", MINUS},
    {"ploop_get_base_delta_fname", "dbl", CODE},
    {"ploop_get_base_delta_uuid", "d", NOTHING},
    {"ploop_get_dev", "dbl", NONZERO},
    {"ploop_get_dev_by_mnt", "pbl", NONZERO},
    {"ploop_get_devs", "do", NONZERO},
    {"ploop_get_info_by_descr", "po", NONZERO},
    {"ploop_get_last_error", "", ANY},
    {"ploop_get_max_size", "io", CODE},
    {"ploop_get_mnt_by_dev", "pbl", NONZERO},
    {"ploop_get_partition_by_mnt", "pbl", NONZERO},
    {"ploop_get_spec", "do", CODE},
    {"ploop_get_top_delta_fname", "dbl", CODE},
    {"ploop_getdevice", "o", MINUS},
    {"ploop_grow_delta_offline", "pi", CODE},
    {"ploop_grow_device", "pi", CODE},
    {"ploop_grow_image", "dz", CODE},
    {"ploop_grow_raw_delta_offline", "pi", CODE},
    {"ploop_is_large_disk_supported", "", ANY},
    {"ploop_is_mounted", "d", MINUS},
    {"ploop_merge_snapshot", "ds", CODE},
    {"ploop_mount", "Dosz", CODE},
    {"ploop_mount_image", "ds", CODE},
    {"ploop_mount_snapshot", "ds", CODE},
    {"ploop_open_dd", "op", CODE},
    {"ploop_read_disk_descr", "op", NONZERO},
    {"ploop_receive", "p", CODE},
    {"ploop_replace_image", "ds", CODE},
    {"ploop_resize_image", "ds", CODE},
    {"ploop_resolve_functions", "o", ANY},
    {"ploop_restore_descriptor", "ppzz", CODE},
    {"ploop_send", "pnqz", CODE},
    {"ploop_set_component_name", "dc", CODE},
    {"ploop_set_log_file", "q", MINUS},
    {"ploop_set_log_level", "i", ANY},
    {"ploop_set_max_delta_size", "di", CODE},
    {"ploop_set_verbose_level", "n", ANY},
    {"ploop_store_diskdescriptor", "pd", NONZERO},
    {"ploop_switch_snapshot", "dgz", CODE},
    {"ploop_switch_snapshot_ex", "ds", CODE},
    {"ploop_umount", "pD", CODE},
    {"ploop_umount_image", "d", CODE},
    {"ploop_uuid_generate", "bl", CODE},
    {"read_line", "pbl", MINUS},
    {"replace_delta", "pnp", CODE},
};
#define ROWS (sizeof(rows) / sizeof(rows[0]))

/* Members of the structs of parameters that are strings: the function is called with a hostile one in each. */
static const struct member {
    const char *name;
    size_t offset;
    char kind; /* p path or text, g GUID */
} members[] = {
#define MEMBER(function, type, field, kind) {function, offsetof(struct type, field), kind}
    MEMBER("ploop_create_image", ploop_create_param, image, 'p'),
    MEMBER("ploop_create_image", ploop_create_param, fstype, 'p'),
    MEMBER("ploop_create_dd", ploop_create_param, image, 'p'),
    MEMBER("ploop_create_dd", ploop_create_param, fstype, 'p'),
    MEMBER("ploop_mount_image", ploop_mount_param, target, 'p'),
    MEMBER("ploop_mount_image", ploop_mount_param, guid, 'g'),
    MEMBER("ploop_mount_image", ploop_mount_param, fstype, 'p'),
    MEMBER("ploop_mount_image", ploop_mount_param, mount_data, 'p'),
    MEMBER("ploop_mount_snapshot", ploop_mount_param, guid, 'g'),
    MEMBER("ploop_mount", ploop_mount_param, target, 'p'),
    MEMBER("ploop_create_snapshot", ploop_snapshot_param, guid, 'g'),
    MEMBER("ploop_create_snapshot", ploop_snapshot_param, snap_dir, 'p'),
    MEMBER("ploop_create_temporary_snapshot", ploop_tsnapshot_param, guid, 'g'),
    MEMBER("ploop_create_temporary_snapshot", ploop_tsnapshot_param, component_name, 'p'),
    MEMBER("ploop_create_temporary_snapshot", ploop_tsnapshot_param, snap_dir, 'p'),
    MEMBER("ploop_merge_snapshot", ploop_merge_param, guid, 'g'),
    MEMBER("ploop_merge_snapshot", ploop_merge_param, guid2, 'g'),
    MEMBER("ploop_merge_snapshot", ploop_merge_param, new_delta, 'p'),
    MEMBER("ploop_switch_snapshot_ex", ploop_snapshot_switch_param, guid, 'g'),
    MEMBER("ploop_replace_image", ploop_replace_param, file, 'p'),
    MEMBER("ploop_replace_image", ploop_replace_param, guid, 'g'),
    MEMBER("ploop_replace_image", ploop_replace_param, cur_file, 'p'),
    MEMBER("ploop_copy_send", ploop_copy_send_param, device, 'p'),
    MEMBER("ploop_copy_receive", ploop_copy_receive_param, file, 'p'),
};

typedef long (*function)(long, long, long, long, long, long, long);

#define MOST 7
#define GUARD 64

static struct ploop_disk_images_data *disk;
static char deep[4096], longer[5000], foreign[120], parameters[512], result[4096], component[4096];
static char *no_list[] = {NULL, NULL, NULL};
static long calls;

static const char *const guids[] = {
    "", "no guid", "{11111111-2222-3333-4444-55555555555}", "{11111111-2222-3333-4444-5555555555555}",
    "{11111111-2222-3333-4444-55555555555g}", "{11111111x2222-3333-4444-555555555555}", "{\xff\xfe}", longer,
    "{99999999-2222-3333-4444-555555555555}", /* well formed, of no snapshot */
};
#define GUIDS (sizeof(guids) / sizeof(guids[0]))
static const char *const paths[] = {"", deep, longer, component, "\xff\xfe/\xfd", "missing/\xff", "missing/x"};
#define PATHS (sizeof(paths) / sizeof(paths[0]))

/* Number of open descriptors, but for the one that counts. */
static int descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int n = 0;

    if (!dir)
        die("/proc/self/fd: %s", strerror(errno));
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

/* Names, sizes, times and kinds of all files in the working folder. */
static uint64_t folder(void)
{
    DIR *dir = opendir(".");
    uint64_t sum = 0;
    struct dirent *e;
    struct stat st;

    if (!dir)
        die("opendir: %s", strerror(errno));
    while ((e = readdir(dir))) {
        uint64_t h = 1469598103934665603ULL;
        const char *c;

        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..") || lstat(e->d_name, &st))
            continue;
        for (c = e->d_name; *c; c++)
            h = (h ^ (unsigned char)*c) * 1099511628211ULL;
        h = (h ^ st.st_size) * 1099511628211ULL;
        h = (h ^ st.st_mtim.tv_nsec ^ st.st_mtim.tv_sec) * 1099511628211ULL;
        sum += (h ^ st.st_ino) * 1099511628211ULL;
    }
    closedir(dir);
    return sum;
}

static void complain(const struct row *row, const char *what, long got)
{
    failures++;
    fprintf(stderr, "%s, %s: returned %ld, last error: %s\n", row->name, what, got, ploop_get_last_error());
}

static void call(const struct row *row, function f, const long *a, const char *what)
{
    int open_before = descriptors();
    uint64_t before = folder();
    long got;
    int number;

    calls++;
    got = f(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    number = (int)got;
    switch (row->answer) {
    case CODE:
        if (number <= 0 || number > 43)
            complain(row, what, number);
        break;
    case NONZERO:
        if (number == 0 || number < -1 || number > 43)
            complain(row, what, number);
        break;
    case MINUS:
        if (number != -1)
            complain(row, what, number);
        break;
    case NO:
        if (number != 0)
            complain(row, what, number);
        break;
    case NOTHING:
        if (got != 0)
            complain(row, what, got);
        break;
    case ANY:
        break;
    }
    if (folder() != before)
        complain(row, "a file was written", number);
    if (descriptors() != open_before)
        complain(row, "a descriptor was left open", number);
}

/* Arguments of which each is right for itself, and which no function can do anything with. */
static void harmless(const struct row *row, long *a)
{
    static int stop = 1;
    size_t i;

    memset(a, 0, MOST * sizeof(*a));
    memset(parameters, 0, sizeof(parameters));
    if (!strcmp(row->name, "ploop_mount_image") || !strcmp(row->name, "ploop_mount") || !strcmp(row->name, "ploop_mount_snapshot"))
        ((struct ploop_mount_param *)parameters)->target = "missing";
    if (!strcmp(row->name, "ploop_copy_send"))
        ((struct ploop_copy_send_param *)parameters)->ofd = -1;
    if (!strcmp(row->name, "ploop_copy_receive"))
        ((struct ploop_copy_receive_param *)parameters)->ifd = -1;
    if (!strcmp(row->name, "ploop_create_snapshot") || !strcmp(row->name, "ploop_create_temporary_snapshot"))
        ((struct ploop_snapshot_param *)parameters)->snap_dir = NULL;
    memset(result, 0, sizeof(result));
    for (i = 0; row->arguments[i]; i++) {
        switch (row->arguments[i]) {
        case 'd':
            a[i] = (long)disk;
            break;
        case 'p':
        case 'q':
            a[i] = (long)"missing/x";
            break;
        case 'g':
        case 'h':
            a[i] = (long)guids[GUIDS - 1];
            break;
        case 'b':
            a[i] = (long)result;
            break;
        case 'l':
            a[i] = sizeof(result) - GUARD;
            break;
        case 'o':
            a[i] = !strcmp(row->name, "ploop_mount") || !strcmp(row->name, "merge_image") ? (long)no_list : (long)result;
            break;
        case 'O':
            a[i] = row->name[0] == 'g' ? 0 : (long)&stop;
            break;
        case 's':
            a[i] = (long)parameters;
            break;
        case 'n':
            a[i] = -1;
            break;
        case 'i':
            a[i] = 3;
            break;
        }
    }
}

static void texts(const struct row *row, function f, long *a, size_t at, const char *const *list, size_t n, const char *what)
{
    size_t i;

    for (i = 0; i < n; i++) {
        harmless(row, a);
        a[at] = (long)list[i];
        call(row, f, a, what);
    }
}

/* What a function does with a hostile argument in each place. */
static void one(const struct row *row, function f)
{
    /* A closed object may be where the next one is. */
    struct ploop_disk_images_data *closed = NULL;
    long a[MOST];
    size_t i;
    int len;

    for (i = 0; row->arguments[i]; i++) {
        char kind = row->arguments[i];

        if (strchr("dpgobs", kind) && !(kind == 'b' && !strcmp(row->name, "ploop_find_top_delta_name_and_format"))) {
            harmless(row, a);
            a[i] = 0;
            call(row, f, a, "NULL");
        }
        switch (kind) {
        case 'd':
        case 'D':
            if (!strcmp(row->name, "ploop_free_array"))
                break;
            harmless(row, a);
            memset(foreign, 0, sizeof(foreign));
            a[i] = (long)foreign;
            call(row, f, a, "an object of another origin");
            memset(foreign, 0x7f, sizeof(foreign));
            call(row, f, a, "an object that was never made");
            if (ploop_open_dd(&closed, "DiskDescriptor.xml"))
                die("ploop_open_dd: %s", ploop_get_last_error());
            ploop_close_dd(closed);
            a[i] = (long)closed;
            call(row, f, a, "an object that was closed");
            break;
        case 'p':
        case 'q':
        case 'f':
            texts(row, f, a, i, paths + (kind == 'q'), PATHS - (kind == 'q'), "a hostile path");
            break;
        case 'c':
            texts(row, f, a, i, paths + 1, PATHS - 2, "a hostile name");
            break;
        case 'g':
        case 'h':
            texts(row, f, a, i, guids, GUIDS, "a bad GUID");
            break;
        case 'v':
            texts(row, f, a, i, guids, GUIDS - 1, "a bad GUID");
            break;
        case 'l':
            for (len = -1; len < 2; len++) {
                size_t k;

                harmless(row, a);
                memset(result, 'x', sizeof(result));
                a[i] = len;
                /* A size_t of -1 is the largest one. */
                if (len < 0 && !strcmp(row->name, "ploop_find_top_delta_name_and_format"))
                    continue;
                call(row, f, a, "a short buffer");
                for (k = 1; k < sizeof(result); k++)
                    if (result[k] != 'x') {
                        complain(row, "it wrote behind a short buffer", len);
                        break;
                    }
            }
            break;
        case 'i':
        case 'n': {
            static const long numbers[] = {0, 1, 2, -1, -2, INT_MAX, INT_MIN};
            size_t k;

            for (k = 0; row->answer == ANY && k < sizeof(numbers) / sizeof(numbers[0]); k++) {
                harmless(row, a);
                a[i] = numbers[k];
                call(row, f, a, "a number");
            }
            break;
        }
        }
    }
    for (i = 0; i < sizeof(members) / sizeof(members[0]); i++) {
        int is_guid = members[i].kind == 'g';
        size_t k, n = is_guid ? GUIDS : PATHS, place = strchr(row->arguments, 's') - row->arguments;

        if (strcmp(members[i].name, row->name) != 0)
            continue;
        /* NULL and "" mean a default for most of them. */
        for (k = 1; k < n; k++) {
            struct ploop_tsnapshot_param *p = (void *)parameters;

            harmless(row, a);
            a[place] = (long)parameters;
            if (!strcmp(row->name, "ploop_create_temporary_snapshot")) {
                p->guid = "{99999999-2222-3333-4444-555555555555}";
                p->component_name = "c";
                p->snap_dir = "missing";
            } else if (!strcmp(row->name, "ploop_create_snapshot")) {
                ((struct ploop_snapshot_param *)parameters)->snap_dir = "missing";
            } else if (!strncmp(row->name, "ploop_create_", 13)) {
                ((struct ploop_create_param *)parameters)->image = "missing/x";
            }
            *(const char **)(parameters + members[i].offset) = is_guid ? guids[k] : paths[k];
            /* Any text is an image's path in a descriptor, if XML can have it. */
            if (!strcmp(row->name, "ploop_create_dd"))
                a[0] = (long)"missing/dd.xml";
            call(row, f, a, is_guid ? "a bad GUID in its struct" : "a hostile path in its struct");
        }
    }
}

/* What a panic inside of a function becomes: SYSEXIT_ABORT, or what the function has instead of codes. */
static void panicking(const struct row *row, function f)
{
    static const char *const without[] = {"mntn2str", "ploop_cancel_operation", "ploop_complete_running_operation", "guidcmp",
                                          "ploop_get_last_error", "ploop_is_large_disk_supported", "ploop_resolve_functions",
                                          "ploop_set_log_level", "ploop_set_verbose_level", "is_valid_guid"};
    long a[MOST], got;
    size_t i;

    for (i = 0; i < sizeof(without) / sizeof(without[0]); i++)
        if (!strcmp(row->name, without[i]))
            return;
    harmless(row, a);
    setenv("PLOOP_PANIC_IN", "*", 1);
    got = f(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    unsetenv("PLOOP_PANIC_IN");
    calls++;
    switch (row->answer) {
    case CODE:
    case NONZERO:
        if ((int)got != SYSEXIT_ABORT && (row->answer == CODE || (int)got != -1))
            complain(row, "a panic", (int)got);
        break;
    case MINUS:
        if ((int)got != -1)
            complain(row, "a panic", (int)got);
        break;
    case NOTHING:
        if (got)
            complain(row, "a panic", got);
        break;
    case NO:
    case ANY:
        break;
    }
    if (!strstr(ploop_get_last_error(), "injected into "))
        complain(row, "a panic: another text", got);
}

/* The longest name is allowed; one that is no UTF-8 leaves nothing behind. */
static void allowed(void)
{
    struct ploop_create_param create = {0};
    struct ploop_disk_images_data *di = NULL;
    char name[4096], got[4096];
    size_t i;

    /* 4095 bytes, the longest path that the kernel takes. */
    strcpy(name, "DiskDescriptor.xml");
    for (i = 0; strlen(name) + 2 <= sizeof(name) - 1; i++) {
        memmove(name + 2, name, strlen(name) + 1);
        memcpy(name, "./", 2);
    }
    if (strlen(name) < sizeof(name) - 1) {
        memmove(name + 1, name, strlen(name) + 1);
        memcpy(name, ".//", 3);
    }
    CHECK(strlen(name), 4095);
    CHECK(ploop_open_dd(&di, name), 0);
    CHECK(ploop_get_top_delta_fname(di, got, sizeof(got)), 0);
    CHECK_STR(strrchr(got, '/'), "/root.hds");
    ploop_close_dd(di);

    if (mkdir("\xff\xfe", 0700))
        die("mkdir: %s", strerror(errno));
    create.image = "\xff\xfe/root.hds";
    create.size = 65536;
    /* XML has no such text: a disk there is refused before anything is made. */
    CHECK_TRUE(ploop_create_image(&create) > 0);
    CHECK(rmdir("\xff\xfe"), 0);
}

int main(int argc, char **argv)
{
    struct ploop_create_param create = {0};
    void *library;
    size_t row;
    int i;

    assert_library(NULL);
    if (argc < 2 || chdir(argv[1]))
        die("usage: hostile EMPTY-FOLDER SYMBOL...");
    library = dlopen(NULL, RTLD_NOW);
    create.image = "root.hds";
    create.size = 65536;
    if (ploop_create_image(&create) || ploop_read_disk_descr(&disk, "DiskDescriptor.xml"))
        die("%s", ploop_get_last_error());
    /* The lock file is there before it is looked for. */
    if (ploop_get_top_delta_fname(disk, result, sizeof(result)))
        die("%s", ploop_get_last_error());
    for (i = 0; i + 2 < (int)sizeof(deep); i += 2)
        memcpy(deep + i, "./", 2);
    memcpy(deep + sizeof(deep) - 10, "missing/x", 10);
    memset(longer, 'n', sizeof(longer) - 1);
    memset(component, 'n', sizeof(component) - 1);
    for (i = 2; i < argc; i++) {
        function f;

        for (row = 0; row < ROWS && strcmp(rows[row].name, argv[i]); row++)
            ;
        if (row == ROWS) {
            failures++;
            fprintf(stderr, "%s has no row in hostile.c\n", argv[i]);
            continue;
        }
        *(void **)&f = dlsym(library, argv[i]);
        if (!f)
            die("%s", dlerror());
        if (getenv("HOSTILE_PANIC"))
            panicking(&rows[row], f);
        else
            one(&rows[row], f);
    }
    ploop_set_verbose_level(PLOOP_LOG_NOCONSOLE);
    allowed();
    ploop_close_dd(disk);
    if (failures)
        die("%d failures in %ld calls", failures, calls);
    printf("%ld calls of %d functions\n", calls, argc - 2);
    return 0;
}
