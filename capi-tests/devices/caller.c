/*
 * What a caller may be and what it must get back unharmed: signal handlers, descriptors, children, threads; components and
 * devices named by the caller; several disks at once. Usage: caller EMPTY-FOLDER [LIBRARY]    as root
 */
#include "../common.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/wait.h>

#define DISKS 4

static char folder[2048];
static volatile sig_atomic_t reaped;

static void paths(int n, char *image, char *descriptor, char *target)
{
    snprintf(image, PATH_MAX, "%s/disk%d/root.hds", folder, n);
    snprintf(descriptor, PATH_MAX, "%s/disk%d/" DISKDESCRIPTOR_XML, folder, n);
    snprintf(target, PATH_MAX, "%s/mnt%d", folder, n);
}

static void create(int n)
{
    struct ploop_create_param param = {0};
    char image[PATH_MAX], descriptor[PATH_MAX], target[PATH_MAX], dir[PATH_MAX];

    paths(n, image, descriptor, target);
    snprintf(dir, sizeof(dir), "%s/disk%d", folder, n);
    param.size = 256 * 2048;
    param.image = image;
    param.fstype = "ext4";
    if (mkdir(dir, 0700) || mkdir(target, 0755) || ploop_create_image(&param))
        die("disk %d: %s, %s", n, strerror(errno), ploop_get_last_error());
}

/* A manager of many children: takes the status of every child that ends, ours included. */
static void on_child(int signal)
{
    int saved = errno;

    (void)signal;
    while (waitpid(-1, NULL, WNOHANG) > 0)
        reaped++;
    errno = saved;
}

