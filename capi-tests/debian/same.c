/*
 * What the library answers and leaves on disk, over every function that works without a ploop kernel: one line for each call
 * and each file. The same program runs on Debian's library and on ours, built against Debian's headers and against ours; the
 * lines must be the same. Usage: same EMPTY-FOLDER
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PLOOP_DEPRECATED
#include <ploop/libploop.h>
#include <ploop/dynload.h>
#include <ploop/ploop_if.h>
#include <ploop/ploop1_image.h>

typedef struct ploop_disk_images_data disk;
/* Of no installed header. */
int check_dd(disk *di, const char *uuid);
int check_deltas_same(const char *img1, const char *img2);
char *find_image_by_guid(disk *di, const char *guid);
int find_level_by_delta(const char *device, const char *delta, int *level);
int find_snapshot_by_guid(disk *di, const char *guid);
int guidcmp(const char *p1, const char *p2);
int is_valid_guid(const char *guid);
char **make_images_list(disk *di, const char *guid, int reverse);
int merge_image(const char *device, int start_level, int end_level, int raw, int merge_top, char **images, const char *new_delta);
char *mntn2str(int mntn_type);
int ploop_change_fmt_version(disk *di, int new_version, int flags);
int ploop_check(char *img, int flags, __u32 *blocksize_p);
int ploop_get_attr(const char *device, const char *attr, int *res);
int ploop_grow_delta_offline(const char *image, off_t new_size);
int ploop_grow_image(disk *di, off_t size);
int ploop_grow_raw_delta_offline(const char *image, off_t new_size);
int ploop_mount(disk *di, char **images, struct ploop_mount_param *param, int raw);
int ploop_restore_descriptor(const char *dir, char *delta_path, int raw, int blocksize);
int read_line(const char *path, char *nbuf, int len);
int replace_delta(const char *device, int level, const char *image);
int create_snapshot(const char *device, const char *delta, int syncfs);

static const char S1[] = "{11111111-2222-3333-4444-555555555555}";
static const char S2[] = "{22222222-2222-3333-4444-555555555555}";
static const char S3[] = "{33333333-2222-3333-4444-555555555555}";
static const char NOWHERE[] = "{99999999-2222-3333-4444-555555555555}";
static const char TOP[] = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
static char root[PATH_MAX];
static const char *part = "";

/* One line: the part of the program, what was called or found. */
static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...)
{
    va_list args;
    char text[8192], *at;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    /* The folder is another one each time. */
    while ((at = strstr(text, root)))
        memmove(at, at + strlen(root), strlen(at + strlen(root)) + 1);
    printf("%s: %s\n", part, text);
}

#define CALL(expr) say("%s = %lld", #expr, (long long)(expr))

static void begin(const char *name)
{
    part = name;
    if (chdir(root) || mkdir(name, 0755) || chdir(name)) {
        fprintf(stderr, "%s: %s\n", name, strerror(errno));
        exit(1);
    }
}

struct file {
    char name[256];
    struct stat st;
    uint64_t hash;
};

/* Random GUIDs in names say nothing: such files go by their content. */
static int by_name(const void *x, const void *y)
{
    const struct file *a = x, *b = y;
    size_t n = strcspn(a->name, "{"), m = strcspn(b->name, "{");
    int order = a->name[n] && b->name[m] && n == m ? strncmp(a->name, b->name, n) : strcmp(a->name, b->name);

    if (order || !a->name[n] || !b->name[m])
        return order;
    return a->hash < b->hash ? -1 : a->hash > b->hash;
}

