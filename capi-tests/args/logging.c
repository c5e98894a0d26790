/*
 * Console, log file, last error and cancellation. Usage: logging FOLDER
 */
#include "../common.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>

static char folder[3000];

/* Runs f with standard output and error in files, and returns what they got (static buffers). */
static char out[65536], err[65536];

static void slurp(const char *path, char *buf, size_t size)
{
    int fd = open(path, O_RDONLY);
    ssize_t n = fd < 0 ? -1 : read(fd, buf, size - 1);

    if (n < 0)
        die("%s: %s", path, strerror(errno));
    buf[n] = '\0';
    close(fd);
}

static void captured(void (*f)(void))
{
    char path[2][4096];
    int saved[2], fd, i;

    fflush(stdout);
    for (i = 0; i < 2; i++) {
        snprintf(path[i], sizeof(path[i]), "%s/captured%d", folder, i);
        saved[i] = dup(i + 1);
        fd = open(path[i], O_WRONLY | O_CREAT | O_TRUNC, 0600);
        if (saved[i] < 0 || fd < 0 || dup2(fd, i + 1) < 0)
            die("%s: %s", path[i], strerror(errno));
        close(fd);
    }
    f();
    fflush(stdout);
    for (i = 0; i < 2; i++) {
        dup2(saved[i], i + 1);
        close(saved[i]);
    }
    slurp(path[0], out, sizeof(out));
    slurp(path[1], err, sizeof(err));
}

static void make_error(void)
{
    char guid[39];

    if (ploop_uuid_generate(guid, 1) != SYSEXIT_PARAM)
        die("no error");
}

static void make_progress(void)
{
    printf("printed before\n");
    ploop_cancel_operation();
    printf("printed after\n");
}

static void *other_thread(void *unused)
{
    char guid[39];

    (void)unused;
    CHECK_STR(ploop_get_last_error(), "");
    CHECK(ploop_uuid_generate(guid, 2), SYSEXIT_PARAM);
    CHECK_TRUE(strstr(ploop_get_last_error(), "2 bytes") != NULL);
    return NULL;
}

static void console(void)
{
    captured(make_error);
    CHECK_STR(out, "");
    CHECK_STR(err, "");
    ploop_set_verbose_level(PLOOP_LOG_NOCONSOLE);
    captured(make_error);
    CHECK_STR(err, "");
    ploop_set_verbose_level(-3);
    captured(make_error);
    CHECK_STR(err, "");
    ploop_set_verbose_level(PLOOP_LOG_NOSTDOUT);
    captured(make_error);
    CHECK_STR(out, "");
    CHECK_TRUE(err[0] != '\0' && err[strlen(err) - 1] == '\n');
    CHECK_TRUE(strncmp(err, ploop_get_last_error(), strlen(err) - 1) == 0);
    captured(make_progress);
    CHECK_STR(out, "printed before\nprinted after\n");
    ploop_set_verbose_level(0);
    captured(make_progress);
    CHECK_TRUE(strstr(out, "Cancelling...\n") != NULL);
    ploop_set_verbose_level(PLOOP_LOG_TIMESTAMPS);
    captured(make_error);
    CHECK_TRUE(err[0] == '[' && err[3] == '.' && err[10] == ']' && err[11] == ' ');
    captured(make_progress);
    CHECK_TRUE(strstr(out, "] Cancelling...\n") != NULL);
    ploop_set_verbose_level(PLOOP_LOG_NOCONSOLE);
}

static void log_file(void)
{
    char path[4096], text[65536];
    struct stat st;
    mode_t mask = umask(022);

    snprintf(path, sizeof(path), "%s/log", folder);
    CHECK(ploop_set_log_file(path), 0);
    umask(mask);
    CHECK_TRUE(stat(path, &st) == 0 && (st.st_mode & 0777) == 0644);
    make_error();
    slurp(path, text, sizeof(text));
    CHECK_TRUE(strlen(text) > 27 && text[4] == '-' && text[10] == 'T' && strncmp(text + 24, " : ", 3) == 0);
    CHECK_TRUE(strstr(text, ploop_get_last_error()) == text + 27);
    CHECK(ploop_set_log_file("/nonexistent/folder/log"), -1);
    CHECK(ploop_set_log_file(""), -1);
    ploop_set_log_level(-2);
    make_error();
    slurp(path, text, sizeof(text));
    CHECK_TRUE(strstr(text, "/nonexistent/folder/log") != NULL); /* the old file went on */
    st.st_size = strlen(text);
    ploop_set_log_level(3);
    CHECK(ploop_set_log_file(NULL), 0);
    make_error();
    slurp(path, text, sizeof(text));
    CHECK(strlen(text), st.st_size);
}

static void on_alarm(int signal)
{
    (void)signal;
    ploop_cancel_operation();
}

int main(int argc, char **argv)
{
    pthread_t thread;
    char guid[39], *text;

    assert_library(NULL);
    if (argc != 2 || strlen(argv[1]) >= sizeof(folder))
        die("usage: logging FOLDER");
    strcpy(folder, argv[1]);
    CHECK_STR(ploop_get_last_error(), "");

    console();
    log_file();

    make_error();
    text = strdup(ploop_get_last_error());
    CHECK_TRUE(text && text[0]);
    CHECK(ploop_uuid_generate(guid, sizeof(guid)), 0);
    CHECK_STR(ploop_get_last_error(), text); /* success leaves it */
    if (pthread_create(&thread, NULL, other_thread, NULL) || pthread_join(thread, NULL))
        die("no thread");
    CHECK_STR(ploop_get_last_error(), text);
    free(text);

    /* From a signal handler, with nothing to cancel: nothing happens, now or later, and errno is kept. */
    signal(SIGALRM, on_alarm);
    errno = EXDEV;
    raise(SIGALRM);
    CHECK(errno, EXDEV);
    CHECK(ploop_uuid_generate(guid, sizeof(guid)), 0);

    if (failures)
        die("%d checks failed", failures);
    return 0;
}
