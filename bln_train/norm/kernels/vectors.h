/* Vectors of the compiler's own, 32 bytes wide; REAL is float or double. */

#define LANES ((long)(32 / sizeof(REAL)))

typedef REAL vec __attribute__((vector_size(32)));
typedef REAL in_memory __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));

static inline vec load(const REAL *from) { return *(const in_memory *)from; }
static inline void store(REAL *to, vec v) { *(in_memory *)to = v; }
static inline long smaller(long a, long b) { return a < b ? a : b; }
static inline long larger(long a, long b) { return a > b ? a : b; }