/* Every file of the folder; descriptors by their text. */
static void files(void)
{
    static struct file list[64];
    struct dirent *e;
    DIR *dir = opendir(".");
    char words[256];
    int i, c, n = 0;
    FILE *f;

    while (dir && (e = readdir(dir)) && n < 64) {
        struct file *x = list + n;

        snprintf(x->name, sizeof(x->name), "%s", e->d_name);
        if (lstat(x->name, &x->st) || !S_ISREG(x->st.st_mode) || !(f = fopen(x->name, "r")))
            continue;
        x->hash = 1469598103934665603ULL;
        while ((c = getc(f)) != EOF)
            x->hash = (x->hash ^ (unsigned char)c) * 1099511628211ULL;
        fclose(f);
        n++;
    }
    closedir(dir);
    qsort(list, n, sizeof(list[0]), by_name);
    for (i = 0; i < n; i++) {
        size_t len = strlen(list[i].name);
        int text = len > 4 && strcmp(list[i].name + len - 4, ".xml") == 0;

        say("file %s %04o %lld bytes", list[i].name, (unsigned)list[i].st.st_mode & 07777, text ? 0 : (long long)list[i].st.st_size);
        if (!text) {
            say("  hash %016llx", (unsigned long long)list[i].hash);
            continue;
        }
        f = fopen(list[i].name, "r");
        while (f && fgets(words, sizeof(words), f)) {
            words[strcspn(words, "\n")] = '\0';
            say("  %s", words);
        }
        if (f)
            fclose(f);
    }
}

static int create(const char *image, unsigned long long size, int mode, unsigned blocksize)
{
    struct ploop_create_param param;

    memset(&param, 0, sizeof(param));
    param.size = size;
    param.mode = mode;
    param.image = (char *)image;
    param.blocksize = blocksize;
    param.fmt_version = 1;
    return ploop_create_image(&param);
}

static disk *reading(const char *descriptor)
{
    disk *di = NULL;

    if (ploop_read_disk_descr(&di, descriptor)) {
        say("%s cannot be read", descriptor);
        exit(1);
    }
    return di;
}

/* A cluster of the disk gets bytes, by the format's own rules: the file gets one cluster more. 64 KiB clusters. */
static void put(const char *image, uint32_t cluster, int byte)
{
    static unsigned char data[65536];
    uint32_t entry, flags = CIF_NoFlags;
    int fd = open(image, O_RDWR);
    off_t end = lseek(fd, 0, SEEK_END);

    memset(data, byte, sizeof(data));
    entry = (uint32_t)(end / 512);
    if (fd < 0 || pwrite(fd, data, sizeof(data), end) != sizeof(data) || pwrite(fd, &entry, 4, 64 + 4 * cluster) != 4 ||
        pwrite(fd, &flags, 4, 52) != 4 || close(fd)) {
        perror(image);
        exit(1);
    }
}

static int snapshot(disk *di, const char *guid)
{
    struct ploop_snapshot_param param;

    memset(&param, 0, sizeof(param));
    param.guid = (char *)guid;
    return ploop_create_snapshot(di, &param);
}

static void show(disk *di)
{
    int i;

    say("size %llu mode %d images %d snapshots %d cluster %u limit %llu top %s", di->size, di->mode, di->nimages, di->nsnapshots,
        di->blocksize, di->max_delta_size, di->top_guid ? di->top_guid : "NULL");
    say("heads %u cylinders %u sectors %u", di->heads, di->cylinders, di->sectors);
    for (i = 0; i < di->nimages; i++)
        say("image %s %s", di->images[i]->guid, di->images[i]->file);
    for (i = 0; i < di->nsnapshots; i++)
        say("snapshot %s on %s%s", di->snapshots[i]->guid, di->snapshots[i]->parent_guid, di->snapshots[i]->temporary ? " temporary" : "");
}

