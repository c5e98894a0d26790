/*
 * Creation of disks, cancelled by a signal at every instant: it either succeeds whole, or fails and leaves nothing behind,
 * and the next one is not touched by it. Then many threads, each with disks of its own. Usage: cancel EMPTY-FOLDER
 */
#include "../common.h"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <sys/time.h>

#define THREADS 8

static const char *root;

static void on_alarm(int signal)
{
    (void)signal;
    ploop_cancel_operation();
}

static void alarm_in(long microseconds)
{
    struct itimerval timer = {{0, 0}, {microseconds / 1000000, microseconds % 1000000}};

    setitimer(ITIMER_REAL, &timer, NULL);
}

static int create(const char *folder, int mode, const char *fstype)
{
    struct ploop_create_param param = {0};
    char image[4096];

    snprintf(image, sizeof(image), "%s/root.hds", folder);
    param.size = 64 * 2048;
    param.mode = mode;
    param.image = image;
    param.fstype = (char *)fstype;
    return ploop_create_image(&param);
}

static int entries(const char *folder)
{
    DIR *dir = opendir(folder);
    int n = 0;

    while (dir && readdir(dir))
        n++;
    if (dir)
        closedir(dir);
    return n - 2;
}

static void cancelled_creations(void)
{
    static const int modes[] = {PLOOP_EXPANDED_MODE, PLOOP_EXPANDED_PREALLOCATED_MODE, PLOOP_RAW_MODE};
    struct sigaction action = {0};
    int round, stopped = 0, whole = 0;
    long delay;

    /* Without SA_RESTART: system calls of the library are interrupted too. */
    action.sa_handler = on_alarm;
    sigaction(SIGALRM, &action, NULL);
    for (round = 0, delay = 50; delay < 300000; round++, delay += delay / 4 + 1) {
        char folder[4096], path[8192];
        int rc;

        snprintf(folder, sizeof(folder), "%s/cancel%d", root, round);
        if (mkdir(folder, 0700))
            die("%s: %s", folder, strerror(errno));
        alarm_in(delay);
        rc = create(folder, modes[round % 3], round % 2 ? "ext4" : NULL);
        alarm_in(0);
        if (rc) {
            stopped++;
            if (entries(folder) != 0) {
                failures++;
                fprintf(stderr, "%s: %d files are left after: %s\n", folder, entries(folder),
                        ploop_get_last_error());
            }
            CHECK(create(folder, modes[round % 3], round % 2 ? "ext4" : NULL), 0);
        } else {
            whole++;
        }
        snprintf(path, sizeof(path), "%s/root.hds", folder);
        CHECK(access(path, F_OK), 0);
        unlink(path);
        snprintf(path, sizeof(path), "%s/" DISKDESCRIPTOR_XML, folder);
        CHECK(access(path, F_OK), 0);
        unlink(path);
        snprintf(path, sizeof(path), "%s/" DISKDESCRIPTOR_XML ".lck", folder);
        unlink(path);
        CHECK(rmdir(folder), 0);
    }
    printf("%d creations cancelled, %d done before\n", stopped, whole);
    if (!stopped || !whole)
        die("the signals never came in time, or always");
}

static void *thread(void *number)
{
    struct ploop_disk_images_data *di;
    struct ploop_spec spec;
    char folder[4096], path[8192], text[64];
    int i;

    snprintf(folder, sizeof(folder), "%s/thread%ld", root, (long)number);
    if (mkdir(folder, 0700))
        die("%s: %s", folder, strerror(errno));
    CHECK(create(folder, PLOOP_EXPANDED_MODE, "ext4"), 0);
    snprintf(path, sizeof(path), "%s/" DISKDESCRIPTOR_XML, folder);
    for (i = 0; i < 50; i++) {
        CHECK(ploop_open_dd(&di, path), 0);
        CHECK(ploop_get_spec(di, &spec), 0);
        CHECK(spec.size, 64 * 2048);
        CHECK(ploop_get_top_delta_fname(di, text, 1), SYSEXIT_PARAM);
        snprintf(text, sizeof(text), "/thread%ld/", (long)number);
        CHECK_TRUE(strstr(ploop_get_last_error(), text) != NULL);
        ploop_close_dd(di);
    }
    return NULL;
}

/* Two objects of one disk, each in a thread: the descriptor's lock puts their calls in a row. */
static void *same_disk(void *descriptor)
{
    struct ploop_disk_images_data *di;
    char path[4096];
    int i;

    CHECK(ploop_open_dd(&di, descriptor), 0);
    for (i = 0; i < 100; i++) {
        CHECK(ploop_get_top_delta_fname(di, path, sizeof(path)), 0);
        CHECK(di->nimages, 1);
    }
    ploop_close_dd(di);
    return NULL;
}

static void run(void *(*function)(void *), void *argument)
{
    pthread_t threads[THREADS];
    long i;

    for (i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, function, argument ? argument : (void *)i))
            die("no thread");
    for (i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

int main(int argc, char **argv)
{
    char descriptor[4096];

    assert_library(NULL);
    if (argc != 2)
        die("usage: cancel EMPTY-FOLDER");
    root = argv[1];
    if (access("/sbin/mke2fs", X_OK))
        die("no mke2fs; apt-get install e2fsprogs");
    cancelled_creations();
    run(thread, NULL);
    snprintf(descriptor, sizeof(descriptor), "%s/thread0/" DISKDESCRIPTOR_XML, root);
    run(same_disk, descriptor);
    if (failures)
        die("%d checks failed", failures);
    return 0;
}