static int count(const char *path)
{
    DIR *dir = opendir(path);
    int n = 0;

    if (!dir)
        die("%s: %s", path, strerror(errno));
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static int descriptors(void)
{
    return count("/proc/self/fd");
}

static int threads(void)
{
    return count("/proc/self/task");
}

/* Mounts, writes, unmounts, several times, while other threads do the same with other disks. */
static void *user(void *number)
{
    struct ploop_disk_images_data *di;
    struct ploop_mount_param param;
    char image[PATH_MAX], descriptor[PATH_MAX], target[PATH_MAX], path[PATH_MAX * 2], text[64];
    int round, fd;

    paths((int)(long)number, image, descriptor, target);
    for (round = 0; round < 3; round++) {
        memset(&param, 0, sizeof(param));
        param.target = target;
        CHECK(ploop_open_dd(&di, descriptor), 0);
        CHECK(ploop_mount_image(di, &param), 0);
        snprintf(path, sizeof(path), "%s/file%d", target, round);
        fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
        CHECK_TRUE(fd >= 0 && write(fd, path, 100) == 100);
        close(fd);
        CHECK(ploop_get_dev_by_mnt(target, text, sizeof(text)), 0);
        CHECK_STR(text, param.device);
        CHECK(ploop_umount_image(di), 0);
        CHECK_TRUE(access(path, F_OK) != 0);
        ploop_close_dd(di);
    }
    return NULL;
}

static void signals_and_descriptors(void)
{
    struct sigaction action, after;
    struct ploop_disk_images_data *di;
    struct ploop_mount_param param = {{0}};
    char image[PATH_MAX], descriptor[PATH_MAX], target[PATH_MAX], before_dir[PATH_MAX], after_dir[PATH_MAX];
    void (*handlers[128])(int);
    sigset_t mask_before, mask_after;
    int fds, tasks, signal;
    mode_t mask;

    paths(0, image, descriptor, target);
    memset(&action, 0, sizeof(action));
    action.sa_handler = on_child;
    sigaction(SIGCHLD, &action, NULL);
    fds = descriptors();
    tasks = threads();
    for (signal = 1; signal <= SIGRTMAX; signal++)
        handlers[signal] = sigaction(signal, NULL, &after) == 0 ? after.sa_handler : SIG_DFL;
    mask = umask(027);
    sigprocmask(SIG_SETMASK, NULL, &mask_before);
    if (!getcwd(before_dir, sizeof(before_dir)))
        die("getcwd");

    param.target = target;
    CHECK(ploop_open_dd(&di, descriptor), 0);
    CHECK(ploop_mount_image(di, &param), 0);
    CHECK(descriptors(), fds);
    CHECK(threads(), tasks);
    CHECK(ploop_is_mounted(di), 1);
    CHECK(ploop_umount_image(di), 0);
    ploop_close_dd(di);

    CHECK(descriptors(), fds);
    CHECK(threads(), tasks);
    CHECK(umask(mask), 027);
    sigprocmask(SIG_SETMASK, NULL, &mask_after);
    CHECK_TRUE(getcwd(after_dir, sizeof(after_dir)) && strcmp(before_dir, after_dir) == 0);
    for (signal = 1; signal <= SIGRTMAX; signal++) {
        CHECK(sigismember(&mask_after, signal), sigismember(&mask_before, signal));
        if (signal != SIGCHLD && sigaction(signal, NULL, &after) == 0)
            CHECK_TRUE(after.sa_handler == handlers[signal]);
    }
    sigaction(SIGCHLD, NULL, &after);
    CHECK_TRUE(after.sa_handler == on_child);
    action.sa_handler = SIG_DFL;
    sigaction(SIGCHLD, &action, NULL);
    CHECK_TRUE(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD);
}

static void components(void)
{
    struct ploop_disk_images_data *plain, *named;
    struct ploop_mount_param param = {{0}};
    char image[PATH_MAX], descriptor[PATH_MAX], target[PATH_MAX], buf[PATH_MAX];
    char **devs = NULL;

    paths(1, image, descriptor, target);
    CHECK(ploop_open_dd(&plain, descriptor), 0);
    CHECK(ploop_open_dd(&named, descriptor), 0);
    CHECK(ploop_set_component_name(named, "backup"), 0);
    param.ro = 1;
    param.target = target;
    CHECK(ploop_mount_image(named, &param), 0);

    CHECK(ploop_get_dev(named, buf, sizeof(buf)), 0);
    CHECK_STR(buf, param.device);
    CHECK(ploop_get_dev(plain, buf, sizeof(buf)), 1);
    CHECK(ploop_is_mounted(plain), 0);
    CHECK(ploop_is_mounted(named), 0); /* asks for the device without component */
    CHECK(ploop_find_dev("backup", image, buf, sizeof(buf)), 0);
    CHECK_STR(buf, param.device);
    CHECK(ploop_find_dev("backu", image, buf, sizeof(buf)), 1);
    CHECK(ploop_find_dev(NULL, image, buf, sizeof(buf)), 1);
    CHECK(ploop_get_devs(plain, &devs), 0);
    CHECK_TRUE(devs && devs[0] && !devs[1]);
    ploop_free_array(devs);
    CHECK(ploop_umount_image(plain), SYSEXIT_DEV_NOT_MOUNTED);
    CHECK(ploop_mount_image(named, &param), SYSEXIT_MOUNT);
    CHECK(ploop_umount_image(named), 0);
    CHECK(ploop_umount_image(named), SYSEXIT_DEV_NOT_MOUNTED);
    ploop_close_dd(plain);
    ploop_close_dd(named);
}

static void named_devices(void)
{
    struct ploop_disk_images_data *di;
    struct ploop_mount_param param = {{0}};
    char image[PATH_MAX], descriptor[PATH_MAX], target[PATH_MAX], name[64], buf[PATH_MAX];

    paths(2, image, descriptor, target);
    CHECK(ploop_open_dd(&di, descriptor), 0);
    memset(param.device, 'x', sizeof(param.device)); /* not terminated: as long as it can be, and no device */
    CHECK(ploop_mount_image(di, &param), SYSEXIT_PARAM);
    CHECK(ploop_is_mounted(di), 0);
    memset(&param, 0, sizeof(param));
    strcpy(param.device, "/dev/null"); /* a name that is somebody else's */
    CHECK_TRUE(ploop_mount_image(di, &param) > 0);
    CHECK(access("/dev/null", W_OK), 0);

    snprintf(name, sizeof(name), "/dev/ploop%d", 90000 + (int)(getpid() % 9000));
    strcpy(param.device, name);
    CHECK(ploop_mount_image(di, &param), 0);
    CHECK_STR(param.device, name);
    CHECK(ploop_get_dev(di, buf, sizeof(buf)), 0);
    CHECK_STR(buf, name);
    /* Attached, and nothing mounted. */
    CHECK(ploop_get_mnt_by_dev(name, buf, sizeof(buf)), 1);
    CHECK(ploop_umount(name, di), 0);
    CHECK_TRUE(access(name, F_OK) != 0);
    ploop_close_dd(di);
}

static void info_of_an_unmounted_disk(void)
{
    struct ploop_info info = {0};
    char image[PATH_MAX], descriptor[PATH_MAX], target[PATH_MAX], cache[PATH_MAX];

    paths(3, image, descriptor, target);
    snprintf(cache, sizeof(cache), "%s/disk3/.statfs", folder);
    unlink(cache);
    CHECK(ploop_get_info_by_descr(descriptor, &info), 0);
    CHECK(info.fs_bsize, 4096);
    CHECK_TRUE(info.fs_blocks > 50000 && info.fs_bfree < info.fs_blocks && info.fs_ifree < info.fs_inodes);
    CHECK_TRUE(ploop_umount_image(NULL) != 0);
}

int main(int argc, char **argv)
{
    pthread_t thread[DISKS];
    char *real;
    long i;

    if (argc < 2 || argc > 3 || !(real = realpath(argv[1], NULL)) || strlen(real) >= sizeof(folder))
        die("usage: caller EMPTY-FOLDER [LIBRARY]");
    assert_library(argc > 2 ? argv[2] : NULL);
    strcpy(folder, real);
    for (i = 0; i < DISKS; i++)
        create(i);
    signals_and_descriptors();
    components();
    named_devices();
    info_of_an_unmounted_disk();
    for (i = 0; i < DISKS; i++)
        if (pthread_create(&thread[i], NULL, user, (void *)i))
            die("no thread");
    for (i = 0; i < DISKS; i++)
        pthread_join(thread[i], NULL);
    if (failures)
        die("%d checks failed", failures);
    printf("all checks passed; %d children of the library were reaped by the caller\n", (int)reaped);
    return 0;
}