static void small_functions(void)
{
    static const int types[] = {0, 1, 2, 3, 4, 5, 256, 257, 258, 259, 260, -1};
    char guid[64], text[64];
    FILE *f;
    size_t i;

    begin("small");
    CALL(is_valid_guid(S1));
    CALL(is_valid_guid(TOP));
    CALL(is_valid_guid("{11111111-2222-3333-4444-55555555555g}"));
    CALL(is_valid_guid("11111111-2222-3333-4444-555555555555"));
    CALL(is_valid_guid(""));
    CALL(is_valid_guid(NULL));
    CALL(guidcmp("{aAbB}", "{AabB}"));
    CALL(guidcmp("{a}", "{b}") < 0);
    CALL(ploop_uuid_generate(guid, sizeof(guid)));
    CALL(strlen(guid));
    CALL(guid[15] == '4');
    for (i = 0; i < sizeof(types) / sizeof(types[0]); i++)
        say("mntn2str(%d) %s", types[i], mntn2str(types[i]));
    f = fopen("lines", "w");
    fputs("the first\nthe second\n", f);
    fclose(f);
    CALL(read_line("lines", text, sizeof(text)));
    say("%s", text);
    CALL(read_line("lines", text, 5));
    say("%s", text);
    CALL(read_line("missing", text, sizeof(text)));
    CALL(ploop_complete_running_operation("/dev/ploop0"));
    CALL(ploop_complete_running_operation(NULL));
    CALL(ploop_set_log_file("log"));
    CALL(ploop_set_log_file("missing/log"));
    CALL(ploop_set_log_file(NULL));
    ploop_free_array(NULL);
    ploop_close_dd(NULL);
    ploop_free_diskdescriptor(NULL);
    CALL(ploop_get_base_delta_uuid(NULL) == NULL);
    CALL(ploop_get_last_error()[0] != '\0');
}

static void table(void)
{
    struct ploop_functions f;
    void **p = (void **)&f;
    size_t i;

    begin("table");
    for (i = 0; i < sizeof(f) / sizeof(*p); i++)
        p[i] = (void *)&f;
    ploop_resolve_functions(&f);
    for (i = 0; i < sizeof(f) / sizeof(*p); i++)
        say("slot %zu %s", i, p[i] == (void *)&f ? "untouched" : "set");
    CALL(f.create_image == ploop_create_image);
    CALL(f.get_base_delta_fname == ploop_get_base_delta_fname);
}

static void creation(void)
{
    begin("create");
    CALL(create("expanded.hds", 65537, PLOOP_EXPANDED_MODE, 128));
    files();
    CALL(create("other.hds", 65537, PLOOP_EXPANDED_MODE, 128));
    CALL(create("i", 65536, PLOOP_EXPANDED_MODE, 100));
    begin("create_prealloc");
    CALL(create("p.hds", 16384, PLOOP_EXPANDED_PREALLOCATED_MODE, 128));
    files();
    begin("create_raw");
    CALL(create("r.raw", 16384, PLOOP_RAW_MODE, 128));
    files();
    begin("create_bad");
    CALL(create("i", 0, PLOOP_EXPANDED_MODE, 128));
    CALL(create("i", 65536, 3, 128));
    CALL(create("missing/i", 65536, 0, 128));
    files();
}

static void descriptors(void)
{
    struct ploop_create_param param;
    disk *di = NULL, *empty = NULL;
    char text[PATH_MAX];

    begin("descriptor");
    CALL(ploop_open_dd(&di, "missing"));
    CALL(di == NULL);
    CALL(create("root.hds", 65536, PLOOP_EXPANDED_MODE, 128));
    CALL(ploop_open_dd(&empty, "DiskDescriptor.xml"));
    CALL(empty->nimages);
    di = reading("DiskDescriptor.xml");
    show(di);
    CALL(ploop_store_diskdescriptor("copy.xml", di));
    CALL(mkdir("below", 0755));
    CALL(ploop_store_diskdescriptor("below/copy.xml", di));
    CALL(ploop_store_diskdescriptor("missing/copy.xml", di) != 0);
    CALL(ploop_set_max_delta_size(di, 123456));
    show(di);
    CALL(ploop_set_component_name(di, "name"));
    CALL(ploop_set_component_name(di, ""));
    CALL(ploop_get_top_delta_fname(di, text, sizeof(text)));
    say("%s", text);
    CALL(ploop_get_base_delta_fname(di, text, sizeof(text)));
    say("%s", text);
    CALL(ploop_get_top_delta_fname(di, text, 5));
    CALL(ploop_get_dev(di, text, sizeof(text)));
    CALL(ploop_is_mounted(di));
    files();
    CALL(ploop_set_max_delta_size(di, 0));
    files();
    CALL(chdir("below"));
    files();
    CALL(chdir(".."));
    memset(&param, 0, sizeof(param));
    param.image = "not-there.hds";
    param.size = 65537;
    param.blocksize = 128;
    param.fmt_version = 1;
    CALL(ploop_create_dd("made.xml", &param));
    CALL(ploop_create_dd("made.xml", &param));
    param.image = "/nowhere/not-there.hds";
    param.mode = PLOOP_RAW_MODE;
    CALL(ploop_create_dd("raw.xml", &param));
    param.mode = PLOOP_EXPANDED_PREALLOCATED_MODE;
    CALL(ploop_create_dd("preallocated.xml", &param));
    param.blocksize = 100;
    CALL(ploop_create_dd("bad.xml", &param));
    files();
    ploop_close_dd(di);
    ploop_close_dd(empty);
    CALL(unlink("DiskDescriptor.xml"));
    CALL(ploop_restore_descriptor(".", "root.hds", 0, 0));
    CALL(ploop_restore_descriptor(".", "root.hds", 0, 0));
    files();
}

