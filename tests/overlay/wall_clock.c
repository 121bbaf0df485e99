/* Runs a program whose wall clock is so many seconds ahead; its other clocks are as they are.
 *
 *     wall-clock SECONDS PROGRAM ARGUMENT...
 *
 * A time namespace has no wall clock of its own (time_namespaces(7)), and a static program loads no library that could change what it
 * reads. So the program is traced: the vDSO is hidden from it, which makes clock_gettime(2) a system call, a filter stops it at
 * those for the wall clock, and their answer is changed. The program ends with this one. */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define THREADS 1024

/* Where each thread that asks wants its answer. */
static struct { pid_t thread; unsigned long answer; } asking[THREADS];

static void fail(const char *what) {
    fprintf(stderr, "wall-clock: %s: %s\n", what, strerror(errno));
    exit(125);
}

static void filter_clock_gettime(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clock_gettime, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, CLOCK_REALTIME, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof code / sizeof *code, code };
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0) return;
    /* Whoever does not administer its user namespace promises to gain nothing by it. */
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) fail("no_new_privs");
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) fail("seccomp");
}

/* The stack of a program that begins: argc, its arguments, 0, its environment, 0, pairs that the kernel tells it. */
static void hide_vdso(pid_t process) {
    struct __ptrace_syscall_info info;
    if (ptrace(PTRACE_GET_SYSCALL_INFO, process, sizeof info, &info) <= 0) fail("the stack");
    unsigned long *word = (unsigned long *)(unsigned long)info.stack_pointer;
    word += 1 + ptrace(PTRACE_PEEKDATA, process, word, 0) + 1;
    while (ptrace(PTRACE_PEEKDATA, process, word++, 0) != 0) {}
    for (;; word += 2) {
        long kind = ptrace(PTRACE_PEEKDATA, process, word, 0);
        if (kind == AT_NULL) return;
        if (kind == AT_SYSINFO_EHDR && ptrace(PTRACE_POKEDATA, process, word, AT_IGNORE) != 0) fail("the vDSO");
    }
}

static void note_question(pid_t thread) {
    struct __ptrace_syscall_info info;
    if (ptrace(PTRACE_GET_SYSCALL_INFO, thread, sizeof info, &info) <= 0) return;
    int place = 0;
    while (asking[place].thread != 0 && asking[place].thread != thread)
        if (++place == THREADS) { errno = EAGAIN; fail("threads"); }
    asking[place].thread = thread;
    asking[place].answer = info.seccomp.args[1];
}

static void change_answer(pid_t thread, long ahead) {
    for (int place = 0; place < THREADS; place++) {
        if (asking[place].thread != thread) continue;
        struct timespec time;
        struct iovec here = { &time, sizeof time };
        struct iovec there = { (void *)asking[place].answer, sizeof time };
        if (process_vm_readv(thread, &here, 1, &there, 1, 0) == sizeof time) {
            time.tv_sec += ahead;
            process_vm_writev(thread, &here, 1, &there, 1, 0);
        }
        return;
    }
}

int main(int count, char **words) {
    if (count < 3) { fprintf(stderr, "wall-clock SECONDS PROGRAM ARGUMENT...\n"); return 125; }
    long ahead = atol(words[1]);
    int ready[2];
    if (pipe2(ready, O_CLOEXEC) != 0) fail("pipe");
    pid_t program = fork();
    if (program < 0) fail("fork");
    if (program == 0) {
        char word;
        close(ready[1]);
        if (read(ready[0], &word, 1) != 1) _exit(125);
        filter_clock_gettime();
        execvp(words[2], words + 2);
        fail(words[2]);
    }
    long options = PTRACE_O_EXITKILL | PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK
        | PTRACE_O_TRACEEXEC | PTRACE_O_TRACESECCOMP | PTRACE_O_TRACESYSGOOD;
    if (ptrace(PTRACE_SEIZE, program, 0, options) != 0) fail("ptrace");
    if (write(ready[1], "g", 1) != 1) fail("pipe");
    for (;;) {
        int status;
        pid_t thread = waitpid(-1, &status, __WALL);
        if (thread < 0) fail("wait");
        if (!WIFSTOPPED(status)) {
            if (thread == program) return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            continue;
        }
        int signal = WSTOPSIG(status), event = status >> 16;
        if (event == PTRACE_EVENT_SECCOMP) {
            note_question(thread);
            ptrace(PTRACE_SYSCALL, thread, 0, 0);
            continue;
        }
        if (signal == (SIGTRAP | 0x80)) change_answer(thread, ahead);
        if (event == PTRACE_EVENT_EXEC) hide_vdso(thread);
        /* What is neither of these is a signal, which the thread gets. */
        ptrace(PTRACE_CONT, thread, 0, event != 0 || signal == (SIGTRAP | 0x80) ? 0 : signal);
    }
}
