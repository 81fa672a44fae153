/* Preloaded into a program on Linux x86-64, this makes the processor look as if it ended at AVX2.
 *
 * Kernel libraries (MLAS in ONNX Runtime, oneDNN in OpenVINO and PyTorch) choose their code by the CPUID instruction. Linux can make CPUID
 * trap (arch_prctl(ARCH_CPUID_SET, 0), processors and hypervisors with "cpuid_fault" in /proc/cpuinfo); the handler answers as the processor
 * does, without the bits of AVX-512, VNNI and AMX. /proc/cpuinfo is read without them, too, and the model's name says so.
 * What runs is then the very code that runs on a processor with AVX2 only: saturating integer products, 256-bit vectors. Clock rates, caches and
 * ports are still those of this machine.
 *
 *     cc -O2 -shared -fPIC -o avx2.so avx2.c -ldl;  LD_PRELOAD=$PWD/avx2.so program
 *
 * Exit status 97: this machine cannot trap CPUID.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_CPUID_SET 0x1012 /* asm/prctl.h */
#define BIT(n) (1u << (n))

static const char *const HIDDEN[] = {"avx512", "avx_vnni", "avx10", "amx_", "avx_ifma", "avx_ne_convert"};
static const char SAYS[] = ", AVX-512, VNNI and AMX hidden";

static struct sigaction theirs; /* the program's own handler of SIGSEGV */
static int (*real_sigaction)(int, const struct sigaction *, struct sigaction *);

/* Without the C library: errno belongs to the program that was interrupted. */
static long cpuid_runs(long on) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"((long)SYS_arch_prctl), "D"((long)ARCH_CPUID_SET), "S"(on) : "rcx", "r11", "memory");
    return result;
}

static void answer(greg_t *registers) {
    uint32_t leaf = (uint32_t)registers[REG_RAX], sub = (uint32_t)registers[REG_RCX], a = leaf, b, c = sub, d;
    cpuid_runs(1);
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    cpuid_runs(0);
    if (leaf == 7 && sub == 0) {
        /* AVX512 F DQ IFMA PF ER CD BW VL; VBMI VBMI2 VNNI BITALG VPOPCNTDQ; 4VNNIW 4FMAPS VP2INTERSECT AMX-BF16 FP16 AMX-TILE AMX-INT8 */
        b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
        c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));
        d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
    } else if (leaf == 7 && sub == 1) {
        /* AVX-VNNI AVX512-BF16 AMX-FP16 AVX-IFMA; AVX-VNNI-INT8 AVX-NE-CONVERT AMX-COMPLEX AVX-VNNI-INT16 AVX10 */
        a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));
        d &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19));
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2; /* the length of CPUID */
}

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)registers[REG_RIP];
    /* A trap is a general protection fault (SI_KERNEL): the code can be read. A wild address is SEGV_MAPERR or SEGV_ACCERR. */
    if (info->si_code == SI_KERNEL && code[0] == 0x0f && code[1] == 0xa2) {
        answer(registers);
    } else if (theirs.sa_flags & SA_SIGINFO) {
        theirs.sa_sigaction(number, info, context);
    } else if (theirs.sa_handler != SIG_DFL && theirs.sa_handler != SIG_IGN) {
        theirs.sa_handler(number);
    } else {
        struct sigaction plain = {.sa_handler = SIG_DFL};
        real_sigaction(SIGSEGV, &plain, NULL); /* it faults again and ends as it would have */
    }
}

int sigaction(int number, const struct sigaction *now, struct sigaction *before) {
    if (!real_sigaction) real_sigaction = dlsym(RTLD_NEXT, "sigaction");
    if (number != SIGSEGV) return real_sigaction(number, now, before);
    struct sigaction was = theirs;
    if (now) theirs = *now;
    if (before) *before = was;
    return 0;
}