static void questions(void)
{
    struct ploop_info info;
    struct ploop_spec spec;
    unsigned long long most = 0;
    char text[PATH_MAX], **devs = NULL;
    int number = 0;
    disk *di;
    FILE *f;

    begin("questions");
    CALL(create("root.hds", 65536, PLOOP_EXPANDED_MODE, 128));
    CALL(ploop_open_dd(&di, "DiskDescriptor.xml"));
    memset(&spec, 0x55, sizeof(spec));
    CALL(ploop_get_spec(di, &spec));
    say("%lld %u %d %02x", (long long)spec.size, spec.blocksize, spec.fmt_version, spec.dummy[0]);
    CALL(ploop_get_devs(di, &devs));
    CALL(ploop_find_dev(NULL, "root.hds", text, sizeof(text)));
    CALL(ploop_find_dev("c", "missing", text, sizeof(text)));
    CALL(ploop_get_dev_by_mnt("/proc", text, sizeof(text)));
    CALL(ploop_get_dev_by_mnt("/missing", text, sizeof(text)));
    CALL(ploop_get_partition_by_mnt("/proc", text, sizeof(text)));
    CALL(ploop_get_partition_by_mnt("/missing", text, sizeof(text)));
    CALL(ploop_get_mnt_by_dev("/dev/ploop99999", text, sizeof(text)));
    CALL(ploop_get_max_size(64, &most));
    CALL(ploop_get_max_size(100, &most));
    CALL(ploop_is_large_disk_supported());
    CALL(ploop_umount_image(di));
    CALL(ploop_umount(NULL, NULL));
    CALL(ploop_umount("/dev/missing", NULL));
    CALL(ploop_get_attr("/dev/ploop99999", "running", &number));
    CALL(find_level_by_delta("/dev/ploop99999", "root.hds", &number));
    CALL(ploop_find_top_delta_name_and_format("/dev/ploop99999", text, sizeof(text), NULL, 0));
    CALL(replace_delta("/dev/ploop99999", 0, "root.hds") != 0);
    CALL(create_snapshot("/dev/ploop99999", "new", 0) != 0);
    f = fopen(".statfs", "w");
    memset(&info, 0, sizeof(info));
    info.fs_bsize = 4096;
    info.fs_blocks = 77;
    fwrite(&info, sizeof(info), 1, f);
    fclose(f);
    memset(&info, 0, sizeof(info));
    CALL(ploop_get_info_by_descr("DiskDescriptor.xml", &info));
    say("%llu %llu", info.fs_bsize, info.fs_blocks);
    ploop_close_dd(di);
    files();
}

