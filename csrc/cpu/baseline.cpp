// What every processor of the architecture runs.
#define LOOKSAM_VECTOR_BYTES 16
#define LOOKSAM_ISA baseline
#define LOOKSAM_ISA_NAME "baseline"
#include "chunks.h"