sighandler_t signal(int number, sighandler_t now) {
    struct sigaction next = {.sa_handler = now, .sa_flags = SA_RESTART}, before;
    return sigaction(number, &next, &before) ? SIG_ERR : before.sa_handler;
}

__attribute__((constructor(101))) static void begin(void) {
    if (!real_sigaction) real_sigaction = dlsym(RTLD_NEXT, "sigaction");
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    real_sigaction(SIGSEGV, &ours, NULL);
    if (cpuid_runs(0) != 0) {
        static const char cannot[] = "avx2.so: this machine cannot trap CPUID (no cpuid_fault in /proc/cpuinfo)\n";
        if (write(2, cannot, sizeof cannot - 1) < 0) _exit(98);
        _exit(97);
    }
}

static int is_hidden(const char *word) {
    for (size_t i = 0; i < sizeof HIDDEN / sizeof *HIDDEN; i++)
        if (strncmp(word, HIDDEN[i], strlen(HIDDEN[i])) == 0) return 1;
    return 0;
}

/* Return a file descriptor of /proc/cpuinfo without the hidden words, or -1. */
static int narrowed(void) {
    int real = (int)syscall(SYS_openat, AT_FDCWD, "/proc/cpuinfo", O_RDONLY | O_CLOEXEC);
    FILE *in = real < 0 ? NULL : fdopen(real, "r");
    int out = in ? memfd_create("cpuinfo", 0) : -1;
    char *line = NULL;
    size_t room = 0;
    while (out >= 0 && getline(&line, &room, in) > 0) {
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line, "flags", 5) == 0) {
            char *rest = line, *word;
            for (int first = 1; (word = strsep(&rest, " ")); first = 0)
                if (!is_hidden(word)) dprintf(out, first ? "%s" : " %s", word);
            dprintf(out, "\n");
        } else {
            dprintf(out, "%s%s\n", line, strncmp(line, "model name", 10) == 0 ? SAYS : "");
        }
    }
    free(line);
    if (in) fclose(in);
    if (out >= 0) lseek(out, 0, SEEK_SET);
    return out;
}

/* lscpu opens "cpuinfo" in the folder /proc. */
static int is_cpuinfo(int folder, const char *path) {
    if (strcmp(path, "/proc/cpuinfo") == 0) return 1;
    if (folder < 0 || strcmp(path, "cpuinfo") != 0) return 0;
    char link[32], target[8] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    return readlink(link, target, sizeof target - 1) == 5 && strcmp(target, "/proc") == 0;
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
    return is_cpuinfo(folder, path) ? narrowed() : (int)syscall(SYS_openat, folder, path, flags, mode);
}

#define MODE(flags, mode)                          \
    mode_t mode = 0;                               \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {       \
        va_list rest;                              \
        va_start(rest, flags);                     \
        mode = va_arg(rest, mode_t);               \
        va_end(rest);                              \
    }

int open(const char *path, int flags, ...) {
    MODE(flags, mode)
    return opened(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags, mode)
    return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    MODE(flags, mode)
    return opened(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags, mode)
    return opened(folder, path, flags | O_LARGEFILE, mode);
}
/* What a program built with _FORTIFY_SOURCE calls instead. */
int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags | O_LARGEFILE, 0); }
int __openat_2(int folder, const char *path, int flags) { return opened(folder, path, flags, 0); }
int __openat64_2(int folder, const char *path, int flags) { return opened(folder, path, flags | O_LARGEFILE, 0); }
FILE *fopen(const char *path, const char *mode) {
    static FILE *(*real_fopen)(const char *, const char *);
    if (!real_fopen) real_fopen = dlsym(RTLD_NEXT, "fopen");
    if (strcmp(path, "/proc/cpuinfo") != 0) return real_fopen(path, mode);
    int file = narrowed();
    return file < 0 ? NULL : fdopen(file, mode);
}
FILE *fopen64(const char *path, const char *mode) { return fopen(path, mode); }