static void checks(void)
{
    struct stat st;
    __u32 blocksize = 0;
    disk *di;
    int fd;

    begin("check");
    CALL(create("root.hds", 65536, PLOOP_EXPANDED_MODE, 128));
    put("root.hds", 7, 'a');
    put("root.hds", 2, 'b');
    CALL(ploop_check("root.hds", 0x01 | 0x40, &blocksize));
    CALL(blocksize);
    CALL(ploop_check("root.hds", 0x01 | 0x08 | 0x20, NULL));
    CALL(ploop_check("missing", 0x01, NULL));
    di = reading("DiskDescriptor.xml");
    CALL(check_dd(di, NULL));
    CALL(check_dd(di, TOP));
    ploop_close_dd(di);
    files();
    /* Two entries name one cluster. */
    fd = open("root.hds", O_RDWR);
    CALL(pread(fd, &blocksize, 4, 64 + 4 * 7));
    CALL(pwrite(fd, &blocksize, 4, 64 + 4 * 9));
    close(fd);
    CALL(ploop_check("root.hds", 0x01 | 0x08 | 0x20, NULL));
    /* Marked in use. */
    blocksize = 0x746F6E59;
    fd = open("root.hds", O_RDWR);
    CALL(pwrite(fd, &blocksize, 4, 44));
    close(fd);
    CALL(ploop_check("root.hds", 0x20, NULL));
    CALL(stat("root.hds", &st));
    CALL(check_deltas_same("root.hds", "root.hds"));
    CALL(check_deltas_same("root.hds", "missing"));
    CALL(create("../check.hds", 65536, PLOOP_EXPANDED_MODE, 128));
    CALL(check_deltas_same("root.hds", "../check.hds"));
}

static void growing(void)
{
    disk *di;

    begin("grow");
    CALL(create("root.hds", 65536, PLOOP_EXPANDED_MODE, 128));
    put("root.hds", 3, 'a');
    di = reading("DiskDescriptor.xml");
    CALL(ploop_grow_image(di, 131072));
    CALL(ploop_grow_image(di, 131072));
    CALL(ploop_grow_image(di, 65536));
    CALL(ploop_grow_image(di, 131073));
    show(di);
    CALL(ploop_grow_delta_offline("root.hds", 262144));
    CALL(ploop_grow_delta_offline("root.hds", 1000));
    CALL(ploop_grow_delta_offline("missing", 1000));
    files();
    ploop_close_dd(di);
    begin("grow_raw");
    CALL(create("r.raw", 16384, PLOOP_RAW_MODE, 128));
    CALL(ploop_grow_raw_delta_offline("r.raw", 32768));
    CALL(ploop_grow_raw_delta_offline("r.raw", 100));
    di = reading("DiskDescriptor.xml");
    CALL(ploop_grow_image(di, 65536));
    ploop_close_dd(di);
    files();
}

static void conversions(void)
{
    disk *di;

    begin("convert");
    CALL(create("root.hds", 16384, PLOOP_EXPANDED_MODE, 128));
    put("root.hds", 3, 'a');
    di = reading("DiskDescriptor.xml");
    CALL(ploop_convert_image(di, PLOOP_EXPANDED_PREALLOCATED_MODE, 0));
    CALL(ploop_check("root.hds", 0x01 | 0x20, NULL));
    CALL(ploop_convert_image(di, PLOOP_EXPANDED_MODE, 0));
    CALL(ploop_change_fmt_version(di, 1, 0));
    CALL(ploop_change_fmt_version(di, 3, 0));
    CALL(ploop_convert_image(di, PLOOP_RAW_MODE, 0));
    files();
    CALL(ploop_convert_image(di, PLOOP_EXPANDED_MODE, 0));
    CALL(ploop_convert_image(di, 7, 0) != 0);
    ploop_close_dd(di);
}

/* Three snapshots, a cluster written on each. */
static disk *tree(const char *name)
{
    disk *di;
    char top[PATH_MAX];

    begin(name);
    CALL(create("root.hds", 16384, PLOOP_EXPANDED_MODE, 128));
    put("root.hds", 1, 'a');
    di = reading("DiskDescriptor.xml");
    CALL(snapshot(di, S1));
    CALL(ploop_get_top_delta_fname(di, top, sizeof(top)));
    put(top, 2, 'b');
    CALL(snapshot(di, S2));
    CALL(ploop_get_top_delta_fname(di, top, sizeof(top)));
    put(top, 1, 'c');
    return di;
}

