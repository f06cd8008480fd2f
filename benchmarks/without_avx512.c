/* Hides AVX-512, AMX and AVX-VNNI from a program on Linux x86-64, as if its processor had AVX2 only.

Libraries ask the instruction CPUID what they may use. The kernel can make CPUID fail with SIGSEGV (arch_prctl, "CPUID
faulting"). Preloaded into a program (LD_PRELOAD), this library has that done before main, and its handler answers each
CPUID with the processor's own answer less some bits. Threads and forks inherit the setting; exec clears it, and the
preloaded library sets it again. */

#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

static int (*real_sigaction)(int, const struct sigaction *, struct sigaction *);

/* Without libc, whose errno a handler must not change. */
static long allow_cpuid(long allowed) {
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "0"((long)SYS_arch_prctl), "D"((long)ARCH_SET_CPUID), "S"(allowed)
                   : "rcx", "r11", "memory");
  return result;
}

static void answer_cpuid(int number, siginfo_t *info, void *context) {
  (void)number, (void)info;
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *instruction = (const unsigned char *)registers[REG_RIP];
  if (instruction[0] != 0x0f || instruction[1] != 0xa2) { /* not CPUID: a true fault, which now ends the program */
    struct sigaction end;
    memset(&end, 0, sizeof end);
    end.sa_handler = SIG_DFL;
    real_sigaction(SIGSEGV, &end, 0);
    return;
  }
  unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX], a, b, c, d;
  allow_cpuid(1);
  __cpuid_count(leaf, subleaf, a, b, c, d);
  allow_cpuid(0);
  if (leaf == 7 && subleaf == 0) {
    b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* F DQ IFMA PF ER CD BW VL */
    c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));    /* VBMI VBMI2 VNNI BITALG VPOPCNTDQ */
    d &= ~(BIT(2) | BIT(3) | BIT(8));                         /* 4VNNIW 4FMAPS VP2INTERSECT */
    d &= ~(BIT(22) | BIT(23) | BIT(24) | BIT(25));            /* AMX-BF16 AVX512-FP16 AMX-TILE AMX-INT8 */
  }
  if (leaf == 7 && subleaf == 1) {
    a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23)); /* AVX-VNNI AVX512-BF16 AMX-FP16 AVX-IFMA */
    d = 0;                                       /* AVX-VNNI-INT8, AMX-COMPLEX, AVX10 and others of that age */
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

/* The program's own handlers of SIGSEGV would take the place of the handler above; they are left out. */
int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
  if (!real_sigaction) real_sigaction = dlsym(RTLD_NEXT, "sigaction");
  if (number == SIGSEGV && action) {
    if (old) memset(old, 0, sizeof *old);
    return 0;
  }
  return real_sigaction(number, action, old);
}

/* GCC, which torch.compile runs, takes this way. */
sighandler_t signal(int number, sighandler_t handler) {
  struct sigaction action, old;
  memset(&action, 0, sizeof action);
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  return sigaction(number, &action, &old) < 0 ? SIG_ERR : old.sa_handler;
}

__attribute__((constructor)) static void hide(void) {
  static const char failed[] = "without_avx512: the kernel cannot make CPUID fail here\n";
  if (!real_sigaction) real_sigaction = dlsym(RTLD_NEXT, "sigaction");
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = answer_cpuid;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  real_sigaction(SIGSEGV, &action, 0);
  if (allow_cpuid(0) < 0) { /* figures of another kind of machine would be worse than none */
    if (write(2, failed, sizeof failed - 1)) {}
    _exit(126);
  }
}