static void snapshots(void)
{
    struct ploop_snapshot_switch_param param;
    char **list, *guid;
    disk *di = tree("snapshot");
    int i;

    show(di);
    CALL(snapshot(di, S1));
    CALL(snapshot(di, "no guid"));
    CALL(find_snapshot_by_guid(di, S2));
    CALL(find_snapshot_by_guid(di, NOWHERE));
    CALL(find_snapshot_by_guid(di, NULL));
    CALL(find_image_by_guid(di, NOWHERE) == NULL);
    say("%s", find_image_by_guid(di, S1));
    guid = ploop_find_parent_by_guid(di, S2);
    say("%s", guid ? guid : "NULL");
    CALL(ploop_find_parent_by_guid(di, S1) == NULL);
    CALL(ploop_find_parent_by_guid(di, NOWHERE) == NULL);
    list = make_images_list(di, TOP, 0);
    for (i = 0; list && list[i]; i++)
        say("%s", list[i]);
    ploop_free_array(list);
    list = make_images_list(di, S2, 1);
    for (i = 0; list && list[i]; i++)
        say("%s", list[i]);
    ploop_free_array(list);
    CALL(check_dd(di, NULL));
    files();

    memset(&param, 0, sizeof(param));
    param.guid = S1;
    param.guid_old = S3;
    param.flags = PLOOP_SNAP_SKIP_TOPDELTA_DESTROY;
    CALL(ploop_switch_snapshot_ex(di, &param));
    show(di);
    CALL(ploop_switch_snapshot(di, S3, 0));
    CALL(ploop_switch_snapshot(di, NOWHERE, 0));
    CALL(ploop_switch_snapshot(di, TOP, 0));
    show(di);
    CALL(ploop_delete_snapshot(di, NOWHERE));
    CALL(ploop_delete_snapshot(di, S3));
    CALL(ploop_delete_snapshot(di, S2));
    show(di);
    files();
    CALL(ploop_delete_top_delta(di));
    show(di);
    CALL(ploop_delete_snapshot(di, TOP));
    ploop_close_dd(di);
}

static void merges(void)
{
    struct ploop_merge_param param;
    char *images[4], file[3][PATH_MAX];
    disk *di;

    memset(&param, 0, sizeof(param));
    di = tree("merge_top");
    CALL(ploop_merge_snapshot(di, &param));
    show(di);
    files();
    ploop_close_dd(di);

    di = tree("merge_middle");
    param.guid = S2;
    CALL(ploop_merge_snapshot(di, &param));
    show(di);
    files();
    param.guid = NOWHERE;
    CALL(ploop_merge_snapshot(di, &param));
    ploop_close_dd(di);

    di = tree("merge_all");
    param.guid = NULL;
    param.merge_all = 1;
    CALL(ploop_merge_snapshot(di, &param));
    show(di);
    CALL(ploop_merge_snapshot(di, &param));
    files();
    ploop_close_dd(di);

    di = tree("merge_images");
    snprintf(file[0], PATH_MAX, "%s", find_image_by_guid(di, TOP));
    snprintf(file[1], PATH_MAX, "%s", find_image_by_guid(di, S2));
    snprintf(file[2], PATH_MAX, "%s", find_image_by_guid(di, S1));
    images[0] = file[0];
    images[1] = file[1];
    images[2] = file[2];
    images[3] = NULL;
    CALL(merge_image(NULL, 0, 0, 0, 0, images, "new.hds"));
    CALL(merge_image(NULL, 0, 0, 0, 0, images, "new.hds"));
    CALL(merge_image(NULL, 0, 0, 0, 0, images + 2, NULL) != 0);
    files();
    ploop_close_dd(di);
}

static void replacing(void)
{
    struct ploop_replace_param param;
    disk *di = tree("replace");

    CALL(system("cp root.hds copy.hds; cp root.hds copy2.hds"));
    memset(&param, 0, sizeof(param));
    param.guid = (char *)S1;
    param.file = "copy.hds";
    CALL(ploop_replace_image(di, &param));
    show(di);
    param.file = "missing";
    CALL(ploop_replace_image(di, &param));
    param.file = "copy2.hds";
    param.flags = PLOOP_REPLACE_KEEP_NAME;
    CALL(ploop_replace_image(di, &param));
    param.guid = (char *)NOWHERE;
    CALL(ploop_replace_image(di, &param) != 0);
    files();
    ploop_close_dd(di);
}

/* A frame of the stream that ploop_copy_send() makes. */
static void frame(int fd, const void *data, uint32_t size, uint64_t pos)
{
    struct {
        uint32_t marker, size;
        uint64_t pos;
    } head = {0x4cc0ac3d, size, pos};

    if (write(fd, &head, sizeof(head)) != sizeof(head) || (size && write(fd, data, size) != (ssize_t)size))
        _exit(1);
}

static int received(const char *file, uint32_t marker, int whole)
{
    struct ploop_copy_receive_param param;
    int fd[2], rc;
    pid_t child;

    if (pipe(fd))
        return -100;
    fflush(stdout);
    child = fork();
    if (child == 0) {
        static char data[8192];

        memset(data, 'x', sizeof(data));
        close(fd[0]);
        if (marker != 0x4cc0ac3d) {
            if (write(fd[1], &marker, 4) != 4 || write(fd[1], data, 100) != 100)
                _exit(1);
            _exit(0);
        }
        frame(fd[1], data, 4096, 4096);
        frame(fd[1], data, 8192, 16384);
        frame(fd[1], data, 4096, 0);
        if (whole)
            frame(fd[1], NULL, 0, 0);
        _exit(0);
    }
    close(fd[1]);
    memset(&param, 0, sizeof(param));
    param.file = file;
    param.ifd = fd[0];
    param.feedback_fd = -1;
    rc = ploop_copy_receive(&param);
    close(fd[0]);
    waitpid(child, NULL, 0);
    return rc;
}

static void copies(void)
{
    begin("copy");
    CALL(received("whole", 0x4cc0ac3d, 1));
    CALL(received("whole", 0x4cc0ac3d, 1));
    CALL(received("junk", 0x12345678, 1));
    CALL(received("cut", 0x4cc0ac3d, 0) != 0);
    CALL(ploop_copy_receive(NULL));
    CALL(ploop_copy_send(NULL));
    files();
}

/* What needs a device is refused in the same way where there is none: neither library may find one for these. */
static void without_devices(void)
{
    struct ploop_discard_stat stat;
    struct ploop_discard_param discard;
    struct ploop_mount_param mount;
    struct ploop_tsnapshot_param temporary;
    disk *di;

    begin("devices");
    CALL(create("root.hds", 65536, PLOOP_EXPANDED_MODE, 128));
    di = reading("DiskDescriptor.xml");
    memset(&stat, 0x55, sizeof(stat));
    CALL(ploop_discard_get_stat(di, &stat));
    memset(&discard, 0, sizeof(discard));
    CALL(ploop_discard(di, &discard));
    memset(&mount, 0, sizeof(mount));
    mount.guid = (char *)NOWHERE;
    CALL(ploop_mount_image(di, &mount));
    mount.guid = NULL;
    CALL(ploop_mount_snapshot(di, &mount));
    mount.target = "missing";
    CALL(ploop_mount_image(di, &mount));
    memset(&temporary, 0, sizeof(temporary));
    CALL(ploop_create_temporary_snapshot(di, &temporary, NULL));
    CALL(ploop_create_temporary_snapshot(NULL, NULL, NULL));
    CALL(ploop_get_top_delta_fname(NULL, NULL, 0));
    CALL(ploop_umount_image(NULL));
    show(di);
    ploop_close_dd(di);
    files();
}

int main(int argc, char **argv)
{
    if (argc != 2 || !realpath(argv[1], root) || chdir(root))
        return 2;
    umask(022);
    setvbuf(stdout, NULL, _IOLBF, 0);
    small_functions();
    table();
    creation();
    descriptors();
    questions();
    checks();
    growing();
    conversions();
    snapshots();
    merges();
    replacing();
    copies();
    without_devices();
    return 0;
}
